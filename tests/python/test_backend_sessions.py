"""Sessions of the backend and the borders of its C interface: what one asks or fails at is not another's, and nothing but a sentence leaves."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from contexts import BALANCED, Context, Model, random_tokens
from test_abi import COMPILER

from bridge import backend as adapter
from mixkvq.core.profile import LayerProfile, Profile, write_profile

P = ctypes.c_void_p
f = adapter.function
NATIVE = adapter.backend().native


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", P), ("no_alloc", ctypes.c_bool)]


class Cache:
    """Tensors as llama.cpp makes them, without a model: one layer's keys and values of 1024 cells."""

    def __init__(self, row: int = 256) -> None:
        name = f("ggml_set_name", P, P, ctypes.c_char_p)
        self.type = f("ggml_backend_dev_buffer_type", P, P)(adapter.backend().cpu)
        self.context = f("ggml_init", P, InitParams)(InitParams(1 << 20, None, True))
        self.tensors = [f("ggml_new_tensor_3d", P, P, ctypes.c_int, *[ctypes.c_int64] * 3)(self.context, 1, row, 1024, 1) for _ in range(2)]
        for tensor, letter in zip(self.tensors, "kv"):
            name(tensor, f"cache_{letter}_l0".encode())

    def sizes(self) -> list[int]:
        return [f("ggml_backend_buft_get_alloc_size", ctypes.c_size_t, P, P)(self.type, t) for t in self.tensors]

    def allocate(self) -> bool:
        """Whether there is a buffer; it is freed at once."""
        buffer = f("ggml_backend_alloc_ctx_tensors_from_buft", P, P, P)(self.context, self.type)
        if buffer:
            f("ggml_backend_buffer_free", None, P)(buffer)
        return bool(buffer)


@pytest.fixture
def misfit(tmp_path) -> str:
    """A profile of three heads; the cells above do not divide into three."""
    tiers, values = np.array([[0, 0, 32, 64, 32, 128]] * 3, np.int32), np.array([[3, 0]] * 3, np.int32)
    write_profile(tmp_path / "p.gguf", Profile("0" * 32, [LayerProfile(tiers, values)], 128, 128))
    return str(tmp_path / "p.gguf")


# --- errors ---


def test_a_question_is_no_failure(misfit):
    """llama.cpp asks for sizes without allocating, when it finds out what fits."""
    asks = NATIVE.begin(profile=misfit)
    assert all(Cache().sizes()) and asks.error() == ""
    asks.end()
    for preset in ("balanced", "mix8.2"):
        session = NATIVE.begin(preset=preset)
        assert Cache().allocate() and session.error() == ""
        session.end()


def test_a_failure_is_that_of_its_session_until_the_next_cache(misfit):
    session = NATIVE.begin(profile=misfit)
    assert not Cache().allocate()
    assert f"the profile {misfit} is for another model: it has 3 heads in layer 0" in session.error()
    other = NATIVE.begin()
    assert Cache().allocate() and other.error() == "" and session.error() != ""
    other.end()
    assert Cache(row=3 * 128).allocate() and session.error() == ""  # it fits this one
    session.end()


def test_sizes_are_said_in_units_that_fit():
    """A buffer of 4 EiB, which no machine has, and one that is small are both numbers that one can read."""
    session = NATIVE.begin()
    allocate = f("ggml_backend_buft_alloc_buffer", P, P, ctypes.c_size_t)
    assert not allocate(Cache().type, 1 << 62)
    assert "needs 4194304.0 TiB and this process can have " in session.error() and " 0.0 " not in session.error()
    session.end()


# --- the C interface ---


class Settings(ctypes.Structure):
    _fields_ = [
        ("preset", ctypes.c_char_p), ("profile", ctypes.c_char_p), ("window", ctypes.c_int), ("sinks", ctypes.c_int), ("n_layers", ctypes.c_int),
        ("head_size_k", P), ("head_size_v", P), ("codec", P), ("codec_user", P), ("all_threads", ctypes.c_int),
    ]  # fmt: skip


class Api(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_int), ("begin", ctypes.CFUNCTYPE(P, P)), ("end", ctypes.CFUNCTYPE(None, P)), ("release", ctypes.CFUNCTYPE(None, P)),
        ("stats", ctypes.CFUNCTYPE(ctypes.c_int, P, P)), ("n_layers", ctypes.CFUNCTYPE(ctypes.c_int, P)),
        ("layer_stats", ctypes.CFUNCTYPE(ctypes.c_int, P, ctypes.c_int, P)), ("error", ctypes.CFUNCTYPE(ctypes.c_char_p, P)),
        ("query_statistics", ctypes.CFUNCTYPE(ctypes.c_int, P, ctypes.c_int, P, P)),
        ("why_unused", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_char_p)),
    ]  # fmt: skip


def api() -> Api:
    registry = f("ggml_backend_reg_by_name", P, ctypes.c_char_p)(b"MIXKVQ")
    return Api.from_address(f("ggml_backend_reg_get_proc_address", P, P, ctypes.c_char_p)(registry, b"mixkvq_backend_api"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    tiny = Model(tiny_models.llama(tmp_path_factory.mktemp("sessions") / "tiny.gguf"), True)
    yield tiny
    tiny.close()


@pytest.mark.parametrize("index", [-1, -(2**31), 4, 2**31 - 1])
def test_an_index_that_is_none_is_an_error(model, index):
    a, out, numbers = api(), ctypes.create_string_buffer(1024), ctypes.create_string_buffer(4096)
    with Context(model, BALANCED) as context:
        context.feed(random_tokens(5))
        sentence = f"there is no cache tensor {index}, the session has 4"
        with pytest.raises(IndexError, match=sentence):
            context._session.query_statistics(index)
        handle = a.begin(None)
        assert a.layer_stats(handle, index, out) == -1 and a.query_statistics(handle, index, numbers, numbers) == -1
        assert a.error(None).decode() == f"there is no cache tensor {index}, the session has 0" and a.error(handle) == b""
        a.release(handle)


def test_no_session_is_an_error():
    a, out = api(), ctypes.create_string_buffer(1024)
    assert a.stats(None, out) == a.layer_stats(None, 0, out) == a.query_statistics(None, 0, out, out) == -1 and a.n_layers(None) == 0
    assert a.error(None) == b"there is no session: the handle is NULL"
    a.end(None)
    a.release(None)
    assert a.why_unused(None) == a.why_unused(b"CPU") == b""


THROWS = '#include <stdexcept>\nextern "C" int codec(void *, const void *, float *, double *) { throw std::runtime_error("a codec of C++"); }\n'


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
def test_an_exception_ends_the_decode_and_not_the_process(model, tmp_path):
    (tmp_path / "codec.cpp").write_text(THROWS)
    subprocess.run([*COMPILER, "-shared", "-fPIC", "-o", str(tmp_path / "codec.so"), str(tmp_path / "codec.cpp")], check=True)
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import ctypes, json
from test_backend_sessions import P, Settings, api
from contexts import C, Model, random_tokens
model = Model(sys.argv[1], True)
a = api()
settings = Settings(None, None, 0, 0, 0, None, None, ctypes.cast(ctypes.CDLL(sys.argv[2]).codec, P), None, 0)
session = a.begin(ctypes.byref(settings))
params = C.llama_context_default_params()
params.n_ctx, params.flash_attn_type, params.n_threads = 1024, 1, 1
context = C.llama_init_from_model(model.ptr, params)
tokens = (C.llama_token * 400)(*random_tokens(400))
results = [C.llama_decode(context, C.llama_batch_get_one(tokens, 400)) for _ in range(2)]
C.llama_free(context)
print(json.dumps(results))
"""
    command = [sys.executable, "-c", code, model.path, str(tmp_path / "codec.so")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(result < 0 for result in json.loads(done.stdout.splitlines()[-1]))
    said = [line for line in done.stderr.splitlines() if line.startswith("mixkvq:")]
    assert said == ["mixkvq: the cache failed: a codec of C++; reset the context"]


# --- threads ---


def sizes_in(pool: ThreadPoolExecutor) -> list[int]:
    return pool.submit(lambda: Cache().sizes()).result()


def test_a_session_of_all_threads():
    """What a thread began itself comes first, then the latest session of all threads, then the environment's."""
    with ThreadPoolExecutor(1) as worker:
        default, here = sizes_in(worker), Cache().sizes()
        assert default == here
        own = NATIVE.begin(preset="mix8.2")
        assert sizes_in(worker) == default and Cache().sizes() > default
        shared = NATIVE.begin(preset="near-lossless", all_threads=True)
        eight = sizes_in(worker)
        assert eight > default and eight == Cache().sizes()
        theirs = worker.submit(lambda: NATIVE.begin(preset="mix2.4")).result()
        assert sizes_in(worker) < default and Cache().sizes() == eight
        theirs.end()  # by another thread than began it
        assert sizes_in(worker) == eight
        own.end()  # not the last that was begun
        assert sizes_in(worker) == Cache().sizes() == eight
        shared.end()
        assert sizes_in(worker) == Cache().sizes() == default


def test_a_session_that_nobody_holds_is_over():
    default = Cache().sizes()
    session = NATIVE.begin(preset="mix8.2", all_threads=True)
    with ThreadPoolExecutor(1) as worker:
        assert sizes_in(worker) > default
        worker.submit(lambda: None).result()
        del session
        gc.collect()
        assert sizes_in(worker) == Cache().sizes() == default


def test_figures_while_another_thread_decodes(model):
    tokens = random_tokens(700)
    with Context(model, BALANCED) as alone:
        expected = alone.feed(tokens, chunk=20)
    with Context(model, BALANCED) as context:
        stop, failures, asked = threading.Event(), [], []

        def ask() -> None:
            try:
                while not stop.is_set():
                    packed = [layer["pages_packed"] for layer in context.layers()]
                    found = context._session.query_statistics(0)
                    assert len(packed) == 4 and (found is None or np.isfinite(found).all())
                    assert context.stats()["bytes_used"] >= 0
                    asked.append(max(packed))
            except Exception as e:  # noqa: BLE001 - told by the test
                failures.append(e)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        [t.start() for t in threads]
        got = context.feed(tokens, chunk=20)
        stop.set()
        [t.join() for t in threads]
    assert failures == [] and len(asked) > 10 and np.array_equal(got, expected)


def test_one_line_for_a_cause(tmp_path):
    """Twelve tensors that are stored plainly for one reason."""
    path = tiny_models.llama(tmp_path / "m.gguf", 100, 2, 1, n_layers=6)
    code = """
import sys, bridge, llama_cpp
with bridge.attach():
    llama_cpp.Llama(sys.argv[1], n_gpu_layers=-1, flash_attn=True, n_ctx=256, n_threads=1)
"""
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=600, check=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("mixkvq:")]
    assert said == ["mixkvq: keys or values of some layers are stored plainly in F16: its head size 100 is not a multiple of 8 from 32 to 256"]


@pytest.mark.parametrize(("head_size", "n_heads"), [(40, 1), (136, 1), (88, 3), (232, 2), (32, 4), (40, 8)])
def test_every_head_size_is_packed_without_being_told(tmp_path, head_size, n_heads):
    odd = Model(tiny_models.llama(tmp_path / "m.gguf", head_size, n_heads, 1), True)
    with Context(odd, BALANCED, head_sizes_known=False) as context:
        context.feed(random_tokens(400))
        assert [(layer["kind"], layer["pages_packed"]) for layer in context.layers()] == [("packed", 3)] * 4
    odd.close()
