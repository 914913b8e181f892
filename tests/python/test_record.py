"""What a file of results says about its run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
import subprocess

import click
import pytest

from bridge import SettingsError
from mixkvq.cli.command import command_line
from mixkvq.cli.options import run, tool
from mixkvq.study import record

GIT = ["git", "-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "init.defaultBranch=main"]


def git(folder, *arguments):
    return subprocess.run([*GIT, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """Somebody's repository, with a package's file that it has and one that is installed in an environment within it."""
    for name in ("python/mixkvq/record.py", ".venv/lib/mixkvq/record.py", "bench/results/a.json", "own.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def test_commit_is_that_of_the_repository_that_has_the_file(repository, monkeypatch):
    own, head = repository / "python/mixkvq/record.py", git(repository, "rev-parse", "HEAD")
    assert record.commit(own) == head
    (repository / "bench/results/a.json").write_text("2\n")
    (repository / "bench/results/b.json").write_text("2\n")
    assert record.commit(own) == head  # results come from runs: two in a row are of one commit
    (repository / "own.py").write_text("2\n")
    assert record.commit(own) == head + "+changes"
    monkeypatch.setenv("GIT_DIR", str(repository.parent))  # as in a hook
    assert record.commit(own) == head + "+changes"


def test_an_installed_package_has_no_commit(repository, tmp_path_factory):
    version = f"mixkvq {importlib.metadata.version('mixkvq')}"
    assert record.commit(repository / ".venv/lib/mixkvq/record.py") == version
    outside = tmp_path_factory.mktemp("outside") / "record.py"
    outside.write_text("1\n")
    assert record.commit(outside) == version


def describe(tmp_path, hashed, *words):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"x" * 5000)
    found, seen = [], []

    @tool()
    @click.argument("words", nargs=-1)
    @click.option("--out")
    @click.option("--kv")
    def command(words, out, kv):
        found.append(record.describe_run("test", model, {"seed": 1}, hashed=hashed, words=command_line(), progress=seen.append))

    assert run(command, "mixkvq.test", [str(w) for w in words]) == 0
    return found[0], seen


def test_the_head_of_a_result(tmp_path):
    profile = tmp_path / "p.gguf"
    profile.write_text("")
    kv = f"q4_0,{profile},lab:{tmp_path}/my.py:X,lab:kivi-2/kivi-4"
    found, seen = describe(tmp_path, True, tmp_path / "model.gguf", "--out", tmp_path / "new.json", f"--kv={kv}")
    assert found["model"] == {"name": "model.gguf", "bytes": 5000, "sha256": hashlib.sha256(b"x" * 5000).hexdigest()} and sum(seen) == 5000
    assert shlex.split(found["command"]) == [
        "python", "-m", "mixkvq.test", "model.gguf", "--out", "new.json", "--kv=q4_0,p.gguf,lab:my.py:X,lab:kivi-2/kivi-4",
    ]  # fmt: skip
    assert found["date"] and found["commit"] and found["machine"]["cpu"] and found["settings"] == {"seed": 1}
    assert str(tmp_path) not in json.dumps(found)


def test_a_result_that_is_not_written_needs_no_hash(tmp_path):
    found, seen = describe(tmp_path, False)
    assert found["model"] == {"name": "model.gguf", "bytes": 5000} and not seen


def test_a_result_replaces_one_of_its_kind_only(tmp_path):
    path = tmp_path / "x.json"
    record.check_result(path, "speed", force=False)
    record.save_json(path, {"bench": "speed"})
    record.check_result(path, "speed", force=True)
    with pytest.raises(SettingsError, match="x.json exists; .*--force"):
        record.check_result(path, "speed", force=False)
    for content in ('{"bench": "memory"}', "[1]", "{}"):
        path.write_text(content)
        with pytest.raises(SettingsError, match="not a result of speed, so it is not replaced"):
            record.check_result(path, "speed", force=True)
    path.write_text("text")
    with pytest.raises(SettingsError, match="x.json is text"):
        record.check_result(path, "speed", force=True)
