"""llama.cpp's own llama-bench on its own caches and on ours, and what follows: the time of attention, and how many times as fast ours is.

Every round runs each cache in a process of its own, one after the other, so that the noise of a shared machine is spread over all of them;
medians over all repetitions are reported. The program must be of the supported version; ours reaches it through GGML_BACKEND_PATH alone.

    python bench/random_model.py random.gguf --layers 8 --type f16
    python bench/llama_bench.py path/to/llama-bench random.gguf --device CUDA0 --depths 0,8192,32768,131072 --out bench.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click
from _common import (
    COUNT,
    COUNT_OR_ZERO,
    THREADS,
    Model,
    available_cores,
    check_result,
    copy_bandwidth,
    describe,
    force_option,
    gpu_number,
    parse_depths,
    save_json,
    split_names,
    tool,
    wide_console,
)
from _common import run as run_command
from rich.console import Console
from rich.table import Table

from bridge.library import library_path
from mixkvq.core.settings import resolve_kv
from mixkvq.study.caches import CACHE_HELP, NO_ROTATION, ROTATION_SWITCH, is_stock

OURS = "MIXKVQ-"  # and ggml's name for the device


# ---- running it ------------------------------------------------------------------------------------------


def device_of(cache: str, device: str) -> str:
    """As llama-bench calls it."""
    return OURS + device if not is_stock(cache) else "none" if device == "CPU" else device


def options_of(cache: str, device: str) -> list[str]:
    """Where the model goes, and the type of llama.cpp's own caches."""
    kind = cache.removesuffix(NO_ROTATION)
    return ["-dev", device_of(cache, device), "-ngl", "99"] + (["-ctk", kind, "-ctv", kind] if is_stock(cache) else [])


def environment_of(cache: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MIXKVQ_", "GGML_BACKEND_PATH", ROTATION_SWITCH))}
    if is_stock(cache):
        return clean | ({ROTATION_SWITCH: "1"} if cache.endswith(NO_ROTATION) else {})
    kv = resolve_kv(cache)
    ours = {"MIXKVQ_PROFILE": os.path.abspath(kv.profile)} if kv.profile else {"MIXKVQ_PRESET": kv.preset}
    return clean | ours | {"GGML_BACKEND_PATH": str(library_path())}


def run(program: str, model: Path, cache: str, device: str, options: list[str]) -> list[dict[str, Any]]:
    """The tests that llama-bench reports."""
    command = [program, "-m", str(model), "-fa", "1", *options_of(cache, device), *options, "-o", "json"]
    done = subprocess.run(command, env=environment_of(cache), capture_output=True, text=True, check=False)
    try:
        if done.returncode != 0:
            raise ValueError
        tests = json.loads(done.stdout[done.stdout.index("[") : done.stdout.rindex("]") + 1])
    except ValueError:
        last = done.stderr.strip().splitlines()[-3:] or ["nothing was said"]
        raise click.ClickException(f"llama-bench with {cache} ended with status {done.returncode}: " + " / ".join(last)) from None
    said = [line for line in done.stderr.splitlines() if line.startswith("mixkvq: ")]
    if said:  # a cache that is not what it is called is not measured
        raise click.ClickException(f"llama-bench with {cache}: " + " / ".join(said))
    for test in tests:
        if test["devices"] != device_of(cache, device):
            raise click.ClickException(f"llama-bench with {cache} ran on {test['devices']}, not on {device_of(cache, device)}")
    return tests


# ---- figures ---------------------------------------------------------------------------------------------


def add_derived_figures(result: dict[str, Any]) -> None:
    """Medians, speeds, attention beyond depth 0, and ratios against every one of llama.cpp's caches."""
    stock = [cache for cache in result["settings"]["caches"] if is_stock(cache)]
    for row in result["depths"]:
        for figures in row["caches"].values():
            figures["seconds_per_token"] = median(figures["rounds"])
            figures["tokens_per_second"] = 1 / figures["seconds_per_token"]
    nothing = result["depths"][0]["caches"]
    for row in result["depths"]:
        for cache, figures in row["caches"].items():
            attention = figures["seconds_per_token"] - nothing[cache]["seconds_per_token"]
            figures["attention_seconds_per_token"] = attention if row["depth"] else None
        for figures in row["caches"].values():
            attention = figures["attention_seconds_per_token"]
            figures["over"], figures["attention_over"] = {}, {}
            for other in stock:
                figures["over"][other] = figures["tokens_per_second"] / row["caches"][other]["tokens_per_second"]
                others = row["caches"][other]["attention_seconds_per_token"]
                figures["attention_over"][other] = others / attention if attention and attention > 0 and others > 0 else None
    for row in result["prefill"]:
        for figures in row["caches"].values():
            figures["tokens_per_second"] = row["tokens"] / median(figures["rounds"])
        for figures in row["caches"].values():
            figures["over"] = {other: figures["tokens_per_second"] / row["caches"][other]["tokens_per_second"] for other in stock}


def print_tables(console: Console, result: dict[str, Any]) -> None:
    settings = result["settings"]
    stock = [cache for cache in settings["caches"] if is_stock(cache)]

    def ratios(of: dict[str, float | None]) -> list[str]:
        return [f"{of[other]:.2f}x" if of[other] else "-" for other in stock]

    where = f"{result['model']['name']} in llama-bench on {result['machine'].get('gpu', result['machine']['cpu'])}"
    columns = ["tokens/s", *(f"over {name}" for name in stock), "attention ms", *(f"over {name}" for name in stock)]
    table = Table("depth", "cache", *columns, title=f"{where}: decoding")
    for row in result["depths"]:
        for cache, figures in row["caches"].items():
            attention = figures["attention_seconds_per_token"]
            table.add_row(
                str(row["depth"]),
                cache,
                f"{figures['tokens_per_second']:.1f}",
                *ratios(figures["over"]),
                "-" if attention is None else f"{1e3 * attention:.3f}",
                *ratios(figures["attention_over"]),
            )
        table.add_section()
    console.print(table)
    if result["prefill"]:
        table = Table("depth", "ubatch", "cache", "tokens/s", *(f"over {name}" for name in stock), title=f"A prompt of {settings['prefill']} tokens")
        for row in result["prefill"]:
            for cache, figures in row["caches"].items():
                table.add_row(str(row["depth"]), str(row["ubatch"]), cache, f"{figures['tokens_per_second']:.0f}", *ratios(figures["over"]))
            table.add_section()
        console.print(table)


# ---- command ---------------------------------------------------------------------------------------------


@tool(help=__doc__.split("\n\n")[0])
@click.argument("program", type=click.Path(exists=True, dir_okay=False))
@click.argument("model", type=Model(), callback=lambda _context, _parameter, path: Path(path))
@click.option("--device", default="CUDA0", show_default=True, help="ggml's name for it: CPU, or that of a GPU.")
@click.option("--kv", default="f16,q8_0,q4_0,balanced", show_default=True, help=CACHE_HELP)
@click.option("--depths", default="0,8192,32768,131072", show_default=True, callback=parse_depths, help="Tokens already in the context.")
@click.option("--tokens", type=COUNT, default=64, show_default=True, help="Tokens decoded per repetition.")
@click.option("--prefill", type=COUNT_OR_ZERO, default=2048, show_default=True, help="Tokens of a prompt; 0: do not measure it.")
@click.option("--prefill-depth", type=COUNT_OR_ZERO, default=32768, show_default=True, help="Where the prompt is read.")
@click.option("--ubatch", default="512,2048", show_default=True, callback=lambda *given: parse_depths(*given)[1:], help="Of the prompt.")
@click.option("--rounds", type=COUNT, default=3, show_default=True)
@click.option("--repetitions", type=COUNT, default=2, show_default=True, help="In a round, by llama-bench.")
@click.option("--threads", type=THREADS, default=available_cores, show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@force_option("the file of --out")
def main(program, model, device, kv, depths, tokens, prefill, prefill_depth, ubatch, rounds, repetitions, threads, out, force):
    if out is not None:
        check_result(out, "llama_bench", force=force, inputs=[model, program])
    caches = split_names(kv)
    for cache in caches:  # a mistake is said now, not when the caches before it have run
        environment_of(cache)
    settings = {
        "caches": caches,
        "baseline": [cache for cache in caches if is_stock(cache)],
        "text": "llama-bench's own",
        "seed": None,
        "device": device,
        "depths": depths,
        "tokens": tokens,
        "prefill": prefill,
        "prefill_depth": prefill_depth,
        "ubatch": ubatch,
        "rounds": rounds,
        "repetitions": repetitions,
        "threads": threads,
    }
    result = describe("llama_bench", model, settings, out)
    gpu = gpu_number(device)
    if gpu is not None:
        result["copy_bandwidth"] = copy_bandwidth(gpu)
        result["machine"]["gpu"] = result["copy_bandwidth"]["gpu"]
    result["depths"] = [{"depth": depth, "caches": {cache: {"rounds": []} for cache in caches}} for depth in depths]
    result["prefill"] = [
        {"depth": prefill_depth, "ubatch": size, "tokens": prefill, "caches": {cache: {"rounds": []} for cache in caches}}
        for size in (ubatch if prefill else [])
    ]
    common = ["-t", str(threads), "-r", str(repetitions), "-b", "2048"]
    listed = [",".join(map(str, numbers)) for numbers in (depths, ubatch)]
    for turn in range(rounds):
        for cache in caches:
            print(f"round {turn + 1} of {rounds}: {cache}", file=sys.stderr, flush=True)
            for test in run(program, model, cache, device, [*common, "-ub", "2048", "-p", "0", "-n", str(tokens), "-d", listed[0]]):
                row = result["depths"][depths.index(test["n_depth"])]
                row["caches"][cache]["rounds"] += [ns / 1e9 / tokens for ns in test["samples_ns"]]
                result["build"] = test["build_commit"]
            if not prefill:
                continue
            for test in run(program, model, cache, device, [*common, "-ub", listed[1], "-p", str(prefill), "-n", "0", "-d", str(prefill_depth)]):
                row = result["prefill"][ubatch.index(test["n_ubatch"])]
                row["caches"][cache]["rounds"] += [ns / 1e9 for ns in test["samples_ns"]]
    add_derived_figures(result)
    print_tables(wide_console(), result)  # they are there where the file cannot be written
    save_json(out, result)


if __name__ == "__main__":
    sys.exit(run_command(main, "bench/llama_bench.py"))
