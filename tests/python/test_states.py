"""Packed states: what comes back computes the same bits; what is damaged or does not fit is refused in a sentence and changes nothing."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from contexts import BALANCED, CPU, EXACT, PACKED, Context, Model, assert_same, devices, kl, random_tokens
from gguf import GGUFWriter
from test_architectures import PLAIN, SERVED, WINDOWED

import bridge
from bridge import states
from bridge.sequences import Sequences
from mixkvq.core.files import check_target, kind_of
from mixkvq.core.model_file import open_model
from mixkvq.core.native import native

MODEL = Path(__file__).parents[2] / "models" / "cot-tiny-34m-q8_0.gguf"
KV = bridge.Kv(preset="balanced", window=64, sinks=128)
SETTINGS = [EXACT, PACKED, BALANCED, KV, bridge.Kv(preset="mix2.4"), bridge.Kv(preset="near-lossless", window=200, sinks=0)]
IDS = ["exact", "packed", "balanced", "windowed", "mix2.4", "near-lossless"]
OTHERS = {"gemma4": tiny_models.gemma4, "mamba": tiny_models.mamba, **{name: make for name, (make, _) in PLAIN.items()}}


@pytest.fixture(scope="module", params=devices())
def models(tmp_path_factory, request):
    """Name -> the model on our device, made and loaded once."""
    folder, loaded = tmp_path_factory.mktemp("states"), {}

    def get(name="llama-64x2-gqa2", make=None):
        if name not in loaded:
            loaded[name] = Model((make or SERVED[name])(folder / f"{name}.gguf"), True, request.param)
        return loaded[name]

    yield get
    for model in loaded.values():
        model.close()


def goes_on(context, seq=0):
    """Logits of what is read next: a batch, single tokens, and enough for pages to be packed on the way."""
    batch, tokens = context.feed(random_tokens(70, 5), seq), [context.feed([t], seq) for t in (7, 8, 9)]
    return np.concatenate([batch, *tokens, context.feed(random_tokens(200, 6), seq, chunk=50)])


def assert_same_pages(a, b):
    assert [[t["pages_packed"], t["pages_f16"]] for t in a.layers()] == [[t["pages_packed"], t["pages_f16"]] for t in b.layers()]


def used(context):
    return context.stats()["bytes_used"] + context.stats()["bytes_recurrent"]


# --- the same bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", SETTINGS, ids=IDS)
@pytest.mark.parametrize("n_seq, unified", [(1, False), (2, False), (2, True)], ids=["one", "streams", "unified"])
@pytest.mark.parametrize("n_ctx", [1536, 4096], ids=["same", "larger"])
def test_a_context_goes_on_with_the_same_bits(models, kv, n_seq, unified, n_ctx):
    with Context(models(), kv, n_ctx=1536 * n_seq, n_seq=n_seq, unified=unified) as saved:
        for seq in range(n_seq):
            saved.feed(random_tokens(900 + 60 * seq, seq), seq, chunk=300)
        packed = saved.pack()
        assert len(packed) < 1.05 * saved.stats()["bytes_used"]
        with Context(models(), kv, n_ctx=n_ctx * n_seq, n_seq=n_seq, unified=unified) as loaded:
            loaded.feed(random_tokens(700, 50))  # to be forgotten
            loaded.unpack(packed)
            assert_same_pages(saved, loaded)
            for seq in range(n_seq):
                assert loaded.pos_max(seq) == saved.pos_max(seq)
                assert_same(saved.model.device, (goes_on(loaded, seq), goes_on(saved, seq)))
            assert_same_pages(saved, loaded)
            assert (saved.pages_packed() > 0) == (kv is not EXACT)


@pytest.mark.parametrize("whole", [False, True], ids=["sequence", "context"])
@pytest.mark.parametrize("kv", SETTINGS, ids=IDS)
def test_texts_that_take_turns_by_llama_cpps_own_states(models, kv, whole):
    """As a server's prompt cache does it: rows in F16 come back, and with them what else was known of them. Each goes on as alone."""
    parts = [[random_tokens(n, seed + i) for i, n in enumerate((first, 70, 150, 1, 90))] for first, seed in ((900, 10), (400, 20), (650, 30))]
    alone = []
    for text in parts:
        with Context(models(), kv, n_ctx=2048) as context:
            alone.append([context.feed(part, chunk=300) for part in text])
    states: dict[int, bytes] = {}
    with Context(models(), kv, n_ctx=2048) as context:
        for turn in range(5):
            for i, text in enumerate(parts):
                context.rm(0)
                if i in states:
                    context.load(states[i], None if whole else 0)
                assert_same(context.model.device, (context.feed(text[turn], chunk=300), alone[i][turn]))
                states[i] = context.save(None if whole else 0)


@pytest.mark.parametrize("kv", SETTINGS, ids=IDS)
def test_a_sequence_goes_on_with_the_same_bits(models, kv):
    """That of a stream, in any stream of a context of any length; the others are not touched."""
    with Context(models(), kv, n_ctx=2 * 1536, n_seq=2) as saved, Context(models(), kv, n_ctx=2 * 4096, n_seq=2) as loaded:
        saved.feed(random_tokens(400, 1), 0)
        saved.feed(random_tokens(900, 2), 1, chunk=300)
        packed = saved.pack(1)
        for context in (saved, loaded):
            context.rm(0)
            context.feed(random_tokens(500, 3), 0)
        loaded.unpack(packed, 1)
        for seq in (1, 0):
            assert_same(saved.model.device, (goes_on(loaded, seq), goes_on(saved, seq)))
        loaded.unpack(packed, 0)
        loaded.rm(1)
        alone = goes_on(loaded, 0)
        loaded.unpack(packed, 1)
        assert_same(saved.model.device, (goes_on(loaded, 1), alone))


@pytest.mark.parametrize("kv", SETTINGS, ids=IDS)
def test_sequences_of_a_unified_cache_come_back_to_their_cells(models, kv):
    """Taken out and put back where they were, beside another one in the same pages."""
    with Context(models(), kv, n_ctx=3072, n_seq=3, unified=True) as context:
        for seq in (0, 1):
            context.feed(random_tokens(450 + 60 * seq, seq), seq)
        packed, whole = [context.pack(seq) for seq in (0, 1)], context.pack()
        expected = [goes_on(context, seq) for seq in (0, 1)]
        context.unpack(whole)
        for seq in (0, 1):
            context.unpack(packed[seq], seq)
        for seq in (0, 1):
            assert_same(context.model.device, (goes_on(context, seq), expected[seq]))


def test_cells_that_lie_elsewhere_keep_the_records_of_whole_pages(models):
    """A sequence that began with the second page moves to the first: its pages go with it. Between pages only the ragged ends are in F16 at first."""
    model = models()
    with Context(model, KV, n_ctx=3072, n_seq=2, unified=True) as saved, Context(model, KV, n_ctx=3072, n_seq=2, unified=True) as loaded:
        saved.feed(random_tokens(256, 1), 0)
        saved.feed(random_tokens(640, 2), 1, chunk=320)
        loaded.unpack(saved.pack(1), 1)
        n_packed = [t["pages_packed"] for t in loaded.layers()]
        assert min(n_packed) >= 3 and all(t["pages_packed_ever"] == 0 for t in loaded.layers())  # of 5: records, not rows packed anew
        found, expected = (context.feed(random_tokens(40, 9), 1) for context in (loaded, saved))
        assert kl(found, expected).mean() < 1e-6  # the same numbers in another order


@pytest.mark.parametrize("step", [600, 50], ids=["together", "interleaved"])
def test_a_sequence_of_a_unified_cache_in_another_context(models, step):
    """Its cells lie in the middle of pages, or among those of another one. They keep their places within pages, and pages their records."""
    params = {"n_ctx": 3072, "n_seq": 2, "unified": True}
    with Context(models(), PACKED, **params) as saved, Context(models(), PACKED, **params) as loaded:
        for at in range(0, 600, step):
            saved.feed(random_tokens(step // 2, at), 0)
            saved.feed(random_tokens(step, 900 + at), 1)
        loaded.unpack(saved.pack(1), 1)
        assert loaded.pos_max(1) == saved.pos_max(1) == 599 and loaded.pos_max(0) == -1
        assert all(t["pages_packed"] >= 3 and t["pages_packed_ever"] == 0 for t in loaded.layers())
        found, expected = (context.feed(random_tokens(40, 9), 1) for context in (loaded, saved))
        assert kl(found, expected).mean() < 1e-6  # the same numbers in another order


def test_a_sequence_beside_others_is_as_close_as_an_f16_state(models):
    """Where another sequence has cells already llama.cpp chooses the places."""
    params = {"n_ctx": 3072, "n_seq": 2, "unified": True}
    with Context(models(), PACKED, **params) as saved, Context(models(), PACKED, **params) as loaded:
        saved.feed(random_tokens(300, 1), 0)
        saved.feed(random_tokens(600, 2), 1)
        packed, f16 = saved.pack(1), saved.save(1)
        expected = saved.feed(random_tokens(60, 9), 1)
        loaded.feed(random_tokens(70, 3), 0)
        loaded.unpack(packed, 1)
        found = loaded.feed(random_tokens(60, 9), 1)
        loaded.load(f16, 1)
        assert kl(found, expected).mean() < 2 * max(5e-4, kl(loaded.feed(random_tokens(60, 9), 1), expected).mean())


@pytest.mark.parametrize("kv", SETTINGS, ids=IDS)
@pytest.mark.parametrize("seq", [None, 0], ids=["whole", "sequence"])
def test_holes_stay_open(models, kv, seq):
    """llama.cpp would put the cells side by side: behind a hole they would leave their pages."""
    with Context(models(), kv, n_ctx=3072, n_seq=2) as saved, Context(models(), kv, n_ctx=8192, n_seq=2) as loaded:
        saved.feed(random_tokens(900))
        saved.rm(0, 300, 340)
        saved.rm(0, 700, 701)
        loaded.feed(random_tokens(300, 1))
        loaded.unpack(saved.pack(seq), seq)
        assert loaded.pos_max(0) == saved.pos_max(0) == 899
        assert_same(saved.model.device, (goes_on(loaded), goes_on(saved)))


def test_rewound_and_cut_contexts(models):
    """What was cut off costs nothing where whole packed pages are gone, and does not come back."""
    with Context(models(), KV, n_ctx=4096) as saved, Context(models(), KV, n_ctx=4096) as loaded:
        saved.feed(random_tokens(3000))
        whole = len(saved.pack())
        saved.rm(0, 700)
        packed = saved.pack()
        assert len(packed) < 0.6 * whole
        loaded.unpack(packed)
        assert_same(saved.model.device, (goes_on(loaded), goes_on(saved)))


def test_statistics_come_along(models):
    """The tiers of pages that are packed later, and what is remembered for a rewind."""
    with Context(models(), KV, n_ctx=4096) as saved, Context(models(), KV, n_ctx=4096) as loaded:
        saved.feed(random_tokens(1400), chunk=100)
        loaded.unpack(saved.pack())
        for a, b in zip(saved.query_statistics(0), loaded.query_statistics(0)):
            np.testing.assert_array_equal(a, b)
        for context in (saved, loaded):
            context.rm(0, 600)  # back to the mark at 512 rows
        assert_same(saved.model.device, (goes_on(loaded), goes_on(saved)))
        for a, b in zip(saved.query_statistics(0), loaded.query_statistics(0)):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [*SERVED, *OTHERS])
def test_every_architecture(models, name):
    model = models(name, OTHERS.get(name))
    for kv in (EXACT, PACKED, KV):
        with Context(model, kv) as saved, Context(model, kv, n_ctx=2048) as loaded:
            saved.feed(random_tokens(650), chunk=130)
            packed = saved.pack()
            loaded.unpack(packed)
            assert_same(model.device, (goes_on(loaded), goes_on(saved)))
            if name != "mamba":
                assert len(packed) < 1.05 * used(saved)


@pytest.mark.parametrize("swa_full", [False, True], ids=["ring", "full"])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_sliding_window(models, name, swa_full):
    """As long as its cells have not been used again. What llama.cpp does not save is where in the ring it went on: then the numbers are the same, and
    the order in which they are added up is not."""
    params = {"n_ubatch": 64, "swa_full": swa_full}
    for kv in (EXACT, PACKED, KV):
        for n in (150, 500):
            with Context(models(name), kv, **params) as saved, Context(models(name), kv, **params) as loaded:
                saved.feed(random_tokens(n), chunk=64)
                loaded.feed(random_tokens(300, 3), chunk=64)
                loaded.unpack(saved.pack())
                assert_same_pages(saved, loaded)
                if n == 150 or swa_full:
                    assert_same(saved.model.device, (goes_on(loaded), goes_on(saved)))
                else:
                    tokens = random_tokens(20, 5)
                    assert kl(loaded.feed(tokens), saved.feed(tokens)).mean() < (1e-6 if saved.model.device == CPU else 1e-5)


@pytest.mark.parametrize("name", [*WINDOWED, "lfm2", "mamba"])
def test_a_sequence_of_a_windowed_or_recurrent_model(models, name):
    """llama.cpp moves the cells of a ring: as close as F16 states are. Without a ring: the same bits."""
    model = models(name, OTHERS.get(name))
    with Context(model, PACKED, n_ctx=2048, n_seq=2) as saved, Context(model, PACKED, n_ctx=2048, n_seq=2) as loaded:
        saved.feed(random_tokens(650), 1, chunk=65)
        packed = saved.pack(1)
        loaded.unpack(packed, 1)
        found, expected = (context.feed(random_tokens(60, 9), 1) for context in (loaded, saved))
        if name in WINDOWED:
            assert kl(found, expected).mean() < 1e-2
        else:
            assert_same(model.device, (found, expected))


def test_many_rounds_change_nothing(models):
    kv = bridge.Kv(preset="mix2.4", window=0, sinks=0)
    with Context(models(), kv) as context, Context(models(), kv) as other:
        context.feed(random_tokens(700))
        first = packed = context.pack()
        for _ in range(12):
            other.unpack(packed)
            packed = other.pack()
        assert packed == first
        assert_same(context.model.device, (goes_on(other), goes_on(context)))


def test_coded_pages_stay_coded(models):
    def halve(page):
        return page.rows / 2, 1000.0

    with Context(models(), KV, codec=halve) as saved, Context(models(), KV, codec=halve) as loaded:
        saved.feed(random_tokens(700))
        loaded.unpack(saved.pack())
        assert_same_pages(saved, loaded)
        assert_same(saved.model.device, (goes_on(loaded), goes_on(saved)))


# --- what does not fit, natively ------------------------------------------------------------------------------------------------


def refused(context, packed, match, seq=None):
    """Whoever refuses a state says why, and goes on as if nothing had been."""
    before = context.pack()
    with pytest.raises(ValueError, match=match):
        context.unpack(packed, seq)
    assert context.pack() == before


@pytest.fixture(scope="module")
def packed(models):
    with Context(models(), KV) as context:
        context.feed(random_tokens(700))
        return context.pack()


def test_other_settings_are_refused(models, packed):
    for kv, match in [
        (bridge.Kv(preset="mix2.4", window=64, sinks=128), "packed in other formats"),
        (bridge.Kv(preset="balanced", window=65, sinks=128), "have a window of 64, and this context's 65"),
        (bridge.Kv(preset="balanced", window=64, sinks=0), "first tokens in F16 of 128, and this context's 0"),
    ]:
        with Context(models(), kv) as context:
            context.feed(random_tokens(300, 1))
            refused(context, packed, match)
    with Context(models(), KV, n_ctx=256) as context:
        context.feed(random_tokens(200, 1))
        refused(context, packed, "it holds 700 tokens in cache_k_l0, and this context has 256 cells there")
    with Context(models(), KV, n_ctx=2048, n_seq=2) as context:
        context.feed(random_tokens(200, 1))
        refused(context, packed, "in a context of 1 streams, and this one has 2")
        refused(context, packed, "it is of a whole context, not of one sequence", seq=0)
        refused(context, context.pack(0), "it is of one sequence, not of a whole context")
    with Context(models("llama-80x1-gqa3"), KV) as context:
        context.feed(random_tokens(200, 1))
        refused(context, packed, "rows of so many bytes: 256, and this context's 160")
    with Context(models("llama-24", OTHERS["llama-24"]), KV) as context:
        context.feed(random_tokens(200, 1))
        refused(context, packed, "stores cache_k_l0 plainly: its head size 24")
    with Context(models(), KV, codec=lambda page: (page.rows, 1.0)) as context:
        context.feed(random_tokens(200, 1))
        refused(context, packed, "packed in other formats")


def checked(data: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return data[:-8] + struct.pack("<Q", native().checksum(data[:-8]))


def test_damaged_bytes_are_refused(models, packed):
    rng = np.random.default_rng(1)
    with Context(models(), KV) as context:
        context.feed(random_tokens(300, 1))
        refused(context, b"", "truncated")
        refused(context, packed[:60], "truncated")
        for n in (100, len(packed) // 2, len(packed) - 1):
            refused(context, packed[:n], rf"it is truncated: {n} bytes of {len(packed)}")
        refused(context, packed + b"\0", "damaged")
        refused(context, b"GGUF" + packed[4:], "no packed state")
        for at in [*range(8, 64), *rng.integers(64, len(packed), 100).tolist()]:
            flipped = bytearray(packed)
            flipped[at] ^= 1 << int(rng.integers(8))
            with pytest.raises(ValueError, match="version|truncated|damaged"):
                context.unpack(bytes(flipped))
        refused(context, checked(packed[:8] + struct.pack("<I", 2) + packed[12:]), "version 2, and this program reads version 1")
        refused(context, checked(packed[:12] + struct.pack("<I", 9) + packed[16:]), "format version 9")


def test_what_a_checksum_does_not_find_is_refused_or_harmless(models, packed):
    """Bytes that were changed together with their checksum: no field may lead anywhere it should not."""
    rng = np.random.default_rng(2)
    with Context(models(), KV) as context:
        n_refused = 0
        index = packed.index(b"cache_v_l1") + 400  # header, tensors, lists and spans end about here
        for i in range(400):
            changed = bytearray(packed)
            at = 16 + int(rng.integers(index - 16)) // 4 * 4 if i % 2 else int(rng.integers(64, len(packed) - 8))
            changed[at : at + 4] = rng.integers(0, 256, 4, dtype=np.uint8).tobytes() if i % 3 else struct.pack("<i", -1)
            try:
                state = context._session.load_state(checked(bytes(changed)))
            except ValueError as e:
                n_refused += 1
                assert str(e)
            else:
                state.close()
        assert 50 < n_refused < 400
        context.unpack(packed)
        context.feed(random_tokens(10, 1))


def test_a_key_record_with_an_impossible_order_is_refused(models):
    with Context(models(), PACKED) as context:
        context.feed(random_tokens(700))
        packed = context.pack()
        order = bytes(range(64))  # mix8.2 has one tier of coded channels that lists them by rising index
        assert order in packed
        refused(context, checked(packed.replace(order, bytes(64))), "damaged")


def test_states_do_not_leak_into_what_the_thread_does_next(models, packed):
    """A state that was begun and dropped: llama.cpp's own states are F16 again."""
    with Context(models(), KV) as context:
        context.feed(random_tokens(300))
        f16 = context.save()
        state = context._session.save_state(10)
        state.close()
        with pytest.raises(RuntimeError, match="closed"):
            state.data()
        assert context.save() == f16
        state = context._session.load_state(packed)
        state.close()
        assert context.load(f16) == len(f16) and context.save() == f16


def test_no_f16_copy_is_made(models):
    """Memory that saving and loading take: about the bytes of the state, not those of the F16 rows."""
    program = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from contexts import *
model = Model(sys.argv[2], True, CPU)
kv = Kv(preset="balanced")
with Context(model, kv, n_ctx=32768) as context, Context(model, kv, n_ctx=32768) as other:
    context.feed(random_tokens(20000))
    other.feed(random_tokens(1500))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    packed = context.pack()
    saving = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    other.unpack(packed)
    both = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(saving * 1024, both * 1024, len(packed), 20000 * context.stats()["elements"] * 2 // 32768)
"""
    model = models("llama-128x2-gqa4")
    if model.device != "MIXKVQ-CPU":
        pytest.skip("not on a GPU: nothing of its memory is the process's")
    done = subprocess.run([sys.executable, "-c", program, str(Path(__file__).parent), model.path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    saving, both, size, f16 = map(int, done.stdout.split())
    assert size < 0.3 * f16
    assert saving < 1.2 * size + (4 << 20) and both < 2.4 * size + (8 << 20)


# --- files ----------------------------------------------------------------------------------------------------------------------


def load(**options):
    return bridge.Llama(str(MODEL), **{"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "device": "cpu", "verbose": False, **options})


TOKENS = random_tokens(700, 4)


@pytest.fixture(scope="module")
def state_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "a.mixkvq-state"
    llama = load()
    llama.eval(TOKENS)
    assert llama.save_file(path) == path.stat().st_size < 1.05 * llama.kv_stats()["bytes_used"]
    expected = llama.forward([5, 6, 7], 3)
    llama.close()
    return path, expected


def test_a_file_resumes_in_another_process_and_another_context(state_file):
    path, expected = state_file
    program = "import sys, bridge; l = bridge.Llama(sys.argv[1], n_ctx=2048, n_threads=1, n_threads_batch=1, device='cpu', verbose=False); \
assert l.load_file(sys.argv[2]) == 700; sys.stdout.buffer.write(l.forward([5, 6, 7], 3).tobytes())"
    done = subprocess.run([sys.executable, "-c", program, str(MODEL), str(path)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.float32).reshape(expected.shape), expected)
    llama = load()
    llama.eval(random_tokens(900, 5))
    assert llama.load_file(path) == 700 == llama.n_tokens and llama.input_ids[:700].tolist() == TOKENS
    with pytest.raises(bridge.ContextError, match="no logits yet"):
        llama.last_logits()
    np.testing.assert_array_equal(llama.forward([5, 6, 7], 3), expected)
    llama.close()


def test_a_file_holds_what_it_is_of(state_file):
    head = states.read_head(state_file[0])
    assert head.tokens.tolist() == TOKENS and head.fields["n_tokens"] == 700 and head.fields["kind"] == "context"
    assert head.fields["cache"] == {"type": "mixkvq", "preset": "mix3.2", "profile": None, "window": 128, "sinks": 128}
    assert head.fields["model"]["fingerprint"] == open_model(MODEL).fingerprint
    assert head.fields["format"] == native().FORMAT_VERSION


def unchanged(llama, action):
    """The sentence with which a state is refused; the context is as it was."""
    before, tokens = llama.save_state().llama_state, llama.n_tokens
    with pytest.raises(bridge.StateError) as raised:
        action()
    assert llama.save_state().llama_state == before and llama.n_tokens == tokens
    sentence = str(raised.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    "options, why",
    [
        ({"kv": "mix2.4"}, "from a cache 'mix3.2' with window 128 and sinks 128, and this one is 'mix2.4' with window 128 and sinks 128"),
        ({"kv": {"window": 64}}, "this one is 'mix3.2' with window 64 and sinks 128"),
        ({"n_ctx": 512}, "it holds 700 tokens, and the context 512"),
        ({"rope_freq_scale": 0.5}, "other RoPE settings: rope_freq_scale 0.0, and here 0.5"),
        ({"rope_scaling_type": 2}, "other RoPE settings: rope_scaling_type -1, and here 2"),
        ({"codec": lambda page: (page.rows, 1.0)}, "and this one is 'codec'"),
    ],
    ids=["preset", "window", "length", "scale", "type", "codec"],
)
def test_a_file_of_other_settings_is_refused(state_file, options, why):
    llama = load(**options)
    llama.eval(TOKENS[:200])
    sentence = unchanged(llama, lambda: llama.load_file(state_file[0]))
    assert sentence.startswith(f"{state_file[0]} cannot be loaded: ") and why in sentence
    llama.close()


def test_each_field_of_the_head_counts(state_file, tmp_path):
    """Every field changed to something else, with a right checksum; and flipped bytes of the head, and a file cut anywhere."""
    data = state_file[0].read_bytes()
    head = states.parse_head(data)
    llama, path = load(), tmp_path / "other"
    llama.eval(TOKENS[:200])

    def refuse(content, why):
        path.write_bytes(content)
        assert why in unchanged(llama, lambda: llama.load_file(path))

    def with_fields(change):
        fields = json.loads(json.dumps(head.fields))
        change(fields)
        body = data[head.start : head.end]
        return states._head(fields, head.tokens.tolist(), len(body)) + body

    for change, why in [
        (lambda f: f["model"].update(fingerprint="0" * 32, name="x"), "it is of another model ('x')"),
        (lambda f: f["model"].update(weights="0"), "with other weights"),
        (lambda f: f.update(model=3), "it is of another model"),
        (lambda f: f["cache"].update(profile="0123"), "from a cache of profile 0123"),
        (lambda f: f["cache"].update(preset="mix2.4"), "from a cache 'mix2.4'"),
        (lambda f: f["cache"].update(type="q8_0"), "from a cache 'q8_0'"),
        (lambda f: f["rope"].update(yarn_orig_ctx=4096), "yarn_orig_ctx 4096, and here 0"),
        (lambda f: f["rope"].update(long_factors=True), "long_factors True, and here None"),
        (lambda f: f.update(adapters=[{"file": "0", "scale": 1.0}]), "other LoRA adapters"),
        (lambda f: f.update(kind="sequence"), "it holds a sequence, not a context"),
        (lambda f: f.clear(), "it is of another model"),
    ]:
        refuse(with_fields(change), why)
    body = data[head.start : head.end]
    refuse(states._head(head.fields, [10**6] * 3, len(body)) + body, "not in the vocabulary")
    refuse(data[:8] + struct.pack("<I", 2) + data[12:], "of version 2, and this program reads version 1")
    refuse(b"", "is empty.")
    refuse(b"GGUF" + data[4:], "no packed state")
    for n in (1, 7, 20, 39, 41, 100, head.start - 1, head.start, head.start + 50, len(data) - 1):
        refuse(data[:n], "truncated" if n >= 8 else "no packed state")
    refuse(data + b"\0", "damaged")
    rng = np.random.default_rng(3)
    for at in [*range(0, 40), *rng.integers(40, head.start, 40).tolist(), *rng.integers(head.start, len(data), 20).tolist()]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        refuse(bytes(flipped), "cannot be loaded: it ")
    with pytest.raises(bridge.StateError, match="cannot be read: No such file"):
        llama.load_file(tmp_path / "nothing")
    with pytest.raises(bridge.StateError, match="cannot be read: Is a directory"):
        llama.load_file(tmp_path)
    llama.close()


def test_another_quantisation_of_the_model_is_refused(models, tmp_path):
    one, two = (tiny_models.llama(tmp_path / f"{name}.gguf", 64) for name in "ab")
    data = bytearray(two.read_bytes())
    tensor = states._header(str(two), 0).tensors["blk.1.attn_k.weight"]
    data[tensor.offset] ^= 1
    two.write_bytes(data)
    a, b = (bridge.Llama(str(path), n_ctx=512, n_threads=1, device="cpu", verbose=False) for path in (one, two))
    for llama in (a, b):
        llama.eval(random_tokens(300))
    a.save_file(tmp_path / "state")
    assert "of a model with other weights" in unchanged(b, lambda: b.load_file(tmp_path / "state"))
    assert a.load_file(tmp_path / "state") == 300
    for llama in (a, b):
        llama.close()


def test_adapters_and_their_scale_count(tmp_path):
    model = str(tiny_models.llama(tmp_path / "model.gguf", 64))
    q = states._header(model, 0).tensors["blk.0.attn_q.weight"].shape
    adapters = [tiny_models.adapter(tmp_path / f"{i}.gguf", *q, i) for i in (0, 0, 1)]

    def with_adapter(**options):
        return bridge.Llama(model, n_ctx=512, n_threads=1, device="cpu", verbose=False, **options)

    saved = with_adapter(lora_path=adapters[0], lora_scale=0.5)
    saved.eval(random_tokens(300))
    saved.save_file(tmp_path / "state")
    for options, fits in [
        ({"lora_path": adapters[1], "lora_scale": 0.5}, True),
        ({"lora_path": adapters[2], "lora_scale": 0.5}, False),
        ({"lora_path": adapters[0], "lora_scale": 1.0}, False),
        ({}, False),
    ]:
        llama = with_adapter(**options)
        llama.eval(random_tokens(100))
        if fits:
            assert llama.load_file(tmp_path / "state") == 300
            np.testing.assert_array_equal(llama.forward([5]), saved.forward([5]))
        else:
            assert "it was saved with other LoRA adapters" in unchanged(llama, lambda llama=llama: llama.load_file(tmp_path / "state"))
        llama.close()
    saved.close()


def test_long_and_short_factors_of_rope(tmp_path):
    """Models that have both, like phi3, take one of them by the length of the context."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "phi3")
    writer.add_uint32("phi3.rope.scaling.original_context_length", 4096)
    writer.add_uint32("phi3.block_count", 1)
    writer.add_tensor("rope_factors_long.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_model(path)
    assert [states._has_long_factors(file, n) for n in (512, 4096, 4352)] == [False, False, True]
    assert states._has_long_factors(open_model(MODEL), 4352) is None


def test_a_profile_is_known_by_what_it_says(tmp_path):
    from mixkvq.core.profile import uniform_profile, write_profile

    paths = [tmp_path / f"{name}.gguf" for name in "abc"]
    for path, preset in zip(paths, ("mix2.4", "mix2.4", "mix4.3")):
        write_profile(path, uniform_profile(MODEL, preset))
    llamas = [load(kv=path) for path in paths]
    llamas[0].eval(TOKENS)
    llamas[0].save_file(tmp_path / "state")
    assert llamas[1].load_file(tmp_path / "state") == 700
    assert "from a cache of profile" in unchanged(llamas[2], lambda: llamas[2].load_file(tmp_path / "state"))
    for llama in llamas:
        llama.close()


def test_a_file_appears_whole_or_not_at_all(state_file, tmp_path, monkeypatch):
    llama = load()
    llama.load_file(state_file[0])
    target = tmp_path / "state"
    target.write_bytes(b"before")
    target.chmod(0o640)
    full = Path("/dev/full")
    if full.exists():
        descriptor = os.open(full, os.O_WRONLY)
        with monkeypatch.context() as patch:
            patch.setattr(states.os, "open", lambda *_: os.dup(descriptor))
            with pytest.raises(OSError, match="No space left") as raised:
                llama.save_file(target)
        os.close(descriptor)
        assert raised.value.filename == str(target)
        assert target.read_bytes() == b"before" and os.listdir(tmp_path) == ["state"]
    llama.save_file(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600  # it holds what was said
    (tmp_path / "new").unlink()
    llama.save_file(target)
    assert target.stat().st_mode & 0o777 == 0o640 and os.listdir(tmp_path) == ["state"]
    assert llama.load_file(target) == 700
    with pytest.raises(OSError, match="No such file") as raised:
        llama.save_file(tmp_path / "no" / "state")
    assert str(tmp_path / "no" / "state") in str(raised.value)
    assert kind_of(target) == "a saved state"
    with pytest.raises(bridge.SettingsError, match="is a saved state, so it is not replaced by JSON"):
        check_target(target, force=True, what="JSON")
    llama.close()


def test_a_file_of_a_model_with_a_sliding_window(models, tmp_path):
    """Tokens have left the window: llama.cpp would use their cells first."""
    saved, loaded = (bridge.Llama(models("gemma2").path, n_ctx=1024, n_threads=1, device="cpu", verbose=False) for _ in range(2))
    saved.eval(random_tokens(500))
    saved.save_file(tmp_path / "state")
    loaded.load_file(tmp_path / "state")
    np.testing.assert_array_equal(loaded.forward(random_tokens(200, 1), 200), saved.forward(random_tokens(200, 1), 200))
    for each in (saved, loaded):
        each.close()


@pytest.mark.parametrize("stock", ["f16", "q8_0"])
def test_llama_cpps_own_caches_have_files_too(stock, tmp_path, state_file):
    llama, other = load(stock=stock), load(stock=stock, n_ctx=2048)
    llama.eval(TOKENS)
    llama.save_file(tmp_path / "state")
    assert other.load_file(tmp_path / "state") == 700
    np.testing.assert_array_equal(llama.forward([5, 6]), other.forward([5, 6]))
    with pytest.raises(bridge.StateError, match=f"and this one is '{stock}'"):
        llama.load_file(state_file[0])
    data = bytearray((tmp_path / "state").read_bytes())
    data[-5000] ^= 1
    (tmp_path / "state").write_bytes(data)
    with pytest.raises(bridge.StateError, match="its checksum is another one"):
        llama.load_file(tmp_path / "state")
    assert llama.n_tokens == 702
    for each in (llama, other):
        each.close()


def test_files_of_sequences(tmp_path):
    options = {"n_threads": 1, "n_threads_batch": 1, "device": "cpu", "verbose": False}
    one, two = Sequences(str(MODEL), n_seq=2, n_ctx=1024, **options), Sequences(str(MODEL), n_seq=2, n_ctx=2048, **options)
    one.read(0, TOKENS[:300])
    one.read(1, TOKENS[100:700])
    one.save_file(tmp_path / "state", 1)
    two.read(1, TOKENS[:500])
    assert two.load_file(tmp_path / "state", 0) == 600 and two.n_tokens == 1100
    np.testing.assert_array_equal(one.read(1, [5, 6, 7]), two.read(0, [5, 6, 7]))
    with pytest.raises(bridge.SettingsError, match="There is no sequence 2"):
        two.save_file(tmp_path / "state", 2)
    llama = load()
    with pytest.raises(bridge.StateError, match="it holds a sequence, not a context"):
        llama.load_file(tmp_path / "state")
    for each in (one, two, llama):
        each.close()


def test_states_in_memory_are_small_and_f16_ones_stay():
    llama, other = load(), load(n_ctx=2048)
    llama.eval(TOKENS)
    packed, f16 = llama.save_state(), llama.save_state(packed=False)
    assert len(packed.llama_state) == packed.llama_state_size < 0.6 * f16.llama_state_size
    assert packed.scores.size == 0 and packed.input_ids.tolist() == TOKENS
    other.load_state(packed)
    assert other.n_tokens == 700
    expected = llama.forward([5, 6, 7], 3)
    np.testing.assert_array_equal(other.forward([5, 6, 7], 3), expected)
    llama.load_state(f16)
    assert llama.n_tokens == 700 and kl(llama.forward([5, 6, 7], 3), expected).mean() < 1e-3
    packed.llama_state = packed.llama_state[:-100]
    assert unchanged(llama, lambda: llama.load_state(packed)).startswith("The state cannot be loaded: it is truncated")
    for each in (llama, other):
        each.close()


def test_logits_of_all_tokens_come_along():
    llama = load(logits_all=True)
    llama.eval(TOKENS[:300])
    scores, state = llama.scores[:300].copy(), llama.save_state()
    llama.reset()
    llama.eval(TOKENS[300:500])
    llama.load_state(state)
    np.testing.assert_array_equal(llama.scores[:300], scores)
    llama.close()


# --- caches ---------------------------------------------------------------------------------------------------------------------

STORY = "Once upon a time there was a little dog who lived in a house by the sea, and every morning " * 8
ANSWER = {"max_tokens": 6, "temperature": 0.0}


def answer(llama, prompt):
    """The text, and how many tokens were read for it (0 or 1 is none)."""
    read = [0]
    llama.on_read = lambda done, total: read.append(total)
    text = llama.create_completion(prompt, **ANSWER)["choices"][0]["text"]
    return text, max(read)


@pytest.fixture(params=["ram", "disk"])
def cache(request, tmp_path):
    return bridge.RamCache() if request.param == "ram" else bridge.DiskCache(tmp_path / "cache")


def test_a_cache_resumes_a_prompt_without_loss(cache):
    llama = load(kv="mix2.4")
    llama.set_cache(cache)
    first, read = answer(llama, STORY)
    assert read > 150
    assert answer(llama, "def main():")[1] > 0
    for _ in range(3):
        assert answer(llama, STORY) == (first, 0)
        answer(llama, "def main():")
    more, read = answer(llama, STORY + " he went for a walk.")
    assert 0 < read < 12  # goes on from the entry
    plain = load(kv="mix2.4")
    assert answer(plain, STORY)[0] == first
    assert 0 < cache.cache_size < 3 * 1.05 * plain.kv_stats()["bytes_used"]
    for each in (llama, plain):
        each.close()


def test_entries_belong_to_a_model_and_its_settings(cache):
    one, two = load(), load(kv="mix2.4")
    for llama in (one, two):
        llama.set_cache(cache)
    answer(one, STORY)
    assert answer(two, STORY)[1] > 150
    one.reset()
    assert answer(one, STORY)[1] == 0
    stock = load(stock="f16")
    stock.set_cache(cache)
    with pytest.raises(bridge.SettingsError, match="holds packed states"):
        answer(stock, "x")
    for llama in (one, two, stock):
        llama.close()


def test_the_least_recently_used_entries_go(cache):
    llama = load()
    llama.set_cache(cache)
    prompts = [f"{i} " + STORY for i in range(4)]
    answer(llama, prompts[0])
    cache.capacity_bytes = llama.cache.capacity_bytes = int(3.5 * cache.cache_size)
    for prompt in prompts[1:3]:
        answer(llama, prompt)
    assert llama.cache[llama.tokenize(prompts[0].encode())].n_tokens > 150  # used again
    answer(llama, prompts[3])
    assert cache.cache_size <= cache.capacity_bytes
    llama.reset()
    assert [answer(llama, prompt)[1] for prompt in (prompts[3], prompts[0], prompts[2])] == [0, 0, 0]
    assert answer(llama, prompts[1])[1] > 150
    llama.reset()
    cache.capacity_bytes = llama.cache.capacity_bytes = 10
    assert answer(llama, "something else")[0] and cache.cache_size > 10  # an entry that never fits throws nothing out
    llama.close()


def test_an_entry_that_is_continued_is_dropped(cache):
    llama = load()
    llama.set_cache(cache)
    answer(llama, STORY)
    size, (tokens,) = cache.cache_size, llama.cache._keys()
    answer(llama, [*tokens, *llama.tokenize(b" and then the sun came out", add_bos=False)])
    assert cache.cache_size < 1.5 * size and len(list(llama.cache._keys())) == 1
    llama.reset()
    assert answer(llama, STORY)[1] == 0
    llama.close()


def test_files_of_a_disk_cache_serve_the_next_program_and_damage_costs_a_read(tmp_path):
    folder = tmp_path / "cache"
    llama = load()
    llama.set_cache(bridge.DiskCache(folder))
    first = answer(llama, STORY)[0]
    llama.close()
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    again = load()
    assert again.load_file(path) > 150
    again.reset()
    again.set_cache(bridge.DiskCache(folder))
    assert answer(again, STORY) == (first, 0)
    again.reset()
    (path,) = folder.iterdir()
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    assert answer(again, STORY)[1] > 150  # deleted, read and kept anew
    again.reset()
    assert answer(again, STORY) == (first, 0)
    again.close()
    (path,) = folder.iterdir()
    path.rename(path.with_name(path.name[:-20] + "00000" + path.name[-15:]))  # not the name of what it holds
    renamed = load()
    renamed.set_cache(bridge.DiskCache(folder))
    assert answer(renamed, STORY)[0] == first
    renamed.close()
    (folder / "junk.mixkvq-state").write_bytes(b"junk")
    assert bridge.DiskCache(folder).cache_size > 4
    with pytest.raises(bridge.SettingsError, match="cannot be a cache"):
        bridge.DiskCache(path)


def test_a_hybrid_goes_on_from_whole_entries_only(models, cache):
    """Its recurrent states have no past: an entry cannot be cut."""
    llama = bridge.Llama(models("lfm2").path, n_ctx=512, n_threads=1, device="cpu", verbose=False)
    llama.set_cache(cache)
    prompt = random_tokens(100)
    answer(llama, prompt)
    (whole,) = llama.cache._keys()
    llama.reset()
    assert answer(llama, [*whole, 5, 6])[1] == 2
    assert [*whole, 5] in llama.cache and [*prompt, 5, 6, 7] not in llama.cache
    llama.reset()
    assert answer(llama, [*prompt, 5, 6, 7])[1] == 103
    assert len(list(llama.cache._keys())) == 3
    llama.close()
