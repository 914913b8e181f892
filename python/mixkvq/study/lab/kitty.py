"""Kitty (arXiv 2511.18643): 2-bit pages whose loudest key channels get 4 bits.

In each page of 128 tokens the key channels with the largest mean magnitude are promoted, 1/8 of them (Kitty) or 1/4 (Kitty-Pro). Keys have a
minimum and a scale per channel, values per token and 128 dimensions; 32 first and 128 recent tokens stay in full precision.
"""

from __future__ import annotations

import numpy as np

from ...core.page import Page
from . import kivi
from ._base import Codec, Maker, PageFunction, Rows, fixed
from ._tools import HALF, min_max_tokens, top_channels

GROUP = 128
LOW, HIGH = 2, 4


def keys(share: float) -> PageFunction:
    """share: of the channels that get 4 bits."""

    def function(page: Page) -> tuple[Rows, float]:
        x = page.rows
        n_heads, n_tokens, size = x.shape
        n_promoted = int(share * size)
        promoted = top_channels(np.abs(x).mean(axis=1), n_promoted)
        y = min_max_tokens(x, np.where(promoted, HIGH, LOW)[:, None, None], GROUP)
        which = 8 * n_promoted  # a byte names each promoted channel
        return y, n_heads * (n_tokens * (LOW * size + (HIGH - LOW) * n_promoted) + 2 * HALF * size + which)

    return function


MAKERS: dict[str, Maker] = {}
for _percent in ("12.5", "25"):
    _name = f"kitty-{_percent}"
    MAKERS[_name] = fixed(
        Codec(
            _name,
            f"Kitty: {_percent} % of the key channels at 4 bits, the rest and the values at 2",
            keys(float(_percent) / 100),
            kivi.values(LOW, GROUP),
            window=128,
            sinks=32,
        )
    )
