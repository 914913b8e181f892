"""The chat on a terminal: history that fits the context, commands, Ctrl-C."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console

from . import session as reports
from .answer import Answer, Message, Sampling, stream_answer
from .errors import BridgeError, SettingsError
from .memory import format_bytes
from .run import Options, load, note_missing_template, print_report, write_atomically, writer

if TYPE_CHECKING:
    from ._llama import Llama

HELP = """\
/help        this list
/reset       forget the conversation
/memory      what the cache takes
/save FILE   write the conversation to a JSON file
/load FILE   go on with a saved conversation
/exit        leave (or Ctrl-D)
Ctrl-C stops an answer. Alt-Enter begins a new line."""

FORMAT, VERSION = "mixkvq-chat", 1
ROLES = ("system", "user", "assistant")


def parse_conversation(text: str) -> list[Message]:
    """The messages of a saved conversation. Raises SettingsError with one sentence if it is not one."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise SettingsError(f"It is not JSON ({e}).") from None
    if isinstance(data, dict):
        if data.get("format") != FORMAT:
            raise SettingsError("It is not a saved conversation.")
        if data.get("version") != VERSION:
            raise SettingsError(f"It is of version {data.get('version')!r}, and this program reads version {VERSION}.")
        data = data.get("messages")
    if not isinstance(data, list):
        raise SettingsError("It holds no list of messages.")
    messages: list[Message] = []
    for i, m in enumerate(data):
        if not isinstance(m, dict) or m.get("role") not in ROLES or not isinstance(m.get("content"), str):
            raise SettingsError(f"Message {i + 1} has no known role or no text.")
        messages.append({"role": m["role"], "content": m["content"]})
    return messages


def drop_oldest(messages: list[Message]) -> list[Message] | None:
    """The conversation without its oldest turn (a question and what follows it), system message kept; None if only one turn is left."""
    head = [m for m in messages[:1] if m["role"] == "system"]
    questions = [i for i in range(len(head), len(messages)) if messages[i]["role"] == "user"]
    if len(questions) < 2:
        return None
    return head + messages[questions[1] :]


class Chat:
    """One conversation with one model."""

    def __init__(
        self, llama: Llama, sampling: Sampling, system: str | None, console: Console, write: Callable[[str], None], ask: Callable[[str], str]
    ) -> None:
        self.llama, self.sampling, self.console, self.write, self.ask = llama, sampling, console, write, ask
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self.system)
        self.last: Answer | None = None
        self.told_of_drop = False

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def turn(self, text: str) -> None:
        """Answer one message of the user. What fails leaves the conversation as it was."""
        fitted = self.fitted([*self.messages, {"role": "user", "content": text}])
        answer = stream_answer(self.llama, fitted, self.sampling, self.write, self.console)
        self.write("\n")
        self.last = answer
        self.sampling.seed = (self.sampling.seed + 1) & 0x7FFFFFFF  # the same question again may get another answer
        if answer.finish_reason == "interrupted":
            self.say("(stopped)")
            if not answer.text:
                return
        elif answer.finish_reason == "length":
            self.say("(cut off: the limit of tokens is reached)")
        self.messages = [*fitted, {"role": "assistant", "content": answer.text}]

    def fitted(self, messages: list[Message]) -> list[Message]:
        """The conversation, without old turns if it would not leave room for an answer. Raises SettingsError if one message is too long."""
        n_ctx = self.llama.n_ctx()
        room = min(self.sampling.max_tokens, n_ctx // 2) if self.sampling.max_tokens > 0 else n_ctx // 4
        n = len(self.llama.chat_tokens(messages))
        if n <= n_ctx - room:
            return messages
        while n > (n_ctx - room) // 2:  # below the limit, so that not every turn from now on is read anew
            shorter = drop_oldest(messages)
            if shorter is None:
                break
            messages = shorter
            n = len(self.llama.chat_tokens(messages))
            if not self.told_of_drop:
                self.told_of_drop = True
                self.say("(The conversation is longer than the context; its oldest turns are dropped from here on.)")
        if n >= n_ctx - min(room, 16):
            raise SettingsError(f"The message makes a prompt of {n} tokens and the context holds {n_ctx}; shorten it, or start with a larger -c.")
        return messages

    def command(self, line: str) -> bool:
        """Run a command; False ends the chat."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/exit", "/quit"):
            return False
        if name == "/help":
            self.say(HELP)
        elif name == "/reset":
            self.messages, self.told_of_drop = list(self.system), False
            self.llama.reset()
            self.say("The conversation is forgotten.")
        elif name == "/memory":
            self.say(reports.format_report(self.llama.kv_stats()))
            self.say(f"{self.llama.n_tokens} of {self.llama.n_ctx()} cells hold tokens.")
        elif name in ("/save", "/load"):
            if not argument:
                raise SettingsError(f"{name} needs the name of a file.")
            path = os.path.expanduser(argument)
            self.save(path) if name == "/save" else self.load(path)
        else:
            raise SettingsError(f"There is no command {name}; /help lists them.")
        return True

    def save(self, path: str) -> None:
        text = json.dumps({"format": FORMAT, "version": VERSION, "messages": self.messages}, indent=1, ensure_ascii=False) + "\n"
        try:
            try:
                write_atomically(path, text, overwrite=False)
            except FileExistsError:
                if self.ask(f"{path} exists. Replace it? [y/N] ").strip().lower() not in ("y", "yes"):
                    self.say("Not saved.")
                    return
                write_atomically(path, text)
        except OSError as e:
            raise SettingsError(f"{path} cannot be written: {e.strerror or e}.") from None
        self.say(f"{len(self.messages)} messages saved to {path}.")

    def load(self, path: str) -> None:
        try:
            with open(path, encoding="utf-8") as f:
                text = f.read()
        except OSError as e:
            raise SettingsError(f"{path} cannot be read: {e.strerror or e}.") from None
        except UnicodeDecodeError:
            raise SettingsError(f"{path} is not UTF-8 text.") from None
        try:
            messages = parse_conversation(text)
            if messages:
                self.llama.chat_tokens(messages)  # the template may refuse it
        except SettingsError as e:
            raise SettingsError(f"{path} cannot be loaded: {e}") from None
        self.messages, self.told_of_drop = messages, False
        self.say(f"{len(messages)} messages loaded from {path}.")

    def loop(self) -> None:
        """Read and answer until /exit or the end of input."""
        while True:
            try:
                line = self.ask("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    if not self.command(line.strip()):
                        return
                else:
                    self.turn(line)
            except BridgeError as e:
                self.say(f"error: {e}")
            except (KeyboardInterrupt, EOFError):
                self.say("(stopped)")


def _reader() -> Callable[[str], str]:
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(history=InMemoryHistory(), key_bindings=keys)
    return lambda message: session.prompt(message)


def chat(options: Options, console: Console) -> int:
    """The interactive chat. Returns the exit code."""
    llama = load(options, console)
    try:
        stats = llama.kv_stats()
        note_missing_template(llama, console)
        console.print(
            f"{os.path.basename(options.model)}, cache {reports.title(stats)}: {format_bytes(stats['bytes'])} for {llama.n_ctx()} tokens. "
            "/help lists the commands.",
            markup=False,
        )
        conversation = Chat(llama, options.sampling, options.system, console, writer(), _reader())
        conversation.loop()
        if conversation.last is not None:
            print_report(llama, conversation.last, options, console)
        return 0
    finally:
        llama.close()
