"""What all command lines share: options, help, errors, and what may be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import cuda_trace
import llama_bench
import memory
import plot
import pytest
import random_model
import speed

import bridge
from mixkvq.cli import calibrate, convert, evaluate, inspect, lab, main
from mixkvq.cli.command import command_line
from mixkvq.cli.options import Number, run, tool

ROOT = Path(__file__).parents[2]
TOOLS = {
    "mixkvq": main.command,
    "mixkvq.calibrate": calibrate.command,
    "mixkvq.evaluate": evaluate.command,
    "mixkvq.inspect": inspect.command,
    "mixkvq.convert": convert.command,
    "mixkvq.lab": lab.command,
    "bench/speed.py": speed.main,
    "bench/memory.py": memory.main,
    "bench/llama_bench.py": llama_bench.main,
    "bench/plot.py": plot.main,
    "bench/random_model.py": random_model.main,
    "bench/cuda_trace.py": cuda_trace.main,
}


def commands():
    """Every command and subcommand, with the words that start it."""
    for name, command in TOOLS.items():
        yield name, [], command
        for sub, inner in getattr(command, "commands", {}).items():
            yield name, [sub], inner


def options():
    for name, words, command in commands():
        for option in command.params:
            if isinstance(option, click.Option):
                yield name, words, option


NUMBERS = [(name, words, o) for name, words, o in options() if isinstance(o.type, (click.types.IntParamType, click.types.FloatParamType))]


# ---- options -----------------------------------------------------------------------------------------------


NONE = ["nan", "inf", "-1", "1e999", "99999999999999999999999999", "x", ""]
WRONG = [(n, w, o, value) for n, w, o in NUMBERS for value in NONE if value != "-1" or o.type.min != -1]


@pytest.mark.parametrize(("name", "words", "option", "value"), WRONG, ids=[f"{n} {' '.join(w)} {o.opts[0]} {v}" for n, w, o, v in WRONG])
def test_what_is_no_number_for_it_is_refused_with_the_name_of_the_option(name, words, option, value, capfd):
    arguments = [f"{option.opts[0]}={value}"]
    assert run(TOOLS[name], name, [*words, *arguments]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and option.opts[0] in err, err


def test_there_are_many_such_options():
    assert len(NUMBERS) > 45 and {name for name, _, _ in NUMBERS} >= {"mixkvq.calibrate", "mixkvq.evaluate", "bench/speed.py"}
    assert {"--temp", "--top-p", "--min-p"} <= {option.opts[0] for _, _, option in NUMBERS}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mixkvq.calibrate", ["m.gguf", "--policy", "paper", "--thresholds", "nan,1"]),
        ("mixkvq.calibrate", ["m.gguf", "--policy", "paper", "--thresholds", "-1,1"]),
        ("bench/speed.py", [str(ROOT / "README.md"), "--depths", "1,-2"]),
        ("bench/speed.py", [str(ROOT / "README.md"), "--depths", "\u00b2"]),
        ("bench/llama_bench.py", ["--ubatch", "1,nan"]),
    ],
)
def test_lists_of_numbers_too(name, arguments, capfd):
    assert run(TOOLS[name], name, arguments) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and arguments[-2] in err, err


@pytest.mark.parametrize("flag", ["-h", "--help", "--version"])
@pytest.mark.parametrize("name", TOOLS)
def test_help_and_version(name, flag, capfd):
    assert run(TOOLS[name], name, [flag]) == 0
    out, err = capfd.readouterr()
    assert not err and ("mixkvq 0." in out if flag == "--version" else "-h, --help" in out)


@pytest.mark.parametrize("name", TOOLS)
def test_a_mistake_says_where_help_is(name, capfd):
    assert run(TOOLS[name], name, ["--no-such-option"]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and "No such option" in err and "See --help" in err


ADDRESSES = [("https://example.org/m.gguf", "download it first"), ("org/name", "the name of a model on a hub"), ("none.gguf", "none.gguf does not")]
TAKES_A_MODEL = ["mixkvq.calibrate", "mixkvq.evaluate", "mixkvq.inspect", "bench/speed.py", "bench/memory.py"]


@pytest.mark.parametrize(("address", "words"), ADDRESSES)
@pytest.mark.parametrize("name", TAKES_A_MODEL)
def test_an_address_in_place_of_a_model_gets_advice(name, address, words, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(TOOLS[name], name, [address]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {address} does not exist") and words in err and len(err.splitlines()) == 1, err


def test_what_writes_can_be_forced_and_nothing_else():
    for name, words, command in commands():
        writes = {"out", "plot", "picture", "output", "report_file"} & {param.name for param in command.params}
        assert bool(writes) == ("force" in {param.name for param in command.params}), (name, words)


RECIPE = {
    "prep.py": (["--novels", "none", "--gsm8k", "none", "--out", "OUT"], "gsm8k.npz", ["--until"]),
    "train.py": (["--data", "none", "--out", "OUT"], "final.npz", ["--budget", "--layers", "--learning-rate", "--seed"]),
    "export.py": (["none.npz", "none.json", "OUT"], "cot-tiny-34m-q8_0.gguf", []),
}


@pytest.mark.parametrize("name", RECIPE)
def test_the_recipe_of_the_model_replaces_nothing_unasked(name, tmp_path):
    arguments, there, numbers = RECIPE[name]
    (tmp_path / there).write_text("mine")

    def refused(out, *more):
        command = [sys.executable, ROOT / "models/recipe" / name, *[out if a == "OUT" else a for a in arguments], *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode in (1, 2) and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert refused(tmp_path) == f"error: {tmp_path / there} exists; give another folder, or --force to replace it."
    assert refused("/proc/x").startswith("error: /proc/x cannot be written: ")
    for option in numbers:
        for value in ("nan", "inf", "-1"):
            assert option in refused(tmp_path / "new", option, value)
    assert (tmp_path / there).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


# ---- errors ------------------------------------------------------------------------------------------------


def failing(error):
    @tool()
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ZeroDivisionError("division\n by zero"), 1, "ZeroDivisionError: division by zero. That should not happen; MIXKVQ_DEBUG=1"),
        (AssertionError(), 1, "AssertionError. That should not happen"),
        (bridge.SettingsError("No."), 2, "No."),
        (bridge.ContextError("No."), 1, "No."),
        (OSError(28, "No space left on device", "x.json"), 1, "x.json: No space left on device."),
        (MemoryError(), 1, "There is not enough memory."),
        (click.ClickException("No."), 2, "No."),
    ],
)
def test_every_error_is_one_line(error, code, words, capfd, monkeypatch):
    assert run(failing(error), "mixkvq.x", []) == code
    out, err = capfd.readouterr()
    assert not out and err.startswith(f"error: {words}") and len(err.splitlines()) == 1
    monkeypatch.setenv("MIXKVQ_DEBUG", "1")
    assert run(failing(error), "mixkvq.x", []) == code
    expected = not isinstance(error, (MemoryError, click.ClickException))
    assert ("Traceback" in capfd.readouterr().err) == expected


def test_ctrl_c_is_quiet(capfd):
    assert run(failing(KeyboardInterrupt()), "mixkvq.x", []) == 130
    out, err = capfd.readouterr()
    assert not out and not err.strip()


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 2), ("2>&-", 0), (">&- 2>&-", 2), ("| true", 0), (">/dev/full", 1), (">/dev/full 2>&-", 1)]
)
def test_streams_that_are_closed_or_full(redirection, code):
    command = f"set -o pipefail; '{sys.executable}' -m mixkvq.lab kivi-2 f16 {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    said = code != 0 and "2>&-" not in redirection
    assert done.stderr.startswith("error: " if said else "") and len(done.stderr.splitlines()) == said


def test_an_error_does_not_go_to_stdout_where_stderr_is_closed():
    done = subprocess.run(["bash", "-c", f"'{sys.executable}' -m mixkvq.lab nope 2>&-"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_terminal_that_knows_ascii_only(tmp_path):
    path = tmp_path / "Zürich.gguf"
    path.write_text("x")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "mixkvq.inspect", str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_number():
    assert Number(0, 2).convert("1.5", None, None) == 1.5
    for text in ("nan", "inf", "-inf", "3", "-0.1", "one"):
        with pytest.raises(click.BadParameter):
            Number(0, 2).convert(text, None, None)
    with pytest.raises(click.BadParameter, match="finite"):
        Number(min=0).convert("inf", None, None)


def test_the_command_line_is_known_while_it_runs():
    seen = []

    @tool()
    @click.argument("words", nargs=-1)
    def command(words):
        seen.append(command_line())

    assert command_line() == []
    run(command, "mixkvq.x", ["a b", "--", "-c"])
    run(command, "bench/x.py", [])
    assert seen == [["python", "-m", "mixkvq.x", "a b", "--", "-c"], ["python", "bench/x.py"]]


# ---- signals -----------------------------------------------------------------------------------------------

IN_THE_MIDDLE = """
import signal, sys
from mixkvq.core.files import replacing
from mixkvq.cli.options import run, tool

signal.signal(signal.SIGINT, signal.SIG_IGN if sys.argv[1] == "deaf" else signal.default_int_handler)

@tool()
def command():
    with replacing("out") as temporary:
        open(temporary, "w").write("half")
        signal.raise_signal(int(sys.argv[2]))

sys.exit(run(command, "x", []))
"""


@pytest.mark.parametrize("how", ["heeds Ctrl-C", "deaf"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_leaves_nothing_half_written(number, how, tmp_path):
    done = subprocess.run([sys.executable, "-c", IN_THE_MIDDLE, how, str(int(number))], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -number and not done.stderr and not list(tmp_path.iterdir()), done.stderr


def test_what_ignores_a_closed_terminal_goes_on(tmp_path):
    """As under nohup."""
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + IN_THE_MIDDLE
    done = subprocess.run([sys.executable, "-c", code, "deaf", str(int(signal.SIGHUP))], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out").read_text() == "half", done.stderr
