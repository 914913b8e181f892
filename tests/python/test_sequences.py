"""Several sequences in one context: none sees anything of the others, and everything that a context promises holds for them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tiny_models

import bridge
from bridge import ContextError, ContextTooLargeError, Llama, SettingsError, placement
from bridge._compat import C
from bridge.dry_run import DryRun
from bridge.sequences import Sequences
from mixkvq.core.memory import SEQUENCES, Free

SPARE = {"n_threads": 1, "n_threads_batch": 1, "device": "cpu", "verbose": False}
CACHES = [{"stock": "f16"}, {"kv": "tiny"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_models.llama(tmp_path_factory.mktemp("sequences") / "tiny.gguf"))


def words(seed, n):
    return np.random.default_rng(seed).integers(3, 259, n).tolist()


@pytest.mark.parametrize("options", CACHES)
def test_sequences_do_not_see_each_other(tiny, options):
    """Each predicts what it would alone, whatever the others hold, and after it was emptied and used again."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(3, 259, n).tolist() for n in (600, 20, 150)]
    common = {"n_batch": 128, **SPARE, **options}
    one = bridge.Llama(tiny, n_ctx=768, **common)

    def expected(tokens):
        one.clear()
        one.eval(tokens)
        return one.last_logits().copy()

    llm = Sequences(tiny, n_seq=3, n_ctx=768, **common)
    for sequence, text in enumerate(texts):
        np.testing.assert_allclose(llm.read(sequence, text), expected(text), atol=2e-2)
    for at in range(4):
        rows = llm.step([(sequence, 10 + at) for sequence in (2, 0, 1)]).copy()
        for row, sequence in zip(rows, (2, 0, 1)):
            texts[sequence] = [*texts[sequence], 10 + at]
            np.testing.assert_allclose(row, expected(texts[sequence]), atol=3e-2)
    llm.forget(0)
    np.testing.assert_allclose(llm.read(0, texts[1]), expected(texts[1]), atol=3e-2)
    assert llm.step([(1, 5)]).shape == (1, llm.n_vocab())
    assert llm.kv_stats()["n_cells"] == one.kv_stats()["n_cells"] == 768
    assert llm.kv_stats()["bytes"] == pytest.approx(one.kv_stats()["bytes"], rel=0.02)
    llm.clear()
    np.testing.assert_allclose(llm.read(2, texts[1]), expected(texts[1]), atol=3e-2)
    llm.close()
    one.close()


@pytest.mark.parametrize("options", CACHES)
def test_a_step_is_computed_at_once_in_any_order(tiny, options):
    """llama.cpp cuts a batch where sequences do not follow one another: in falling order every token would be a graph of its own."""
    computed = [0]

    @C.ggml_backend_sched_eval_callback
    def count(_tensor, _ask, _data):
        computed[0] += 1
        return False

    class Counted(Sequences):
        def _adjust_context_params(self, params):
            super()._adjust_context_params(params)
            params.cb_eval = count

    llm = Counted(tiny, n_seq=4, n_ctx=512, **SPARE, **options)
    nodes = {}
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        computed[0] = 0
        rows = llm.step([(sequence, 70 + sequence) for sequence in order])
        nodes[order] = computed[0]
        assert rows.shape == (4, llm.n_vocab())
    computed[0] = 0
    llm.step([(0, 5), (2, 5)])
    two_graphs = computed[0]
    llm.close()
    assert nodes[0, 1, 2, 3] > 0 and len(set(nodes.values())) == 1
    assert two_graphs > 1.5 * nodes[0, 1, 2, 3]  # so it is graphs that this counts


@pytest.mark.parametrize("options", CACHES)
def test_a_copy_goes_on_as_what_it_was_copied_from(tiny, options):
    llm = Sequences(tiny, n_seq=3, n_ctx=1024, n_batch=128, **SPARE, **options)
    llm.read(0, words(1, 700))
    llm.read(2, words(2, 300))
    llm.copy(0, 2)
    llm.copy(1, 1)
    assert llm.n_tokens == 1400 and not len(llm._tokens[1])
    copied = llm.read(2, words(3, 200)).tobytes()
    assert copied == llm.read(0, words(3, 200)).tobytes()
    llm.copy(1, 2)  # of nothing
    assert llm.n_tokens == 900
    assert llm.read(2, words(3, 200)).tobytes() == llm.read(1, words(3, 200)).tobytes()
    for source, target in ((0, 3), (-1, 0)):
        with pytest.raises(SettingsError, match="There is no sequence"):
            llm.copy(source, target)
    llm.close()


@pytest.mark.parametrize("options", CACHES)
def test_what_others_hold_does_not_change_a_bit(tiny, options):
    """Pages are packed by the queries of their own sequence; one that is used again has learnt nothing of what it held before."""
    found = []
    for others, before in (([words(1, 600), words(2, 500)], []), ([words(3, 600), words(4, 500)], words(5, 700))):
        llm = Sequences(tiny, n_seq=3, n_ctx=1024, n_batch=128, **options, **SPARE)
        if before:
            llm.read(1, before)
            llm.forget(1)
        for sequence, text in zip((0, 2), others):
            llm.read(sequence, text)
        rows = [llm.read(1, words(6, 600))]
        for at in range(150):
            rows.append(llm.step([(0, 7), (1, at + 3), (2, 9)])[1])
        if options != {"stock": "f16"}:
            assert all(layer["pages_packed"] > 3 for layer in llm.kv_layers())
        found.append(np.array(rows))
        llm.close()
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("options", CACHES)
def test_clear_empties_all_and_gives_the_memory_back(tiny, options):
    llm = Sequences(tiny, n_seq=2, n_ctx=512, n_batch=128, **options, **SPARE)
    empty = llm.kv_stats()["bytes_used"]
    first = llm.read(1, words(1, 400))
    llm.read(0, words(2, 300))
    assert llm.n_tokens == 700 and llm.kv_stats()["bytes_used"] > empty
    for again in (llm.clear, llm.reset):
        again()
        assert llm.n_tokens == 0 and llm.kv_stats()["bytes_used"] == empty
        np.testing.assert_array_equal(llm.read(1, words(1, 400)), first)
    llm.close()


def test_what_does_not_fit_together_is_refused_and_changes_nothing(tiny):
    llm = Sequences(tiny, n_seq=2, n_ctx=256, n_batch=128, kv="tiny", **SPARE)
    llm.read(0, words(1, 250))
    for refused, error, sentence in (
        (lambda: llm.read(0, words(2, 7)), ContextError, "7 tokens do not fit behind the 250 of sequence 0 in a context of 256"),
        (lambda: llm.step([(1, 5), *[(0, 5)] * 7]), ContextError, "7 tokens do not fit behind the 250 of sequence 0"),
        (lambda: llm.step([(1, 5)] * 129), SettingsError, "n_batch is 128"),
        (lambda: llm.step([(0, 5), (2, 5)]), SettingsError, "There is no sequence 2; they are numbered from 0 to 1"),
        (lambda: llm.forget(-1), SettingsError, "There is no sequence -1"),
        (lambda: llm.step([(1, llm.n_vocab())]), SettingsError, "not in the vocabulary"),
        (lambda: llm.read(1, []), SettingsError, "nothing to read"),
        (lambda: llm.eval([5]), ContextError, "`read` and `step`"),
        (lambda: llm.forward([5]), ContextError, "`read` and `step`"),
        (lambda: llm.create_completion("a", max_tokens=1), ContextError, "`read` and `step`"),
        (lambda: llm.save_state(), ContextError, "`read` and `step`"),
        (lambda: llm.load_state(None), ContextError, "`read` and `step`"),
    ):
        with pytest.raises(error, match=sentence):
            refused()
    llm.clear()
    for n_seq in (0, SEQUENCES + 1, True, "2"):
        with pytest.raises(SettingsError, match="n_seq is"):
            Sequences(tiny, n_seq=n_seq, **SPARE)
    with pytest.raises(SettingsError, match="embeddings"):
        Sequences(tiny, n_seq=2, stock="f16", embedding=True, **SPARE)
    assert SEQUENCES == C.llama_max_parallel_sequences()
    llm.close()


def test_a_refused_batch_leaves_the_sequences_as_they_were(tiny):
    llm = Sequences(tiny, n_seq=2, n_ctx=256, n_batch=128, kv="tiny", **SPARE)
    text = words(1, 100)
    llm.read(0, text)
    for wrong in ([(0, 5), (1, -1)], [(0, 5), (9, 5)]):
        with pytest.raises(SettingsError):
            llm.step(wrong)
    assert llm.n_tokens == 100
    row = llm.step([(0, 5)])[0]
    llm.forget(0)
    llm.read(0, text)
    np.testing.assert_array_equal(llm.step([(0, 5)])[0], row)
    llm.close()


def test_after_close_everything_says_so(tiny):
    llm = Sequences(tiny, n_seq=2, n_ctx=256, kv="tiny", **SPARE)
    logits = llm.step([(0, 5), (1, 6)])
    kept = logits.copy()
    llm.close()
    np.testing.assert_array_equal(logits, kept)
    for use in (lambda: llm.read(0, [5]), lambda: llm.step([(0, 5)]), lambda: llm.forget(0), llm.clear, llm.reset, llm.kv_stats, llm.last_logits):
        with pytest.raises(ContextError, match="closed"):
            use()
    llm.close()


def test_a_codec_that_fails_is_the_cause(tiny):
    def codec(page):
        raise ValueError("no such page")

    llm = Sequences(tiny, n_seq=2, n_ctx=512, n_batch=128, codec=codec, **SPARE)
    with pytest.raises(ContextError, match="no such page") as e:
        llm.read(1, words(1, 500))
    assert isinstance(e.value.__cause__, ValueError)
    llm.close()


def test_a_copy_by_pickle_has_as_many(tiny):
    llm = Sequences(tiny, n_seq=3, n_ctx=300, kv="tiny", **SPARE)
    twin = pickle.loads(pickle.dumps(llm))
    assert (twin.n_seq, twin.n_ctx(), twin.kv_stats()["n_cells"]) == (3, llm.n_ctx(), 512) and llm.n_ctx() == 3 * 512
    np.testing.assert_array_equal(twin.read(2, [5, 6, 7]), llm.read(2, [5, 6, 7]))
    llm.close()
    twin.close()


@pytest.mark.parametrize("stock", [None, "q8_0"], ids=["ours", "q8_0"])
@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gemma2, tiny_models.lfm2], ids=["llama", "gemma2", "lfm2"])
def test_the_size_is_estimated_for_all_sequences(tmp_path, make, stock, monkeypatch):
    """Each has rings and states of its own, and a length that is rounded up by itself."""
    path, needs = str(make(tmp_path / "m.gguf")), []
    measure = DryRun.measure

    def noted(self, n_ctx):
        needs.append(measure(self, n_ctx))
        return needs[-1]

    monkeypatch.setattr(DryRun, "measure", noted)
    options = {"n_batch": 128, "swa_full": False, **({"stock": stock} if stock else {"kv": "tiny"}), **SPARE}
    llm = Sequences(path, n_seq=5, n_ctx=700, **options)
    all_of_them, own = Llama.kv_stats(llm), llm.kv_stats()
    llm.close()
    assert needs[0].cache == all_of_them["bytes"] and needs[0].recurrent == all_of_them["bytes_recurrent"]
    assert own["bytes"] == all_of_them["bytes"] // 5 and own["n_cells"] == 768
    one = bridge.Llama(path, n_ctx=768, **options)
    alone = one.kv_stats()
    one.close()
    assert own["bytes"] == pytest.approx(alone["bytes"], rel=0.03)
    assert own["bytes_recurrent"] == pytest.approx(alone["bytes_recurrent"], abs=11_000)  # llama.cpp says it in hundredths of a MiB


def test_what_cannot_fit_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(placement, "free_memory", lambda: Free(64 << 20))
    Sequences(tiny, n_seq=1, n_ctx=8192, stock="f16", **SPARE).close()
    with pytest.raises(ContextTooLargeError, match="A context of 131072 tokens needs at least"):
        Sequences(tiny, n_seq=16, n_ctx=8192, stock="f16", **SPARE)
