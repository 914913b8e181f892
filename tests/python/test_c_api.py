"""The C API against the native module and the reference: same bytes, same attention, and sentences instead of crashes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cffi import FFI

from bridge.library import library_path
from mixkvq.core import _native, reference

HEADER = Path(__file__).parents[2] / "cpp" / "include" / "mixkvq" / "c_api.h"
LIBRARY = library_path().with_name("libmixkvq.so")

# Head size, tiers, key group, value head size, value bits, value group: every tier, every packing, odd head sizes.
FORMATS = [
    (128, (0, 4, 40, 0, 84), 128, 128, 3, 0),
    (128, (4, 0, 12, 0, 112), 32, 128, 2, 32),
    (80, (8, 16, 16, 20, 20), 64, 80, 4, 0),
    (64, (0, 64, 0, 0, 0), 128, 96, 8, 0),
    (256, (0, 0, 0, 256, 0), 128, 32, 4, 64),
]


def declarations() -> str:
    text = HEADER.read_text()
    return text.split("/* cdef begin */")[1].split("/* cdef end */")[0]


@pytest.fixture(scope="module")
def ffi() -> FFI:
    ffi = FFI()
    ffi.cdef(declarations())
    return ffi


@pytest.fixture(scope="module")
def lib(ffi):
    return ffi.dlopen(str(LIBRARY))


def aligned(shape, dtype=np.uint8):
    """Zeros at a multiple of 64 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class Head:
    """Random pages of one head, packed by the native module."""

    def __init__(self, ffi, case, n_pages=3, seed=0):
        d, tiers, group, dv, bits, value_group = case
        rng = np.random.default_rng(seed)
        channel_size = np.exp(rng.normal(0, 1, d))
        self.keys = (rng.normal(0, 1, (n_pages, 128, d)) * channel_size + channel_size).astype(np.float16)
        self.values = rng.normal(0, 1, (n_pages, 128, dv)).astype(np.float16)
        self.importance = rng.uniform(0, 2, d).astype(np.float32)
        self.valid = rng.random((n_pages, 128)) < 0.9
        self.key_format = _native.KeyFormat(d, tiers, group)
        self.value_format = _native.ValueFormat(dv, bits, value_group)
        self.c_key_format = ffi.new("mixkvq_key_format *", [d, *tiers, group])
        self.c_value_format = ffi.new("mixkvq_value_format *", [dv, bits, value_group])
        self.key_records = aligned((n_pages, self.key_format.record_bytes))
        self.value_records = aligned((n_pages, self.value_format.record_bytes))
        for p in range(n_pages):
            self.key_records[p] = _native.pack_keys(self.key_format, self.keys[p], self.importance, self.valid[p])
            self.value_records[p] = _native.pack_values(self.value_format, self.values[p], self.valid[p])


@pytest.fixture(params=FORMATS, ids=str)
def head(ffi, request) -> Head:
    return Head(ffi, request.param)


@pytest.fixture
def plain(ffi) -> Head:
    return Head(ffi, FORMATS[0])


def pointer(ffi, array, kind):
    return ffi.cast(f"{kind} *", array.ctypes.data)


def test_versions_and_isa_are_those_of_the_module(ffi, lib):
    assert ffi.string(lib.mixkvq_version()).decode() == _native.__version__
    assert lib.mixkvq_format_version() == _native.FORMAT_VERSION
    assert ffi.string(lib.mixkvq_isa()).decode() == _native.isa()


def test_records_are_those_of_the_module_and_of_the_reference(ffi, lib, head):
    key_bytes = lib.mixkvq_key_record_bytes(head.c_key_format)
    value_bytes = lib.mixkvq_value_record_bytes(head.c_value_format)
    assert key_bytes == head.key_format.record_bytes
    assert value_bytes == head.value_format.record_bytes
    d, dv = head.key_format.head_size, head.value_format.head_size
    key_reference = reference.KeyFormat(d, head.key_format.tiers, head.key_format.group)
    value_reference = reference.ValueFormat(dv, head.value_format.bits, head.value_format.group)

    for p in range(len(head.keys)):
        valid = head.valid[p].view(np.uint8)
        # Rows inside a wider array: the stride counts.
        keys = np.full((128, d + 3), np.nan, np.float16)
        keys[:, :d] = head.keys[p]
        values = np.full((128, dv + 5), np.nan, np.float16)
        values[:, :dv] = head.values[p]
        key_record, value_record = aligned(key_bytes), aligned(value_bytes)
        args = pointer(ffi, valid, "uint8_t"), pointer(ffi, head.importance, "float"), pointer(ffi, key_record, "uint8_t")
        assert lib.mixkvq_pack_keys(head.c_key_format, pointer(ffi, keys, "uint16_t"), d + 3, *args) == 0
        args = pointer(ffi, valid, "uint8_t"), pointer(ffi, value_record, "uint8_t")
        assert lib.mixkvq_pack_values(head.c_value_format, pointer(ffi, values, "uint16_t"), dv + 5, *args) == 0
        np.testing.assert_array_equal(key_record, head.key_records[p])
        np.testing.assert_array_equal(value_record, head.value_records[p])
        np.testing.assert_array_equal(
            key_record, reference.pack_keys(key_reference, head.keys[p], head.importance, head.valid[p])
        )
        np.testing.assert_array_equal(value_record, reference.pack_values(value_reference, head.values[p], head.valid[p]))

        keys[:] = 7
        values[:] = 7
        args = pointer(ffi, key_record, "uint8_t"), pointer(ffi, keys, "uint16_t")
        assert lib.mixkvq_unpack_keys(head.c_key_format, *args, d + 3) == 0
        args = pointer(ffi, value_record, "uint8_t"), pointer(ffi, values, "uint16_t")
        assert lib.mixkvq_unpack_values(head.c_value_format, *args, dv + 5) == 0
        np.testing.assert_array_equal(keys[:, :d], _native.unpack_keys(head.key_format, head.key_records[p]))
        np.testing.assert_array_equal(values[:, :dv], _native.unpack_values(head.value_format, head.value_records[p]))
        assert (keys[:, d:] == 7).all() and (values[:, dv:] == 7).all()  # between the rows nothing is written


def test_no_mask_means_that_every_cell_is_valid(ffi, lib, plain):
    record = aligned(plain.key_format.record_bytes)
    args = pointer(ffi, plain.importance, "float"), pointer(ffi, record, "uint8_t")
    assert lib.mixkvq_pack_keys(plain.c_key_format, pointer(ffi, plain.keys[0], "uint16_t"), 128, ffi.NULL, *args) == 0
    np.testing.assert_array_equal(record, _native.pack_keys(plain.key_format, plain.keys[0], plain.importance))


def c_attend(ffi, lib, head, q, mask=None, scale=1.0, softcap=0.0, sink=None):
    n, n_pages = len(q), len(head.key_records)
    scratch = aligned(lib.mixkvq_attend_scratch_bytes(head.c_key_format, head.c_value_format, n_pages, n))
    out = np.full((n, head.value_format.head_size), np.nan, np.float32)
    code = lib.mixkvq_attend(
        head.c_key_format,
        head.c_value_format,
        pointer(ffi, head.key_records, "uint8_t"),
        pointer(ffi, head.value_records, "uint8_t"),
        n_pages,
        pointer(ffi, q, "float"),
        n,
        ffi.NULL if mask is None else pointer(ffi, mask, "float"),
        scale,
        softcap,
        ffi.NULL if sink is None else pointer(ffi, sink, "float"),
        pointer(ffi, out, "float"),
        pointer(ffi, scratch, "void"),
    )
    assert code == 0, ffi.string(lib.mixkvq_last_error()).decode()
    return out


@pytest.mark.parametrize("extra", ["nothing", "softcap", "sink", "both"])
def test_attention_is_that_of_the_module_and_near_the_reference(ffi, lib, head, extra):
    rng = np.random.default_rng(1)
    n, d, dv = 5, head.key_format.head_size, head.value_format.head_size
    q = rng.normal(0, 1, (n, d)).astype(np.float32)
    mask = np.where(head.valid.reshape(-1), np.float32(0), np.float32(-np.inf)) + rng.normal(0, 1, (n, 384)).astype(np.float32)
    mask[:, 128:256] = -np.inf  # a page that nobody sees
    mask[1, :] = -np.inf  # a query that sees nothing
    mask[2, :128] = -np.inf  # one whose first page is hidden
    more = {"scale": float(0.5 / np.sqrt(d))}
    if extra in ("softcap", "both"):
        more["softcap"] = 2.5
    if extra in ("sink", "both"):
        more["sink"] = np.array([-3, 2, 40, 0, 1], np.float32)

    ours = c_attend(ffi, lib, head, q, mask, **more)
    module = _native.attend(head.key_format, head.value_format, head.key_records, head.value_records, q, mask, **more)
    np.testing.assert_array_equal(ours, module)

    key_reference = reference.KeyFormat(d, head.key_format.tiers, head.key_format.group)
    value_reference = reference.ValueFormat(dv, head.value_format.bits, head.value_format.group)
    expected = reference.attend(key_reference, value_reference, head.key_records, head.value_records, q, mask, **more)
    # The values are about 1. Scalar kernels differ by float rounding, 1e-7 here; integer kernels round queries and weights, up to 0.009 here.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 if _native.isa() == "scalar" else 0.015)
    assert not ours[1].any()
    if "sink" in more:
        assert np.abs(ours[2]).max() < 1e-6  # a sink of 40 takes everything


def test_attention_over_no_page_is_zero(ffi, lib, plain):
    plain.key_records, plain.value_records = plain.key_records[:0], plain.value_records[:0]
    assert not c_attend(ffi, lib, plain, np.ones((2, 128), np.float32)).any()


def said(ffi, lib):
    return ffi.string(lib.mixkvq_last_error()).decode()


def test_refusals_say_what_is_wrong(ffi, lib, plain):
    rows, record = pointer(ffi, plain.keys[0], "uint16_t"), pointer(ffi, plain.key_records[0], "uint8_t")
    importance = pointer(ffi, plain.importance, "float")

    bad = ffi.new("mixkvq_key_format *", [128, 0, 0, 3, 0, 125, 128])
    assert lib.mixkvq_key_record_bytes(bad) == 0
    assert "head size 128" in said(ffi, lib)
    assert lib.mixkvq_pack_keys(bad, rows, 128, ffi.NULL, importance, record) == lib.MIXKVQ_ERROR_FORMAT
    assert lib.mixkvq_value_record_bytes(ffi.new("mixkvq_value_format *", [128, 5, 0])) == 0

    pack = lib.mixkvq_pack_keys
    assert pack(plain.c_key_format, ffi.NULL, 128, ffi.NULL, importance, record) == lib.MIXKVQ_ERROR_ARGUMENT
    assert said(ffi, lib) == "rows is null"
    assert pack(plain.c_key_format, rows, 127, ffi.NULL, importance, record) == lib.MIXKVQ_ERROR_ARGUMENT
    assert said(ffi, lib) == "the stride of rows is 127, less than the head size 128"
    assert pack(plain.c_key_format, rows, 128, ffi.NULL, importance, record + 3) == lib.MIXKVQ_ERROR_ARGUMENT
    assert said(ffi, lib) == "record is 3 bytes past a multiple of 64"

    before = plain.key_records.copy()
    plain.keys[0, 17, 5] = np.inf
    assert pack(plain.c_key_format, rows, 128, ffi.NULL, importance, record) == lib.MIXKVQ_ERROR_ARGUMENT
    assert said(ffi, lib) == "rows is not finite at cell 17, channel 5"
    plain.keys[0, 17, 5] = 0
    plain.importance[9] = -1
    assert pack(plain.c_key_format, rows, 128, ffi.NULL, importance, record) == lib.MIXKVQ_ERROR_ARGUMENT
    assert said(ffi, lib) == "importance is -1 at channel 9"
    np.testing.assert_array_equal(plain.key_records, before)  # a refused call has written nothing


@pytest.mark.parametrize("channel", [128, 255, "twice"])
def test_a_damaged_record_is_refused(ffi, lib, plain, channel):
    order = plain.key_records[1, -128:]  # the order ends the record at head size 128
    assert sorted(order) == list(range(128))
    order[7] = order[6] if channel == "twice" else channel
    rows = np.zeros((128, 128), np.float16)
    args = pointer(ffi, plain.key_records[1], "uint8_t"), pointer(ffi, rows, "uint16_t"), 128
    assert lib.mixkvq_unpack_keys(plain.c_key_format, *args) == lib.MIXKVQ_ERROR_RECORD
    with pytest.raises(AssertionError, match="key record 1 is damaged: place 7 of its order"):
        c_attend(ffi, lib, plain, np.ones((1, 128), np.float32))
    with pytest.raises(ValueError, match="key record 1 is damaged: place 7 of its order"):
        args = plain.key_format, plain.value_format, plain.key_records, plain.value_records
        _native.attend(*args, np.ones((1, 128), np.float32))


def test_an_instruction_set_that_cannot_be_had_is_an_error_in_both(monkeypatch):
    monkeypatch.setenv("MIXKVQ_ISA", "abacus")
    program = f"""
from cffi import FFI
from mixkvq.core import _native
ffi = FFI()
ffi.cdef({declarations()!r})
lib = ffi.dlopen({str(LIBRARY)!r})
assert lib.mixkvq_isa() == ffi.NULL
assert "abacus" in ffi.string(lib.mixkvq_last_error()).decode()
try:
    _native.isa()
except RuntimeError as e:
    assert "abacus" in str(e)
else:
    raise AssertionError("the module took it")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_header_is_plain_c(tmp_path):
    from shutil import which

    compiler = which("cc") or which("gcc") or which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "use.c"
    source.write_text('#include "mixkvq/c_api.h"\n#include "mixkvq/backend_api.h"\nint main(void) { return MIXKVQ_OK; }\n')
    include = HEADER.parents[1]
    subprocess.run([compiler, "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{include}", "-c", source, "-o",
                    tmp_path / "use.o"], check=True)  # fmt: skip
