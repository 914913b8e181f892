"""Several sequences in one context, each with cells of its own: they are computed together, which takes little longer than one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._llama import Llama


class Streams(Llama):
    """A `Llama` of `n_seq` sequences of n_ctx tokens each.

    `eval`, `forward` and `reset` would use the first sequence only: use `read`, `step` and `forget`. What the cache learns of the queries is shared
    by all sequences.
    """

    def __init__(self, model_path: str, *, n_seq: int = 1, n_ctx: int = 512, **options: Any) -> None:
        self.n_seq = n_seq
        self._lengths = [0] * n_seq
        super().__init__(model_path, n_ctx=n_ctx * n_seq, **options)

    # As for model_params: llama_cpp.Llama makes its parameters inside __init__.
    @property
    def context_params(self) -> Any:
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        params.n_seq_max, params.kv_unified = self.n_seq, False
        self._context_params = params

    def read(self, sequence: int, tokens: Sequence[int]) -> Any:
        """Evaluate tokens of one sequence; logits of the last, float32 [vocabulary]: a view that the next evaluation overwrites."""
        for start in range(0, len(tokens), self.n_batch):
            logits = self._decode([(sequence, token) for token in tokens[start : start + self.n_batch]], 1)
        return logits[0]

    def step(self, tokens: Sequence[tuple[int, int]]) -> Any:
        """Evaluate one token for each of some sequences, given as (sequence, token); logits float32 [n, vocabulary], a view as of `read`."""
        return self._decode(tokens, len(tokens))

    def forget(self, sequence: int) -> None:
        """Empty a sequence's part of the cache."""
        self._ctx.kv_cache_seq_rm(sequence, -1, -1)
        self._lengths[sequence] = 0

    def clear(self) -> None:
        """Empty the cache of all sequences. What it has learnt of the queries stays."""
        super().clear()
        self._lengths = [0] * self.n_seq

    def kv_stats(self) -> dict[str, Any]:
        """As `Llama.kv_stats`, of one sequence: its share of what all take."""
        stats = super().kv_stats()
        n_cells = stats["n_cells"] if self.stock is not None else stats["n_cells"] // self.n_seq
        return {**stats, "n_cells": n_cells, **{key: stats[key] // self.n_seq for key in ("bytes", "bytes_f16", "bytes_used", "elements")}}

    def _decode(self, tokens: Sequence[tuple[int, int]], n_logits: int) -> Any:
        batch = self._batch.batch
        batch.n_tokens = len(tokens)
        for i, (sequence, token) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, self._lengths[sequence], 1, sequence
            batch.logits[i] = i >= len(tokens) - n_logits
            self._lengths[sequence] += 1
        try:
            self._ctx.decode(self._batch)
        except RuntimeError as e:
            failure = self._failure(e, len(tokens))
            raise failure from failure.__cause__
        return np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n_logits, self.n_vocab()))
