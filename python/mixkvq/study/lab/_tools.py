"""The building blocks of codecs: rounding to F16, rotations, scalar quantisers. All work on float32 arrays of any leading shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.reference import GAUSSIAN_STEP, to_half

Array = NDArray[np.float32]

HALF = 16
"""Bits of a scale, a minimum, a norm or a mean."""

UNIFORM_STEP: dict[int, float] = {1: 1.5958, **{bits: float(step) for bits, step in GAUSSIAN_STEP.items()}, 5: 0.1881, 6: 0.1041}
"""Best step of a uniform quantiser for a unit Gaussian, by bits (J. Max, 1960)."""


def half(x: Any) -> Array:
    """Rounded to F16, as metadata is stored."""
    return to_half(x).astype(np.float32)


def inverse(x: Array) -> Array:
    """1 / x, and 0 where x is 0."""
    return np.divide(np.float32(1), x, out=np.zeros_like(x), where=x != 0)


# ---- rotations -----------------------------------------------------------------------------------------------------------------------


def power_of_two(size: int) -> int:
    """The largest power of two that divides `size`."""
    return size & -size


def hadamard(x: Array, block: int | None = None) -> Array:
    """The normalised Walsh-Hadamard transform of the last axis in blocks; its own inverse. block: the largest possible if None."""
    matrix = _hadamard_matrix(block or power_of_two(x.shape[-1]))
    return np.asarray(x.reshape(-1, len(matrix)) @ matrix).reshape(x.shape)


@lru_cache
def _hadamard_matrix(size: int) -> Array:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(size)).astype(np.float32)


@lru_cache
def random_rotation(size: int, seed: int = 0) -> Array:
    """A random orthogonal matrix, uniformly distributed; the same for the same arguments."""
    q, r = np.linalg.qr(np.random.default_rng([seed, size]).standard_normal((size, size)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


@lru_cache
def random_signs(size: int, seed: int = 0) -> Array:
    """+1 and -1 at random; the same for the same arguments."""
    return np.random.default_rng([seed, size]).choice(np.array([-1, 1], np.float32), size)


# ---- scalar quantisers ---------------------------------------------------------------------------------------------------------------


def between(x: Array, low: Any, high: Any, bits: Any) -> Array:
    """Asymmetric codes of x between low and high, read back, with scale and minimum in F16. bits: a number, or an array that fits x."""
    low, top, scale = _grid(low, high, bits)
    return np.asarray(low + code_on(x, low, scale, top) * scale)


def code_on(x: Array, low: Any, scale: Any, top: Any) -> Array:
    code: Array = np.clip(np.rint((x - low) * inverse(scale)), np.float32(0), top)
    return code


def _grid(low: Any, high: Any, bits: Any) -> tuple[Array, Array, Array]:
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    top = np.exp2(np.asarray(bits, np.float32)) - np.float32(1)
    return half(low), top, half((high - low) / top)


def between_twice(x: Array, low: Any, high: Any, bits: Any) -> Array:
    """As `between`, with the scale that what reads back has, too: see docs/format.md, "Packing again"."""
    return between(x, low, half(between(high, low, high, bits)), bits)


def min_max(x: Array, bits: Any, axis: int, clip: float = 1.0, read: Callable[[Array, Any, Any, Any], Array] = between) -> Array:
    """x with a minimum and a scale for everything that lies along `axis`. clip: the quantile that the range ends at, on both sides."""
    if clip < 1:
        low, high = np.quantile(x, [1 - clip, clip], axis=axis, keepdims=True)
        return read(x, low, high, bits)
    return read(x, x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True), bits)


def min_max_tokens(x: Array, bits: Any, group: int) -> Array:
    """Rows [..., tokens, D] with a minimum and a scale per channel and `group` tokens. bits: a number, or an array [..., 1, 1, D]."""
    return min_max(by_tokens(x, group), bits, axis=-2).reshape(x.shape)


def min_max_dims(x: Array, bits: int, group: int, clip: float = 1.0, read: Callable[[Array, Any, Any, Any], Array] = between) -> Array:
    """Rows [..., D] with a minimum and a scale per `group` dimensions; the last group may be shorter."""
    size = x.shape[-1]
    if size % group == 0:
        return min_max(x.reshape(*x.shape[:-1], -1, group), bits, -1, clip, read).reshape(x.shape)
    return np.concatenate([min_max(x[..., d : d + group], bits, -1, clip, read) for d in range(0, size, group)], axis=-1)


def by_tokens(x: Array, group: int) -> Array:
    """[..., tokens, D] -> [..., groups, group, D]."""
    return x.reshape(*x.shape[:-2], -1, group, x.shape[-1])


def mid_rise(y: Array, scale: Any, bits: int) -> Array:
    """Symmetric uniform codes without a zero, as whole steps and a half: multiply by the scale to read them back."""
    most = np.float32(2 ** (bits - 1))
    middle: Array = np.clip(np.floor(y * inverse(scale)), -most, most - 1) + np.float32(0.5)
    return middle


@lru_cache
def gaussian_levels(bits: int) -> Array:
    """The Lloyd-Max levels for a unit Gaussian, rising: float32 [2^bits]. Made for up to 6 bits."""
    n = 2**bits
    levels = np.linspace(-2.5, 2.5, n) if n > 2 else np.array([-1.0, 1.0])
    for _ in range(20 * n):  # each level becomes the mean of what is nearest to it, until that changes nothing
        edges = (levels[1:] + levels[:-1]) / 2
        density = np.concatenate([[0], np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi), [0]])
        below = np.array([0, *(0.5 * math.erfc(-e / math.sqrt(2)) for e in edges), 1])
        levels = -np.diff(density) / np.diff(below)
    return levels.astype(np.float32)


def nearest(x: Array, levels: Array) -> Array:
    """Each number replaced by the nearest level."""
    code = np.zeros(x.shape, dtype=np.uint8)
    for edge in (levels[1:] + levels[:-1]) / 2:
        code += x > edge
    return levels[code]


# ---- channels ------------------------------------------------------------------------------------------------------------------------


def top_channels(score: NDArray[Any], n: int) -> NDArray[np.bool_]:
    """[n_heads, D] -> the n highest of every head as a mask; equal ones by their index."""
    mask = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-score, axis=-1, kind="stable")[..., :n], True, axis=-1)
    return mask
