"""What a context takes, before a weight is read: llama.cpp's own dry run, in which our backend keeps its books without memory."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from mixkvq.core.model_file import ModelFile
from mixkvq.core.settings import Kv

from ._compat import C, leave_weights_out
from .backend import backend, load_lock, our_gpus
from .log import log
from .report import stock_stats

# llama.cpp's own books about a cell: position, shift and sequences, and two nodes of trees if it is in use.
CELL_BYTES = 48 + 2 * 48
GRAPH_BYTES = 6 << 20  # its graphs and what the allocator holds, of any context
_CELLS = re.compile(r"llama_kv_cache: size =.*\(\s*(\d+) cells,.*?/\s*(\d+) seqs\)")
_WORK = re.compile(r":\s+(\S+) compute buffer size =\s*([\d.]+) MiB")


@dataclass(frozen=True)
class Need:
    """Bytes that a context takes when it is full.

    cache: keys and values, the `bytes` of kv_stats; layers: the same by layer, without tables; empty for llama.cpp's own caches. recurrent: states
    of layers that have no keys and values. books: what llama.cpp and llama-cpp-python keep beside them. work: what is computed in, by llama.cpp's
    name for the memory.
    """

    cache: int
    layers: dict[int, int]
    recurrent: int
    books: int
    work: dict[str, int]

    @property
    def all(self) -> int:
        """Everything, wherever it lies."""
        return self.cache + self.recurrent + self.books + sum(self.work.values())

    def largest_work(self) -> int:
        """Of one device."""
        return max(self.work.values(), default=0)

    def on_cpu(self, n_layers: int, share: float, on_gpus: Collection[str]) -> int:
        """What the machine's memory must hold if the first n_layers, a `share` of all, are computed there, and work of these names is on GPUs."""
        cache = self.cache if share == 1 or not self.layers else sum(n for layer, n in self.layers.items() if layer < n_layers)
        if not self.layers:
            cache = round(share * cache)
        work = sum(n for name, n in self.work.items() if name not in on_gpus)
        if 0 < share < 1:  # measured with all layers on GPUs
            work += self.largest_work()
        return cache + round(share * self.recurrent) + self.books + work


class DryRun:
    """A model without its weights, of which contexts are measured. Close it."""

    def __init__(self, path: str, devices: Sequence[int], options: dict[str, Any], begin: Callable[[], Any] | None, stock: str) -> None:
        """devices: of ggml, all layers on them; none: llama.cpp's CPU. options: those of llama_cpp.Llama, and n_seq, sequences of equal parts.

        begin: starts a native session; None for one of llama.cpp's own caches, of the type `stock`.
        """
        self._options, self._begin, self._stock = options, begin, stock
        self._found: dict[int, Need | None] = {}
        params = C.llama_model_default_params()
        leave_weights_out(params)
        self._devices = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.n_gpu_layers = 0x7FFFFFFF if devices else 0
        with log.kept():
            self._model = C.llama_model_load_from_file(os.fsencode(path), params)

    def measure(self, n_ctx: int) -> Need | None:
        """None: llama.cpp does not create such a context; why it says again when the context is really created."""
        if n_ctx not in self._found:
            self._found[n_ctx] = self._measure(n_ctx) if self._model else None
        return self._found[n_ctx]

    def bytes_of(self, part: Callable[[Need], int]) -> Callable[[int], int | None]:
        """A part of what a context takes, as a function of its length."""

        def measure(n_ctx: int) -> int | None:
            need = self.measure(n_ctx)
            return None if need is None else part(need)

        return measure

    def _measure(self, n_ctx: int) -> Need | None:
        session = self._begin() if self._begin is not None else None
        try:
            with log.kept():
                log.forget_caches()
                context = C.llama_init_from_model(self._model, _context_params(n_ctx, self._options))
            if not context:
                return None
            try:
                return self._need(n_ctx, log.caches(), session)
            finally:
                C.llama_free(context)
        finally:
            if session is not None:
                session.end()

    def _need(self, n_ctx: int, lines: Sequence[str], session: Any) -> Need:
        text = "\n".join(lines)
        work = {name: round(float(mib) * (1 << 20)) for name, mib in _WORK.findall(text)}
        books = GRAPH_BYTES + CELL_BYTES * sum(int(cells) * int(streams) for cells, streams in _CELLS.findall(text))
        if self._options.get("logits_all"):
            books += 4 * n_ctx * C.llama_vocab_n_tokens(C.llama_model_get_vocab(self._model))
        stats = stock_stats(self._stock, lines, 0)
        if session is None:
            return Need(stats["bytes"], {}, stats["bytes_recurrent"], books, work)
        try:
            stats = session.stats()
        except RuntimeError:  # no layer has keys and values
            return Need(0, {}, stats["bytes_recurrent"], books, work)
        layers: dict[int, int] = {}
        for layer in session.layers():
            layers[layer["layer"]] = layers.get(layer["layer"], 0) + layer["bytes"]
        return Need(stats["bytes"], layers, stats["bytes_recurrent"], books, work)

    def close(self) -> None:
        """Free the model; safe to call twice."""
        if self._model:
            C.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> DryRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure_context(file: ModelFile, kv: Kv | None, n_ctx: int) -> Need | None:
    """What a context of the model takes, on GPUs if there are any; kv: checked settings, or None for llama.cpp's own cache in F16.

    None: llama.cpp does not create such a context. Raises the errors of `backend.backend`.
    """
    loaded = backend()
    with log.kept():
        gpus = our_gpus(loaded)[0] if kv is not None else []
    devices = [gpu.device for gpu in gpus] or ([loaded.cpu] if kv is not None else [])
    begin = None if kv is None else functools.partial(loaded.begin, kv, file)
    with load_lock, DryRun(file.path, devices, {}, begin, "f16") as dry:
        return dry.measure(n_ctx)


def _context_params(n_ctx: int, options: dict[str, Any]) -> Any:
    """What llama_cpp.Llama makes of its arguments, as far as sizes depend on it."""
    params = C.llama_context_default_params()
    params.n_ctx = n_ctx
    params.n_batch = min(n_ctx, options.get("n_batch", 512))
    params.n_ubatch = min(params.n_batch, options.get("n_ubatch", 512))
    exact = options.get("type_k") == 0  # F32, as in `Llama`
    params.flash_attn_type = C.LLAMA_FLASH_ATTN_TYPE_DISABLED if exact else C.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.offload_kqv = True
    for name in ("type_k", "type_v", "swa_full", "op_offload", "pooling_type", "attention_type"):
        if options.get(name) is not None:
            setattr(params, name, options[name])
    if options.get("n_seq", 1) > 1:
        params.n_seq_max, params.kv_unified = options["n_seq"], False
    if options.get("embedding"):
        params.embeddings = params.kv_unified = True
        params.n_seq_max = min(params.n_batch, C.llama_max_parallel_sequences())
    return params
