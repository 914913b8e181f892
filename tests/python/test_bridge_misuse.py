"""What a program can do wrong with bridge.Llama, and how programs end: an exception or a sentence, never a crash, and no noise."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import tiny_models
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from rich.console import Console

import bridge
from bridge import Llama
from mixkvq.cli.answer import LARGEST_SEED, Sampling, stream_answer
from mixkvq.core.model_file import built_in_model

MODEL = str(built_in_model())
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
PROBLEM = [{"role": "user", "content": "Compute 48291 * 73."}]
START = f"""
import io, os, signal, sys, threading, time
import bridge
from bridge import Llama
MODEL, ONE_THREAD = {MODEL!r}, {ONE_THREAD!r}
"""


def load(**arguments):
    return Llama(MODEL, **{"n_ctx": 512, **ONE_THREAD, **arguments})


def program(code, **options):
    """A Python program of its own: (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, "-c", START + code], capture_output=True, text=True, timeout=600, **options)
    return done.returncode, done.stdout, done.stderr


def is_sentence(error):
    return str(error).endswith(".") and "\n" not in str(error)


# --- numbers out of bounds ---


@pytest.mark.parametrize(
    ("tokens", "n_logits", "words"),
    [
        ([1, 2], 5, ["n_logits is 5", "2 tokens", "0 to 2"]),
        ([1, 2], -1, ["n_logits is -1"]),
        ([1, 2], 1.5, ["1.5"]),
        ([], 1, ["n_logits is 1", "0 tokens"]),
        ([7] * 65, 1, ["65 tokens", "n_batch is 64"]),
        ([1, 8192], 1, ["Token 8192", "0 to 8191"]),
        ([1, -3], 1, ["Token -3"]),
        ([1, 2**40], 1, [str(2**40)]),
        ([1, 2.0], 1, ["2.0"]),
    ],
)
def test_forward_names_the_numbers_that_do_not_fit(tokens, n_logits, words):
    llama = load(n_batch=64, n_ubatch=64)
    with pytest.raises(bridge.SettingsError) as e:
        llama.forward(tokens, n_logits)
    assert is_sentence(e.value) and all(word in str(e.value) for word in words), str(e.value)
    assert llama.n_tokens == 0 and llama.forward([], 0).shape == (0, 8192)
    expected = llama.forward([1, 2, 3], 2)
    llama.clear()
    np.testing.assert_array_equal(llama.forward(np.array([1, 2, 3], np.int32), np.int64(2)), expected)
    llama.close()


def test_eval_names_the_numbers_that_do_not_fit():
    llama = load(n_ctx=256, n_batch=64)
    for tokens in ([8192], [5, -1], [5, "a"], [5, 2.5, 7]):
        with pytest.raises(bridge.SettingsError, match="0 to 8191"):
            llama.eval(tokens)
    llama.eval([5] * 200)
    for evaluate in (llama.eval, lambda tokens: llama.forward(tokens, 1)):
        with pytest.raises(bridge.ContextError, match="57 tokens do not fit behind the 200 in a context of 256"):
            evaluate([5] * 57)
    assert llama.n_tokens == 200
    llama.eval([5] * 56)
    llama.close()


def test_logits_that_do_not_exist_are_an_error_and_the_others_outlive_the_context():
    llama = load()
    for ask in (llama.last_logits, llama.sample, lambda: llama.sample(idx=3)):
        with pytest.raises(bridge.ContextError, match="evaluate a token first"):
            ask()
    rows = llama.forward([5, 6, 7], 2)
    last, kept = llama.last_logits(), rows.copy()
    np.testing.assert_array_equal(last, rows[1])
    with pytest.raises(bridge.ContextError, match="evaluate a token first"):
        llama.sample(idx=99)
    state = llama.save_state()
    llama.clear()
    with pytest.raises(bridge.ContextError):
        llama.last_logits()
    other = load()
    other.load_state(state)
    with pytest.raises(bridge.ContextError, match="evaluate a token first"):  # a state holds no logits
        other.sample()
    llama.forward([9, 9, 9], 1)
    llama.close()
    np.testing.assert_array_equal(rows, kept)  # no view of what was overwritten and freed
    other.close()


# --- after close() ---

AFTER_CLOSE = {
    "eval": lambda m: m.eval([1]),
    "eval of nothing": lambda m: m.eval([]),
    "forward": lambda m: m.forward([1], 1),
    "last_logits": lambda m: m.last_logits(),
    "clear": lambda m: m.clear(),
    "ends": lambda m: m.ends(1),
    "chat_tokens": lambda m: m.chat_tokens(PROBLEM),
    "kv_stats": lambda m: m.kv_stats(),
    "kv_report": lambda m: m.kv_report(),
    "query_statistics": lambda m: m.query_statistics(),
    "tokenize": lambda m: m.tokenize(b"abc"),
    "detokenize": lambda m: m.detokenize([5]),
    "tokenizer": lambda m: m.tokenizer().encode("abc"),
    "reset": lambda m: m.reset(),
    "sample": lambda m: m.sample(),
    "generate": lambda m: next(m.generate([1, 2])),
    "create_completion": lambda m: m.create_completion("a"),
    "a stream": lambda m: next(m.create_completion("a", stream=True)),
    "call": lambda m: m("a"),
    "create_chat_completion": lambda m: m.create_chat_completion(PROBLEM),
    "a chat's stream": lambda m: next(m.create_chat_completion(PROBLEM, stream=True)),
    "embed": lambda m: m.embed("a"),
    "create_embedding": lambda m: m.create_embedding("a"),
    "save_state": lambda m: m.save_state(),
    "n_ctx": lambda m: m.n_ctx(),
    "n_embd": lambda m: m.n_embd(),
    "n_vocab": lambda m: m.n_vocab(),
    "token_eos": lambda m: m.token_eos(),
    "token_bos": lambda m: m.token_bos(),
    "token_nl": lambda m: m.token_nl(),
    "pooling_type": lambda m: m.pooling_type(),
    "ctx": lambda m: m.ctx,
    "model": lambda m: m.model,
}


@pytest.mark.parametrize("stock", [None, "f16"])
def test_a_closed_model_raises_from_every_method(stock):
    llama = load(stock=stock)
    llama.eval([5, 6, 7])
    state, stream, tokenizer = llama.save_state(), llama.create_completion("Once", max_tokens=20, stream=True), llama.tokenizer()
    native = [llama._ctx, llama._model, llama._batch]
    next(stream)
    assert tokenizer.decode(tokenizer.encode("abc", add_bos=False)) == "abc"
    llama.close()
    llama.close()
    late = {**AFTER_CLOSE, "load_state": lambda m: m.load_state(state), "the stream": lambda m: next(stream)}
    late["its tokenizer"] = lambda m: tokenizer.encode("a")
    for name, use in late.items():
        with pytest.raises(bridge.ContextError) as e:
            use(llama)
        assert str(e.value) == "The model is closed.", name
    for use in (lambda: native[0].n_ctx(), lambda: native[1].token_eos(), lambda: native[1].desc(), lambda: native[0].kv_cache_clear()):
        with pytest.raises(Exception, match="The model is closed"):
            use()
    copy = pickle.loads(pickle.dumps(llama))  # the settings are still there
    copy.eval([5])
    copy.close()


def test_a_model_that_was_never_loaded_is_closed():
    llama = Llama.__new__(Llama)
    with pytest.raises(bridge.SettingsError):
        llama.__init__(MODEL, kv="nope", **ONE_THREAD)
    llama.close()
    for use in (llama.kv_stats, lambda: llama.eval([1]), lambda: llama.tokenize(b"a")):
        with pytest.raises(bridge.ContextError, match="closed"):
            use()


def test_close_waits_for_the_evaluation_of_another_thread():
    llama = load(n_ctx=2048, n_batch=32, n_ubatch=32)
    started, closing, failures = threading.Event(), threading.Event(), []

    def before_a_batch(done, total):
        started.set()
        closing.wait()

    llama.on_read = before_a_batch

    def read():
        try:
            llama.eval([5, 6] * 1000)
        except bridge.ContextError as e:
            failures.append(str(e))

    thread = threading.Thread(target=read)
    thread.start()
    started.wait()
    closing.set()
    llama.close()
    thread.join()
    assert failures == ["The model is closed."]


# --- how programs end ---


@pytest.mark.parametrize(
    "code",
    [
        "m = Llama(MODEL, n_ctx=512, **ONE_THREAD); m.create_completion('a', max_tokens=3)",
        "m = Llama(MODEL, n_ctx=512, **ONE_THREAD); g = m.create_completion('a', max_tokens=30, stream=True); next(g)",
        """
class A: pass
a = A(); a.a = a; a.m = Llama(MODEL, n_ctx=512, **ONE_THREAD); a.m.eval([1, 2, 3])
""",
        """
for wrong in ({"kv": "nope"}, {"n_ctx": (1 << 31) - 512}, {"nonesuch": 3}):
    try:
        Llama(MODEL, **wrong, **ONE_THREAD)
    except (bridge.BridgeError, TypeError):
        pass
""",
        """
m = Llama(MODEL, n_ctx=4096, **ONE_THREAD)
started = threading.Event()
m.on_read = lambda done, total: started.set()
threading.Thread(target=lambda: m.eval([5, 6] * 2000), daemon=True).start()
started.wait()
""",
        "m = Llama(MODEL, n_ctx=512, codec=lambda page: (page.rows, 5.0), **ONE_THREAD); m.eval(list(range(10, 400)))",
    ],
    ids=["no close", "a stream left half-way", "a cycle", "failed loads", "a thread still computes", "a codec"],
)
def test_programs_end_quietly(code):
    assert program(code) == (0, "", "")


# --- streams that are missing ---


@pytest.mark.parametrize(
    "before",
    [
        "sys.stdout = sys.stderr = None",
        "sys.stdout, sys.stderr = io.StringIO(), io.StringIO()",
        "sys.stderr.close()",
        "sys.stdin.close(); sys.stdout.close(); sys.stderr.close()",
        "r, w = os.pipe(); os.close(r); os.dup2(w, 2)",
        "r, w = os.pipe(); os.close(r); os.dup2(w, 2); sys.stderr = os.fdopen(2, 'w', buffering=1)",
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
    ],
    ids=["None", "StringIO", "closed stderr", "all closed", "broken pipe", "broken pipe of its own", "full"],
)
def test_a_program_without_streams_computes(before, tmp_path):
    model = tiny_models.gemma4(tmp_path / "m.gguf")  # some layers are stored plainly, which is said on stderr
    code = f"""
{before}
m = Llama({str(model)!r}, n_ctx=512, **ONE_THREAD)
m.eval(list(range(3, 200)))
open({str(tmp_path / "result")!r}, "w").write(str(m.kv_stats()["n_layers"]))
m.close()
"""
    returned, out, _ = program(code)
    assert (tmp_path / "result").read_text() == "4" and returned == 0 and out == ""


def test_nothing_lands_in_a_file_that_has_got_the_number_of_a_closed_stderr(tmp_path):
    code = f"""
sys.stderr.close()
f = open({str(tmp_path / "mine")!r}, "w+")
assert f.fileno() == 2
"""
    model = tiny_models.gemma4(tmp_path / "m.gguf")
    program(code + f"m = Llama({str(model)!r}, n_ctx=512, **ONE_THREAD); m.eval([5, 6, 7]); m.close(); f.write('mine')")
    assert "mixkvq" not in (tmp_path / "mine").read_text()


# --- loading ---


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Stop, SystemExit])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_on_load_raises_stops_the_load(kind, share):
    raised, calls = kind("enough"), []

    def on_load(done):
        calls.append(done)
        if done >= share:
            raise raised

    with pytest.raises(kind) as e:
        load(on_load=on_load)
    assert e.value is raised and sum(done >= share for done in calls) == 1
    llama = load(n_ctx=256)  # nothing is left behind
    llama.eval([5])
    llama.close()


@pytest.mark.parametrize("on_load", [True, False])
def test_ctrl_c_stops_a_load(on_load):
    before = signal.getsignal(signal.SIGINT)
    at = []

    def interrupt(done):
        at.append(done)
        if len(at) == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        if on_load:
            load(on_load=interrupt)
        else:
            with_signal_at_the_first_callback()
    assert signal.getsignal(signal.SIGINT) is before and len(at) <= 3


@pytest.mark.parametrize("stock", [None, "f16"])
def test_ctrl_c_stops_the_look_at_devices_and_memory(stock, monkeypatch):
    """There the only Python that runs is the function for llama.cpp's log, and ctypes drops what is raised in it."""
    place, loads = Llama._place, []

    def interrupted(*arguments):
        ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))()
        place(*arguments)

    monkeypatch.setattr(Llama, "_place", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        load(on_load=loads.append, **({} if stock is None else {"stock": stock}))
    assert signal.getsignal(signal.SIGINT) is before and not loads


def with_signal_at_the_first_callback():
    """As Ctrl-C does that arrives while llama.cpp loads: Python sees the signal when the next callback begins."""
    from bridge import llama, loading

    class Loading(loading.Loading):
        def __call__(self, share, _):
            if share > 0:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(share, _)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, "Loading", Loading)
        load()


def test_a_handler_that_does_not_raise_does_not_stop_a_load():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *arguments: seen.append(arguments))
    try:
        load(on_load=lambda done: signal.raise_signal(signal.SIGINT) if done == 1.0 else None).close()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 1 and seen[0][0] == signal.SIGINT


# --- keywords ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"windw": 5}, ["Llama", "'windw'", "'window'", "kv={'window': ...}"]),
        ({"preset": "tiny"}, ["'preset'", "kv={'preset': ...}"]),
        ({"n_cxt": 512}, ["'n_cxt'", "'n_ctx'"]),
        ({"onload": print}, ["'onload'", "'on_load'"]),
        ({"qqqq": 1}, ["no argument 'qqqq'."]),
    ],
)
def test_unknown_keywords_are_refused(arguments, words):
    with pytest.raises(TypeError) as e:
        load(**arguments)
    assert is_sentence(e.value) and all(word in str(e.value) for word in words), str(e.value)


def test_unknown_keywords_of_attach_and_fields_of_kv_are_refused():
    with pytest.raises(TypeError, match="attach has no argument 'modle'; the nearest is 'model'"):
        bridge.attach(modle=MODEL)
    bridge.attach(model=MODEL).detach()
    with pytest.raises(bridge.SettingsError, match="no field 'windw'; the nearest is 'window'"):
        load(kv={"windw": 5})
    known = {"n_gpu_layers": 0, "seed": 1, "swa_full": True, "tensor_split": None, "draft_model": None, "tokenizer": None, "rope_freq_base": 0.0}
    load(**known).close()


# --- models that are not decoders ---


@pytest.mark.parametrize("make", [tiny_models.t5, tiny_models.bert, tiny_models.t5_encoder])
@pytest.mark.parametrize("arguments", [{}, {"stock": "f16"}, {"embedding": True}])
def test_encoders_are_refused_before_anything_is_evaluated(make, arguments, tmp_path):
    path = str(make(tmp_path / "m.gguf"))
    with pytest.raises(bridge.GeometryError) as e:
        Llama(path, **arguments, **ONE_THREAD).eval([5, 6, 7])
    assert is_sentence(e.value) and make.__name__.split("_")[0] in str(e.value)
    assert ("embedding=True" in str(e.value)) == (make is not tiny_models.t5)


@pytest.mark.parametrize("make", [tiny_models.bert, tiny_models.t5_encoder])
def test_the_advice_for_embedding_models_works(make, tmp_path):
    path = str(make(tmp_path / "m.gguf"))
    ours = Llama(path, stock="f16", embedding=True, device="cpu", **ONE_THREAD)
    stock = llama_cpp.Llama(path, embedding=True, flash_attn=True, **ONE_THREAD)
    np.testing.assert_allclose(ours.embed("abc"), stock.embed("abc"), atol=1e-5)
    if make is tiny_models.bert:
        for use in (lambda: ours.eval([5]), lambda: ours.forward([5], 1)):
            with pytest.raises(bridge.ContextError, match="embeddings only"):
                use()
    ours.close()
    stock.close()


def test_only_the_vocabulary():
    llama = load(vocab_only=True)
    assert llama.detokenize(llama.tokenize(b"abc", add_bos=False)) == b"abc"
    with pytest.raises(bridge.ContextError, match="vocabulary"):
        llama.eval([5])
    llama.close()


# --- drafts ---


def test_a_draft_changes_neither_the_text_nor_the_figures():
    found = []
    for draft in (None, LlamaPromptLookupDecoding(num_pred_tokens=6)):
        llama = load(n_ctx=768, n_batch=64, n_ubatch=64, kv="near-lossless", draft_model=draft)  # far fewer rows of logits than cells
        calls = []
        llama.on_read = lambda done, total, calls=calls: calls.append((done, total))
        text = llama.create_chat_completion(PROBLEM, temperature=0.0, max_tokens=-1)["choices"][0]["message"]["content"]
        figures = (text, calls, llama.generated)
        llama.on_read = None
        llama.clear()
        answer = stream_answer(llama, PROBLEM, Sampling(max_tokens=60), lambda piece: None, Console(quiet=True))
        found.append((figures, answer.text, answer.prompt_tokens, answer.cached_tokens, answer.read_tokens, answer.answer_tokens))
        llama.close()
    assert found[0] == found[1]
    (text, calls, generated), piece, *counts = found[0]
    assert "#### 3525243" in text and text.startswith(piece) and calls == [(0, 23), (23, 23)] and generated > 300 and counts == [23, 0, 23, 60]


def test_drafts_up_to_the_end_of_the_context():
    llama = load(n_ctx=256, n_batch=64, n_ubatch=64, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=10))
    usage = llama.create_completion("one two three one two three " * 8, max_tokens=-1, temperature=0.0, stop=[])["usage"]
    assert usage["total_tokens"] <= 256
    usage = llama.create_completion([5, 6, 7] * 70, max_tokens=-1, temperature=0.0)["usage"]
    assert usage["prompt_tokens"] == 210
    llama.close()


def test_progress_of_reading_between_answers():
    """A direct eval while a stream stands still is no answer."""
    llama = load(n_batch=64, n_ubatch=64)
    calls = []
    llama.on_read = lambda done, total: calls.append((done, total))
    stream = llama.generate([5, 6, 7], temp=0.0)
    next(stream)
    llama.eval([8] * 70)
    assert calls == [(0, 3), (3, 3), (0, 70), (64, 70), (70, 70)]
    llama.close()


# --- answers ---


def test_an_answer_says_which_seed_it_used_and_that_seed_gives_it_again():
    llama = load()
    texts = []
    for seed in (LARGEST_SEED, LARGEST_SEED, 0, 0, 1):
        llama.clear()
        answer = stream_answer(llama, "Once", Sampling(temperature=1.5, max_tokens=12, seed=seed), lambda piece: None, Console(quiet=True))
        assert answer.seed == answer.speeds()["seed"] == seed
        texts.append(answer.text)
    assert texts[0] == texts[1] and texts[2] == texts[3] and len(set(texts)) == 3
    llama.close()


def test_no_tokens_wanted_means_that_the_prompt_is_read():
    llama = load()
    written = []
    answer = stream_answer(llama, PROBLEM, Sampling(max_tokens=0), written.append, Console(quiet=True))
    assert not written and answer.text == "" and answer.answer_tokens == 0 and answer.read_tokens == answer.prompt_tokens == llama.n_tokens == 23
    again = stream_answer(llama, PROBLEM, Sampling(max_tokens=2), written.append, Console(quiet=True))
    assert again.cached_tokens == 23 and again.read_tokens == 0 and again.answer_tokens == 2
    llama.close()


def test_an_interrupted_prompt_says_what_was_read():
    llama = load(n_ctx=1024, n_batch=64, n_ubatch=64)
    before = signal.getsignal(signal.SIGINT)
    evaluate, batches = llama._ctx.decode, []

    def decode(batch):
        batches.append(batch.n_tokens())
        if len(batches) == 3:
            signal.raise_signal(signal.SIGINT)
        return evaluate(batch)

    llama._ctx.decode = decode
    answer = stream_answer(llama, "word " * 300, Sampling(), lambda piece: None, Console(quiet=True))
    assert answer.finish_reason == "interrupted" and answer.read_tokens == 192 == llama.n_tokens and answer.cached_tokens == 0
    assert answer.prompt_tokens > 300 and answer.answer_tokens == 0 and signal.getsignal(signal.SIGINT) is before
    llama.close()


def test_text_that_is_not_unicode_is_named():
    llama = load()
    half = "\ud83d"
    with pytest.raises(bridge.SettingsError, match="The text of message 2 is not Unicode text: character 3"):
        llama.chat_tokens([*PROBLEM, {"role": "user", "content": "ab" + half}])
    for prompt in (half, [{"role": "user", "content": half}]):
        with pytest.raises(bridge.SettingsError, match="not Unicode text"):
            stream_answer(llama, prompt, Sampling(max_tokens=2), lambda piece: None, Console(quiet=True))
    llama.close()
    with pytest.raises(bridge.ContextError, match="The model is closed"):
        llama.chat_tokens(PROBLEM)


def test_a_file_name_that_is_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.gguf"
    with contextlib.suppress(OSError):
        os.link(MODEL, path) if os.stat(MODEL).st_dev == os.stat(tmp_path).st_dev else Path(os.fsdecode(path)).write_bytes(Path(MODEL).read_bytes())
    if not os.path.exists(path):
        pytest.skip("this file system has no such names")
    with pytest.raises(bridge.ModelFileError, match="not UTF-8") as e:
        Llama(os.fsdecode(path))
    assert is_sentence(e.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://example.org/m.gguf", "download it first"),
        ("Organisation/Model-7B-GGUF", "hf download Organisation/Model-7B-GGUF"),
        ("organisation/model:Q4_K_M", "hf download organisation/model "),
        ("missing.gguf", "missing.gguf does not exist."),
        ("folder/missing.gguf", "folder/missing.gguf does not exist."),
        ("/tmp/missing", "/tmp/missing does not exist."),
        ("./missing", "./missing does not exist."),
    ],
)
def test_names_that_are_not_of_files_here(name, words):
    with pytest.raises(bridge.ModelFileError) as e:
        Llama(name)
    assert words in str(e.value) and "does not exist" in str(e.value)
