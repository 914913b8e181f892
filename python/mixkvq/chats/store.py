"""The store: chats and their trees of messages in one SQLite file, which several threads and processes may use at once."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from ..core.errors import StoreError
from . import schema
from .records import ROLES, Chat, Hit, Message, branch

_MESSAGE = "id, chat, parent, role, content, reasoning, state, created, shown, files, figures"
_CHAT = "id, title, system, settings, created, changed, shown"
_TRIGRAM = 3  # letters that the index needs


def default_path() -> Path:
    """Where chats are kept: in the user's folder for data, $XDG_DATA_HOME/mixkvq/chats.db on Linux."""
    return Path(platformdirs.user_data_dir("mixkvq", appauthor=False)) / "chats.db"


def _me() -> str:
    """The process, told from one that gets its number later."""
    return f"{os.getpid()}:{psutil.Process().create_time():.2f}"


def _lives(owner: str) -> bool:
    pid, _, began = owner.partition(":")
    try:
        return f"{psutil.Process(int(pid)).create_time():.2f}" == began
    except (psutil.Error, ValueError):
        return False


class Store:
    """Chats in a file that only its owner can read; path None: in memory, nothing is written anywhere.

    Every method may be called from any thread. What fails raises StoreError with a sentence and has changed nothing; chats and messages that are
    not there are StoreErrors, too. Answers that a process has left unfinished are ended as "cut", with all that was stored of them.
    """

    def __init__(self, path: Path | str | None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.RLock()
        self._owner = _me()
        try:
            self._db = schema.connect(self.path)
        except OSError as e:
            raise StoreError(f"{e.filename or path}: {e.strerror or e}.") from None
        self._fold_dead()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of it or nothing."""
        with self._lock, self._said():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """SQLite's errors as sentences."""
        try:
            yield
        except sqlite3.Error as e:
            raise StoreError(f"{self.path or 'The store'}: {e}; nothing was changed.") from None

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock, self._said():
            return self._db.execute(query, values).fetchall()

    # --- chats ---

    def create(self, title: str = "", system: str = "", settings: dict[str, Any] | None = None) -> int:
        """A new chat; its number."""
        now = time.time()
        with self._change() as db:
            row = (title, system, json.dumps(settings or {}), now, now)
            return int(db.execute("INSERT INTO chats (title, system, settings, created, changed) VALUES (?, ?, ?, ?, ?)", row).lastrowid or 0)

    def chats(self) -> list[Chat]:
        """All of them, the one that was changed last first."""
        return [_chat(row) for row in self._rows(f"SELECT {_CHAT} FROM chats ORDER BY changed DESC, id DESC")]

    def chat(self, chat: int) -> Chat:
        """One of them."""
        rows = self._rows(f"SELECT {_CHAT} FROM chats WHERE id = ?", chat)
        if not rows:
            raise StoreError(f"There is no chat {chat}.")
        return _chat(rows[0])

    def change(self, chat: int, *, title: str | None = None, system: str | None = None, settings: dict[str, Any] | None = None) -> None:
        """Set what is given."""
        self.chat(chat)
        given = {"title": title, "system": system, "settings": None if settings is None else json.dumps(settings)}
        with self._change() as db:
            for name, value in given.items():
                if value is not None:
                    db.execute(f"UPDATE chats SET {name} = ? WHERE id = ?", (value, chat))
            db.execute("UPDATE chats SET changed = ? WHERE id = ?", (time.time(), chat))

    def delete(self, chat: int) -> None:
        """Delete a chat with all that belongs to it, also from SQLite's log."""
        self.chat(chat)
        with self._change() as db:
            db.execute("DELETE FROM chats WHERE id = ?", (chat,))
            db.execute("INSERT INTO found (found) VALUES ('optimize')")  # the index, too, keeps nothing of it
        with self._lock, contextlib.suppress(sqlite3.Error):  # somebody else reads; then it goes with the next checkpoint
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    # --- messages ---

    def messages(self, chat: int) -> list[Message]:
        """All messages of a chat's tree, in the order of their making; running answers with what is stored of them."""
        self.chat(chat)
        return self._messages("chat", chat)

    def message(self, message: int) -> Message:
        """One message, as it is stored."""
        found = self._messages("id", message)
        if not found:
            raise StoreError(f"There is no message {message}.")
        return found[0]

    def _messages(self, column: str, value: int) -> list[Message]:
        """A message and its pieces as they were at one time, whoever writes meanwhile."""
        with self._lock, self._said():
            alone = not self._db.in_transaction
            if alone:
                self._db.execute("BEGIN")
            try:
                found = [_message(row) for row in self._db.execute(f"SELECT {_MESSAGE} FROM messages WHERE {column} = ? ORDER BY id", (value,))]
                for message in found:
                    if message.state == "running":
                        self._add_pieces(message)
            finally:
                if alone:
                    self._db.execute("COMMIT")
        return found

    def branch(self, chat: int) -> list[Message]:
        """The messages that are shown."""
        return branch(self.messages(chat), self.chat(chat).shown)

    def add(
        self,
        chat: int,
        parent: int | None,
        role: str,
        content: str,
        *,
        reasoning: str = "",
        files: Sequence[dict[str, str]] = (),
        figures: dict[str, Any] | None = None,
        state: str = "done",
        created: float | None = None,
    ) -> int:
        """A message behind another, which is shown from now on; its number. A second one behind the same is a branch."""
        if role not in ROLES:
            raise StoreError(f"{role!r} is no role of a message; there are {' and '.join(ROLES)}.")
        self.chat(chat)
        if parent is not None and self.message(parent).chat != chat:
            raise StoreError(f"Message {parent} belongs to another chat.")
        now = time.time()
        created = now if created is None else created
        owner = self._owner if state == "running" else ""
        row = (chat, parent, role, content, reasoning, state, created, json.dumps(list(files)), json.dumps(figures or {}), owner)
        with self._change() as db:
            names = "chat, parent, role, content, reasoning, state, created, files, figures, owner"
            added = int(db.execute(f"INSERT INTO messages ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row).lastrowid or 0)
            self._show(db, chat, parent, added)
            db.execute("UPDATE chats SET changed = ? WHERE id = ?", (now, chat))
        return added

    def show(self, message: int) -> None:
        """Show the branch of a message: it and those before it; behind it what was shown there last."""
        found: Message | None = self.message(message)
        with self._change() as db:
            while found is not None:
                self._show(db, found.chat, found.parent, found.id)
                found = None if found.parent is None else self.message(found.parent)

    def show_here(self, message: int) -> None:
        """Show a message behind the one that it follows, whether that is shown or not."""
        found = self.message(message)
        with self._change() as db:
            self._show(db, found.chat, found.parent, found.id)

    def _show(self, db: sqlite3.Connection, chat: int, parent: int | None, message: int) -> None:
        if parent is None:
            db.execute("UPDATE chats SET shown = ? WHERE id = ?", (message, chat))
        else:
            db.execute("UPDATE messages SET shown = ? WHERE id = ?", (message, parent))

    # --- answers as they come ---

    def begin(self, chat: int, parent: int, figures: dict[str, Any] | None = None) -> int:
        """An answer that this process begins to write; its number."""
        return self.add(chat, parent, "assistant", "", state="running", figures=figures)

    def append(self, message: int, pieces: Sequence[tuple[str, str]]) -> None:
        """More of a running answer: kinds ("content" or "reasoning") and texts. It is safe from the end of the process when this returns."""
        with self._change() as db:
            n = db.execute("SELECT coalesce(max(number), -1) + 1 FROM pieces WHERE message = ?", (message,)).fetchone()[0]
            db.executemany("INSERT INTO pieces VALUES (?, ?, ?, ?)", [(message, n + i, kind, text) for i, (kind, text) in enumerate(pieces)])

    def end(self, message: int, state: str, figures: dict[str, Any]) -> None:
        """The end of a running answer."""
        with self._change() as db:
            self._fold(db, message, state, figures)
            db.execute("UPDATE chats SET changed = ? WHERE id = (SELECT chat FROM messages WHERE id = ?)", (time.time(), message))

    def _fold(self, db: sqlite3.Connection, message: int, state: str, figures: dict[str, Any] | None) -> None:
        found = self.message(message)
        values = (found.content, found.reasoning, state, json.dumps({**found.figures, **(figures or {})}), message)
        db.execute("DELETE FROM pieces WHERE message = ?", (message,))
        db.execute("UPDATE messages SET content = ?, reasoning = ?, state = ?, figures = ?, owner = '' WHERE id = ?", values)

    def _add_pieces(self, message: Message) -> None:
        pieces = self._db.execute("SELECT kind, text FROM pieces WHERE message = ? ORDER BY number", (message.id,)).fetchall()
        for kind in ("content", "reasoning"):
            setattr(message, kind, getattr(message, kind) + "".join(text for k, text in pieces if k == kind))

    def _fold_dead(self) -> None:
        """End what was being written by processes that are gone."""
        left = self._rows("SELECT id, owner FROM messages WHERE state = 'running'")
        for message, owner in left:
            if not _lives(owner):
                with contextlib.suppress(StoreError), self._change() as db:
                    self._fold(db, message, "cut", None)

    # --- states ---

    def read(self, chat: int, tokens: bytes) -> None:
        """Note that prompts of a chat begin so: packed states that begin so, too, go with it. tokens: 32-bit numbers."""
        with self._change() as db:
            db.execute("INSERT OR IGNORE INTO readings VALUES (?, ?)", (chat, tokens))

    def readings(self, chat: int) -> list[bytes]:
        """All that were noted."""
        return [row[0] for row in self._rows("SELECT tokens FROM readings WHERE chat = ?", chat)]

    # --- search ---

    def search(self, words: str, most: int = 50) -> list[Hit]:
        """Messages and titles that hold every one of the words, also as parts of words; the newest first."""
        terms = [word for word in words.split() if word]
        if not terms:
            return []
        like = " AND ".join(["{} LIKE ? ESCAPE '\\'"] * len(terms))
        values = ["%" + term.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%" for term in terms]
        titles = self._rows(f"SELECT id, title FROM chats WHERE {like.replace('{}', 'title')} ORDER BY changed DESC LIMIT ?", *values, most)
        hits = [Hit(chat, title, None, title) for chat, title in titles]
        query = "SELECT m.id, m.chat, c.title, m.content FROM messages m JOIN chats c ON c.id = m.chat WHERE {} ORDER BY m.id DESC LIMIT ?"
        if all(len(term) >= _TRIGRAM for term in terms):
            match = " AND ".join('"' + term.replace('"', '""') + '"' for term in terms)
            rows = self._rows(query.replace("{}", "m.id IN (SELECT rowid FROM found WHERE found MATCH ?)"), match, most)
        else:
            rows = self._rows(query.replace("{}", like.replace("{}", "m.content"), 1), *values, most)
        return (hits + [Hit(chat, title, message, around(content, terms)) for message, chat, title, content in rows])[:most]


def around(text: str, terms: Sequence[str], width: int = 80) -> str:
    """The text around the first of the terms in it, on one line."""
    at = max(0, min((i for i in (text.lower().find(term.lower()) for term in terms) if i >= 0), default=0) - width // 4)
    part = " ".join(text[at : at + width].split())
    return ("…" if at else "") + part + ("…" if at + width < len(text) else "")


def _chat(row: Any) -> Chat:
    number, title, system, settings, created, changed, shown = row
    return Chat(number, title, system, json.loads(settings), created, changed, shown)


def _message(row: Any) -> Message:
    message = Message(*row)
    message.files, message.figures = json.loads(row[-2]), json.loads(row[-1])
    return message
