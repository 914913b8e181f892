"""Which precision every head gets: the least expected harm for a number of bits.

The harm of a format is modelled as a sum over layers, heads, keys and values: the squared error that the format makes there, weighted with
the queries where keys are concerned, times how much such an error moves the model's predictions (`Tables.key_weight`, `Tables.value_weight`; they
are measured, see `mixkvq.sensitivity`). A sum over independent parts is minimised by making the gain per bit
the same everywhere, so one number, the price of a bit, decides everything, and bisection finds the price that meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..core.profile import LayerProfile
from ..core.reference import KEY_BITS, PAGE_CELLS, QUAD, KeyFormat, ValueFormat

CODED_BITS = (8, 4, 3, 2)
"""Tiers that an allocation uses. 16 bits are never worth their size: an 8-bit code's error is far below everything else."""
VALUE_BITS = (2, 3, 4, 8)
ROUNDS = 8


@dataclass
class Tables:
    """What is known of one layer.

    key_error: by tokens per scale, float64 [n_heads, D / 4, 4]: the expected squared error of a score (before its scale) that a quad of channels
        contributes, by place in the order of salience and by bits (8, 4, 3, 2).
    value_error: float64 [n_heads, 4]: squared error of a value vector by bits (2, 3, 4, 8).
    key_weight, value_weight: float64 [n_heads], harm per unit of these errors.
    key_even, value_even: the same if every head's keys and values did the same harm at the formats that the weights were measured with.
    key_kinds, value_kinds: by kind of text, the weights as that kind alone tells them.
    q_abs, q_sqr, key_range: float32 [n_heads, D], what the pages showed: mean |q|, mean q^2, mean of max - min over pages.
    size_v: value head size.
    cells: relative number of cells of the layer (a sliding window holds fewer).
    """

    key_error: dict[int, NDArray[np.float64]]
    value_error: NDArray[np.float64]
    key_weight: NDArray[np.float64]
    value_weight: NDArray[np.float64]
    q_abs: NDArray[np.float32]
    q_sqr: NDArray[np.float32]
    key_range: NDArray[np.float32]
    size_v: int
    cells: float = 1.0
    key_even: NDArray[np.float64] = field(default_factory=lambda: np.ones(1))
    value_even: NDArray[np.float64] = field(default_factory=lambda: np.ones(1))
    key_kinds: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    value_kinds: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    salience: NDArray[np.float32] | None = field(default=None, repr=False)  # [n_heads, pages, D], for the thresholds of the paper

    @property
    def head_size(self) -> int:
        """Channels of a key head."""
        return int(self.q_abs.shape[1])

    @property
    def n_heads(self) -> int:
        """Key/value heads."""
        return int(self.q_abs.shape[0])

    def weighted(self, kinds: Mapping[str, float]) -> Tables:
        """The same with weights that are the sum of these kinds', each times its number."""
        keys, values = (np.sum([x * of[kind] for kind, x in kinds.items()], axis=0) for of in (self.key_kinds, self.value_kinds))
        return replace(self, key_weight=keys, value_weight=values)


def key_format(row: NDArray[np.int32]) -> KeyFormat:
    """The format that a row of `LayerProfile.tiers` stands for."""
    n16, n8, n4, n3, n2, group = map(int, row)
    return KeyFormat(n16 + n8 + n4 + n3 + n2, (n16, n8, n4, n3, n2), group)


# ---- harm and size of formats --------------------------------------------------------------------------------------------------------


def key_harm(tables: Tables, head: int, fmt: KeyFormat) -> float:
    """Expected harm of rounding one head's keys. 16-bit channels count as exact."""
    quads = np.repeat(np.arange(len(KEY_BITS)), np.array(fmt.tiers) // QUAD)
    coded = quads > 0
    error = tables.key_error[fmt.group][head][np.arange(len(quads))[coded], quads[coded] - 1].sum()
    return float(tables.key_weight[head] * error)


def value_harm(tables: Tables, head: int, bits: int) -> float:
    """Expected harm of rounding one head's values, rotated, to so many bits."""
    return float(tables.value_weight[head] * tables.value_error[head, VALUE_BITS.index(bits)])


def harm(layers: Sequence[Tables | None], profiles: Sequence[LayerProfile | None]) -> float:
    """Expected harm of a whole profile with rotated values; 1 is that of the formats with which the weights were measured."""
    total = 0.0
    for tables, profile in zip(layers, profiles, strict=True):
        if tables is None or profile is None:
            continue
        for head, (keys, values) in enumerate(zip(profile.tiers, profile.values, strict=True)):
            total += key_harm(tables, head, key_format(keys))
            total += value_harm(tables, head, int(values[0]))
    return total


def body_bits(layers: Sequence[Tables | None], profiles: Sequence[LayerProfile | None]) -> float:
    """Bits per element of packed pages over the whole model, all metadata and padding included."""
    record_bytes, elements = 0.0, 0.0
    for tables, profile in zip(layers, profiles, strict=True):
        if tables is None or profile is None:
            continue
        for keys, values in zip(profile.tiers, profile.values, strict=True):
            value_format = ValueFormat(tables.size_v, int(values[0]), int(values[1]))
            record_bytes += tables.cells * (key_format(keys).record_bytes + value_format.record_bytes)
            elements += tables.cells * PAGE_CELLS * (tables.head_size + tables.size_v)
    return 8 * record_bytes / elements


# ---- allocation ----------------------------------------------------------------------------------------------------------------------


def _keys_at(tables: Tables, head: int, price: float, least: NDArray[np.int32] | None) -> tuple[float, tuple[int, ...], int]:
    """The best tiers and group of a head's keys when a bit of an element costs `price`: (cost, counts, group). least: tiers that they go beyond."""
    best: tuple[float, tuple[int, ...], int] | None = None
    elements = QUAD * PAGE_CELLS
    for group, error in tables.key_error.items():
        if least is not None and group > least[5]:
            continue
        cost = tables.key_weight[head] * error[head] + price * tables.cells * elements * np.array(CODED_BITS)
        # Tiers are filled in the order of salience, so bits must not rise along it.
        choice = np.maximum.accumulate(cost.argmin(axis=1))
        if least is not None:
            counts_least = (least[0] + least[1], *least[2:5])
            choice = np.minimum(choice, np.repeat(np.arange(len(CODED_BITS)), np.array(counts_least) // QUAD))
        metadata = 32 * PAGE_CELLS // group * tables.head_size
        total = float(cost[np.arange(len(choice)), choice].sum()) + price * tables.cells * metadata
        if best is None or total < best[0]:
            counts = QUAD * np.bincount(choice, minlength=len(CODED_BITS))
            best = total, (0, *map(int, counts)), group
    assert best is not None
    return best


def _values_at(tables: Tables, head: int, price: float, least: int) -> int:
    cost = tables.value_weight[head] * tables.value_error[head] + price * tables.cells * PAGE_CELLS * tables.size_v * np.array(VALUE_BITS)
    return max(least, VALUE_BITS[int(cost.argmin())])


def formats_at(layers: Sequence[Tables | None], price: float, least: Sequence[LayerProfile | None] | None = None) -> list[LayerProfile | None]:
    """The best formats when a bit of an element costs `price` harm. least: formats, with rotated values, of which no head gets less."""
    profiles: list[LayerProfile | None] = []
    for i, tables in enumerate(layers):
        if tables is None:
            profiles.append(None)
            continue
        floor = None if least is None else least[i]
        keys = [_keys_at(tables, head, price, None if floor is None else floor.tiers[head]) for head in range(tables.n_heads)]
        tiers = np.array([(*counts, group) for _, counts, group in keys], dtype=np.int32)
        fewest = [VALUE_BITS[0] if floor is None else int(floor.values[head, 0]) for head in range(tables.n_heads)]
        values = np.array([(_values_at(tables, head, price, n), 0) for head, n in enumerate(fewest)], dtype=np.int32)
        profiles.append(LayerProfile(tiers, values))
    return profiles


def allocate(layers: Sequence[Tables | None], bits: float, least: Sequence[LayerProfile | None] | None = None) -> list[LayerProfile | None]:
    """The formats of least harm that take at most `bits` body bits per element. least: formats of which no head gets less.

    Raises ValueError if no formats are that small.
    """
    low, high = -60.0, 30.0  # logarithms of a bit's price: at the one everything has 8 bits, at the other 2
    best = formats_at(layers, float(np.exp(high)), least)
    smallest = body_bits(layers, best)
    if bits < smallest:
        raise ValueError(f"{bits:g} bits are fewer than the smallest formats take ({smallest:.2f}).")
    for _ in range(40):
        middle = (low + high) / 2
        profiles = formats_at(layers, float(np.exp(middle)), least)
        if body_bits(layers, profiles) <= bits:
            best, high = profiles, middle
        else:
            low = middle
    return _fill(layers, best, bits)


def allocate_by_kind(
    layers: Sequence[Tables | None], bits: float, shares: Mapping[str, float], least: Sequence[LayerProfile | None] | None = None
) -> list[LayerProfile | None]:
    """The formats of at most `bits` body bits for which the harms to the kinds of text, each to the power of its share, have the least product.

    least: formats of which no head gets less.

    One part of the cache may do nearly all the harm to a kind. Once it has its bits, what the others do to that kind counts for more: a round
    weighs all harm against what the formats of the last one leave of its kind, and the product falls from round to round.
    """
    seen = [t for t in layers if t is not None]
    left = dict.fromkeys(shares, 1.0)
    best: tuple[float, list[LayerProfile | None]] | None = None
    for _ in range(ROUNDS):
        now = {kind: share / left[kind] for kind, share in shares.items()}
        formats = allocate([None if t is None else t.weighted(now) for t in layers], bits, least)
        kept = [f for f, t in zip(formats, layers, strict=True) if t is not None]
        left = {kind: max(harm([t.weighted({kind: 1.0}) for t in seen], kept), 1e-12) for kind in shares}
        product = sum(share * math.log(left[kind]) for kind, share in shares.items())
        if best is not None and product >= best[0]:
            break
        best = product, formats
    assert best is not None
    return best[1]


def _fill(layers: Sequence[Tables | None], profiles: list[LayerProfile | None], bits: float) -> list[LayerProfile | None]:
    """Spends what bisection left over: the values of a head are a large step, which the price alone takes for all like heads at once."""
    while True:
        left = bits - body_bits(layers, profiles)
        best: tuple[float, int, int, int] | None = None
        elements = sum(t.cells * t.n_heads * (t.head_size + t.size_v) for t in layers if t is not None)
        for i, (tables, profile) in enumerate(zip(layers, profiles, strict=True)):
            if tables is None or profile is None:
                continue
            for head in range(tables.n_heads):
                now = VALUE_BITS.index(int(profile.values[head, 0]))
                if now + 1 == len(VALUE_BITS):
                    continue
                extra = VALUE_BITS[now + 1] - VALUE_BITS[now]
                if extra * tables.cells * tables.size_v / elements > left:
                    continue
                gain = float(tables.value_weight[head] * (tables.value_error[head, now] - tables.value_error[head, now + 1])) / extra
                if best is None or gain > best[0]:
                    best = gain, i, head, VALUE_BITS[now + 1]
        if best is None:
            return profiles
        profile = profiles[best[1]]
        assert profile is not None
        profile.values[best[2], 0] = best[3]
        if body_bits(layers, profiles) > bits:  # padding of a record
            profile.values[best[2], 0] = VALUE_BITS[VALUE_BITS.index(best[3]) - 1]
            return profiles


def thresholds(layers: Sequence[Tables | None], t16: float, t4: float) -> list[LayerProfile | None]:
    """The paper's policy (section 3.2): the share of channels with A_d above t16 gets 16 bits, above t4 4 bits, the others 2; groups of 32.

    A_d = mean |q_d| (max - min) / 3 of every page; the counts are means over the pages, rounded up to quads. Values have 2 bits, as in the paper.
    """
    profiles: list[LayerProfile | None] = []
    for tables in layers:
        if tables is None:
            profiles.append(None)
            continue
        assert tables.salience is not None
        rows = []
        for salience in tables.salience:
            n16 = np.mean((salience > t16).sum(axis=1))
            n4 = np.mean(((salience > t4) & (salience <= t16)).sum(axis=1))
            n16 = int(-(-n16 // QUAD) * QUAD)
            n4 = min(int(-(-n4 // QUAD) * QUAD), tables.head_size - n16)
            rows.append((n16, 0, n4, 0, tables.head_size - n16 - n4, 32))
        values = np.tile(np.array([2, 32], dtype=np.int32), (tables.n_heads, 1))
        profiles.append(LayerProfile(np.array(rows, dtype=np.int32), values))
    return profiles
