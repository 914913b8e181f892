"""What the benchmarks share. Caches by name, logits and the description of a run are those of mixkvq.evaluate."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress

from bridge import Llama
from mixkvq.cli.command import command_line
from mixkvq.cli.options import COUNT, COUNT_OR_ZERO, SEED, THREADS, Model, force_option, run, tool
from mixkvq.study.caches import CACHE_HELP, split_names
from mixkvq.study.caches import open_cache as open_model
from mixkvq.study.record import available_cores, check_result, describe_run, save_json

__all__ = [
    "CACHE_HELP",
    "COUNT",
    "COUNT_OR_ZERO",
    "SEED",
    "THREADS",
    "Model",
    "available_cores",
    "cache_statistics",
    "check_result",
    "copy_bandwidth",
    "describe",
    "force_option",
    "gpu_number",
    "open_model",
    "parse_depths",
    "read_bandwidth",
    "round_up",
    "run",
    "save_json",
    "split_names",
    "tool",
    "wide_console",
]


def cache_statistics(llm: Llama) -> dict[str, Any]:
    """The library's own account of the cache (bytes, bits per element), as JSON can hold it."""
    return {key: value for key, value in llm.kv_stats().items() if isinstance(value, (str, int, float, bool))}


def describe(bench: str, model: Path, settings: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """The head of a result, with the model's SHA-256, and a progress bar for it, if it is to be written to `out`."""
    hashed = out is not None
    with Progress(console=Console(stderr=True), transient=True, disable=not hashed or not sys.stderr.isatty()) as bar:
        step = bar.add_task(f"SHA-256 of {model.name}", total=model.stat().st_size)
        return describe_run(bench, model, settings, hashed=hashed, words=command_line(), progress=lambda n: bar.advance(step, n))


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def read_bandwidth(threads: int, passes: int = 7) -> dict[str, Any]:
    """How fast this machine reads memory: numpy combines a buffer far larger than the caches, a part per thread; the best pass counts."""
    cache = 0
    with contextlib.suppress(AttributeError, ValueError, OSError):
        cache = max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    n_bytes = round_up(max(256 << 20, 8 * cache), 1 << 20)
    buffer = np.ones(n_bytes // 8, np.uint64)  # ones, because the system does not map zeros before they are written
    parts = np.array_split(buffer, threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            begin = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))  # of the reductions that were tried the quickest with one thread
            seconds.append(time.perf_counter() - begin)
    return {"bytes_per_second": n_bytes / min(seconds), "bytes": n_bytes, "threads": threads, "passes": passes}


def gpu_number(device: str) -> int | None:
    """CUDA's number of a device by llama.cpp's name, CUDA0; None: it is no such GPU."""
    found = re.fullmatch(r"CUDA(\d+)", device)
    return int(found[1]) if found else None


def copy_bandwidth(gpu: int, passes: int = 21) -> dict[str, Any]:
    """How fast a GPU copies within its memory, bytes read plus bytes written, as tests/native/bench_cuda.cpp measures it; and what GPU it is."""
    cuda = ctypes.CDLL("libcuda.so.1")
    n_bytes = 1 << 30

    def call(name: str, *arguments: Any) -> None:
        code = getattr(cuda, name)(*arguments)
        if code:
            raise click.ClickException(f"the CUDA driver fails at {name} with error {code}")

    device, context, name = ctypes.c_int(), ctypes.c_void_p(), ctypes.create_string_buffer(256)
    blocks, events = (ctypes.c_uint64(), ctypes.c_uint64()), (ctypes.c_void_p(), ctypes.c_void_p())
    call("cuInit", 0)
    call("cuDeviceGet", ctypes.byref(device), gpu)
    call("cuDeviceGetName", name, len(name), device)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxPushCurrent_v2", context)
    for block in blocks:
        call("cuMemAlloc_v2", ctypes.byref(block), ctypes.c_size_t(n_bytes))
    for event in events:
        call("cuEventCreate", ctypes.byref(event), 0)
    milliseconds = []
    for turn in range(passes + 3):  # the first ones warm up
        call("cuEventRecord", events[0], None)
        call("cuMemcpyDtoDAsync_v2", blocks[1], blocks[0], ctypes.c_size_t(n_bytes), None)
        call("cuEventRecord", events[1], None)
        call("cuEventSynchronize", events[1])
        taken = ctypes.c_float()
        call("cuEventElapsedTime", ctypes.byref(taken), *events)
        if turn >= 3:
            milliseconds.append(taken.value)
    for block in blocks:
        call("cuMemFree_v2", block)
    for event in events:
        call("cuEventDestroy_v2", event)
    call("cuCtxPopCurrent_v2", ctypes.byref(context))
    call("cuDevicePrimaryCtxRelease_v2", device)
    rate = 2 * n_bytes / statistics.median(milliseconds) * 1e3
    return {"bytes_per_second": rate, "bytes": n_bytes, "passes": passes, "gpu": name.value.decode()}


def parse_depths(_context: Any, _option: Any, text: str) -> list[int]:
    """In order, and always with 0: attention is what a depth takes beyond it."""
    if not all(name.isascii() and name.isdigit() and int(name) <= 1 << 30 for name in split_names(text)):
        raise click.BadParameter(f"{text!r} is not a comma-separated list of numbers of tokens")
    return sorted({0, *map(int, split_names(text))})


def wide_console() -> Console:
    """For tables on stdout: wide enough for every column also where the output is not a terminal."""
    return Console(width=max(120, Console().width))
