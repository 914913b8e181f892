"""What arguments must be; every refusal names the argument and the numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .formats import PAGE_CELLS


def check_rows(head_size: int, rows: NDArray[np.float16], valid: NDArray[np.bool_] | None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The rows as float32 with 0 in the cells that are not valid, and the mask."""
    _check_array("rows", rows, np.float16, (PAGE_CELLS, head_size))
    if valid is None:
        valid = np.ones(PAGE_CELLS, dtype=bool)
    _check_array("valid", valid, np.bool_, (PAGE_CELLS,))
    x = np.where(valid[:, None], rows, np.float16(0)).astype(np.float32)
    if not np.isfinite(x).all():
        cell, channel = np.argwhere(~np.isfinite(x))[0]
        raise ValueError(f"rows[{cell}, {channel}] is {x[cell, channel]}, but rows must be finite.")
    return x, valid


def check_importance(head_size: int, importance: ArrayLike) -> NDArray[np.float32]:
    """As float32 [head_size]. Raises ValueError unless it is that, finite and not negative."""
    importance = np.asarray(importance)
    if importance.dtype.kind not in "fiu" or importance.shape != (head_size,):
        raise ValueError(f"importance has type {importance.dtype} and shape {importance.shape}, but it must be float32 ({head_size},).")
    importance = importance.astype(np.float32)
    wrong = np.flatnonzero(~(np.isfinite(importance) & (importance >= 0)))
    if len(wrong):
        wrong_one = f"importance[{wrong[0]}] is {importance[wrong[0]]}"
        raise ValueError(f"{wrong_one}, but it must be finite and not negative.")
    return importance


def check_record(size: int, record: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The record, contiguous. Raises ValueError unless it is uint8 [size]."""
    _check_array("record", record, np.uint8, (size,))
    return np.ascontiguousarray(record)


def _check_array(name: str, array: object, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is a {type(array).__name__}, but it must be an array.")
    if array.dtype != dtype or array.shape != shape:
        want = f"{np.dtype(dtype)} {shape}"
        raise ValueError(f"{name} has type {array.dtype} and shape {array.shape}, but it must be {want}.")


def check_reals(name: str, x: ArrayLike, shape: tuple[int | None, ...], hides: bool = False) -> NDArray[np.float64]:
    """As float64; None in `shape` stands for any length. `hides` allows -inf."""
    x = np.asarray(x)
    fits = x.ndim == len(shape) and all(want in (None, n) for n, want in zip(x.shape, shape, strict=True))
    if x.dtype.kind not in "fiu" or not fits:
        wanted = ", ".join("n" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has type {x.dtype} and shape {x.shape}, but it must be numbers [{wanted}].")
    x = x.astype(np.float64)
    wrong = x[~(np.isfinite(x) | (hides & (x == -np.inf)))]
    if len(wrong):
        raise ValueError(f"{name} holds {wrong[0]}, but it must be finite{' or -inf' if hides else ''}.")
    return x
