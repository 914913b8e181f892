"""Keys: tiers by salience (paper, section 3.2), codes per channel (section 3.1), and tiers that a page keeps when it is packed again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .checks import check_importance, check_record, check_rows
from .formats import KEY_BITS, PAGE_CELLS, KeyFormat, channel_bytes
from .numbers import as_record, half_bytes, halfs, quantise, ranges, to_half
from .planes import pack_key_codes, unpack_key_codes


def select_tiers(fmt: KeyFormat, rows: NDArray[np.float16], importance: ArrayLike, valid: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """The channels of a page, tier by tier, those of a tier by their index: the `order` of its record.

    Tiers go by salience, section 3.2 of the paper, A_d = I_d * S_d, unless the rows come from a record: then every channel stays in its tier.
    rows: float16 [128, D], keys after RoPE.  importance: float32 [D], the mean |q_d| of the queries, >= 0.
    valid: bool [128], the cells that hold a token; all of them if None.
    Returns uint8 [D]: the first n16 channels get 16 bits, the next n8 get 8, and so on.
    Raises ValueError if a shape, a type or a number is not as stated.
    """
    x, valid = check_rows(fmt.head_size, rows, valid)
    return _settled_tiers(fmt, x, valid, check_importance(fmt.head_size, importance))[1].order


def pack_keys(fmt: KeyFormat, rows: NDArray[np.float16], importance: ArrayLike, valid: NDArray[np.bool_] | None = None) -> NDArray[np.uint8]:
    """Packs the keys of one head in one page; section 3.1 of the paper, with the tiers of `select_tiers`.

    Rows that `unpack_keys` gave are packed to the record that they came from, whatever the importance.
    Arguments and errors as for `select_tiers`. Returns uint8 [fmt.record_bytes].
    """
    x, valid = check_rows(fmt.head_size, rows, valid)
    x, tiers = _settled_tiers(fmt, x, valid, check_importance(fmt.head_size, importance))
    code, scale, low = _quantise_channels(fmt, x, valid, tiers.bits)

    first, coded = tiers.order[: fmt.tiers[0]], tiers.order[fmt.tiers[0] :]
    sections = [np.where(valid, _as_packed(fmt, x, valid, tiers.bits)[:, first].T, np.float16(0)).astype("<f2").view(np.uint8)]
    sections += [pack_key_codes(code[:, channels], bits) for bits, channels in _tier_channels(fmt, tiers.order)]
    sections += [half_bytes([scale[:, coded].T]), half_bytes([to_half(low[:, coded].T)]), tiers.order]
    return as_record(sections, fmt.record_bytes)


def unpack_keys(fmt: KeyFormat, record: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Reads a key record back: float16 [128, D]. Cells that held no token read as some finite number.

    Raises ValueError if `record` is not uint8 [fmt.record_bytes] or its order is not a permutation.
    """
    return to_half(decode_keys(fmt, record, np.float32))


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
    low, high = ranges(_by_group(x, fmt), valid.reshape(fmt.n_groups, fmt.group, 1), axis=1)
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
    low, high = ranges(groups, held, axis=1)
    code, scale = quantise(groups, low[:, None], high[:, None], ((1 << np.minimum(bits, 8)) - 1).astype(np.float32))
    return np.where(held, code, np.uint8(0)).reshape(PAGE_CELLS, fmt.head_size), scale[:, 0], low


def _as_packed(fmt: KeyFormat, x: NDArray[np.float32], valid: NDArray[np.bool_], bits: NDArray[np.int64]) -> NDArray[np.float16]:
    """Rows as they read back: channels at `bits` each, those at 16 as they are."""
    code, scale, low = _quantise_channels(fmt, x, valid, bits)
    back = low[:, None] + _by_group(code.astype(np.float32), fmt) * scale[:, None].astype(np.float32)
    return np.where(bits == 16, to_half(x), to_half(back.reshape(x.shape)))


def decode_keys(fmt: KeyFormat, record: NDArray[np.uint8], real: type[np.floating[Any]]) -> NDArray[Any]:
    """[128, D] in `real` arithmetic, before the rounding to float16."""
    record = check_record(fmt.record_bytes, record)
    order = record[fmt.offset_order : fmt.offset_order + fmt.head_size]
    if not np.array_equal(np.sort(order), np.arange(fmt.head_size)):
        raise ValueError(f"the order of the record is not a permutation of its {fmt.head_size} channels.")
    shape = (fmt.n_coded, fmt.n_groups)
    scale = halfs(record, fmt.offset_scale, shape).astype(real)
    low = halfs(record, fmt.offset_min, shape).astype(real)

    rows = np.empty((PAGE_CELLS, fmt.head_size), dtype=real)
    rows[:, order[: fmt.tiers[0]]] = halfs(record, 0, (fmt.tiers[0], PAGE_CELLS)).T
    first = 0
    for bits, channels in _tier_channels(fmt, order):
        part = slice(first, first + len(channels))
        first = part.stop
        section = record[fmt.offset(bits) :][: channel_bytes(bits) * len(channels)]
        code = unpack_key_codes(section, bits).reshape(fmt.n_groups, fmt.group, len(channels))
        rows[:, channels] = (low[part].T[:, None] + code * scale[part].T[:, None]).reshape(PAGE_CELLS, -1)
    return rows


def _by_group(x: NDArray[np.float32], fmt: KeyFormat) -> NDArray[np.float32]:
    return x.reshape(fmt.n_groups, fmt.group, fmt.head_size)


def _tier_channels(fmt: KeyFormat, order: NDArray[np.uint8]) -> list[tuple[int, NDArray[np.uint8]]]:
    """Bits and channels of the tiers below 16 bits."""
    parts = np.split(order, np.cumsum(fmt.tiers)[:-1])
    return list(zip(KEY_BITS[1:], parts[1:], strict=True))
