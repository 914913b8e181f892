"""llama.cpp's cache types as codecs, so that they can be compared with the same window and sinks as everybody else.

The block formats of ggml: 32 numbers share an F16 scale d. q4_0 and q5_0 scale by the number that is largest in magnitude, with its sign,
so that it falls on the lowest code; q8_0 scales by its magnitude. llama.cpp rotates what it quantises: keys by the largest Hadamard matrix
that divides the head, values by blocks of 64. The only difference to the real thing is that the rows have been through F16 before.
"""

from __future__ import annotations

import numpy as np

from ...core.errors import SettingsError
from ...core.page import Page
from ._base import Codec, Maker, PageFunction, Rows, fixed
from ._tools import HALF, Array, hadamard, half, inverse

BLOCK = 32
ROTATED_FROM = 64  # llama.cpp rotates heads whose size is a multiple of this


def signed_blocks(x: Array, bits: int) -> Array:
    """q4_0 or q5_0, there and back. x: [..., 32]."""
    half_range = 2 ** (bits - 1)
    loudest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    d = loudest / np.float32(-half_range)
    # ggml adds 8.5 (16.5) and truncates; compilers fuse the product and the sum, so the sum is not rounded twice.
    code = np.trunc(x.astype(np.float64) * inverse(d) + (half_range + 0.5))
    rows: Array = ((np.clip(code, 0, 2 * half_range - 1) - half_range) * half(d)).astype(np.float32)
    return rows


def byte_blocks(x: Array) -> Array:
    """q8_0, there and back. x: [..., 32]."""
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = x * inverse(d)
    return np.asarray(np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled) * half(d))


def blocks(bits: int, rotation: int | None) -> PageFunction:
    """rotation: size of the Hadamard blocks; 0 for the largest; None for no rotation."""

    def function(page: Page) -> tuple[Rows, float]:
        x = page.rows
        if x.shape[-1] % BLOCK:
            raise SettingsError(f"llama.cpp's cache types need head sizes that are a multiple of {BLOCK}, not {x.shape[-1]}.")
        rotated = rotation is not None and x.shape[-1] % ROTATED_FROM == 0
        y = hadamard(x, rotation) if rotated else x
        in_blocks = y.reshape(-1, BLOCK)
        y = (byte_blocks(in_blocks) if bits == 8 else signed_blocks(in_blocks, bits)).reshape(x.shape)
        return hadamard(y, rotation) if rotated else y, x.size * (bits + HALF / BLOCK)

    return function


MAKERS: dict[str, Maker] = {}
for _bits in (4, 5, 8):
    MAKERS[f"q{_bits}_0"] = fixed(
        Codec(f"q{_bits}_0", f"llama.cpp's q{_bits}_0 without its rotation", blocks(_bits, None), blocks(_bits, None), window=0, sinks=0)
    )
    MAKERS[f"q{_bits}_0-rot"] = fixed(
        Codec(f"q{_bits}_0-rot", f"llama.cpp's q{_bits}_0 with its rotation", blocks(_bits, 0), blocks(_bits, ROTATED_FROM), window=0, sinks=0)
    )
