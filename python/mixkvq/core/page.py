"""What a page codec gets: the argument `codec` of `bridge.Llama`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Page:
    """128 consecutive cells of the keys or the values of one layer, all heads, at the moment when MixKVQ would pack them.

    The arrays are read-only copies of the cache's, float32; D is the head size.

    Attributes:
        layer: index of the layer in the model.
        is_value: values, else keys (after RoPE).
        stream: of the cache, 0 unless the context has several.
        first_cell: of the page, a multiple of 128. The cell is the token's position as long as nothing was removed or shifted.
        rows: [n_heads, 128, D]; zeros where there is no token.
        valid: bool [128], which cells hold a token. What a codec returns for the others is not looked at.
        q_abs: keys: [n_heads, D], mean |q_d| of the queries that have read this head (I_d of the paper, section 3.2); old ones fade, ones before
            the first. Values: None.
        q_sqr: keys: [n_heads, D], mean q_d^2 of the same queries. Values: None.
    """

    layer: int
    is_value: bool
    stream: int
    first_cell: int
    rows: NDArray[np.float32]
    valid: NDArray[np.bool_]
    q_abs: NDArray[np.float32] | None
    q_sqr: NDArray[np.float32] | None


# Returns the rows as a format would read them back (array-like, the shape of page.rows, kept in F16) and the bits that it takes for the whole page.
Codec = Callable[[Page], tuple[Any, float]]
