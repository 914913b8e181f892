"""mixkvq.core._native: formats, presets, checks of arrays, and the handle of the backend over a backend made here."""

import ctypes
import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from cffi import FFI

from mixkvq.core import _native, reference

# ------------------------------------------------------------------------------------------------ formats and presets


def test_a_format_keeps_what_it_was_given():
    key_format = _native.KeyFormat(96, (4, 8, 16, 20, 48), 64)
    assert (key_format.head_size, key_format.tiers, key_format.group) == (96, (4, 8, 16, 20, 48), 64)
    assert key_format.record_bytes == reference.KeyFormat(96, (4, 8, 16, 20, 48), 64).record_bytes
    assert repr(key_format) == "KeyFormat(head_size=96, tiers=(4, 8, 16, 20, 48), group=64)"
    value_format = _native.ValueFormat(80, 3, 32)
    assert (value_format.head_size, value_format.bits, value_format.group) == (80, 3, 32)
    assert value_format.record_bytes == reference.ValueFormat(80, 3, 32).record_bytes
    assert repr(value_format) == "ValueFormat(head_size=80, bits=3, group=32)"


def test_formats_are_values():
    a, b = _native.KeyFormat(64, (0, 0, 64, 0, 0)), _native.KeyFormat(64, (0, 0, 64, 0, 0), 128)
    assert a == b and hash(a) == hash(b)
    assert a != _native.KeyFormat(64, (0, 0, 64, 0, 0), 64)
    assert _native.ValueFormat(64, 4) == _native.ValueFormat(64, 4, 0) != _native.ValueFormat(64, 2)
    assert a != "KeyFormat"


@pytest.mark.parametrize(
    ("head_size", "tiers", "group"),
    [(36, (0, 0, 36, 0, 0), 128), (264, (0, 0, 264, 0, 0), 128), (64, (0, 0, 60, 0, 0), 128), (64, (0, 2, 62, 0, 0), 128),
     (64, (-4, 4, 64, 0, 0), 128), (64, (0, 0, 64, 0, 0), 16)],
)  # fmt: skip
def test_a_key_format_that_is_not_served_is_refused_with_its_numbers(head_size, tiers, group):
    with pytest.raises(ValueError, match=rf"head_size={head_size}, tiers=.*, group={group}\): "):
        _native.KeyFormat(head_size, tiers, group)


@pytest.mark.parametrize(("head_size", "bits", "group"), [(24, 4, 0), (64, 5, 0), (64, 4, 16), (64, 16, 0)])
def test_a_value_format_that_is_not_served_is_refused_with_its_numbers(head_size, bits, group):
    with pytest.raises(ValueError, match=rf"head_size={head_size}, bits={bits}, group={group}\): "):
        _native.ValueFormat(head_size, bits, group)


def test_presets_are_named_by_their_bits():
    presets = _native.presets()
    assert sum(p["default"] for p in presets) == 1
    for p in presets:
        key_format, value_format = _native.preset(p["name"], 128)
        assert list(key_format.tiers) == p["key_tiers"]
        assert (key_format.group, value_format.bits, value_format.group) == (p["key_group"], p["value_bits"], p["value_group"])
        bits = _native.body_bits(key_format, value_format)
        assert bits == p["body_bits"]
        assert bits == 8 * (key_format.record_bytes + value_format.record_bytes) / (128 * 256)
        if p["name"].startswith("mix"):
            # The name cuts off or rounds.
            assert abs(float(p["name"][3:]) - bits) < 0.1
        if p["alias"]:
            assert _native.preset(p["alias"], 128) == (key_format, value_format)


@pytest.mark.parametrize("head_size", range(32, 257, 8))
def test_every_preset_serves_every_head_size(head_size):
    for p in _native.presets():
        key_format, value_format = _native.preset(p["name"], head_size)
        assert key_format.head_size == value_format.head_size == head_size
        assert sum(key_format.tiers) == head_size


def test_a_preset_that_is_not_there():
    with pytest.raises(ValueError, match="no preset 'huge'; the presets are mix"):
        _native.preset("huge", 128)
    with pytest.raises(ValueError, match="head_size=20"):
        _native.preset("balanced", 20)


# ------------------------------------------------------------------------------------------------------------- arrays

KEY_FORMAT = _native.KeyFormat(32, (4, 4, 8, 8, 8), 64)
VALUE_FORMAT = _native.ValueFormat(40, 3)


@pytest.fixture
def page():
    rng = np.random.default_rng(5)
    keys = rng.normal(0, 1, (128, 32)).astype(np.float16)
    values = rng.normal(0, 1, (128, 40)).astype(np.float16)
    return keys, values, rng.uniform(0, 1, 32).astype(np.float32)


def test_the_order_is_that_of_the_reference(page):
    keys, _, importance = page
    valid = np.arange(128) % 3 > 0
    expected = reference.select_tiers(reference.KeyFormat(32, (4, 4, 8, 8, 8), 64), keys, importance, valid)
    for isa in _native.isas():
        np.testing.assert_array_equal(_native.select_tiers(KEY_FORMAT, keys, importance, valid, isa=isa), expected)


def test_arrays_of_any_layout_give_the_same_bytes(page):
    keys, values, importance = page
    wide = np.zeros((128, 64), np.float16)
    wide[:, ::2] = keys
    record = _native.pack_keys(KEY_FORMAT, keys, importance)
    np.testing.assert_array_equal(_native.pack_keys(KEY_FORMAT, wide[:, ::2], importance), record)
    np.testing.assert_array_equal(_native.pack_keys(KEY_FORMAT, np.asfortranarray(keys), importance), record)
    unaligned = np.zeros(len(record) + 1, np.uint8)[1:]
    unaligned[:] = record
    np.testing.assert_array_equal(_native.unpack_keys(KEY_FORMAT, unaligned), _native.unpack_keys(KEY_FORMAT, record))


def test_a_new_record_outlives_its_maker(page):
    records = [_native.pack_values(VALUE_FORMAT, page[1]) for _ in range(50)]
    gc.collect()
    assert all(r.ctypes.data % 64 == 0 and (r == records[0]).all() for r in records)


def refused(match, function, *args, **more):
    with pytest.raises(ValueError, match=match):
        function(*args, **more)


def test_wrong_arrays_are_refused_by_name_and_number(page):
    keys, values, importance = page
    pack, kf, vf = _native.pack_keys, KEY_FORMAT, VALUE_FORMAT
    refused(r"^rows is float32, not float16$", pack, kf, keys.astype(np.float32), importance)
    refused(r"^rows has shape \(128, 31\), not \(128, 32\)$", pack, kf, keys[:, :31], importance)
    refused(r"^rows has shape \(127, 40\), not \(128, 40\)$", _native.pack_values, vf, values[:127])
    refused(r"^importance is float64, not float32$", pack, kf, keys, importance.astype(float))
    refused(r"^importance has shape \(31,\), not \(32,\)$", pack, kf, keys, importance[:31])
    refused(r"^valid is uint8, not bool$", pack, kf, keys, importance, np.ones(128, np.uint8))
    refused(r"^valid has shape \(64,\), not \(128,\)$", pack, kf, keys, importance, np.ones(64, bool))
    refused(r"^record is int8, not uint8$", _native.unpack_keys, kf, np.zeros(kf.record_bytes, np.int8))
    refused(r"^record has shape \(5,\), not \(\d+,\)$", _native.unpack_values, vf, np.zeros(5, np.uint8))
    refused(r"^key record 0 is damaged: place 1 of its order holds channel 0", _native.unpack_keys, kf, np.zeros(kf.record_bytes, np.uint8))
    refused(r"isa 'abacus' cannot be had here; there is scalar", pack, kf, keys, importance, isa="abacus")

    keys[3, 4] = np.nan
    refused(r"^rows is not finite at cell 3, channel 4$", pack, kf, keys, importance)
    hidden = np.arange(128) != 3
    assert pack(kf, keys, importance, hidden).any()  # what no token wrote does not matter
    keys[3, 4] = 0
    importance[30] = -0.5
    refused(r"^importance is -0.5\d* at channel 30$", pack, kf, keys, importance)


def test_wrong_attention_is_refused_by_name_and_number(page):
    keys, values, importance = page
    k = _native.pack_keys(KEY_FORMAT, keys, importance)[None]
    v = _native.pack_values(VALUE_FORMAT, values)[None]
    q = np.ones((2, 32), np.float32)

    def attend(k=k, v=v, q=q, **more):
        return _native.attend(KEY_FORMAT, VALUE_FORMAT, k, v, q, **more)

    assert attend().shape == (2, 40)
    refused(r"^key_records has shape \(\d+,\), not \(any, \d+\)$", attend, k=k[0])
    refused(r"^value_records has shape \(2, \d+\), not \(1, \d+\)$", attend, v=np.concatenate([v, v]))
    refused(r"^q has shape \(2, 31\), not \(any, 32\)$", attend, q=q[:, :31])
    refused(r"^mask has shape \(2, 127\), not \(2, 128\)$", attend, mask=np.zeros((2, 127), np.float32))
    refused(r"^sink has shape \(1,\), not \(2,\)$", attend, sink=np.zeros(1, np.float32))
    refused(r"^scale is inf$", attend, scale=float("inf"))
    refused(r"^softcap is -1", attend, softcap=-1.0)
    # No query and no page are not errors.
    assert attend(q=q[:0]).shape == (0, 40)
    assert not attend(k=k[:0], v=v[:0]).any()


def test_kernels_run_in_several_threads_at_once(page):
    keys, values, importance = page
    k = np.repeat(_native.pack_keys(KEY_FORMAT, keys, importance)[None], 20, 0)
    v = np.repeat(_native.pack_values(VALUE_FORMAT, values)[None], 20, 0)
    q = np.random.default_rng(1).normal(0, 1, (16, 32)).astype(np.float32)
    expected = _native.attend(KEY_FORMAT, VALUE_FORMAT, k, v, q)
    results = [None] * 4

    def work(i):
        for _ in range(10):
            results[i] = _native.attend(KEY_FORMAT, VALUE_FORMAT, k, v, q)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for result in results:
        np.testing.assert_array_equal(result, expected)


# ------------------------------------------------------------------------------------------------ the backend's handle

HEADER = Path(__file__).parents[2] / "cpp" / "include" / "mixkvq" / "backend_api.h"


def declarations() -> str:
    """The structs of the interface, for cffi."""
    text = HEADER.read_text()
    return text[text.index("/* A page that is about to leave") : text.rindex("#ifdef __cplusplus")]


class FakeBackend:
    """The struct of function pointers, filled by Python: what the handle sends and what it makes of the answers."""

    def __init__(self, version=4):
        # For good, as a library stays: a session that goes together with its backend, be it when the process ends, would call what is gone.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))
        self.ffi = ffi = FFI()
        ffi.cdef(declarations())
        self.calls, self.created = [], True
        self.failure = self.said = ffi.new("char[]", b"")  # of the session, and of the last call
        self.keep = []

        def function(kind, f):
            self.keep.append(ffi.callback(kind, f))
            return self.keep[-1]

        self.api = ffi.new("mixkvq_backend_api *")
        self.api.version = version
        self.api.begin = function("mixkvq_session *(const mixkvq_settings *)", self.begin)
        self.api.end = function("void(mixkvq_session *)", lambda s: self.calls.append("end"))
        self.api.release = function("void(mixkvq_session *)", lambda s: self.calls.append("release"))
        self.api.stats = function("int(mixkvq_session *, mixkvq_stats *)", self.stats)
        self.api.n_layers = function("int(mixkvq_session *)", lambda s: 2)
        self.api.layer_stats = function("int(mixkvq_session *, int, mixkvq_layer_stats *)", self.layer_stats)
        self.api.error = function("const char *(mixkvq_session *)", lambda s: self.failure if s else self.said)
        self.api.query_statistics = function("int(mixkvq_session *, int, float *, float *)", self.query_statistics)
        self.text = {t: ffi.new("char[]", t.encode()) for t in ("avx2", "cache_k_l0", "cache_v_l0", "packed", "plain", "too small")}
        self.handle = _native.Backend(int(ffi.cast("uintptr_t", self.api)))

    def fail(self, sentence):
        self.failure = self.ffi.new("char[]", sentence.encode())

    def refuse(self, sentence):
        self.said = self.ffi.new("char[]", sentence.encode())
        return -1

    def begin(self, settings):
        ffi = self.ffi
        string = lambda p: None if p == ffi.NULL else ffi.string(p).decode()  # noqa: E731
        heads = [(settings.head_size_k[i], settings.head_size_v[i]) for i in range(settings.n_layers)]
        self.settings = string(settings.preset), string(settings.profile), settings.window, settings.sinks, heads
        self.codec, self.user = settings.codec, settings.codec_user
        self.calls.append("begin")
        return ffi.NULL if ffi.string(self.said) else ffi.cast("mixkvq_session *", 64)

    def stats(self, session, out):
        if not self.created:
            return self.refuse("no cache has been created under this session")
        out.bytes, out.bytes_peak, out.bytes_f16, out.bytes_used, out.elements = 2**33, 2**34, 2**35, 5, 6
        out.body_bits, out.total_bits = 3.125, 3.5
        out.n_cells, out.n_layers, out.n_plain_layers, out.n_threads = 512, 2, 1, 4
        out.isa = self.text["avx2"]
        out.bytes_reserved, out.bytes_recurrent, out.n_cells_gain = 2**36, 77, 768
        return 0

    def layer_stats(self, session, index, out):
        if not self.created or not 0 <= index < 2:
            return self.refuse(f"there is no cache tensor {index}, the session has 2")
        out.name = self.text["cache_v_l0" if index else "cache_k_l0"]
        out.kind = self.text["plain" if index else "packed"]
        out.reason = self.text["too small"] if index else self.ffi.NULL
        out.layer, out.is_value, out.head_size, out.n_heads, out.n_cells, out.n_streams = 7, index, 128, 8, 512, 2
        out.tiers = [0, 4, 40, 0, 84]
        out.value_bits, out.group, out.pages_packed, out.pages_f16, out.pages_packed_ever = 3, 128, 2, 1, 7
        out.bytes, out.body_bits = 2**33, 3.125
        return 0

    def query_statistics(self, session, index, mean_abs, mean_sqr):
        if index == 1:
            return -1
        for i in range(8 * 128):
            mean_abs[i], mean_sqr[i] = i, -i
        return 0

    def page(self, rows, is_value=False):
        """A mixkvq_page of float32 rows [heads, 128, D], with every third cell empty; for keys with statistics."""
        heads, _, d = rows.shape
        page = self.ffi.new("mixkvq_page *")
        page.layer, page.is_value, page.stream, page.first_cell, page.n_heads, page.head_size = 5, is_value, 2, 384, heads, d
        bits = sum(1 << i for i in range(128) if i % 3)
        page.valid = [bits & (1 << 64) - 1, bits >> 64]
        statistics = [self.ffi.new("float[]", [k + i for i in range(heads * d)]) for k in (0, 1000)]
        page.rows = self.ffi.from_buffer("float[]", rows)
        if not is_value:
            page.q_abs, page.q_sqr = statistics
        self.keep += [page, statistics, rows]
        return page

    def code(self, page):
        """Calls the codec as the backend does: its number, rows and bits."""
        rows = np.zeros((page.n_heads, 128, page.head_size), np.float32)
        bits = self.ffi.new("double *")
        return self.codec(self.user, page, self.ffi.from_buffer("float[]", rows), bits), rows, bits[0]


def test_settings_arrive_as_they_were_given():
    backend = FakeBackend()
    backend.handle.begin()
    assert backend.settings == (None, None, -1, -1, [])
    backend.handle.begin(preset="tiny", profile="a b.gguf", window=256, sinks=0, head_sizes=[(128, 64), (0, 0)])
    assert backend.settings == ("tiny", "a b.gguf", 256, 0, [(128, 64), (0, 0)])


def test_a_session_ends_once_and_is_released_when_it_goes():
    backend = FakeBackend()
    session = backend.handle.begin()
    session.end()
    session.end()
    assert backend.calls == ["begin", "end"]
    del session
    gc.collect()
    assert backend.calls == ["begin", "end", "release"]


def test_a_session_ends_with_its_block_even_if_that_fails():
    backend = FakeBackend()
    with pytest.raises(KeyError), backend.handle.begin() as session:
        raise KeyError
    assert backend.calls == ["begin", "end"]
    assert session.stats()["n_cells"] == 512  # still there to be asked


def test_a_session_that_nobody_ended_does_not_stay_open():
    backend = FakeBackend()
    backend.handle.begin()
    gc.collect()
    assert backend.calls == ["begin", "end", "release"]


def test_statistics_come_through():
    session = FakeBackend().handle.begin()
    assert session.stats() == {
        "bytes": 2**33, "bytes_peak": 2**34, "bytes_f16": 2**35, "bytes_used": 5, "elements": 6, "body_bits": 3.125, "total_bits": 3.5,
        "n_cells": 512, "n_layers": 2, "n_plain_layers": 1, "n_threads": 4, "isa": "avx2",
        "bytes_reserved": 2**36, "bytes_recurrent": 77, "n_cells_gain": 768,
    }  # fmt: skip
    key, value = session.layers()
    assert key == {
        "name": "cache_k_l0", "kind": "packed", "reason": "", "layer": 7, "is_value": False, "head_size": 128, "n_heads": 8, "n_cells": 512,
        "n_streams": 2, "tiers": (0, 4, 40, 0, 84), "value_bits": 3, "group": 128, "pages_packed": 2, "pages_f16": 1,
        "pages_packed_ever": 7, "bytes": 2**33, "body_bits": 3.125,
    }  # fmt: skip
    assert (value["name"], value["kind"], value["reason"], value["is_value"]) == ("cache_v_l0", "plain", "too small", True)


def test_refusals_carry_the_sentence_of_the_backend():
    backend = FakeBackend()
    session = backend.handle.begin()
    assert session.error() == ""
    backend.created = False
    with pytest.raises(RuntimeError, match="^no cache has been created under this session$"):
        session.stats()
    backend.fail("a cache of 9 GB does not fit into 8 GB")
    assert session.error() == "a cache of 9 GB does not fit into 8 GB"
    with pytest.raises(RuntimeError, match="^a cache of 9 GB does not fit into 8 GB$"):
        session.stats()
    with pytest.raises(RuntimeError, match="^a cache of 9 GB does not fit into 8 GB$"):
        session.layers()
    backend.refuse('there is no preset "huge"')
    with pytest.raises(ValueError, match='^there is no preset "huge"$'):
        backend.handle.begin(preset="huge")


def test_query_statistics_come_through():
    session = FakeBackend().handle.begin()
    mean_abs, mean_sqr = session.query_statistics(0)
    assert mean_abs.shape == mean_sqr.shape == (8, 128) and mean_abs.dtype == mean_sqr.dtype == np.float32
    np.testing.assert_array_equal(mean_abs.ravel(), np.arange(1024))
    np.testing.assert_array_equal(mean_sqr.ravel(), -np.arange(1024))
    assert session.query_statistics(1) is None
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"^there is no cache tensor {index}, the session has 2$"):
            session.query_statistics(index)


def test_a_codec_gets_the_page_and_gives_rows_and_bits():
    backend, seen = FakeBackend(), []

    def codec(*fields):
        seen.append(fields)
        return fields[4] / 2, 77

    session = backend.handle.begin(codec=codec)
    source = np.arange(2 * 128 * 32, dtype=np.float32).reshape(2, 128, 32)
    code, rows, bits = backend.code(backend.page(source.copy()))
    assert (code, bits) == (0, 77) and session.codec_failure() is None
    np.testing.assert_array_equal(rows, source / 2)
    layer, is_value, stream, first_cell, got, valid, q_abs, q_sqr = seen[0]
    assert (layer, is_value, stream, first_cell) == (5, False, 2, 384) and is_value is False
    np.testing.assert_array_equal(valid, np.arange(128) % 3 > 0)
    np.testing.assert_array_equal(q_abs, np.arange(64).reshape(2, 32))
    np.testing.assert_array_equal(q_sqr, q_abs + 1000)
    backend.code(backend.page(source, is_value=True))
    assert seen[1][1] is True and seen[1][6:] == (None, None)
    # What a function keeps stays what it was, and it cannot write into it.
    source[:] = -1
    assert got[1, 127, 31] == 2 * 128 * 32 - 1
    for array in (got, valid, q_abs, q_sqr):
        assert not array.flags.writeable


@pytest.mark.parametrize(
    ("result", "kind", "words"),
    [
        (None, TypeError, "a codec returns rows and bits, not NoneType"),
        ([1, 2], TypeError, "a codec returns rows and bits, not list"),
        ((1, 2, 3), TypeError, "a codec returns rows and bits, not tuple"),
        ((np.zeros((2, 128, 31)), 1), ValueError, r"rows has shape \(2, 128, 31\), not \(2, 128, 32\)"),
        ((3.0, 1), ValueError, r"rows has shape \(\), not"),
        ((None, 1), ValueError, r"rows has shape \(\), not"),
        (("rows", 1), ValueError, "could not convert"),
        (([[1, 2], [3]], 1), ValueError, "inhomogeneous"),
        ((np.zeros((2, 128, 32)), "many"), TypeError, "real number"),
        ((np.zeros((2, 128, 32)), None), TypeError, "real number"),
        (ZeroDivisionError("by zero"), ZeroDivisionError, "by zero"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
        (SystemExit(3), SystemExit, "3"),
    ],
)
def test_whatever_a_codec_does_the_backend_gets_a_number(result, kind, words):
    backend = FakeBackend()

    def codec(*_):
        if isinstance(result, BaseException):
            raise result
        return result

    session = backend.handle.begin(codec=codec)
    page = backend.page(np.ones((2, 128, 32), np.float32))
    code, rows, _ = backend.code(page)
    assert code == 1 and not rows.any()
    failure = session.codec_failure()
    assert type(failure) is kind
    with pytest.raises(kind, match=words):
        raise failure
    result = np.ones((2, 128, 32)), 1.5  # a call that goes well leaves nothing behind
    assert backend.code(page)[0] == 0 and session.codec_failure() is None


def test_rows_of_any_type_and_layout_are_taken():
    backend, result = FakeBackend(), []
    session = backend.handle.begin(codec=lambda *_: (result[0], np.float32(12)))
    values = np.random.default_rng(3).normal(0, 1, (2, 128, 32)).astype(np.float16)
    page = backend.page(np.ones((2, 128, 32), np.float32))
    for rows in (values, values.astype(float), np.asfortranarray(values), values.tolist(), np.repeat(values, 2, 2)[..., ::2]):
        result[:] = [rows]
        code, got, bits = backend.code(page)
        assert (code, bits) == (0, 12), session.codec_failure()
        np.testing.assert_array_equal(got, values)


def test_a_codec_is_forgotten_with_its_session_and_then_refuses():
    backend = FakeBackend()

    class Codec:
        def __call__(self, *fields):
            return fields[4], 1

    codec, page = Codec(), backend.page(np.ones((1, 128, 32), np.float32))
    gone = weakref.ref(codec)
    session = backend.handle.begin(codec=codec)
    assert backend.code(page)[::2] == (0, 1)
    del codec, session
    gc.collect()
    assert gone() is None
    assert backend.code(page)[0] == 1  # a cache that outlives its session
    session = backend.handle.begin(codec=lambda *fields: (fields[4] + 1, 2))
    assert backend.code(page)[::2] == (0, 2) and session.codec_failure() is None


def test_codecs_run_in_several_threads_at_once():
    backend = FakeBackend()
    session = backend.handle.begin(codec=lambda *fields: (fields[4] * 2, 3))
    page, failures = backend.page(np.ones((2, 128, 32), np.float32)), []

    def work():
        for _ in range(50):
            code, rows, bits = backend.code(page)
            if code or bits != 3 or (rows != 2).any():
                failures.append((code, bits))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures and session.codec_failure() is None


def test_another_version_of_the_interface_is_refused():
    with pytest.raises(RuntimeError, match="speaks version 1 of its interface, this package 4"):
        FakeBackend(version=1)
    with pytest.raises(ValueError, match="address is 0"):
        _native.Backend(0)
