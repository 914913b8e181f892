"""Several sequences in one context, each with cells of its own: they are computed together, which takes little longer than one of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from mixkvq.core.errors import ContextError, SettingsError
from mixkvq.core.memory import SEQUENCES

from . import states
from .computing import computing
from .llama import Llama


class Sequences(Llama):
    """A `Llama` of `n_seq` sequences of n_ctx tokens each. What the cache learns of the queries belongs to each sequence.

    Tokens are evaluated by `read` and `step`; `eval`, `forward` and what is built on them raise ContextError. n_tokens is the sum over all sequences.
    Raises the errors of `Llama`; SettingsError if n_seq is not from 1 to SEQUENCES.
    """

    def __init__(self, model_path: str, *, n_seq: int = 1, **options: Any) -> None:
        if not isinstance(n_seq, int) or isinstance(n_seq, bool) or not 1 <= n_seq <= SEQUENCES:
            raise SettingsError(f"n_seq is {n_seq!r}; it must be a number of sequences from 1 to {SEQUENCES}.")
        if options.get("embedding"):
            raise SettingsError("A context of several sequences is made for logits, not for embeddings.")
        self.n_seq = n_seq
        self._tokens: list[list[int]] = [[] for _ in range(n_seq)]
        super().__init__(model_path, **options)

    def _adjust_context_params(self, params: Any) -> None:
        params.n_seq_max, params.kv_unified = self.n_seq, False

    def read(self, sequence: int, tokens: Sequence[int], *, copy: bool = True) -> Any:
        """Evaluate tokens of one sequence, in batches of n_batch; logits of the last, float32 [vocabulary]. `copy` and errors as of `step`."""
        self._check_sequences([(sequence, token) for token in tokens])
        if not len(tokens):
            raise SettingsError("There is nothing to read: give at least one token.")
        for start in range(0, len(tokens), self.n_batch):
            batch = tokens[start : start + self.n_batch]
            last = start + len(batch) == len(tokens)
            logits = self._decode([(sequence, token) for token in batch], int(last), copy)
        return logits[0]

    def step(self, tokens: Sequence[tuple[int, int]], *, copy: bool = True) -> Any:
        """Evaluate tokens of some sequences together, given as (sequence, token), at most n_batch; logits of each, float32 [n, vocabulary].

        Without `copy` they are the context's own, which the next evaluation and close() take away.
        Sequences whose numbers follow one another are computed at once; a gap between them makes it two computations. Raises SettingsError for
        what is no token or no sequence, ContextError if a sequence is full or llama.cpp fails.
        """
        if len(tokens) > self.n_batch:
            raise SettingsError(f"{len(tokens)} tokens are more than a batch holds; n_batch is {self.n_batch}.")
        self._check_sequences(tokens)
        rising = sorted(range(len(tokens)), key=lambda i: tokens[i][0])  # in any other order llama.cpp cuts the batch, down to single tokens
        logits = self._decode([tokens[i] for i in rising], len(tokens), copy)
        return logits if rising == list(range(len(tokens))) else logits[np.argsort(rising)]

    def copy(self, source: int, target: int) -> None:
        """Let a sequence hold what another holds, in place of what it held: the same packed pages, and what the cache has learnt of the queries.

        Raises SettingsError for what is no sequence.
        """
        self._check_ready()
        self._check_sequence(source)
        self._check_sequence(target)
        if source == target:
            return
        with self._evaluating:
            self._remove_cells(target, -1, -1)
            self._copy_cells(source, target, -1, -1)
            self.n_tokens += len(self._tokens[source]) - len(self._tokens[target])
            self._tokens[target] = list(self._tokens[source])

    def forget(self, sequence: int) -> None:
        """Empty a sequence. What the cache has learnt of its queries is forgotten as well; its memory is used again by what is read next."""
        self._check_ready()
        self._check_sequence(sequence)
        with self._evaluating:
            self._remove_cells(sequence, -1, -1)
            self.n_tokens -= len(self._tokens[sequence])
            self._tokens[sequence] = []

    def reset(self) -> None:
        """Forget the tokens of all sequences and give their memory back."""
        super().reset()
        for sequence in range(self.n_seq):  # llama.cpp's own cache still holds them
            self._remove_cells(sequence, -1, -1)
        self._tokens = [[] for _ in range(self.n_seq)]

    def kv_stats(self) -> dict[str, Any]:
        """As `Llama.kv_stats`, of one sequence: its share of what all take. Raises ContextError after close()."""
        stats = super().kv_stats()
        if self.stock is None:
            stats["n_cells"] //= self.n_seq
        elif stats["n_cells"]:
            stats["bytes_used"] = round(stats["bytes"] * min(1.0, self.n_tokens / (stats["n_cells"] * self.n_seq)))
        return {key: value // self.n_seq if key == "elements" or key.startswith("bytes") else value for key, value in stats.items()}

    def load_state(self, state: Any) -> None:
        """Raises ContextError: a state of `llama_cpp.Llama` holds one sequence."""
        raise ContextError(_BY_SEQUENCE)

    def save_state(self, packed: bool = True) -> Any:
        """Raises ContextError, as `load_state`."""
        raise ContextError(_BY_SEQUENCE)

    def save_file(self, path: str | os.PathLike[str], sequence: int = 0) -> int:
        """As `Llama.save_file`, of one sequence."""
        self._check_ready()
        self._check_sequence(sequence)
        with self._evaluating:
            return states.to_file(path, self, self._tokens[sequence], sequence)

    def load_file(self, path: str | os.PathLike[str], sequence: int = 0) -> int:
        """As `Llama.load_file`, into one sequence, whichever it was saved from, in a context of as many sequences; the others stay."""
        self._check_ready()
        self._check_sequence(sequence)
        with self._evaluating:
            tokens = states.from_file(path, self, sequence).tolist()
            self.n_tokens += len(tokens) - len(self._tokens[sequence])
            self._tokens[sequence] = tokens
            return len(tokens)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "n_seq": self.n_seq, "n_ctx": state["n_ctx"] // self.n_seq}

    def _evaluate(self, tokens: Sequence[int], n_logits: int) -> None:
        raise ContextError(_BY_SEQUENCE)

    def _check_sequence(self, sequence: int) -> None:
        if not 0 <= sequence < self.n_seq:
            raise SettingsError(f"There is no sequence {sequence}; they are numbered from 0 to {self.n_seq - 1}.")

    def _check_sequences(self, tokens: Sequence[tuple[int, int]]) -> None:
        self._check_tokens([token for _, token in tokens])
        most = self.n_ctx() // self.n_seq
        for sequence, n in Counter(sequence for sequence, _ in tokens).items():
            self._check_sequence(sequence)
            if len(self._tokens[sequence]) + n > most:
                raise ContextError(f"{n} tokens do not fit behind the {len(self._tokens[sequence])} of sequence {sequence} in a context of {most}.")

    def _decode(self, tokens: Sequence[tuple[int, int]], n_logits: int, copy: bool) -> Any:
        """One batch; logits of its last tokens."""
        with self._evaluating:
            self._advance(tokens, range(len(tokens) - n_logits, len(tokens)))
            return self._logits(n_logits) if copy or not n_logits else self._outputs(n_logits)

    def _advance(self, tokens: Sequence[tuple[int, int]], rows: Collection[int]) -> None:
        """One batch, of which the tokens in these places get logits."""
        n = len(tokens)
        with self._evaluating:
            ends, cells = [len(each) for each in self._tokens], []
            for sequence, token in tokens:
                cells.append((sequence, ends[sequence], token))
                ends[sequence] += 1
            try:
                if n:
                    with computing():
                        self._decode_cells(cells, rows)
            except RuntimeError as e:
                failure = self._failure(e, n)
                raise failure from failure.__cause__
            for sequence, token in tokens:
                self._tokens[sequence].append(int(token))
            self.n_tokens += n


_BY_SEQUENCE = "A context of several sequences evaluates them by `read` and `step`."
