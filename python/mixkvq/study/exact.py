"""Arithmetic without llama.cpp's own noise: weights in F32.

With quantised weights llama.cpp rounds activations as well, so whatever changes a cache at all moves every prediction behind it, by more than a
good cache does. In F32 the divergence is that of the cache.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from bridge.backend import stock_gpus
from bridge.devices import choose
from bridge.requantise import f32_bytes, requantise

from ..core.machine import free_memory

BASELINE = "f32"  # stock, without flash attention
MEMORY, DISK, TIME = 0.4, 0.5, 0.15  # of what is free, and of the time
BYTES_PER_SECOND = 300e6  # at which a copy is written, at least


def fits(model: str, folder: Path, device: str, seconds: float | None = None) -> bool:
    """Whether the CPU computes the model, and an F32 copy has room in memory and in the folder and is soon written, if there are so many seconds.

    On a GPU llama.cpp rounds products of F32, too.
    """
    if choose(device, stock_gpus(), ""):
        return False
    need = f32_bytes(model)
    in_time = seconds is None or need / BYTES_PER_SECOND <= TIME * seconds
    return in_time and need <= MEMORY * free_memory().bytes and need <= DISK * shutil.disk_usage(folder).free


def f32_copy(model: str | Path, folder: Path, threads: int) -> str:
    """Write a copy of the model with F32 weights into the folder; its path. Raises ModelFileError."""
    copy = folder / Path(model).name
    requantise(model, copy, "F32", threads)
    return str(copy)
