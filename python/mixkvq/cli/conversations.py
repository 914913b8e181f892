"""Conversations as files: those that a user saves, and those that the chat keeps by itself."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from bridge.states import SUFFIX

from ..core.errors import SettingsError, StateError, check_text
from ..core.files import write_atomically
from .answer import Message

if TYPE_CHECKING:
    from bridge.llama import Llama

FORMAT, VERSION = "mixkvq-chat", 1
ROLES = ("system", "user", "assistant")


def to_text(messages: Sequence[Message]) -> str:
    """A conversation as JSON."""
    return json.dumps({"format": FORMAT, "version": VERSION, "messages": list(messages)}, indent=1, ensure_ascii=False) + "\n"


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
        check_text(m["content"], f"The text of message {i + 1}")
        messages.append({"role": m["role"], "content": m["content"]})
    return messages


def read_conversation(path: str | os.PathLike[str]) -> list[Message]:
    """The messages of a file. Raises SettingsError that names it."""
    try:
        return parse_conversation(Path(path).read_bytes().decode("utf-8"))
    except OSError as e:
        raise SettingsError(f"{path} cannot be read: {e.strerror or e}.") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text.") from None
    except SettingsError as e:
        raise SettingsError(f"{path} cannot be loaded: {e}") from None


def cache_of(path: str | os.PathLike[str]) -> str:
    """Where the cache of a saved conversation lies: chat.json.mixkvq-state beside chat.json."""
    return os.fspath(path) + SUFFIX


def save_cache(path: str | os.PathLike[str], llama: Llama) -> int:
    """Write what the model has read beside a conversation that was saved; how many bytes, 0 if it has read nothing.

    Raises OSError that names the file.
    """
    where = cache_of(path)
    if llama.n_tokens:
        return llama.save_file(where)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(where)  # it would be another conversation's
    return 0


def load_cache(path: str | os.PathLike[str], llama: Llama) -> str | None:
    """Put the cache of a conversation back, if it has one. Why that was not possible, without a full stop, or None.

    The conversation is then read anew.
    """
    where = cache_of(path)
    if not os.path.exists(where):
        return None
    try:
        llama.load_file(where)
    except StateError as e:
        return str(e).rstrip(".")
    return None


def folder() -> Path:
    """Where the chat keeps conversations: in the user's folder for data, $XDG_DATA_HOME/mixkvq/chats on Linux."""
    return Path(platformdirs.user_data_dir("mixkvq", appauthor=False)) / "chats"


@dataclass(frozen=True)
class Kept:
    """A conversation that was kept. title: the beginning of its first question."""

    path: Path
    when: str
    n_messages: int
    title: str


def kept(other_than: Path | None = None, most: int = 10) -> list[Kept]:
    """The newest conversations that were kept, newest first. Files that are no conversations are left out."""
    found: list[Kept] = []
    try:
        paths = sorted(folder().glob("*.json"), reverse=True)
    except OSError:
        return []
    for path in paths:
        if len(found) == most:
            break
        try:
            messages = read_conversation(path)
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        except (SettingsError, OSError):
            continue
        question = " ".join(next((m["content"] for m in messages if m["role"] == "user"), "").split())
        if path != other_than and question:
            found.append(Kept(path, when, len(messages), question if len(question) <= 50 else question[:49] + "…"))
    return found


class Autosave:
    """Keeps the conversation that is going on in a file of the user's alone, so that a closed terminal or a crash does not cost it.

    say: told once, in one sentence, if nothing can be kept.
    """

    def __init__(self, say: Callable[[str], None], on: bool = True) -> None:
        self.say, self.on = say, on
        self.path: Path | None = None

    def begin(self) -> None:
        """What is saved next is another conversation."""
        self.path = None

    def save(self, messages: Sequence[Message]) -> None:
        """Write the conversation as it is now. Without a question in it there is nothing to keep."""
        if not self.on or not any(m["role"] == "user" for m in messages):
            return
        where = folder()
        try:
            if not where.is_absolute():
                raise OSError(f"{where} is no absolute path")
            where.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path is None:
                self.path = where / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000_000:09d}.json"
            write_atomically(self.path, to_text(messages), private=True)
        except OSError as e:
            self.on = False
            self.say(f"(This conversation is not kept: {e.filename or where}: {(e.strerror or str(e)).rstrip('.')}.)")
