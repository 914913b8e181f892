"""How long the tools take: seconds of `evaluate` on a text with four caches and of `calibrate` at its default, for any models.

With --problems-file also of 144 of its problems, with eight examples before each, answered with five caches.

    .venv/bin/python bench/timings.py models/cot-tiny-34m-q8_0.gguf other.gguf --out build/bench/timings.json

Each is a process of its own, on a machine that does nothing else. Outside llama.cpp is the share of the tool's time in which llama.cpp neither
loaded a model nor computed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from _common import THREADS, Model, check_result, copy_bandwidth, describe, force_option, gpu_number, run, save_json, tool, wide_console
from rich.table import Table

from bridge.backend import stock_gpus
from mixkvq.core.profile import read_profile
from mixkvq.study.record import describe_file

CACHES = "q8_0,q4_0,balanced,mix2.5"  # beside f16
PROBLEMS, SHOTS, LONGEST, AT_ONCE = 144, 8, 256, 32


def timed(*command: str) -> float:
    """Seconds of one of the tools. What it says is shown."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], check=True)
    return time.perf_counter() - begin


def evaluation(model: str, text: list[str], ctx: int, options: list[str], folder: Path) -> dict[str, Any]:
    out = folder / "evaluate.json"
    seconds = timed("mixkvq.evaluate", model, "--kv", CACHES, "--ctx", str(ctx), *text, *options, "--quiet", "--out", str(out))
    found = json.loads(out.read_text())
    return {"seconds": round(seconds, 2), "outside_llama": found["run"]["outside_llama"], "threads": found["run"]["threads"]}


def calibration(model: str, options: list[str], folder: Path) -> dict[str, Any]:
    """said: the seconds that it announces beforehand."""
    out = folder / "profile.gguf"
    seconds = timed("mixkvq.calibrate", model, *options, "-o", str(out))
    measured = read_profile(out).measured
    if not measured:
        raise click.ClickException(f"{Path(model).name}: calibrate had no time to measure anything; give it more --minutes.")
    return {"seconds": round(seconds, 2), **{key: measured[0][key] for key in ("seconds_said", "outside_llama")}, "measured": measured}


def answers(model: str, path: str, options: list[str], folder: Path) -> dict[str, Any]:
    """tokens_per_second: of all answers that are written at once, by cache."""
    out = folder / "answers.json"
    asked = ["--problems", str(PROBLEMS), "--shots", str(SHOTS), "--max-tokens", str(LONGEST), "--workers", str(AT_ONCE)]
    seconds = timed("mixkvq.evaluate", model, "--kv", CACHES, "--problems-file", path, *asked, *options, "--quiet", "--out", str(out))
    found = json.loads(out.read_text())["problems"]
    speeds = {name: round(figures["tokens_per_second"], 1) for name, figures in found["summary"].items()}
    tokens = sum(figures["tokens"] for figures in found["summary"].values())
    return {"seconds": round(seconds, 2), "problems": PROBLEMS, "shots": SHOTS, "at_once": AT_ONCE, "tokens": tokens, "tokens_per_second": speeds}


@tool()
@click.argument("models", type=Model(), nargs=-1, required=True)
@click.option("--ctx", default=2048, show_default=True, type=click.IntRange(min=256), help="Tokens that evaluate reads with each cache.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="What evaluate reads.  [default: the text that comes with MixKVQ]")
@click.option("--problems-file", type=click.Path(exists=True, dir_okay=False), help="Problems that are answered, in the format of GSM8K.")
@click.option("--minutes", type=click.FloatRange(min=0.1), help="Of calibrate.  [default: its own]")
@click.option("--device", default="auto", show_default=True)
@click.option("--threads", type=THREADS, help="[default: physical cores]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@force_option()
def main(models, ctx, text, problems_file, minutes, device, threads, out, force):
    if out is not None:
        check_result(out, "timings", force=force, inputs=models)
    result = describe("timings", Path(models[0]), {"ctx": ctx, "caches": CACHES, "minutes": minutes, "device": device}, out) | {"models": []}
    if device != "cpu" and (gpus := stock_gpus()):
        result["machine"]["gpu"] = copy_bandwidth(gpu_number(gpus[0].name if device in ("auto", "gpu") else device.split(",")[0]) or 0, 1)["gpu"]
    options = ["--device", device, *(["--threads", str(threads)] if threads else [])]
    columns = ("model", "evaluate, s", "outside llama.cpp", "calibrate, s", "said, s", "outside llama.cpp", "problems, s")
    table = Table(*columns, title="Timings")
    for model in models:
        with tempfile.TemporaryDirectory(prefix="mixkvq-") as folder:
            evaluated = evaluation(model, ["--text", text] if text else [], ctx, options, Path(folder))
            calibrated = calibration(model, [*options, *(["--minutes", str(minutes)] if minutes else [])], Path(folder))
            answered = {"answers": answers(model, problems_file, options, Path(folder))} if problems_file else {}
        result["models"].append({**describe_file(Path(model)), "evaluate": evaluated, "calibrate": calibrated, **answered})
        save_json(out, result)
        solved = f"{answered['answers']['seconds']:.0f}" if answered else ""
        each = (f"{evaluated['seconds']:.1f}", f"{evaluated['outside_llama']:.1%}", f"{calibrated['seconds']:.1f}")
        table.add_row(Path(model).name, *each, f"{calibrated['seconds_said']:.0f}", f"{calibrated['outside_llama']:.1%}", solved)
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(run(main, "bench/timings.py"))
