"""Where a model is computed: on which GPUs, and how many of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixkvq.core.errors import SettingsError
from mixkvq.core.memory import format_bytes

DEVICE_HELP = "auto (a GPU if there is one), cpu, gpu (all of them), or GPUs by llama.cpp's names for them: CUDA0, or CUDA0,CUDA1"
NO_GPU = "llama.cpp knows none; if this machine has an NVIDIA GPU, install llama-cpp-python with CUDA, as the README says"
WORKSPACE = 512 << 20  # bytes of a GPU that are left for what llama.cpp computes


@dataclass(frozen=True)
class Gpu:
    """A GPU. device: the ggml device to give to llama.cpp. free: bytes."""

    name: str
    device: int
    free: int


@dataclass(frozen=True)
class Placement:
    """gpus: none, and all is computed on the CPU. n_layers: how many layers the GPUs get, the last ones, and their caches with them; None: all.

    note: what the user should know, or "".
    """

    gpus: tuple[Gpu, ...] = ()
    n_layers: int | None = None
    note: str = ""

    def describe(self, n_layers: int) -> str:
        """In a few words, of a model of so many layers."""
        names = ", ".join(gpu.name for gpu in self.gpus)
        if not names or self.n_layers is None:
            return names or "CPU"
        return f"{names} ({self.n_layers} of {n_layers} layers), CPU"


def check_device(device: str) -> str:
    """The name as it was given. Raises SettingsError if it is none."""
    if not isinstance(device, str) or not all(device.split(",")):
        raise SettingsError(f"device is {device!r}; give {DEVICE_HELP}.")
    return device


def choose(device: str, gpus: Sequence[Gpu], missing: str) -> tuple[Gpu, ...]:
    """The GPUs that `device` names; none for the CPU, and for "auto" where there is none. Arguments and errors as of `place`."""
    check_device(device)
    if device == "cpu":
        return ()
    names = [gpu.name for gpu in gpus]
    if device in ("auto", "gpu"):
        chosen = tuple(gpus)
    else:
        wanted = device.split(",")
        there = "; ".join(filter(None, [f"there is {', '.join(names)}" if names else "", missing])) or NO_GPU
        for name in wanted:
            if name not in names:
                raise SettingsError(f"There is no GPU {name!r} to use: {there}.")
        chosen = tuple(gpu for gpu in gpus if gpu.name in wanted)
    if not chosen and device != "auto":
        raise SettingsError(f"There is no GPU to use: {missing or NO_GPU}.")
    return chosen


def place(
    device: str, gpus: Sequence[Gpu], missing: str, *, n_gpu_layers: int | None, n_layers: int, weights: int, cache: float, workspace: float
) -> Placement:
    """Choose.

    device: see DEVICE_HELP. missing: why GPUs that llama.cpp has are not among `gpus`, or "". n_gpu_layers: how many layers the GPUs
    get at most; negative: all; None: as many as fit. weights, cache: bytes that all layers take. workspace: bytes beside WORKSPACE that a GPU
    needs for a batch.
    Raises SettingsError for GPUs that are not there.
    """
    if device == "auto" and n_gpu_layers == 0:
        return Placement()
    chosen = choose(device, gpus, missing)
    if not chosen:
        return Placement(note=f"the model is computed on the CPU: {missing}" if missing and device == "auto" else "")
    if n_gpu_layers == 0:
        return Placement()
    if n_gpu_layers is not None:
        return Placement(chosen, n_gpu_layers if 0 < n_gpu_layers < n_layers else None)
    free = sum(max(0.0, gpu.free - WORKSPACE - workspace) for gpu in chosen)
    if weights + cache <= free or not n_layers:
        return Placement(chosen)
    fit = int(n_layers * free / (weights + cache))
    where = ", ".join(gpu.name for gpu in chosen)
    room = f"{format_bytes(sum(gpu.free for gpu in chosen))} are free on {where}"
    if fit == 0:
        return Placement(note=f"the model is computed on the CPU: {room}, too little for one of its layers")
    return Placement(chosen, fit, f"{fit} of {n_layers} layers and their caches go to the GPU, where {room}; the others stay on the CPU")
