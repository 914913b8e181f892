"""What `bridge.Llama` holds, kept and put back: states in memory and in files, and caches of them."""

from __future__ import annotations

import os
import threading
from typing import Any

from mixkvq.core.errors import ContextError, StateError

from . import states
from ._compat import BUSY, CLOSED, Base, C, LlamaState
from .state_caches import StateCache
from .state_port import StatePort


class Keeping(Base):
    """The part of `bridge.Llama` that saves and loads states."""

    _session: Any  # of the backend, None for llama.cpp's own caches
    _closed = _coding = False

    _evaluating: threading.RLock  # held while llama.cpp computes

    def _check_open(self) -> None:
        if self._closed:
            raise ContextError(CLOSED)

    def _check_ready(self) -> None:
        self._check_open()
        if self._coding:
            raise ContextError(BUSY)

    def save_state(self, packed: bool = True) -> Any:
        """As in `llama_cpp.Llama`, but small: records in place of F16 rows, for contexts of the same model and settings.

        packed: False for llama.cpp's own state, whose rows are F16, which any context of the model takes. llama.cpp's own caches have no other.
        """
        self._check_ready()
        with self._evaluating:
            if self._session is None or not packed:
                return super().save_state()
            state, tokens = states.to_bytes(self, self._read_tokens()), self.input_ids[: self.n_tokens].copy()
            scores = self.scores[: self.n_tokens if self._keeps_all_logits else 0].copy()
        return LlamaState(tokens, scores, len(tokens), state, len(state), self._sampler_seed)

    def load_state(self, state: Any) -> None:
        """As in `llama_cpp.Llama`, for states of both kinds. Raises StateError if a packed one does not fit; the context is then as it was."""
        self._check_ready()
        with self._evaluating:
            if not states.is_state(state.llama_state):
                super().load_state(state)
                return
            try:
                self._now_holds(states.from_bytes(state.llama_state, self))
            except StateError as e:
                raise StateError(f"The state cannot be loaded: {e}.") from None
            if len(state.scores) == self.n_tokens == len(self.scores[: self.n_tokens]):
                self.scores[: self.n_tokens] = state.scores
            self._sampler_seed = state.seed

    def set_cache(self, cache: Any) -> None:
        """As in `llama_cpp.Llama`. `bridge.RamCache` and `bridge.DiskCache` hold packed states."""
        if isinstance(cache, StateCache):
            self._check_open()
            cache = cache.serving(states.identity(self), self._can_go_back())
        super().set_cache(cache)

    def _can_go_back(self) -> bool:
        """Whether tokens can be taken back one by one: recurrent states have no past."""
        model = self._model_handle
        return not (C.llama_model_is_recurrent(model) or C.llama_model_is_hybrid(model))

    def save_file(self, path: str | os.PathLike[str]) -> int:
        """Write all that the context holds into a file, which appears whole or not at all; how many bytes it has.

        `load_file` puts it into a context of the same model and settings, in this program or another: what is evaluated then gives the same logits,
        bit for bit, as if there had been no file. Raises OSError that names the file, ContextError if llama.cpp does not give its state.
        """
        self._check_ready()
        with self._evaluating:
            return states.to_file(path, self, self._read_tokens())

    def load_file(self, path: str | os.PathLike[str]) -> int:
        """Go on from what `save_file` has written, in place of what the context holds; how many tokens that are.

        There are no logits before the next token is evaluated. Raises StateError with one sentence if the file is damaged or does not fit; the
        context is then as it was.
        """
        self._check_ready()
        with self._evaluating:
            self._now_holds(states.from_file(path, self))
            return self.n_tokens

    def _read_tokens(self) -> list[int]:
        return [int(token) for token in self.input_ids[: self.n_tokens]]

    def _now_holds(self, tokens: Any) -> None:
        self.input_ids[: len(tokens)] = tokens
        self.n_tokens = len(tokens)
        if self._keeps_all_logits:
            self.scores[:] = 0
        self._forget_logits()

    def _state_port(self, sequence: int | None = None) -> StatePort:
        return StatePort(self._context, sequence)
