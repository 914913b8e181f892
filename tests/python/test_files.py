"""core.files: what may be written, and that it appears whole or not at all."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest
from gguf import GGUFWriter

from bridge import SettingsError
from mixkvq.core.files import check_target, kind_of, replacing, write_atomically

UNWRITABLE = "/proc/result"  # not even the administrator can make a file there


def gguf(path, kind):
    writer = GGUFWriter(path, arch="llama")
    if kind is not None:
        writer.add_string("general.type", kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def examples(tmp_path):
    """A file of every kind, by the key of KINDS (or a name for what is none)."""
    contents = {
        "JSON": b' {"a": [1]}\n',
        "plot": b"<?xml version='1.0'?>\n<svg></svg>",
        "text": "Zürich\n".encode(),
        "no JSON": b"{a}",
        "binary": b"\x7fELF\0\0",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    gguf(tmp_path / "profile", "mixkvq-profile")
    gguf(tmp_path / "model", None)
    gguf(tmp_path / "adapter", "adapter")
    (tmp_path / "cut").write_bytes((tmp_path / "model").read_bytes()[:20])
    return tmp_path


def test_kinds(examples):
    kinds = {p.name: kind_of(p) for p in examples.iterdir()}
    assert kinds == {
        "JSON": "JSON",
        "plot": "a picture",
        "text": "text",
        "no JSON": "text",
        "binary": "a binary file",
        "profile": "a profile",
        "model": "a model",
        "adapter": "a GGUF file of type adapter",
        "cut": "a damaged GGUF file",
    }
    for picture in (b"\x89PNG\r\n\x1a\n", b"%PDF-1.4", b"\xff\xd8\xff\xe0"):
        (examples / "p").write_bytes(picture)
        assert kind_of(examples / "p") == "a picture"


@pytest.mark.parametrize("what", ["profile", "model", "JSON", "plot", "text"])
def test_only_its_own_kind_is_replaced_and_only_if_asked(examples, what):
    for path in examples.iterdir():
        before = path.read_bytes()
        same = path.name == what or (what == "text" and path.name == "no JSON")
        with pytest.raises(SettingsError) as e:
            check_target(path, force=False, what=what)
        assert str(path) in str(e.value) and ("--force" in str(e.value)) == same
        if same:
            check_target(path, force=True, what=what)
        else:
            with pytest.raises(SettingsError, match="give another name"):
                check_target(path, force=True, what=what)
        assert path.read_bytes() == before
    assert not [p for p in examples.iterdir() if p.name.startswith(".")]


def test_empty_files_are_of_every_kind_but_still_the_users(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(SettingsError, match="--force"):
        check_target(tmp_path / "empty", force=False, what="profile")
    check_target(tmp_path / "empty", force=True, what="profile")


def test_what_is_read_is_not_written_over(examples):
    os.link(examples / "model", examples / "other name")
    (examples / "link").symlink_to("model")
    for name in ("model", "other name", "link"):
        with pytest.raises(SettingsError, match=f"{name} is the file that is read"):
            check_target(examples / name, force=True, what="model", inputs=["/nonexistent", examples / "model"])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (UNWRITABLE, f"{UNWRITABLE} cannot be written: "),
        ("/nonexistent/r.json", "/nonexistent/r.json cannot be written: its folder does not exist"),
        ("/", "/ cannot be written: it is a folder"),
        ("folder/", "folder/ cannot be written: it is a folder"),
        ("", "cannot be written"),
        ("x" * 300, "File name too long"),
        ("a\0b", "cannot be written"),
        (__file__ + "/r.json", "cannot be written"),
    ],
)
def test_where_nothing_can_be_written(path, words):
    with pytest.raises(SettingsError) as e:
        check_target(path, force=True, what="JSON")
    assert words in str(e.value) and ".mixkvq-" not in str(e.value) and str(e.value).endswith(".") and "\n" not in str(e.value)


def test_errors_name_the_users_file():
    with pytest.raises(OSError) as e:
        write_atomically(UNWRITABLE, "x")
    assert e.value.filename == UNWRITABLE and e.value.errno


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "talk.json"
    write_atomically(path, "ü", overwrite=False)
    with pytest.raises(FileExistsError) as e:
        write_atomically(path, "two", overwrite=False)
    assert e.value.filename == str(path)
    assert path.read_bytes() == "ü".encode()
    write_atomically(path, b"two")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        Path(temporary).write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["talk.json"]


def test_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "new", "x")
        write_atomically(tmp_path / "private", "x", private=True)
        (tmp_path / "mine").touch()
        (tmp_path / "mine").chmod(0o640)
        write_atomically(tmp_path / "mine", "x")
    finally:
        os.umask(mask)
    assert {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in tmp_path.iterdir()} == {"new": "0o644", "private": "0o600", "mine": "0o640"}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/real")
    check_target(tmp_path / "link", force=False, what="JSON")
    write_atomically(tmp_path / "link", "{}")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "real").read_text() == "{}"


def test_devices_and_pipes_are_written_to_not_replaced(tmp_path):
    check_target("/dev/null", force=False, what="JSON")
    write_atomically("/dev/null", "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError) as e:
        write_atomically("/dev/full", "x")
    assert e.value.filename == "/dev/full"

    os.mkfifo(tmp_path / "pipe")
    check_target(tmp_path / "pipe", force=False, what="JSON")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_atomically(tmp_path / "pipe", json.dumps({"a": 1}))
    reader.join()
    assert read == ['{"a": 1}'] and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_name_in_a_folder_that_is_gone(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(SettingsError, match=r"^r\.json cannot be written: No such file or directory\.$"):
        check_target("r.json", force=False, what="JSON")
