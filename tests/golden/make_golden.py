"""Golden records of the page format: `python tests/golden/make_golden.py` writes format_v3.npz beside itself.

Every case is a seeded page of one head and the record that the reference makes. Inputs come from integer
hashing, not from a random generator or a mathematical library, so that they are the same bits everywhere; the
file holds their SHA-256. Records are stored in full if they are small, else as their SHA-256 too.
Write the file again only together with a new format version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixkvq.core.reference import KeyFormat, ValueFormat, pack_keys, pack_values

GOLDEN_FILE = Path(__file__).with_name("format_v3.npz")
FULL_BYTES = 4096  # a record up to this size is stored in full

PAGE_KINDS = (
    "gaussian",  # channels of unequal spread
    "offset",  # small spread around large means: cancellation
    "outlier",  # two loud channels and one loud token
    "constant",  # every range is empty
    "zero",
    "signed_zero",  # -0 and 0 mixed: both ends of a range are the positive one
    "extreme",  # +-65504
    "nearly_extreme",  # the largest halfs: reading back would overflow without the clamp
    "subnormal",
    "tiny",  # 0 to 4 times the smallest half: scales lose all their bits
    "bits",  # any finite half
    "ties",  # channels in equal groups of D / 4: equal salience
    "integers",  # codes half-way between two integers
)
VALID_KINDS = ("all", "none", "first", "last", "sparse", "group_empty", "tail_empty")
IMPORTANCE_KINDS = ("spread", "equal", "zero")


def words(seed: int, n: int) -> np.ndarray:
    """n 64-bit words: splitmix64 of a counter."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    z = np.arange(1, n + 1, dtype=np.uint64) * gamma + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bells(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32, nearly normal with variance 1: sums of twelve uniform numbers."""
    n = int(np.prod(shape))
    uniform = words(seed, 3 * n).view(np.uint16).reshape(n, 12)
    return ((uniform.sum(axis=1, dtype=np.int64) - 6 * 65535).astype(np.float32) / np.float32(65536)).reshape(shape)


def page(kind: str, head_size: int, seed: int) -> np.ndarray:
    """float16 [128, head_size]; see PAGE_KINDS."""
    shape = (128, head_size)
    word = words(seed ^ 0x5EED, shape[0] * shape[1]).reshape(shape)
    channel = np.arange(head_size)
    if kind == "gaussian":
        x = bells(seed, shape) * np.exp2(channel * 7 % 5 - 2.0).astype(np.float32)
    elif kind == "offset":
        x = bells(seed, shape) * np.float32(0.25) + (channel % 7 - 3).astype(np.float32) * np.float32(61.7)
    elif kind == "outlier":
        x = bells(seed, shape)
        x[:, [3, head_size - 5]] *= np.float32(64)
        x[17] *= np.float32(32)
    elif kind == "constant":
        x = np.broadcast_to((channel % 3 - 1).astype(np.float32) * np.float32(1.7), shape)
    elif kind == "zero":
        x = np.zeros(shape, dtype=np.float32)
    elif kind == "signed_zero":
        return (word.astype(np.uint16) & np.uint16(0x8000)).view(np.float16)
    elif kind == "extreme":
        return (word.astype(np.uint16) & np.uint16(0x8000) | np.uint16(0x7BFF)).view(np.float16)
    elif kind == "nearly_extreme":
        return (word.astype(np.uint16) & np.uint16(0x8007) | np.uint16(0x7BF8)).view(np.float16)
    elif kind == "subnormal":
        return (word.astype(np.uint16) & np.uint16(0x83FF)).view(np.float16)
    elif kind == "tiny":
        return (word % np.uint64(5)).astype(np.uint16).view(np.float16)
    elif kind == "bits":
        bits = word.astype(np.uint16)
        # An exponent of all ones is an infinity or a NaN: lower it by one.
        return np.where(bits & 0x7C00 == 0x7C00, bits ^ 0x0400, bits).astype(np.uint16).view(np.float16)
    elif kind == "ties":
        x = bells(seed, (128, 4))[:, channel % 4]
    elif kind == "integers":
        x = (word % np.uint64(7)).astype(np.float32) - np.float32(3)
    else:
        raise ValueError(f"there is no kind of page named {kind!r}.")
    return x.astype(np.float16)


def valid_cells(kind: str, seed: int = 0) -> np.ndarray:
    """bool [128]; see VALID_KINDS."""
    cell = np.arange(128)
    if kind == "all":
        return np.ones(128, dtype=bool)
    if kind == "none":
        return np.zeros(128, dtype=bool)
    if kind == "first":
        return cell == 0
    if kind == "last":
        return cell == 127
    if kind == "sparse":
        return words(seed + 77, 128) % np.uint64(3) == 0
    if kind == "group_empty":
        return (cell < 32) | (cell >= 64)
    if kind == "tail_empty":
        return cell < 101
    raise ValueError(f"there is no kind of valid cells named {kind!r}.")


def importances(kind: str, head_size: int, seed: int) -> np.ndarray:
    """float32 [head_size]; see IMPORTANCE_KINDS."""
    if kind == "spread":
        return np.abs(bells(seed + 991, (head_size,)))
    if kind == "equal":
        return np.ones(head_size, dtype=np.float32)
    if kind == "zero":
        return np.zeros(head_size, dtype=np.float32)
    raise ValueError(f"there is no kind of importance named {kind!r}.")


@dataclass(frozen=True)
class Case:
    """One page of one head; `importance` is None for values."""

    name: str
    format: KeyFormat | ValueFormat
    rows: np.ndarray
    valid: np.ndarray
    importance: np.ndarray | None = None

    def pack(self) -> np.ndarray:
        if isinstance(self.format, KeyFormat):
            return pack_keys(self.format, self.rows, self.importance, self.valid)
        return pack_values(self.format, self.rows, self.valid)


def cases() -> Iterator[Case]:
    """Every golden case, always in the same order."""
    mixes = [
        (64, (0, 0, 0, 0, 64), 128),
        (64, (64, 0, 0, 0, 0), 128),
        (64, (0, 64, 0, 0, 0), 64),
        (64, (0, 0, 0, 64, 0), 128),
        (80, (4, 8, 16, 20, 32), 32),
        (80, (0, 0, 80, 0, 0), 64),
        (96, (4, 4, 4, 4, 80), 128),
        (128, (4, 0, 24, 0, 100), 128),
        (128, (8, 12, 40, 36, 32), 32),
        (128, (0, 0, 0, 128, 0), 32),
        (192, (12, 0, 60, 40, 80), 64),
        (256, (4, 16, 0, 76, 160), 128),
    ]
    for i, (size, tiers, group) in enumerate(mixes):
        yield _key_case("gaussian", KeyFormat(size, tiers, group), i)
    mixed = [KeyFormat(32, (4, 8, 8, 4, 8), group) for group in (32, 64, 128)]
    for i, kind in enumerate(PAGE_KINDS):
        yield _key_case(kind, mixed[i % 3], 100 + i)
    for i, kind in enumerate(VALID_KINDS):
        yield _key_case("gaussian", mixed[i % 3], 200 + i, valid=kind)
        yield _key_case("offset", KeyFormat(80, (4, 8, 16, 20, 32), 32), 300 + i, valid=kind)
    for i, kind in enumerate(IMPORTANCE_KINDS):
        yield _key_case("ties", KeyFormat(40, (4, 4, 8, 12, 12)), 400 + i, importance=kind)

    value_formats = [
        *(ValueFormat(size, bits) for size in (64, 80, 96, 128, 192, 256) for bits in (2, 3, 4, 8)),
        ValueFormat(80, 2, 32),
        ValueFormat(96, 3, 64),
        ValueFormat(128, 2, 32),
        ValueFormat(128, 4, 64),
        ValueFormat(200, 8, 32),
    ]
    for i, fmt in enumerate(value_formats):
        yield _value_case("gaussian", fmt, 500 + i)
    small = [
        ValueFormat(32, 2),
        ValueFormat(40, 3),
        ValueFormat(40, 4),
        ValueFormat(40, 8),
        ValueFormat(40, 2, 32),
    ]
    for i, kind in enumerate(PAGE_KINDS):
        for j, fmt in enumerate(small):
            yield _value_case(kind, fmt, 600 + 10 * i + j)
    for i, kind in enumerate(VALID_KINDS[1:]):
        for j, fmt in enumerate(small):
            yield _value_case("gaussian", fmt, 800 + 10 * i + j, valid=kind)


def _key_case(kind: str, fmt: KeyFormat, seed: int, valid: str = "all", importance: str = "spread") -> Case:
    tiers = "-".join(str(n) for n in fmt.tiers)
    name = f"keys_{fmt.head_size}_{tiers}_g{fmt.group}_{kind}_{valid}_{importance}_{seed}"
    weights = importances(importance, fmt.head_size, seed)
    return Case(name, fmt, page(kind, fmt.head_size, seed), valid_cells(valid, seed), weights)


def _value_case(kind: str, fmt: ValueFormat, seed: int, valid: str = "all") -> Case:
    name = f"values_{fmt.head_size}_{fmt.bits}bit_g{fmt.group}_{kind}_{valid}_{seed}"
    return Case(name, fmt, page(kind, fmt.head_size, seed), valid_cells(valid, seed))


def digest(*arrays: np.ndarray | None) -> np.ndarray:
    """SHA-256 over the bytes of the arrays, little-endian, as uint8 [32]."""
    sha = hashlib.sha256()
    for array in arrays:
        if array is not None:
            sha.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    return np.frombuffer(sha.digest(), dtype=np.uint8)


def stored(record: np.ndarray) -> np.ndarray:
    """What the golden file holds of a record: itself, or its digest if it is large."""
    return record if record.nbytes <= FULL_BYTES else digest(record)


def golden() -> dict[str, np.ndarray]:
    """The content of the golden file, made anew."""
    arrays = {}
    for case in cases():
        arrays[f"{case.name}.inputs"] = digest(case.rows, case.valid, case.importance)
        arrays[f"{case.name}.record"] = stored(case.pack())
    return arrays


if __name__ == "__main__":
    np.savez_compressed(GOLDEN_FILE, **golden())
    print(f"{GOLDEN_FILE.name}: {GOLDEN_FILE.stat().st_size} bytes")
