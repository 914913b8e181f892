"""The NumPy reference against docs/format.md, read once more: code by code, in plain loops."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import golden, key_pages, rows, seeds, value_pages

from mixkvq.core.reference import (
    KEY_BITS,
    KeyFormat,
    ValueFormat,
    attend,
    body_bits,
    pack_keys,
    pack_values,
    rotate,
    select_tiers,
    to_half,
    unpack_keys,
    unpack_values,
)
from mixkvq.core.reference import keys as keys_module
from mixkvq.core.reference import values as values_module

CELLS = 128
QUICK = settings(max_examples=40)
SLOW = settings(max_examples=8)  # pure Python loops over every code of a page

MIXED = KeyFormat(80, (4, 8, 16, 20, 32), 32)


# --- a second reading of the tables -------------------------------------------------------------------------


def read_bits(section, places):
    """`places`: byte, shift and width of each plane of a code, low bits first."""
    code, filled = 0, 0
    for byte, shift, width in places:
        code |= (int(section[byte]) >> shift & 2**width - 1) << filled
        filled += width
    return code


def key_places(bits, t, r):
    two = (32 * (t // 32) + 4 * (t % 8) + r, 2 * (t // 8 % 4), 2)
    return {
        8: [(4 * t + r, 0, 8)],
        4: [(32 * (t // 16) + 4 * (t % 8) + r, 4 * (t // 8 % 2), 4)],
        3: [two, (128 + 32 * (t // 64) + 4 * (t % 8) + r, t // 8 % 8, 1)],
        2: [two],
    }[bits]


def value_places(bits, head_size, t, d):
    def byte(tokens):
        return t // tokens * 4 * head_size + 4 * d + t % 4

    two = (byte(16), 2 * (t // 4 % 4), 2)
    return {
        8: [(byte(4), 0, 8)],
        4: [(byte(8), 4 * (t // 4 % 2), 4)],
        3: [two, (32 * head_size + byte(32), t // 4 % 8, 1)],
        2: [two],
    }[bits]


def halfs(record, offset, count):
    return np.frombuffer(record.tobytes(), dtype="<f2", count=count, offset=offset)


class KeyRecord:
    """The sections of a key record: order, F16 rows, scales, minima, codes by (place in the order, token)."""

    def __init__(self, fmt, record):
        n16, n8, n4, n3, n2 = fmt.tiers
        groups = CELLS // fmt.group
        self.half_rows = halfs(record, 0, 128 * n16).reshape(n16, 128)
        self.codes, self.bits = {}, {}
        place, offset = n16, 256 * n16
        for bits, count, quad_bytes in ((8, n8, 512), (4, n4, 256), (3, n3, 192), (2, n2, 128)):
            for i in range(count):
                quad = record[offset + i // 4 * quad_bytes :][:quad_bytes]
                for t in range(CELLS):
                    self.codes[place, t] = read_bits(quad, key_places(bits, t, i % 4))
                self.bits[place] = bits
                place += 1
            offset += count // 4 * quad_bytes
        size = 2 * (fmt.head_size - n16) * groups
        self.scale = halfs(record, offset, size // 2).reshape(-1, groups)
        self.min = halfs(record, offset + size, size // 2).reshape(-1, groups)
        end = offset + 2 * size + fmt.head_size
        self.order = record[offset + 2 * size : end]
        self.padding = record[end:]
        self.fmt = fmt

    def decoded(self):
        """float64 [128, D]."""
        x = np.zeros((CELLS, self.fmt.head_size))
        n16 = self.fmt.tiers[0]
        for i in range(n16):
            x[:, self.order[i]] = self.half_rows[i]
        for (place, t), code in self.codes.items():
            g = t // self.fmt.group
            x[t, self.order[place]] = float(self.min[place - n16, g]) + code * float(self.scale[place - n16, g])
        return x


def small_floats(mantissa_bits, signed):
    """What the bytes of a float with 5 bits of exponent stand for, without infinities: {byte: number}."""
    numbers = {}
    for byte in range(256):
        sign = -1.0 if signed and byte >= 128 else 1.0
        exponent, mantissa = divmod(byte % 128 if signed else byte, 2**mantissa_bits)
        if exponent < 31:
            fraction = mantissa / 2**mantissa_bits
            numbers[byte] = sign * (math.ldexp(1 + fraction, exponent - 15) if exponent else math.ldexp(fraction, -14))
    return numbers


MEANS, SCALES = small_floats(2, signed=True), small_floats(3, signed=False)


def nearest(numbers, x):
    """The number of a table, and of those as near the one further from 0."""
    return min(numbers.values(), key=lambda y: (abs(y - float(x)), -abs(y)))


class ValueRecord:
    """The sections of a value record: codes [128, Dv], scales and minima [128, groups], means [Dv]."""

    def __init__(self, fmt, record):
        size = fmt.head_size
        groups = 1 if fmt.group == 0 else math.ceil(size / fmt.group)
        self.codes = np.array([[read_bits(record, value_places(fmt.bits, size, t, d)) for d in range(size)] for t in range(CELLS)])
        offset = {8: 128, 4: 64, 3: 48, 2: 32}[fmt.bits] * size
        if fmt.group:
            self.scale = halfs(record, offset, CELLS * groups).reshape(CELLS, groups)
            end = offset + 4 * CELLS * groups
            self.min = halfs(record, end - 2 * CELLS * groups, CELLS * groups).reshape(CELLS, groups)
        else:
            self.scale = np.array([[SCALES[byte]] for byte in record[offset : offset + CELLS].tolist()])
            end = offset + CELLS + size
            self.mean = np.array([MEANS[byte] for byte in record[offset + CELLS : end].tolist()])
        self.padding = record[end:]
        self.fmt = fmt

    def decoded(self):
        """float64 [128, Dv], rotated back."""
        if self.fmt.group:
            g = np.arange(self.fmt.head_size) // self.fmt.group
            return self.min.astype(float)[:, g] + self.codes * self.scale.astype(float)[:, g]
        y = self.mean + (self.codes + 0.5 - 2 ** (self.fmt.bits - 1)) * self.scale
        return y @ hadamard(self.fmt.head_size)


def hadamard(head_size):
    """The block matrix of the rotation, by Sylvester's construction."""
    block = head_size & -head_size
    h = np.ones((1, 1))
    while len(h) < block:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(head_size // block), h / math.sqrt(block))


def affine(values, bits):
    """Codes, scale and minimum of step 4, one single-precision operation at a time."""
    f32 = np.float32
    lo, hi = f32(min(values, default=0)) + f32(0), f32(max(values, default=0)) + f32(0)
    top = f32(2**bits - 1)

    def code(x, scale):
        inv = f32(1) / f32(scale) if scale > 0 else f32(0)
        return int(min(max(np.rint((f32(x) - lo) * inv), 0), top))

    scale = np.float16((hi - lo) / top)
    end = np.clip(lo + f32(code(hi, scale)) * f32(scale), f32(-65504), f32(65504)).astype(np.float16)
    scale = np.float16((f32(end) - lo) / top)
    return [code(x, scale) for x in values], scale, np.float16(lo)


# --- bytes --------------------------------------------------------------------------------------------------


@SLOW
@given(key_pages(largest=80))
def test_key_records_follow_the_tables(page):
    fmt, x, importance, valid = page
    record = KeyRecord(fmt, pack_keys(fmt, x, importance, valid))
    # Rows and bits are settled before: a page that came from a record keeps its bits, however few its channels would do with.
    settled, tiers = keys_module._settled_tiers(fmt, np.where(valid[:, None], x, np.float16(0)).astype(np.float32), valid, importance)
    x = settled.astype(np.float16)
    assert record.order.tolist() == select_tiers(fmt, x, importance, valid).tolist()
    for i in range(fmt.tiers[0]):
        np.testing.assert_array_equal(record.half_rows[i], np.where(valid, x[:, record.order[i]], np.float16(0)))
    for place, bits in record.bits.items():
        channel = record.order[place]
        assert tiers.bits[channel] <= bits
        column = x[:, channel]
        for g in range(CELLS // fmt.group):
            held = [t for t in range(g * fmt.group, (g + 1) * fmt.group) if valid[t]]
            codes, scale, low = affine([column[t] for t in held], int(tiers.bits[channel]))
            expected = dict(zip(held, codes, strict=True))
            for t in range(g * fmt.group, (g + 1) * fmt.group):
                assert record.codes[place, t] == expected.get(t, 0), (place, t)
            got = record.scale[place - fmt.tiers[0], g], record.min[place - fmt.tiers[0], g]
            assert [h.tobytes() for h in got] == [scale.tobytes(), low.tobytes()]
    assert not record.padding.any()


@SLOW
@given(value_pages(largest=80))
def test_value_records_follow_the_tables(page):
    fmt, x, valid = page
    f32 = np.float32
    record = ValueRecord(fmt, pack_values(fmt, x, valid))
    block = fmt.head_size & -fmt.head_size
    known = fmt.group == 0 and comes_from_a_record(fmt, x, valid)
    if fmt.group == 0 and not known:
        sums = [f32(0)] * fmt.head_size
        for t in np.flatnonzero(valid):
            sums = [a + f32(b) for a, b in zip(sums, x[t], strict=True)]
        means = np.clip(slow_rotate([a / f32(max(valid.sum(), 1)) for a in sums], block), -65504, 65504).astype(np.float16)
        squares = np.sum(x[valid].astype(float) ** 2)
        least = math.sqrt(squares / max(valid.sum(), 1) / fmt.head_size) / 16
        for mean, got in zip(means, record.mean, strict=True):
            assert got == nearest(MEANS, mean) if abs(mean) > 1.001 * least else got in (0, nearest(MEANS, mean))
    for t in range(CELLS):
        if not valid[t]:
            assert not record.codes[t].any() and not record.scale[t].any()
            continue
        if fmt.group:
            for g, first in enumerate(range(0, fmt.head_size, fmt.group)):
                dims = slice(first, first + fmt.group)
                codes, scale, low = affine(x[t, dims], fmt.bits)
                assert record.codes[t, dims].tolist() == codes
                assert (record.scale[t, g], record.min[t, g]) == (scale, low)
            continue
        y = slow_rotate(x[t].astype(f32), block) - record.mean.astype(f32)
        if fmt.bits == 8:
            exact = np.float16(max(abs(v) for v in y) / f32(127.5))
            scale = min((s for s in SCALES.values() if s >= exact), default=max(SCALES.values()))
        else:
            lane = [f32(0)] * 8
            for i, v in enumerate(y):
                lane[i % 8] = lane[i % 8] + v * v
            total = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]))
            step = {2: f32(0.9957), 3: f32(0.5860), 4: f32(0.3352)}[fmt.bits]
            scale = nearest(SCALES, np.float16(min(np.sqrt(total / f32(fmt.head_size)) * step, 65504)))
        inv = f32(1) / f32(scale) if scale > 0 else f32(0)
        middle, top = 2 ** (fmt.bits - 1), 2**fmt.bits - 1
        assert known or record.scale[t, 0] == scale
        inv = f32(1) / f32(record.scale[t, 0]) if record.scale[t, 0] > 0 else f32(0)
        assert record.codes[t].tolist() == [int(min(max(np.floor(v * inv) + middle, 0), top)) for v in y]
    assert not record.padding.any()


def comes_from_a_record(fmt, x, valid):
    wide = np.where(valid[:, None], x, np.float16(0)).astype(np.float32)
    return values_module._rotated_mean(fmt, wide, rotate(wide, fmt.rotation_block), valid)[1]


def slow_rotate(x, block):
    x = list(x)
    h = 1
    while h < block:
        for j in range(len(x)):
            if j % (2 * h) < h:
                x[j], x[j + h] = x[j] + x[j + h], x[j] - x[j + h]
        h *= 2
    factor = np.float32(1) / np.sqrt(np.float32(block))
    return np.array([v * factor for v in x], dtype=np.float32)


@SLOW
@given(key_pages(largest=80), value_pages(largest=80))
def test_unpacking_reads_what_the_tables_say(key_page, value_page):
    fmt, *page = key_page
    packed = pack_keys(fmt, *page)
    exact = np.clip(KeyRecord(fmt, packed).decoded(), -65504, 65504)
    # One rounding to float32 and one to float16 separate the two.
    np.testing.assert_allclose(unpack_keys(fmt, packed), exact, rtol=2**-11 + 2**-22, atol=2**-25 * 1.01)

    fmt, *page = value_page
    packed = pack_values(fmt, *page)
    record = ValueRecord(fmt, packed)
    # Rotating back in float32 adds an error that goes with the largest number, not with the result.
    loudest = np.abs(record.codes + 0.5 - 2 ** (fmt.bits - 1)).max() * np.abs(record.scale).max() + (0 if fmt.group else np.abs(record.mean).max())
    exact = np.clip(record.decoded(), -65504, 65504)
    atol = 2**-25 * 1.01 + 2**-18 * float(loudest)
    np.testing.assert_allclose(unpack_values(fmt, packed), exact, rtol=2**-11 + 2**-22, atol=atol)


def test_the_golden_records_have_not_changed():
    with np.load(golden.GOLDEN_FILE) as file:
        expected = dict(file)
    made = golden.golden()
    assert made.keys() == expected.keys()
    different = [name for name in made if not np.array_equal(made[name], expected[name])]
    assert different == []


# --- formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "size"),
    [
        (KeyFormat(128, (0, 0, 0, 0, 128)), 32 * 128 + 4 * 128 + 128),
        (KeyFormat(128, (128, 0, 0, 0, 0)), 256 * 128 + 128),
        (
            KeyFormat(128, (16, 16, 32, 32, 32), 32),
            256 * 16 + 128 * 16 + (64 + 48 + 32) * 32 + 4 * 112 * 4 + 128,
        ),
        (KeyFormat(80, (4, 8, 16, 20, 32), 64), 4 * 1024 + 48 * 20 + 4 * 76 * 2 + 80),
        (ValueFormat(128, 2), 32 * 128 + 128 + 128),
        (ValueFormat(80, 3), 48 * 80 + 128 + 80),
        (ValueFormat(80, 2, 32), 32 * 80 + 2 * 256 * 3),
        (ValueFormat(40, 4, 64), 64 * 40 + 2 * 256),
        (ValueFormat(256, 8), 128 * 256 + 128 + 256),
    ],
)
def test_record_sizes(fmt, size):
    assert fmt.record_bytes == -(-size // 64) * 64
    packed = pack_keys(fmt, *page_of(fmt)) if isinstance(fmt, KeyFormat) else pack_values(fmt, *page_of(fmt)[:1])
    assert packed.dtype == np.uint8 and packed.shape == (fmt.record_bytes,)


def page_of(fmt, kind="gaussian", seed=5):
    return golden.page(kind, fmt.head_size, seed), golden.importances("spread", fmt.head_size, seed)


def test_body_bits_are_those_of_the_specification():
    keys, values = KeyFormat(128, (16, 0, 32, 0, 80)), ValueFormat(128, 3)
    mean = (16 * 16 + 4 * 32 + 2 * 80) / 128
    assert keys.code_bits == mean
    assert keys.body_bits == mean + 0.25 * (1 - 16 / 128) + 0.0625
    assert values.body_bits == 3 + 0.125
    assert body_bits(keys, values) == (keys.body_bits + values.body_bits) / 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KeyFormat(36, (0, 0, 0, 0, 36)), "head_size is 36"),
        (lambda: KeyFormat(24, (0, 0, 0, 0, 24)), "head_size is 24"),
        (lambda: KeyFormat(264, (0, 0, 0, 0, 264)), "head_size is 264"),
        (lambda: KeyFormat(64.0, (0, 0, 0, 0, 64)), "head_size is 64.0"),
        (lambda: KeyFormat(64, (0, 0, 0, 64)), r"tiers is \(0, 0, 0, 64\)"),
        (lambda: KeyFormat(64, (2, 0, 0, 0, 62)), "n16 is 2"),
        (lambda: KeyFormat(64, (0, 0, 0, -4, 68)), "n3 is -4"),
        (lambda: KeyFormat(64, (0, 0, 0, 4, 64)), "add up to 68, but head_size is 64"),
        (lambda: KeyFormat(64, (0, 0, 0, 0, 64), 16), "group is 16"),
        (lambda: ValueFormat(100, 2), "head_size is 100"),
        (lambda: ValueFormat(64, 5), "bits is 5"),
        (lambda: ValueFormat(64, 16), "bits is 16"),
        (lambda: ValueFormat(64, 2, 128), "group is 128"),
    ],
)
def test_formats_that_do_not_exist(make, words):
    with pytest.raises(ValueError, match=words):
        make()


KEYS, VALUES = KeyFormat(32, (4, 4, 8, 8, 8)), ValueFormat(32, 2)
ROWS, WEIGHTS = np.zeros((128, 32), dtype=np.float16), np.ones(32, dtype=np.float32)
BROKEN_ROWS = np.where(np.arange(32) == 7, np.float16(np.inf), ROWS)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pack_keys(KEYS, ROWS.astype(np.float32), WEIGHTS), "rows has type float32"),
        (lambda: pack_keys(KEYS, ROWS[:127], WEIGHTS), r"rows .*\(127, 32\)"),
        (lambda: pack_keys(KEYS, ROWS.tolist(), WEIGHTS), "rows is a list"),
        (lambda: pack_keys(KEYS, BROKEN_ROWS, WEIGHTS), r"rows\[0, 7\] is inf"),
        (lambda: pack_keys(KEYS, ROWS, WEIGHTS[:31]), r"importance .*\(31,\)"),
        (lambda: pack_keys(KEYS, ROWS, -WEIGHTS), r"importance\[0\] is -1.0"),
        (lambda: pack_keys(KEYS, ROWS, WEIGHTS * np.nan), r"importance\[0\] is nan"),
        (lambda: pack_keys(KEYS, ROWS, WEIGHTS, np.ones(64, dtype=bool)), r"valid .*\(64,\)"),
        (lambda: select_tiers(KEYS, ROWS, WEIGHTS, np.ones(128)), "valid has type float64"),
        (lambda: unpack_keys(KEYS, np.zeros(64, dtype=np.uint8)), r"record .*\(64,\)"),
        (
            lambda: unpack_keys(KEYS, np.zeros(KEYS.record_bytes, dtype=np.uint8)),
            "not a permutation of its 32",
        ),
        (lambda: pack_values(VALUES, ROWS[:, :31]), r"rows .*\(128, 31\)"),
        (lambda: unpack_values(VALUES, np.zeros(VALUES.record_bytes, dtype=np.int8)), "record has type int8"),
        (lambda: rotate(ROWS, 32), "x has type float16"),
        (lambda: rotate(np.zeros(32), 12), "block is 12"),
        (lambda: rotate(np.zeros(48), 32), "block is 32"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_what_invalid_cells_hold_does_not_matter():
    x, importance = page_of(MIXED)
    valid = golden.valid_cells("sparse")
    junk = np.where(valid[:, None], x, np.float16(np.nan))
    np.testing.assert_array_equal(pack_keys(MIXED, junk, importance, valid), pack_keys(MIXED, x, importance, valid))
    for fmt in (ValueFormat(80, 3), ValueFormat(80, 2, 32)):
        np.testing.assert_array_equal(pack_values(fmt, junk, valid), pack_values(fmt, x, valid))
        back = unpack_values(fmt, pack_values(fmt, x, valid))[~valid]
        assert np.isfinite(back).all() and (fmt.group == 0 or not back.any())  # rotated, they read as the page's mean


def test_a_page_without_a_token_is_zero_but_for_the_order():
    x, importance = page_of(MIXED)
    nobody = np.zeros(CELLS, dtype=bool)
    record = pack_keys(MIXED, x, importance, nobody)
    assert record[MIXED.offset_order :][:80].tolist() == list(range(80))
    assert not record[: MIXED.offset_order].any()
    assert not pack_values(ValueFormat(80, 2), x, nobody).any()


# --- numbers ------------------------------------------------------------------------------------------------


def test_to_half_rounds_every_interval_to_the_even_neighbour():
    bits = np.arange(0x7BFF, dtype=np.uint16)  # every finite half but the largest
    here, above = (
        bits.view(np.float16).astype(np.float32),
        (bits + np.uint16(1)).view(np.float16).astype(np.float32),
    )
    middle = (here + above) / 2  # exact in float32
    even = bits + (bits & 1)
    for sign in (np.float32(1), np.float32(-1)):
        flip = np.uint16(0x8000 if sign < 0 else 0)
        assert np.array_equal(to_half(sign * here).view(np.uint16), bits | flip)
        assert np.array_equal(to_half(sign * middle).view(np.uint16), even | flip)
        assert np.array_equal(to_half(sign * np.nextafter(middle, np.float32(0))).view(np.uint16), bits | flip)
        assert np.array_equal(to_half(sign * np.nextafter(middle, above)).view(np.uint16), (bits + np.uint16(1)) | flip)


def test_to_half_clamps():
    x = np.array([np.nan, np.inf, -np.inf, 65519, 65520, 1e30, -1e30], dtype=np.float32)
    assert to_half(x).tolist() == [0, 65504, -65504, 65504, 65504, 65504, -65504]


@pytest.mark.parametrize("head_size", [32, 40, 64, 80, 96, 128, 192, 256])
def test_the_rotation_is_the_block_hadamard_matrix(head_size):
    block = head_size & -head_size
    h = rotate(np.eye(head_size), block)
    np.testing.assert_allclose(h, hadamard(head_size), atol=1e-15)
    np.testing.assert_allclose(h @ h.T, np.eye(head_size), atol=1e-14)
    np.testing.assert_array_equal(h, h.T)
    x = golden.bells(3, (7, head_size))
    np.testing.assert_allclose(rotate(rotate(x, block), block), x, atol=1e-5)
    np.testing.assert_array_equal(rotate(x, block)[2], slow_rotate(x[2], block))


# --- the order of channels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", ["gaussian", "outlier"])
def test_tiers_go_by_salience_and_then_by_index(kind, group):
    fmt = KeyFormat(40, (4, 8, 8, 8, 12), group)
    x, importance = page_of(fmt, kind)
    valid = golden.valid_cells("tail_empty")
    order = select_tiers(fmt, x, importance, valid)
    assert order.dtype == np.uint8 and sorted(order.tolist()) == list(range(40))
    salience = []
    for d in range(40):
        spread = np.float32(0)
        for g in range(0, CELLS, group):
            held = x[g : g + group, d][valid[g : g + group]].astype(np.float32)
            spread += held.max() - held.min() if len(held) else np.float32(0)
        salience.append(importance[d] * spread)
    expected = sorted(range(40), key=lambda d: (-salience[d], d))
    for first, end in ((0, 4), (4, 12), (12, 20), (20, 28), (28, 40)):
        assert order[first:end].tolist() == sorted(expected[first:end])


def test_the_queries_decide_between_channels_of_equal_range():
    x = np.tile(golden.page("gaussian", 32, 1)[:, :1], (1, 32))
    importance = np.zeros(32, dtype=np.float32)
    importance[[30, 2, 17]] = 3, 2, 1
    assert select_tiers(KEYS, x, importance)[:8].tolist() == [0, 2, 17, 30, 1, 3, 4, 5]


# --- distortion ---------------------------------------------------------------------------------------------


@QUICK
@given(key_pages(largest=96))
def test_keys_come_back_within_half_a_step(page):
    fmt, x, importance, valid = page
    packed = pack_keys(fmt, x, importance, valid)
    back = unpack_keys(fmt, packed).astype(np.float64)
    held_rows = np.where(valid[:, None], x, np.float16(0)).astype(np.float32)
    tiers = keys_module._tiers(fmt, held_rows, valid, importance)  # packing a page a second time loses nothing more
    assert np.isfinite(back).all()
    for d, bits in enumerate(tiers.bits.tolist()):
        for g in range(0, CELLS, fmt.group):
            held = np.arange(g, g + fmt.group)[valid[g : g + fmt.group]]
            if not len(held):
                continue
            original = x[held, d].astype(np.float64)
            error = np.abs(original - back[held, d])
            if bits == 16:
                assert not error.any()
                continue
            spread, top = original.max() - original.min(), 2**bits - 1
            scale = float(affine(list(x[held, d]), bits)[1])
            saturated = max(0.0, spread - top * scale)  # a scale that was rounded down does not reach the maximum
            rounding = np.maximum(2**-11 * np.abs(back[held, d]), 2**-25)
            # single precision may put a number next to the middle of a step on the wrong side
            assert (error <= scale * (0.5 + 2**-12) + saturated + 1.01 * rounding + 2**-23 * spread).all()


def test_two_bits_are_two_bits():
    """The other side of the bound: half of the largest error is used up."""
    x, importance = page_of(KEYS)
    order = select_tiers(KEYS, x, importance)
    error = np.abs(x.astype(float) - unpack_keys(KEYS, pack_keys(KEYS, x, importance)))
    spread = np.ptp(x.astype(float), axis=0)
    for place, bits in enumerate(np.repeat(KEY_BITS, KEYS.tiers)):
        if bits < 16:
            worst = error[:, order[place]].max() / (spread[order[place]] / (2 ** int(bits) - 1))
            assert 0.4 < worst < 0.52 + 2.0 ** (bits - 11), (bits, worst)


@pytest.mark.parametrize(
    ("bits", "theory"),
    [(2, 0.11885), (3, 0.03744), (4, 0.01154)],  # uniform quantisers of a unit Gaussian (Max, 1960)
)
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_rotated_gaussian_values_have_the_distortion_of_theory(bits, theory, head_size):
    rng = np.random.default_rng(7)
    fmt = ValueFormat(head_size, bits)
    x = rng.normal(size=(6, CELLS, head_size)).astype(np.float16)
    back = np.stack([unpack_values(fmt, pack_values(fmt, page)) for page in x])
    error = ((back.astype(float) - x) ** 2).mean() / (x.astype(float) ** 2).mean()
    # A band, not a bound: better than theory is wrong too. Each row has its own sigma, which helps short rows.
    assert 0.92 * theory < error < 1.02 * theory


def test_rotation_tames_an_outlier_that_breaks_plain_groups():
    x = golden.bells(1, (CELLS, 128)).astype(np.float16)
    x[:, 5] *= 20
    quiet = np.arange(128) != 5
    errors = []
    for fmt in (ValueFormat(128, 4), ValueFormat(128, 4, 64)):
        back = unpack_values(fmt, pack_values(fmt, x)).astype(float)
        errors.append(((back - x)[:, quiet][:, :63] ** 2).mean())
    assert errors[0] < 0.5 * errors[1]


# --- packing again ------------------------------------------------------------------------------------------


@QUICK
@given(key_pages(), st.sampled_from(golden.IMPORTANCE_KINDS), seeds)
def test_keys_that_were_read_back_pack_to_their_record(page, kind, seed):
    """Whatever the queries are then."""
    fmt, x, importance, valid = page
    packed = pack_keys(fmt, x, importance, valid)
    again = pack_keys(fmt, unpack_keys(fmt, packed), golden.importances(kind, fmt.head_size, seed), valid)
    np.testing.assert_array_equal(again, packed)


@QUICK
@given(value_pages())
def test_grouped_values_that_were_read_back_pack_to_their_record(page):
    fmt, x, valid = page
    fmt = ValueFormat(fmt.head_size, fmt.bits, fmt.group or 32)
    packed = pack_values(fmt, x, valid)
    np.testing.assert_array_equal(pack_values(fmt, unpack_values(fmt, packed), valid), packed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
def test_rotated_values_that_were_read_back_pack_to_their_record(bits, head_size):
    fmt = ValueFormat(head_size, bits)
    for seed in range(4):
        x = (golden.bells(seed, (CELLS, head_size)) * (1 + golden.words(seed, CELLS)[:, None] % np.uint64(4)).astype(np.float32)).astype(np.float16)
        x += golden.bells(seed + 9, (head_size,)).astype(np.float16)
        for kind in ("all", "tail_empty"):
            valid = golden.valid_cells(kind)
            packed = pack_values(fmt, x, valid)
            np.testing.assert_array_equal(pack_values(fmt, unpack_values(fmt, packed), valid), packed)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_that_stay_keep_their_values_when_others_are_written(bits):
    fmt = ValueFormat(128, bits)
    x = golden.bells(3, (CELLS, 128)).astype(np.float16)
    back = unpack_values(fmt, pack_values(fmt, x))
    written = back.copy()
    written[40:52] = golden.bells(4, (12, 128))
    stays = np.arange(CELLS)[(np.arange(CELLS) < 40) | (np.arange(CELLS) >= 52)]
    np.testing.assert_array_equal(unpack_values(fmt, pack_values(fmt, written))[stays], back[stays])


def test_channels_keep_tier_and_codes_when_some_rows_are_written():
    fmt = KeyFormat(64, (0, 0, 16, 32, 16))
    x, importance = page_of(fmt)
    packed = pack_keys(fmt, x, importance)
    back = unpack_keys(fmt, packed)
    written = back.copy()
    written[40:44] = np.clip(x[40:44] * np.float16(0.5), back.min(axis=0), back.max(axis=0))
    again = pack_keys(fmt, written, golden.importances("equal", 64, 0))
    kept = (np.delete(unpack_keys(fmt, again), slice(40, 44), axis=0) == np.delete(back, slice(40, 44), axis=0)).all(axis=0)
    assert kept.sum() >= 58  # all but those whose range ended in the rows that are gone


@QUICK
@given(st.data())
def test_reading_back_is_finite(data):
    fmt, x, valid = data.draw(value_pages())
    assert np.isfinite(unpack_values(fmt, pack_values(fmt, x, valid))).all()
    keys = KeyFormat(fmt.head_size, (0, 0, 0, 0, fmt.head_size))
    x = data.draw(rows(fmt.head_size))
    assert np.isfinite(unpack_keys(keys, pack_keys(keys, x, np.ones(fmt.head_size), valid))).all()


# --- attention ----------------------------------------------------------------------------------------------


def records(key_format, value_format, n_pages, seed=0):
    keys = [pack_keys(key_format, *page_of(key_format, seed=seed + p)) for p in range(n_pages)]
    values = [pack_values(value_format, page_of(value_format, seed=seed + 50 + p)[0]) for p in range(n_pages)]
    return np.stack(keys), np.stack(values)


def plain_attention(key_format, value_format, key_records, value_records, q, mask, scale, softcap, sink):
    keys = np.concatenate([KeyRecord(key_format, r).decoded() for r in key_records])
    values = np.concatenate([ValueRecord(value_format, r).decoded() for r in value_records])
    out = np.zeros((len(q), values.shape[1]))
    for i, query in enumerate(q):
        logits = [float(query @ k) * scale for k in keys]
        if softcap:
            logits = [softcap * math.tanh(x / softcap) for x in logits]
        weights = [math.exp(x + m) for x, m in zip(logits, mask[i], strict=True)]
        total = sum(weights) + (math.exp(sink[i]) if sink is not None else 0)
        if total > 0:
            out[i] = np.array(weights) @ values / total
    return out


@pytest.mark.parametrize(
    ("value_format", "softcap", "with_sink"),
    [
        (ValueFormat(40, 3), 0.0, False),
        (ValueFormat(40, 8), 5.0, True),
        (ValueFormat(80, 2, 32), 0.0, True),
        (ValueFormat(64, 4), 20.0, False),
    ],
)
def test_attention_is_softmax_attention_on_the_decoded_page(value_format, softcap, with_sink):
    packed = records(MIXED, value_format, 2)
    q = golden.bells(8, (3, 80)).astype(np.float64)
    hidden = golden.words(9, 3 * 256).reshape(3, 256) % np.uint64(3) == 0
    mask = np.where(hidden, -np.inf, golden.bells(10, (3, 256)).astype(np.float64))
    sink = np.array([-1.0, 2.0, 9.0]) if with_sink else None
    args = (MIXED, value_format, *packed, q, mask, 1 / math.sqrt(80), softcap, sink)
    np.testing.assert_allclose(attend(*args), plain_attention(*args), rtol=1e-10, atol=1e-10)


def test_a_query_that_sees_nothing_gives_zero():
    packed = records(KEYS, VALUES, 1)
    q = golden.bells(1, (2, 32))
    mask = np.zeros((2, CELLS))
    mask[1] = -np.inf
    plain = attend(KEYS, VALUES, *packed, q, mask, 0.2)
    assert plain[0].any() and not plain[1].any()
    with_sink = attend(KEYS, VALUES, *packed, q, mask, 0.2, sink=[-np.inf, 3.0])
    np.testing.assert_allclose(with_sink, plain)
    none = np.zeros((0, KEYS.record_bytes), np.uint8), np.zeros((0, VALUES.record_bytes), np.uint8)
    assert not attend(KEYS, VALUES, *none, q).any()


def test_a_query_that_sees_one_cell_gives_its_value():
    packed = records(KEYS, VALUES, 2)
    mask = np.full((1, 2 * CELLS), -np.inf)
    mask[0, 200] = 5.0
    out = attend(KEYS, VALUES, *packed, golden.bells(1, (1, 32)), mask, 0.2)
    np.testing.assert_allclose(out[0], unpack_values(VALUES, packed[1][1])[72], rtol=2**-10, atol=1e-3)


def test_large_logits_do_not_overflow():
    packed = records(KEYS, VALUES, 1)
    out = attend(KEYS, VALUES, *packed, 1e4 * golden.bells(1, (1, 32)), scale=1.0)
    assert np.isfinite(out).all() and out.any()


def test_the_order_of_pages_does_not_matter():
    keys, values = records(KEYS, VALUES, 3)
    q = golden.bells(2, (4, 32))
    one = attend(KEYS, VALUES, keys, values, q, scale=0.2)
    np.testing.assert_allclose(attend(KEYS, VALUES, keys[::-1], values[::-1], q, scale=0.2), one, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": np.zeros((1, 31))}, r"q .*\(1, 31\)"),
        ({"q": np.full((1, 32), np.nan)}, "q holds nan"),
        ({"mask": np.zeros((1, 127))}, r"mask .*\(1, 127\)"),
        ({"mask": np.full((1, 128), np.inf)}, "mask holds inf"),
        ({"sink": np.zeros(2)}, r"sink .*\(2,\)"),
        ({"scale": np.inf}, "scale is inf"),
        ({"softcap": -1.0}, "softcap is -1"),
        ({"value_records": np.zeros((2, VALUES.record_bytes), np.uint8)}, "value_records has 2 pages"),
        ({"key_records": np.zeros((1, 7), np.uint8)}, r"record .*\(7,\)"),
    ],
)
def test_wrong_attention_arguments_are_named(change, words):
    keys, values = records(KEYS, VALUES, 1)
    arguments = {"key_records": keys, "value_records": values, "q": np.zeros((1, 32)), **change}
    with pytest.raises(ValueError, match=words):
        attend(KEYS, VALUES, **arguments)
