"""`bridge.Llama`: `llama_cpp.Llama` on a MixKVQ cache."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from mixkvq.core.errors import CacheNotUsedError, ContextError, GeometryError, SettingsError
from mixkvq.core.model_file import check_geometry, open_model
from mixkvq.core.page import Codec, Page
from mixkvq.core.profile import with_profile
from mixkvq.core.settings import Kv, KvLike, resolve_kv, stock_type

from . import report, streams
from ._compat import ARGUMENTS, BUSY, C, Tokenizer, decoding_failed
from .arguments import asks_for_something, check_name, check_threads, checked_context, refuse_unknown
from .backend import Backend, backend, load_lock
from .computing import computing
from .devices import check_device
from .keeping import Keeping
from .loading import Loading, explained
from .log import log, sentence
from .placement import Wish, device_options, find_placement
from .prompt import prompt_tokens


class Llama(Keeping):
    """`llama_cpp.Llama` with a quantised KV cache. Everything that is not listed here is inherited unchanged.

    Args:
        model_path: path of a GGUF model.
        kv: what the cache should be: a preset's name or alias, the path of a profile, a `bridge.Kv` or a mapping with its fields. Where it names
            neither preset nor profile: a profile that lies with the model (`model.mixkvq.gguf` beside `model.gguf`, or one embedded in it), else
            the preset `balanced`.
        stock: instead of MixKVQ, one of llama.cpp's own cache types ("f16", "q8_0", "q4_0", ...), for comparison.
        codec: takes the place of packing, to try another format: a function that gets a `bridge.Page` and returns (rows, bits): what its format would
            read back, array-like of the shape of page.rows, and the bits that the whole page would take. Every page is handed over once when
            MixKVQ would pack it (and again after it was written to or shifted), in the order of cells, in the thread that evaluates. The cache
            then keeps the result in F16: it saves no memory, and `kv_stats` gives the bits that the codec counts. `kv` gives window and sinks
            only. What the function raises ends the evaluation as a ContextError with that as its __cause__, and so do rows of another shape,
            NaN, and bits that are not positive. The function cannot use the model that calls it.
        device: where the model is computed: "auto" (a GPU if llama.cpp and MixKVQ both have one, else the CPU), "cpu", "gpu" (all
            GPUs, its layers split between them), or GPUs by llama.cpp's names, "CUDA0" or "CUDA0,CUDA1".
        on_load: called with the share of the model that is loaded, 0.0 to 1.0. What it raises stops the load and is raised again; so does Ctrl-C.
        **kwargs: as for `llama_cpp.Llama`; other names are refused with a TypeError. n_gpu_layers is how many layers GPUs get, the last ones,
            with their part of the cache; not given, it is as many as fit their memory, and -1 is all. flash_attn and offload_kqv are set as the
            cache needs them, whatever is given (stock="f32" goes without flash attention, which would round it to F16); n_ctx is rounded up to a
            multiple of 256 cells (as llama.cpp does inside), and 0 means the model's training context. logprobs need logits_all=True, with a
            draft_model as well.

    Attributes:
        on_read: None, or a function called with (tokens read, tokens to read) while a prompt is evaluated: at its start and after every batch.
            What it raises ends the evaluation; the tokens read so far stay in the cache.
        generated: tokens that the last `generate` (hence the last completion) has sampled, the one that ended it included.

    Raises (all are `bridge.BridgeError`):
        ModelFileError, SettingsError, ProfileError, GeometryError, VersionError: before anything is loaded.
        ContextTooLargeError: before weights are read, if the context cannot fit the memory that is free; it says which one would.
        ContextError, CacheNotUsedError, GeometryError: after loading; what was created is freed again.
        ContextError: from every method that needs the model, after close().

    Loading is serialised over threads, because llama-cpp-python turns the process's stderr off while it loads; contexts then run in
    parallel, each used by one thread at a time.
    """

    n_seq = 1  # sequences in the context, see `bridge.sequences`

    def __init__(
        self,
        model_path: str,
        *,
        kv: KvLike = None,
        stock: str | None = None,
        codec: Codec | None = None,
        device: str = "auto",
        on_load: Callable[[float], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self._prepare()  # close() must work whatever happens below
        self._closed = self._coding = False
        self._evaluating = threading.RLock()  # held while llama.cpp computes
        self._session: Any = None
        self._devices: Any = None
        self._stock_cache: list[str] = []
        self.codec = codec
        self._answering = False
        self.on_read: Callable[[int, int], None] | None = None
        self.generated = 0

        refuse_unknown("Llama", kwargs, {*ARGUMENTS, "kv", "stock", "codec", "device", "on_load"})
        for name in ("type_k", "type_v"):
            if kwargs.pop(name, None) is not None:
                raise SettingsError(f"{name} does not go together with a MixKVQ cache; use stock='q8_0' or the like for llama.cpp's own cache types.")
        model_path = os.fspath(model_path)
        self._file = open_model(model_path)
        check_name(model_path)
        self._choose_cache(kv, stock, codec, kwargs)
        kwargs["n_ctx"] = self.n_seq * checked_context(self._file, kwargs)
        check_threads(kwargs)
        self.device = check_device(device)
        self._load(model_path, on_load, kwargs)
        self._keep_all_logits(bool(kwargs.get("logits_all", False)))
        try:
            if not kwargs.get("vocab_only"):
                self._check_kind()
            self._verify()
        except BaseException:
            self.close()
            raise
        _open.add(self)

    def _choose_cache(self, kv: KvLike, stock: str | None, codec: Codec | None, kwargs: dict[str, Any]) -> None:
        """Which cache it is: `stock`, or `kv` with a profile that was found. Raises BridgeError for what does not go together."""
        if codec is not None and not callable(codec):
            raise SettingsError(f"codec is a {type(codec).__name__}; give a function of a bridge.Page that returns rows and bits.")
        if codec is not None and stock is not None:
            raise SettingsError("stock turns MixKVQ off, so it does not go together with codec.")
        if kwargs.get("vocab_only"):
            stock = stock or "f16"  # no context, hence no cache
        self.stock = stock
        self.kv = Kv() if stock is not None else resolve_kv(kv)
        if stock is None:
            check_geometry(self._file)
            self.kv = with_profile(self.kv, self._file) if codec is None else Kv(window=self.kv.window, sinks=self.kv.sinks)
            return
        number = stock_type(stock)
        if asks_for_something(kv):
            raise SettingsError("stock turns MixKVQ off, so it does not go together with kv.")
        kwargs.update(type_k=number, type_v=number)
        log.install()

    def _load(self, model_path: str, on_load: Callable[[float], None] | None, kwargs: dict[str, Any]) -> None:
        """Place the model, and let llama.cpp load it inside a session."""
        streams.fill_missing()  # llama-cpp-python needs descriptors 1 and 2
        loading = Loading(on_load)
        self._on_load = C.llama_progress_callback(loading)
        with loading.ctrl_c_held():
            loaded = backend() if self.stock is None else None
            self._place(loaded, kwargs)
            loading.finish()
            kwargs["flash_attn"] = self.stock != "f32"  # flash attention would round F32 to F16
            with load_lock:
                log.begin()
                if loaded is not None:
                    self._session = loaded.begin(self.kv, self._file, _guarded(self.codec, self) if self.codec is not None else None)
                try:
                    with computing():
                        super().__init__(model_path, **kwargs)
                    loading.finish()
                except BaseException as e:
                    error = loading.raised or explained(e, self._file.path, self._session)
                    self.close()
                    if error is e:
                        raise
                    raise error from None
                finally:
                    if self._session is not None:
                        self._session.end()
                    log.end()

    def _adjust_model_params(self, params: Any) -> None:
        if self._devices is not None:
            params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.progress_callback = self._on_load

    def _place(self, loaded: Backend | None, kwargs: dict[str, Any]) -> None:
        """Decide which devices compute the model, and check that the context fits them."""
        wish = Wish(self._file, loaded, self.device, self.kv, self.stock, self.codec, self.n_seq, kwargs)
        with computing():
            self._placement = find_placement(wish)
        devices, options = device_options(wish, self._placement)
        kwargs.update(options)
        self._devices = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)

    def _check_kind(self) -> None:
        """llama-cpp-python asks for the next token of a decoder. Another model would end the process."""
        name, model = f"{self._file.name} ({self._file.architecture})", self._model_handle
        encoder, decoder = C.llama_model_has_encoder(model), C.llama_model_has_decoder(model)
        if encoder and decoder:
            raise GeometryError(f"{name} has an encoder beside its decoder, which llama-cpp-python does not run; use a model with a decoder only.")
        if (encoder or not self._has_memory) and (self.stock is None or not self.context_params.embeddings):
            why = f"{name} reads a text as a whole and generates none, so it has no key/value cache to keep"
            advice = "use another model, or serve its embeddings: mixkvq serve --embeddings"
            raise GeometryError(f"{why}; for its embeddings use stock='f16', embedding=True.", command=f"{why}; {advice}.")

    def _verify(self) -> None:
        """The cache must be the one that was asked for: a backend in the wrong registry would be ignored without a word."""
        if self.stock is not None:
            self._stock_cache = log.caches()
            return
        try:
            self._session.stats()
        except RuntimeError:
            why = self._session.error()
            raise CacheNotUsedError(
                sentence(why) if why else f"llama.cpp did not put the cache of {self._file.path} on a device of MixKVQ, so MixKVQ is not in use."
            ) from None

    # --- what is new ---

    def kv_stats(self) -> dict[str, Any]:
        """Figures of the cache: bytes, body_bits, total_bits, times_smaller (than F16), n_cells, plain_layers, device and so on.

        `bytes` (also `bytes_filled`) is what the cache takes when the context is full, `bytes_reserved` its addresses, `bytes_used` what the cells
        written so far take; `bytes_recurrent`, in none of these, are states of layers without keys and values. Bits are per key or value element.
        Where packing saves nothing, `n_cells_gain` is the length from which on it would.
        Raises ContextError after close().
        """
        self._check_open()
        if self.stock is not None:
            return {**report.stock_stats(self.stock, self._stock_cache, self.n_tokens), "device": self._placement.describe(self._file.n_layers)}
        stats = report.mixkvq_stats(self.kv, self._session.stats(), self._session.layers(), self.codec)
        return {**stats, "device": self._placement.describe(self._file.n_layers)}

    def kv_report(self) -> str:
        """The figures of `kv_stats` as a few lines of text."""
        return report.format_report(self.kv_stats())

    def kv_layers(self) -> list[dict[str, Any]]:
        """Figures of the keys and of the values of each layer, as the backend counts them.

        layer, is_value, kind, n_heads, head_size, n_cells, body_bits, pages_packed and so on.
        Raises ContextError after close() and on one of llama.cpp's own caches.
        """
        self._check_open()
        if self._session is None:
            raise ContextError("llama.cpp's own cache has no figures of its layers.")
        layers: list[dict[str, Any]] = self._session.layers()
        return layers

    def query_statistics(self) -> dict[int, tuple[Any, Any]]:
        """Mean |q_d| (the I_d of the paper, section 3.2) and mean q_d^2 of the queries so far, by layer.

        Each is float32 [n_heads, D], over all query heads that read a key head; the last few thousand query vectors count, older ones fade.
        Layers that are stored plainly or have not been read yet are left out. Raises ContextError after close() and on one of llama.cpp's own
        caches.
        """
        self._check_open()
        if self._session is None:
            raise ContextError("llama.cpp's own cache counts no queries.")
        found = {}
        for i, layer in enumerate(self._session.layers()):
            statistics = self._session.query_statistics(i)
            if statistics is not None:
                found[layer["layer"]] = statistics
        return found

    def forward(self, tokens: Sequence[int], n_logits: int = 1, *, copy: bool = True) -> Any:
        """Evaluate at most n_batch tokens behind those before; logits of the last `n_logits` of them.

        Returns float32 [n_logits, vocabulary]. Without `copy` they are the context's own, which the next evaluation and close() take away. A large
        vocabulary makes megabytes of a few tokens. Llama(logits_all=True) would keep the logits of the whole context.
        Raises SettingsError for numbers that do not fit together, ContextError if the context is full or llama.cpp fails.
        """
        n = len(tokens)
        if n > self.n_batch:
            raise SettingsError(f"{n} tokens are more than a batch holds; n_batch is {self.n_batch}.")
        if isinstance(n_logits, bool) or not isinstance(n_logits, (int, np.integer)) or not 0 <= n_logits <= n:
            raise SettingsError(f"n_logits is {n_logits!r}; of {n} tokens it must be a number from 0 to {n}.")
        self._check_tokens(tokens)
        with self._evaluating:
            if n:
                self._evaluate(tokens, int(n_logits))
            return self._logits(int(n_logits)) if copy or not n_logits else self._outputs(int(n_logits))

    def last_logits(self) -> Any:
        """Logits of the last evaluated token, float32 [vocabulary]. Raises ContextError if there is none."""
        self._check_ready()
        with self._evaluating:
            if self.n_tokens == 0 or self._logits_are_old or not self._has_logits(-1):
                raise ContextError("There are no logits yet; evaluate a token first.")
            return np.ctypeslib.as_array(self._output(-1), shape=(self.n_vocab(),)).copy()

    def _logits(self, n: int) -> Any:
        """Logits of the last batch's n outputs: a copy, since the next evaluation and close() take the context's."""
        if not n:
            return np.empty((0, self.n_vocab()), np.float32)
        return self._outputs(n).copy()

    def _has_logits(self, row: int) -> bool:
        with log.kept():  # llama.cpp says there that a row is missing
            return bool(self._output(row))

    def clear(self) -> None:
        """Empty the cache and forget the queries of what was in it: what is read next gets what a new context would.

        Unless MIXKVQ_KEEP_STATISTICS=1.
        """
        self.reset()
        if self._session is None:  # else reset() has done it
            self._clear_cells()

    def reset(self) -> None:
        """Forget all tokens and give their memory back. A prompt that begins like the one before needs none: `create_completion` sees to that."""
        self._check_ready()
        super().reset()  # type: ignore[no-untyped-call]
        if self._session is not None:  # clearing would only write to all of llama.cpp's own cache
            self._clear_cells()

    def ends(self, token: int) -> bool:
        """Whether a token ends the model's turn."""
        return bool(C.llama_vocab_is_eog(self._vocabulary, token))

    def chat_tokens(self, messages: Sequence[Any], **kwargs: Any) -> list[int]:
        """The prompt that `create_chat_completion` would evaluate for these messages, as tokens.

        Raises SettingsError if a message is not Unicode text, or the chat template refuses the messages.
        """
        self._check_open()
        return prompt_tokens(self, messages, kwargs)

    # --- inherited, with a guard ---

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens in batches of n_batch. Of more than one, progress is reported to `on_read`, unless they continue an answer.

        Raises SettingsError for what is no token, ContextError if they do not fit the context or llama.cpp fails.
        """
        self._check_tokens(tokens)
        n = len(tokens)
        report = self.on_read if n > 1 and not self._answering else None
        with self._evaluating:
            self._remove_cells(-1, self.n_tokens, -1)
        if report is not None:
            report(0, n)
        for i in range(0, n, self.n_batch):
            batch = tokens[i : i + self.n_batch]
            with self._evaluating:
                past, all_logits = self.n_tokens, self._keeps_all_logits or self._answering  # a draft is checked by the logits of each of its tokens
                self._evaluate(batch, len(batch) if all_logits else 1)
                if self._keeps_all_logits:
                    self.scores[past : past + len(batch)] = self._outputs(len(batch))
            if report is not None:
                report(i + len(batch), n)

    def _evaluate(self, tokens: Sequence[int], n_logits: int) -> None:
        """One batch behind the tokens before it, with logits of its last tokens."""
        n, past = len(tokens), self.n_tokens
        try:
            with computing():
                rows = range(n - max(1, n_logits), n)  # the last is sampled from
                self._decode_cells([(0, past + i, token) for i, token in enumerate(tokens)], rows)
        except RuntimeError as e:
            failure = self._failure(e, n)
            raise failure from failure.__cause__
        self.input_ids[past : past + n] = tokens
        self.n_tokens = past + n

    def generate(self, *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """As in `llama_cpp.Llama`. What is evaluated after the first token is the answer's, drafts included, and not reported to `on_read`."""
        tokens = super().generate(*args, **kwargs)
        self.generated = n = 0
        more: Sequence[int] | None = None
        try:
            while True:
                self._answering = n > 0
                try:
                    token = tokens.send(more)
                except StopIteration:
                    return
                finally:
                    self._answering = False
                n += 1
                self.generated = n
                more = yield token
        finally:
            tokens.close()

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """As in `llama_cpp.Llama`. Raises ContextError if there are no logits to sample from, where llama.cpp would end the process."""
        self._check_ready()
        idx = kwargs.get("idx")
        with self._evaluating:
            if self.n_tokens == 0 or not self._has_logits(-1 if idx is None else idx - self.n_tokens):
                raise ContextError("There are no logits to sample from; evaluate a token first.")
            return int(super().sample(*args, **kwargs))

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """As in `llama_cpp.Llama`. Raises ContextError if llama.cpp fails."""
        self._check_ready()
        with self._evaluating:
            try:
                return super().embed(*args, **kwargs)
            except RuntimeError as e:
                failure = self._failure(e, self._batch_size())
                raise failure from failure.__cause__

    def tokenizer(self) -> Any:
        """The model's tokenizer. It keeps the model, and ends with it."""
        return Tokenizer(self)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Before anything is evaluated, and with the numbers: llama.cpp says only that it failed."""
        self._check_ready()
        if not self._has_memory:
            raise ContextError("This model has no key/value cache to evaluate tokens in: it was loaded for its vocabulary or its embeddings only.")
        n_vocab, n_ctx = self.n_vocab(), self.n_ctx()
        for token in tokens:
            if not (isinstance(token, (int, np.integer)) and 0 <= token < n_vocab):
                raise SettingsError(f"Token {token!r} is not in the vocabulary; tokens are numbers from 0 to {n_vocab - 1}.")
        if self.n_tokens + len(tokens) > n_ctx:
            raise ContextError(f"{len(tokens)} tokens do not fit behind the {self.n_tokens} in a context of {n_ctx}.")

    def _failure(self, e: RuntimeError, n_tokens: int) -> BaseException:
        """What to raise in place of an evaluation's error."""
        if not decoding_failed(e):
            return e
        said = self._session.error() if self._session is not None else ""
        cause: BaseException | None = self._session.codec_failure() if self._session is not None else None
        if cause is not None and not isinstance(cause, Exception):
            return cause  # Ctrl-C in the codec
        if cause is not None:
            said = said.replace("it returned 1", type(cause).__name__ + (f": {cause}" if str(cause) else ""))
        failure = ContextError(sentence(said or f"llama.cpp failed to evaluate {n_tokens} tokens ({e})"))
        failure.__cause__ = cause
        return failure

    def close(self) -> None:
        """Free the context and the model, once an evaluation in another thread has ended; safe to call twice and after a failed construction."""
        if getattr(self, "_coding", False):
            raise ContextError(BUSY)
        if not hasattr(self, "_evaluating"):
            return  # the constructor did not get far
        with self._evaluating:
            self._closed = True
            self._free()
        self._session = None

    @contextlib.contextmanager
    def _lent(self) -> Iterator[None]:
        """While a codec runs: it must not use the model."""
        with self._lent_to_codec():
            self._coding = True
            try:
                yield
            finally:
                self._coding = False

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        for name in ("type_k", "type_v", "n_gpu_layers", "flash_attn", "offload_kqv", "tensor_split"):
            state.pop(name, None)
        state["device"] = self.device
        if self.stock is not None:
            state["stock"] = self.stock
        else:
            state["kv"] = self.kv
        if self.codec is not None:
            state["codec"] = self.codec
        return state


_open: weakref.WeakSet[Llama] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.clear)
_LAST_BATCH = 60  # seconds


@atexit.register
def _stop_computing() -> None:
    """At the end of the program: a thread that still computes ends its batch and gets no further, before the libraries are torn down."""
    with contextlib.suppress(KeyboardInterrupt):
        for llama in list(_open):
            llama._evaluating.acquire(timeout=_LAST_BATCH)  # and keep it


def _guarded(codec: Codec, llama: Llama) -> Codec:
    model = weakref.ref(llama)  # the model's session holds the codec: no circle

    def call(page: Page) -> tuple[Any, float]:
        llama = model()
        if llama is None:
            return codec(page)
        with llama._lent(), computing(-1):
            return codec(page)

    return call
