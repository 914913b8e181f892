"""Round to nearest between a minimum and a maximum, the simplest quantiser: what every other method has to beat; and no quantiser at all."""

from __future__ import annotations

from ...core.page import Page
from ._base import Codec, Maker, PageFunction, Rows, fixed
from ._tools import HALF, hadamard, min_max_dims

GROUP = 32


def rounded(bits: int, rotated: bool = False) -> PageFunction:
    """A minimum and a scale per token and 32 dimensions, after a Hadamard rotation of the head if `rotated`."""

    def function(page: Page) -> tuple[Rows, float]:
        x = hadamard(page.rows) if rotated else page.rows
        y = min_max_dims(x, bits, GROUP)
        n_groups = -(-x.shape[-1] // GROUP)
        return hadamard(y) if rotated else y, x.size * bits + x[..., 0].size * n_groups * 2 * HALF

    return function


def untouched(page: Page) -> tuple[Rows, float]:
    """Rows as they are, at 16 bits."""
    return page.rows, 16.0 * page.rows.size


MAKERS: dict[str, Maker] = {"f16": fixed(Codec("f16", "as it is; f16/NAME and NAME/f16 quantise values or keys alone", untouched, untouched))}
for _suffix, _rotated, _widths in (("", False, range(2, 9)), ("-rot", True, range(2, 5))):
    for _bits in _widths:
        _name = f"rtn{_suffix}-{_bits}"
        _what = f"{_bits}-bit min-max per token and 32 dimensions" + (", Hadamard-rotated" if _rotated else "")
        MAKERS[_name] = fixed(Codec(_name, _what, rounded(_bits, _rotated), rounded(_bits, _rotated)))
