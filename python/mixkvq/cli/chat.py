"""The chat on a terminal: history that fits the context, commands, Ctrl-C."""

from __future__ import annotations

import difflib
import os
import re
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from rich.console import Console

from bridge import report as reports

from ..core.errors import BridgeError, SettingsError, check_text
from ..core.files import check_target, write_atomically
from ..core.memory import format_bytes
from .answer import LARGEST_SEED, Answer, Message, Sampling, stream_answer
from .command import for_command
from .conversations import Autosave, cache_of, folder, kept, load_cache, parse_conversation, read_conversation, save_cache, to_text
from .offer import Offer
from .running import Options, load, note_missing_template, print_report, why_it_ended, writer

if TYPE_CHECKING:
    from bridge.llama import Llama

HELP = """\
/help        this list
/reset       forget the conversation
/memory      what the cache takes
/save FILE   write the conversation to a JSON file, and the cache beside it
/load FILE   go on with a saved conversation
/chats       list the conversations that were kept
/resume [N]  go on with the last of them, or with number N of the list
/exit        leave (or Ctrl-D)
//text       send /text, which is no command
Ctrl-C stops an answer. Alt-Enter begins a new line."""
COMMANDS = ("/help", "/reset", "/memory", "/save", "/load", "/chats", "/resume", "/exit", "/quit")

__all__ = ["Chat", "chat", "drop_oldest", "is_command", "parse_conversation"]


def is_command(line: str) -> bool:
    """Whether a line is meant as a command: its first word is a slash and a name. A path, or a second slash, is text."""
    return line in ("/", "/?") or re.match(r"/[A-Za-z]+(\s|$)", line) is not None


def drop_oldest(messages: list[Message]) -> list[Message] | None:
    """The conversation without its oldest turn (a question and what follows it), system message kept; None if only one turn is left."""
    head = [m for m in messages[:1] if m["role"] == "system"]
    questions = [i for i in range(len(head), len(messages)) if messages[i]["role"] == "user"]
    if len(questions) < 2:
        return None
    return head + messages[questions[1] :]


class Chat:
    """One conversation with one model.

    messages: what the model is given, without turns that no longer fit the context. transcript: all that was said; this is what is saved.
    """

    def __init__(
        self,
        llama: Llama,
        sampling: Sampling,
        system: str | None,
        console: Console,
        write: Callable[[str], None],
        ask: Callable[[str], str],
        autosave: bool = False,
        on_read: Callable[[], None] | None = None,
        offer: Offer | None = None,
    ) -> None:
        self.llama, self.sampling, self.console, self.write, self.ask, self.on_read = llama, sampling, console, write, ask, on_read
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.autosave = Autosave(self.say, autosave)
        self.last: Answer | None = None
        self.offer = offer
        self.begin(self.system)

    def begin(self, messages: list[Message]) -> None:
        """Start from these messages."""
        self.messages, self.transcript, self.told_of_drop = list(messages), list(messages), False
        self.autosave.begin()

    def say(self, text: str) -> None:
        """A line on stderr."""
        self.console.print(text, markup=False, highlight=False)

    def turn(self, text: str) -> None:
        """Answer one message of the user. What fails leaves the conversation as it was, in what is kept as well."""
        check_text(text, "The message")
        question: Message = {"role": "user", "content": text}
        fitted = self.fitted([*self.messages, question])
        self.autosave.save([*self.transcript, question])
        pieces: list[str] = []

        def write(piece: str) -> None:
            pieces.append(piece)
            self.write(piece)

        try:
            answer = stream_answer(self.llama, fitted, self.sampling, write, self.console, self.on_read)
        except BaseException:  # the terminal may be gone
            self.autosave.save([*self.transcript, question, {"role": "assistant", "content": "".join(pieces)}])
            raise
        if answer.text or answer.finish_reason != "interrupted":
            reply: Message = {"role": "assistant", "content": answer.text}
            self.messages = [*fitted, reply]
            self.transcript = [*self.transcript, question, reply]
        self.autosave.save(self.transcript if answer.text or not answer.signal else [*self.transcript, question])
        if answer.signal:
            signal.raise_signal(answer.signal)
        self.last = answer
        self.sampling.seed = (self.sampling.seed + 1) % (LARGEST_SEED + 1)  # the same question again may get another answer
        self.write("\n")
        ended = why_it_ended(answer, self.sampling.max_tokens)
        if ended:
            self.say(ended)
        if self.offer is not None:
            self.offer.answered(answer)

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
            self.begin(self.system)
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
        elif name == "/chats":
            self.list_kept()
        elif name == "/resume":
            self.resume(argument)
        else:
            nearest = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else "; /help lists them."
            raise SettingsError(f"There is no command {name}{hint} A line that begins with // is sent with one slash.")
        return True

    def save(self, path: str) -> None:
        """/save: write the conversation as JSON. What is there and is no conversation is not replaced. Raises SettingsError."""
        exists = os.path.isfile(path)
        check_target(path, force=True, what="JSON", inputs=[self.llama.model_path])
        check_target(cache_of(path), force=True, what="state")
        if exists and os.path.getsize(path):
            try:
                read_conversation(path)
            except SettingsError:
                raise SettingsError(f"{path} is no conversation, so it is not replaced; give another name.") from None
        if exists and self.ask(f"{path} exists. Replace it? [y/N] ").strip().lower() not in ("y", "yes"):
            self.say("Not saved.")
            return
        try:
            write_atomically(path, to_text(self.transcript), overwrite=exists)
            size = save_cache(path, self.llama)
        except OSError as e:
            raise SettingsError(f"{e.filename or path} cannot be written: {e.strerror or e}.") from None
        self.say(f"{len(self.transcript)} messages saved to {path}" + (f", and the cache ({format_bytes(size)}) beside it." if size else "."))

    def load(self, path: str) -> None:
        """/load: go on with a conversation from a file. Raises SettingsError if it is none, or the chat template refuses it."""
        messages = read_conversation(path)
        if messages:
            try:
                self.llama.chat_tokens(messages)  # the template may refuse it
            except SettingsError as e:
                raise SettingsError(f"{path} cannot be loaded: {e}") from None
        why = load_cache(path, self.llama)
        self.begin(messages)
        self.say(f"{len(messages)} messages loaded from {path}{'' if why is None else f'; they are read anew: {why}'}.")

    def list_kept(self) -> None:
        """/chats: the conversations that were kept, the newest first."""
        for i, each in enumerate(found := kept(self.autosave.path), 1):
            self.say(f"{i:3}  {each.when}  {each.n_messages:3} messages  {each.title}")
        self.say(f"They are files in {folder()}." if found else f"There are no other conversations in {folder()}.")

    def resume(self, number: str) -> None:
        """/resume: go on with a conversation of that list; "": the newest. Raises SettingsError."""
        found = kept(self.autosave.path)
        if not found:
            raise SettingsError(f"There are no other conversations in {folder()}.")
        if number and not (number.isascii() and number.isdigit() and 1 <= int(number) <= len(found)):
            raise SettingsError(f"/resume takes a number from 1 to {len(found)} of the list that /chats shows.")
        self.load(str(found[int(number or 1) - 1].path))

    def loop(self) -> None:
        """Read and answer until /exit or the end of input."""
        while True:
            try:
                if self.offer is not None:
                    self.offer.waits()
                line = self.ask("> ")
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            finally:
                if self.offer is not None:
                    self.offer.returned()
            if not line.strip():
                continue
            try:
                if is_command(line.lstrip()):
                    if not self.command(line.strip()):
                        return
                else:
                    self.turn(line.replace("//", "/", 1) if line.startswith("//") else line)
            except BridgeError as e:
                self.say(f"error: {for_command(e)}")
            except (KeyboardInterrupt, EOFError):
                self.say("(stopped)")


def _reader(typed: Callable[[], None]) -> Callable[[str], str]:
    """typed: called at every change of the line."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(history=InMemoryHistory(), key_bindings=keys)
    session.default_buffer.on_text_changed += lambda _: typed()
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
        if options.autosave and kept(most=1):
            console.print("Earlier conversations are kept: /resume goes on with the last, /chats lists them.", markup=False)
        ask = _reader(lambda: offer.typed())
        offer = Offer(options, lambda line: console.print(line, markup=False, highlight=False), ask)
        conversation = Chat(llama, options.sampling, options.system, console, writer(), ask, options.autosave, options.on_read(llama), offer)
        if options.prompt_cache is not None:
            options.prompt_cache.begin(llama)
        conversation.loop()
        if options.prompt_cache is not None:
            options.prompt_cache.end(llama)
        if conversation.last is not None:
            print_report(llama, conversation.last, options, console)
        return 0
    finally:
        llama.close()
