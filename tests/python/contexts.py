"""Contexts of llama.cpp driven through its C functions, on our device or on its own CPU cache, for tests that compare the two."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bridge import Kv
from bridge import backend as adapter
from bridge._compat import C, leave_weights_out
from bridge.log import log
from bridge.state_port import StatePort
from mixkvq.core.model_file import open_model
from mixkvq.core.native import native
from mixkvq.core.page import Codec

CPU, GPU = "MIXKVQ-CPU", "MIXKVQ-CUDA0"  # ours; without the first part of the name, ggml's own below
FLASH_AUTO, FLASH_OFF, FLASH_ON = -1, 0, 1
EXACT = Kv(preset="balanced", sinks=1 << 20)  # every page is a sink page, so all stays F16
PACKED = Kv(preset="mix8.2", window=0, sinks=0)  # every full page is packed, at 8 bits
BALANCED = Kv(preset="balanced", window=0, sinks=0)

# How far the logits of the same cache may lie apart on a GPU, in standard deviations. llama.cpp's CUDA kernels turn queries and weights into F16 and
# add up values in F16 (eleven bits), whatever the length of a batch; ours do the first, and add up in F32. What comes out goes through products of
# TF32 (eleven bits as well), on both sides, which round a small difference up to one of their own. That is the arithmetic of the CPU's kernel for
# single tokens, with the bound that it has.
GPU_NOISE = 5e-2


def find_device(name: str) -> int | None:
    """A device of ggml, if there is one of this name."""
    C.llama_backend_init()
    return adapter.function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)(name.encode())


def stock_name(device: str) -> str:
    """ggml's device below ours."""
    return device.removeprefix("MIXKVQ-")


def library_name(device: str) -> str:
    """What bridge.Llama calls it."""
    return "cpu" if device == CPU else stock_name(device)


def devices() -> list[str]:
    """Those of our devices that tests of contexts run on: the CPU's, and the first GPU's where llama.cpp has it and MixKVQ is built for it.

    MIXKVQ_TEST_DEVICE restricts them to one.
    """
    asked = os.environ.get("MIXKVQ_TEST_DEVICE")
    if asked:
        return [asked]
    return [CPU, GPU] if has_gpu() else [CPU]


def has_gpu() -> bool:
    return native().HAS_CUDA and find_device(stock_name(GPU)) is not None


WITHOUT_GPU = pytest.mark.skipif(has_gpu(), reason="llama.cpp prefers a GPU to our device where a program leaves the choice to it")


def gpu_memory(device: str) -> tuple[int, int]:
    """Free and all bytes."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    memory = adapter.function("ggml_backend_dev_memory", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    memory(find_device(device), ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def only_on_the_cpu(device: str, why: str) -> None:
    if device != CPU:
        pytest.skip(f"not on a GPU: {why}")


def tolerance(device: str, on_cpu: float) -> float:
    """The bound for logits of the same cache, given that of the CPU's kernels."""
    return on_cpu if device == CPU else max(on_cpu, GPU_NOISE)


class Model:
    """A loaded model. `ours`: with its caches on the device, which is one of ours; otherwise on ggml's own device below that one.

    Several devices divide the layers between them, in their order, as `split` says.
    """

    def __init__(self, path: Path | str, ours: bool, device: str | Sequence[str] = CPU, *, split: Sequence[float] = (), no_alloc: bool = False):
        self.path, self.ours = str(path), ours
        names = [device] if isinstance(device, str) else list(device)
        self.device = names[-1]
        self.backend = adapter.backend()
        for name in names:
            if name not in self.backend.devices:
                pytest.fail(f"There is no device {name} to test, there is {', '.join(self.backend.devices)}.", pytrace=False)
        chosen = [self.backend.devices[name] if ours else find_device(stock_name(name)) for name in names if ours or name != CPU]
        params = C.llama_model_default_params()
        self._devices = (ctypes.c_void_p * (len(chosen) + 1))(*chosen, None)
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.n_gpu_layers = 999 if chosen else 0
        if split:
            self._split = (ctypes.c_float * C.llama_max_devices())(*split)
            params.tensor_split = ctypes.cast(self._split, ctypes.POINTER(ctypes.c_float))
        params.no_alloc = no_alloc
        if no_alloc:
            leave_weights_out(params)  # llama.cpp asserts that nothing is mapped
        self.ptr = C.llama_model_load_from_file(self.path.encode(), params)
        assert self.ptr, f"{path} does not load"
        self.n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.ptr))

    def close(self) -> None:
        if self.ptr:
            C.llama_model_free(self.ptr)
            self.ptr = None


class Context:
    """One context. Positions follow llama.cpp's own count unless given; every decode returns all logits, [tokens][vocabulary]."""

    def __init__(
        self,
        model: Model,
        kv: Kv = EXACT,
        *,
        n_ctx: int = 1024,
        n_ubatch: int = 512,
        n_seq: int = 1,
        unified: bool = False,
        flash: int = FLASH_ON,
        n_threads: int = 1,
        head_sizes_known: bool = True,
        codec: Codec | None = None,
        **params,
    ):
        self.model, self.n_seq, self.n_batch, self.unified = model, n_seq, max(n_ubatch, 512), unified
        p = C.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = n_ctx, self.n_batch, n_ubatch, n_seq
        p.n_threads = p.n_threads_batch = n_threads
        p.flash_attn_type, p.kv_unified, p.swa_full = flash, unified, False
        for name, value in params.items():
            assert hasattr(p, name), name
            setattr(p, name, value)
        self._session = None
        self._batch = None
        if model.ours:
            self._session = model.backend.begin(kv, open_model(model.path) if head_sizes_known else None, codec)
        try:
            self.ptr = C.llama_init_from_model(model.ptr, p)
        finally:
            if self._session is not None:
                self._session.end()
        assert self.ptr, "the context was not created"
        self.memory = C.llama_get_memory(self.ptr)
        self._batch = C.llama_batch_init(self.n_batch, 0, n_seq)

    def close(self) -> None:
        if self._batch is not None:
            C.llama_batch_free(self._batch)
            C.llama_free(self.ptr)
            self._batch = self.ptr = self._session = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- decoding ---

    def batch(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> tuple[int, np.ndarray]:
        """Decodes (token, position, sequences) rows in one call; llama_decode's result and the logits."""
        b = self._batch
        assert 0 < len(rows) <= self.n_batch
        b.n_tokens = len(rows)
        for i, (token, pos, seqs) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = int(token), pos, len(seqs), 1
            for j, s in enumerate(seqs):
                b.seq_id[i][j] = s
        code = C.llama_decode(self.ptr, b)
        if code != 0:
            return code, np.zeros((0, self.model.n_vocab), np.float32)
        out = np.ctypeslib.as_array(C.llama_get_logits(self.ptr), (len(rows), self.model.n_vocab))
        return 0, out.copy()

    def feed(self, tokens: Sequence[int], seq: int = 0, chunk: int | None = None) -> np.ndarray:
        """Appends tokens to a sequence, in calls of at most `chunk`."""
        out = []
        chunk = chunk or self.n_batch
        for at in range(0, len(tokens), chunk):
            part = tokens[at : at + chunk]
            pos = self.pos_max(seq) + 1
            code, logits = self.batch([(t, pos + i, [seq]) for i, t in enumerate(part)])
            assert code == 0, f"llama_decode returned {code}"
            out.append(logits)
        return np.concatenate(out)

    def encode(self, tokens: Sequence[int]) -> None:
        """Runs the encoder of an encoder-decoder model."""
        b = self._batch
        b.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = int(token), i, 1, 1
            b.seq_id[i][0] = 0
        assert C.llama_encode(self.ptr, b) == 0

    # --- cache operations ---

    def pos_max(self, seq: int = 0) -> int:
        return C.llama_memory_seq_pos_max(self.memory, seq)

    def rm(self, seq: int, p0: int = -1, p1: int = -1) -> bool:
        return C.llama_memory_seq_rm(self.memory, seq, p0, p1)

    def cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        C.llama_memory_seq_cp(self.memory, src, dst, p0, p1)

    def keep(self, seq: int) -> None:
        C.llama_memory_seq_keep(self.memory, seq)

    def add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        C.llama_memory_seq_add(self.memory, seq, p0, p1, delta)

    def div(self, seq: int, p0: int, p1: int, d: int) -> None:
        C.llama_memory_seq_div(self.memory, seq, p0, p1, d)

    def clear(self, data: bool = True) -> None:
        C.llama_memory_clear(self.memory, data)

    def save(self, seq: int | None = None, flags: int = 0) -> bytes:
        """The state of the whole context, or of one sequence."""
        if seq is None:
            size = C.llama_state_get_size(self.ptr)
            data = (ctypes.c_uint8 * size)()
            n = C.llama_state_get_data(self.ptr, data, size)
        else:
            more, ending = ((flags,), "_ext") if flags else ((), "")  # older packages have no flags
            size = getattr(C, f"llama_state_seq_get_size{ending}")(self.ptr, seq, *more)
            data = (ctypes.c_uint8 * size)()
            n = getattr(C, f"llama_state_seq_get_data{ending}")(self.ptr, data, size, seq, *more)
        assert 0 < n <= size
        return bytes(data[:n])

    def load(self, state: bytes, seq: int | None = None, flags: int = 0) -> int:
        """0 if llama.cpp does not take the state."""
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq is None:
            return C.llama_state_set_data(self.ptr, data, len(state))
        if flags:
            return C.llama_state_seq_set_data_ext(self.ptr, data, len(state), seq, flags)
        return C.llama_state_seq_set_data(self.ptr, data, len(state), seq)

    def pack(self, seq: int | None = None) -> bytes:
        """The packed state of the whole context, or of one sequence."""
        port = StatePort(self.ptr, seq)
        state = self._session.save_state(port.size(), self._flags(seq))
        try:
            return state.to_bytes(port.get(*state.data()))
        finally:
            state.close()

    def unpack(self, packed: bytes, seq: int | None = None) -> None:
        """Raises ValueError, before anything has changed, if the state is none for this context."""
        state = self._session.load_state(packed, self._flags(seq))
        try:
            port = StatePort(self.ptr, seq)
            port.cut(state.finish(port.set(*state.data(), may_write=True)))
        finally:
            state.close()

    def _flags(self, seq: int | None) -> int:
        if seq is None:
            return 0
        return native().STATE_SEQUENCE | (native().STATE_SHARED if self.unified and self.n_seq > 1 else 0)

    # --- what our device says ---

    def stats(self) -> dict:
        return self._session.stats()

    def layers(self) -> list[dict]:
        return self._session.layers()

    def query_statistics(self, layer: int = 0) -> tuple[np.ndarray, np.ndarray]:
        return next(self._session.query_statistics(i) for i, t in enumerate(self.layers()) if t["name"] == f"cache_k_l{layer}")

    def failure(self) -> tuple[str, BaseException | None]:
        return self._session.error(), self._session.codec_failure()

    def pages_packed(self) -> int:
        return sum(layer["pages_packed"] for layer in self.layers())

    def plain(self) -> dict[str, str]:
        """Cache tensors that are stored plainly, with the reason."""
        return {layer["name"]: layer["reason"] for layer in self.layers() if layer["kind"] == "plain"}


def logged(action):
    """What llama.cpp logs during `action`, and its result."""
    lines = []
    callback = C.llama_log_callback(lambda level, text, _: lines.append(text.decode(errors="replace")))
    C.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        return action(), "".join(lines)
    finally:
        log.attach()


class Pair:
    """Our context and a stock F16 one that do the same. `stock` may also be a model of ours on another device, and gets the same cache then."""

    def __init__(self, ours: Model, stock: Model, kv: Kv = EXACT, **params):
        self.kv, self.device = kv, ours.device
        self.ours = Context(ours, kv, **params)
        params.pop("head_sizes_known", None)
        self.stock = Context(stock, kv, **params)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.stock.close()

    def __getattr__(self, name: str):
        def both(*args, **kwargs):
            return getattr(self.ours, name)(*args, **kwargs), getattr(self.stock, name)(*args, **kwargs)

        return both


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 259, n).tolist()


def kl(ours: np.ndarray, stock: np.ndarray) -> np.ndarray:
    """KL divergence of our next-token distribution from the stock one, per row."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(stock), log_softmax(ours)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def distance(ours: np.ndarray, stock: np.ndarray) -> float:
    """Largest difference of a logit, in standard deviations of the logits."""
    return float(np.abs(ours - stock).max() / stock.std())


def assert_same(device: str, logits: tuple[np.ndarray, np.ndarray]) -> None:
    """The same kernels have computed the same numbers: the same bits. A GPU's library may choose another order of a sum for another address."""
    if device == CPU:
        np.testing.assert_array_equal(*logits)
    else:
        assert distance(*logits) < 1e-3
