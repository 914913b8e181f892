"""The comparison of predictions in the native module, against NumPy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_models

from bridge import ContextError
from mixkvq.core.native import native
from mixkvq.study import compare, sensitivity
from mixkvq.study.compare import Comparison, Passage, add_predictions, feed

INF = math.inf


def log_softmax(logits):
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def slow(baseline, cache, targets):
    """Divergence, -log p of both, first choices of both. A token without probability in the baseline does not count."""
    p, q = log_softmax(baseline), log_softmax(cache)
    with np.errstate(invalid="ignore", over="ignore"):
        terms = np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0.0)
    rows = np.arange(len(targets))
    return np.maximum(0.0, terms.sum(axis=1)), -p[rows, targets], -q[rows, targets], baseline.argmax(axis=1), cache.argmax(axis=1)


def check(baseline, caches, targets, **options):
    kld, nll, top = native().compare_predictions(baseline, caches, targets, **options)
    assert kld.shape == (len(caches), len(targets)) and nll.shape == top.shape == (1 + len(caches), len(targets))
    for i, cache in enumerate(caches):
        expected, nll_p, nll_q, top_p, top_q = slow(baseline, cache, targets)
        # What cancels in a divergence is as large as the logarithms.
        np.testing.assert_allclose(kld[i], expected, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(nll[0], nll_p, rtol=1e-13, atol=1e-14)
        np.testing.assert_allclose(nll[i + 1], nll_q, rtol=1e-13, atol=1e-14)
        np.testing.assert_array_equal(top[0], top_p)
        np.testing.assert_array_equal(top[i + 1], top_q)
    return kld, nll, top


def logits(rng, n, vocabulary, spread=4.0):
    return (spread * rng.standard_normal((n, vocabulary))).astype(np.float32)


@pytest.mark.parametrize("isa", native().isas())
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 7, 15, 16, 17, 31, 257, 511, 512, 513, 1023, 1024, 1025, 2049, 49152, 151936])
def test_sizes(vocabulary, isa):
    rng = np.random.default_rng(vocabulary)
    baseline = logits(rng, 5, vocabulary)
    caches = [baseline + (size * rng.standard_normal(baseline.shape)).astype(np.float32) for size in (1e-3, 0.1, 3)]
    kld, _, _ = check(baseline, caches, rng.integers(0, vocabulary, 5), isa=isa)
    if vocabulary > 16:
        assert (kld > 0).all()
    assert not native().compare_predictions(baseline, [baseline], isa=isa)[0].any()  # exactly 0


def test_the_sums_are_better_than_those_of_float64_in_numpy():
    """Where long double is longer, it says by how much either is off."""
    rng = np.random.default_rng(1)
    baseline, cache = logits(rng, 4, 151936), logits(rng, 4, 151936)
    p, q = (np.exp(x.astype(np.longdouble) - x.max(axis=1, keepdims=True)) for x in (baseline, cache))
    p, q = p / p.sum(axis=1, keepdims=True), q / q.sum(axis=1, keepdims=True)
    exact = (p * np.log(p / q)).sum(axis=1).astype(np.float64)
    kld, nll, _ = native().compare_predictions(baseline, [cache], np.zeros(4, np.int64))
    np.testing.assert_allclose(kld[0], exact, rtol=1e-14)
    np.testing.assert_allclose(nll[1], -np.log(q[:, 0]).astype(np.float64), rtol=1e-14)


@pytest.mark.parametrize("isa", native().isas())
def test_masked_tokens_and_huge_values(isa):
    rng = np.random.default_rng(2)
    baseline, cache = logits(rng, 6, 3000), logits(rng, 6, 3000)
    baseline[0, 100:2000] = -INF  # what the baseline cannot say does not count
    baseline[1], cache[1] = -INF, -INF  # one token only
    baseline[1, 2999] = cache[1, 2999] = 5
    baseline[2] *= 1e6
    cache[3] *= 1e30
    baseline[4], cache[4] = baseline[4] - 3e38, cache[4] + 3e38  # float32 ends at 3.4e38
    baseline[5, 17] = cache[5, 17] = 3e38
    kld, nll, _ = check(baseline, [cache], np.array([5, 2999, 7, 8, 9, 17]), isa=isa)
    assert kld[0, 1] == nll[0, 1] == nll[1, 1] == 0 and np.isfinite(kld).all()
    cache[0, 0] = -INF  # the cache excludes what the baseline expects
    assert native().compare_predictions(baseline, [cache], isa=isa)[0][0, 0] == INF


@pytest.mark.parametrize("isa", native().isas())
@pytest.mark.parametrize("vocabulary", [5, 64, 1000, 5000])
def test_the_first_of_equals_is_the_first_choice(vocabulary, isa):
    """As numpy.argmax has it; wherever the equals are, zeros of both signs among them."""
    rng = np.random.default_rng(3)
    rows = np.minimum(logits(rng, 300, vocabulary), 1).astype(np.float32)
    rows[:50] = np.float32(-7)
    rows[50:100] = np.where(rng.random((50, vocabulary)) < 0.5, np.float32(0.0), np.float32(-0.0))
    rows[100] = rows[100, ::-1]
    _, _, top = native().compare_predictions(rows, [rows[::-1]], isa=isa)
    np.testing.assert_array_equal(top, [rows.argmax(axis=1), rows[::-1].argmax(axis=1)])


def test_instruction_sets_and_threads_give_the_same_bits():
    rng = np.random.default_rng(4)
    baseline, caches = logits(rng, 9, 5003), [logits(rng, 9, 5003) for _ in range(3)]
    vector = [isa for isa in native().isas() if isa != "scalar"]
    found = [native().compare_predictions(baseline, caches, np.arange(9), threads=t, isa=isa) for isa in vector for t in (1, 4)]
    for other in found[1:]:
        for a, b in zip(found[0], other):
            np.testing.assert_array_equal(a, b)
    alone = native().compare_predictions(baseline, caches[1:2], np.arange(9), isa=vector[0] if vector else None)
    np.testing.assert_array_equal(alone[0][0], found[0][0][1] if vector else alone[0][0])


@pytest.mark.parametrize("isa", native().isas())
@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("token", [0, 1, 600, 1500])
def test_what_is_no_distribution_is_named(value, token, isa):
    rows, good = logits(np.random.default_rng(5), 4, 1501), logits(np.random.default_rng(6), 4, 1501)
    rows[2, token] = rows[3, 3] = value
    for baseline, caches, whose in ((rows, [good], "baseline"), (good, [good, rows], r"caches\[1\]")):
        with pytest.raises(ValueError, match=rf"^{whose}, row 2: the logit of token {token} is -?{value}"):
            native().compare_predictions(baseline, caches, threads=2, isa=isa)
    rows[1] = -INF
    with pytest.raises(ValueError, match=r"^caches\[0\], row 1: the logit of token 0 is -inf, the largest"):
        native().compare_predictions(good, [rows], isa=isa)


def test_wrong_arguments_are_named():
    rows = np.zeros((2, 3), np.float32)
    for arguments, words in (
        ((rows.astype(np.float64), [rows]), "baseline is float64, not float32"),
        ((rows, [rows, rows[:1]]), r"caches\[1\] has shape \(1, 3\), not \(2, 3\)"),
        ((rows[:, :0], []), "rows of 0 logits"),
        ((rows, [rows], np.array([0, 3])), r"targets\[1\] is 3, not one of 3 tokens"),
        ((rows, [rows], np.array([-1, 0])), r"targets\[0\] is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            native().compare_predictions(*arguments)
    with pytest.raises(ValueError, match="threads is 0"):
        native().compare_predictions(rows, [rows], threads=0)
    assert native().compare_predictions(rows[:0], [rows[:0]])[0].shape == (1, 0)


def test_comparisons_of_several_caches_are_those_of_each():
    rng = np.random.default_rng(7)
    baseline, caches, targets = logits(rng, 7, 999), [logits(rng, 7, 999) for _ in range(3)], rng.integers(0, 999, 7).tolist()
    targets[0] = int(caches[0][0].argmax())
    together, alone = [[Comparison() for _ in caches] for _ in range(2)]
    add_predictions(together, baseline, caches, targets)
    for one, cache in zip(alone, caches):
        one.add(baseline[:3], cache[:3], targets[:3])
        one.add(baseline[3:], cache[3:], targets[3:], threads=2)
        kld, nll_p, nll_q, top_p, top_q = slow(baseline, cache, targets)
        assert one.kld == pytest.approx(kld, rel=1e-12) and one.nll == pytest.approx(nll_q) and one.nll_baseline == pytest.approx(nll_p)
        assert one.same_top == (top_p == top_q).tolist() and one.right == (top_q == targets).tolist()
        assert one.right_baseline == (top_p == targets).tolist()
    assert together == alone and together[0].right[0]


def test_calibration_measures_the_same_divergence():
    rng = np.random.default_rng(8)
    exact, other = logits(rng, 6, 2000), logits(rng, 6, 2000)
    np.testing.assert_allclose(sensitivity.divergences(exact, other), slow(exact, other, np.zeros(6, int))[0], rtol=1e-12)


class Broken:
    """A context whose predictions are what it is told."""

    def __init__(self, rows):
        self.rows, self.at = rows, 0

    def clear(self):
        self.at = 0

    def n_vocab(self):
        return self.rows.shape[1]

    def forward(self, tokens, wanted, copy=True):
        self.at += len(tokens)
        return self.rows[self.at - wanted : self.at]


def test_a_cache_whose_predictions_are_broken_is_named():
    rows = logits(np.random.default_rng(9), 300, 50)
    broken = rows.copy()
    broken[200, 30] = math.nan
    walkers = [compare._Walker(name, Broken(found), 128) for name, found in (("f16", rows), ("q8_0", rows), ("tiny", broken))]
    passage = Passage(list(range(50)) * 6, first=30)
    with pytest.raises(ContextError, match="^With tiny the model's logits after 201 tokens are no prediction"):
        compare._walk(walkers[0], walkers[1:], passage, compare.cut(299, "decode"), 1, lambda n: None)


def test_batches_give_the_rows_of_one(tmp_path):
    """Whatever part of a batch is wanted."""
    import bridge

    llm = bridge.Llama(str(tiny_models.llama(tmp_path / "tiny.gguf")), stock="f16", n_ctx=256, n_batch=64, n_threads=1, device="cpu", verbose=False)
    tokens = np.random.default_rng(10).integers(3, 259, 40).tolist()
    whole = np.concatenate([feed(llm, [token], 64, 1).copy() for token in tokens])
    for batch in (1, 7, 8, 40, 64):
        for wanted in (0, 1, 7, 9, 40):
            llm.clear()
            rows = feed(llm, tokens, batch, wanted)
            assert rows.shape == (wanted, llm.n_vocab()) and rows.dtype == np.float32
            np.testing.assert_allclose(rows, whole[40 - wanted :], atol=2e-2)


# ---- pages that are read back ----------------------------------------------------------------------------


@pytest.mark.parametrize("isa", native().isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_reading_back_is_packing_and_unpacking(isa, threads):
    """The same numbers as head by head through records, whatever cells hold tokens; heads without a format stay."""
    module, rng = native(), np.random.default_rng(11)
    rows = (rng.normal(size=(4, 128, 64)) * rng.gamma(1, 3, size=(4, 1, 64))).astype(np.float16).astype(np.float32)
    q_abs = rng.gamma(1, size=(4, 64)).astype(np.float32)
    valid = rng.random(128) < 0.9
    rows[0, ~valid] = np.nan  # what no token is in is not looked at
    keys = [module.KeyFormat(64, (4, 8, 20, 16, 16), 64), module.KeyFormat(64, (0, 0, 16, 32, 16), 128)]
    values = module.ValueFormat(64, 3, 0)
    found, n_bytes = module.read_back(rows, [keys[0], None, keys[1], values], q_abs, valid, threads=threads, isa=isa)
    np.testing.assert_array_equal(found[1], rows[1])
    for head, fmt in ((0, keys[0]), (2, keys[1])):
        record = module.pack_keys(fmt, rows[head].astype(np.float16), q_abs[head], valid, isa=isa)
        np.testing.assert_array_equal(found[head], module.unpack_keys(fmt, record, isa=isa).astype(np.float32))
    record = module.pack_values(values, rows[3].astype(np.float16), valid, isa=isa)
    np.testing.assert_array_equal(found[3], module.unpack_values(values, record, isa=isa).astype(np.float32))
    assert n_bytes == sum(fmt.record_bytes for fmt in (*keys, values))


def test_what_cannot_be_read_back_is_named():
    module, rows, q_abs = native(), np.zeros((2, 128, 32), np.float32), np.ones((2, 32), np.float32)
    keys, values, other = module.KeyFormat(32, (0, 0, 32, 0, 0)), module.ValueFormat(32, 2), module.ValueFormat(64, 2)
    bad = rows.copy()
    bad[1, 5, 3] = np.inf
    for arguments, words in (
        ((rows, [values]), r"rows has shape \(2, 128, 32\), not \(1, 128, any\)"),
        ((rows, [values, other]), r"formats\[1\] is for heads of 64, the rows have 32"),
        ((rows, [keys, None]), "keys need their importance"),
        ((rows, [keys, None], -q_abs), "importance is -1.0* in head 0"),
        ((bad, [values, values]), "rows is inf in head 1, cell 5"),
    ):
        with pytest.raises(ValueError, match=words):
            module.read_back(*arguments)
