"""How the next token is chosen: llama.cpp's own chain of samplers, one for each request, and a grammar beside it."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mixkvq.core.errors import ContextError, SettingsError

from .._compat import C, grammar_of_schema

LARGEST_GRAMMAR = 1 << 18  # characters
_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@dataclass(frozen=True)
class Sampling:
    """Settings of the samplers, with llama-server's defaults and meanings. temperature 0 takes the likeliest token.

    seed: of the random numbers, the same for the same answer. grammar: in GBNF; what does not follow it is not chosen.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    min_keep: int = 0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str = ""


def grammar_for(schema: Any) -> str:
    """The grammar of a JSON schema. Raises SettingsError if llama-cpp-python makes none of it."""
    try:
        return grammar_of_schema(json.dumps(schema))
    except Exception as e:  # a schema is a program of the user's, and what goes wrong in it is his to know
        why = "it is nested too deep" if isinstance(e, RecursionError) else f"{type(e).__name__}: {e}".rstrip(".")
        raise SettingsError(f"The JSON schema cannot be made into a grammar: {why[:300]}.") from None


class StuckError(ContextError):
    """No token of the vocabulary goes on as the grammar asks."""


class Sampler:
    """The samplers of one request. `close` frees them; the model must still be there then. Raises SettingsError for a grammar that is none."""

    def __init__(self, llama: Any, settings: Sampling) -> None:
        self._context, self._n_vocab = llama._context, llama.n_vocab()
        self._chain: Any = None
        self._grammar: Any = None
        self._candidates: Any = None
        self._vocabulary = llama._vocabulary
        if settings.grammar:
            self.follow(settings.grammar)
        self._chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())
        for sampler in self._samplers(llama, settings):
            C.llama_sampler_chain_add(self._chain, sampler)

    def follow(self, grammar: str) -> None:
        """From the next token on, choose what the grammar allows."""
        if len(grammar) > LARGEST_GRAMMAR:
            raise SettingsError(f"The grammar has {len(grammar)} characters; at most {LARGEST_GRAMMAR} are taken.")
        if "\0" in grammar or not grammar.strip():
            raise SettingsError("The grammar is empty, or not text.")
        found = C.llama_sampler_init_grammar(self._vocabulary, grammar.encode("utf-8", "replace"), b"root")
        if not found:
            raise SettingsError("llama.cpp does not understand the grammar; its notation is GBNF, with a rule root.")
        if self._grammar:
            C.llama_sampler_free(self._grammar)
        self._grammar = found

    def _samplers(self, llama: Any, s: Sampling) -> list[Any]:
        keep, found = max(0, s.min_keep), []
        if s.logit_bias:
            biases = (C.llama_logit_bias * len(s.logit_bias))(*(C.llama_logit_bias(token, bias) for token, bias in s.logit_bias.items()))
            found.append(C.llama_sampler_init_logit_bias(self._n_vocab, len(biases), biases))
        last = self.last_n(llama, s.repeat_last_n)
        if last and (s.repeat_penalty, s.frequency_penalty, s.presence_penalty) != (1.0, 0.0, 0.0):
            found.append(C.llama_sampler_init_penalties(self._n_vocab, last, s.repeat_penalty, s.frequency_penalty, s.presence_penalty))
        if s.dry_multiplier > 0:
            breakers = (ctypes.c_char_p * 4)(b"\n", b":", b'"', b"*")
            n = self.last_n(llama, s.dry_penalty_last_n)
            found.append(C.llama_sampler_init_dry(self._vocabulary, s.dry_multiplier, s.dry_base, s.dry_allowed_length, n, breakers, len(breakers)))
        if s.temperature <= 0:
            return [*found, C.llama_sampler_init_greedy()]
        if s.mirostat:
            found.append(C.llama_sampler_init_temp(s.temperature))
            if s.mirostat == 1:
                return [*found, C.llama_sampler_init_mirostat(self._n_vocab, s.seed, s.mirostat_tau, s.mirostat_eta, 100)]
            return [*found, C.llama_sampler_init_mirostat_v2(s.seed, s.mirostat_tau, s.mirostat_eta)]
        if s.top_n_sigma > 0:
            found.append(C.llama_sampler_init_top_n_sigma(s.top_n_sigma))
        if s.top_k > 0:
            found.append(C.llama_sampler_init_top_k(s.top_k))
        if s.typical_p < 1:
            found.append(C.llama_sampler_init_typical(s.typical_p, keep))
        if s.top_p < 1:
            found.append(C.llama_sampler_init_top_p(s.top_p, keep))
        if s.min_p > 0:
            found.append(C.llama_sampler_init_min_p(s.min_p, keep))
        if s.xtc_probability > 0:
            found.append(C.llama_sampler_init_xtc(s.xtc_probability, s.xtc_threshold, keep, s.seed))
        return [*found, C.llama_sampler_init_temp(s.temperature), C.llama_sampler_init_dist(s.seed)]

    @staticmethod
    def last_n(llama: Any, n: int) -> int:
        """How many last tokens a penalty looks at; -1 is the whole stream."""
        return int(llama.n_ctx() // llama.n_seq if n < 0 else n)

    def saw(self, tokens: Sequence[int]) -> None:
        """Tokens of the prompt, which penalties count."""
        for token in tokens:
            C.llama_sampler_accept(self._chain, token)

    def sample(self, row: int) -> int:
        """The next token, after the one at that place of the last batch. Raises StuckError."""
        if self._grammar is None:
            return int(C.llama_sampler_sample(self._chain, self._context, row))
        token = self._apply(row, first=None)
        if not self._allowed(token):  # seldom: only then is the grammar asked about every token
            token = self._apply(row, first=self._grammar)
        C.llama_sampler_accept(self._chain, token)
        C.llama_sampler_accept(self._grammar, token)
        return token

    def _apply(self, row: int, first: Any) -> int:
        if self._candidates is None:
            self._candidates = np.empty(self._n_vocab, _TOKEN)
        rows = self._candidates
        rows["id"] = np.arange(self._n_vocab)
        rows["logit"] = np.ctypeslib.as_array(C.llama_get_logits_ith(self._context, row), shape=(self._n_vocab,))
        array = _array(rows)
        if first is not None:
            C.llama_sampler_apply(first, ctypes.byref(array))
            if not np.isfinite(rows["logit"]).any():
                raise StuckError("No token of the vocabulary goes on as the grammar asks.")
            # Samplers that keep the likeliest few must find the few that are allowed among them, and nothing else.
            rows = rows[np.isfinite(rows["logit"])]
            array = _array(rows)
        C.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allowed(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], _TOKEN)
        C.llama_sampler_apply(self._grammar, ctypes.byref(_array(one)))
        return bool(np.isfinite(one["logit"][0]))

    def close(self) -> None:
        """Free the samplers; safe to call twice."""
        for sampler in (self._chain, self._grammar):
            if sampler:
                C.llama_sampler_free(sampler)
        self._chain = self._grammar = None


def _array(rows: Any) -> Any:
    """llama.h's llama_token_data_array over rows, which must stay meanwhile."""
    data = ctypes.cast(rows.ctypes.data, ctypes.POINTER(C.llama_token_data))
    return C.llama_token_data_array(data=data, size=len(rows), selected=-1, sorted=False)


def logprobs(logits: Any, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural logarithm of a token's probability, and the n likeliest tokens with theirs. logits: float32 [vocabulary]."""
    row = logits.astype(np.float64)
    row -= row.max()
    row -= np.log(np.exp(row).sum())
    n = min(n, len(row))
    best = np.argpartition(-row, n - 1)[:n] if n else np.empty(0, np.int64)
    best = best[np.argsort(-row[best], kind="stable")]
    return float(row[token]), [(int(i), float(row[i])) for i in best]
