"""The setting of the MixKVQ paper (arXiv 2512.19206): key channels at 16, 4 or 2 bits by thresholds on their salience.

Salience is A_d = I_d * S_d (section 3.2): mean |q_d| times the 2-bit step of the channel's range over the page, both after RoPE. Above t16 a
channel stays BF16, above t4 it gets 4 bits, else 2. Keys have a minimum and a scale per channel and 32 tokens, values (2 bits) per token and
32 dimensions; the last 128 tokens are in full precision. The paper's `effective bits` count codes only; what we report counts everything.
The thresholds depend on the unit of q and k, so those of one model mean little for another: `relative` divides the salience by its mean over
the channels of the head. `q16` and `q4` give shares of channels in place of thresholds.
"""

from __future__ import annotations

import numpy as np

from ...core.page import Page
from . import kivi
from ._base import Codec, Maker, Options, PageFunction, Rows
from ._tools import HALF, Array, min_max_tokens

GROUP = 32
TIER_BITS = 2  # which of three tiers a channel is in


def bfloat16(x: Array) -> Array:
    """Rounded to BF16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)


def keys(t16: float, t4: float, relative: bool, shares: tuple[float, float] | None) -> PageFunction:
    """The codec of keys: 16, 4 or 2 bits by salience (section 3.2), by thresholds or by shares of the channels."""
    def function(page: Page) -> tuple[Rows, float]:
        x = page.rows
        assert page.q_abs is not None
        salience = page.q_abs * (x.max(axis=1) - x.min(axis=1)) / np.float32(3)
        if shares is not None:
            rank = np.argsort(np.argsort(-salience, axis=1, kind="stable"), axis=1) / salience.shape[1]
            sixteen, four = rank < shares[0], rank < shares[0] + shares[1]
        else:
            if relative:
                salience = salience / np.maximum(salience.mean(axis=1, keepdims=True), 1e-30)
            sixteen, four = salience > t16, salience > t4
        y = min_max_tokens(x, np.where(four, 4, 2)[:, None, None], GROUP)
        y = np.where(sixteen[:, None], bfloat16(x), y)
        of_channel = np.where(sixteen, 16, np.where(four, 4, 2) + 2 * HALF / GROUP)
        return y, x.shape[1] * float(of_channel.sum()) + TIER_BITS * salience.size

    return function


def make(name: str, options: Options) -> Codec:
    """The codec `paper` with its options. Raises SettingsError for what does not go together."""
    t16, t4 = options.number("t16", 1.44, 0, 1e9), options.number("t4", 0.79, 0, 1e9)
    relative = options.flag("relative")
    by_share = options.has("q16") or options.has("q4")
    shares = options.number("q16", 0, 0, 1), options.number("q4", 0, 0, 1)
    if by_share and (relative or options.has("t16") or options.has("t4")):
        raise options.fail("channels are chosen by thresholds (t16, t4, relative) or by shares (q16, q4), not by both")
    what = f"{shares[0]:.1%} and {shares[1]:.1%} of the channels" if by_share else f"salience above {t16:g} and {t4:g}"
    part = keys(t16, t4, relative, shares if by_share else None)
    return Codec(name, f"MixKVQ paper: keys at 16 and 4 bits ({what}) or 2, groups of 32", part, kivi.values(2), window=128, sinks=0)


MAKERS: dict[str, Maker] = {"paper": make}
