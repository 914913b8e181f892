"""What saving and loading a state costs: the divergence from F16 after so many rounds, with both kinds of state: llama.cpp's own, whose rows are F16
(llama_state_get_data and llama_state_set_data), and packed ones.

    .venv/bin/python bench/restores.py models/cot-tiny-34m-q8_0.gguf --out build/bench/restores.json

A context reads tokens of a text, its state goes out and comes back so many times, and it reads the next ones. Printed is the mean Kullback-Leibler
divergence (nats) of its predictions there from those of an F16 cache that read the same, over windows of the text.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import click
import llama_cpp
import numpy as np
import numpy.typing as npt
from _common import (
    CACHE_HELP,
    COUNT,
    SEED,
    THREADS,
    Model,
    available_cores,
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
from rich.table import Table

from mixkvq.core.native import native
from mixkvq.study.compare import draw_windows, feed, tokenize_text

TEXT = Path(__file__).parents[1] / "python" / "mixkvq" / "study" / "calibration.txt"
BATCH = 512


def save(llm: Any, kind: str) -> Any:
    """The state of a context: f16 as llama.cpp gives it, or packed."""
    if kind == "packed":
        return llm.save_state()
    data = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(llm._context))()
    return data, llama_cpp.llama_state_get_data(llm._context, data, len(data)), llm.n_tokens


def load(llm: Any, kind: str, state: Any) -> None:
    """The state put into the emptied context."""
    llm.clear()
    if kind == "packed":
        llm.load_state(state)
        return
    data, size, n_tokens = state
    if size == 0 or llama_cpp.llama_state_set_data(llm._context, data, size) == 0:
        raise click.ClickException("llama.cpp did not take its own state back.")
    llm.n_tokens = n_tokens


def predictions(llm: Any, tokens: list[int], read: int, counts: list[int], kind: str = "f16") -> list[npt.NDArray[np.float32]]:
    """Logits of the tokens after the first `read`, whose state went out and came back so many times before. Read they are once."""
    llm.clear()
    feed(llm, tokens[:read], BATCH, 0)
    first = save(llm, kind) if any(counts) else None
    found = []
    for n in sorted(counts):
        state = first
        for i in range(n):
            load(llm, kind, state)
            state = save(llm, kind) if i + 1 < n else None
        found.append(np.array(feed(llm, tokens[read:], BATCH, len(tokens) - read)))  # which llama.cpp writes over
    return found


@tool()
@click.argument("model", type=Model())
@click.option("--kv", default="balanced,mix2.4,near-lossless,paper", show_default=True, help=CACHE_HELP)
@click.option("--states", "kinds", default="f16,packed", show_default=True, help="Kinds of state.")
@click.option("--rounds", default="0,1,4,12,100", show_default=True, help="How often a state goes out and comes back.")
@click.option("--text", default=TEXT, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="[default: the calibration text]")
@click.option("--read", default=768, show_default=True, type=COUNT, help="Tokens before the state goes out.")
@click.option("--after", default=256, show_default=True, type=COUNT, help="Tokens after it has come back.")
@click.option("--windows", default=4, show_default=True, type=COUNT)
@click.option("--seed", default=1, show_default=True, type=SEED)
@click.option("--threads", type=THREADS, default=available_cores, show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@force_option()
def main(
    model: str,
    kv: str,
    kinds: str,
    rounds: str,
    text: Path,
    read: int,
    after: int,
    windows: int,
    seed: int,
    threads: int,
    out: Path | None,
    force: bool,
) -> None:
    if out is not None:
        check_result(out, "restores", force=force, inputs=(model, text))
    counts = sorted(int(n) for n in rounds.split(","))
    options = {"n_ctx": read + after + 256, "n_batch": BATCH, "n_threads": threads}
    f16 = open_model(Path(model), "f16", **options)
    tokens, before = tokenize_text(f16, text.read_bytes())
    size = read + after - len(before)
    parts = [before + tokens[at : at + size] for at in draw_windows(len(tokens), size, windows, seed)]
    truth = [predictions(f16, part, read, [0])[0] for part in parts]
    settings = {"read": read, "after": after, "windows": len(parts), "text": text.name, "baseline": "f16", "seed": seed}
    result = describe("restores", Path(model), settings, out) | {"caches": []}
    if not set(split_names(kinds)) <= {"f16", "packed"}:
        raise click.UsageError(f"{kinds!r} names another kind of state than f16 and packed.")
    table = Table("cache", "states", *(f"{n} rounds" for n in counts), title="mean KLD from F16, nats, after so many restores")
    for name in split_names(kv):
        llm = open_model(Path(model), name, **options)
        for kind in split_names(kinds):
            if kind == "packed" and llm.stock is not None:
                continue
            found = [predictions(llm, part, read, counts, kind) for part in parts]
            kld = [
                float(np.mean([native().compare_predictions(p, [after])[0].mean() for p, after in zip(truth, each, strict=True)]))
                for each in zip(*found, strict=True)
            ]
            result["caches"].append({"cache": name, "state": kind, "rounds": counts, "kld": kld})
            table.add_row(name, kind, *(f"{x:.5f}" for x in kld))
            save_json(out, result)
        llm.close()
    wide_console().print(table)


if __name__ == "__main__":
    sys.exit(run(main, "bench/restores.py"))
