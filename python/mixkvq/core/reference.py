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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

PAGE_CELLS = 128
RECORD_ALIGN = 64
KEY_BITS = (16, 8, 4, 3, 2)
"""Bits of the key tiers, in the order of `KeyFormat.tiers`."""
GAUSSIAN_STEP = {2: np.float32(0.9957), 3: np.float32(0.5860), 4: np.float32(0.3352)}
"""Best uniform quantiser step for a unit Gaussian, by bits."""

# How rotated rows that come from a record are told from others, and what is read off them.
LEAST_MEAN = np.float32(2**-4)  # smaller means, beside the root mean square of the rows, are 0
SAMPLE, SAMPLE_DIMS = 8, 32  # rows of a page that are looked at first, and how far
SAMPLE_ORDER = [t % 8 * 16 + t // 8 for t in range(PAGE_CELLS)]
PHASES = 256
SCALES_BELOW, SCALES_ABOVE = 5, {2: 9, 3: 15, 4: 21, 8: 2}
"""Bytes below and above the best scale of what was read back between which its own scale must lie."""

HALF_MAX = np.float32(65504)
KEY_LANES = 8  # tokens of a key plane that follow each other at one shift
QUAD = 4

# How the bits of a code are split into planes, low bits first.
_PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}


@dataclass(frozen=True)
class KeyFormat:
    """How the keys of one head are packed: how many channels sit in each tier.

    head_size: channels D, a multiple of 8 from 32 to 256.
    tiers: number of channels at 16, 8, 4, 3 and 2 bits; multiples of 4 that add up to D.
    group: tokens that share a scale and a minimum: 32, 64 or 128.

    Raises ValueError if it is not such a format.
    """

    head_size: int
    tiers: tuple[int, int, int, int, int]
    group: int = PAGE_CELLS

    def __post_init__(self) -> None:
        _check_head_size(self.head_size)
        if not isinstance(self.tiers, Sequence) or len(self.tiers) != len(KEY_BITS):
            raise ValueError(f"tiers is {self.tiers!r}, but it must be five numbers: n16, n8, n4, n3, n2.")
        object.__setattr__(self, "tiers", tuple(self.tiers))
        for bits, count in zip(KEY_BITS, self.tiers, strict=True):
            if not _is_integer(count) or count < 0 or count % QUAD:
                raise ValueError(f"n{bits} is {count!r}, but the channels of a tier come in multiples of 4.")
        if sum(self.tiers) != self.head_size:
            raise ValueError(f"tiers add up to {sum(self.tiers)}, but head_size is {self.head_size}.")
        if not _is_integer(self.group) or self.group not in (32, 64, 128):
            raise ValueError(f"group is {self.group!r}, but it must be 32, 64 or 128 tokens.")

    @property
    def n_groups(self) -> int:
        """Scales per channel and page."""
        return PAGE_CELLS // self.group

    @property
    def n_coded(self) -> int:
        """Channels below 16 bits."""
        return self.head_size - self.tiers[0]

    def offset(self, bits: int) -> int:
        """Byte in the record where the tier of 16, 8, 4, 3 or 2 bits begins."""
        before = KEY_BITS.index(bits)
        return sum(_channel_bytes(b) * n for b, n in zip(KEY_BITS[:before], self.tiers[:before], strict=True))

    @property
    def offset_scale(self) -> int:
        return sum(_channel_bytes(b) * n for b, n in zip(KEY_BITS, self.tiers, strict=True))

    @property
    def offset_min(self) -> int:
        return self.offset_scale + 2 * self.n_coded * self.n_groups

    @property
    def offset_order(self) -> int:
        return self.offset_min + 2 * self.n_coded * self.n_groups

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, its padding included."""
        return _aligned(self.offset_order + self.head_size)

    @property
    def code_bits(self) -> float:
        """Mean bits of a code: the paper's "effective bits", without scales, minima and order."""
        return sum(b * n for b, n in zip(KEY_BITS, self.tiers, strict=True)) / self.head_size

    @property
    def body_bits(self) -> float:
        """Bits per key element that a packed page really takes."""
        return 8 * self.record_bytes / (PAGE_CELLS * self.head_size)


@dataclass(frozen=True)
class ValueFormat:
    """How the values of one head are packed.

    head_size: dimensions Dv, a multiple of 8 from 32 to 256.
    bits: 2, 3, 4 or 8.
    group: 0 for rotated values with a mean per dimension and a scale per token; 32 or 64 for a scale and a minimum per so many.

    Raises ValueError if it is not such a format.
    """

    head_size: int
    bits: int
    group: int = 0

    def __post_init__(self) -> None:
        _check_head_size(self.head_size)
        if not _is_integer(self.bits) or self.bits not in _PLANES:
            raise ValueError(f"bits is {self.bits!r}, but values have 2, 3, 4 or 8.")
        if not _is_integer(self.group) or self.group not in (0, 32, 64):
            raise ValueError(f"group is {self.group!r}, but it must be 0 (rotated), 32 or 64 dimensions.")

    @property
    def rotated(self) -> bool:
        return self.group == 0

    @property
    def n_groups(self) -> int:
        """Scales per token."""
        return 1 if self.rotated else -(-self.head_size // self.group)

    @property
    def rotation_block(self) -> int:
        """Size of a Walsh-Hadamard block: the largest power of two that divides the head size."""
        return self.head_size & -self.head_size

    @property
    def offset_scale(self) -> int:
        return self.head_size * _channel_bytes(self.bits)

    @property
    def offset_mean(self) -> int:
        """Where the means of a rotated format begin."""
        return self.offset_scale + PAGE_CELLS

    @property
    def offset_min(self) -> int:
        """Where the minima of a grouped format begin."""
        return self.offset_scale + 2 * PAGE_CELLS * self.n_groups

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, its padding included."""
        return _aligned(self.offset_mean + self.head_size if self.rotated else self.offset_min + 2 * PAGE_CELLS * self.n_groups)

    @property
    def body_bits(self) -> float:
        """Bits per value element that a packed page really takes."""
        return 8 * self.record_bytes / (PAGE_CELLS * self.head_size)


def body_bits(key_format: KeyFormat, value_format: ValueFormat) -> float:
    """Bits per element of a packed page, keys and values together, with scales, minima, order and padding."""
    packed = 8 * (key_format.record_bytes + value_format.record_bytes)
    return packed / (PAGE_CELLS * (key_format.head_size + value_format.head_size))


# ---------------------------------------------------------------------------------------------------- numbers


def to_half(x: ArrayLike) -> NDArray[np.float16]:
    """float32 to float16 as the cache stores it: ties to even, NaN becomes 0, +-65504 at most."""
    x = np.asarray(x, dtype=np.float32)
    return np.clip(np.where(np.isnan(x), np.float32(0), x), -HALF_MAX, HALF_MAX).astype(np.float16)


def rotate(x: NDArray[Any], block: int) -> NDArray[Any]:
    """The normalised Walsh-Hadamard transform of the last axis, in blocks of `block`; it is its own inverse.

    x: float32 or float64 [..., D]; `block` is a power of two that divides D. The result has the type of x.
    The order of the additions is part of the format. Raises ValueError on another type or block.
    """
    x = np.asarray(x)
    if x.dtype not in (np.float32, np.float64):
        raise ValueError(f"x has type {x.dtype}, but it must be float32 or float64.")
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"block is {block}, but it must be a power of two that divides {x.shape[-1]}.")
    shape = x.shape
    half = 1
    while half < block:
        pairs = x.reshape(-1, 2, half)
        a, b = pairs[:, 0], pairs[:, 1]
        x = np.stack([a + b, a - b], axis=1)
        half *= 2
    real = x.dtype.type
    return np.asarray(x.reshape(shape) * (real(1) / np.sqrt(real(block))))


# ------------------------------------------------------------------------------------------------------- keys


def select_tiers(fmt: KeyFormat, rows: NDArray[np.float16], importance: ArrayLike, valid: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """The channels of a page, tier by tier, those of a tier by their index: the `order` of its record.

    Tiers go by salience, section 3.2 of the paper, A_d = I_d * S_d, unless the rows come from a record: then every channel stays in its tier.
    rows: float16 [128, D], keys after RoPE.  importance: float32 [D], the mean |q_d| of the queries, >= 0.
    valid: bool [128], the cells that hold a token; all of them if None.
    Returns uint8 [D]: the first n16 channels get 16 bits, the next n8 get 8, and so on.
    Raises ValueError if a shape, a type or a number is not as stated.
    """
    x, valid = _check_rows(fmt.head_size, rows, valid)
    return _settled_tiers(fmt, x, valid, _check_importance(fmt.head_size, importance))[1].order


def pack_keys(fmt: KeyFormat, rows: NDArray[np.float16], importance: ArrayLike, valid: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Packs the keys of one head in one page; section 3.1 of the paper, with the tiers of `select_tiers`.

    Rows that `unpack_keys` gave are packed to the record that they came from, whatever the importance.
    Arguments and errors as for `select_tiers`. Returns uint8 [fmt.record_bytes].
    """
    x, valid = _check_rows(fmt.head_size, rows, valid)
    x, tiers = _settled_tiers(fmt, x, valid, _check_importance(fmt.head_size, importance))
    code, scale, low = _quantise_channels(fmt, x, valid, tiers.bits)

    first, coded = tiers.order[: fmt.tiers[0]], tiers.order[fmt.tiers[0] :]
    sections = [np.where(valid, _as_packed(fmt, x, valid, tiers.bits)[:, first].T, np.float16(0)).astype("<f2").view(np.uint8)]
    sections += [_pack_key_codes(code[:, channels], bits) for bits, channels in _tier_channels(fmt, tiers.order)]
    sections += [_half_bytes([scale[:, coded].T]), _half_bytes([to_half(low[:, coded].T)]), tiers.order]
    return _record(sections, fmt.record_bytes)


def unpack_keys(fmt: KeyFormat, record: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Reads a key record back: float16 [128, D]. Cells that held no token read as some finite number.

    Raises ValueError if `record` is not uint8 [fmt.record_bytes] or its order is not a permutation.
    """
    return to_half(_decode_keys(fmt, record, np.float32))


def _ranges(x: NDArray[np.float32], valid: NDArray[np.bool_], axis: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Minimum and maximum over the valid elements of an axis, 0 and 0 if there is none."""
    low = np.where(valid, x, np.float32(np.inf)).min(axis=axis)
    high = np.where(valid, x, np.float32(-np.inf)).max(axis=axis)
    none = ~valid.any(axis=axis)
    # Adding 0 turns -0 into +0: which zero a minimum returns must not depend on the order of the comparisons.
    zero = np.float32(0)
    return np.where(none, zero, low) + zero, np.where(none, zero, high) + zero


@dataclass(frozen=True)
class _Tiers:
    """Which channel is in which tier, and at how many bits each channel is rounded: as many as its tier has, or fewer."""

    order: NDArray[np.uint8]
    bits: NDArray[np.int64]


def _settled_tiers(
    fmt: KeyFormat, x: NDArray[np.float32], valid: NDArray[np.bool_], importance: NDArray[np.float32]
) -> tuple[NDArray[np.float32], _Tiers]:
    """The tiers of a page, and the rows to pack with them: such that the rows that are read back get the same tiers.

    A channel may come out so that fewer bits than its tier's would hold it. Then the page is packed once more, from the rows as read back.
    """
    tiers = _tiers(fmt, x, valid, importance)
    back = np.where(valid[:, None], _as_packed(fmt, x, valid, tiers.bits).astype(np.float32), np.float32(0))
    again = _tiers(fmt, back, valid, importance)
    return (x, tiers) if np.array_equal(tiers.bits, again.bits) and np.array_equal(tiers.order, again.order) else (back, again)


def _tiers(fmt: KeyFormat, x: NDArray[np.float32], valid: NDArray[np.bool_], importance: NDArray[np.float32]) -> _Tiers:
    at_rank = np.repeat(KEY_BITS, fmt.tiers)
    whole, most = _own_bits(fmt, x, valid)
    order = np.argsort(-whole, kind="stable")
    if (whole[order] <= at_rank).all():  # from a record: nothing is lost
        return _Tiers(_by_index(fmt, order), whole)
    for bits, n in zip(KEY_BITS, fmt.tiers, strict=True):
        if np.count_nonzero(most == bits) > n:
            most = np.where(most == bits, 16, most)  # no record has so many
    if 2 * np.count_nonzero(most < 16) < fmt.n_coded:
        most = np.full(fmt.head_size, 16)
    by_salience = np.argsort(-_salience(fmt, x, valid, importance), kind="stable")
    others, parts = by_salience[most[by_salience] == 16], []
    for bits, n in zip(KEY_BITS, fmt.tiers, strict=True):
        kept = np.flatnonzero((most == bits) & (bits < 16))
        parts.append(np.concatenate([kept, others[: n - len(kept)]]))
        others = others[n - len(kept) :]
    dealt = _by_index(fmt, np.concatenate(parts))
    bits_of = np.empty(fmt.head_size, dtype=np.int64)
    bits_of[dealt] = at_rank
    return _Tiers(dealt, bits_of)


def _own_bits(fmt: KeyFormat, x: NDArray[np.float32], valid: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The bits at which each channel seems to have been packed before, of those that the format has; 16 if it does not seem so.

    The first array wants every cell to read back as it is. The second, for pages of which a part was written anew, takes the bits that suit most
    cells of a sample if they suit half of it.
    """
    whole, most, best = np.full(fmt.head_size, 16), np.full(fmt.head_size, 16), np.zeros(fmt.head_size, dtype=np.int64)
    sample = valid & (np.arange(PAGE_CELLS) % 32 < 8)
    for bits in reversed([b for b, n in zip(KEY_BITS, fmt.tiers, strict=True) if n and b < 16]):
        same = _as_packed(fmt, x, valid, np.full(fmt.head_size, bits)).astype(np.float32) == x
        whole = np.where(same[valid].all(axis=0) & (whole == 16), bits, whole)
        count = np.count_nonzero(same[sample], axis=0)
        better = (2 * count >= np.count_nonzero(sample)) & (count > best)
        most, best = np.where(better, bits, most), np.where(better, count, best)
    return whole, most


def _by_index(fmt: KeyFormat, order: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """The channels of each tier in the order of their index."""
    return np.concatenate([np.sort(part) for part in np.split(order, np.cumsum(fmt.tiers)[:-1])]).astype(np.uint8)


def _salience(fmt: KeyFormat, x: NDArray[np.float32], valid: NDArray[np.bool_], importance: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = _ranges(_by_group(x, fmt), valid.reshape(fmt.n_groups, fmt.group, 1), axis=1)
    spread = np.zeros_like(importance)
    for g in range(fmt.n_groups):  # a plain loop: np.sum may add in another order
        spread = spread + (high[g] - low[g])
    with np.errstate(over="ignore", under="ignore"):
        return importance * spread


def _quantise_channels(
    fmt: KeyFormat, x: NDArray[np.float32], valid: NDArray[np.bool_], bits: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float32]]:
    """Codes [128, D], scales and minima [groups, D] of channels at `bits` each; nothing that counts where bits is 16."""
    groups, held = _by_group(x, fmt), valid.reshape(fmt.n_groups, fmt.group, 1)
    low, high = _ranges(groups, held, axis=1)
    code, scale = _quantise(groups, low[:, None], high[:, None], ((1 << np.minimum(bits, 8)) - 1).astype(np.float32))
    return np.where(held, code, np.uint8(0)).reshape(PAGE_CELLS, fmt.head_size), scale[:, 0], low


def _as_packed(fmt: KeyFormat, x: NDArray[np.float32], valid: NDArray[np.bool_], bits: NDArray[np.int64]) -> NDArray[np.float16]:
    """Rows as they read back: channels at `bits` each, those at 16 as they are."""
    code, scale, low = _quantise_channels(fmt, x, valid, bits)
    back = low[:, None] + _by_group(code.astype(np.float32), fmt) * scale[:, None].astype(np.float32)
    return np.where(bits == 16, to_half(x), to_half(back.reshape(x.shape)))


def _quantise(
    x: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32], top: NDArray[np.float32] | np.float32
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Asymmetric codes of x between low and high, 0 to top, and their scale: the one that the end of the range as read back has."""
    first = to_half((high - low) / top)
    end = to_half(low + _codes(high, low, first, top) * first.astype(np.float32)).astype(np.float32)
    scale = to_half((end - low) / top)
    return _codes(x, low, scale, top).astype(np.uint8), scale


def _codes(
    x: NDArray[np.float32], low: NDArray[np.float32], scale: NDArray[np.float16], top: NDArray[np.float32] | np.float32
) -> NDArray[np.float32]:
    return np.clip(np.rint((x - low) * _inverse(scale)), np.float32(0), top)


def _inverse(scale: NDArray[Any]) -> NDArray[np.float32]:
    wide = scale.astype(np.float32)
    return np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)


def _decode_keys(fmt: KeyFormat, record: NDArray[np.uint8], real: type[np.floating[Any]]) -> NDArray[Any]:
    """[128, D] in `real` arithmetic, before the rounding to float16."""
    record = _check_record(fmt.record_bytes, record)
    order = record[fmt.offset_order : fmt.offset_order + fmt.head_size]
    if not np.array_equal(np.sort(order), np.arange(fmt.head_size)):
        raise ValueError(f"the order of the record is not a permutation of its {fmt.head_size} channels.")
    shape = (fmt.n_coded, fmt.n_groups)
    scale = _halfs(record, fmt.offset_scale, shape).astype(real)
    low = _halfs(record, fmt.offset_min, shape).astype(real)

    rows = np.empty((PAGE_CELLS, fmt.head_size), dtype=real)
    rows[:, order[: fmt.tiers[0]]] = _halfs(record, 0, (fmt.tiers[0], PAGE_CELLS)).T
    first = 0
    for bits, channels in _tier_channels(fmt, order):
        part = slice(first, first + len(channels))
        first = part.stop
        section = record[fmt.offset(bits) :][: _channel_bytes(bits) * len(channels)]
        code = _unpack_key_codes(section, bits).reshape(fmt.n_groups, fmt.group, len(channels))
        rows[:, channels] = (low[part].T[:, None] + code * scale[part].T[:, None]).reshape(PAGE_CELLS, -1)
    return rows


def _by_group(x: NDArray[np.float32], fmt: KeyFormat) -> NDArray[np.float32]:
    return x.reshape(fmt.n_groups, fmt.group, fmt.head_size)


def _tier_channels(fmt: KeyFormat, order: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.uint8]]]:
    """Bits and channels of the tiers below 16 bits."""
    parts = np.split(order, np.cumsum(fmt.tiers)[:-1])
    return list(zip(KEY_BITS[1:], parts[1:], strict=True))


# ----------------------------------------------------------------------------------------------------- values


def pack_values(fmt: ValueFormat, rows: NDArray[np.float16], valid: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Packs the values of one head in one page. Rows that `unpack_values` gave are packed to the record that they came from.

    rows: float16 [128, Dv].  valid: bool [128], the cells that hold a token; all of them if None.
    Returns uint8 [fmt.record_bytes]. Raises ValueError if a shape, a type or a number is not as stated.
    """
    x, valid = _check_rows(fmt.head_size, rows, valid)
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
            low, high = _ranges(part, np.ones_like(part, dtype=bool), axis=1)
            code, half_scale = _quantise(part, low[:, None], high[:, None], np.float32(2**fmt.bits - 1))
            codes.append(code)
            scales.append(half_scale)
            minima.append(to_half(low)[:, None])
        code = np.concatenate(codes, axis=1)
        sections = [_half_bytes([np.where(held, np.concatenate(halfs, axis=1), np.float16(0))]) for halfs in (scales, minima)]
    return _record([_pack_value_codes(np.where(held, code, np.uint8(0)), fmt.bits), *sections], fmt.record_bytes)


def unpack_values(fmt: ValueFormat, record: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Reads a value record back: float16 [128, Dv]. Cells that held no token read as some finite number.

    Raises ValueError if `record` is not uint8 [fmt.record_bytes].
    """
    y = _decode_values(fmt, record, np.float32)
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
    least = np.sqrt(_sum_of_lanes(squares[None])[0, 0] / np.float32(count * fmt.head_size)) * LEAST_MEAN
    exact = rotate(total / np.float32(count), fmt.rotation_block)
    near = pack_mean(exact)

    z = y - unpack_mean(near)
    sample = [t for t in SAMPLE_ORDER if valid[t]][:SAMPLE]
    if not sample or 2 * np.count_nonzero(_kept_scale(z[sample], fmt.bits, SAMPLE_DIMS)) < len(sample):
        return _no_small_means(exact, near, least), False
    for _ in range(2):  # with better means, more rows find their scale
        z = y[valid] - unpack_mean(near)
        near = _kept_mean(exact, near, z, _kept_scale(z, fmt.bits, fmt.head_size), least)
    return near, True


def _kept_mean(
    mean: NDArray[np.float32], near: NDArray[np.uint8], z: NDArray[np.float32], scale: NDArray[np.uint8], least: np.float32
) -> NDArray[np.uint8]:
    """The means that put rows z [n, Dv], which are rid of the means `near`, on the middles of their steps; only rows with a scale count.

    It is what the rows' distances from the middles say, or, where that leaves them far off or is another byte, 0 or a neighbour of `near` in the list
    of bytes. Where several do, because they are whole steps apart, it is the one next to the `mean` of the rows.
    """
    z, step = z[scale > 0], unpack_scale(scale[scale > 0])
    inverse = _inverse(step)
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
    magnitude = (near & 0x7F).astype(np.int32)
    sign = near & np.uint8(0x80)
    for byte in [*(sign | np.clip(magnitude + by, 0, 0x7B).astype(np.uint8) for by in (1, -1)), np.zeros_like(near)]:
        nearer = np.abs(unpack_mean(byte) - mean) < np.abs(unpack_mean(best) - mean)
        better = ~settled & ((off(byte) < fewest - len(z)) | (nearer & (off(byte) <= fewest + len(z))))
        best, fewest = np.where(better, byte, best), np.where(better, off(byte), fewest)
    return best


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
        fits = (guess + by > 0) & (guess + by <= 0xF7) & (peak * _inverse(step) <= np.float32(2 ** (bits - 1)))
        better = fits & (off < fewest) & (fewest > PHASES // 64 * dims)
        best, fewest = np.where(better, byte, best), np.where(better, off, fewest)
    return best


def _phase(z: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.int32]:
    """How far each number is from the middle of the step that it is in, in 256ths of a step: -128 to 127."""
    return (np.floor(z * _inverse(step)[:, None] * np.float32(PHASES)).astype(np.int32) & (PHASES - 1)) - PHASES // 2


def _no_small_means(exact: NDArray[np.float32], byte: NDArray[np.uint8], least: np.float32) -> NDArray[np.uint8]:
    """Means as bytes, 0 for what is smaller than `least` or no more than the sign of 0."""
    return np.where((np.abs(exact) < least) | (byte == 0x80), np.uint8(0), byte)


def pack_mean(mean: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Means as bytes: see `unpack_mean`. To the nearest, ties away from 0."""
    bits = to_half(mean).view(np.uint16).astype(np.int32)
    magnitude = np.minimum((bits & 0x7FFF) + 0x80 >> 8, 0x7B)
    return ((bits & 0x8000) >> 8 | magnitude).astype(np.uint8)


def unpack_mean(byte: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The upper byte of a half: 5 bits of exponent, 2 of mantissa."""
    return (byte.astype(np.uint16) << np.uint16(8)).view(np.float16).astype(np.float32)


def pack_scale(scale: NDArray[np.float32], upwards: bool) -> NDArray[np.uint8]:
    """Scales, not negative, as bytes: see `unpack_scale`. To the nearest, ties away from 0, or upwards."""
    bits = to_half(scale).view(np.uint16).astype(np.int32)
    return np.minimum(bits + (0x7F if upwards else 0x40) >> 7, 0xF7).astype(np.uint8)


def unpack_scale(byte: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A half without its sign and its last seven bits: 5 bits of exponent, 3 of mantissa."""
    return (byte.astype(np.uint16) << np.uint16(7)).view(np.float16).astype(np.float32)


def _rotated_scale(z: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """The best scale for each rotated row of [n, Dv], as a byte."""
    if bits == 8:
        return pack_scale(np.abs(z).max(axis=1) / np.float32(127.5), upwards=True)
    sigma = np.sqrt(_sum_of_lanes(z * z)[:, 0] / np.float32(z.shape[1]))
    return pack_scale(sigma * GAUSSIAN_STEP[bits], upwards=False)


def _quantise_rotated(z: NDArray[np.float32], scale: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Symmetric mid-rise codes of rotated rows [n, Dv] with the scales of the rows."""
    half_range = np.float32(2 ** (bits - 1))
    code = np.floor(z * _inverse(unpack_scale(scale))[:, None]) + half_range
    return np.clip(code, np.float32(0), np.float32(2**bits - 1)).astype(np.uint8)


def _sum_of_lanes(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, Dv] -> [n, 1], in the order of eight vector lanes and the tree that adds them up."""
    lanes = np.zeros((len(x), 8), dtype=np.float32)
    for first in range(0, x.shape[1], 8):
        lanes = lanes + x[:, first : first + 8]
    fours = lanes[:, :4] + lanes[:, 4:]
    twos = fours[:, :2] + fours[:, 2:]
    return twos[:, :1] + twos[:, 1:]


def _decode_values(fmt: ValueFormat, record: NDArray[np.uint8], real: type[np.floating[Any]]) -> NDArray[Any]:
    """[128, Dv] in `real` arithmetic, in the rotated basis if the format is rotated."""
    record = _check_record(fmt.record_bytes, record)
    code = _unpack_value_codes(record[: fmt.offset_scale], fmt.bits, fmt.head_size).astype(real)
    if fmt.rotated:
        byte_scale = unpack_scale(record[fmt.offset_scale :][:PAGE_CELLS]).astype(real)
        mean = unpack_mean(record[fmt.offset_mean :][: fmt.head_size]).astype(real)
        return np.asarray(mean + (code + real(0.5) - real(2 ** (fmt.bits - 1))) * byte_scale[:, None])
    scale = _halfs(record, fmt.offset_scale, (PAGE_CELLS, fmt.n_groups)).astype(real)
    low = _halfs(record, fmt.offset_min, (PAGE_CELLS, fmt.n_groups)).astype(real)
    parts = [low[:, g, None] + code[:, dims] * scale[:, g, None] for g, dims in enumerate(_dim_groups(fmt))]
    return np.concatenate(parts, axis=1)


def _dim_groups(fmt: ValueFormat) -> list[slice]:
    return [slice(d, min(d + fmt.group, fmt.head_size)) for d in range(0, fmt.head_size, fmt.group)]


# -------------------------------------------------------------------------------------------------- attention


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
    q = _check_reals("q", q, (None, key_format.head_size))
    mask = np.zeros((len(q), n_cells)) if mask is None else _check_reals("mask", mask, (len(q), n_cells), hides=True)
    sink = np.full(len(q), -np.inf) if sink is None else _check_reals("sink", sink, (len(q),), hides=True)
    if not np.isfinite(scale):
        raise ValueError(f"scale is {scale}, but it must be finite.")
    if not (np.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap is {softcap}, but it must be finite and not negative.")

    keys = np.zeros((n_cells, key_format.head_size))
    values = np.zeros((n_cells, value_format.head_size))
    for p in range(n_pages):
        cells = slice(p * PAGE_CELLS, (p + 1) * PAGE_CELLS)
        keys[cells] = _decode_keys(key_format, key_records[p], np.float64)
        values[cells] = _decode_values(value_format, value_records[p], np.float64)

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


# ----------------------------------------------------------------------------------------------------- planes
# A plane holds `width` bits of every code, 8 / width codes to a byte. Each function below names its axes:
# i counts runs of tokens, s the codes within a byte, r the four of a quad.


def _pack_key_codes(code: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[128, channels] -> bytes: quad after quad, each with its planes one behind the other."""
    n_quads = code.shape[1] // QUAD
    planes = []
    for width, part in _split(code, bits):
        per = 8 // width
        runs = PAGE_CELLS // (per * KEY_LANES)
        axes = part.reshape(runs, per, KEY_LANES, n_quads, QUAD)  # i, s, lane, quad, r
        byte = _merge_shifts(axes.transpose(3, 0, 2, 4, 1), width)
        planes.append(byte.reshape(n_quads, QUAD * _channel_bytes(width)))
    return np.concatenate(planes, axis=1).reshape(-1)


def _unpack_key_codes(section: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `_pack_key_codes`: bytes -> [128, channels]."""
    quads = section.reshape(-1, QUAD * _channel_bytes(bits))
    parts, first = [], 0
    for width in _PLANES[bits]:
        size = QUAD * _channel_bytes(width)
        runs = size // (KEY_LANES * QUAD)
        axes = quads[:, first : first + size].reshape(len(quads), runs, KEY_LANES, QUAD)  # quad, i, lane, r
        first += size
        parts.append(_split_shifts(axes, width).transpose(1, 4, 2, 0, 3).reshape(PAGE_CELLS, -1))
    return _join(parts, bits)


def _pack_value_codes(code: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[128, Dv] -> bytes: plane after plane."""
    planes = []
    for width, part in _split(code, bits):
        axes = part.reshape(-1, 8 // width, QUAD, code.shape[1])  # i, s, r, d
        planes.append(_merge_shifts(axes.transpose(0, 3, 2, 1), width).reshape(-1))
    return np.concatenate(planes)


def _unpack_value_codes(section: NDArray[np.uint8], bits: int, head_size: int) -> NDArray[np.uint8]:
    """The inverse of `_pack_value_codes`: bytes -> [128, Dv]."""
    parts, first = [], 0
    for width in _PLANES[bits]:
        size = head_size * _channel_bytes(width)
        axes = section[first : first + size].reshape(-1, head_size, QUAD)  # i, d, r
        first += size
        parts.append(_split_shifts(axes, width).transpose(0, 3, 2, 1).reshape(PAGE_CELLS, head_size))
    return _join(parts, bits)


def _split(code: NDArray[np.uint8], bits: int) -> list[tuple[int, NDArray[np.uint8]]]:
    """Width and content of every plane of the codes."""
    parts, shift = [], 0
    for width in _PLANES[bits]:
        parts.append((width, code >> np.uint8(shift) & np.uint8(2**width - 1)))
        shift += width
    return parts


def _join(parts: list[NDArray[np.uint8]], bits: int) -> NDArray[np.uint8]:
    code: NDArray[np.uint8] = np.zeros_like(parts[0])
    shift = 0
    for width, part in zip(_PLANES[bits], parts, strict=True):
        code |= part << np.uint8(shift)
        shift += width
    return code


def _merge_shifts(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """[..., 8 / width] codes -> [...] bytes."""
    byte = np.zeros(codes.shape[:-1], dtype=np.uint8)
    for s in range(codes.shape[-1]):
        byte |= codes[..., s] << np.uint8(width * s)
    return byte


def _split_shifts(byte: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """[...] bytes -> [..., 8 / width] codes."""
    return byte[..., None] >> np.arange(0, 8, width, dtype=np.uint8) & np.uint8(2**width - 1)


def _channel_bytes(bits: int) -> int:
    """Bytes that the codes of one channel (or one dimension of values) take in a page."""
    return PAGE_CELLS * bits // 8


def _aligned(size: int) -> int:
    return -(-size // RECORD_ALIGN) * RECORD_ALIGN


def _half_bytes(parts: list[NDArray[np.float16]]) -> NDArray[np.uint8]:
    return np.concatenate([p.reshape(-1) for p in parts]).astype("<f2").view(np.uint8)


def _halfs(record: NDArray[np.uint8], offset: int, shape: tuple[int, int]) -> NDArray[np.float16]:
    return record[offset : offset + 2 * shape[0] * shape[1]].view("<f2").reshape(shape)


def _record(sections: list[NDArray[np.uint8]], size: int) -> NDArray[np.uint8]:
    body = np.concatenate([s.reshape(-1) for s in sections])
    return np.pad(body, (0, size - len(body)))


# ----------------------------------------------------------------------------------------------------- checks


def _is_integer(x: object) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _check_head_size(head_size: Any) -> None:
    if not _is_integer(head_size) or not 32 <= head_size <= 256 or head_size % 8:
        raise ValueError(f"head_size is {head_size!r}, but it must be a multiple of 8 from 32 to 256.")


def _check_rows(head_size: int, rows: NDArray[np.float16], valid: NDArray[np.bool_] | None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
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


def _check_importance(head_size: int, importance: ArrayLike) -> NDArray[np.float32]:
    importance = np.asarray(importance)
    if importance.dtype.kind not in "fiu" or importance.shape != (head_size,):
        raise ValueError(f"importance has type {importance.dtype} and shape {importance.shape}, but it must be float32 ({head_size},).")
    importance = importance.astype(np.float32)
    wrong = np.flatnonzero(~(np.isfinite(importance) & (importance >= 0)))
    if len(wrong):
        wrong_one = f"importance[{wrong[0]}] is {importance[wrong[0]]}"
        raise ValueError(f"{wrong_one}, but it must be finite and not negative.")
    return importance


def _check_record(size: int, record: NDArray[np.uint8]) -> NDArray[np.uint8]:
    _check_array("record", record, np.uint8, (size,))
    return np.ascontiguousarray(record)


def _check_array(name: str, array: object, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is a {type(array).__name__}, but it must be an array.")
    if array.dtype != dtype or array.shape != shape:
        want = f"{np.dtype(dtype)} {shape}"
        raise ValueError(f"{name} has type {array.dtype} and shape {array.shape}, but it must be {want}.")


def _check_reals(name: str, x: ArrayLike, shape: tuple[int | None, ...], hides: bool = False) -> NDArray[np.float64]:
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
