"""Measure anew what the documents state, step by step, then write the tables from it.

    python bench/figures.py --novel frankenstein.txt --wiki wiki.test.raw        # quality and memory
    python bench/figures.py --steps speed                                        # on a machine that does nothing else

A step that was stopped goes on where it was, and one that is done is not done again as long as nothing has changed in the code that it measures.
Results are kept in build/figures until all steps that were asked for are done; then they go to bench/results, and bench/tables.py writes the tables.
So a result names a commit, and the tree that was measured is that commit.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import tables
from _common import describe_run, save_json, split_names

from mixkvq.cli.command import command_line
from mixkvq.core.profile import read_profile

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "figures"
RESULTS = ROOT / "bench" / "results"
MODEL = ROOT / "models" / "cot-tiny-34m-q8_0.gguf"
MEASURED = ("CMakeLists.txt", "bench", "bridge", "cpp", "models", "python")  # what a figure depends on
NOT_MEASURED = (":!bench/results", ":!bench/tables.py", ":!bench/figures.py")

PROFILES = ("2.41", "3.0", "4.5")
PRESETS = ("mix8.2", "mix6.2", "mix4.3", "mix3.8", "balanced", "mix2.5", "mix2.4")
RIVALS = ("turbo-2", "kvarn-2", "kitty-12.5", "kivi-2", "turbo-3", "kvarn-3", "turbo-4", "kvarn-4", "q4_0-rot", "kivi-4")
REFACTORING = ("b91b90c", "ddea892")  # the commits before and after the C++ code was cut into layers
PUBLISHED = ("turbo-2", "kvarn-2", "kitty-12.5", "kitty-25", "kivi-2", "turbo-3", "kvarn-3", "turbo-4", "kvarn-4", "q4_0-rot", "kivi-4", "q8_0-rot")
VARIATIONS = (
    *("score=S", "score=I", "score=E", "score=M", "static", "mse=2", "rotk:K=3", "K=3", "K=4@8+40@4+84@2", "K=64@4+64@2"),
    *("vmean=0:vscale=16", "vmean=16:vscale=16", "vsign", "vlm", "V=2", "V=4"),
)


@dataclass
class Given:
    """Where the texts are, and how much is measured."""

    novel: Path | None
    wiki: Path | None
    problems: int
    models: tuple[str, ...] = ()


def profile(bits: str) -> str:
    return f"profile-{bits}.gguf"


def lab(names: Any) -> str:
    return ",".join(f"lab:{name}" for name in names)


def evaluate(out: str, caches: str, *options: str) -> list[str]:
    """Paths are relative to the folder of the results, and so are the names of profiles in them."""
    fixed = ["--device", "cpu", "--threads", "1", "--seed", "1", "--quiet", "--out", f"{out}.json"]
    return ["-m", "mixkvq.evaluate", str(MODEL), "--kv", caches, *fixed, *options]


def texts() -> list[str]:
    return ["--text", "novel.txt", "--text", "wiki.txt", "--ctx", "4096"]


def derivations() -> list[str]:
    return ["--derivations", "14", "--levels", "medium,hard"]


def chains(n: int) -> list[str]:
    return ["--derivations", str(n), "--tasks", "chain", "--levels", "hard"]


# ---- steps -----------------------------------------------------------------------------------------------


def commands(step: str, given: Given) -> list[list[str]]:
    """What a step runs, in the folder of the results."""
    profiles = [name for name in map(profile, PROFILES) if (WORK / name).exists()]  # as calibration has left them
    ours = [f"packed:of={name}" for name in (*PRESETS, *profiles)]
    if step == "calibration":
        fixed = ["-m", "mixkvq.calibrate", str(MODEL), "--device", "cpu", "--quiet", "--force"]
        return [[*fixed, "--bits", bits, "-o", profile(bits)] for bits in PROFILES]
    if step == "caches":
        everything = ",".join(("q8_0", "q5_0", "q4_0", *PRESETS, "paper", *profiles))
        problems = ",".join(("q8_0", "q4_0", "mix6.2", "mix4.3", "balanced", "mix2.5", *profiles))
        return [
            evaluate("caches", everything, *texts()),
            evaluate("caches", problems, *derivations()),
            evaluate("caches", problems, *chains(12)),
        ]
    if step == "codecs":
        alike = ("--window", "128", "--sinks", "128", "--no-floor")
        return [
            evaluate("codecs", lab((*RIVALS, *ours)), *alike, *texts()),
            evaluate("codecs", lab((*RIVALS, *ours)), *alike, *derivations()),
        ]
    if step == "codecs-published":
        return [evaluate("codecs-published", lab(PUBLISHED), "--no-floor", *texts())]
    if step == "variations":
        names = lab(("mixkvq", *(f"mixkvq:{options}" for options in VARIATIONS)))
        return [evaluate("variations", names, "--no-floor", *texts()[:2], "--ctx", "4096"), evaluate("variations", names, "--no-floor", *chains(4))]
    if step == "problems":
        names = ",".join(("balanced", *profiles, "lab:kivi-2"))
        return [evaluate("problems", names, "--problems", str(given.problems), "--levels", "medium,hard")]
    if step == "memory":
        return [[str(ROOT / "bench" / "memory.py"), str(MODEL), "--kv", "f16,balanced", "--ctx", "32768", "--threads", "1", "--out", "memory.json"]]
    if step == "restores":
        caches = ",".join((*PRESETS, "paper"))
        return [[str(ROOT / "bench" / "restores.py"), str(MODEL), "--kv", caches, "--threads", "1", "--windows", "1", "--out", "restores.json"]]
    if step == "restores-real":
        fixed = ["--kv", "near-lossless,balanced,mix2.4", "--rounds", "0,1,4,12", "--threads", "1", "--windows", "1"]
        return [[str(ROOT / "bench" / "restores.py"), *given.models, *fixed, "--out", "restores-real.json"]]
    if step == "commits":
        before, after = REFACTORING
        return [[str(ROOT / "bench" / "commits.py"), str(MODEL), before, after, "HEAD", "--out", "commits.json"]]
    if step == "turns":
        caches = ",".join((*PRESETS, "f16", "q8_0"))
        return [[str(ROOT / "bench" / "turns.py"), str(MODEL), "--kv", caches, "--threads", "2", "--out", "turns.json"]]
    if step == "states":
        return [[str(ROOT / "bench" / "states.py"), str(MODEL), "--kv", "balanced,q8_0,f16", "--out", "states.json"]]
    if step == "speed":
        random_model = [str(ROOT / "bench" / "random_model.py"), "8b-2layers.gguf", "--layers", "2"]
        speed, common = str(ROOT / "bench" / "speed.py"), ["--depths", "0,2048,4096,8192,16384,32768", "--rounds", "5"]
        return [
            *([] if (WORK / "8b-2layers.gguf").exists() else [random_model]),
            [speed, str(MODEL), *common, "--out", "speed-builtin.json"],
            [speed, "8b-2layers.gguf", *common, "--tokens", "8", "--out", "speed-8b-2layers.json"],
        ]
    if step == "exact":
        names = ",".join(("f16", "q8_0", *PRESETS))
        return [evaluate("plain", names, "--ctx", "4096"), evaluate("exact", names, "--ctx", "4096", "--exact")]
    if step == "timings":
        return [[str(ROOT / "bench" / "timings.py"), str(MODEL), *given.models, "--force", "--out", "timings.json"]]
    raise click.UsageError(f"There is no step {step!r}; the steps are {', '.join(STEPS)}.")


STEPS = {
    "calibration": ("calibration",),
    "caches": ("caches",),
    "codecs": ("codecs",),
    "codecs-published": ("codecs-published",),
    "variations": ("variations",),
    "problems": ("problems",),
    "memory": ("memory",),
    "restores": ("restores",),
    "restores-real": ("restores-real",),
    "commits": ("commits",),
    "states": ("states",),
    "turns": ("turns",),
    "exact": ("plain", "exact"),
    "timings": ("timings",),
    "speed": ("speed-builtin", "speed-8b-2layers"),
}
"""The files that a step leaves in bench/results."""

QUIET = ("speed", "states", "timings")  # on a machine that does nothing else
ONLY_ASKED = (*QUIET, "turns", "restores-real", "commits")  # or with LLAMA_CPP_BIN: the folder with a llama-server
NEEDS_TEXTS = ("caches", "codecs", "codecs-published", "variations")


def note_calibration(seconds: dict[str, float]) -> None:
    """Profiles are not committed; what was measured of them is."""
    result = describe_run("calibrate", MODEL, {"bits": list(PROFILES), "seed": 1}, hashed=True, words=command_line())
    result["profiles"] = {}
    for bits in PROFILES:
        made = read_profile(WORK / profile(bits))
        result["profiles"][profile(bits)] = {"body_bits": made.body_bits, "measured": made.measured, "seconds": round(seconds[bits], 1)}
    save_json(WORK / "calibration.json", result)


def without_tokens(result: dict[str, Any]) -> dict[str, Any]:
    """Of the answers to problems everything but their tokens, which would be megabytes."""
    for record in (result.get("problems") or {}).get("records", []):
        for answer in record["answers"].values():
            answer["tokens"] = len(answer["tokens"])
    return result


# ---- running them ----------------------------------------------------------------------------------------


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


def same_code(commit: str) -> bool:
    """Whether what is measured has not changed since the commit."""
    return git("diff", "--quiet", commit, "HEAD", "--", *MEASURED, *NOT_MEASURED).returncode == 0


def prepare_texts(given: Given) -> None:
    if given.novel is None or given.wiki is None:
        raise click.UsageError("--novel FILE (Frankenstein, Project Gutenberg) and --wiki FILE (the raw test split of WikiText-2) are needed.")
    shutil.copyfile(given.novel, WORK / "novel.txt")
    (WORK / "wiki.txt").write_bytes(given.wiki.read_bytes()[:400_000])


def run_step(step: str, given: Given, head: str) -> None:
    done = WORK / f"{step}.done"
    if done.exists():
        commit, spent, made_of = json.loads(done.read_text())
        if same_code(commit) and made_of == commands(step, given):
            print(f"{step}: done, in {spent:.0f} s, at {commit[:7]}", file=sys.stderr)
            return
    begun = WORK / f"{step}.begun"
    if not begun.exists() or not same_code(begun.read_text()):
        for name in STEPS[step]:
            (WORK / f"{name}.json").unlink(missing_ok=True)
    begun.write_text(head)
    start = time.monotonic()
    seconds = {}
    for command in commands(step, given):
        print(f"{step}: python {' '.join(command)}", file=sys.stderr, flush=True)
        begin = time.monotonic()
        if code := subprocess.run([sys.executable, *command], cwd=WORK, check=False).returncode:
            raise click.ClickException(f"{step} ended with status {code}; the same command goes on from here")
        seconds[command[command.index("--bits") + 1] if step == "calibration" else str(len(seconds))] = time.monotonic() - begin
    if step == "calibration":
        note_calibration(seconds)
    spent = time.monotonic() - start
    done.write_text(json.dumps([head, spent, commands(step, given)]))
    begun.unlink()
    print(f"{step}: {spent:.0f} s", file=sys.stderr, flush=True)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--steps", default=",".join(step for step in STEPS if step not in ONLY_ASKED), show_default=True, help="What is measured, in order.")
@click.option("--novel", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Frankenstein as text.")
@click.option("--wiki", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="wiki.test.raw of WikiText-2.")
@click.option("--problems", type=click.IntRange(min=1), default=200, show_default=True, help="Problems that are solved with every cache.")
@click.option("--models", default="", help="Models, comma-separated: further ones of the step timings, the one of the step restores-real.")
def main(steps, novel, wiki, problems, models):
    further = tuple(str(Path(name).resolve()) for name in split_names(models))
    given, names = Given(novel, wiki, problems, further), split_names(steps)
    WORK.mkdir(parents=True, exist_ok=True)
    for step in names:
        if step not in STEPS:
            raise click.UsageError(f"There is no step {step!r}; the steps are {', '.join(STEPS)}.")
    if git("status", "--porcelain").stdout.strip():
        raise click.ClickException("the working tree has changes: a figure names the commit that it was measured at, so commit them first")
    if set(names) & set(NEEDS_TEXTS):
        prepare_texts(given)
    head = git("rev-parse", "HEAD").stdout.strip()
    for step in names:
        run_step(step, given, head)
    for name in [name for step in names for name in STEPS[step]]:
        save_json(RESULTS / f"{name}.json", without_tokens(json.loads((WORK / f"{name}.json").read_text(encoding="utf-8"))))
    tables.write_pictures()
    tables.main([], standalone_mode=False)


if __name__ == "__main__":
    main()
