"""Resident memory of a process whose context fills up, per cache.

Each cache gets its own process, which reports what the operating system says before the context exists, after it was made, and
after it was filled with tokens.  The model's weights are mapped from its file, so the context is what grows: the cache, and the
buffers for logits and intermediate results, which are the same for every cache.

    python bench/memory.py models/cot-tiny-34m-q8_0.gguf --kv f16,q8_0,balanced --ctx 32768
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import click
from _common import (
    CACHE_HELP,
    COUNT,
    SEED,
    THREADS,
    Model,
    available_cores,
    cache_statistics,
    check_result,
    describe,
    force_option,
    open_model,
    run,
    save_json,
    split_names,
    tool,
    wide_console,
)
from rich.console import Console
from rich.table import Table

BATCH = 512
MIB = 1 << 20
STAGES = ("before", "created", "filled")


def resident_memory() -> dict[str, int]:
    """Bytes of this process in memory: all of them, and those that no file backs (the heap, so the cache)."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return {name: int(lines[key].split()[0]) * 1024 for name, key in (("total", "VmRSS"), ("anonymous", "RssAnon"))}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"total": peak * (1 if sys.platform == "darwin" else 1024)}


def measure_here(model: Path, cache: str, ctx: int, n_tokens: int, seed: int, threads: int) -> dict[str, Any]:
    """What one process sees.  The tokens are random: which ones they are does not change the size of a cache."""
    # Load and touch the weights first, so that they count in every stage.
    warm = open_model(model, "f16", n_ctx=256, n_batch=BATCH, n_threads=threads)
    rng = Random(seed)
    tokens = [rng.randrange(warm.n_vocab()) for _ in range(n_tokens)]
    warm.eval(tokens[:64])
    memory = {"before": resident_memory()}
    llm = open_model(model, cache, n_ctx=ctx, n_batch=BATCH, n_threads=threads)
    memory["created"] = resident_memory()
    for start in range(0, n_tokens, BATCH):
        llm.eval(tokens[start : start + BATCH])
        if sys.stderr.isatty():
            print(f"{cache}: {min(start + BATCH, n_tokens)} of {n_tokens} tokens", end=" \r", file=sys.stderr, flush=True)
    memory["filled"] = resident_memory()
    return {"cache": cache, "resident": memory, "statistics": cache_statistics(llm)}


def measure_in_new_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, os.path.abspath(__file__), *arguments, "--child"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(f"the process of {arguments[-1]} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@tool(help=__doc__.split("\n\n")[0])
@click.argument("model", type=Model(), callback=lambda _context, _parameter, path: Path(path))
@click.option("--kv", default="f16,q8_0,q4_0,balanced", show_default=True, help=CACHE_HELP)
@click.option("--ctx", type=COUNT, default=32768, show_default=True)
@click.option("--tokens", type=COUNT, help="Fill the context with that many tokens.  [default: all of it]")
@click.option("--seed", type=SEED, default=1, show_default=True)
@click.option("--threads", type=THREADS, default=available_cores, show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@force_option("the file of --out")
@click.option("--child", is_flag=True, hidden=True)
def main(model, kv, ctx, tokens, seed, threads, out, force, child):
    n_tokens = ctx if tokens is None else min(tokens, ctx)
    if child:
        print(json.dumps(measure_here(model, kv, ctx, n_tokens, seed, threads)))
        return
    if out is not None:
        check_result(out, "memory", force=force, inputs=[model])
    caches = split_names(kv)
    settings = {"ctx": ctx, "tokens": n_tokens, "seed": seed, "threads": threads, "baseline": caches[0], "text": "random tokens"}
    result = describe("memory", model, settings, out) | {"caches": []}
    for cache in caches:
        options = {"ctx": ctx, "tokens": n_tokens, "seed": seed, "threads": threads, "kv": cache}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        result["caches"].append(measure_in_new_process(str(model), *arguments))
        save_json(out, result)
    print_table(wide_console(), result)


def print_table(console: Console, result: dict[str, Any]) -> None:
    settings = result["settings"]
    title = f"{result['model']['name']}, context {settings['ctx']}, {settings['tokens']} tokens in it; MiB resident"
    table = Table("cache", *STAGES, "context", "of the first", "own count", title=title)
    contexts = [entry["resident"]["filled"]["total"] - entry["resident"]["before"]["total"] for entry in result["caches"]]
    for entry, context in zip(result["caches"], contexts, strict=True):
        own_count = entry["statistics"].get("bytes")
        table.add_row(
            entry["cache"],
            *(f"{entry['resident'][stage]['total'] / MIB:.1f}" for stage in STAGES),
            f"{context / MIB:.1f}",
            f"{context / max(1, contexts[0]):.2f}",
            "-" if own_count is None else f"{own_count / MIB:.1f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(run(main, "bench/memory.py"))
