"""/v1/completions: texts that go on."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from bridge.engine import Chosen, Done, Piece, Progress, Request

from .chat import limit_of, progress_of, usage_of
from .errors import bad
from .fields import Fields
from .sampling import format_grammar, sampling_of
from .service import Run, Service
from .tools import new_id

MOST_PROMPTS = 64
DEFAULT_TOKENS = 16  # OpenAI's


class Completion:
    """A request that runs: n answers to each prompt, in order."""

    def __init__(self, service: Service, run: Run, requests: Sequence[Request], heads: Sequence[str], fields: Fields) -> None:
        self.service, self.run, self._requests = service, run, requests
        self._texts = list(heads)  # what the answer begins with: the prompt, with echo
        self._heads = list(heads)
        self._chosen: list[list[Chosen]] = [[] for _ in requests]
        self._done: dict[int, Done] = {}
        options = fields.record("stream_options")
        self._usage = options is not None and options.flag("include_usage")
        self._head = {"id": new_id("cmpl").replace("_", "-"), "object": "text_completion", "created": int(time.time()), "model": service.name}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async for i, event in self.run.events():
            if isinstance(event, Piece):
                self._texts[i] += event.text
                self._chosen[i] += event.tokens
            elif isinstance(event, Done):
                self._done[i] = event
        rows = [self._row(i, text, self._chosen[i], self._done[i]) for i, text in enumerate(self._texts)]
        done = list(self._done.values())
        return {**self._head, "choices": rows, "usage": usage_of(done), "timings": await self.service.timings(done)}

    def _row(self, i: int, text: str, tokens: Sequence[Chosen], done: Done | None) -> dict[str, Any]:
        logprobs = _logprobs(tokens, len(self._heads[i])) if self._requests[i].logprobs is not None and tokens else None
        reason = None if done is None else "length" if done.reason in ("limit", "full") else "stop"
        return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": reason}

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """The answer as it comes."""
        for i, head in enumerate(self._heads):
            if head:
                yield {**self._head, "choices": [self._row(i, head, [], None)]}
        async for i, event in self.run.events():
            if event is None:
                yield None
            elif isinstance(event, Progress):
                yield {**self._head, "choices": [self._row(i, "", [], None)], "prompt_progress": progress_of(event)}
            elif isinstance(event, Piece):
                yield {**self._head, "choices": [self._row(i, event.text, event.tokens, None)]}
            elif isinstance(event, Done):
                self._done[i] = event
                yield {**self._head, "choices": [self._row(i, "", [], event)], "timings": await self.service.timings([event])}
        if self._usage:
            yield {**self._head, "choices": [], "usage": usage_of(list(self._done.values()))}


def _logprobs(tokens: Sequence[Chosen], offset: int) -> dict[str, Any]:
    """As completions have them."""
    texts, offsets = [], []
    for c in tokens:
        texts.append(c.text.decode("utf-8", "replace"))
        offsets.append(offset)
        offset += len(texts[-1])
    top = [{text.decode("utf-8", "replace"): p for _, text, p in c.top} for c in tokens]
    return {"tokens": texts, "token_logprobs": [c.logprob for c in tokens], "top_logprobs": top, "text_offset": offsets}


async def completion(service: Service, fields: Fields) -> Completion:
    """A request for completions, submitted. Raises ApiError and BridgeError."""
    n = fields.whole("n", 1, 1, 16)
    if fields.whole("best_of", n, 1, 16) != n:
        raise bad("best_of must be n: this server gives every answer that it makes.", "best_of")
    if fields.text("suffix"):
        raise bad("suffix is not served; put the model's own marks for filling in into the prompt.", "suffix")
    prompts = await prompts_of(service, fields)
    echo = fields.flag("echo")
    logprobs = None if fields.get("logprobs") in (None, False) else fields.whole("logprobs", 0, 0, 20)
    if echo and logprobs is not None:
        raise bad("echo and logprobs do not go together here: this server has no probabilities of the prompt.", "echo")
    most = limit_of(service, fields, "max_tokens", "n_predict") if fields.get("max_tokens", "n_predict") is not None else DEFAULT_TOKENS
    sampling = sampling_of(fields, service.sampling, format_grammar(fields.record("response_format")))
    requests, heads = [], []
    for tokens in prompts:
        for i in range(n):
            mine = replace(sampling, seed=(sampling.seed + i) % (1 << 32))
            ignore = fields.flag("ignore_eos")
            requests.append(Request(tokens, mine, most, fields.words("stop"), logprobs, ignore, progress=fields.flag("return_progress")))
            pieces = b"".join(service.answering.llama.piece(t) for t in tokens) if echo else b""
            heads.append(pieces.decode("utf-8", "replace"))
    return Completion(service, await service.run(requests), requests, heads, fields)


async def prompts_of(service: Service, fields: Fields, key: str = "prompt") -> list[list[int]]:
    """The prompts of a request as tokens: a text, tokens, or a list of such, in which texts and tokens may stand side by side (llama-server's)."""
    value = fields.get(key)
    if isinstance(value, str):
        return [await service.tokens(value)]
    if isinstance(value, list) and value and len(value) <= 1 << 22:
        if any(isinstance(part, list) for part in value) or (all(isinstance(part, str) for part in value) and key == "prompt"):
            if len(value) > MOST_PROMPTS:
                raise bad(f"{key} holds {len(value)} prompts; at most {MOST_PROMPTS} are taken.", key)
            return [await tokens_in(service, part, f"{key}[{i}]") for i, part in enumerate(value)]
        return [await tokens_in(service, value, key)]
    raise bad(f"{key} must be a text, a list of tokens, or a list of such.", key)


async def tokens_in(service: Service, value: Any, name: str) -> list[int]:
    """One prompt: a text, a token, or a list in which they stand side by side. Raises ApiError with the field's name."""
    found: list[int] = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str):
            found += await service.tokens(part, bos=not found)
        elif isinstance(part, int) and not isinstance(part, bool) and 0 <= part < service.answering.llama.n_vocab():
            found.append(part)
        else:
            raise bad(f"{name} holds {str(part)[:40]!r}, which is neither a text nor a token of the vocabulary.", name)
    return found
