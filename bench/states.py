"""Saving what a context holds and resuming from it: bytes and seconds, with each cache, against reading the prompt anew.

    .venv/bin/python bench/states.py models/cot-tiny-34m-q8_0.gguf --out build/bench/states.json

A context reads a text of each length; its state is written to a file (and synchronised) and loaded into an emptied context, several times in turn.
The quickest of each counts, and is printed with the time that the same bytes take when they are written and synchronised by themselves. The next
token after a resumption must have the same logits as without it, with MixKVQ bit for bit.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from _common import (
    CACHE_HELP,
    COUNT,
    THREADS,
    Model,
    available_cores,
    check_result,
    describe,
    force_option,
    open_model,
    parse_depths,
    round_up,
    run,
    save_json,
    split_names,
    tool,
    wide_console,
)
from rich.table import Table

TEXT = Path(__file__).parents[1] / "python" / "mixkvq" / "study" / "calibration.txt"
BATCH = 512


def timed(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def write_plainly(path: Path, data: bytes) -> None:
    """As quickly as the disk takes it."""
    with open(path, "wb", buffering=0) as f:
        f.write(data)
        os.fsync(f.fileno())


def measure(llm: Any, tokens: list[int], rounds: int, folder: Path) -> dict[str, Any]:
    """Of one context that has read the tokens: seconds, bytes, and whether the next token is the same after a resumption."""
    path = folder / "state"
    llm.clear()
    found: dict[str, Any] = {"tokens": len(tokens), "read_seconds": timed(lambda: llm.eval(tokens))}
    seconds: dict[str, list[float]] = {"save": [], "disk": [], "load": []}
    for _ in range(rounds):
        seconds["save"].append(timed(lambda: llm.save_file(path)))
        seconds["disk"].append(timed(functools.partial(write_plainly, folder / "plain", path.read_bytes())))
    used = llm.kv_stats()["bytes_used"]
    truth = llm.forward([tokens[0]])
    for _ in range(rounds):
        llm.clear()
        seconds["load"].append(timed(lambda: llm.load_file(path)))
    same = bool(np.array_equal(truth, llm.forward([tokens[0]])))
    found.update({f"{name}_seconds": min(each) for name, each in seconds.items()})
    return {**found, "bytes": path.stat().st_size, "bytes_used": used, "same_bits": same}


@tool()
@click.argument("model", type=Model())
@click.option("--kv", default="f16,q8_0,balanced", show_default=True, help=CACHE_HELP)
@click.option("--lengths", default="4096,16384,32768", show_default=True, callback=parse_depths, help="Tokens that a context has read.")
@click.option("--rounds", default=5, show_default=True, type=COUNT, help="How often each is saved and loaded.")
@click.option("--text", default=TEXT, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="[default: the calibration text]")
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where states are written.  [default: a temporary one]")
@click.option("--threads", type=THREADS, default=available_cores, show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@force_option()
def main(model: str, kv: str, lengths: list[int], rounds: int, text: Path, folder: Path | None, threads: int, out: Path | None, force: bool) -> None:
    if out is not None:
        check_result(out, "states", force=force, inputs=(model, text))
    settings = {"rounds": rounds, "threads": threads, "text": text.name}
    result = describe("states", Path(model), settings, out) | {"states": []}
    table = Table("tokens", "cache", "MiB", "of what is in use", "read s", "save s", "of which the disk", "resume s", "same bits", title="States")
    with tempfile.TemporaryDirectory(prefix="mixkvq-", dir=folder) as temporary:
        for length in lengths[1:]:  # 0 is always the first
            for name in split_names(kv):
                llm = open_model(Path(model), name, n_ctx=round_up(length + 1, 256), n_batch=BATCH, n_threads=threads)
                tokens = llm.tokenize(text.read_bytes())
                row = measure(llm, (tokens * (1 + length // len(tokens)))[:length], rounds, Path(temporary))
                llm.close()
                result["states"].append({"cache": name, **row})
                share = f"{row['bytes'] / row['bytes_used']:.3f}"
                times = (f"{row[f'{each}_seconds']:.3f}" for each in ("read", "save", "disk", "load"))
                table.add_row(str(length), name, f"{row['bytes'] / 2**20:.1f}", share, *times, "yes" if row["same_bits"] else "no")
                save_json(out, result)
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(run(main, "bench/states.py"))
