"""What this package takes from llama-cpp-python. The only module that imports it, and the only one with names that it keeps to itself.

`C` is llama.h. `Base` is `llama_cpp.Llama` with a name of ours for each private one that `bridge.Llama` needs. tests/python/test_compat.py says of
every one what it must mean; for a new version of llama-cpp-python, begin there.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import _internals, _logger, llama_chat_format, llama_grammar, llama_tokenizer
from llama_cpp import llama_cpp as C
from llama_cpp.llama import LlamaState
from llama_cpp.llama_cache import BaseLlamaCache

from mixkvq.core.errors import ContextError

__all__ = [
    "ARGUMENTS",
    "BUSY",
    "CLOSED",
    "Base",
    "BaseLlamaCache",
    "C",
    "ChatTemplate",
    "Closed",
    "LlamaState",
    "Tokenizer",
    "context_failed",
    "decoding_failed",
    "folder",
    "grammar_of_schema",
    "is_verbose",
    "leave_weights_out",
    "libraries",
    "loading_failed",
    "print_log",
    "version",
]

ARGUMENTS = tuple(inspect.signature(llama_cpp.Llama.__init__).parameters)[2:-1]
"""The keywords of `llama_cpp.Llama`: without self, model_path and **kwargs, which it takes and does nothing with."""

CLOSED = "The model is closed."
BUSY = "The codec cannot use the model that is evaluating: it only gets the page."


if not hasattr(_internals.LlamaModel, "sampler"):  # until 0.3.22 or later a model that was not loaded complained of it when it was deleted
    _internals.LlamaModel.sampler = None


def version() -> str:
    """Of llama-cpp-python."""
    return str(llama_cpp.__version__)


def folder() -> Path:
    """Where llama-cpp-python is installed."""
    return Path(llama_cpp.__file__).parent


def libraries() -> Iterator[ctypes.CDLL]:
    """Where llama.cpp's and ggml's functions are looked up: libllama, whose look-up searches the libraries that it depends on as well."""
    yield C._lib
    if sys.platform == "win32":  # a look-up there does not search dependencies, and the loader keeps one copy by name
        for name in ("ggml.dll", "ggml-base.dll"):
            with contextlib.suppress(OSError):
                yield ctypes.CDLL(str(folder() / "lib" / name))


def leave_weights_out(params: Any) -> None:
    """Let a model that is loaded with these llama_model_params have no weights, and its file not be mapped into memory."""
    params.no_alloc = True
    if hasattr(params, "load_mode"):  # since 0.3.35
        params.load_mode = C.LLAMA_LOAD_MODE_NONE
    else:
        params.use_mmap = False


# ---- llama-cpp-python's log --------------------------------------------------------------------------------------------------------


def is_verbose() -> bool:
    """Whether the last `llama_cpp.Llama(verbose=...)` asked for llama.cpp's own log."""
    return 0 < _logger.logger.level <= 10  # 0: nobody has said yet


def print_log(level: int, text: str) -> None:
    """A line of llama.cpp's log on stderr, if `verbose` wants lines of this level."""
    _logger.llama_log_callback(level, text.encode(), None)


# ---- what its errors mean ----------------------------------------------------------------------------------------------------------


def loading_failed(e: Exception) -> bool:
    """Whether llama_cpp.Llama raised this because the model was not loaded."""
    return str(e).startswith(("Failed to load model", "Failed to get vocab", "Model path does not exist"))


def context_failed(e: Exception) -> bool:
    """Whether it raised this because there is no context."""
    return str(e).startswith("Failed to create llama_context")


def decoding_failed(e: Exception) -> bool:
    """Whether it raised this because a batch was not evaluated."""
    return str(e).startswith("llama_decode returned")


# ---- grammars and chat templates -----------------------------------------------------------------------------------------------------


def grammar_of_schema(schema: str) -> str:
    """The grammar in llama.cpp's notation (GBNF) of what a JSON schema, given as JSON, describes. Raises whatever the schema's mistakes lead to."""
    return str(llama_grammar.json_schema_to_gbnf(schema))


ChatTemplate = llama_chat_format.Jinja2ChatFormatter


# ---- the class -----------------------------------------------------------------------------------------------------------------------


class Base(llama_cpp.Llama):
    """`llama_cpp.Llama`, with names for what it keeps to itself.

    A subclass calls `_prepare` before anything else, and may adjust the parameters of model and context as they are made.
    """

    def _prepare(self) -> None:
        """From now on `_free` works, whatever happens in the constructor."""
        self._stack = contextlib.ExitStack()
        self._made: dict[str, Any] = {}

    def _adjust_model_params(self, params: Any) -> None:
        """Called with llama.h's llama_model_params before they are used."""

    def _adjust_context_params(self, params: Any) -> None:
        """Called with llama.h's llama_context_params before they are used."""

    # llama_cpp.Llama makes its parameters inside __init__; assigning them passes through here.
    @property
    def model_params(self) -> Any:
        """llama.h's llama_model_params of the model."""
        return self._made.get("model")

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self._adjust_model_params(params)
        self._made["model"] = params

    @property
    def context_params(self) -> Any:
        """llama.h's llama_context_params of the context."""
        return self._made.get("context")

    @context_params.setter
    def context_params(self, params: Any) -> None:
        self._adjust_context_params(params)
        self._made["context"] = params

    @property
    def _context(self) -> Any:
        """llama.h's llama_context. Raises ContextError after `_free`, and while a codec runs."""
        return self._ctx.ctx

    @property
    def _has_memory(self) -> bool:
        """Whether the context has a cache."""
        return bool(self._ctx.memory)

    @property
    def _model_handle(self) -> Any:
        """llama.h's llama_model."""
        return self._model.model

    @property
    def _vocabulary(self) -> Any:
        """llama.h's llama_vocab."""
        return self._model.vocab

    def _keep_all_logits(self, yes: bool) -> None:
        """Whether `scores` gets the logits of every token. With a draft model llama_cpp.Llama means to, in an array that holds n_batch of them."""
        self._logits_all = yes

    @property
    def _keeps_all_logits(self) -> bool:
        """See `_keep_all_logits`."""
        return self._logits_all

    def _forget_logits(self) -> None:
        """What the context holds now has come from a state: the logits that are there are of something else."""
        self._requires_eval = True

    @property
    def _logits_are_old(self) -> bool:
        """See `_forget_logits`."""
        return bool(self._requires_eval)

    @property
    def _sampler_seed(self) -> Any:
        """Of what is sampled without one of its own."""
        return self._seed

    @_sampler_seed.setter
    def _sampler_seed(self, seed: Any) -> None:
        self._seed = seed

    def _remove_cells(self, sequence: int, start: int, end: int) -> None:
        """Forget the cells of a sequence (-1: all) from position `start` (-1: the first) up to `end` (-1: the last)."""
        self._ctx.kv_cache_seq_rm(sequence, start, end)

    def _copy_cells(self, source: int, target: int, start: int, end: int) -> None:
        """Let a sequence have cells of another."""
        self._ctx.kv_cache_seq_cp(source, target, start, end)

    def _clear_cells(self) -> None:
        """Forget all cells, and give their memory back."""
        self._ctx.kv_cache_clear()

    def _decode_cells(self, cells: Sequence[tuple[int, int, int]], rows: Collection[int]) -> None:
        """Evaluate a batch of (sequence, position, token), with logits of those in these places. Raises RuntimeError, see `decoding_failed`."""
        batch, n = self._batch.batch, len(cells)
        batch.n_tokens = n
        for i, (sequence, position, token) in enumerate(cells):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = i in rows
        self._ctx.decode(self._batch)
        C.llama_synchronize(self._ctx.ctx)  # a GPU may still compute
        self._requires_eval = False

    def _logits_row(self, row: int) -> Any:
        """Logits of one output of the last batch, float32 [vocabulary], by its place in the batch: the context's own, until the next evaluation."""
        return np.ctypeslib.as_array(C.llama_get_logits_ith(self._ctx.ctx, row), shape=(self.n_vocab(),))

    def _piece_of(self, token: int, special: bool) -> bytes:
        """The bytes that a token stands for. special: those of control tokens too, which else stand for nothing."""
        buffer = ctypes.create_string_buffer(256)
        n = C.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, special)
        if n < 0:  # longer than the buffer
            buffer = ctypes.create_string_buffer(-n)
            n = C.llama_token_to_piece(self._vocabulary, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(0, n)]

    def _special_text(self, which: str) -> str:
        """The text of the token that begins ("bos") or ends ("eos") a text; "" if the model has none."""
        token = {"bos": C.llama_vocab_bos, "eos": C.llama_vocab_eos}[which](self._vocabulary)
        return "" if token < 0 else self._piece_of(token, True).decode("utf-8", "replace")

    def _batch_size(self) -> int:
        """Tokens of the last batch."""
        return int(self._batch.n_tokens())

    def _outputs(self, n: int) -> Any:
        """Logits of the last batch's n outputs, float32 [n, vocabulary]: the context's own, until the next evaluation."""
        return np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n, self.n_vocab()))

    def _output(self, row: int) -> Any:
        """Pointer to the logits of one output of the last batch, from behind where negative; null if it has none."""
        return C.llama_get_logits_ith(self._ctx.ctx, row)

    def _chat_handler_of(self, name: str) -> Any:
        """What turns messages into a prompt for a chat format: the model's own template, or one that llama-cpp-python has."""
        return self._chat_handlers.get(name) or llama_chat_format.get_chat_completion_handler(name)

    @contextlib.contextmanager
    def _lent_to_codec(self) -> Iterator[None]:
        """llama.cpp is in the middle of an evaluation and must not be called: meanwhile whatever needs the context raises ContextError."""
        context, busy = getattr(self, "_ctx", None), _Busy()
        if context is None:
            yield
            return
        self._ctx: Any = busy
        try:
            yield
        finally:
            self._ctx = context

    def _free(self) -> None:
        """Free context and model. Whoever has kept a part of them gets an error from it as well, and not what now lies at the freed address."""
        stack = getattr(self, "_stack", None)
        if stack is None:
            return
        stack.close()
        closed: Any = Closed()
        for owner, names in (("_ctx", ("ctx", "memory")), ("_model", ("model", "vocab")), ("_batch", ("batch",))):
            for name in names:
                if not isinstance(getattr(self, owner, closed), Closed):
                    setattr(getattr(self, owner), name, closed)
        self._ctx = self._model = self._batch = self.tokenizer_ = closed


class _Busy:
    """Stands in for the context while a codec runs."""

    def __getattr__(self, name: str) -> Any:
        raise ContextError(BUSY)


class Closed:
    """Stands in for what is freed."""

    def __getattr__(self, name: str) -> Any:
        raise ContextError(CLOSED)


class Tokenizer(llama_tokenizer.LlamaTokenizer):
    """llama-cpp-python's tokenizer holds on to a model that may be freed; this one asks for it every time."""

    def __init__(self, llama: Base) -> None:
        self._llama = llama

    def __getattr__(self, name: str) -> Any:
        if name == "_model":
            return self._llama._model
        raise AttributeError(name)
