"""The native kernels against the reference: packing byte for byte on every instruction set, attention within a tolerance.

Errors of attention are in units of the root mean square of the values; `assert_attention_agrees` says how large they may be.

SINGLE covers single precision. The pages below have logits of order 10. A logit is a sum of up to 256 products whose
rounding errors of 2^-24 are random, on terms that folding scale and minimum into the query makes up to six times as large
as the products themselves: sqrt(256) * 6 * 2^-24 = 6e-6. A weight is relatively wrong by as much.

The vector kernels also round to integers: queries, with the scale folded in, to 127 steps of the largest in a tier beside 2- and
3-bit codes and to 32767 beside longer ones; weights to 255 steps of the largest of 32 tokens beside 2- and 3-bit values, where what
is left of one token passes on to another (so two errors meet in every term), and to 32767 steps of the page's largest otherwise.
Rounding errors are uniform, so they add up like noise of 1 / sqrt(12) step per term; SIGMAS of it are allowed. A code lies at most
(2^bits - 1) / 2 from the middle one.
"""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import golden, key_formats, key_pages, value_formats, value_pages

from mixkvq.core import _native as native
from mixkvq.core import reference
from mixkvq.core.reference import KeyFormat, ValueFormat

SINGLE = 1e-5
SIGMAS = 3
CELLS = 128
ISAS = native.isas()

every_isa = pytest.mark.parametrize("isa", ISAS)
MANY = settings(max_examples=100)


def twin(fmt):
    """The native format of a reference format."""
    if isinstance(fmt, KeyFormat):
        return native.KeyFormat(fmt.head_size, fmt.tiers, fmt.group)
    return native.ValueFormat(fmt.head_size, fmt.bits, fmt.group)


_known: dict = {}


def once(function, *arguments):
    """What a function of the reference gives, computed once for all instruction sets that are compared with it."""
    key = (function.__name__, *((a.shape, a.dtype.str, hashlib.sha256(a.tobytes()).digest()) if isinstance(a, np.ndarray) else a for a in arguments))
    if key not in _known:
        _known[key] = function(*arguments)
    return _known[key]


def assert_same_bits(got, want):
    """Equality of dtype, shape and every bit: unlike ==, it tells -0 from 0."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    different = np.flatnonzero(got.reshape(-1).view(np.uint8) != want.reshape(-1).view(np.uint8))
    assert len(different) == 0, f"{len(different)} bytes differ, the first at {different[0]}"


def assert_keys_agree(isa, fmt, rows, importance, valid):
    record = once(reference.pack_keys, fmt, rows, importance, valid)
    assert_same_bits(native.pack_keys(twin(fmt), rows, importance, valid, isa=isa), record)
    order = once(reference.select_tiers, fmt, rows, importance, valid)
    assert_same_bits(native.select_tiers(twin(fmt), rows, importance, valid, isa=isa), order)
    assert_same_bits(native.unpack_keys(twin(fmt), record, isa=isa), once(reference.unpack_keys, fmt, record))


def assert_values_agree(isa, fmt, rows, valid):
    record = once(reference.pack_values, fmt, rows, valid)
    assert_same_bits(native.pack_values(twin(fmt), rows, valid, isa=isa), record)
    assert_same_bits(native.unpack_values(twin(fmt), record, isa=isa), once(reference.unpack_values, fmt, record))


# --- packing --------------------------------------------------------------------------------------------------


def test_scalar_is_always_there_and_the_choice_is_one_of_the_list():
    assert "scalar" in ISAS
    assert native.isa() in ISAS


@every_isa
def test_golden_pages_have_the_same_bytes(isa):
    with np.load(golden.GOLDEN_FILE) as file:
        expected = dict(file)
    for case in golden.cases():
        if isinstance(case.format, KeyFormat):
            record = native.pack_keys(twin(case.format), case.rows, case.importance, case.valid, isa=isa)
            rows, unpack = native.unpack_keys(twin(case.format), record, isa=isa), reference.unpack_keys
        else:
            record = native.pack_values(twin(case.format), case.rows, case.valid, isa=isa)
            rows, unpack = native.unpack_values(twin(case.format), record, isa=isa), reference.unpack_values
        assert np.array_equal(golden.stored(record), expected[f"{case.name}.record"]), case.name
        assert np.array_equal(rows.view(np.uint16), once(unpack, case.format, record).view(np.uint16)), case.name


@MANY
@given(page=key_pages())
def test_key_pages_have_the_same_bytes(page):
    for isa in ISAS:
        assert_keys_agree(isa, *page)


@MANY
@given(page=value_pages())
def test_value_pages_have_the_same_bytes(page):
    for isa in ISAS:
        assert_values_agree(isa, *page)


@every_isa
@pytest.mark.parametrize("kind", golden.PAGE_KINDS)
@pytest.mark.parametrize("head_size", [40, 128])
def test_every_kind_of_page_has_the_same_bytes(isa, kind, head_size):
    rows = golden.page(kind, head_size, 12345)
    importance = golden.importances("spread", head_size, 6)
    quarter = head_size // 4 // 4 * 4
    for group in (32, 64, 128):
        fmt = KeyFormat(head_size, (head_size - 4 * quarter, quarter, quarter, quarter, quarter), group)
        assert_keys_agree(isa, fmt, rows, importance, golden.valid_cells("tail_empty"))
    for bits in (2, 3, 4, 8):
        for group in (0, 32, 64):
            assert_values_agree(isa, ValueFormat(head_size, bits, group), rows, golden.valid_cells("sparse"))


@every_isa
def test_a_scale_at_every_half_rounds_alike(isa):
    """One channel per positive finite half as the range: the division and the rounding of the scale."""
    ends = np.arange(0x7C00, dtype=np.uint16).view(np.float16).reshape(-1, 256)
    fmt = KeyFormat(256, (0, 64, 64, 64, 64))
    for i, end in enumerate(ends):
        rows = np.zeros((CELLS, 256), dtype=np.float16)
        rows[i % CELLS] = end
        rows[(i + 1) % CELLS] = end / np.float16(2)
        assert_keys_agree(isa, fmt, rows, golden.importances("spread", 256, i), None)


@every_isa
def test_what_invalid_cells_hold_does_not_matter(isa):
    keys, values = KeyFormat(48, (4, 8, 12, 12, 12), 32), (ValueFormat(48, 3), ValueFormat(48, 2, 32))
    valid = golden.valid_cells("sparse")
    rows = np.where(valid[:, None], golden.page("gaussian", 48, 1), np.float16(np.nan))
    assert_keys_agree(isa, keys, rows, golden.importances("spread", 48, 1), valid)
    for fmt in values:
        assert_values_agree(isa, fmt, rows, valid)


@every_isa
def test_arrays_need_not_be_contiguous(isa):
    fmt, rows, importance = KeyFormat(64, (4, 0, 20, 0, 40)), golden.page("gaussian", 128, 2), golden.bells(3, (128,)) ** 2
    record = reference.pack_keys(fmt, rows[:, ::2].copy(), importance[::2].copy())
    assert_same_bits(native.pack_keys(twin(fmt), rows[:, ::2], importance[::2], isa=isa), record)
    spread = np.repeat(record, 2)[::2]
    assert_same_bits(native.unpack_keys(twin(fmt), spread, isa=isa), reference.unpack_keys(fmt, record))


@every_isa
def test_records_need_not_be_aligned(isa):
    keys, values = KeyFormat(64, (4, 0, 20, 0, 40)), ValueFormat(64, 3)
    rows = golden.page("gaussian", 64, 2)
    for fmt, record, unpack in (
        (keys, reference.pack_keys(keys, rows, np.ones(64, np.float32)), "unpack_keys"),
        (values, reference.pack_values(values, rows), "unpack_values"),
    ):
        shifted = np.zeros(len(record) + 1, dtype=np.uint8)[1:]
        shifted[:] = record
        assert_same_bits(getattr(native, unpack)(twin(fmt), shifted, isa=isa), getattr(reference, unpack)(fmt, record))


@given(fmt=st.one_of(key_formats(), value_formats()))
def test_formats_have_the_same_size(fmt):
    assert twin(fmt).record_bytes == fmt.record_bytes
    assert (twin(fmt).head_size, twin(fmt).group) == (fmt.head_size, fmt.group)


# --- attention ------------------------------------------------------------------------------------------------


def packed(key_format, value_format, n_pages, seed):
    return once(_packed, key_format, value_format, n_pages, seed)


def _packed(key_format, value_format, n_pages, seed):
    """Records of pages like those of a model: keys with means and loud channels, quiet values."""
    keys, values = [], []
    for p in range(n_pages):
        channel = np.arange(key_format.head_size)
        x = golden.bells(seed + p, (CELLS, key_format.head_size))
        x = x * (1 + 3 * (channel % 5 == 0)) + channel % 3
        importance = golden.importances("spread", key_format.head_size, seed)
        keys.append(reference.pack_keys(key_format, x.astype(np.float16), importance))
        y = golden.bells(seed + p + 7000, (CELLS, value_format.head_size)).astype(np.float16)
        values.append(reference.pack_values(value_format, y))
    return np.stack(keys), np.stack(values)


def noise(key_format, value_format, keys, q, scale):
    """Of rounding to integers."""
    logit_noise = 0.0
    for record in keys:
        order = record[key_format.offset_order :][: key_format.head_size]
        groups = reference.unpack_keys(key_format, record).astype(np.float64).reshape(key_format.n_groups, key_format.group, -1)
        variance = np.zeros((len(q), key_format.n_groups))
        tiers = np.split(order, np.cumsum(key_format.tiers)[:-1])
        for bits, channels in zip(reference.KEY_BITS[1:], tiers[1:], strict=True):
            spread = np.ptp(groups[..., channels], axis=1)  # 2^bits - 1 steps, for every channel fills its range
            largest = np.abs(q[:, None, channels] * spread).max(axis=2, initial=0)
            steps = 127 if bits <= 3 else 32767
            variance += len(channels) * (largest / steps / 2) ** 2 / 12
        logit_noise = max(logit_noise, scale * np.sqrt(variance.max()))
    weight_noise = np.sqrt(2 * 32 / 12) / 255 if value_format.bits <= 3 else np.sqrt(CELLS / 12) / 32767
    return np.expm1(logit_noise) + weight_noise


def loudness(value_format, values):
    return np.sqrt(np.mean([reference.unpack_values(value_format, r).astype(np.float64) ** 2 for r in values]))


def assert_attention_agrees(isa, key_format, value_format, keys, values, q, mask=None, scale=1.0, softcap=0.0, sink=None):
    args = (keys, values, q, mask, scale, softcap, sink)
    got = native.attend(twin(key_format), twin(value_format), *args, isa=isa)
    want = once(reference.attend, key_format, value_format, *args)
    assert (got.dtype, got.shape) == (np.float32, want.shape)
    error = np.abs(got - want).max() / once(loudness, value_format, values)
    allowed = SINGLE + (0 if isa == "scalar" else SIGMAS * once(noise, key_format, value_format, keys, q, scale))
    assert error <= allowed, (isa, error, allowed)


@st.composite
def attentions(draw):
    """Formats, records, queries, mask, scale, soft cap and sink."""
    key_format, value_format = draw(key_formats()), draw(value_formats())
    n, n_pages, seed = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    q = golden.bells(seed + 1, (n, key_format.head_size))
    mask = None
    if draw(st.booleans()):
        hidden = golden.words(seed + 2, n * n_pages * CELLS).reshape(n, -1) % np.uint64(4) < draw(st.integers(0, 4))
        mask = np.where(hidden, np.float32(-np.inf), golden.bells(seed + 3, hidden.shape)).astype(np.float32)
    sink = golden.bells(seed + 4, (n,)) * np.float32(3) if draw(st.booleans()) else None
    scale = 1 / float(np.sqrt(key_format.head_size))
    softcap = draw(st.sampled_from([0.0, 0.0, 5.0, 30.0]))
    return key_format, value_format, *packed(key_format, value_format, n_pages, seed), q, mask, scale, softcap, sink


@MANY
@given(args=attentions())
def test_attention_agrees(args):
    for isa in ISAS:
        assert_attention_agrees(isa, *args)


@every_isa
@pytest.mark.parametrize("n", [*range(1, 10), 15, 16, 17, 33])
def test_attention_agrees_at_every_number_of_queries(isa, n):
    key_format, value_format = KeyFormat(80, (4, 8, 16, 20, 32), 32), ValueFormat(96, 3)
    records = packed(key_format, value_format, 2, 30)
    assert_attention_agrees(isa, key_format, value_format, *records, golden.bells(n, (n, 80)), scale=0.1)


@every_isa
@pytest.mark.parametrize("tier", range(5))
@pytest.mark.parametrize("value_format", [ValueFormat(64, b, g) for b in (2, 3, 4, 8) for g in (0, 32)], ids=str)
def test_attention_agrees_in_every_tier(isa, tier, value_format):
    key_format = KeyFormat(64, tuple(64 * (tier == i) for i in range(5)))
    records = packed(key_format, value_format, 1, 40 + tier)
    assert_attention_agrees(isa, key_format, value_format, *records, golden.bells(5, (4, 64)), scale=0.125)


@every_isa
@pytest.mark.parametrize("cell", [0, 1, 31, 63, 64, 127, 128, 200, 255])
def test_a_query_that_sees_one_cell_gives_its_value(isa, cell):
    key_format, value_format = KeyFormat(64, (4, 4, 16, 8, 32)), ValueFormat(64, 2)
    keys, values = packed(key_format, value_format, 2, 50)
    mask = np.full((1, 2 * CELLS), -np.inf, dtype=np.float32)
    mask[0, cell] = 0
    q = golden.bells(6, (1, 64))
    out = native.attend(twin(key_format), twin(value_format), keys, values, q, mask, 0.125, isa=isa)
    value = reference.unpack_values(value_format, values[cell // CELLS])[cell % CELLS]
    np.testing.assert_allclose(out[0], value.astype(np.float32), rtol=2**-10, atol=SINGLE)


@every_isa
def test_a_query_that_sees_nothing_gives_zero(isa):
    key_format, value_format = KeyFormat(64, (4, 4, 16, 8, 32)), ValueFormat(64, 2)
    keys, values = packed(key_format, value_format, 2, 60)
    q = golden.bells(6, (3, 64))
    mask = np.zeros((3, 2 * CELLS), dtype=np.float32)
    mask[1] = -np.inf  # nothing at all
    mask[2, :CELLS] = -np.inf  # not the first page
    for sink in (None, np.array([1, 2, -np.inf], dtype=np.float32)):
        out = native.attend(twin(key_format), twin(value_format), keys, values, q, mask, 0.125, 0.0, sink, isa=isa)
        assert not out[1].any() and out[0].any() and out[2].any()
        assert_attention_agrees(isa, key_format, value_format, keys, values, q, mask, 0.125, 0.0, sink)


@every_isa
def test_no_page_gives_zero(isa):
    key_format, value_format = KeyFormat(64, (4, 4, 16, 8, 32)), ValueFormat(40, 2)
    keys, values = (np.zeros((0, f.record_bytes), dtype=np.uint8) for f in (key_format, value_format))
    q = golden.bells(6, (2, 64))
    out = native.attend(twin(key_format), twin(value_format), keys, values, q, isa=isa)
    assert out.shape == (2, 40) and not out.any()


@every_isa
def test_large_logits_do_not_overflow(isa):
    key_format, value_format = KeyFormat(64, (4, 4, 16, 8, 32)), ValueFormat(64, 4)
    keys, values = packed(key_format, value_format, 2, 70)
    q = golden.bells(6, (2, 64)) * np.float32(1e4)
    out = native.attend(twin(key_format), twin(value_format), keys, values, q, isa=isa)
    assert np.isfinite(out).all() and out.any()


# --- errors ---------------------------------------------------------------------------------------------------

KEYS, VALUES = native.KeyFormat(32, (4, 4, 8, 8, 8)), native.ValueFormat(32, 2)
ROWS, WEIGHTS = np.zeros((CELLS, 32), dtype=np.float16), np.ones(32, dtype=np.float32)
BROKEN_ROWS = np.where(np.arange(32) == 7, np.float16(np.inf), ROWS)
KEY_RECORD, VALUE_RECORD = native.pack_keys(KEYS, ROWS, WEIGHTS), native.pack_values(VALUES, ROWS)
QUERY = np.zeros((1, 32), dtype=np.float32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: native.KeyFormat(36, (0, 0, 0, 0, 36)), "36"),
        (lambda: native.KeyFormat(264, (0, 0, 0, 0, 264)), "264"),
        (lambda: native.KeyFormat(64, (2, 0, 0, 0, 62)), "62"),
        (lambda: native.KeyFormat(64, (0, 0, 0, -4, 68)), "-4"),
        (lambda: native.KeyFormat(64, (0, 0, 0, 4, 64)), "64"),
        (lambda: native.KeyFormat(64, (0, 0, 0, 0, 64), 16), "16"),
        (lambda: native.ValueFormat(100, 2), "100"),
        (lambda: native.ValueFormat(64, 5), "5"),
        (lambda: native.ValueFormat(64, 2, 128), "128"),
        (lambda: native.pack_keys(KEYS, ROWS.astype(np.float32), WEIGHTS), "rows.*float32"),
        (lambda: native.pack_keys(KEYS, ROWS.view(np.uint16), WEIGHTS), "rows.*uint16"),
        (lambda: native.pack_keys(KEYS, ROWS[:127], WEIGHTS), r"rows.*\(127, 32\)"),
        (lambda: native.pack_keys(KEYS, ROWS.T, WEIGHTS), r"rows.*\(32, 128\)"),
        (lambda: native.pack_keys(KEYS, BROKEN_ROWS, WEIGHTS), "rows.*7"),
        (lambda: native.pack_keys(KEYS, ROWS, WEIGHTS[:31]), r"importance.*\(31,\)"),
        (lambda: native.pack_keys(KEYS, ROWS, WEIGHTS.astype(np.float64)), "importance.*float64"),
        (lambda: native.pack_keys(KEYS, ROWS, -WEIGHTS), "importance.*-1"),
        (lambda: native.pack_keys(KEYS, ROWS, WEIGHTS * np.float32(np.nan)), "importance.*nan"),
        (lambda: native.pack_keys(KEYS, ROWS, WEIGHTS, np.ones(64, dtype=bool)), r"valid.*\(64,\)"),
        (lambda: native.select_tiers(KEYS, ROWS, WEIGHTS, np.ones(CELLS)), "valid.*float64"),
        (lambda: native.unpack_keys(KEYS, np.zeros(64, dtype=np.uint8)), r"record.*\(64,\)"),
        (lambda: native.unpack_keys(KEYS, np.zeros_like(KEY_RECORD)), "order"),
        (lambda: native.pack_values(VALUES, ROWS[:, :31]), r"rows.*\(128, 31\)"),
        (lambda: native.pack_values(VALUES, BROKEN_ROWS), "rows.*7"),
        (lambda: native.unpack_values(VALUES, VALUE_RECORD.view(np.int8)), "record.*int8"),
        (lambda: native.unpack_values(VALUES, VALUE_RECORD[:-1]), "record"),
        (lambda: native.pack_values(VALUES, ROWS, isa="mmx"), "mmx"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": QUERY[:, :31]}, r"q.*\(1, 31\)"),
        ({"q": QUERY[0]}, r"q.*\(32,\)"),
        ({"q": QUERY.astype(np.float64)}, "q.*float64"),
        ({"mask": np.zeros((1, 127), np.float32)}, r"mask.*\(1, 127\)"),
        ({"mask": np.zeros((1, 128), np.float16)}, "mask.*float16"),
        ({"sink": np.zeros(2, np.float32)}, r"sink.*\(2,\)"),
        ({"scale": float("inf")}, "scale"),
        ({"softcap": -1.0}, "softcap"),
        ({"value_records": np.stack([VALUE_RECORD] * 2)}, "value_records"),
        ({"key_records": KEY_RECORD}, "key_records"),
        ({"key_records": np.zeros_like(KEY_RECORD)[None]}, "order"),
    ],
)
def test_wrong_attention_arguments_are_named(change, words):
    arguments = {"key_records": KEY_RECORD[None], "value_records": VALUE_RECORD[None], "q": QUERY, **change}
    with pytest.raises(ValueError, match=words):
        native.attend(KEYS, VALUES, **arguments)


# --- the choice of the instruction set ------------------------------------------------------------------------


def chosen_under(name):
    code = "from mixkvq.core import _native; print(_native.isa())"
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "MIXKVQ_ISA": name, "PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@every_isa
def test_the_environment_chooses_the_instruction_set(isa):
    done = chosen_under(isa)
    assert (done.returncode, done.stdout.strip()) == (0, isa), done.stderr


def test_an_instruction_set_that_does_not_exist_is_an_error():
    done = chosen_under("mmx")
    assert done.returncode != 0 and "RuntimeError" in done.stderr and "mmx" in done.stderr
