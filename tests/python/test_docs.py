"""The documents are true: measured numbers are those of the results that are committed, and what is named exists.

bench/tables.py writes tables and figures; here they are compared with what it would write today. Every other number that looks measured is a failure.
"""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import figures
import pytest
import tables

from mixkvq.core.native import native
from mixkvq.study import caches

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/README.md")] + sorted((ROOT / "docs").glob("*.md"))
DIARIES = sorted((ROOT / "docs" / "notes").glob("*.md"))  # figures of their time
RESULTS = sorted((ROOT / "bench" / "results").glob("*.json"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
each = pytest.mark.parametrize("document", DOCUMENTS, ids=[path.name if path.parent != ROOT / "models" else "models" for path in DOCUMENTS])

# A number and the unit of something that was measured.
MEASURED = re.compile(
    r"\d(?:[\d .,]*\d)?(?:-| ?)(?:tokens/s|[mµn]s\b|s\b|seconds|minutes|hours|MiB|GiB|[MGT]B/s|TFLOP/s|W\b|MHz|%|x\b|times|nats|problems)|\b0\.00\d+"
)
# What looks like it and is not: sizes of files, limits and definitions.
DEFINED = {
    "quality.md": ["95 %", "99.9 %"],  # intervals and quantiles
    "adding-a-kernel.md": ["2 ms", "64 MiB"],  # how long the benchmark runs; how much is unpacked at once
    "architecture.md": ["64 MiB"],
    "chat.md": ["8 GiB"],  # what chats take on disk at most
    "format.md": ["8 times", "0.2 % of the bytes", "0.1 % at 32768"],  # 4 or 5 F32 sums over the bits of a channel of keys and one of values
}


def prose(text: str) -> str:
    """Without tables and figures that are written from results, code, addresses and comments."""
    text = tables.TABLE.sub("", text)
    text = tables.FIGURE.sub("", text)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", text)


# ---- numbers ---------------------------------------------------------------------------------------------


def test_tables_and_figures_are_those_of_the_results():
    stale = [path.name for path in tables.out_of_date()]
    assert not stale, f"{', '.join(stale)}: `make tables` writes them anew"


@each
def test_every_measured_number_has_a_result(document):
    """Where a sentence needs a figure it is marked as one; a figure that no result gives is not stated."""
    text = prose(document.read_text(encoding="utf-8"))
    for words in DEFINED.get(document.name, []):
        text = text.replace(words, "")
    assert MEASURED.findall(text) == []


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md", "docs/quality.md"])
def test_every_table_of_decimals_has_a_result(document):
    rows = [line for line in prose((ROOT / document).read_text(encoding="utf-8")).splitlines() if line.startswith("|")]
    assert [row for row in rows if re.search(r"\d\.\d", row)] == []


def test_the_checks_see_what_they_are_for():
    for words in ("takes 12 ms", "is 2.5 times", "a KLD of 0.0012", "9 % slower", "505 MiB", "8.0x", "120 s"):
        assert MEASURED.search(prose(f"It {words}."))
    assert not MEASURED.search(prose("It is 2.5 times<!--= 1 + 1.5 --> as fast, and `12 ms`, in format 2, of 128 tokens at 3.2 bits."))
    assert tables.render("It is 7.1<!--= 1 + 1.55 --> of 30 %<!--= 5 -->.") == "It is 2.5<!--= 1 + 1.55 --> of 5 %<!--= 5 -->."
    with pytest.raises(click.ClickException, match="no table 'nonesuch'"):
        tables.render("<!-- table: nonesuch -->\n<!-- end -->")


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        pytest.skip("there is no git")


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_results_are_of_clean_commits(path):
    """A commit that anybody can check out, before this one."""
    commit = json.loads(path.read_text(encoding="utf-8"))["commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("the history is not here")
    assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0


def test_every_result_is_shown_and_its_command_said():
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    for path in RESULTS:
        assert f"bench/results/{path.name})" in text and path.stem in tables.COMMANDS


def test_the_presets_are_those_of_the_library():
    listed = re.findall(r"^\| `([\w.-]+)` \| (?:`([\w-]+)`)? ?\| ([\d.]+) \|", README, re.MULTILINE)
    assert listed == [(p["name"], p["alias"], f"{p['body_bits']:.2f}") for p in native().presets()]


def test_the_demo_prints_what_the_readme_shows():
    """But for the speeds and the processor."""
    shown = README[README.index("Problem: Compute") :].split("```")[0]
    done = subprocess.run([sys.executable, "-m", "bridge.run", "--demo", "--device", "cpu"], capture_output=True, text=True, check=True)
    printed = done.stdout + done.stderr

    def lines(text: str) -> list[str]:
        return [re.sub(r"[\d.]+ tokens/s|\(\w+\)$", "", " ".join(line.split())) for line in text.splitlines() if line.strip()]

    missing = [line for line in lines(shown) if line != "..." and line not in lines(printed)]
    assert not missing, printed


# ---- what is named ---------------------------------------------------------------------------------------


def heading_id(line: str) -> str:
    return re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS + DIARIES, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS + DIARIES])
def test_links_and_paths_exist(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        if anchor:
            assert anchor in [heading_id(line) for line in found.read_text(encoding="utf-8").splitlines() if line.startswith("#")], target
    for path in re.findall(r"(?<![\w/.-])((?:bench|bridge|cpp|docs|models|python|tests)/[\w./*-]*\w)(?![\w./*<-])", text):
        assert list(ROOT.glob(path)), path


def commands_of(module: str) -> set[str]:
    """The options of a command line, long and short: of `python -m module`, or of a script."""
    module = re.sub(r"^(?:bridge|mixkvq)\.(?=\w+$)", "mixkvq.cli.", module)
    found = [x for x in vars(importlib.import_module(module)).values() if isinstance(x, click.Command)]
    group = [command for x in found if isinstance(x, click.Group) for command in x.commands.values()]
    options = {name for x in found + group for param in x.params for name in (*param.opts, *param.secondary_opts)}
    return options | {name for x in found + group for name in x.context_settings.get("help_option_names", ["--help"])} | {"--help"}


MODULES = ["bridge.run", "mixkvq.cli.window", *(f"mixkvq.{name}" for name in ("serve", "calibrate", "evaluate", "convert", "inspect", "lab"))]
SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if "click.command" in path.read_text(encoding="utf-8"))


@each
def test_options_exist(document):
    """Those of a command line belong to its program; one that is named alone belongs to some program of ours."""
    text = re.sub(r"\\\n", " ", document.read_text(encoding="utf-8"))
    known = {name: commands_of(name) for name in (*MODULES, *SCRIPTS)}
    for block, words in re.findall(r"^```\w*\n(.*?)^```|`([^`]+)`", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.splitlines() or [" ".join(words.split())]:
            program = re.search(r"-m ((?:mixkvq|bridge)\.\w+)|bench/(\w+)\.py", line.split("#")[0])
            name = (program[1] or program[2]) if program else None
            options = re.findall(r"(?<![\w-])--[a-z][\w-]*", line)
            if name not in known and not line.startswith("--"):
                continue  # of another program
            allowed = known[name] if name in known else set().union({"--budget"}, *known.values())  # of the recipe of the built-in model
            assert set(options) <= allowed, f"{line}: {sorted(set(options) - allowed)}"


@pytest.mark.parametrize("step", figures.STEPS)
def test_what_is_measured_can_be_measured(step):
    """The commands of `make figures`: their options exist, and so does every cache."""
    for command in figures.commands(step, figures.Given(None, None, 3)):
        program = command[1] if command[0] == "-m" else Path(command[0]).stem
        assert {word for word in command if word.startswith("-") and word != "-m"} <= commands_of(program)
        for name in caches.split_names(command[command.index("--kv") + 1] if "--kv" in command else ""):
            caches.check_name(name)
    for name in figures.STEPS[step]:
        assert name in tables.COMMANDS and "make figures" in tables.COMMANDS[name]


@each
def test_targets_of_make_exist(document):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z]+)|^make ([a-z]+)", document.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target


def test_the_readme_names_both_commands_at_once():
    first_screen = "\n".join(README.splitlines()[:45])
    assert "make run" in first_screen and "make test" in first_screen
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_every_promise_has_its_tests():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(named) > 50
    for file, test in named:
        source = (ROOT / "tests" / "python" / file).read_text(encoding="utf-8")
        assert re.search(rf"^(?:    )?def {test}\(", source, re.MULTILINE), f"{file}::{test}"
    for file in re.findall(r"`(test_\w+\.cpp)`", text):
        assert (ROOT / "tests" / "native" / file).exists(), file
    promises = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
    rows = [line for line in promises.splitlines() if line.startswith("| ") and "---" not in line and "held by" not in line]
    assert rows and all(re.search(r"`test_\w+\.(cpp|py)", row) for row in rows)
