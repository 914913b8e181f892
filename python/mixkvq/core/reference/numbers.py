"""Rounding, rotation and scales in single precision, one rounding per operation."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

HALF_MAX = np.float32(65504)


def to_half(x: ArrayLike) -> NDArray[np.float16]:
    """float32 to float16 as the cache stores it: ties to even, NaN becomes 0, +-65504 at most."""
    x = np.asarray(x, dtype=np.float32)
    return np.clip(np.where(np.isnan(x), np.float32(0), x), -HALF_MAX, HALF_MAX).astype(np.float16)


def rotate(x: NDArray[Any], block: int) -> NDArray[Any]:
    """The normalised Walsh-Hadamard transform of the last axis, in blocks of `block`; it is its own inverse.

    x: float32 or float64 [..., D]; `block` is a power of two that divides D. The result has the type of x.
    The order of the additions is part of the format. Raises ValueError on another type or block.
    """
    x = np.asarray(x)
    if x.dtype not in (np.float32, np.float64):
        raise ValueError(f"x has type {x.dtype}, but it must be float32 or float64.")
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"block is {block}, but it must be a power of two that divides {x.shape[-1]}.")
    shape = x.shape
    half = 1
    while half < block:
        pairs = x.reshape(-1, 2, half)
        a, b = pairs[:, 0], pairs[:, 1]
        x = np.stack([a + b, a - b], axis=1)
        half *= 2
    real = x.dtype.type
    return np.asarray(x.reshape(shape) * (real(1) / np.sqrt(real(block))))


def ranges(x: NDArray[np.float32], valid: NDArray[np.bool_], axis: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Minimum and maximum over the valid elements of an axis, 0 and 0 if there is none."""
    low = np.where(valid, x, np.float32(np.inf)).min(axis=axis)
    high = np.where(valid, x, np.float32(-np.inf)).max(axis=axis)
    none = ~valid.any(axis=axis)
    # Adding 0 turns -0 into +0: which zero a minimum returns must not depend on the order of the comparisons.
    zero = np.float32(0)
    return np.where(none, zero, low) + zero, np.where(none, zero, high) + zero


def quantise(
    x: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32], top: NDArray[np.float32] | np.float32
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Asymmetric codes of x between low and high, 0 to top, and their scale: the one that the end of the range as read back has."""
    first = to_half((high - low) / top)
    end = to_half(low + _codes(high, low, first, top) * first.astype(np.float32)).astype(np.float32)
    scale = to_half((end - low) / top)
    return _codes(x, low, scale, top).astype(np.uint8), scale


def _codes(
    x: NDArray[np.float32], low: NDArray[np.float32], scale: NDArray[np.float16], top: NDArray[np.float32] | np.float32
) -> NDArray[np.float32]:
    code: NDArray[np.float32] = np.clip(np.rint((x - low) * reciprocal(scale)), np.float32(0), top)
    return code


def reciprocal(scale: NDArray[Any]) -> NDArray[np.float32]:
    """1 / scale in float32, 0 where the scale is 0."""
    wide = scale.astype(np.float32)
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)


def half_bytes(parts: list[NDArray[np.float16]]) -> NDArray[np.uint8]:
    """The bytes of halfs, one array behind the other, little-endian."""
    return np.concatenate([p.reshape(-1) for p in parts]).astype("<f2").view(np.uint8)


def halfs(record: NDArray[np.uint8], offset: int, shape: tuple[int, int]) -> NDArray[np.float16]:
    """The halfs at a byte of a record, float16 of that shape."""
    return record[offset : offset + 2 * shape[0] * shape[1]].view("<f2").reshape(shape)


def as_record(sections: list[NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    """The sections one behind the other, uint8 [size], padded with zeros."""
    body = np.concatenate([s.reshape(-1) for s in sections])
    return np.pad(body, (0, size - len(body)))


def sum_of_lanes(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, Dv] -> [n, 1], in the order of eight vector lanes and the tree that adds them up."""
    lanes = np.zeros((len(x), 8), dtype=np.float32)
    for first in range(0, x.shape[1], 8):
        lanes = lanes + x[:, first : first + 8]
    fours = lanes[:, :4] + lanes[:, 4:]
    twos = fours[:, :2] + fours[:, 2:]
    return twos[:, :1] + twos[:, 1:]
