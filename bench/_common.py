"""What every benchmark shares: opening a model with a named cache, reading logits, describing the run."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bridge import Llama

STOCK_TYPES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
NO_ROTATION = "-norot"  # suffix: llama.cpp's own Hadamard rotation of quantised caches switched off
ROTATION_SWITCH = "LLAMA_ATTN_ROT_DISABLE"

CACHE_HELP = (
    "comma-separated caches: llama.cpp's own types (f16, q8_0, q4_0, ...; q4_0-norot switches its built-in "
    "rotation off), presets of MixKVQ, or paths of profiles"
)


# ---- models and caches -----------------------------------------------------------------------------------


def split_names(text: str) -> list[str]:
    """The names of a comma-separated option, in order, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def is_stock(cache: str) -> bool:
    return cache.removesuffix(NO_ROTATION) in STOCK_TYPES


def open_model(model: str | Path, cache: str, kind: type[Llama] = Llama, **options: Any) -> Llama:
    """Load `model` with the named cache.  `options` are those of llama_cpp.Llama."""
    options = {"verbose": False, **options}
    if not is_stock(cache):
        return kind(str(model), kv=cache, **options)
    with _rotation_disabled(cache.endswith(NO_ROTATION)):
        return kind(str(model), stock=cache.removesuffix(NO_ROTATION), **options)


@contextlib.contextmanager
def _rotation_disabled(disabled: bool) -> Iterator[None]:
    """llama.cpp reads the switch when a context is made."""
    before = os.environ.pop(ROTATION_SWITCH, None)
    if disabled:
        os.environ[ROTATION_SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(ROTATION_SWITCH, None)
        if before is not None:
            os.environ[ROTATION_SWITCH] = before


def clear(llm: Llama) -> None:
    """Empty the cache, statistics included, as in a new context."""
    llm.reset()
    llm._ctx.kv_cache_clear()


def cache_statistics(llm: Llama) -> dict[str, Any]:
    """The library's own account of the cache (bytes, bits per element), as JSON can hold it."""
    statistics = getattr(llm, "kv_stats", dict)()
    return {key: value for key, value in dict(statistics).items() if isinstance(value, (str, int, float, bool))}


def last_logits(llm: Llama) -> np.ndarray:
    """Logits of the last evaluated token: a view that the next evaluation overwrites."""
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),))


def all_logits(llm: Llama, tokens: Sequence[int]) -> np.ndarray:
    """Evaluate one batch and return a row of logits per token (a view, as above).

    Llama(logits_all=True) would do, but it keeps the logits of the whole context in memory.
    """
    if len(tokens) > llm.n_batch:
        raise ValueError(f"{len(tokens)} tokens do not fit a batch of {llm.n_batch}")
    llm._batch.set_batch(batch=tokens, n_past=llm.n_tokens, logits_all=True)
    llm._ctx.decode(llm._batch)
    llm.input_ids[llm.n_tokens : llm.n_tokens + len(tokens)] = tokens
    llm.n_tokens += len(tokens)
    return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(len(tokens), llm.n_vocab()))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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


# ---- figures ---------------------------------------------------------------------------------------------


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 % by default)."""
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


# ---- what a result file says about its run ---------------------------------------------------------------


def describe_run(bench: str, model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Machine, commit, date, versions and model, without paths or host names."""
    return {
        "bench": bench,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "versions": _versions(),
        "model": describe_file(model),
        "settings": settings,
    }


def describe_file(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def save_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write atomically, so that an interrupted benchmark leaves the previous state."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _machine() -> dict[str, Any]:
    cpu, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                cpu = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
                break
    isa = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimd", "asimddp", "sve") if name in flags]
    return {"cpu": cpu, "cores": available_cores(), "isa": isa, "arch": platform.machine(), "os": platform.system()}


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("mixkvq", "llama_cpp_python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
