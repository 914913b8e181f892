"""Values: rotated with a mean per dimension and a scale per token, or in groups of dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checks import check_record, check_rows
from .formats import PAGE_CELLS, ValueFormat
from .numbers import as_record, half_bytes, halfs, quantise, ranges, reciprocal, rotate, sum_of_lanes, to_half
from .planes import pack_value_codes, unpack_value_codes

GAUSSIAN_STEP = {2: np.float32(0.9957), 3: np.float32(0.5860), 4: np.float32(0.3352)}
"""Best uniform quantiser step for a unit Gaussian, by bits."""

# How rotated rows that come from a record are told from others, and what is read off them.
LEAST_MEAN = np.float32(2**-4)  # smaller means, beside the root mean square of the rows, are 0
SAMPLE, SAMPLE_DIMS = 8, 32  # rows of a page that are looked at first, and how far
SAMPLE_ORDER = [t % 8 * 16 + t // 8 for t in range(PAGE_CELLS)]
PHASES = 256
MEAN_ROUNDS = 4
STEPS = [by * sign for by in range(1, 13) for sign in (1, -1)]
SCALES_BELOW, SCALES_ABOVE = 5, {2: 9, 3: 15, 4: 21, 8: 2}
"""Bytes below and above the best scale of what was read back between which its own scale must lie."""


def pack_values(fmt: ValueFormat, rows: NDArray[np.float16], valid: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Packs the values of one head in one page. Rows that `unpack_values` gave are packed to the record that they came from.

    rows: float16 [128, Dv].  valid: bool [128], the cells that hold a token; all of them if None.
    Returns uint8 [fmt.record_bytes]. Raises ValueError if a shape, a type or a number is not as stated.
    """
    x, valid = check_rows(fmt.head_size, rows, valid)
    held = valid[:, None]
    if fmt.rotated:
        y = rotate(x, fmt.rotation_block)
        mean, known = _rotated_mean(fmt, x, y, valid)
        z = y - unpack_mean(mean)
        scale = _rotated_scale(z, fmt.bits)
        if known:
            kept = _kept_scale(z, fmt.bits, fmt.head_size)
            scale = np.where(kept > 0, kept, scale)
        code = _quantise_rotated(z, scale, fmt.bits)
        sections = [np.where(valid, scale, np.uint8(0)), mean]
    else:
        codes, scales, minima = [], [], []
        for dims in _dim_groups(fmt):
            part = x[:, dims]
            low, high = ranges(part, np.ones_like(part, dtype=bool), axis=1)
            code, half_scale = quantise(part, low[:, None], high[:, None], np.float32(2**fmt.bits - 1))
            codes.append(code)
            scales.append(half_scale)
            minima.append(to_half(low)[:, None])
        code = np.concatenate(codes, axis=1)
        sections = [half_bytes([np.where(held, np.concatenate(halfs, axis=1), np.float16(0))]) for halfs in (scales, minima)]
    return as_record([pack_value_codes(np.where(held, code, np.uint8(0)), fmt.bits), *sections], fmt.record_bytes)


def unpack_values(fmt: ValueFormat, record: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Reads a value record back: float16 [128, Dv]. Cells that held no token read as some finite number.

    Raises ValueError if `record` is not uint8 [fmt.record_bytes].
    """
    y = decode_values(fmt, record, np.float32)
    return to_half(rotate(y, fmt.rotation_block) if fmt.rotated else y)


def _rotated_mean(fmt: ValueFormat, x: NDArray[np.float32], y: NDArray[np.float32], valid: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], bool]:
    """The means of rotated rows, a byte for each dimension, and whether the rows come from a record: then they are the means of that one.

    x: float32 [128, Dv], y: the same rotated.
    """
    total, squares = np.zeros((2, fmt.head_size), dtype=np.float32)
    for row in x[valid]:  # in this order
        total = total + row
        squares = squares + row * row
    count = max(int(np.count_nonzero(valid)), 1)
    least = np.sqrt(sum_of_lanes(squares[None])[0, 0] / np.float32(count * fmt.head_size)) * LEAST_MEAN
    exact = rotate(total / np.float32(count), fmt.rotation_block)
    byte = pack_mean(exact)
    large = _no_small_means(exact, byte, least)
    # Small means are mostly 0. At 2 bits steps are so large that they may stay in, and need not be looked for.
    near, own = (large, byte) if fmt.bits > 2 else (byte, np.zeros_like(byte))

    z = y - unpack_mean(near)
    sample = [t for t in SAMPLE_ORDER if valid[t]][:SAMPLE]
    if not sample or 4 * np.count_nonzero(_kept_scale(z[sample], fmt.bits, SAMPLE_DIMS)) < len(sample):
        return large, False
    for _ in range(MEAN_ROUNDS):  # with better means, more rows find their scale
        z = y[valid] - unpack_mean(near)
        scale, before = _kept_scale(z, fmt.bits, fmt.head_size), near
        near, off = _kept_mean(exact, own, near, z, scale, least)
        if np.array_equal(near, before):
            break
    n = np.count_nonzero(scale)
    if 2 * n < count or off > PHASES // 16 * n * fmt.head_size:  # by chance
        return large, False
    return near, True


def _kept_mean(
    mean: NDArray[np.float32],
    own: NDArray[np.uint8],
    near: NDArray[np.uint8],
    z: NDArray[np.float32],
    scale: NDArray[np.uint8],
    least: np.float32,
) -> tuple[NDArray[np.uint8], int]:
    """The means that put rows z [n, Dv], which are rid of the means `near`, on the middles of their steps; only rows with a scale count.

    It is what the rows' distances from the middles say, or, where that leaves them far off or is another byte, 0 or a byte not far from `near` in the
    list of bytes; where `near` is 0, `own` or one not far from it. Where several do, because they are whole steps apart, it is the one next to the
    `mean` of the rows. Beside them how far off that leaves all numbers together, in 256ths of a step.
    """
    z, step = z[scale > 0], unpack_scale(scale[scale > 0])
    inverse = reciprocal(step)
    phase = _phase(z, step)
    total, weight = np.zeros(z.shape[1], dtype=np.float32), np.float32(0)
    for row, w in zip(phase, inverse, strict=True):  # least squares
        total = total + (row.astype(np.float32) + np.float32(0.5)) * w
        weight = weight + w * w
    was = unpack_mean(near)
    exact = was + (total / (weight * np.float32(PHASES)) if weight > 0 else np.float32(0))
    best = _no_small_means(exact, pack_mean(exact), least * np.float32(0.5))

    def off(mean: NDArray[np.uint8]) -> NDArray[np.int32]:
        away = np.clip((unpack_mean(mean) - was) * inverse[:, None], np.float32(-16384), np.float32(16384))
        moved = np.floor(away * np.float32(PHASES) + np.float32(0.5)).astype(np.int32)
        return np.asarray(np.abs(((phase - moved + PHASES // 2) & (PHASES - 1)) - PHASES // 2).sum(axis=0))

    fewest = off(best)
    settled = (fewest <= PHASES // 16 * len(z)) & ((best == near) | (best == 0))
    around = np.where(near == 0, own, near)
    magnitude = (around & 0x7F).astype(np.int32)
    neighbours = ((around & np.uint8(0x80)) | np.clip(magnitude + by, 0, 0x7B).astype(np.uint8) for by in STEPS)
    for byte in (*neighbours, np.where(near == 0, own, np.uint8(0)), np.zeros_like(near)):
        byte = _no_small_means(unpack_mean(byte), byte, least * np.float32(0.5))
        nearer = np.abs(unpack_mean(byte) - mean) < np.abs(unpack_mean(best) - mean)
        better = ~settled & ((off(byte) < fewest - len(z) // 4) | (nearer & (off(byte) <= fewest + len(z) // 4)))
        best, fewest = np.where(better, byte, best), np.where(better, off(byte), fewest)
    return best, int(fewest.sum())


def _kept_scale(z: NDArray[np.float32], bits: int, dims: int) -> NDArray[np.uint8]:
    """For each row of [n, Dv] the scale, as a byte, that puts it on the middles of its steps, judged by the first `dims`; 0 if none does.

    What comes from a record lies within an eighth of a step on the average, other rows a quarter. The first within a 64th is taken.
    """
    guess, peak = _rotated_scale(z, bits).astype(np.int32), np.abs(z).max(axis=1)
    best, fewest = np.zeros(len(z), dtype=np.uint8), np.full(len(z), PHASES // 8 * dims)
    for by in sorted(range(-SCALES_BELOW, SCALES_ABOVE[bits] + 1), key=lambda by: (abs(by), -by)):  # the nearest first
        byte = np.clip(guess + by, 0, 0xF7).astype(np.uint8)
        step = unpack_scale(byte)
        off = np.abs(_phase(z[:, :dims], step)).sum(axis=1)
        fits = (guess + by > 0) & (guess + by <= 0xF7) & (peak * reciprocal(step) <= np.float32(2 ** (bits - 1)))
        better = fits & (off < fewest) & (fewest > PHASES // 64 * dims)
        best, fewest = np.where(better, byte, best), np.where(better, off, fewest)
    return best


def _phase(z: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.int32]:
    """How far each number is from the middle of the step that it is in, in 256ths of a step: -128 to 127."""
    steps: NDArray[np.int32] = np.floor(z * reciprocal(step)[:, None] * np.float32(PHASES)).astype(np.int32)
    return (steps & (PHASES - 1)) - PHASES // 2


def _no_small_means(exact: NDArray[np.float32], byte: NDArray[np.uint8], least: np.float32) -> NDArray[np.uint8]:
    """Means as bytes, 0 for what is smaller than `least` or no more than the sign of 0."""
    return np.where((np.abs(exact) < least) | (byte == 0x80), np.uint8(0), byte)


def pack_mean(mean: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Means as bytes: see `unpack_mean`. To the nearest, ties away from 0."""
    bits = to_half(mean).view(np.uint16).astype(np.int32)
    magnitude = np.minimum((bits & 0x7FFF) + 0x80 >> 8, 0x7B)
    byte: NDArray[np.uint8] = ((bits & 0x8000) >> 8 | magnitude).astype(np.uint8)
    return byte


def unpack_mean(byte: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The upper byte of a half: 5 bits of exponent, 2 of mantissa."""
    return (byte.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)


def pack_scale(scale: NDArray[np.float32], upwards: bool) -> NDArray[np.uint8]:
    """Scales, not negative, as bytes: see `unpack_scale`. To the nearest, ties away from 0, or upwards."""
    bits = to_half(scale).view(np.uint16).astype(np.int32)
    byte: NDArray[np.uint8] = np.minimum(bits + (0x7F if upwards else 0x40) >> 7, 0xF7).astype(np.uint8)
    return byte


def unpack_scale(byte: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A half without its sign and its last seven bits: 5 bits of exponent, 3 of mantissa."""
    return (byte.astype(np.uint16) << np.uint16(7)).view(np.float16).astype(np.float32)


def _rotated_scale(z: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """The best scale for each rotated row of [n, Dv], as a byte."""
    if bits == 8:
        return pack_scale(np.abs(z).max(axis=1) / np.float32(127.5), upwards=True)
    sigma = np.sqrt(sum_of_lanes(z * z)[:, 0] / np.float32(z.shape[1]))
    return pack_scale(sigma * GAUSSIAN_STEP[bits], upwards=False)


def _quantise_rotated(z: NDArray[np.float32], scale: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Symmetric mid-rise codes of rotated rows [n, Dv] with the scales of the rows."""
    half_range = np.float32(2 ** (bits - 1))
    code: NDArray[np.float32] = np.floor(z * reciprocal(unpack_scale(scale))[:, None]) + half_range
    return np.clip(code, np.float32(0), np.float32(2**bits - 1)).astype(np.uint8)


def decode_values(fmt: ValueFormat, record: NDArray[np.uint8], real: type[np.floating[Any]]) -> NDArray[Any]:
    """[128, Dv] in `real` arithmetic, in the rotated basis if the format is rotated."""
    record = check_record(fmt.record_bytes, record)
    code = unpack_value_codes(record[: fmt.offset_scale], fmt.bits, fmt.head_size).astype(real)
    if fmt.rotated:
        byte_scale = unpack_scale(record[fmt.offset_scale :][:PAGE_CELLS]).astype(real)
        mean = unpack_mean(record[fmt.offset_mean :][: fmt.head_size]).astype(real)
        return np.asarray(mean + (code + real(0.5) - real(2 ** (fmt.bits - 1))) * byte_scale[:, None])
    scale = halfs(record, fmt.offset_scale, (PAGE_CELLS, fmt.n_groups)).astype(real)
    low = halfs(record, fmt.offset_min, (PAGE_CELLS, fmt.n_groups)).astype(real)
    parts = [low[:, g, None] + code[:, dims] * scale[:, g, None] for g, dims in enumerate(_dim_groups(fmt))]
    return np.concatenate(parts, axis=1)


def _dim_groups(fmt: ValueFormat) -> list[slice]:
    return [slice(d, min(d + fmt.group, fmt.head_size)) for d in range(0, fmt.head_size, fmt.group)]
