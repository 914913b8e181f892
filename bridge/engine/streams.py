"""The context of an engine: several streams, whose beginnings can be used again where the model allows it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from .._compat import C
from ..sequences import Sequences


class Streams(Sequences):
    """A `Sequences` whose streams can be cut back to a prefix and copied.

    A state that is recurrent has no past: of such models (and hybrids) only a whole stream is a prefix. A sliding window has forgotten what left it.
    """

    def __init__(self, model_path: str, **options: Any) -> None:
        super().__init__(model_path, **options)
        self._pieces: dict[int, bytes] = {}
        self._goes_back = self._can_go_back()
        self._window = int(C.llama_model_n_swa(self._model_handle)) if not self.context_params.swa_full else 0
        self._shown: frozenset[int] = frozenset()  # control tokens whose text belongs to answers

    def tokens_of(self, stream: int) -> list[int]:
        """What a stream holds; not a copy."""
        return self._tokens[stream]

    def usable(self, stream: int, n: int) -> int:
        """How many of the first n tokens of a stream can be gone on from: n, or 0."""
        held = len(self._tokens[stream])
        if n >= held:
            return held
        if not self._goes_back:
            return 0
        first = int(C.llama_memory_seq_pos_min(C.llama_get_memory(self._context), stream)) if self._window else 0
        return n if first <= max(0, n - self._window) else 0

    def cut(self, stream: int, n: int) -> bool:
        """Keep the first n tokens of a stream. False if llama.cpp cannot; the stream is empty then."""
        tokens = self._tokens[stream]
        if n >= len(tokens):
            return True
        with self._evaluating:
            if not n or not self._removed(stream, n):
                self.forget(stream)
                return n == 0
            self.n_tokens -= len(tokens) - n
            del tokens[n:]
            return True

    def _removed(self, stream: int, n: int) -> bool:
        return bool(C.llama_memory_seq_rm(C.llama_get_memory(self._context), stream, n, -1))

    def copy_prefix(self, source: int, target: int, n: int) -> bool:
        """Let a stream hold the first n tokens of another, in place of what it holds. llama.cpp copies with the next batch."""
        with self._evaluating:
            self.copy(source, target)
            return self.cut(target, n)

    def advance(self, tokens: Sequence[tuple[int, int]], rows: Collection[int]) -> None:
        """One batch of (stream, token), at most n_batch; those in these places get logits. Raises as `step`, which says why streams should rise."""
        self._check_sequences(tokens)
        self._advance(tokens, rows)

    def piece(self, token: int) -> bytes:
        """The bytes of a token as an answer shows it."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._piece_of(token, token in self._shown)
        return found

    def show(self, texts: Iterable[str]) -> None:
        """Of control tokens: let those with these texts be seen in answers, because something is told by them."""
        found = (self.tokenize(text.encode(), add_bos=False, special=True) for text in texts)
        self._shown = frozenset(tokens[0] for tokens in found if len(tokens) == 1 and not self._piece_of(tokens[0], False))
        self._pieces.clear()

    def text_of(self, tokens: Iterable[int]) -> str:
        """The text of tokens, control tokens with theirs."""
        return b"".join(self._piece_of(token, True) for token in tokens).decode("utf-8", "replace")

    def begins_and_ends(self) -> tuple[str, str]:
        """The texts of the tokens that begin and end a text; "" where the model has none."""
        return self._special_text("bos"), self._special_text("eos")

    def logits_row(self, row: int) -> Any:
        """Logits at a place of the last batch, float32 [vocabulary]: the context's own, until the next one."""
        return self._logits_row(row)
