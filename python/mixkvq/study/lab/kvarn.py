"""KVarN (arXiv 2606.03458): a Hadamard rotation, then tokens and channels of a 128-token tile are scaled to equal variance, then min-max codes.

The scales of both axes come from alternating normalisation (16 rounds; of all rounds the one with the least imbalance counts). Keys then get
a minimum and a scale per channel, values per token; these absorb the variance scale of their axis, so a tile stores three F16 vectors.
The published kernels do not let a variance scale fall below exp(-0.3), which leaves tiles of small numbers as they are; `floor` does the same,
without it the method does not depend on the unit of the rows. The published cache keeps the first 128 tokens in F16.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ...core.page import Page
from ._base import Codec, Maker, Options, PageFunction, Rows
from ._tools import HALF, Array, hadamard, half, min_max

ROUNDS = 16
FLOOR = math.exp(-0.3)


def balance(x: Array, floor: float = 0.0) -> tuple[Array, Array, Array]:
    """Scales that give rows [n, tokens, D] about unit variance along both axes: float32 [n, 1, 1], [n, tokens, 1] and [n, 1, D].

    Divide by all three. The first is the deviation of the tile, so the others are near 1.
    floor: the least value that a scale may have; the first is 1 then.
    """
    tile = x.astype(np.float64)
    unit = np.ones((len(tile), 1, 1))
    if not floor:
        unit = np.maximum(tile.std(axis=(1, 2), keepdims=True), 1e-30)
        tile /= unit
    # Means and mean squares of the scaled tile are products of the tile with the inverse scales: the scaled tile itself is never made.
    square = tile * tile
    n, n_tokens, size = tile.shape
    token, channel = np.ones((n, n_tokens)), np.ones((n, size))

    def deviation(axis: str) -> NDArray[np.float64]:
        own, other, product = (token, channel, "ntd,nd->nt") if axis == "token" else (channel, token, "ntd,nt->nd")
        mean = np.einsum(product, tile, 1 / other) / other.shape[1]
        mean_square = np.einsum(product, square, 1 / other**2) / other.shape[1]
        found: NDArray[np.float64] = np.sqrt(np.maximum(mean_square - mean**2, 0)) / own
        return found

    def grown(scale: NDArray[np.float64], by: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(scale * np.clip(by, 1e-3, 1e3), floor or 1e-3, math.exp(10))

    def imbalance(deviations: tuple[NDArray[np.float64], NDArray[np.float64]]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.sum([d.max(axis=1) / np.maximum(d.min(axis=1), 1e-8) for d in deviations], axis=0)
        return found

    of_channel = deviation("channel")
    least, best = imbalance((deviation("token"), of_channel)), (token, channel)
    for _ in range(ROUNDS):
        channel = grown(channel, of_channel)
        token = grown(token, deviation("token"))
        of_channel = deviation("channel")
        now = imbalance((deviation("token"), of_channel))
        better = (now <= least)[:, None]
        best = (np.where(better, token, best[0]), np.where(better, channel, best[1]))
        least = np.minimum(now, least)
    return unit.astype(np.float32), best[0][:, :, None].astype(np.float32), best[1][:, None, :].astype(np.float32)


def tile(bits: int, is_value: bool, floor: float) -> PageFunction:
    """The codec of keys or of values: rotated, balanced over tokens and channels, then rounded to `bits`."""
    def function(page: Page) -> tuple[Rows, float]:
        x = page.rows
        n_heads, n_tokens, size = x.shape
        y = hadamard(x)
        _, token, channel = balance(y, floor)
        # The axis with minimum and scale absorbs its variance scale, so only the other one's is stored by itself.
        other = half(channel if is_value else token)
        y = min_max(y / other, bits, axis=2 if is_value else 1) * other
        halfs = 2 * n_tokens + size if is_value else n_tokens + 2 * size
        return hadamard(y), n_heads * (n_tokens * size * bits + HALF * halfs)

    return function


def _maker(key_bits: int, value_bits: int) -> Maker:
    def make(name: str, options: Options) -> Codec:
        floor = FLOOR if options.flag("floor") else 0.0
        what = f"KVarN: Hadamard, both axes scaled to unit variance, {key_bits}-bit keys, {value_bits}-bit values"
        return Codec(name, what, tile(key_bits, False, floor), tile(value_bits, True, floor), window=0, sinks=128)

    return make


MAKERS: dict[str, Maker] = {f"kvarn-{_bits}": _maker(_bits, _bits) for _bits in (2, 3, 4)}
MAKERS["kvarn-4-2"] = _maker(4, 2)  # the preset that its authors ship (k4v2_g128)
