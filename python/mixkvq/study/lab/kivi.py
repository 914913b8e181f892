"""KIVI (arXiv 2402.02750): keys per channel, values per token, min-max in groups of 32, the last 128 tokens in full precision."""

from __future__ import annotations

from ...core.page import Page
from ._base import Codec, Maker, PageFunction, Rows, fixed
from ._tools import HALF, min_max_dims, min_max_tokens

GROUP = 32
RESIDUAL = 128


def keys(bits: int, group: int = GROUP) -> PageFunction:
    """A minimum and a scale per channel and `group` tokens."""

    def function(page: Page) -> tuple[Rows, float]:
        return min_max_tokens(page.rows, bits, group), page.rows.size * (bits + 2 * HALF / group)

    return function


def values(bits: int, group: int = GROUP) -> PageFunction:
    """A minimum and a scale per token and `group` dimensions."""

    def function(page: Page) -> tuple[Rows, float]:
        x = page.rows
        n_groups = -(-x.shape[-1] // group)
        return min_max_dims(x, bits, group), x.size * bits + x[..., 0].size * n_groups * 2 * HALF

    return function


MAKERS: dict[str, Maker] = {}
for _bits in (2, 3, 4):
    _name = f"kivi-{_bits}"
    MAKERS[_name] = fixed(
        Codec(_name, f"KIVI: {_bits}-bit keys per channel, values per token, groups of 32", keys(_bits), values(_bits), window=RESIDUAL, sinks=0)
    )
