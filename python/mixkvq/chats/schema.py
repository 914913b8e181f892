"""The tables of a store, and how an older one becomes a newer one."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from ..core.errors import StoreError

APPLICATION = 0x4D4B5651  # "MKVQ", in the file's header
BUSY_SECONDS = 10.0

_FIRST = """
CREATE TABLE chats (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    title TEXT NOT NULL,
    system TEXT NOT NULL DEFAULT '',
    settings TEXT NOT NULL DEFAULT '{}',
    created REAL NOT NULL,
    changed REAL NOT NULL,
    shown INTEGER
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    chat INTEGER NOT NULL REFERENCES chats ON DELETE CASCADE,
    parent INTEGER REFERENCES messages ON DELETE CASCADE,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    reasoning TEXT NOT NULL DEFAULT '',
    state TEXT NOT NULL DEFAULT 'done',
    created REAL NOT NULL,
    shown INTEGER,
    files TEXT NOT NULL DEFAULT '[]',
    figures TEXT NOT NULL DEFAULT '{}',
    owner TEXT NOT NULL DEFAULT ''
);
CREATE INDEX messages_of_chat ON messages (chat);
CREATE INDEX messages_of_parent ON messages (parent);
CREATE INDEX messages_running ON messages (owner) WHERE state = 'running';
-- what was written of a running answer: appended, so that a long one does not cost its length with every piece
CREATE TABLE pieces (
    message INTEGER NOT NULL REFERENCES messages ON DELETE CASCADE,
    number INTEGER NOT NULL,
    kind TEXT NOT NULL,
    text TEXT NOT NULL,
    PRIMARY KEY (message, number)
) WITHOUT ROWID;
-- the beginnings of prompts that a chat's packed states have, as 32-bit tokens
CREATE TABLE readings (
    chat INTEGER NOT NULL REFERENCES chats ON DELETE CASCADE,
    tokens BLOB NOT NULL,
    PRIMARY KEY (chat, tokens)
) WITHOUT ROWID;
-- three letters at a time: finds parts of words, and languages without spaces
CREATE VIRTUAL TABLE found USING fts5(content, content = 'messages', content_rowid = 'id', tokenize = 'trigram');
CREATE TRIGGER found_added AFTER INSERT ON messages BEGIN
    INSERT INTO found (rowid, content) VALUES (new.id, new.content);
END;
CREATE TRIGGER found_removed AFTER DELETE ON messages BEGIN
    INSERT INTO found (found, rowid, content) VALUES ('delete', old.id, old.content);
END;
CREATE TRIGGER found_changed AFTER UPDATE OF content ON messages BEGIN
    INSERT INTO found (found, rowid, content) VALUES ('delete', old.id, old.content);
    INSERT INTO found (rowid, content) VALUES (new.id, new.content);
END;
"""
MIGRATIONS: tuple[str, ...] = (_FIRST,)
"""What makes version n + 1 of version n; a store's version is `user_version` in its header."""


def connect(path: Path | None) -> sqlite3.Connection:
    """A store's connection, the store made or brought to the present version; None: in memory. Raises StoreError and OSError."""
    if path is not None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # SQLite gives its other files the rights of this one
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        os.chmod(path, 0o600)
    try:
        db = sqlite3.connect(path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as e:
        raise StoreError(f"{path} cannot be opened: {e}.") from None
    try:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
        db.execute("PRAGMA temp_store = MEMORY")
        _begin_wal(db)
        _migrate(db, path)
        return db
    except sqlite3.DatabaseError as e:
        db.close()
        raise StoreError(f"{path} cannot be opened as a store of chats: {e}.") from None
    except BaseException:
        db.close()
        raise


def _begin_wal(db: sqlite3.Connection) -> None:
    """Readers and a writer at once, also of several processes; a commit survives the end of the process."""
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")


def _migrate(db: sqlite3.Connection, path: Path | None) -> None:
    version = _version(db, path)
    if version == len(MIGRATIONS):
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        for script in MIGRATIONS[_version(db, path) :]:  # another process may have done it meanwhile
            for statement in _statements(script):
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection, path: Path | None) -> int:
    """Of the store; 0 if it is empty. Raises StoreError if it is none, or newer than this program."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    application: int = db.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION and (version or db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]):
        raise StoreError(f"{path} is a database of another program.")
    if version > len(MIGRATIONS):
        raise StoreError(f"{path} is a store of version {version}, and this program knows versions up to {len(MIGRATIONS)}; install a newer one.")
    return version


def _statements(script: str) -> list[str]:
    """One by one: `executescript` would commit in between."""
    found, text = [], ""
    for line in script.splitlines(keepends=True):
        text += line
        if sqlite3.complete_statement(text):
            found.append(text)
            text = ""
    return found
