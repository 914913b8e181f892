"""The command line as a user meets it: real model, real terminal (a pseudo-terminal), and separate processes where the process matters."""

from __future__ import annotations

import importlib
import io
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
import tiny_models
from rich.console import Console

import bridge
from bridge.log import log
from mixkvq.cli import run as command_line
from mixkvq.cli.answer import Answer, Sampling, stream_answer
from mixkvq.cli.chat import Chat, drop_oldest, parse_conversation
from mixkvq.cli.run import exit_code, why_it_ended
from mixkvq.core.model_file import built_in_model

MODEL = str(built_in_model())
PROBLEM, SOLUTION = "Compute 48291 * 73.", "#### 3525243"


def run(*arguments, stdin=subprocess.DEVNULL, module="bridge.run", cwd=None, env=None, **options):
    """One process; `stdin` may be bytes. Returns (exit code, stdout, stderr)."""
    feed = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    threads = [] if module == "bridge.path" else ["-t", "1"]  # waiting OpenMP threads are slow on a busy machine
    command = [sys.executable, "-m", module, *threads, *arguments]
    done = subprocess.run(command, capture_output=True, timeout=600, cwd=cwd, env={**os.environ, **(env or {})}, **feed, **options)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def here(monkeypatch, capfd):
    """The command line in this process: like `run`."""
    monkeypatch.setattr(log, "quiet", False)
    monkeypatch.setattr(log, "_said", set())

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = command_line.main(["-t", "1", *map(os.fsdecode, arguments)])
        return code, *capfd.readouterr()

    return call


@pytest.fixture(autouse=True)
def data_folder(tmp_path_factory, monkeypatch):
    """Where chats are kept; not the user's own."""
    folder = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    return folder


def test_prompt_answer_on_stdout_and_the_rest_on_stderr():
    code, out, err = run(MODEL, "--prompt", PROBLEM, "-c", "1024")
    assert code == 0, err
    assert out.startswith("a reversed: 19284\n") and out.endswith(SOLUTION + "\n")
    assert re.search(r"prompt +23 tokens, [\d.]+ tokens/s", err)
    assert re.search(r"answer +3\d\d tokens, [\d.]+ tokens/s", err)
    assert re.search(r"bits per element +3\.\d\d body, [\d.]+ total", err)
    assert "MixKVQ balanced" in err and "times smaller" in err and "Traceback" not in err


def test_demo(here):
    code, out, err = here("--demo", "-c", "1024", "--report", "none")
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


def test_file_stock_cache_and_limit_of_tokens(here, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROBLEM + "\n", encoding="utf-8")
    code, out, err = here("-f", str(tmp_path / "prompt.txt"), "--stock", "q8_0", "-c", "512", "-n", "10", "--report", "json")
    report = json.loads(err)
    assert code == 0 and out.startswith("a reversed") and report["answer_tokens"] == 10 and report["finish_reason"] == "length"
    assert report["cache"]["type"] == "q8_0" and report["cache"]["total_bits"] == 8.5


def test_raw_long_prompt_in_small_batches(here):
    text = "The old clerk walked slowly to the harbour. " * 60
    code, _, err = here("--raw", "-b", "64", "-n", "4", "--preset", "mix2.5", "--window", "64", "--report", "json", stdin=text.encode())
    report = json.loads(err)
    assert code == 0 and report["read_tokens"] == report["prompt_tokens"] > 500
    assert report["cache"]["preset"] == "mix2.5" and report["cache"]["bytes_used"] > 0


def test_sampling_is_repeatable_with_a_seed(here):
    answers = {here("-p", "Once", "--raw", "--temp", "1.2", "--seed", str(s), "-n", "12", "-c", "256", "--report", "none")[1] for s in (1, 1, 2)}
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
        (["-p", "x", "--kv", "q8_0"], "use --stock q8_0,"),
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
        (["-p", "x", "--temp", "inf"], "inf"),
        (["-p", "x", "--top-p", "2"], "2"),
        (["-p", "x", "--top-p", "nan"], "nan"),
        (["-p", "x", "--min-p", "nan"], "nan"),
        (["-p", "x", "--seed", str((1 << 32) - 1)], "4294967295"),
        (["-p", "x", "-t", "0"], "0"),
        (["-p", "x", "-c", "-4"], "-4"),
        (["-p", "x", "-c", str(1 << 29)], "GiB"),
        (["-p", "word " * 600, "-c", "256"], "context holds 256"),
        (["-p", "x", "--report", "xml"], "xml"),
        (["-p", "x", "--report-file", "/nonexistent/folder/r.json"], "/nonexistent/folder/r.json cannot be written"),
        (["-p", "x", "--report-file", "/proc/r.json"], "/proc/r.json cannot be written"),
        (["-p", "x", "--report-file", MODEL, "--force"], "is the file that is read"),
        (["-p", "x", "--report-file", __file__, "--force"], "is text, so it is not replaced by JSON"),
        (["--no-such-option"], "--no-such-option"),
        (["--no-such-option"], "See --help."),
        (["-p", "x", "-n"], "See --help."),
        (["-p", "x", "--device", "CUDA0,"], "--device"),
        (["Organisation/Model-GGUF", "-p", "x"], "hf download Organisation/Model-GGUF"),
        (["-p", b"caf\xe9"], "The text of --prompt is not UTF-8 (byte 3)"),
        (["-p", "x", "--system", b"\xff"], "The text of --system is not UTF-8 (byte 0)"),
        (["-p", "x", "--raw", "--system", "s"], "--system"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(here, arguments, words):
    code, out, err = here(*arguments)
    assert code == 2, err
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err and "='" not in err


def test_truncated_model_and_text_that_is_not_utf8(here, tmp_path):
    (tmp_path / "cut.gguf").write_bytes(Path(MODEL).read_bytes()[:1_000_000])
    code, out, err = here(str(tmp_path / "cut.gguf"), "-p", "x")
    assert code == 2 and out == "" and "truncated" in err and err.count("\n") == 1
    code, out, err = here(stdin=b"caf\xe9")
    assert code == 2 and out == "" and "UTF-8" in err and err.count("\n") == 1


# --- the chat ---


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *arguments, cwd=None, env=None):
        pty = pytest.importorskip("pty")
        self.master, slave = pty.openpty()
        environment = {**os.environ, **(env or {}), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200", "LINES": "50"}
        before = signal.signal(signal.SIGHUP, lambda *_: None)  # where these tests run under nohup the chat is not to
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bridge.run", "-t", "1", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
        signal.signal(signal.SIGHUP, before)
        os.close(slave)
        self.seen = ""

    def expect(self, words, seconds=600):
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["talk.json", "talk.json.mixkvq-state"]


def test_what_is_said_while_a_model_loads_has_a_line_of_its_own(tmp_path):
    t = Terminal(str(tiny_models.gemma4(tmp_path / "m.gguf")), "-c", "256")
    t.expect("Loading m.gguf")
    t.expect("\rmixkvq: keys or values of some layers are stored plainly")
    t.expect("/help lists the commands.")
    t.send("/exit")
    assert t.close() == 0


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
    with pytest.raises(bridge.SettingsError, match="message 1 is not Unicode text"):
        parse_conversation('[{"role": "user", "content": "\\ud83d"}]')


# --- nothing that was computed is lost ---


def test_a_report_file_that_exists_is_replaced_only_if_asked(here, tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"mine": 1}')
    ask = ("-p", "x", "-n", "2", "-c", "256", "--report-file", str(path))
    code, out, err = here(*ask)
    assert code == 2 and out == "" and err == f"error: {path} exists; give another name, or --force to replace it.\n"
    assert path.read_text() == '{"mine": 1}'
    code, out, err = here(*ask, "--force")
    assert code == 0 and out and json.loads(path.read_text())["answer_tokens"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_report_that_cannot_be_written_does_not_cost_the_answer(here):
    code, out, err = here("-p", "x", "-n", "2", "-c", "256", "--report-file", "/dev/full")
    assert code == 1 and out and "against F16" in err and err.endswith("error: /dev/full: No space left on device.\n")


def test_letters_that_the_terminal_lacks_do_not_cost_the_answer(tmp_path):
    model = str(tiny_models.llama(tmp_path / "babbler.gguf"))  # random weights and a vocabulary of bytes: now and then two of them are a letter
    llama = bridge.Llama(model, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    for seed in range(100):
        llama.clear()
        sampling = Sampling(temperature=5, top_k=0, top_p=1.0, min_p=0.0, max_tokens=100, seed=seed)
        if not stream_answer(llama, "abc", sampling, lambda piece: None, Console(quiet=True)).text.isascii():
            break
    llama.close()
    chance = ("--temp", "5", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", str(seed))
    ask = (model, "--raw", "-p", "abc", *chance, "-n", "100", "-c", "512", "--report", "none")
    code, whole, _ = run(*ask, env={"PYTHONIOENCODING": "utf-8"})
    assert code == 0 and not whole.isascii()
    code, out, err = run(*ask, env={"PYTHONIOENCODING": "ascii"})
    assert code == 0 and out == whole.encode("ascii", "backslashreplace").decode() and "Traceback" not in err
    code, out, err = run("-p", "\u00e9\U0001f600", "-n", "2", "-c", "256", env={"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert code == 0 and out, err
    code, out, err = run("missing \u00e9.gguf", "-p", "x", env={"PYTHONIOENCODING": "ascii"})
    assert code == 2 and "missing \\xe9.gguf does not exist" in err


SHORT = f"{sys.executable} -m bridge.run -t 1 -p '{PROBLEM}' -n 5 -c 256"


@pytest.mark.parametrize("redirect", ["2>&-", "<&- 2>&-", "2>/dev/full", "2> >(head -c1 >/dev/null)"])
def test_an_answer_needs_no_stderr(redirect):
    done = subprocess.run(["bash", "-c", f"{SHORT} {redirect}"], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.startswith("a reversed"), done.stderr) == (0, True, "")


@pytest.mark.parametrize(
    ("redirect", "code", "said"),
    [
        (">&-", 2, "error: stdout is closed, so there is nowhere to write to.\n"),
        (">/dev/full", 1, "error: stdout: No space left on device.\n"),
        ("| head -c1 >/dev/null", 0, None),
        ("2>&1 | head -c1 >/dev/null", 0, ""),
    ],
)
def test_a_stdout_that_takes_no_answer(redirect, code, said):
    done = subprocess.run(["bash", "-c", f"{SHORT} --report none {redirect}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=600)
    assert done.returncode == code and done.stdout == "" and "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert said is None or said == done.stderr


def test_help_and_lists_into_a_pipe_that_closes():
    for arguments in ("bridge.run --help", "bridge.run --list-presets", "bridge.path"):
        command = f"{sys.executable} -m {arguments} | head -c1 >/dev/null; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stderr) == (0, "")


def test_warnings_are_errors_and_there_are_none():
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore:::llama_cpp", "-m", "bridge.run", "-t", "1", "-p", "x", "-n", "2", "-c", "256"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "Warning" not in "\n".join(line for line in done.stderr.splitlines() if "llama_cpp" not in line), done.stderr


# --- the command line's own words ---


def test_mistakes_are_said_before_stdin_is_read(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(command_line, "read_prompt", lambda *_: pytest.fail("stdin is read"))
    for wrong in (["missing.gguf"], ["--device", ","], ["--report-file", "/proc/x"], ["--profile", "missing.gguf"], ["--kv", MODEL]):
        assert command_line.main(wrong) == 2 and capfd.readouterr().err.startswith("error: ")
    process = subprocess.Popen([sys.executable, "-m", "bridge.run", "--kv", "nope"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.wait(600) == 2  # stdin is still open
        assert process.stderr.read().startswith(b"error: ")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("module", ["bridge", "bridge.run", "bridge.path"])
def test_every_command_has_help_and_a_version(module, capfd):
    code, out, err = run("--help", module=module)
    assert code == 0 and out.startswith("Usage: python -m bridge.") and err == ""
    main = importlib.import_module("bridge.path" if module == "bridge.path" else "bridge.run").main
    assert main(["-h"]) == 0 and capfd.readouterr() == (out, err)
    assert main(["--version"]) == 0
    out, err = capfd.readouterr()
    assert re.fullmatch(r"mixkvq \d+\.\d+\.\d+\n", out) and err == ""
    assert main(["--nonsense"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.endswith(" See --help.\n") and err.count("\n") == 1


def test_python_m_bridge_answers():
    code, out, _ = run("-p", PROBLEM, "-n", "5", "-c", "256", "--report", "none", module="bridge")
    assert code == 0 and out.startswith("a reversed")


@pytest.mark.parametrize("make", [tiny_models.t5, tiny_models.bert, tiny_models.mamba])
def test_models_without_a_cache_to_pack_get_advice_that_works(here, make, tmp_path):
    path = str(make(tmp_path / "m.gguf"))
    code, out, err = here(path, "--raw", "-p", "abc", "-n", "2")
    assert code == 2 and out == "" and err.count("\n") == 1 and make.__name__ in err and "embedding=True" not in err
    assert ("--stock f16" in err) == (make is tiny_models.mamba)
    code, out, err = here(path, "--raw", "-p", "abc", "-n", "2", "--stock", "f16", "--report", "none")
    assert code == (0 if make is tiny_models.mamba else 2), err


# --- how an answer ended ---


def test_an_answer_that_is_cut_off_says_so(here):
    code, out, err = here("-p", PROBLEM, "-n", "5", "-c", "256", "--report", "none")
    assert code == 0 and out and err == "(cut off: the limit of 5 tokens is reached, -n)\n"
    code, out, err = here("-p", PROBLEM, "-c", "256", "--report", "none")
    assert code == 3 and out and err == "(cut off: the context is full, -c)\n"
    code, out, err = here("-p", PROBLEM, "-c", "256", "-n", "1000", "--report", "json")
    assert code == 3 and json.loads(err)["finish_reason"] == "length" and json.loads(err)["answer_tokens"] == 256 - 23
    code, out, err = here("-p", PROBLEM, "-n", "5", "-c", "256")
    assert code == 0 and err.startswith("(cut off: the limit of 5 tokens is reached, -n)\n")


@pytest.mark.parametrize(
    ("n", "max_tokens", "said", "code"), [(4, 5, "context", 3), (5, 5, "limit of 5", 0), (7, 5, "limit of 5", 0), (7, -1, "context", 3)]
)
def test_an_answer_may_pass_its_limit_to_complete_a_character(n, max_tokens, said, code):
    answer = Answer(finish_reason="length", answer_tokens=n)
    assert said in why_it_ended(answer, max_tokens) and exit_code(answer, max_tokens) == code


def test_no_tokens_reads_the_prompt_only(here):
    code, out, err = here("-p", PROBLEM, "-n", "0", "-c", "256", "--report", "json")
    report = json.loads(err)
    assert code == 0 and out == "" and report["read_tokens"] == 23 and report["answer_tokens"] == 0
    code, out, err = here("-p", PROBLEM, "-n", "0", "-c", "256", "--report", "none")
    assert (code, out, err) == (0, "", "")


def test_ctrl_c_while_a_prompt_is_read(tmp_path):
    (tmp_path / "long.txt").write_text("the old clerk walked to the harbour and said nothing " * 1200)
    t = Terminal("-f", "long.txt", "-c", "16384", "-b", "64", cwd=tmp_path)
    t.expect("Reading the prompt")
    t.process.send_signal(signal.SIGINT)
    t.expect("(stopped)")
    t.expect("were not read)")
    assert "were in the cache" not in t.seen and t.close() == 130


def test_ctrl_c_while_a_model_is_loaded_on_a_terminal(monkeypatch, tmp_path):
    from rich.progress import Progress

    updates = []

    def update(self, task, **values):
        updates.append(values)
        if len(updates) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "update", update)
    with open(tmp_path / "shown", "w", encoding="utf-8") as shown:
        monkeypatch.setattr(command_line, "Console", lambda **_: Console(file=shown, force_terminal=True))
        assert command_line.main([MODEL, "-p", "x", "-t", "1", "-c", "256"]) == 130
    assert len(updates) == 3


# --- the chat keeps what was said ---


def kept(folder):
    return sorted((folder / "mixkvq" / "chats").glob("*.json"))


def test_a_terminal_that_is_closed_does_not_cost_the_conversation(data_folder):
    t = Terminal("-c", "1024", "--temp", "0")
    t.expect("/help lists the commands.")
    t.send(PROBLEM)
    t.expect("a reversed: 19284")
    os.kill(t.process.pid, signal.SIGHUP)  # in the middle of the answer
    assert t.close() == -signal.SIGHUP
    [path] = kept(data_folder)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    saved = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert saved[0] == {"role": "user", "content": PROBLEM} and len(saved) == 2
    assert saved[1]["role"] == "assistant" and saved[1]["content"].startswith("a reversed: 19284")

    t = Terminal("-c", "1024", "--temp", "0")
    t.expect("Earlier conversations are kept: /resume")
    t.send("/chats")
    t.expect(f"2 messages  {PROBLEM}")
    t.send("/resume 7")
    t.expect("a number from 1 to 1")
    t.send("/resume")
    t.expect("2 messages loaded")
    t.send("/exit")
    assert t.close() == 0


def test_a_terminal_that_is_closed_at_the_prompt(data_folder):
    t = Terminal("-c", "256", "-n", "3", "--temp", "0")
    t.expect("/help lists the commands.")
    t.send("one")
    t.expect("(cut off: the limit of 3 tokens is reached, -n)")
    os.close(t.master)
    os.kill(t.process.pid, signal.SIGHUP)
    t.process.wait(600)
    assert len(json.loads(kept(data_folder)[0].read_text())["messages"]) == 2


def test_a_conversation_that_is_not_to_be_kept_or_cannot_be(data_folder, tmp_path):
    t = Terminal("-c", "256", "-n", "3", "--temp", "0", "--no-autosave")
    t.expect("/help lists the commands.")
    t.send("one")
    t.expect("(cut off")
    t.send("/exit")
    assert t.close() == 0 and not kept(data_folder)

    (tmp_path / "file").touch()
    t = Terminal("-c", "256", "-n", "3", "--temp", "0", env={"XDG_DATA_HOME": str(tmp_path / "file")})
    t.expect("/help lists the commands.")
    t.send("one")
    t.expect("(This conversation is not kept: ")
    t.expect("(cut off")
    t.send("two")
    t.expect("(cut off")
    assert "not kept" not in t.seen
    t.send("/exit")
    assert t.close() == 0


def test_what_is_a_command_and_what_is_text(tmp_path, data_folder):
    t = Terminal("-c", "1024", "-n", "2", "--temp", "0", cwd=tmp_path)
    t.expect("/help lists the commands.")
    for line in ("/home/x.txt what is it?", "//reset", "/etc/passwd"):
        t.send(line)
        t.expect("(cut off")
    t.send("/hlep me")
    t.expect("There is no command /hlep; did you mean /help?")
    t.send("/save talk.json")
    t.expect("6 messages saved")
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["content"] for m in saved if m["role"] == "user"] == ["/home/x.txt what is it?", "/reset", "/etc/passwd"]
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    refused = {".": "it is a folder", MODEL: "is the file that is read", "package.json": "is no conversation", "/proc/x": "cannot be written"}
    for target, words in refused.items():
        t.send(f"/save {target}")
        t.expect(words)
    assert (tmp_path / "package.json").read_text() == '{"name": "mine"}'
    t.send("/exit")
    assert t.close() == 0


def test_the_seed_in_a_chats_report_is_the_one_of_the_last_answer():
    t = Terminal("-c", "256", "-n", "2", "--seed", "5", "--report", "json")
    t.expect("/help lists the commands.")
    t.send("one")
    t.expect("(cut off")
    t.send("/exit")
    t.expect('"seed": 5')
    assert t.close() == 0


def test_turns_that_no_longer_fit_the_context_are_saved_nevertheless(tmp_path, data_folder):
    llama = bridge.Llama(MODEL, n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
    with open(tmp_path / "stderr", "w", encoding="utf-8") as stderr:
        chat = Chat(llama, Sampling(max_tokens=4), None, Console(file=stderr, width=200), lambda piece: None, lambda message: "", autosave=True)
        for i in range(8):
            chat.turn(f"Turn {i}: " + "what did the old clerk remember? " * 4)
        assert len(chat.messages) < 16 == len(chat.transcript)
        chat.save(str(tmp_path / "talk.json"))
        [path] = kept(data_folder)
        assert parse_conversation((tmp_path / "talk.json").read_text()) == parse_conversation(path.read_text()) == chat.transcript
        chat.command("/reset")
        assert llama.n_tokens == 0
        chat.turn("another")
        assert len(kept(data_folder)) == 2
    llama.close()
