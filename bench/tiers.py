"""How the bits of the keys should be split: hard problems teacher-forced through caches that differ in their tiers only.

Each split becomes a profile.  What is counted are the tokens whose first choice is not the reference's, and -log p of the reference, which
moves before a token is lost.

    python bench/tiers.py models/cot-tiny-34m-q8_0.gguf --split 0,4,40,0,84 --split 0,0,32,64,32 --tasks chain --problems 11
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from _common import available_cores, clear, describe_run, last_logits, log_softmax, open_model, save_json, split_names, wide_console
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mixkvq import profile, tasks
from mixkvq.reference import KeyFormat, ValueFormat, body_bits

COLUMNS = "channels at 16, 8, 4, 3 and 2 bits"


def parse_split(text: str) -> tuple[int, ...]:
    counts = tuple(int(n) for n in text.split(",") if n.strip().isdigit())
    if len(counts) != 5:
        raise click.BadParameter(f"{text!r} is not five counts ({COLUMNS})")
    return counts


def write_split(model: Path, counts: tuple[int, ...], value_bits: int, path: Path) -> float:
    """Write a profile with the same split in every head; returns its body bits."""
    layers: list[profile.LayerProfile | None] = []
    bits = 0.0
    for layer in profile.uniform_profile(model).layers:
        if layer is None:
            layers.append(None)
            continue
        n_heads = len(layer.tiers)
        layers.append(
            profile.LayerProfile(
                tiers=np.array([(*counts, 128)] * n_heads, dtype=np.int32), values=np.array([(value_bits, 0)] * n_heads, dtype=np.int32)
            )
        )
        bits = body_bits(KeyFormat(sum(counts), counts), ValueFormat(sum(counts), value_bits))
    profile.write_profile(path, layers, profile.fingerprint(model))
    return bits


def run_problem(llm: Any, problem: tasks.Problem) -> tuple[int, int, float]:
    """Tokens of the reference, how many of them are not the first choice, and their -log p in nats."""
    prompt = llm.tokenize(tasks.chat(problem.prompt).encode(), add_bos=False, special=True)
    reference = llm.tokenize(tasks.completion(problem.reasoning, problem.answer).encode(), add_bos=False, special=True)
    clear(llm)
    llm.eval(prompt)
    wrong, nll = 0, 0.0
    for token in reference:
        log_p = log_softmax(last_logits(llm))
        wrong += int(np.argmax(log_p) != token)
        nll -= float(log_p[token])
        llm.eval([token])
    return len(reference), wrong, nll


@click.command(help=__doc__.split("\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--split", "splits", multiple=True, required=True, help=f"{COLUMNS}, comma-separated; may be repeated.")
@click.option("--value-bits", type=click.Choice(["2", "3", "4", "8"]), default="3", show_default=True)
@click.option("--tasks", "names", default="chain", show_default=True)
@click.option("--level", type=click.Choice(tasks.LEVELS), default="hard", show_default=True)
@click.option("--problems", type=click.IntRange(min=1), default=11, show_default=True)
@click.option("--ctx", type=click.IntRange(min=256), default=8192, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=available_cores, show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
def main(
    model: Path, splits: tuple[str, ...], value_bits: str, names: str, level: str, problems: int, ctx: int, seed: int, threads: int, out: Path | None
) -> None:
    chosen = split_names(names)
    rng = Random(seed)
    drawn = [tasks.make(chosen[i % len(chosen)], rng, tasks.LEVELS.index(level)) for i in range(problems)]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("problems", total=len(splits) * problems)
        for text in splits:
            path = Path(folder) / "split.gguf"
            bits = write_split(model, parse_split(text), int(value_bits), path)
            llm = open_model(model, str(path), n_ctx=ctx, n_threads=threads)
            rows = []
            for problem in drawn:
                rows.append(run_problem(llm, problem))
                progress.advance(bar)
            llm.close()
            tokens, wrong, nll = (sum(column) for column in zip(*rows, strict=True))
            results[text] = {"body_bits": bits, "tokens": tokens, "wrong": wrong, "nll": nll}

    table = Table(title=f"{model.name}: {problems} {level} problems of {names}, {value_bits}-bit values, seed {seed}")
    for column in (COLUMNS, "body bits", "tokens", "wrong", "-log p"):
        table.add_column(column)
    for text, r in results.items():
        table.add_row(text, f"{r['body_bits']:.2f}", str(r["tokens"]), str(r["wrong"]), f"{r['nll']:.1f}")
    wide_console().print(table)
    settings = {"tasks": chosen, "level": level, "problems": problems, "ctx": ctx, "seed": seed, "threads": threads, "value_bits": int(value_bits)}
    save_json(out, {**describe_run("tiers", model, settings), "splits": results})


if __name__ == "__main__":
    main()
