"""The command `mixkvq`: every tool under one name, the settings file, completion, and what doctor says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import llama_cpp
import pytest

from mixkvq.cli.defaults import COMMANDS as TABLES
from mixkvq.cli.defaults import SHARED, Defaults
from mixkvq.cli.main import COMMANDS, SHELLS, command, main
from mixkvq.cli.options import run
from mixkvq.core.errors import ProfileError
from mixkvq.core.model_file import built_in_model, open_model

MODEL = str(built_in_model())
SCRIPT = [str(Path(sys.executable).parent / "mixkvq")]
INSTALL = "install it with: pip install 'llama-cpp-python>=0.3.17'."
PACKAGE = [sys.executable, "-m", "mixkvq"]


def start(program, *arguments, **environment):
    """One process. Returns (exit code, stdout, stderr)."""
    environment = {**os.environ, **environment}
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, timeout=600)
    return done.returncode, done.stdout, done.stderr


def here(capfd, *arguments):
    """The same in this process."""
    code = main(list(arguments))
    out, err = capfd.readouterr()
    return code, out, err


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Writes a settings file and makes it the one that is read. Returns its path."""

    def write(text):
        path = tmp_path / "settings.toml"
        path.write_text(text)
        monkeypatch.setenv("MIXKVQ_CONFIG", str(path))
        return path

    return write


# ---- the commands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [SCRIPT, PACKAGE], ids=["script", "package"])
def test_without_a_command_it_lists_them(program):
    code, out, err = start(program)
    assert (code, err) == (0, "")
    name = "mixkvq" if program is SCRIPT else "python -m mixkvq"
    assert out.startswith(f"Usage: {name} [OPTIONS] COMMAND")
    for each, what in COMMANDS.items():
        assert re.search(rf"^  {each} +{what[:40]}", out, re.MULTILINE)
    assert start(program, "--help") == (code, out, err)


def test_the_list_imports_no_tool():
    heavy = ("numpy", "llama_cpp", "gguf", "rich", "matplotlib", "mixkvq.cli.calibrate", "mixkvq.cli.run")
    code = f"import sys; from mixkvq.cli.main import main; main(['--help']); sys.exit(str([m for m in {heavy} if m in sys.modules]))"
    assert start([sys.executable, "-c", code])[2].strip() == "[]"


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help", "--version"])
def test_help_and_version_of_every_command(name, flag, capfd):
    code, out, err = here(capfd, name, flag)
    assert (code, err) == (0, "") and out.startswith("mixkvq 0." if flag == "--version" else f"Usage: mixkvq {name} ")


@pytest.mark.parametrize("name", command.commands["convert"].commands)
def test_help_and_version_within_convert(name, capfd):
    assert here(capfd, "convert", name, "-h")[1].startswith(f"Usage: mixkvq convert {name} ")
    assert here(capfd, "convert", name, "--version")[1].startswith("mixkvq 0.")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", MODEL, "-p", "x", "--kv", "nope"], 2, "There is no preset 'nope'"),
        (["calibrate", "none.gguf"], 2, "none.gguf does not exist"),
        (["evaluate", MODEL, "--kv", "nope"], 2, "nope"),
        (["inspect", "none.gguf"], 2, "none.gguf does not exist"),
        (["convert", "extract", MODEL, "-o", "/proc/x.gguf"], 2, "/proc/x.gguf"),
        (["lab", "nope"], 2, "nope"),
        (["path", "--nope"], 2, "No such option"),
        (["doctor", "--nope"], 2, "No such option"),
        (["completion", "nope"], 2, "'nope' is not one of"),
        (["nope"], 2, "No such command 'nope'"),
        (["convert"], 2, "Missing command"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, code, words, capfd):
    ways = [lambda: here(capfd, *arguments)]
    if arguments[0] == "nope":
        ways += [lambda: start(SCRIPT, *arguments), lambda: start(PACKAGE, *arguments)]
    for way in ways:
        found, out, err = way()
        assert found == code and not out and err.startswith("error: ") and words in err and len(err.splitlines()) == 1


def test_the_backend_has_the_same_path_by_every_name():
    paths = [start(program) for program in ([*SCRIPT, "path"], [*PACKAGE, "path"], [sys.executable, "-m", "bridge.path"])]
    assert paths[0] == paths[1] == paths[2] and Path(paths[0][1].strip()).is_file()


def test_an_answer():
    code, out, err = start(SCRIPT, "run", MODEL, "-p", "Compute 48291 * 73.", "-n", "3", "-c", "256", "-t", "1", "--report", "none")
    assert code == 0 and out.startswith("a reversed"), err


def test_advice_names_the_command_as_it_was_called(capfd, monkeypatch):
    def failing():
        raise ProfileError("It is damaged: take it out (python -m mixkvq.convert remove).")

    path = command.commands["path"]
    monkeypatch.setattr(path, "callback", failing)
    assert "take it out (mixkvq convert remove)" in here(capfd, "path")[2]
    assert main(["path"], program="python -m mixkvq") == 2
    assert "take it out (python -m mixkvq convert remove)" in capfd.readouterr().err
    assert run(path, "bridge.path", []) == 2
    assert "take it out (python -m mixkvq.convert remove)" in capfd.readouterr().err


def test_the_document_of_the_commands_is_up_to_date():
    assert commands.DOCUMENT.read_text(encoding="utf-8") == commands.text(), "python bench/commands.py"


# ---- settings file -----------------------------------------------------------------------------------------

PROMPT = ["run", MODEL, "-p", "Compute 1 + 1.", "-n", "0", "--report", "json"]


def report(program, *arguments, **environment):
    code, _, err = start(program, *arguments, **environment)
    assert code == 0, err
    return json.loads(err.splitlines()[-1])


def report_here(capfd, *arguments):
    code, _, err = here(capfd, *arguments)
    assert code == 0, err
    return json.loads(err.splitlines()[-1])


def test_the_command_line_goes_before_a_commands_table_and_that_before_all(settings, capfd, monkeypatch):
    settings('[all]\nthreads = 1\nwindow = 64\n[run]\nctx = 512\nthreads = 2\nkv = "tiny"\n')
    found = report(SCRIPT, *PROMPT)
    assert (found["context"], found["threads"], found["cache"]["preset"]) == (512, 2, "tiny")
    found = report_here(capfd, *PROMPT, "-c", "256", "--kv", "quality")
    assert (found["context"], found["threads"], found["cache"]["preset"]) == (256, 2, "quality")
    alone = report([sys.executable, "-m", "bridge.run"], *PROMPT[1:])
    assert (alone["context"], alone["threads"]) == (512, 2)
    monkeypatch.setenv("MIXKVQ_CONFIG", "")
    assert report_here(capfd, *PROMPT, "-c", "256", "-t", "1")["cache"]["preset"] == "balanced"


def test_what_is_typed_takes_back_what_it_excludes(settings, capfd):
    path = settings('[all]\nwindow = 64\n[run]\nctx = 256\nthreads = 1\nkv = "tiny"\n[calibrate]\nbits = 3\n')
    assert report_here(capfd, *PROMPT, "--stock", "q8_0")["cache"]["type"] == "q8_0"
    code, _, err = here(capfd, "calibrate", MODEL, "--budget-mib", "1")
    assert code == 2 and "--budget-mib and --ctx go together" in err
    path.write_text('[run]\nstock = "q8_0"\nkv = "tiny"\n')
    code, _, err = here(capfd, *PROMPT)
    assert code == 2 and "--stock turns MixKVQ off" in err and f"--kv from {path}" in err and f"--stock from {path}" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[run]\nthread = 1", "'thread' in [run], which is no option there; the nearest is 'threads'"),
        ("[run]\nforce = true", "'force' in [run]"),
        ("[rum]\nthreads = 1", "a table [rum], which no command reads; the nearest is 'run'"),
        ("[convert]\nout = 'x'", "a table [convert]"),
        ("threads = 1", "'threads' outside of a table"),
        ("run = 1", "run = 1; [run] is a table"),
        ("[all]\nthread = 1", "'thread' in [all], which is for what commands share; the nearest is 'threads'"),
        ("[all]\nctx = 1", "'ctx' in [all]"),
        ("[run]\nthreads = 0", "threads = 0 in [run]"),
        ("[run]\nthreads = 1.5", "threads = 1.5 in [run]"),
        ("[run]\nthreads = true", "threads = True in [run]: It must not be true or false"),
        ("[run]\ntemp = nan", "temp = nan in [run]"),
        ("[run]\nraw = 'yes'", "raw = 'yes' in [run]: It must be true or false"),
        ("[run]\nstock = ['f16']", "It must be a single value"),
        ("[evaluate]\nkv = 'q8_0'", "kv = 'q8_0' in [evaluate]: It must be a list"),
        ("[run", "is not TOML"),
        ("[run]\nsystem = '\udcff'", "is not TOML"),
    ],
)
def test_what_is_wrong_with_the_file(text, words, tmp_path, monkeypatch, capfd):
    path = tmp_path / "settings.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    monkeypatch.setenv("MIXKVQ_CONFIG", str(path))
    name = "evaluate" if "[evaluate]" in text else "run"
    code, out, err = here(capfd, name, MODEL, *(["-p", "x"] if name == "run" else []))
    assert code == 2 and not out and f"error: The settings file {path} " in err and words in err and len(err.splitlines()) == 1, err
    assert here(capfd, name, "--help")[0] == here(capfd, name, "--version")[0] == 0


def test_a_file_that_is_named_must_exist(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("MIXKVQ_CONFIG", str(tmp_path / "none.toml"))
    assert "none.toml, which MIXKVQ_CONFIG names, does not exist" in here(capfd, "run", MODEL, "-p", "x")[2]
    assert here(capfd, "path")[0] == 0  # which has no table
    monkeypatch.delenv("MIXKVQ_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dict(Defaults("run", command.commands["run"])) == {}


def test_options_that_are_shared_mean_the_same():
    found = {}
    for name in TABLES:
        for option in command.commands[name].params:
            if option.name in SHARED:
                kind = option.type
                found.setdefault(option.name, set()).add((kind.name, getattr(kind, "min", None), getattr(kind, "max", None), option.multiple))
    assert set(found) == set(SHARED) and all(len(kinds) == 1 for kinds in found.values()), found


# ---- completion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_prints_what_the_shell_reads(shell, capfd):
    code, out, err = here(capfd, "completion", shell)
    assert code == 0 and "_MIXKVQ_COMPLETE" in out and f"{shell}_complete" in out
    assert start(SCRIPT, _MIXKVQ_COMPLETE=f"{shell}_source")[1].strip() == out.strip()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("mixkvq c", ["plain,chat", "plain,calibrate", "plain,convert", "plain,completion"]),
        ("mixkvq run --kv bal", ["plain,balanced"]),
        ("mixkvq run mod", ["file,mod"]),
        ("mixkvq evaluate mod", ["file,mod"]),
        ("mixkvq inspect --mod", ["plain,--model"]),
        ("mixkvq convert em", ["plain,embed"]),
        ("mixkvq convert embed x", ["file,x"]),
        ("mixkvq completion f", ["plain,fish"]),
    ],
)
def test_a_shell_gets_what_may_follow(words, expected, capfd, monkeypatch):
    asked = {"_MIXKVQ_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert here(capfd)[1].split() == expected
    if "run --kv" in words:
        assert start(SCRIPT)[1].split() == expected


# ---- doctor ------------------------------------------------------------------------------------------------


def doctor(*arguments, **environment):
    code, out, err = start(SCRIPT, "doctor", "--json", *arguments, **environment)
    assert not err
    found = json.loads(out)
    assert code == (0 if found["usable"] else 1) and found["usable"] == (found["problem"] is None)
    return found


def fake_llama_cpp(folder, text):
    (folder / "llama_cpp").mkdir()
    (folder / "llama_cpp" / "__init__.py").write_text(text)
    return str(folder)


def test_doctor_on_the_built_in_model():
    code, text, err = start(SCRIPT, "doctor", MODEL, "-c", "1000", MIXKVQ_ISA="scalar")
    assert (code, err) == (0, "") and text.endswith("\nThe cache can be used.\n") and "unknown" not in text.replace("commit", "")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in text.splitlines() if "  " in line)
    assert lines["llama-cpp-python"].startswith(f"{llama_cpp.__version__} (") and lines["ggml"].startswith("0.")
    assert lines["instruction set"].startswith("scalar, of scalar") and lines["MIXKVQ_ISA"] == "scalar"
    assert re.fullmatch("version 4 of MixKVQ's, [23] of ggml's", lines["interfaces"]) and lines["devices"].startswith("CPU")
    assert lines["fingerprint"] == open_model(MODEL).fingerprint and lines["cache"] == "preset balanced, no profile found"
    assert re.fullmatch(r"1024 tokens: cache [\d.]+ MiB \(10\.0 MiB in F16\), [\d.]+ MiB with what is computed in", lines["full context"])
    assert lines["settings file"] == "none, as MIXKVQ_CONFIG says" and len(text.splitlines()) < 30


def test_doctor_estimates_what_a_context_then_takes():
    sizes = doctor(MODEL, "-c", "512")["found"]["sizes"]
    assert sizes["context"] == 512
    assert sizes["cache"] == report(SCRIPT, *PROMPT, "-c", "512", "-t", "1")["cache"]["bytes"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("__version__ = '0.2.90'", f"llama-cpp-python 0.2.90 is not supported; {INSTALL}"),
        ("raise ModuleNotFoundError('', name='llama_cpp')", f"llama-cpp-python is not installed; {INSTALL}"),
        ("import os; os.abort()", "the look-up ended by SIGABRT"),
        ("import os; os._exit(7)", "the look-up ended with status 7"),
        ("raise OSError('libllama.so: no')", "OSError: libllama.so: no"),
    ],
    ids=["old", "missing", "aborts", "exits", "does not load"],
)
def test_doctor_where_llama_cpp_python_is_broken(text, reason, tmp_path):
    found = doctor(MODEL, PYTHONPATH=fake_llama_cpp(tmp_path, text))
    assert not found["usable"] and found["problem"] == reason
    assert {"ggml", "backend", "sizes"} <= set(found["unknown"]) and {"library", "memory", "model"} <= set(found["found"])


def test_others_say_the_same_of_an_old_llama_cpp_python(tmp_path):
    code, _, err = start(SCRIPT, "run", MODEL, "-p", "x", PYTHONPATH=fake_llama_cpp(tmp_path, "__version__ = '0.2.90'"))
    assert (code, err) == (2, f"error: llama-cpp-python 0.2.90 is not supported; {INSTALL}\n")


def test_doctor_says_why_a_model_or_a_setting_does_not_serve(tmp_path):
    assert doctor("none.gguf")["problem"] == "none.gguf does not exist."
    assert "MIXKVQ_ISA=\"nope\" is not an instruction set" in doctor(MIXKVQ_ISA="nope")["problem"]
    path = tmp_path / "settings.toml"
    path.write_text("[run]\nthread = 1")
    found = doctor(MIXKVQ_CONFIG=str(path))
    assert found["usable"] and "the nearest is 'threads'" in found["unknown"]["settings"]
    path.write_text("[run]\nthreads = 1")
    assert doctor(MIXKVQ_CONFIG=str(path))["found"]["settings"] == {"file": str(path), "exists": True, "tables": ["run"]}
