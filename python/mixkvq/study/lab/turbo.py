"""TurboQuant (arXiv 2504.19874): norm in F16, direction rotated at random, each coordinate on the Lloyd-Max levels of a Gaussian.

turbo-N is the variant for least squared error. turbo-prod-N spends one of the N bits of a key on the sign of a random projection of what the
first N - 1 bits miss, which makes scores unbiased; that residual's norm is a second F16 number. turbo-N.5 splits the channels of a page into
a loud and a quiet half with a bit more for the loud one, each rotated by itself, as the paper does with its outlier channels.
`nc` stores a norm that gives the read-back row the length of the original (the correction that implementations for vLLM and llama.cpp use).
The paper uses the exact distribution of a coordinate of a unit vector, which from 64 dimensions on is a Gaussian for all that matters here.
"""

from __future__ import annotations

import math

import numpy as np

from ...core.page import Page
from ._base import Codec, Maker, Options, PageFunction, Rows
from ._tools import HALF, Array, gaussian_levels, half, inverse, nearest, random_rotation, top_channels


def norm(x: Array) -> Array:
    """Euclidean norms of the last axis, [..., 1]."""
    length: Array = np.sqrt(np.einsum("...d,...d->...", x, x))[..., None]
    return length


def coded(x: Array, bits: int, corrected: bool = False) -> Array:
    """Rows [..., D] there and back: `bits` per coordinate and a norm per row."""
    rotation = random_rotation(x.shape[-1])
    root = np.float32(math.sqrt(x.shape[-1]))
    length = norm(x)
    y = nearest(x @ rotation * (root * inverse(length)), gaussian_levels(bits))
    stored = half(length * root * inverse(norm(y)) if corrected else length)
    return np.asarray(y @ rotation.T * (stored / root))


def whole(bits: int, corrected: bool) -> PageFunction:
    """The codec of whole rows; see `coded`."""
    def function(page: Page) -> tuple[Rows, float]:
        x = page.rows
        return coded(x, bits, corrected), x.size * bits + x[..., 0].size * HALF

    return function


def split(bits: int, corrected: bool) -> PageFunction:
    """The loud half of the channels at bits + 1, the quiet one at bits."""

    def function(page: Page) -> tuple[Rows, float]:
        x = page.rows
        n_heads, n_tokens, size = x.shape
        loud = top_channels((x * x).mean(axis=1), size // 2)
        out = np.empty_like(x)
        for head in range(n_heads):
            for channels, b in ((loud[head], bits + 1), (~loud[head], bits)):
                out[head][:, channels] = coded(np.ascontiguousarray(x[head][:, channels]), b, corrected)
        return out, n_heads * (n_tokens * (size * (bits + 0.5) + 2 * HALF) + size)  # a bit per channel says which half

    return function


def unbiased(bits: int) -> PageFunction:
    """bits - 1 for the row, one for the sign of a Gaussian projection of what is left."""

    def function(page: Page) -> tuple[Rows, float]:
        x = page.rows
        size = x.shape[-1]
        first = coded(x, bits - 1)
        left = x - first
        projection = np.random.default_rng([1, size]).standard_normal((size, size)).astype(np.float32)
        sign = np.where(left @ projection.T >= 0, np.float32(1), np.float32(-1))
        factor = np.float32(math.sqrt(math.pi / 2) / size)
        return first + sign @ projection * (factor * half(norm(left))), x.size * bits + x[..., 0].size * 2 * HALF

    return function


def _maker(bits: float, product: bool = False) -> Maker:
    def make(name: str, options: Options) -> Codec:
        corrected = not product and options.flag("nc")
        part = split(int(bits), corrected) if bits % 1 else whole(int(bits), corrected)
        if product:
            what = f"unbiased {bits}-bit keys (one bit for the residual), {bits}-bit values"
            return Codec(name, f"TurboQuant: {what}", unbiased(int(bits)), part, window=0, sinks=0)
        what = "the louder half of the channels a bit more than the other" if bits % 1 else f"{bits} bits"
        return Codec(name, f"TurboQuant: random rotation, Lloyd-Max levels, {what}", part, part, window=0, sinks=0)

    return make


MAKERS: dict[str, Maker] = {f"turbo-{_bits}": _maker(_bits) for _bits in (2, 2.5, 3, 3.5, 4)}
MAKERS |= {f"turbo-prod-{_bits}": _maker(_bits, product=True) for _bits in (2, 3, 4)}
