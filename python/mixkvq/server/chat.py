"""/v1/chat/completions, and what /v1/responses shares with it: from messages to requests, from events to messages."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bridge.engine import Chosen, Done, Piece, Progress, Request

from .errors import bad
from .fields import Fields
from .output import Delta, Reader, opens_thinking
from .prompts import messages_of
from .sampling import format_grammar, grammar_of, sampling_of
from .service import Run, Service
from .tools import Call, Tools, grammar, new_id, tools_of

MOST_CHOICES = 16
MOST_LOGPROBS = 20


@dataclass
class Plan:
    """A chat that is to be answered: the requests, and how what comes is read."""

    requests: list[Request]
    prompt: str
    tools: Tools
    thinking: bool
    ends: str | None  # what ends the thinking that the prompt has begun

    def reader(self, service: Service) -> Reader:
        """For one answer."""
        form = service.prompts.form if self.tools.choice != "none" else None
        return Reader(form, [f["name"] for f in self.tools.functions], thinking=self.thinking, ends=self.ends)


async def plan(service: Service, fields: Fields, messages: list[dict[str, Any]], tools: Tools, form: Fields | None, max_tokens: int, n: int) -> Plan:
    """form: OpenAI's response_format. Raises ApiError and BridgeError."""
    prompts, defaults = service.prompts, service.sampling
    options = fields.record("chat_template_kwargs")
    prompt = prompts.text(messages, tools, options.values if options else None)
    forced = grammar(prompts.form, tools) if tools.forced else format_grammar(form) or grammar_of(fields)
    if forced:
        prompt = prompts.closes_thinking(prompt)
    sampling = sampling_of(fields, defaults, forced)
    lazily = tools.choice == "auto" and not forced and not prompts.form.whole
    logprobs = fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS) if fields.flag("logprobs") else None
    request = Request(
        tokens=await service.tokens(prompt),
        sampling=sampling,
        max_tokens=max_tokens,
        stop=fields.words("stop"),
        logprobs=logprobs,
        ignore_end=fields.flag("ignore_eos"),
        trigger=prompts.form.start if lazily else "",
        triggered=grammar(prompts.form, tools, started=True) if lazily else "",
        stream=_slot(fields),
        reuse=fields.flag("cache_prompt", True),
        progress=fields.flag("return_progress"),
        time_limit=_seconds(fields),
    )
    requests = [replace(request, sampling=replace(sampling, seed=(sampling.seed + i) % (1 << 32))) for i in range(n)]
    thinking = fields.text("reasoning_format", "auto" if service.thinking else "none") != "none"
    return Plan(requests, prompt, tools, thinking, opens_thinking(prompt) if thinking else None)


def _slot(fields: Fields) -> int | None:
    slot = fields.whole("id_slot", -1, -1, 1 << 16)
    return None if slot < 0 else slot


def _seconds(fields: Fields) -> float | None:
    limit = fields.number("t_max_predict_ms", -1)
    return limit / 1000 if limit > 0 else None


def limit_of(service: Service, fields: Fields, *names: str) -> int:
    """Longest answer: the first of these fields that is there."""
    for name in names:
        if fields.get(name) is not None:
            return fields.whole(name, -1, -1)
    return service.max_tokens


# --- one answer, as it comes ------------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """One of the answers of a request."""

    reader: Reader
    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    done: Done | None = None

    def add(self, event: Piece | Done) -> list[Delta]:
        """What comes of an event."""
        if isinstance(event, Piece):
            self.chosen += event.tokens
            deltas = self.reader.feed(event.text)
        else:
            self.done = event
            deltas = self.reader.end()
        for delta in deltas:
            if delta.call is not None:
                self.calls.append(delta.call)
            elif delta.kind == "reasoning":
                self.reasoning += delta.text
            else:
                self.content += delta.text
        return deltas

    @property
    def reason(self) -> str:
        """OpenAI's finish_reason."""
        assert self.done is not None
        if self.done.reason in ("limit", "full"):
            return "length"
        return "tool_calls" if self.calls else "stop"


def logprobs_of(tokens: Sequence[Chosen]) -> dict[str, Any]:
    """As chat completions have them."""

    def one(text: bytes, logprob: float) -> dict[str, Any]:
        return {"token": text.decode("utf-8", "replace"), "bytes": list(text), "logprob": logprob}

    rows = [{"id": c.token, **one(c.text, c.logprob), "top_logprobs": [{"id": t, **one(text, p)} for t, text, p in c.top]} for c in tokens]
    return {"content": rows, "refusal": None}


def usage_of(done: Sequence[Done]) -> dict[str, Any]:
    """OpenAI's usage: the prompt counts once, however many answers it has."""
    prompt, generated = max((d.prompt for d in done), default=0), sum(d.generated for d in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": max((d.cached for d in done), default=0)},
    }


def progress_of(event: Progress) -> dict[str, Any]:
    """llama-server's prompt_progress."""
    return {"total": event.total, "cache": event.cached, "processed": event.read, "time_ms": round(event.seconds * 1000)}


# --- /v1/chat/completions ---------------------------------------------------------------------------------------------------------


class Chat:
    """A request for chat completions that runs."""

    def __init__(self, service: Service, run: Run, plan: Plan, fields: Fields) -> None:
        self.service, self.run, self.plan = service, run, plan
        self.choices = [Choice(plan.reader(service)) for _ in plan.requests]
        options = fields.record("stream_options")
        self._usage = options is not None and options.flag("include_usage")
        self._head = {"id": new_id("chatcmpl").replace("_", "-"), "created": int(time.time()), "model": service.name}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        async for i, event in self.run.events():
            if isinstance(event, (Piece, Done)):
                self.choices[i].add(event)
        done = [choice.done for choice in self.choices if choice.done is not None]
        rows = [self._row(i, choice) for i, choice in enumerate(self.choices)]
        timings = await self.service.timings(done)
        return {**self._head, "object": "chat.completion", "choices": rows, "usage": usage_of(done), "timings": timings}

    def _row(self, i: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content if choice.content or not choice.calls else None, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.calls:
            message["tool_calls"] = [call.as_dict() for call in choice.calls]
        logprobs = logprobs_of(choice.chosen) if self.plan.requests[i].logprobs is not None else None
        return {"index": i, "message": message, "logprobs": logprobs, "finish_reason": choice.reason}

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """The answer as it comes; None to keep the connection open."""
        for i in range(len(self.choices)):
            yield self._chunk(i, {"role": "assistant", "content": ""})
        async for i, event in self.run.events():
            if event is None:
                yield None
            elif isinstance(event, Progress):
                yield {**self._chunk(i, {}), "prompt_progress": progress_of(event)}
            elif isinstance(event, (Piece, Done)):
                for chunk in self._of(i, event):
                    yield chunk
                if isinstance(event, Done):
                    last = self._chunk(i, {}, self.choices[i].reason)
                    yield {**last, "timings": await self.service.timings([event])}
        if self._usage:
            done = [choice.done for choice in self.choices if choice.done is not None]
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage_of(done)}

    def _of(self, i: int, event: Piece | Done) -> list[dict[str, Any]]:
        choice = self.choices[i]
        n_calls = len(choice.calls)
        found = []
        for delta in choice.add(event):
            if delta.call is not None:
                call = {"index": n_calls, **delta.call.as_dict()}
                n_calls += 1
                found.append(self._chunk(i, {"tool_calls": [call]}))
            else:
                found.append(self._chunk(i, {"reasoning_content" if delta.kind == "reasoning" else "content": delta.text}))
        if isinstance(event, Piece) and self.plan.requests[i].logprobs is not None:
            found = found or [self._chunk(i, {"content": ""})]
            found[0]["choices"][0]["logprobs"] = logprobs_of(event.tokens)
        return found

    def _chunk(self, i: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


async def chat(service: Service, fields: Fields) -> Chat:
    """A request for chat completions, submitted. Raises ApiError and BridgeError."""
    n = fields.whole("n", 1, 1, MOST_CHOICES)
    most = limit_of(service, fields, "max_completion_tokens", "max_tokens", "n_predict")
    if fields.flag("logprobs") is False and fields.get("top_logprobs"):
        raise bad("top_logprobs goes together with logprobs: true.", "top_logprobs")
    tools = tools_of(fields)
    messages = messages_of(fields, service.prompts.template)
    planned = await plan(service, fields, messages, tools, fields.record("response_format"), most, n)
    return Chat(service, await service.run(planned.requests), planned, fields)
