"""Speed of decoding and of reading a prompt at several depths of context, caches taking turns.

All contexts live in one process.  In every round each cache decodes the same few tokens at the same depth and forgets them again; taking
turns spreads the noise of a shared machine over all of them, and the median of the rounds is reported.  Depth 0 is measured twice, first and last.

The contexts are filled in chunks that attend only to themselves, which takes time by depth instead of by its square: llama.cpp skips what is
masked.  What is measured afterwards attends to all of them.

    python bench/random_model.py random.gguf --layers 2
    python bench/speed.py random.gguf --kv f16,q8_0,q4_0,balanced --out speed.json --plot speed.svg
    python bench/speed.py random.gguf --device CUDA0 --depths 0,8192,32768,131072 --batch 2048 --prefill 2048 --prefill-depth 32768
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from _common import (
    CACHE_HELP,
    COUNT,
    COUNT_OR_ZERO,
    SEED,
    THREADS,
    Model,
    available_cores,
    cache_statistics,
    check_result,
    copy_bandwidth,
    describe,
    force_option,
    gpu_number,
    open_model,
    parse_depths,
    read_bandwidth,
    round_up,
    run,
    save_json,
    split_names,
    tool,
    wide_console,
)
from plot import draw, heading
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bridge import Llama
from bridge._compat import C
from mixkvq.core.model_file import ModelFile
from mixkvq.core.model_file import open_model as read_geometry
from mixkvq.core.outputs import check_different
from mixkvq.study.plots import check_path

BATCH = 512  # tokens
PREFILL_DEPTH = 8192
MEASURED, FILLING = 0, 1  # sequences


class TwoSequences(Llama):
    """A cache that two sequences share: llama_cpp.Llama has no argument for it."""

    def _adjust_context_params(self, params: Any) -> None:
        params.n_seq_max, params.kv_unified = 2, True


# ---- filling and measuring -------------------------------------------------------------------------------


def append_chunk(llm: Llama, tokens: list[int]) -> None:
    """Append tokens that see only each other: they are read as a sequence of their own, then handed over to the measured one."""
    begin, end = llm.n_tokens, llm.n_tokens + len(tokens)
    llm._decode_cells([(FILLING, begin + i, token) for i, token in enumerate(tokens)], [len(tokens) - 1])
    llm._copy_cells(FILLING, MEASURED, begin, end)
    llm._remove_cells(FILLING, -1, -1)
    llm.n_tokens = end


def seconds_to_read(llm: Llama, batches: list[list[int]]) -> float:
    """Evaluate the batches one after the other, then go back to where the context was."""
    depth = llm.n_tokens
    begin = time.perf_counter()
    for batch in batches:
        llm.eval(batch)
        C.llama_synchronize(llm._context)  # a GPU is still at work; who samples a token waits for it
    seconds = time.perf_counter() - begin
    llm._remove_cells(MEASURED, depth, -1)
    llm.n_tokens = depth
    return seconds


def measure_in_turns(contexts: dict[str, Llama], batches: list[list[int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round and cache.  There is one round more, to warm up."""
    seconds: dict[str, list[float]] = {cache: [] for cache in contexts}
    for turn in range(rounds + 1):
        for cache, llm in contexts.items():
            taken = seconds_to_read(llm, batches)
            if turn:
                seconds[cache].append(taken)
    return seconds


def bytes_in_use(statistics: dict[str, Any], geometry: ModelFile, depth: int) -> int:
    """Bytes of keys and values that attention reads for a token: MixKVQ counts its pages, packed and F16; llama.cpp's types are exact."""
    if statistics["cache"] == "mixkvq":
        return statistics["bytes_used"] if depth else 0
    return round(geometry.cache_elements(depth, BATCH) * statistics["body_bits"] / 8)


# ---- figures ---------------------------------------------------------------------------------------------


def spread(seconds: list[float]) -> dict[str, Any]:
    low, median, high = np.percentile(seconds, (25, 50, 75)).tolist()
    return {"median": median, "quartiles": [low, high], "rounds": [round(s, 7) for s in seconds]}


def add_derived_figures(result: dict[str, Any]) -> None:
    """What follows from the medians: speeds, ratios, the share of attention, and how straight the line over depth is."""
    caches, bandwidth = result["settings"]["caches"], result["read_bandwidth"]["bytes_per_second"]
    nothing = result["depths"][0]["caches"]  # depth 0: everything but attention
    for row in result["depths"]:
        for cache, figures in row["caches"].items():
            median = figures["seconds_per_token"]["median"]
            figures["tokens_per_second"] = 1 / median
            figures["ratio"] = row["caches"][caches[0]]["seconds_per_token"]["median"] / median
            if row["depth"] == 0:
                continue
            attention = median - nothing[cache]["seconds_per_token"]["median"]
            figures["attention_seconds_per_token"] = attention
            # Noise can hide the attention of a short context.
            figures["gb_per_second"] = figures["bytes_read_per_token"] / attention / 1e9 if attention > 0 else None
            figures["of_read_bandwidth"] = figures["bytes_read_per_token"] / attention / bandwidth if attention > 0 else None
    for row in result["prefill"]:
        for figures in row["caches"].values():
            figures["tokens_per_second"] = row["tokens"] / figures["seconds"]["median"]
            figures["ratio"] = row["caches"][caches[0]]["seconds"]["median"] / figures["seconds"]["median"]
    result["fit"] = {cache: fit_line(result["depths"], cache, result["settings"]["fit_from"]) for cache in caches}


def fit_line(rows: list[dict[str, Any]], cache: str, start: int) -> dict[str, Any] | None:
    """Least squares of the time per token over the depths from `start`, and the slope of every step between depths over the fitted one."""
    points = [(row["depth"], row["caches"][cache]["seconds_per_token"]["median"]) for row in rows]
    fitted = [point for point in points if point[0] >= start]
    if len(fitted) < 2:
        return None
    slope, intercept = np.polyfit(*np.transpose(fitted), 1).tolist()
    steps = [
        {"from": a, "to": b, "of_fitted_slope": (seconds_b - seconds_a) / (b - a) / slope}
        for (a, seconds_a), (b, seconds_b) in zip(points, points[1:])
    ]
    return {"from": start, "seconds_per_token_and_cell": slope, "seconds_at_0": intercept, "steps": steps}


# ---- command ---------------------------------------------------------------------------------------------


@tool(help=__doc__.split("\n\n")[0])
@click.argument("model", type=Model(), callback=lambda _context, _parameter, path: Path(path))
@click.option("--kv", default="f16,q8_0,q4_0,balanced", show_default=True, help=CACHE_HELP + "; the first is what ratios refer to")
@click.option("--depths", default="0,2048,4096,8192,16384,32768", show_default=True, callback=parse_depths, help="Tokens already in the context.")
@click.option("--tokens", type=COUNT, default=16, show_default=True, help="Tokens decoded per round.")
@click.option("--rounds", type=COUNT, default=7, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="Where every cache runs: cpu, or a GPU by llama.cpp's name for it, CUDA0.")
@click.option("--batch", type=COUNT, default=BATCH, show_default=True, help="Most tokens in a batch.")
@click.option("--ubatch", type=COUNT, default=BATCH, show_default=True, help="Most tokens that are computed at once.")
@click.option("--prefill", type=COUNT_OR_ZERO, default=BATCH, show_default=True, help="Tokens of a prompt's batch; 0: do not measure it.")
@click.option(
    "--prefill-depth",
    type=COUNT_OR_ZERO,
    help=f"Where the batch is read, besides depth 0.  [default: {PREFILL_DEPTH}, or the greatest depth if that is less]",
)
@click.option("--prefill-rounds", type=COUNT, default=3, show_default=True)
@click.option("--fit-from", type=COUNT_OR_ZERO, default=4096, show_default=True, help="Least depth of the straight line that is fitted.")
@click.option("--seed", type=SEED, default=1, show_default=True)
@click.option("--threads", type=THREADS, default=available_cores, show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw tokens/s over depth, as bench/plot.py does.")
@force_option("the file of --out, and that of --plot,")
def main(model, kv, depths, tokens, rounds, device, batch, ubatch, prefill, prefill_depth, prefill_rounds, fit_from, seed, threads, out, plot, force):
    caches = split_names(kv)
    check_different(out, plot)
    if out is not None:
        check_result(out, "speed", force=force, inputs=[model])
    if plot is not None:
        check_path(plot, force=force, inputs=[model])
    gpu = gpu_number(device)
    if gpu is None and device != "cpu":
        raise click.UsageError(f"--device is {device}; it must be cpu or the name of a GPU, CUDA0.")
    if prefill > batch:
        raise click.UsageError(f"A batch of {prefill} tokens is to be measured, and --batch is {batch}.")
    prefill_depth = min(PREFILL_DEPTH, depths[-1]) if prefill_depth is None else prefill_depth
    prefill_depths = sorted({0, prefill_depth}) if prefill else []
    n_ctx = round_up(max([depths[-1] + tokens, *(depth + prefill for depth in prefill_depths)]), 256)
    options = {"n_ctx": n_ctx, "n_batch": batch, "n_ubatch": min(batch, ubatch), "n_threads": threads, "n_threads_batch": threads, "device": device}
    if gpu is not None:
        options["n_gpu_layers"] = -1
    contexts = {cache: open_model(model, cache, TwoSequences, **options) for cache in caches}
    geometry = read_geometry(model)
    rng = Random(seed)
    n_vocab = next(iter(contexts.values())).n_vocab()
    text = [rng.randrange(n_vocab) for _ in range(n_ctx)]

    settings = {
        "caches": caches,
        "baseline": caches[0],
        "text": "random tokens",
        "depths": depths,
        "tokens": tokens,
        "rounds": rounds,
        "device": device,
        "batch": batch,
        "ubatch": ubatch,
        "prefill": prefill,
        "prefill_depths": prefill_depths,
        "prefill_rounds": prefill_rounds,
        "fit_from": fit_from,
        "seed": seed,
        "threads": threads,
        "n_ctx": n_ctx,
    }
    result = describe("speed", model, settings, out)
    result["read_bandwidth"] = read_bandwidth(threads) if gpu is None else copy_bandwidth(gpu)
    if gpu is not None:
        result["machine"]["gpu"] = result["read_bandwidth"]["gpu"]
    result |= {"caches": {}, "depths": [], "prefill": [], "fit": {}}
    stops = sorted({*depths, *prefill_depths})
    taken: dict[int, dict[str, list[float]]] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        fill = bar.add_task("filling", total=stops[-1] * len(caches))
        step = bar.add_task("measuring", total=len(depths) + len(prefill_depths) + 1)
        for llm in contexts.values():
            llm.clear()
        for depth in stops:
            for llm in contexts.values():
                for start in range(llm.n_tokens, depth, batch):
                    part = text[start : min(start + batch, depth)]
                    append_chunk(llm, part)
                    bar.advance(fill, len(part))
            statistics = {cache: cache_statistics(llm) for cache, llm in contexts.items()}
            if depth in depths:
                batches = [[token] for token in text[depth : depth + tokens]]
                measured = {}
                taken[depth] = measure_in_turns(contexts, batches, rounds)
                for cache, seconds in taken[depth].items():
                    measured[cache] = {
                        "seconds_per_token": spread([s / tokens for s in seconds]),
                        "bytes_read_per_token": bytes_in_use(statistics[cache], geometry, depth),
                    }
                result["depths"].append({"depth": depth, "caches": measured})
                bar.advance(step)
            if depth in prefill_depths:
                read = measure_in_turns(contexts, [text[depth : depth + prefill]], prefill_rounds)
                measured = {cache: {"seconds": spread(seconds)} for cache, seconds in read.items()}
                result["prefill"].append({"depth": depth, "tokens": prefill, "caches": measured})
                bar.advance(step)
            result["caches"] = {cache: cache_statistics(llm) for cache, llm in contexts.items()}
            add_derived_figures(result)
            save_json(out, result)
        # Attention is what a depth takes beyond depth 0, so a machine that has changed its pace meanwhile must not pass for attention.
        for llm in contexts.values():
            llm.clear()
        for cache, seconds in measure_in_turns(contexts, [[token] for token in text[:tokens]], rounds).items():
            result["depths"][0]["caches"][cache]["seconds_per_token"] = spread([s / tokens for s in taken[0][cache] + seconds])
        bar.advance(step)
        add_derived_figures(result)
    print_tables(wide_console(), result)  # they are there where a file cannot be written
    save_json(out, result)
    if plot:
        draw([result], plot, overwrite=force)


# ---- tables ----------------------------------------------------------------------------------------------


def print_tables(console: Console, result: dict[str, Any]) -> None:
    settings = result["settings"]
    first = settings["caches"][0]
    isa = ", ".join(sorted({c["isa"] for c in result["caches"].values() if "isa" in c}) if settings["device"] == "cpu" else [])
    title = heading(result) + (f", {isa} kernels" if isa else "")
    table = Table(
        "depth", "cache", "tokens/s", "quartiles", f"of {first}", "attention ms", "GB/s", "of bandwidth", title=f"{title}: decoding, per token"
    )
    for row in result["depths"]:
        for cache, figures in row["caches"].items():
            low, high = figures["seconds_per_token"]["quartiles"]
            attention = figures.get("attention_seconds_per_token")
            rate, share = figures.get("gb_per_second"), figures.get("of_read_bandwidth")
            table.add_row(
                str(row["depth"]),
                cache,
                f"{figures['tokens_per_second']:.2f}",
                f"{1 / high:.2f} to {1 / low:.2f}",
                f"{figures['ratio']:.2f}x",
                "-" if attention is None else f"{1e3 * attention:.3f}",
                "-" if rate is None else f"{rate:.2f}",
                "-" if share is None else f"{share:.0%}",
            )
        table.add_section()
    console.print(table)
    memory = result["read_bandwidth"]
    rate = memory["bytes_per_second"] / 1e9
    how = "numpy reading {} MiB with as many threads" if "threads" in memory else "the GPU copying {} MiB, read and written"
    console.print(f"Bandwidth: {rate:.1f} GB/s, {how.format(memory['bytes'] >> 20)}.")

    if result["prefill"]:
        table = Table("depth", "cache", "seconds", "tokens/s", f"of {first}", title=f"A batch of {settings['prefill']} tokens")
        for row in result["prefill"]:
            for cache, figures in row["caches"].items():
                seconds = f"{figures['seconds']['median']:.3f}"
                table.add_row(str(row["depth"]), cache, seconds, f"{figures['tokens_per_second']:.1f}", f"{figures['ratio']:.2f}x")
            table.add_section()
        console.print(table)

    fits = {cache: fit for cache, fit in result["fit"].items() if fit}
    if fits:
        steps = next(iter(fits.values()))["steps"]
        columns = [f"{step['from']} to {step['to']}" for step in steps]
        table = Table("cache", "ns per cell", *columns, title=f"Straight line from depth {settings['fit_from']}; slope of each step over its own")
        for cache, fit in fits.items():
            shares = (f"{step['of_fitted_slope']:.2f}" for step in fit["steps"])
            table.add_row(cache, f"{1e9 * fit['seconds_per_token_and_cell']:.1f}", *shares)
        console.print(table)


if __name__ == "__main__":
    sys.exit(run(main, "bench/speed.py"))
