"""Whether a change of the C++ code costs speed: commits of this repository against each other, in processor time, as others may use the machine.

    .venv/bin/python bench/commits.py models/cot-tiny-34m-q8_0.gguf b91b90c ddea892 HEAD --out build/bench/commits.json

Each commit is built in build/bench/commits, with the native benchmarks of the present tree. Then the builds take turns: in a model (short rounds, of
which the median counts), then kernels and attention without one (of which the best round counts). The first commit takes part twice: what it differs
from itself is noise. All of it is on one thread, with the best instruction set unless --isa names others.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import llama_cpp
from _common import COUNT, Model, check_result, describe, force_option, run, save_json, split_names, tool, wide_console
from rich.table import Table
from tables import build_ratios

from bridge.backend import function
from mixkvq.core.native import native

ROOT = Path(__file__).parents[1]
BUILDS = ROOT / "build" / "bench" / "commits"
BENCHES = ("bench_kernels", "bench_attention")
PRESET, UBATCH, TOKENS, DECODED = "balanced", 512, 1024, 64


# ---- builds ----------------------------------------------------------------------------------------------


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=True).stdout


def build(commit: str) -> Path:
    """The folder of its native build."""
    source = BUILDS / commit
    if not source.exists():
        with tarfile.open(fileobj=BytesIO(git("archive", commit))) as archive:
            archive.extractall(source, filter="data")
    for name in BENCHES:
        (source / "tests" / "native" / f"{name}.cpp").write_bytes((ROOT / "tests" / "native" / f"{name}.cpp").read_bytes())
    folder = source / "build" / "native"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", source, "-B", folder, "-G", "Ninja", "-DMIXKVQ_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", folder, "--target", "ggml-mixkvq", *BENCHES]):
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return folder


# ---- without a model -------------------------------------------------------------------------------------


def output(isa: str, *command: Path | str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"MIXKVQ_ISA": isa}).stdout


def kernels(text: str) -> dict[str, float]:
    """What bench_kernels prints: nanoseconds by instruction set, format, kernel and number of queries."""
    found, isa, counts = {}, "", []
    for line in text.splitlines():
        if head := re.match(r"(\w+), head size", line):
            isa, counts = head[1], re.findall(r"n=(\d+)", line)
        elif line.startswith("  "):
            name, what, numbers = line[2:33].strip(), line[33:42].strip(), line[42:].split()
            for n, number in zip(counts if len(numbers) > 1 else ["1"], numbers, strict=True):
                found[f"{isa}, {name}, {what}, {n}"] = float(number)
    return found


def attention(text: str) -> dict[str, float]:
    """What bench_attention prints: milliseconds of attention, microseconds a token of packing."""
    found, isa = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(\w+), .*: packing ([\d.]+) us", line):
            isa = head[1]
            found[f"{isa}, packing"] = float(head[2])
        elif row := re.match(r" +(\d+) tokens at +(\d+): +([\d.]+) ms", line):
            found[f"{isa}, {row[1]} tokens at {row[2]}"] = float(row[3])
    return found


# ---- in a model ------------------------------------------------------------------------------------------


def serve_rounds(library: str, model: str) -> None:
    """The process of a build: for each line on stdin it does everything once, and prints processor time in milliseconds."""
    llama_cpp.llama_log_set(_silent, None)
    llama_cpp.llama_backend_init()
    if not function("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)(os.fsencode(library)):
        raise click.ClickException(f"llama.cpp did not accept {library}")
    device = function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)(b"MIXKVQ-CPU")
    of_model = llama_cpp.llama_model_default_params()
    devices = (ctypes.c_void_p * 2)(device, None)
    of_model.devices, of_model.n_gpu_layers = ctypes.cast(devices, ctypes.c_void_p), 999
    loaded = llama_cpp.llama_model_load_from_file(os.fsencode(model), of_model)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = TOKENS + 2 * UBATCH, UBATCH, UBATCH
    params.n_threads = params.n_threads_batch = 1
    params.n_seq_max, params.kv_unified, params.flash_attn_type = 2, False, 1
    params.n_ctx *= 2  # of each stream
    context = llama_cpp.llama_init_from_model(loaded, params)
    memory = llama_cpp.llama_get_memory(context)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    batch = llama_cpp.llama_batch_init(UBATCH, 0, 1)

    def decode(first: int, n: int) -> None:
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = (first + i) * 7919 % n_vocab, first + i, 1, 0
            batch.logits[i] = i == n - 1
        if llama_cpp.llama_decode(context, batch):
            raise click.ClickException("a batch is not decoded")

    def read() -> None:
        for at in range(0, TOKENS, UBATCH):
            decode(at, UBATCH)

    def tokens() -> None:
        for i in range(DECODED):
            decode(TOKENS + i, 1)

    def shift() -> None:
        """The first quarter goes, the rest moves: packed pages are unpacked, rotated and packed again."""
        llama_cpp.llama_memory_seq_rm(memory, 0, 0, TOKENS // 4)
        llama_cpp.llama_memory_seq_add(memory, 0, TOKENS // 4, -1, -(TOKENS // 4))
        decode(TOKENS + DECODED - TOKENS // 4, 1)

    def copy() -> None:
        """All of a stream into the other one."""
        llama_cpp.llama_memory_seq_cp(memory, 0, 1, -1, -1)
        decode(TOKENS + DECODED + 1 - TOKENS // 4, 1)
        llama_cpp.llama_memory_seq_rm(memory, 1, -1, -1)

    state = (ctypes.c_uint8 * 0)()

    def save() -> None:
        nonlocal state
        state = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(context))()
        llama_cpp.llama_state_get_data(context, state, len(state))

    def load() -> None:
        llama_cpp.llama_memory_clear(memory, True)
        if not llama_cpp.llama_state_set_data(context, state, len(state)):
            raise click.ClickException("llama.cpp did not take its own state back")

    steps: dict[str, Callable[[], None]] = {"prompt": read, "tokens": tokens, "shift": shift, "copy": copy, "save": save, "load": load}
    for _ in sys.stdin:
        llama_cpp.llama_memory_clear(memory, True)
        taken = {}
        for name, step in steps.items():
            begin = time.process_time()
            step()
            taken[name] = 1e3 * (time.process_time() - begin)
        print(json.dumps(taken), flush=True)


@llama_cpp.llama_log_callback
def _silent(_level: int, _text: bytes, _user: Any) -> None:
    pass


class InModel:
    """A build's process, which waits for its turn."""

    def __init__(self, folder: Path, model: str) -> None:
        command = [sys.executable, __file__, "--process", str(folder / "libggml-mixkvq.so"), model]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MIXKVQ_")} | {"MIXKVQ_PRESET": PRESET}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def round(self) -> dict[str, float]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException("a build's process has ended")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


# ---- all of it -------------------------------------------------------------------------------------------


def best(folders: list[Path], measure: Callable[[Path], dict[str, float]], rounds: int) -> dict[str, list[float]]:
    """The least of each figure, by build."""
    found: list[dict[str, float]] = [{} for _ in folders]
    for turn in range(rounds):
        for i in in_turn(len(folders), turn):
            for key, value in measure(folders[i]).items():
                found[i][key] = min(found[i].get(key, value), value)
    return {key: [f[key] for f in found] for key in found[0]}


def in_turn(n: int, turn: int) -> list[int]:
    """Who comes first changes."""
    return [(turn + i) % n for i in range(n)]


@tool()
@click.argument("model", type=Model())
@click.argument("commits", nargs=-1, required=True)
@click.option("--rounds", default=1, show_default=True, type=COUNT, help="Of the benchmarks without a model.")
@click.option("--model-rounds", default=8, show_default=True, type=COUNT, help="Of each build in the model.")
@click.option("--isa", help="Instruction sets, comma-separated.  [default: the best of this machine]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@force_option()
def main(model: str, commits: tuple[str, ...], rounds: int, model_rounds: int, isa: str | None, out: Path | None, force: bool) -> None:
    if out is not None:
        check_result(out, "commits", force=force, inputs=(model,))
    try:
        names = [git("rev-parse", "--verify", "--short=7", f"{c}^{{commit}}").decode().strip() for c in commits]
    except subprocess.CalledProcessError:
        raise click.UsageError(f"{' '.join(commits)}: not all of these are commits of this repository.") from None
    sets = split_names(isa) if isa else [native().isa()]
    settings = {
        "isa": sets,
        "commits": names,
        "preset": PRESET,
        "tokens": TOKENS,
        "decoded": DECODED,
        "ubatch": UBATCH,
        "rounds": rounds,
        "model_rounds": model_rounds,
        "threads": 1,
    }
    result = describe("commits", Path(model), settings, out)
    folders = [build(name) for name in names]
    folders.append(folders[0])
    result["builds"] = [*names, f"{names[0]} again"]

    def of_sets(*command: Path | str) -> str:
        return "".join(output(name, *command) for name in sets)

    turns: list[list[dict[str, float]]] = [[] for _ in folders]
    processes = [InModel(folder, model) for folder in folders]
    for turn in range(model_rounds + 1):  # the first one warms up
        for i in in_turn(len(folders), turn):
            taken = processes[i].round()
            if turn:
                turns[i].append(taken)
    for process in processes:
        process.close()
    result["model_ms"] = {step: [statistics.median(t[step] for t in each) for each in turns] for step in turns[0][0]}
    save_json(out, result)
    result["attention_ms"] = best(folders, lambda folder: attention(of_sets(folder / "bench_attention", "1")), rounds)
    save_json(out, result)
    result["kernels_ns"] = best(folders, lambda folder: kernels(of_sets(folder / "bench_kernels")), rounds)
    save_json(out, result)
    table = Table("figure", *result["builds"], title=f"Processor time over that of {names[0]}: geometric means, and extremes")
    for name, ratios in build_ratios(result):
        table.add_row(name, *(f"{mean:.3f}" if low == high else f"{mean:.3f} ({low:.2f} to {high:.2f})" for mean, low, high in ratios))
    wide_console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        serve_rounds(*sys.argv[2:])
    else:
        sys.exit(run(main, "bench/commits.py"))
