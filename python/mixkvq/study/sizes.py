"""How many bits: what the presets take on a model, and what a budget of memory leaves for the packed pages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import SettingsError
from ..core.model_file import ModelFile
from ..core.native import native
from ..core.profile import LayerProfile, uniform_profile
from ..core.reference import PAGE_CELLS
from .caches import SINKS, WINDOW, total_bits
from .material import LONGEST

WINDOWS = (128, 256, 512)  # tried where a budget of memory can pay for them
LONG_IN_WINDOWS = 4  # a passage of so many windows shows what they are worth
Formats = list["LayerProfile | None"]


@dataclass(frozen=True)
class Preset:
    """A preset on a model: its formats, and the body bits that they take there."""

    name: str
    formats: Formats
    bits: float


def presets_of(model: ModelFile) -> list[Preset]:
    """The presets that an allocation is compared with, by rising bits: those with rotated values, as it has."""
    profiles = {str(p["name"]): uniform_profile(model, p["name"]) for p in native().presets() if p["value_group"] == 0}
    return sorted((Preset(name, p.layers, p.packed_bits(model.head_size_v)) for name, p in profiles.items()), key=lambda preset: preset.bits)


def preset_within(presets: Sequence[Preset], bits: float) -> Preset:
    """The largest of these presets that takes no more body bits, or the smallest one."""
    return ([p for p in presets if p.bits <= bits + 0.005] or presets[:1])[-1]


def nearest_preset(presets: Sequence[Preset], bits: float) -> Preset:
    """The one of the nearest size, larger or smaller: what a profile of so many bits is compared with."""
    return min(presets, key=lambda preset: abs(preset.bits - bits))


def default_bits(model: ModelFile) -> float:
    """Body bits of the default preset on this model."""
    return uniform_profile(model).packed_bits(model.head_size_v)


def bits_of_budget(model: ModelFile, mib: float, n_ctx: int, window: int, sinks: int) -> float:
    """Body bits with which a cache of n_ctx cells takes at most `mib` MiB: what is left when the F16 pages are paid.

    Raises SettingsError if that is less than the smallest formats take.
    """
    elements = model.cache_elements(n_ctx)
    tables = table_bytes(model, n_ctx)
    fixed, slope = total_bits(0, 0, n_ctx, window, sinks), total_bits(1, 1, n_ctx, window, sinks) - total_bits(0, 0, n_ctx, window, sinks)
    share = 0.998  # scratch
    bits = (8 * (mib * 2**20 * share - tables) / elements - fixed) / slope
    if bits < LEAST_BITS:
        least = ((fixed + LEAST_BITS * slope) * elements / 8 + tables) / share / 2**20
        raise SettingsError(f"A context of {n_ctx} tokens of {model.name} needs at least {math.ceil(least)} MiB; {mib:g} MiB are not enough.")
    return bits


def table_bytes(model: ModelFile, n_ctx: int) -> int:
    """What the cache keeps beside its pages.

    Their books, and for each key channel its importance (on a GPU twice), two sums of the queries and one more of them as it was after 128, 512,
    2048, ... tokens.
    """
    channels = sum(n * size for n, size in zip(model.n_head_kv, model.head_size_k))
    n_marks = sum(PAGE_CELLS << 2 * i <= n_ctx for i in range(16))
    return 2 * model.served_layers() * (TENSOR_BYTES + TABLE_BYTES * -(-n_ctx // PAGE_CELLS)) + 4 * channels * (4 + n_marks)


def sizes_of_budget(model: ModelFile, mib: float, n_ctx: int, window: int | None, sinks: int | None) -> dict[int, float]:
    """Body bits by window, for the windows that a budget can pay for; only for `window` if one is given.

    Others than the default are a quarter of the context at most, and of what is read to calibrate. Raises SettingsError as `bits_of_budget`.
    """
    sinks = SINKS if sinks is None else sinks
    first = WINDOW if window is None else window
    sizes = {first: min(MOST_BITS, bits_of_budget(model, mib, n_ctx, first, sinks))}
    for larger in WINDOWS if window is None else ():
        if first < larger <= min(n_ctx, model.n_ctx_train or LONGEST, LONGEST) // LONG_IN_WINDOWS:
            with contextlib.suppress(SettingsError):
                sizes[larger] = min(MOST_BITS, bits_of_budget(model, mib, n_ctx, larger, sinks))
    return sizes


TENSOR_BYTES, TABLE_BYTES = 1280, 49  # the books of the keys or the values of a layer, and of each of their pages
LEAST_BITS = 2.25
MOST_BITS = 8.0
