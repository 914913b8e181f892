"""Tokens per second of decoding at several depths of context, caches taking turns.

All contexts live in one process and are filled once.  In every round each cache decodes the same few tokens at the same depth and
forgets them again; taking turns spreads the noise of a shared machine over all of them, and the median of the rounds is reported.

    python bench/random_model.py random.gguf --layers 2
    python bench/decode.py random.gguf --kv f16,q8_0,q4_0,balanced --depths 0,2048,8192
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from random import Random
from typing import Any

import click
from _common import (
    CACHE_HELP,
    available_cores,
    cache_statistics,
    clear,
    describe_run,
    open_model,
    round_up,
    save_json,
    split_names,
    wide_console,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bridge import Llama

BATCH = 512


def seconds_per_token(llm: Llama, depth: int, tokens: list[int]) -> float:
    """Decode `tokens` one at a time after the first `depth`, then go back to `depth`."""
    begin = time.perf_counter()
    for token in tokens:
        llm.eval([token])
    seconds = time.perf_counter() - begin
    llm.n_tokens = depth  # the next evaluation removes what lies behind
    return seconds / len(tokens)


def figures_of(rounds: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": 1 / statistics.median(rounds),
        "tokens_per_second_best": 1 / min(rounds),
        "milliseconds_per_token": [round(1e3 * seconds, 4) for seconds in rounds],
    }


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kv", default="f16,q8_0,q4_0,balanced", show_default=True, help=CACHE_HELP + "; the first is what ratios refer to")
@click.option("--depths", default="0,2048,8192", show_default=True, help="Tokens already in the context.")
@click.option("--tokens", default=16, show_default=True, help="Tokens decoded per round.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--threads", type=int, default=available_cores, show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
def main(model, kv, depths, tokens, rounds, seed, threads, out):
    caches = split_names(kv)
    depth_list = sorted({int(depth) for depth in split_names(depths)})
    n_ctx = round_up(depth_list[-1] + tokens, 256)
    options = {"n_ctx": n_ctx, "n_batch": BATCH, "n_threads": threads, "n_threads_batch": threads}
    contexts = {cache: open_model(model, cache, **options) for cache in caches}
    rng = Random(seed)
    n_vocab = next(iter(contexts.values())).n_vocab()
    text = [rng.randrange(n_vocab) for _ in range(n_ctx)]

    settings = {"caches": caches, "depths": depth_list, "tokens": tokens, "rounds": rounds, "seed": seed, "threads": threads}
    result = describe_run("decode", model, settings) | {"depths": []}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        fill = bar.add_task("filling", total=depth_list[-1] * len(caches))
        step = bar.add_task("decoding", total=len(depth_list) * (rounds + 1) * len(caches))
        for llm in contexts.values():
            clear(llm)
        for depth in depth_list:
            for llm in contexts.values():
                for start in range(llm.n_tokens, depth, BATCH):
                    part = text[start : min(start + BATCH, depth)]
                    llm.eval(part)
                    bar.advance(fill, len(part))
            seconds: dict[str, list[float]] = {cache: [] for cache in caches}
            for turn in range(rounds + 1):
                for cache, llm in contexts.items():
                    taken = seconds_per_token(llm, depth, text[depth : depth + tokens])
                    if turn:  # the first is a warm-up
                        seconds[cache].append(taken)
                    bar.advance(step)
            measured = {cache: figures_of(seconds[cache]) | {"cache": cache_statistics(contexts[cache])} for cache in caches}
            result["depths"].append({"depth": depth, "caches": measured})
            save_json(out, result)
    print_table(wide_console(), result)


def print_table(console: Console, result: dict[str, Any]) -> None:
    settings = result["settings"]
    first = settings["caches"][0]
    title = f"{result['model']['name']}, {settings['threads']} threads on {result['machine']['cpu']}: decoded tokens/s (of {first}'s)"
    table = Table("depth", *settings["caches"], title=title)
    for row in result["depths"]:
        base = row["caches"][first]["tokens_per_second"]
        speeds = (row["caches"][cache]["tokens_per_second"] for cache in settings["caches"])
        table.add_row(str(row["depth"]), *(f"{speed:.2f} ({speed / base:.2f}x)" for speed in speeds))
    console.print(table)


if __name__ == "__main__":
    main()
