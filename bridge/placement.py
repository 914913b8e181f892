"""Whether a context fits, and which devices compute the model: asked of llama.cpp by a dry run, before weights are read."""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import Any

from mixkvq.core.errors import SettingsError
from mixkvq.core.machine import free_memory
from mixkvq.core.memory import Free, check_fits
from mixkvq.core.model_file import ModelFile
from mixkvq.core.page import Codec
from mixkvq.core.settings import Kv, least_bits

from ._compat import C
from .backend import OURS, Backend, load_lock, our_gpus, stock_gpus
from .devices import Gpu, Placement, choose, place
from .dry_run import CELL_BYTES, DryRun, Need
from .log import log


@dataclass(frozen=True)
class Wish:
    """What is to be placed.

    backend: None for one of llama.cpp's own caches, `stock`. device: see `devices.DEVICE_HELP`. options: keywords of llama_cpp.Llama, with a checked
    n_ctx, of all n_seq sequences together.
    """

    file: ModelFile
    backend: Backend | None
    device: str
    kv: Kv
    stock: str | None
    codec: Codec | None
    n_seq: int
    options: dict[str, Any]

    def least_bytes(self) -> int:
        """What the keys and values take at least, from the file alone: a context too large even for that need not be tried."""
        swa_full = self.options.get("swa_full")
        elements = self.file.cache_elements(self.options["n_ctx"], self.options.get("n_ubatch", 512), swa_full is None or swa_full)
        return int(elements * (16 if self.codec is not None else least_bits(self.kv, self.stock)) / 8)


def find_placement(wish: Wish) -> Placement:
    """Decide which devices compute the model, and check that the context fits them; what the user should know is said.

    Raises SettingsError for GPUs that are not there, ContextTooLargeError.
    """
    n_gpu_layers = wish.options.get("n_gpu_layers")
    if n_gpu_layers is not None and (not isinstance(n_gpu_layers, int) or isinstance(n_gpu_layers, bool)):
        raise SettingsError(f"n_gpu_layers is {n_gpu_layers!r}; it must be a number of layers, or -1 for all.")
    # The first look at the GPUs of a process makes CUDA list them in the log.
    with contextlib.nullcontext() if wish.options.get("verbose", True) else log.kept():
        gpus, missing = our_gpus(wish.backend) if wish.backend is not None else (stock_gpus(), "")
    if wish.options.get("vocab_only"):
        return Placement()
    chosen = () if n_gpu_layers == 0 else choose(wish.device, gpus, missing)
    weights = sum(os.path.getsize(path) for path in (wish.file.path, *wish.file.parts))

    def decide(need: Need | None) -> Placement:
        return place(
            wish.device, gpus, missing, n_gpu_layers=n_gpu_layers, n_layers=wish.file.n_layers, weights=weights,
            cache=need.cache + need.recurrent if need else 0, workspace=need.largest_work() if need else 0,
        )  # fmt: skip

    devices = [gpu.device for gpu in chosen] or ([wish.backend.cpu] if wish.backend is not None else [])
    begin = None if wish.backend is None else functools.partial(wish.backend.begin, wish.kv, wish.file, wish.codec)
    n_ctx, free = wish.options["n_ctx"], free_memory()
    least = CELL_BYTES if chosen else CELL_BYTES + wish.least_bytes() // n_ctx
    with load_lock, DryRun(wish.file.path, devices, {**wish.options, "n_seq": wish.n_seq}, begin, wish.stock or "f16") as dry:
        placement = decide(dry.measure(n_ctx) if n_ctx * least <= free.bytes else None)
        _check_room(placement, wish.file.n_layers, n_ctx, free, least, dry)
    if placement.note:
        log.say(f"mixkvq: {placement.note}")
    return placement


def _check_room(placement: Placement, n_layers: int, n_ctx: int, free: Free, least: int, dry: DryRun) -> None:
    """Raises ContextTooLargeError if what the placement leaves on the CPU, or puts on GPUs, does not fit there."""
    on_gpus = {prefix + gpu.name for gpu in placement.gpus for prefix in ("", OURS)}
    n_cpu = 0 if placement.gpus and placement.n_layers is None else n_layers - (placement.n_layers or 0)
    share = n_cpu / max(1, n_layers)
    check_fits(n_ctx, free, least, dry.bytes_of(lambda need: need.on_cpu(n_cpu, share, on_gpus)))
    if placement.gpus:
        room = Free(sum(gpu.free for gpu in placement.gpus), where=f"on {', '.join(gpu.name for gpu in placement.gpus)}")
        check_fits(n_ctx, room, 0, dry.bytes_of(lambda need: need.all - need.on_cpu(n_cpu, share, on_gpus)))


def device_options(wish: Wish, placement: Placement) -> tuple[list[int], dict[str, Any]]:
    """The ggml devices for llama.cpp, and the keywords of llama_cpp.Llama that put the layers there."""
    on_gpus = [gpu.device for gpu in placement.gpus]
    split: list[float] | None = wish.options.get("tensor_split")
    if wish.backend is None:
        devices = on_gpus
        n_gpu_layers = (-1 if placement.n_layers is None else placement.n_layers) if on_gpus else 0
    else:
        devices, n_gpu_layers = on_gpus or [wish.backend.cpu], -1
        if placement.n_layers is not None:  # llama.cpp's own CPU device would hold the rest of the cache in F16
            devices, split = [wish.backend.cpu, *on_gpus], _split(placement.gpus, placement.n_layers, wish.file.n_layers)
    return devices, {
        "n_gpu_layers": n_gpu_layers,
        "offload_kqv": True,
        "split_mode": C.LLAMA_SPLIT_MODE_LAYER,
        "main_gpu": 0,
        "tensor_split": split,
    }


def _split(gpus: tuple[Gpu, ...], n_layers: int, of_layers: int) -> list[float]:
    """llama.cpp's shares of the CPU and the GPUs, which get the last n_layers. It counts the output as one layer more, the last."""
    free = sum(gpu.free for gpu in gpus)
    return [of_layers - n_layers, *((n_layers + 1) * gpu.free / free for gpu in gpus)]
