"""What the benchmarks of speed and memory share. Caches by name, logits and the description of a run are those of mixkvq.evaluate."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from rich.console import Console

from bridge import Llama
from mixkvq.caches import CACHE_HELP, split_names
from mixkvq.caches import open_cache as open_model
from mixkvq.record import available_cores, describe_run, save_json

__all__ = [
    "CACHE_HELP",
    "available_cores",
    "cache_statistics",
    "describe_run",
    "open_model",
    "read_bandwidth",
    "round_up",
    "save_json",
    "split_names",
    "wide_console",
]


def cache_statistics(llm: Llama) -> dict[str, Any]:
    """The library's own account of the cache (bytes, bits per element), as JSON can hold it."""
    return {key: value for key, value in llm.kv_stats().items() if isinstance(value, (str, int, float, bool))}


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


def wide_console() -> Console:
    """For tables on stdout: wide enough for every column also where the output is not a terminal."""
    return Console(width=max(120, Console().width))
