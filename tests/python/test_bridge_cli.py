"""The command line as a user meets it: separate processes, real model, real terminal (a pseudo-terminal)."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

import bridge
from bridge.answer import Sampling
from bridge.chat import Chat, drop_oldest, parse_conversation
from bridge.model_file import built_in_model
from bridge.run import write_atomically

MODEL = str(built_in_model())
PROBLEM, SOLUTION = "Compute 48291 * 73.", "#### 3525243"


def run(*arguments, stdin=subprocess.DEVNULL, module="bridge.run", cwd=None, **options):
    """One process; `stdin` may be bytes. Returns (exit code, stdout, stderr)."""
    feed = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    threads = ["-t", "1"] if module == "bridge.run" else []  # waiting OpenMP threads are slow on a busy machine
    done = subprocess.run([sys.executable, "-m", module, *threads, *arguments], capture_output=True, timeout=600, cwd=cwd, **feed, **options)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_prompt_answer_on_stdout_and_the_rest_on_stderr():
    code, out, err = run(MODEL, "--prompt", PROBLEM, "-c", "1024")
    assert code == 0, err
    assert out.startswith("a reversed: 19284\n") and out.endswith(SOLUTION + "\n")
    assert re.search(r"prompt +23 tokens, [\d.]+ tokens/s", err)
    assert re.search(r"answer +3\d\d tokens, [\d.]+ tokens/s", err)
    assert re.search(r"bits per element +3\.\d\d body, [\d.]+ total", err)
    assert "MixKVQ balanced" in err and "times smaller" in err and "Traceback" not in err


def test_demo():
    code, out, err = run("--demo", "-c", "1024", "--report", "none")
    assert code == 0 and out.endswith(SOLUTION + "\n")
    assert err.strip() == f"Problem: {PROBLEM}"


def test_piped_prompt_and_json_report(tmp_path):
    path = tmp_path / "report.json"
    code, out, err = run("-c", "1024", "--report", "json", "--report-file", str(path), "--seed", "5", stdin=PROBLEM.encode() + b"\n")
    assert code == 0 and out.endswith(SOLUTION + "\n")
    assert err.count("\n") == 1
    report = json.loads(err)
    assert json.loads(path.read_text()) == report
    assert report["prompt_tokens"] == report["read_tokens"] == 23 and report["seed"] == 5 and report["context"] == 1024
    assert 300 < report["answer_tokens"] < 400 and report["answer_tokens_per_second"] > 0 and report["finish_reason"] == "stop"
    cache = report["cache"]
    assert cache["cache"] == "mixkvq" and cache["body_bits"] <= 3.3 and cache["times_smaller"] > 1 and cache["plain_layers"] == []


def test_file_stock_cache_and_limit_of_tokens(tmp_path):
    (tmp_path / "prompt.txt").write_text(PROBLEM + "\n", encoding="utf-8")
    code, out, err = run("-f", str(tmp_path / "prompt.txt"), "--stock", "q8_0", "-c", "512", "-n", "10", "--report", "json")
    report = json.loads(err)
    assert code == 0 and out.startswith("a reversed") and report["answer_tokens"] == 10 and report["finish_reason"] == "length"
    assert report["cache"]["type"] == "q8_0" and report["cache"]["total_bits"] == 8.5


def test_raw_long_prompt_in_small_batches():
    text = "The old clerk walked slowly to the harbour. " * 60
    code, _, err = run("--raw", "-b", "64", "-n", "4", "--preset", "mix2.5", "--window", "64", "--report", "json", stdin=text.encode())
    report = json.loads(err)
    assert code == 0 and report["read_tokens"] == report["prompt_tokens"] > 500
    assert report["cache"]["preset"] == "mix2.5" and report["cache"]["bytes_used"] > 0


def test_sampling_is_repeatable_with_a_seed():
    answers = {run("-p", "Once", "--raw", "--temp", "1.2", "--seed", str(s), "-n", "12", "-c", "256", "--report", "none")[1] for s in (1, 1, 2)}
    assert len(answers) == 2


def test_verbose_shows_the_log_of_llama_cpp():
    code, out, err = run("-v", "-p", "Hello", "-n", "2", "-c", "256", "--device", "cpu")
    assert code == 0 and "llama_model_loader" in err and "MIXKVQ-CPU" in err and "llama" not in out


def test_list_presets_and_path():
    code, out, err = run("--list-presets")
    assert code == 0 and err == "" and "mix3.2 (balanced)" in out and "paper" in out
    code, out, err = run(module="bridge.path")
    assert code == 0 and err == "" and Path(out.strip()).is_file() and "ggml-mixkvq" in Path(out.strip()).name


def test_reader_that_goes_away():
    process = subprocess.Popen(
        [sys.executable, "-m", "bridge.run", "-t", "1", "-p", PROBLEM, "-c", "1024"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(600) == 0 and "Traceback" not in err and "Exception" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.gguf", "-p", "x"], "missing.gguf does not exist"),
        ([str(Path(__file__)), "-p", "x"], "not a GGUF file"),
        ([str(Path(__file__).parent), "-p", "x"], "directory"),
        (["-p", "x", "--preset", "nope"], "no preset 'nope'"),
        (["-p", "x", "--kv", "q8_0"], "stock"),
        (["-p", "x", "--profile", "missing.gguf"], "missing.gguf does not exist"),
        (["-p", "x", "--profile", MODEL], "not a profile"),
        (["-p", "x", "--profile", MODEL, "--preset", "paper"], "one of the two"),
        (["-p", "x", "--stock", "q9_9"], "q9_9"),
        (["-p", "x", "--stock", "f16", "--window", "5"], "--window"),
        (["-p", "x", "--demo"], "--demo"),
        (["-p", "  "], "empty"),
        ([], "empty"),  # stdin is /dev/null
        (["-f", "missing.txt"], "missing.txt cannot be read"),
        (["-p", "x", "--temp", "nan"], "nan"),
        (["-p", "x", "--top-p", "2"], "2"),
        (["-p", "x", "-t", "0"], "0"),
        (["-p", "x", "-c", "-4"], "-4"),
        (["-p", "x", "-c", str(1 << 29)], "GiB"),
        (["-p", "word " * 600, "-c", "256"], "context holds 256"),
        (["-p", "x", "--report", "xml"], "xml"),
        (["-p", "x", "--report-file", "/nonexistent/folder/r.json"], "cannot be written"),
        (["--no-such-option"], "--no-such-option"),
        (["-p", "x", "--raw", "--system", "s"], "--system"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(arguments, words):
    code, out, err = run(*arguments)
    assert code == 2, err
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_truncated_model_and_text_that_is_not_utf8(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(Path(MODEL).read_bytes()[:1_000_000])
    code, out, err = run(str(tmp_path / "cut.gguf"), "-p", "x")
    assert code == 2 and out == "" and "truncated" in err and err.count("\n") == 1
    code, out, err = run(stdin=b"caf\xe9")
    assert code == 2 and out == "" and "UTF-8" in err and err.count("\n") == 1


# --- the chat ---


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *arguments, cwd=None):
        pty = pytest.importorskip("pty")
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200", "LINES": "50"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bridge.run", "-t", "1", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def expect(self, words, seconds=300):
        """Wait until the terminal has shown `words`, and forget what came before."""
        deadline = time.monotonic() + seconds
        while True:
            plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.seen)
            if words in plain:
                self.seen = plain[plain.index(words) + len(words) :]
                return
            left = deadline - time.monotonic()
            assert left > 0, f"{words!r} did not appear in {plain[-2000:]!r}"
            if select.select([self.master], [], [], min(left, 0.5))[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    self.seen += "(closed)"

    def send(self, line, prompt=">"):
        self.expect(prompt)  # it is shown once the terminal has been taken over
        os.write(self.master, line.encode() + b"\r")

    def close(self):
        code = self.process.wait(600)
        os.close(self.master)
        return code


def test_chat_on_a_terminal(tmp_path):
    t = Terminal("-c", "1024", "--temp", "0", cwd=tmp_path)
    t.expect("/help lists the commands.")
    t.send(PROBLEM)
    t.expect(SOLUTION)
    t.send("/memory")
    t.expect("cells hold tokens")
    t.send("/save talk.json")
    t.expect("2 messages saved")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["messages"][0] == {"role": "user", "content": PROBLEM} and saved["messages"][1]["content"].endswith(SOLUTION)
    t.send("/save talk.json")
    t.expect("Replace it?")
    t.send("n", "[y/N]")
    t.expect("Not saved.")
    t.send("/reset")
    t.expect("forgotten")
    t.send("/load missing.json")
    t.expect("cannot be read")
    t.send("/load talk.json")
    t.expect("2 messages loaded")
    t.send("/nonsense")
    t.expect("There is no command /nonsense")
    t.send("/reset")
    t.expect("forgotten")
    t.send(PROBLEM)
    t.expect("a reversed: 19284")
    os.kill(t.process.pid, signal.SIGINT)
    t.expect("(stopped)")
    t.send("/exit")
    t.expect("times smaller")
    assert t.close() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


def test_chat_ends_with_the_input():
    t = Terminal("-c", "256")
    t.expect("/help lists the commands.")
    t.expect(">")
    os.write(t.master, b"\x04")
    assert t.close() == 0


def test_history_fits_the_context_and_keeps_the_system_message(tmp_path):
    llama = bridge.Llama(MODEL, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    with open(tmp_path / "stderr", "w", encoding="utf-8") as stderr:
        chat = Chat(llama, Sampling(max_tokens=40), "Answer briefly.", Console(file=stderr, width=200), lambda piece: None, lambda message: "")
        for i in range(12):
            chat.turn(f"Turn {i}: " + "what did the old clerk remember about the harbour? " * 4)
            assert chat.messages[0]["role"] == "system" and chat.messages[-2]["content"].startswith(f"Turn {i}:")
            assert len(llama.chat_tokens(chat.messages)) <= llama.n_ctx()
        kept = len(chat.messages)
        with pytest.raises(bridge.SettingsError, match="shorten it"):
            chat.turn("word " * 600)
        assert len(chat.messages) == kept < 25
    said = (tmp_path / "stderr").read_text(encoding="utf-8")
    assert said.count("oldest turns are dropped") == 1
    llama.close()


def test_conversation_files(tmp_path):
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "ü"}]
    assert parse_conversation(json.dumps(talk)) == talk
    for text in (
        "",
        "{",
        "3",
        '{"format": "x"}',
        '{"format": "mixkvq-chat", "version": 2}',
        '[{"role": "robot", "content": ""}]',
        '[{"role": "user"}]',
    ):
        with pytest.raises(bridge.SettingsError):
            parse_conversation(text)
    long = [*talk, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert drop_oldest(long) == [talk[0], long[3]] and drop_oldest(talk) is None

    path = tmp_path / "talk.json"
    write_atomically(path, "one", overwrite=False)
    with pytest.raises(FileExistsError):
        write_atomically(path, "two", overwrite=False)
    assert path.read_text() == "one"
    write_atomically(path, "two")
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["talk.json"]
