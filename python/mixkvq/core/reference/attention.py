"""Attention over records in float64: the truth that the kernels are measured against."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import check_reals
from .formats import PAGE_CELLS, KeyFormat, ValueFormat
from .keys import decode_keys
from .numbers import rotate
from .values import decode_values


def attend(
    key_format: KeyFormat,
    value_format: ValueFormat,
    key_records: NDArray[np.uint8],
    value_records: NDArray[np.uint8],
    q: ArrayLike,
    mask: ArrayLike | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    sink: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """softmax(q K^T) V over what the records hold, in float64 and without the final float16 rounding.

    key_records, value_records: uint8 [P, record_bytes].  q: [n, D].
    mask: [n, P * 128], added to the logits; -inf hides a cell. Cells that hold no token must be hidden: a
        record does not tell which they are.
    scale: factor of the logits before the cap; models use 1 / sqrt(D).
    softcap: if above 0, logits become softcap * tanh(logit / softcap) before the mask is added.
    sink: [n], logits that join the denominator of the softmax but have no value.
    Returns float64 [n, Dv], 0 where a query sees no cell.
    Raises ValueError if a shape, a type or a number is not as stated.
    """
    n_pages = len(key_records)
    if len(value_records) != n_pages:
        raise ValueError(f"value_records has {len(value_records)} pages, but key_records has {n_pages}.")
    n_cells = n_pages * PAGE_CELLS
    q = check_reals("q", q, (None, key_format.head_size))
    mask = np.zeros((len(q), n_cells)) if mask is None else check_reals("mask", mask, (len(q), n_cells), hides=True)
    sink = np.full(len(q), -np.inf) if sink is None else check_reals("sink", sink, (len(q),), hides=True)
    if not np.isfinite(scale):
        raise ValueError(f"scale is {scale}, but it must be finite.")
    if not (np.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap is {softcap}, but it must be finite and not negative.")

    keys = np.zeros((n_cells, key_format.head_size))
    values = np.zeros((n_cells, value_format.head_size))
    for p in range(n_pages):
        cells = slice(p * PAGE_CELLS, (p + 1) * PAGE_CELLS)
        keys[cells] = decode_keys(key_format, key_records[p], np.float64)
        values[cells] = decode_values(value_format, value_records[p], np.float64)

    logits = q @ keys.T * scale
    if softcap > 0:
        logits = softcap * np.tanh(logits / softcap)
    logits = logits + mask

    peak = np.maximum(logits.max(axis=1, initial=-np.inf), sink)
    peak = np.where(np.isfinite(peak), peak, 0)  # a query without cell or sink: every weight is exp(-inf) = 0
    weights = np.exp(logits - peak[:, None])
    total = (weights.sum(axis=1) + np.exp(sink - peak))[:, None]
    out = np.divide(weights @ values, total, out=np.zeros((len(q), value_format.head_size)), where=total > 0)
    # Attention is linear in the values, so one rotation of the output undoes that of all of them.
    return rotate(out, value_format.rotation_block) if value_format.rotated else out
