"""The formats of keys and values: what the tiers are, and where in a record everything lies (docs/format.md, *Records*)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PAGE_CELLS = 128
RECORD_ALIGN = 64
KEY_BITS = (16, 8, 4, 3, 2)
"""Bits of the key tiers, in the order of `KeyFormat.tiers`."""
KEY_LANES = 8  # tokens of a key plane that follow each other at one shift
QUAD = 4
# How the bits of a code are split into planes, low bits first.
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}


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
        return sum(channel_bytes(b) * n for b, n in zip(KEY_BITS[:before], self.tiers[:before], strict=True))

    @property
    def offset_scale(self) -> int:
        """Byte in the record where the scales begin."""
        return sum(channel_bytes(b) * n for b, n in zip(KEY_BITS, self.tiers, strict=True))

    @property
    def offset_min(self) -> int:
        """Byte in the record where the minima begin."""
        return self.offset_scale + 2 * self.n_coded * self.n_groups

    @property
    def offset_order(self) -> int:
        """Byte in the record where the order of the channels begins."""
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
        if not _is_integer(self.bits) or self.bits not in PLANES:
            raise ValueError(f"bits is {self.bits!r}, but values have 2, 3, 4 or 8.")
        if not _is_integer(self.group) or self.group not in (0, 32, 64):
            raise ValueError(f"group is {self.group!r}, but it must be 0 (rotated), 32 or 64 dimensions.")

    @property
    def rotated(self) -> bool:
        """Whether rows are rotated, with one scale per token."""
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
        """Byte in the record where the scales begin."""
        return self.head_size * channel_bytes(self.bits)

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


def channel_bytes(bits: int) -> int:
    """Bytes that the codes of one channel (or one dimension of values) take in a page."""
    return PAGE_CELLS * bits // 8


def _aligned(size: int) -> int:
    return -(-size // RECORD_ALIGN) * RECORD_ALIGN


def _is_integer(x: object) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _check_head_size(head_size: Any) -> None:
    if not _is_integer(head_size) or not 32 <= head_size <= 256 or head_size % 8:
        raise ValueError(f"head_size is {head_size!r}, but it must be a multiple of 8 from 32 to 256.")
