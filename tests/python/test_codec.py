"""The page codec hook: which pages a codec gets, when and with what in them, and what becomes of its answer.

Pages that are only partly filled do not come from llama.cpp: tests/native/test_codec.cpp has them. Here
pages and moments are compared with those of packing, contents with a NumPy computation of the first layer, and everything that a cache can live
through with a cache that keeps all pages in F16 (EXACT): beside an identity codec the logits must be the same bits.
"""

from __future__ import annotations

import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import tiny_models
from cffi import FFI
from contexts import BALANCED, CPU, EXACT, FLASH_OFF, Context, Model, devices, distance, kl, random_tokens, tolerance
from gguf import GGUFReader
from test_bindings import declarations

import bridge
from bridge import Kv
from bridge import backend as adapter
from mixkvq.core import _native, reference
from mixkvq.core.model_file import built_in_model

MODEL = str(built_in_model())
TEXT = ("It was a dark evening in the early spring, and the old clerk walked slowly to the harbour without saying a word. " * 40).encode()
PROBE = random_tokens(70, 99)
NOTHING = Kv(window=0, sinks=0)


class Recorder:
    """An identity codec that remembers its pages. `change` makes it another one."""

    def __init__(self, change=lambda page: page.rows, bits=lambda page: 16 * page.rows.size):
        self.pages, self.change, self.bits = [], change, bits

    def __call__(self, page):
        self.pages.append(page)
        return self.change(page), self.bits(page)

    def cells(self, layer=0, is_value=False, stream=0):
        return [p.first_cell for p in self.pages if (p.layer, p.is_value, p.stream) == (layer, is_value, stream)]


@pytest.fixture(scope="module", params=devices())
def model(tmp_path_factory, request):
    """Two layers of two key/value heads of 64."""
    model = Model(tiny_models.llama(tmp_path_factory.mktemp("codec") / "llama.gguf"), True, request.param)
    yield model
    model.close()


@pytest.fixture(scope="module", params=devices())
def one_layer(tmp_path_factory, request):
    model = Model(tiny_models.llama(tmp_path_factory.mktemp("codec") / "one.gguf", n_layers=1), True, request.param)
    yield model
    model.close()


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return str(tiny_models.llama(tmp_path_factory.mktemp("codec") / "tiny.gguf"))


def load(codec=None, model=MODEL, **kwargs):
    arguments = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "logits_all": True, "device": "cpu"}
    return bridge.Llama(model, codec=codec, **{**arguments, **kwargs})


def greedy(llama, n):
    found = []
    for _ in range(n):
        found.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(found[-1:])
    return found


# --- an identity codec is F16, bit for bit ---


def test_identity_on_the_built_in_model():
    """The same cells in other pages of memory: logits are those of an F16 cache, whichever pages the codec has had. llama.cpp's own F16 cache, whose
    attention rounds otherwise on every processor, goes on with the same tokens, unless it hesitates."""
    codec = Recorder()
    ours, exact, stock = load(codec, kv=Kv(window=128, sinks=0)), load(kv=Kv(sinks=1 << 20)), load(stock="f16")
    tokens = ours.tokenize(TEXT)[:600]
    answers = []
    for llama in (ours, exact):
        llama.eval(tokens)
        answers.append(greedy(llama, 40))
    assert answers[0] == answers[1]
    np.testing.assert_array_equal(ours.scores[:640], exact.scores[:640])
    stock.eval(tokens + answers[0])
    logits = np.array(stock.scores[599:639])
    second, first = np.sort(logits)[:, -2:].T
    sure = first - second > 1
    assert sure.sum() > 10 and (logits.argmax(1) == answers[0])[sure].all()
    assert codec.cells(9, True) == [0, 128, 256, 384] and len(codec.pages) == 10 * 2 * 4
    for llama in (ours, exact, stock):
        llama.close()


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "gemma2", "bloom"])
def test_identity_on_other_kinds_of_attention(tmp_path, architecture):
    """Sliding windows write their pages again and again."""
    tiny = Model(getattr(tiny_models, architecture)(tmp_path / "m.gguf"), ours=True)
    codec = Recorder()
    with Context(tiny, NOTHING, n_ubatch=64, codec=codec) as ours, Context(tiny, EXACT, n_ubatch=64) as exact:
        for chunk in (500, 1, 1, 200):
            tokens = random_tokens(chunk, chunk)
            np.testing.assert_array_equal(ours.feed(tokens), exact.feed(tokens))
        assert len(codec.pages) >= 4 * len({p.layer for p in codec.pages}) and ours.pages_packed() > 0
        assert {layer["kind"] for layer in ours.layers()} == {"codec"}
    tiny.close()


def operations(context):
    """Everything that llama.cpp does to a cache of two streams; yields logits along the way."""
    context.feed(random_tokens(500, 1), 0)
    context.feed(random_tokens(300, 2), 1)
    context.rm(0, 300, -1)  # into a page that the codec has had
    yield context.feed(random_tokens(100, 3), 0)
    context.cp(0, 1)
    yield context.feed(PROBE, 1)
    context.rm(0, 40, 180)
    context.add(0, 180, -1, -140)
    yield context.feed(PROBE, 0)
    context.div(0, 64, 200, 2)
    yield context.feed(PROBE, 0)
    state = context.save()
    context.clear()
    yield context.feed(random_tokens(200, 4), 0)
    assert context.load(state) == len(state)
    yield context.feed(PROBE, 1)
    yield context.feed(PROBE, 0)
    one = context.save(0)
    context.rm(1)
    assert context.load(one, 1) == len(one)
    yield context.feed(PROBE, 1)


@pytest.mark.parametrize("kv", [NOTHING, Kv(window=128, sinks=128), Kv(window=200, sinks=1)], ids=str)
def test_identity_through_every_operation(model, kv):
    params = {"n_ctx": 2048, "n_seq": 2, "unified": False}
    with Context(model, kv, codec=Recorder(), **params) as ours, Context(model, EXACT, **params) as exact:
        for found, expected in zip(operations(ours), operations(exact)):
            np.testing.assert_array_equal(found, expected)
        assert ours.save() == exact.save()
        assert all(layer["pages_packed_ever"] >= 6 for layer in ours.layers())


# --- which pages, and when ---


@pytest.mark.parametrize("window, sinks", [(0, 0), (128, 128), (128, 0), (100, 130), (300, 1)])
@pytest.mark.parametrize("chunk", [1, 128, 77])
def test_a_page_comes_once_when_it_has_left_the_window(model, window, sinks, chunk):
    codec, n, at = Recorder(), 700, 0
    with Context(model, Kv(window=window, sinks=sinks), codec=codec) as context:
        for token in range(0, n, chunk):
            context.feed(random_tokens(n, 7)[token : token + chunk])
            at = min(n, token + chunk)
            newest = (at - 1) // 128
            expected = [128 * p for p in range((sinks + 127) // 128, newest) if at - 128 * (p + 1) >= window]
            for layer in (0, 1):
                for is_value in (False, True):
                    assert codec.cells(layer, is_value) == expected, (at, layer, is_value)
    order = [(p.layer, p.is_value) for p in codec.pages if p.first_cell == 256]
    assert order == [(0, False), (0, True), (1, False), (1, True)]
    assert all(p.valid.all() for p in codec.pages)


@pytest.mark.parametrize("kv", [NOTHING, Kv(window=128, sinks=128), Kv(window=200, sinks=1)], ids=str)
def test_the_pages_are_those_that_packing_packs(model, kv):
    params = {"n_ctx": 2048, "n_seq": 2, "unified": False}
    codec, keys = Recorder(), ("name", "pages_packed", "pages_f16", "pages_packed_ever")
    with Context(model, kv, codec=codec, **params) as ours, Context(model, kv, **params) as packing:
        for _ in zip(operations(ours), operations(packing)):
            found, expected = ([[layer[k] for k in keys] for layer in c.layers()] for c in (ours, packing))
            assert found == expected
        assert sum(layer["pages_packed_ever"] for layer in ours.layers()) == len(codec.pages)


def test_a_copy_to_another_stream_is_not_handed_over(model):
    codec = Recorder()
    with Context(model, NOTHING, n_ctx=2048, n_seq=2, unified=False, codec=codec) as context:
        context.feed(random_tokens(500), 0)
        before, packed = len(codec.pages), context.pages_packed()
        context.cp(0, 1)
        context.feed([5], 1)
        assert len(codec.pages) == before > 0 and context.pages_packed() == 2 * packed
        context.feed(random_tokens(200), 1)
        assert {p.stream for p in codec.pages[before:]} == {1}


def test_a_page_that_is_written_to_comes_again(model):
    codec = Recorder()
    with Context(model, NOTHING, codec=codec) as context:
        context.feed(random_tokens(400), chunk=100)
        assert codec.cells() == [0, 128, 256]
        first = next(p for p in codec.pages if p.first_cell == 128)
        context.rm(0, 200, -1)
        context.feed(random_tokens(250, 3))
        assert codec.cells() == [0, 128, 256, 128, 256]
        again = [p for p in codec.pages if (p.layer, p.is_value, p.first_cell) == (0, False, 128)][1]
        np.testing.assert_array_equal(again.rows[:, : 200 - 128], first.rows[:, : 200 - 128])
        assert (again.rows[:, 200 - 128 :] != first.rows[:, 200 - 128 :]).mean() > 0.9


def test_a_shifted_page_comes_again(model):
    codec = Recorder()
    with Context(model, NOTHING, n_ctx=1024, codec=codec) as context:
        context.feed(random_tokens(600), chunk=100)
        context.feed([3])
        before = len(codec.pages)
        context.add(0, 300, 512, 7)
        context.feed([3])
        assert [(p.layer, p.is_value, p.first_cell) for p in codec.pages[before:]] == [(i, False, c) for i in (0, 1) for c in (256, 384)]


# --- what is in a page ---


def first_layer(model, tokens):
    """Queries and keys of a tiny llama's first layer in NumPy, after RoPE: [heads, tokens, D] each."""
    t = {tensor.name: tensor.data for tensor in GGUFReader(model.path).tensors}
    x = t["token_embd.weight"][tokens].astype(np.float64)
    x /= np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    found = []
    for name in ("attn_q", "attn_k"):
        y = (x @ t[f"blk.0.{name}.weight"].T).reshape(len(tokens), -1, 64).transpose(1, 0, 2)
        angle = np.arange(len(tokens))[:, None] * 10000.0 ** (-np.arange(0, 64, 2) / 64)
        even, odd = y[..., ::2], y[..., 1::2]
        turned = np.empty_like(y)
        turned[..., ::2] = even * np.cos(angle) - odd * np.sin(angle)
        turned[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        found.append(turned)
    return found


def test_rows_and_query_statistics_are_those_of_the_model(model):
    codec, tokens, chunk = Recorder(), random_tokens(700, 3), 100
    with Context(model, NOTHING, codec=codec) as context:
        context.feed(tokens, chunk=chunk)
        statistics = context.query_statistics(0)
        with Context(model, BALANCED) as packing:
            packing.feed(tokens, chunk=chunk)
            for a, b in zip(packing.query_statistics(0), statistics):
                np.testing.assert_array_equal(a, b)
    rounding = 1e-4 if model.device == CPU else 2e-3  # a GPU multiplies numbers of eleven bits (TF32)
    q, k = first_layer(model, tokens)
    q = q.reshape(2, 2, 700, 64)  # two query heads for each key head

    def means(n):
        return np.abs(q[:, :, :n]).mean((1, 2)), (q[:, :, :n] ** 2).mean((1, 2))

    for found, expected in zip(statistics, means(700)):
        np.testing.assert_allclose(found, expected, rtol=rounding)
    pages = [p for p in codec.pages if p.layer == 0]
    assert len(pages) == 10
    for page in pages:
        assert page.rows.shape == (2, 128, 64) and page.rows.dtype == np.float32 and not page.rows.flags.writeable
        if page.is_value:
            assert page.q_abs is None and page.q_sqr is None
            continue
        cells = slice(page.first_cell, page.first_cell + 128)
        np.testing.assert_allclose(page.rows, k[:, cells], atol=4e-3 * np.abs(k).max())
        read = -(-(page.first_cell + 129) // chunk) * chunk  # tokens when the page settles: with the chunk that begins the next page
        for found, expected in zip((page.q_abs, page.q_sqr), means(read)):
            np.testing.assert_allclose(found, expected, rtol=rounding)


def test_values_are_those_of_the_state(one_layer):
    """What a codec gets is what a saved state has: F16 rows, [cell][head][channel]."""
    codec = Recorder()
    with Context(one_layer, NOTHING, codec=codec) as context:
        context.feed(random_tokens(300))
        state = np.frombuffer(context.save(0), np.uint8)
    for page in codec.pages:
        rows = page.rows.transpose(1, 0, 2).astype(np.float16)
        assert rows.tobytes() in state.tobytes()
    assert len(codec.pages) == 4


def test_ones_before_any_query(model):
    """A state that is loaded into a new context settles pages that no query has read."""
    codec = Recorder()
    with Context(model, NOTHING) as packing, Context(model, NOTHING, codec=codec) as context:
        packing.feed(random_tokens(400))
        assert context._session.query_statistics(0) is None
        state = packing.save(0)
        assert context.load(state, 0) == len(state)
        assert len(codec.pages) == 2 * 2 * 3
        for page in codec.pages:
            assert page.is_value or ((page.q_abs == 1).all() and (page.q_sqr == 1).all())


# --- what becomes of the answer ---


def preset_codec(name, head_size):
    """A preset as a codec: the reference packs and unpacks."""
    formats = _native.preset(name, head_size)
    k, v = reference.KeyFormat(head_size, formats[0].tiers, formats[0].group), reference.ValueFormat(head_size, formats[1].bits, formats[1].group)

    def codec(page):
        rows = page.rows.astype(np.float16)
        if page.is_value:
            back = [reference.unpack_values(v, reference.pack_values(v, head, page.valid)) for head in rows]
        else:
            back = [reference.unpack_keys(k, reference.pack_keys(k, head, i, page.valid)) for head, i in zip(rows, page.q_abs)]
        return np.stack(back), 8 * len(back) * (v if page.is_value else k).record_bytes

    return codec


@pytest.mark.parametrize("preset", ["balanced", "paper", "mix8.2"])
def test_a_preset_as_a_codec_is_the_preset(one_layer, preset):
    """The same pages with the same numbers in them, so the same state, byte for byte; attention differs by the rounding of the packed kernels."""
    kv = Kv(preset=preset, window=0, sinks=0)
    with Context(one_layer, kv, codec=preset_codec(preset, 64)) as coded, Context(one_layer, kv) as packing, Context(one_layer, EXACT) as exact:
        logits = [context.feed(random_tokens(700), chunk=100)[130:] for context in (coded, packing, exact)]
        assert coded.save(0) == packing.save(0) != exact.save(0)
        # A GPU's packed kernels round what they multiply to eleven bits, which shows beside codes of eight.
        assert kl(logits[0], logits[1]).mean() < (0.05 if one_layer.device == CPU else 0.3) * kl(logits[1], logits[2]).mean()
        found, expected = ([layer["body_bits"] for layer in c.layers()] for c in (coded, packing))
        assert found == pytest.approx(expected)
        assert coded.stats()["body_bits"] == pytest.approx(packing.stats()["body_bits"])
        # Tables of records that do not exist, and the scratch of the ubatch, are the difference.
        assert coded.stats()["total_bits"] == pytest.approx(packing.stats()["total_bits"], rel=0.02)


def test_a_preset_as_a_codec_on_the_built_in_model():
    kv = Kv(preset="balanced", sinks=0)
    logits = []
    for arguments in ({"kv": kv, "codec": preset_codec("balanced", 128)}, {"kv": kv}, {"kv": Kv(sinks=1 << 20)}, {"stock": "f16"}):
        llama = load(n_ctx=768, **arguments)
        tokens = llama.tokenize(TEXT)[:640]
        for i in range(0, 640, 128):
            llama.eval(tokens[i : i + 128])
        logits.append(llama.scores[300:640].copy())
        llama.close()
    coded, packing, exact, stock = logits
    noise = kl(exact, stock).mean()  # two ways to add up the same F16 cache
    assert kl(coded, packing).mean() < 2 * noise < 0.5 * kl(packing, exact).mean()
    assert kl(coded, exact).mean() == pytest.approx(kl(packing, exact).mean(), rel=0.1)


def test_numbers_are_clamped_to_f16(one_layer):
    codec = Recorder(change=lambda page: page.rows + np.where(np.arange(64) == 5, 1e30, 0) - np.where(np.arange(64) == 6, np.inf, 0))
    with Context(one_layer, NOTHING, codec=codec) as context:
        assert np.isfinite(context.feed(random_tokens(300))).all()
        state = np.frombuffer(context.save(0), np.uint8)
    expected = codec.pages[0].rows.transpose(1, 0, 2).astype(np.float16)
    expected[..., 5], expected[..., 6] = 65504, -65504
    assert expected.tobytes() in state.tobytes()


def test_a_state_of_coded_pages_is_restored(model):
    """A codec that changes nothing the second time: rounding to 5 bits of mantissa."""
    codec = Recorder(change=lambda page: (page.rows.view(np.uint32) & 0xFFFC0000).view(np.float32))
    with Context(model, NOTHING, codec=codec) as saved, Context(model, NOTHING, codec=codec) as loaded:
        saved.feed(random_tokens(500))
        state = saved.save(0)
        assert loaded.load(state, 0) == len(state) and loaded.save(0) == state
        assert loaded.pages_packed() == saved.pages_packed() == 2 * 2 * 3
        np.testing.assert_array_equal(loaded.feed(PROBE), saved.feed(PROBE))


def test_keys_alone_where_values_are_plain(model):
    codec = Recorder()
    with Context(model, NOTHING, flash=FLASH_OFF, codec=codec) as context, Context(model, EXACT, flash=FLASH_OFF) as exact:
        for chunk in (300, 100):
            found, expected = context.feed(random_tokens(chunk)), exact.feed(random_tokens(chunk))
            assert distance(found, expected) < tolerance(model.device, 1e-2)
        assert {layer["name"][6]: layer["kind"] for layer in context.layers()} == {"k": "codec", "v": "plain"}
        assert codec.cells() == [0, 128] and not any(p.is_value for p in codec.pages)


# --- figures ---


def test_bits_are_those_that_the_codec_counts():
    codec = Recorder(bits=lambda page: page.rows.size * (3.5 if page.is_value else 2 + page.layer))
    codec.name = "by layer"
    llama = load(codec, n_ctx=2048, kv=Kv(preset="near-lossless", window=128, sinks=128))
    assert llama.kv == Kv(window=128, sinks=128)
    stats = llama.kv_stats()
    assert (stats["cache"], stats["codec"], stats["preset"], stats["body_bits"]) == ("codec", "by layer", None, 0)
    llama.eval(llama.tokenize(TEXT)[:900])
    stats, layers = llama.kv_stats(), llama.kv_layers()
    for layer in layers:
        assert layer["kind"] == "codec" and layer["tiers"] == (0,) * 5 and layer["pages_packed"] == 5
        assert layer["body_bits"] == pytest.approx(3.5 if layer["is_value"] else 2 + layer["layer"])
    assert stats["body_bits"] == pytest.approx((3.5 + 2 + 4.5) / 2)
    # Sixteen pages of 128 cells: one of sinks, two of the window in F16, records for all but the sinks and one.
    total = (3 * 16 + 14 * stats["body_bits"]) / 16
    assert stats["total_bits"] == pytest.approx(total, rel=0.012)  # tables and query statistics
    assert stats["times_smaller"] == pytest.approx(16 / stats["total_bits"])
    assert stats["bytes"] >= stats["bytes_used"] == 8 * 128 * 10 * 2 * 256 * 2  # eight pages, all of it F16
    assert "codec by layer" in llama.kv_report() and f"{stats['body_bits']:.2f} body" in llama.kv_report()
    llama.close()


def test_memory_comes_as_it_is_needed_and_goes_back(model):
    with Context(model, Kv(window=128, sinks=0), n_ctx=4096, codec=Recorder()) as context:
        empty = context.stats()
        context.feed(random_tokens(2000), chunk=128)
        page = 128 * 2 * 64 * 2
        assert context.stats()["bytes_reserved"] - empty["bytes_reserved"] == 4 * (16 - 2) * page
        assert context.stats()["bytes"] == empty["bytes"] >= 4 * 32 * page  # when all cells are filled
        context.clear()
        assert all(context.stats()[name] == empty[name] for name in ("bytes", "bytes_reserved", "bytes_used"))


def test_query_statistics_of_a_model():
    llama = load(kv="balanced", n_ctx=512)
    assert llama.query_statistics() == {}
    llama.eval(llama.tokenize(TEXT)[:200])
    found = llama.query_statistics()
    assert sorted(found) == list(range(10))
    for mean_abs, mean_sqr in found.values():
        assert mean_abs.shape == mean_sqr.shape == (2, 128)
        assert (mean_abs > 0).all() and (mean_sqr >= mean_abs**2 * 0.999).all()
    llama.close()
    with pytest.raises(bridge.ContextError, match="closed"):
        llama.query_statistics()
    stock = load(stock="f16", n_ctx=256)
    with pytest.raises(bridge.ContextError, match="counts no queries"):
        stock.query_statistics()
    stock.close()


# --- mistakes ---


def refused(codec, match):
    llama = load(codec, kv=NOTHING, n_ctx=512)
    tokens = llama.tokenize(TEXT)[:300]
    with pytest.raises(bridge.ContextError, match=match) as e:
        llama.eval(tokens)
    text = str(e.value)
    assert text.startswith("The codec failed on the keys of layer 0, cells 0 to 127: ") and text.endswith(".") and "\n" not in text
    llama.close()
    return e.value.__cause__


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda page: None, "TypeError: a codec returns rows and bits, not NoneType"),
        (lambda page: page.rows, "TypeError: a codec returns rows and bits, not ndarray"),
        (lambda page: (page.rows[:1], 1), r"ValueError: rows has shape \(1, 128, 128\), not \(2, 128, 128\)"),
        (lambda page: (page.rows.transpose(1, 0, 2), 1), r"ValueError: rows has shape \(128, 2, 128\)"),
        (lambda page: (page.rows * np.where(np.arange(128) == 3, np.nan, 1), 1), "its result has a NaN in head 0, cell 0 of the page"),
        (lambda page: (page.rows, 0), r"it counts 0\.0+ bits"),
        (lambda page: (page.rows, -1), r"it counts -1\.0+ bits"),
        (lambda page: (page.rows, float("nan")), "it counts nan bits"),
        (lambda page: (page.rows, float("inf")), "it counts inf bits"),
        (lambda page: (page.rows, "three"), "TypeError: must be real number"),
    ],
)
def test_wrong_answers_end_the_evaluation_with_a_sentence(answer, words):
    refused(answer, words)


def test_what_a_codec_raises_is_the_cause():
    def codec(page):
        return page.no_such_thing

    cause = refused(codec, "AttributeError: 'Page' object has no attribute 'no_such_thing'")
    assert isinstance(cause, AttributeError)
    names = []
    trace = cause.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names[-1] == "codec"  # where it happened


def test_an_interrupted_codec_is_an_interrupted_program():
    def codec(page):
        raise KeyboardInterrupt

    llama = load(codec, kv=NOTHING)
    with pytest.raises(KeyboardInterrupt):
        llama.eval(llama.tokenize(TEXT)[:300])
    llama.close()


@pytest.mark.parametrize(
    "use",
    [
        lambda llama: llama.eval([5]),
        lambda llama: llama.close(),
        lambda llama: llama.save_state(),
        lambda llama: llama.create_completion("x", max_tokens=1),
        lambda llama: llama.n_ctx(),
        lambda llama: llama.ctx,
    ],
    ids=["eval", "close", "save_state", "create_completion", "n_ctx", "ctx"],
)
def test_a_codec_cannot_use_the_model_that_calls_it(use, tiny_path):
    def codec(page):
        if len(calls) < 2:
            calls.append(page)
            use(llama)
        return page.rows, 1

    calls = []
    llama, exact = (load(c, kv=kv, n_ctx=512, model=tiny_path) for c, kv in ((codec, NOTHING), (None, Kv(sinks=1 << 20))))
    tokens = llama.tokenize(TEXT)[:300]
    with pytest.raises(bridge.ContextError, match="cannot use the model"):
        llama.eval(tokens)
    calls.append(None)  # from now on it does not try
    llama.reset()
    for each in (llama, exact):
        each.eval(tokens)
    np.testing.assert_array_equal(llama.scores[:300], exact.scores[:300])
    llama.close()
    exact.close()


def test_a_codec_may_use_another_model(model):
    def codec(page):
        with Context(model, BALANCED, n_ctx=256) as inside:
            inside.feed(random_tokens(10))
        assert llama.kv_stats()["cache"] == "codec" and llama.n_tokens == 0 and llama.tokenize(b"text")
        return page.rows, 1

    llama = load(codec, kv=NOTHING, n_ctx=512)
    llama.eval(llama.tokenize(TEXT)[:200])
    assert llama.n_tokens == 200
    llama.close()


def test_a_page_that_was_refused_comes_again(model):
    """A failed evaluation leaves the cache as usable as it was: after a removal of what it had begun the logits are those of an F16 cache."""
    codec = Recorder()
    fine = codec.change

    def fails(page):
        raise ValueError(f"page {page.first_cell}")

    with Context(model, NOTHING, codec=codec) as context, Context(model, EXACT) as exact:
        context.feed(random_tokens(250))
        codec.change = fails
        rows = [(t, 250 + i, [0]) for i, t in enumerate(random_tokens(100, 2))]
        assert context.batch(rows)[0] != 0
        sentence, cause = context.failure()
        assert "keys of layer 0, cells 128 to 255" in sentence and isinstance(cause, ValueError) and str(cause) == "page 128"
        assert context.batch(rows)[0] != 0 and context.pos_max() == 249
        codec.change = fine
        exact.feed(random_tokens(250))
        for tokens in (random_tokens(100, 2), PROBE):
            np.testing.assert_array_equal(context.feed(tokens), exact.feed(tokens))
        assert context.failure() == ("", None)


def test_a_refusal_during_a_shift_loses_nothing(model):
    """llama.cpp cannot be told that a shift failed: the page stays in F16 and the next evaluation hands it over."""
    codec = Recorder()
    fine = codec.change
    with Context(model, NOTHING, codec=codec) as context, Context(model, EXACT) as exact:
        for c in (context, exact):
            c.feed(random_tokens(500))
            c.rm(0, 10, 90)
            c.add(0, 90, -1, -80)
        codec.change = lambda page: None
        assert context.batch([(5, context.pos_max() + 1, [0])])[0] != 0
        codec.change = fine
        np.testing.assert_array_equal(context.feed(PROBE), exact.feed(PROBE))


def test_a_refusal_during_a_restore_fails_the_next_evaluation(model):
    codec = Recorder()
    fine = codec.change
    with Context(model, EXACT) as exact, Context(model, NOTHING, codec=codec) as context:
        exact.feed(random_tokens(400))
        state = exact.save(0)
        codec.change = lambda page: 1 / 0
        assert context.load(state, 0) == len(state) and context.save(0) == state
        assert context.batch([(5, 400, [0])])[0] != 0 and isinstance(context.failure()[1], ZeroDivisionError)
        codec.change = fine
        np.testing.assert_array_equal(context.feed(PROBE), exact.feed(PROBE))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"codec": "mix"}, "codec is a str"),
        ({"codec": Recorder(), "stock": "f16"}, "stock turns MixKVQ off"),
        ({"codec": Recorder(), "kv": "nope"}, "no preset 'nope'"),
    ],
)
def test_settings_that_do_not_go_together(arguments, words):
    with pytest.raises(bridge.SettingsError, match=words) as e:
        load(**arguments)
    assert str(e.value).endswith(".")


# --- lifetimes and threads ---


def test_a_closed_model_lets_the_codec_go():
    codec = Recorder()
    gone = weakref.ref(codec)
    llama = load(codec, n_ctx=256)
    llama.eval([5, 6])
    del codec
    assert gone() is not None
    llama.close()
    llama.codec = None
    assert gone() is None  # at once: nothing goes in a circle

    llama = load(Recorder(), n_ctx=256)
    gone = weakref.ref(llama.codec), weakref.ref(llama)
    del llama
    assert gone[0]() is None and gone[1]() is None


def test_a_context_without_its_session_refuses(model):
    context = Context(model, NOTHING, codec=Recorder())
    context.feed(random_tokens(100))
    context._session = None
    gc.collect()
    assert context.batch([(t, 100 + i, [0]) for i, t in enumerate(random_tokens(300))])[0] != 0
    context.close()


def test_models_with_codecs_run_in_several_threads():
    found = {}

    def work(i):
        codec = Recorder(change=lambda page: page.rows * (1 + i))
        llama = load(codec, kv=NOTHING, n_ctx=512)
        for _ in range(2):
            llama.eval(llama.tokenize(TEXT)[:200])
        assert len(codec.pages) == 10 * 2 * 3
        found[i] = llama.scores[:400].copy()
        llama.close()

    work(0)
    alone = found.pop(0)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(found) == [0, 1, 2]
    np.testing.assert_array_equal(found[0], alone)
    assert len({scores[399].tobytes() for scores in found.values()}) == 3


def identity(page):
    return page.rows, 1


def test_a_pickled_model_has_its_codec():
    llama = load(identity, kv=Kv(window=64), n_ctx=256)
    again = pickle.loads(pickle.dumps(llama))
    assert again.codec is identity and again.kv == llama.kv
    again.close()
    llama.close()


# --- from C ---


def test_a_codec_of_a_c_program(one_layer):
    """Through the struct of functions alone: what the codec returns is in the sentence, and NULL settings have none."""
    ffi = FFI()
    ffi.cdef(declarations())
    registry = adapter.function("ggml_backend_dev_backend_reg", adapter.ctypes.c_void_p, adapter.ctypes.c_void_p)(one_layer.backend.cpu)
    get = adapter.function("ggml_backend_reg_get_proc_address", *[adapter.ctypes.c_void_p] * 2, adapter.ctypes.c_char_p)
    api = ffi.cast("mixkvq_backend_api *", get(registry, b"mixkvq_backend_api"))
    assert api.version == 4
    seen = []

    @ffi.callback("int(void *, const mixkvq_page *, float *, double *)")
    def codec(user, page, rows, bits):
        n = page.n_heads * 128 * page.head_size
        seen.append((int(ffi.cast("intptr_t", user)), page.layer, page.is_value, page.first_cell, page.q_abs != ffi.NULL))
        ffi.memmove(rows, page.rows, 4 * n)
        bits[0] = 5 * n
        return 0 if len(seen) < 4 else -7

    settings = ffi.new("mixkvq_settings *", [ffi.NULL, ffi.NULL, 0, 0, 0, ffi.NULL, ffi.NULL, codec, ffi.cast("void *", 42)])

    class Session:
        """As much of mixkvq.core._native.Session as a Context needs."""

        def __init__(self):
            self.handle = api.begin(settings)
            assert self.handle != ffi.NULL

        def end(self):
            api.end(self.handle)

    context = Context.__new__(Context)
    backend, one_layer.backend = one_layer.backend, type("Backend", (), {"begin": lambda *_: Session()})
    try:
        context.__init__(one_layer)
    finally:
        one_layer.backend = backend
    session = context._session.handle
    context.feed(random_tokens(200))
    assert seen == [(42, 0, 0, 0, True), (42, 0, 1, 0, False)]
    stats = ffi.new("mixkvq_stats *")
    assert api.stats(session, stats) == 0 and stats.body_bits == 5
    assert context.batch([(t, 200 + i, [0]) for i, t in enumerate(random_tokens(200))])[0] != 0
    assert ffi.string(api.error(session)) == b"the codec failed on the keys of layer 0, cells 256 to 383: it returned -7"
    context.close()
    api.release(session)

    settings.window = 1 << 21
    assert api.begin(settings) == ffi.NULL
    assert b"2097152 is not a number of tokens" in ffi.string(api.error(ffi.NULL))
