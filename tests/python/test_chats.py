"""The store of chats: trees, branches, running answers, search, what is private, several processes, and files of chats."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mixkvq.chats import Store, default_path, schema
from mixkvq.chats.formats import export, parse, take
from mixkvq.core.errors import StoreError

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chats.db"


def texts(store, chat):
    return [m.content for m in store.branch(chat)]


def test_edit_regenerate_and_back(path):
    with Store(path) as store:
        chat = store.create("numbers")
        question = store.add(chat, None, "user", "1 + 1?")
        first = store.add(chat, question, "assistant", "3")
        further = store.add(chat, first, "user", "Sure?")
        second = store.add(chat, question, "assistant", "2")
        assert texts(store, chat) == ["1 + 1?", "2"]
        store.show(first)
        assert texts(store, chat) == ["1 + 1?", "3", "Sure?"]  # what was shown behind it is remembered
        edited = store.add(chat, None, "user", "1 + 2?")
        assert texts(store, chat) == ["1 + 2?"]
        store.show(second)
        assert texts(store, chat) == ["1 + 1?", "2"]
        assert {m.id for m in store.messages(chat)} == {question, first, further, second, edited}
    with Store(path) as store:
        assert texts(store, chat) == ["1 + 1?", "2"]


class Trees(RuleBasedStateMachine):
    """The store against a tree in dictionaries."""

    def __init__(self):
        super().__init__()
        self.store = Store(None)
        self.chat = self.store.create("a tree")
        self.parents, self.roles, self.contents, self.shown = {}, {}, {}, {}

    def teardown(self):
        self.store.close()

    @rule(data=st.data(), content=TEXT, role=st.sampled_from(["user", "assistant"]))
    def add(self, data, content, role):
        parent = data.draw(st.sampled_from([None, *self.parents]))
        number = self.store.add(self.chat, parent, role, content)
        self.parents[number], self.roles[number], self.contents[number] = parent, role, content
        self.shown[parent] = number

    @rule(data=st.data())
    def show(self, data):
        if self.parents:
            at = data.draw(st.sampled_from(list(self.parents)))
            self.store.show(at)
            while at is not None:
                self.shown[self.parents[at]] = at
                at = self.parents[at]

    @rule(data=st.data(), pieces=st.lists(st.tuples(st.sampled_from(["content", "reasoning"]), TEXT), max_size=5))
    def answer(self, data, pieces):
        if self.parents:
            parent = data.draw(st.sampled_from(list(self.parents)))
            number = self.store.begin(self.chat, parent)
            for piece in pieces:
                self.store.append(number, [piece])
            running = self.store.message(number)
            self.store.end(number, "done", {"tokens": len(pieces)})
            found = self.store.message(number)
            for kind in ("content", "reasoning"):
                assert getattr(found, kind) == getattr(running, kind) == "".join(text for k, text in pieces if k == kind)
            assert (found.state, found.figures) == ("done", {"tokens": len(pieces)})
            self.parents[number], self.roles[number], self.contents[number] = parent, "assistant", found.content
            self.shown[parent] = number

    @rule()
    def as_json(self):
        if self.parents:
            text = export(self.store, self.chat, "json")
            (copy,) = take(self.store, text)
            assert export(self.store, copy, "json") == text
            assert texts(self.store, copy) == texts(self.store, self.chat)
            self.store.delete(copy)

    @invariant()
    def same(self):
        expected, at = [], self.shown.get(None)
        while at is not None:
            expected.append(self.contents[at])
            at = self.shown.get(at)
        assert texts(self.store, self.chat) == expected
        assert {m.id: m.parent for m in self.store.messages(self.chat)} == self.parents


Trees.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
test_trees = Trees.TestCase

LINES = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant"]),
        st.one_of(TEXT, st.sampled_from(["<!-- message: user -->", "<!-- \\message: system -->\nx", "# a\n\n## You\n\nb", "a\n\n", "```\nx"])),
        TEXT,
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None)
@given(lines=LINES, system=TEXT, form=st.sampled_from(["markdown", "sharegpt", "json"]))
def test_a_chat_comes_back_from_every_format(lines, system, form):
    with Store(None) as store:
        chat, at = store.create("Title", system), None
        for role, content, reasoning in lines:
            at = store.add(chat, at, role, content, reasoning=reasoning)
        (back,) = take(store, export(store, chat, form))
        assert store.chat(back).title == "Title"
        assert store.chat(back).system.replace("\r\n", "\n") == system.replace("\r\n", "\n")
        assert [(m.role, m.content.replace("\r\n", "\n"), m.reasoning.replace("\r\n", "\n")) for m in store.branch(back)] == [
            (role, content.replace("\r\n", "\n"), reasoning.replace("\r\n", "\n")) for role, content, reasoning in lines
        ]


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXT,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["messages", "conversations", "role", "content", "from", "value", "format", "parent"]) | TEXT, inner, max_size=4
            )
        ),
    )
)
def test_what_is_no_chat_is_refused_with_a_sentence(data):
    with Store(None) as store:
        try:
            take(store, json.dumps(data))
        except StoreError as e:
            assert str(e).endswith(".") and not store.chats()


def test_files_of_other_programs():
    rows = parse(
        '[{"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}]'
    )
    assert rows[0]["system"] == "Be brief." and [m["content"] for m in rows[0]["messages"]] == ["Hi", "Hello"]
    saved = parse('{"format": "mixkvq-chat", "version": 1, "messages": [{"role": "user", "content": "Hi"}]}')
    assert saved[0]["messages"][0]["content"] == "Hi"
    for text in ("", "just text", "{}", '{"format": "mixkvq-chat-tree", "version": 2}', '[{"role": "cook", "content": "x"}]', "{" * 99999):
        with pytest.raises(StoreError):
            parse(text)


def test_attached_files_are_in_what_the_model_reads():
    with Store(None) as store:
        chat = store.create("x")
        store.add(chat, None, "user", "What is this?", files=[{"name": "a.py", "text": "print('```')"}])
        assert store.branch(chat)[0].text() == "File a.py:\n````\nprint('```')\n````\n\nWhat is this?"


def test_search_finds_parts_of_words_and_other_scripts(path):
    with Store(path) as store:
        chat = store.create("Über Brücken")
        store.add(chat, None, "user", "Tell me about the Golden Gate, 100% of it")
        other = store.create("z")
        at = store.add(other, None, "user", "请介绍一下北京的历史")
        store.add(other, at, "assistant", "مرحبا بالعالم")
        found = {
            q: [(h.chat, h.message is None) for h in store.search(q)]
            for q in ("olden gat", "gate tell", "北京", "介绍一下", "بالعالم", "brücken", "100%", '"', "%", "nothing", " ")
        }
        assert found == {
            **{
                "olden gat": [(chat, False)],
                "gate tell": [(chat, False)],
                "北京": [(other, False)],
                "介绍一下": [(other, False)],
                "بالعالم": [(other, False)],
            },
            **{"brücken": [(chat, True)], "100%": [(chat, False)], '"': [], "%": [(chat, False)], "nothing": [], " ": []},
        }
        running = store.begin(chat, store.branch(chat)[0].id)
        store.append(running, [("content", "suspension")])
        store.end(running, "done", {})
        assert [h.message for h in store.search("suspension")] == [running]
        store.delete(other)
        assert store.search("北京") == [] == store.search("介绍一下")


def test_what_is_deleted_is_in_no_file(path):
    secret = "zxqj-secret-words"
    with Store(path) as store:
        chat = store.create(secret)
        store.add(chat, None, "user", secret * 50)
        store.read(chat, b"1234")
        assert store.readings(chat) == [b"1234"]
        store.delete(chat)
        assert not store.readings(chat)
        held = b"".join(p.read_bytes() for p in path.parent.iterdir())
        assert b"zxqj" not in held and b"secret-w" not in held


def test_only_the_owner_may_read(path):
    before = os.umask(0)
    try:
        with Store(path.parent / "deeper" / "chats.db") as store:
            store.create("x")
            modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in store.path.parent.iterdir()}
            assert len(modes) >= 2 and set(modes.values()) == {0o600}
            assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_private_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "mixkvq" / "chats.db"
    with Store(None) as store:
        chat = store.create("x")
        store.add(chat, None, "user", "word " * 100000)
        store.delete(chat)
        assert list(tmp_path.iterdir()) == []


def test_kill_9_keeps_what_was_appended(path):
    program = f"""
from mixkvq.chats import Store
store = Store({str(path)!r})
chat = store.create("x")
answer = store.begin(chat, store.add(chat, None, "user", "Count"))
for i in range(100000):
    store.append(answer, [("content", f"{{i}} ")])
    print(i, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) >= 50:
                break
        with Store(path) as store:  # another process, while the first writes
            assert store.branch(store.chats()[0].id)[-1].state == "running"
        process.send_signal(signal.SIGKILL)
        last = int((line + process.stdout.read()).split()[-1])
    with Store(path) as store:
        answer = store.branch(store.chats()[0].id)[-1]
        assert answer.state == "cut"
        numbers = [int(n) for n in answer.content.split()]
        assert numbers == list(range(len(numbers))) and len(numbers) > last


def test_two_processes_write_at_once(path):
    program = f"""
from mixkvq.chats import Store
store = Store({str(path)!r})
chat = store.create("x")
at = None
for i in range(100):
    at = store.add(chat, at, "user", str(i))
"""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    with Store(path) as store:
        assert [texts(store, chat.id) for chat in store.chats()] == [[str(i) for i in range(100)]] * 2


def test_a_full_disk_is_said_and_costs_nothing(path):
    with Store(path) as store:
        chat = store.create("x")
        question = store.add(chat, None, "user", "kept")
        answer = store.begin(chat, question)
        store.append(answer, [("content", "kept, too")])
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite says of a full disk, and where
        with pytest.raises(StoreError, match=r"full; nothing was changed\.$"):
            store.append(answer, [("content", "lost" * 100000)])
        with pytest.raises(StoreError, match="full"):
            store.add(chat, question, "user", "lost" * 100000)
        assert [m.content for m in store.messages(chat)] == ["kept", "kept, too"]
        store._db.execute("PRAGMA max_page_count = 1000000")
        store.append(answer, [("content", " and more")])
        store.end(answer, "done", {})
        assert texts(store, chat) == ["kept", "kept, too and more"]


def test_versions(path, monkeypatch):
    with Store(path) as store:
        chat = store.create("before")
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "ALTER TABLE chats ADD COLUMN colour TEXT NOT NULL DEFAULT 'blue';"))
    with Store(path) as store:
        assert store.chat(chat).title == "before"
        assert store._rows("SELECT colour FROM chats") == [("blue",)]
    monkeypatch.undo()
    with pytest.raises(StoreError, match="of version 2, and this program knows versions up to 1"):
        Store(path)


def test_a_migration_that_fails_changes_nothing(path, monkeypatch):
    Store(path).close()
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE more (x);\nCREATE TABLE chats (x);"))
    with pytest.raises(StoreError):
        Store(path)
    monkeypatch.undo()
    with Store(path) as store:
        assert not store._rows("SELECT * FROM sqlite_master WHERE name = 'more'")


def test_what_is_no_store_is_left_as_it_is(path):
    path.write_bytes(b"not a database, " * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(path)
    assert path.read_bytes() == b"not a database, " * 100
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE x (y)")
    with pytest.raises(StoreError, match="another program"):
        Store(path)
    with pytest.raises(StoreError):
        Store(Path("/proc/nowhere/chats.db"))


def test_what_is_not_there():
    with Store(None) as store:
        chat, other = store.create("x"), store.create("y")
        at = store.add(other, None, "user", "x")
        for what in (lambda: store.chat(99), lambda: store.message(99), lambda: store.delete(99), lambda: store.messages(99), lambda: store.show(99)):
            with pytest.raises(StoreError, match="There is no"):
                what()
        with pytest.raises(StoreError, match="another chat"):
            store.add(chat, at, "user", "x")
        with pytest.raises(StoreError, match="no role"):
            store.add(chat, None, "cook", "x")
