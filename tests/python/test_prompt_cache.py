"""What a user keeps of a context between runs: --prompt-cache, and the cache beside a saved chat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import bridge
from bridge import states
from mixkvq.cli.answer import Sampling
from mixkvq.cli.chat import Chat
from mixkvq.cli.conversations import cache_of
from mixkvq.core.model_file import built_in_model

MODEL = str(built_in_model())
STORY = "The old clerk walked slowly to the harbour, and nobody in the town knew why he went there. " * 10


def run(*arguments, status=0):
    """An answer to a raw prompt in a process of its own: the text and the report."""
    fixed = ["--raw", "-t", "1", "-c", "1024", "-n", "6", "--device", "cpu", "--report", "json"]
    command = [sys.executable, "-m", "bridge.run", MODEL, *fixed, *arguments]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=600)
    assert done.returncode == status, done.stderr.decode()
    return (done.stdout.decode(), json.loads(done.stderr)) if status == 0 else done.stderr.decode()


@pytest.mark.parametrize("cache", [(), ("--stock", "q8_0")], ids=["mixkvq", "q8_0"])
def test_a_prompt_is_read_once(tmp_path, cache):
    path = tmp_path / "prompt.state"
    first, report = run("-p", STORY, "--prompt-cache", str(path), *cache)
    n = report["prompt_tokens"]
    assert report["cached_tokens"] == 0 and states.read_head(path).tokens.size == n  # without the answer
    before = path.stat().st_mtime_ns
    again, report = run("-p", STORY, "--prompt-cache", str(path), *cache)
    assert again == first and report["read_tokens"] == 0 and path.stat().st_mtime_ns == before  # nothing new: not written
    longer, report = run("-p", STORY + "Then he saw a ship", "--prompt-cache", str(path), *cache)
    assert report["cached_tokens"] >= n - 1 and 0 < report["read_tokens"] <= 9
    assert states.read_head(path).tokens.size == report["prompt_tokens"] > n
    other, report = run("-p", "A story: " + STORY, "--prompt-cache", str(path), *cache)
    assert report["cached_tokens"] < 3 and report["read_tokens"] > 100
    assert other == run("-p", "A story: " + STORY, *cache)[0]


def test_read_only_and_all(tmp_path):
    path = tmp_path / "prompt.state"
    text, report = run("-p", STORY, "--prompt-cache", str(path), "--prompt-cache-all")
    whole = states.read_head(path).tokens.size
    assert whole == report["prompt_tokens"] + 5  # the last token of the answer is in no cache
    before = path.read_bytes()
    _, report = run("-p", STORY + text + " More", "--prompt-cache", str(path), "--prompt-cache-ro")
    assert report["cached_tokens"] >= whole - 2 and path.read_bytes() == before
    path.unlink()
    assert run("-p", STORY, "--prompt-cache", str(path), "--prompt-cache-ro")[0] == text and not path.exists()
    path.touch()  # empty: a new one
    assert run("-p", STORY, "--prompt-cache", str(path))[0] == text and path.stat().st_size > 1000


def test_what_is_no_prompt_cache_of_this_context_is_refused_and_stays(tmp_path):
    path, text = tmp_path / "prompt.state", tmp_path / "notes.txt"
    text.write_text("notes")
    run("-p", STORY, "--prompt-cache", str(path))
    before = path.read_bytes()
    for arguments, why in [
        (("--prompt-cache", str(path), "--kv", "mix2.4"), f"error: {path} cannot be loaded: it was saved from a cache 'mix3.2'"),
        (("--prompt-cache", str(path), "--stock", "f16"), "and this one is 'f16'."),
        (("--prompt-cache", str(text)), f"error: {text} is text, so it is not replaced by a saved state; give another name."),
        (("--prompt-cache", MODEL), "is the file that is read, so it is not written over"),
        (("--prompt-cache", str(tmp_path / "no" / "file")), "cannot be written: its folder does not exist."),
        (("--prompt-cache", str(path), "--prompt-cache-all", "--prompt-cache-ro"), "never writes the file, so it does not go together"),
        (("--prompt-cache-ro",), "go together with --prompt-cache FILE."),
    ]:
        err = run("-p", STORY, *arguments, status=2)
        assert why in err and err.count("\n") == 1 and "Traceback" not in err
    path.write_bytes(before[:-1])
    assert "it is truncated" in run("-p", STORY, "--prompt-cache", str(path), status=2)
    assert path.read_bytes() == before[:-1] and text.read_text() == "notes"


# --- chats ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(tmp_path, monkeypatch):
    """Chats in one context; what is said, and how many tokens were read for the last message."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    said = open(tmp_path / "stderr", "w+", encoding="utf-8")
    llama = bridge.Llama(MODEL, n_ctx=1024, n_threads=1, n_threads_batch=1, device="cpu", verbose=False)
    chat = Chat(llama, Sampling(max_tokens=8), None, Console(file=said, width=1000), lambda piece: None, lambda message: "y")

    def says():
        said.flush()
        return (tmp_path / "stderr").read_text(encoding="utf-8").splitlines()[-1]

    yield chat, says
    llama.close()
    said.close()


def test_a_saved_chat_goes_on_without_being_read(chat, tmp_path):
    chat, says = chat
    path = tmp_path / "talk.json"
    chat.turn(STORY)
    n = chat.llama.n_tokens
    chat.command(f"/save {path}")
    assert "2 messages saved to" in says() and "and the cache (" in says()
    assert states.read_head(cache_of(path)).tokens.size == n
    logits = chat.llama.forward([5])
    chat.command("/reset")
    chat.turn("Something else")
    chat.command(f"/load {path}")
    assert says().endswith("2 messages loaded from " + str(path) + ".") and chat.llama.n_tokens == n
    assert (chat.llama.forward([5]) == logits).all()
    chat.turn("And then?")
    assert chat.last.cached_tokens >= n - 2 and 0 < chat.last.read_tokens < 40


def test_a_chat_whose_cache_is_gone_or_does_not_fit_is_read_anew(chat, tmp_path):
    chat, says = chat
    path = tmp_path / "talk.json"
    chat.turn(STORY)
    chat.command(f"/save {path}")
    other = bridge.Llama(MODEL, n_ctx=512, kv="mix2.4", n_threads=1, device="cpu", verbose=False)
    other.eval([1, 2, 3])
    own, chat.llama = chat.llama, other
    chat.command(f"/load {path}")
    assert "2 messages loaded from" in says() and "they are read anew: " in says() and says().endswith("window 128 and sinks 128.")
    assert other.n_tokens == 3
    other.close()
    chat.llama = own
    os.unlink(cache_of(path))
    chat.command("/reset")
    chat.command(f"/load {path}")
    assert says() == f"2 messages loaded from {path}." and own.n_tokens == 0
    chat.turn("And then?")
    assert chat.last.cached_tokens == 0
    # A conversation that nothing was read of has no cache, and none that was another's.
    chat.command(f"/save {path}")
    assert Path(cache_of(path)).exists()
    chat.command("/reset")
    chat.command(f"/save {path}")
    assert not Path(cache_of(path)).exists() and says() == f"0 messages saved to {path}."


def test_a_chat_does_not_write_over_what_is_no_cache(chat, tmp_path):
    chat, says = chat
    path = tmp_path / "talk.json"
    chat.turn("Hello")
    Path(cache_of(path)).write_text("something of mine")
    with pytest.raises(bridge.SettingsError, match="is text, so it is not replaced by a saved state"):
        chat.command(f"/save {path}")
    assert not path.exists() and Path(cache_of(path)).read_text() == "something of mine"
