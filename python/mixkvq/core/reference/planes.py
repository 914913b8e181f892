"""Codes as bits: a plane holds `width` bits of every code, 8 / width codes to a byte.

Each function names its axes: i counts runs of tokens, s the codes within a byte, r the four of a quad.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .formats import KEY_LANES, PAGE_CELLS, PLANES, QUAD, channel_bytes


def pack_key_codes(code: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[128, channels] -> bytes: quad after quad, each with its planes one behind the other."""
    n_quads = code.shape[1] // QUAD
    planes = []
    for width, part in _split(code, bits):
        per = 8 // width
        runs = PAGE_CELLS // (per * KEY_LANES)
        axes = part.reshape(runs, per, KEY_LANES, n_quads, QUAD)  # i, s, lane, quad, r
        byte = _merge_shifts(axes.transpose(3, 0, 2, 4, 1), width)
        planes.append(byte.reshape(n_quads, QUAD * channel_bytes(width)))
    return np.concatenate(planes, axis=1).reshape(-1)


def unpack_key_codes(section: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack_key_codes`: bytes -> [128, channels]."""
    quads = section.reshape(-1, QUAD * channel_bytes(bits))
    parts, first = [], 0
    for width in PLANES[bits]:
        size = QUAD * channel_bytes(width)
        runs = size // (KEY_LANES * QUAD)
        axes = quads[:, first : first + size].reshape(len(quads), runs, KEY_LANES, QUAD)  # quad, i, lane, r
        first += size
        parts.append(_split_shifts(axes, width).transpose(1, 4, 2, 0, 3).reshape(PAGE_CELLS, -1))
    return _join(parts, bits)


def pack_value_codes(code: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[128, Dv] -> bytes: plane after plane."""
    planes = []
    for width, part in _split(code, bits):
        axes = part.reshape(-1, 8 // width, QUAD, code.shape[1])  # i, s, r, d
        planes.append(_merge_shifts(axes.transpose(0, 3, 2, 1), width).reshape(-1))
    return np.concatenate(planes)


def unpack_value_codes(section: NDArray[np.uint8], bits: int, head_size: int) -> NDArray[np.uint8]:
    """The inverse of `pack_value_codes`: bytes -> [128, Dv]."""
    parts, first = [], 0
    for width in PLANES[bits]:
        size = head_size * channel_bytes(width)
        axes = section[first : first + size].reshape(-1, head_size, QUAD)  # i, d, r
        first += size
        parts.append(_split_shifts(axes, width).transpose(0, 3, 2, 1).reshape(PAGE_CELLS, head_size))
    return _join(parts, bits)


def _split(code: NDArray[np.uint8], bits: int) -> list[tuple[int, NDArray[np.uint8]]]:
    """Width and content of every plane of the codes."""
    parts, shift = [], 0
    for width in PLANES[bits]:
        parts.append((width, code >> np.uint8(shift) & np.uint8(2**width - 1)))
        shift += width
    return parts


def _join(parts: list[NDArray[np.uint8]], bits: int) -> NDArray[np.uint8]:
    code: NDArray[np.uint8] = np.zeros_like(parts[0])
    shift = 0
    for width, part in zip(PLANES[bits], parts, strict=True):
        code |= part << np.uint8(shift)
        shift += width
    return code


def _merge_shifts(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """[..., 8 / width] codes -> [...] bytes."""
    byte = np.zeros(codes.shape[:-1], dtype=np.uint8)
    for s in range(codes.shape[-1]):
        byte |= codes[..., s] << np.uint8(width * s)
    return byte


def _split_shifts(byte: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """[...] bytes -> [..., 8 / width] codes."""
    return byte[..., None] >> np.arange(0, 8, width, dtype=np.uint8) & np.uint8(2**width - 1)
