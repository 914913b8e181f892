"""The page format and the attention over it, in NumPy: docs/format.md as code.

The C++ kernels must give the same bytes as this module, so the packing below is IEEE single precision with
one rounding per operation, in the order the specification states. Attention is float64: it is the truth that
the kernels are measured against.

    key_format = KeyFormat(128, tiers=(4, 0, 28, 0, 96))
    record = pack_keys(key_format, rows, importance)      # rows: float16 [128 cells, 128 channels]
    rows = unpack_keys(key_format, record)

"Section" and "paper" refer to MixKVQ, arXiv 2512.19206.
"""

from __future__ import annotations

from .attention import attend
from .formats import KEY_BITS, KEY_LANES, PAGE_CELLS, QUAD, RECORD_ALIGN, KeyFormat, ValueFormat, body_bits
from .keys import pack_keys, select_tiers, unpack_keys
from .numbers import HALF_MAX, rotate, sum_of_lanes, to_half
from .values import GAUSSIAN_STEP, LEAST_MEAN, pack_mean, pack_scale, pack_values, unpack_mean, unpack_scale, unpack_values

__all__ = [
    "GAUSSIAN_STEP",
    "HALF_MAX",
    "KEY_BITS",
    "KEY_LANES",
    "LEAST_MEAN",
    "PAGE_CELLS",
    "QUAD",
    "RECORD_ALIGN",
    "KeyFormat",
    "ValueFormat",
    "attend",
    "body_bits",
    "pack_keys",
    "pack_mean",
    "pack_scale",
    "pack_values",
    "rotate",
    "select_tiers",
    "sum_of_lanes",
    "to_half",
    "unpack_keys",
    "unpack_mean",
    "unpack_scale",
    "unpack_values",
]
