"""llama.cpp's own interface: /completion, /tokenize, /detokenize, /apply-template, /props."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from bridge.engine import Chosen, Done, Piece, Progress, Request

from .chat import limit_of, progress_of
from .completions import tokens_in
from .errors import bad
from .fields import Fields
from .prompts import messages_of
from .sampling import sampling_of
from .service import Run, Service
from .tools import tools_of

_STOPS = {"end": "eos", "word": "word", "limit": "limit", "full": "limit", "cancelled": "none", "stuck": "none"}


class Native:
    """A request of /completion that runs."""

    def __init__(self, service: Service, run: Run, request: Request, fields: Fields) -> None:
        self.service, self.run, self._request = service, run, request
        self._prompt = fields.get("prompt")
        self._wants_tokens = fields.flag("return_tokens")
        self._text = ""
        self._chosen: list[Chosen] = []

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        last: dict[str, Any] = {}
        async for chunk in self.chunks():
            last = chunk or last
        probabilities = {"completion_probabilities": _probabilities(self._chosen)} if self._request.logprobs else {}
        tokens = [c.token for c in self._chosen] if self._wants_tokens else []
        return {**last, "content": self._text, "tokens": tokens, **probabilities}

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """The answer as it comes; the last has all the figures."""
        async for _, event in self.run.events():
            if event is None:
                yield None
            elif isinstance(event, Progress):
                yield {"index": 0, "content": "", "tokens": [], "stop": False, "id_slot": -1, "prompt_progress": progress_of(event)}
            elif isinstance(event, Piece):
                self._text += event.text
                self._chosen += event.tokens
                more = {"completion_probabilities": _probabilities(event.tokens)} if self._request.logprobs else {}
                tokens = [c.token for c in event.tokens] if self._wants_tokens else []
                yield {"index": 0, "content": event.text, "tokens": tokens, "stop": False, "id_slot": self.run.jobs[0].stream, **more}
            elif isinstance(event, Done):
                yield await self._last(event)

    async def _last(self, done: Done) -> dict[str, Any]:
        return {
            "index": 0,
            "content": "",
            "tokens": [],
            "id_slot": done.stream,
            "stop": True,
            "model": self.service.name,
            "tokens_predicted": done.generated,
            "tokens_evaluated": done.prompt,
            "generation_settings": settings_of(self._request, self.service.answering.n_ctx),
            "prompt": self._prompt,
            "has_new_line": "\n" in self._text,
            "truncated": done.reason == "full",
            "stop_type": _STOPS[done.reason],
            "stopping_word": done.word,
            "tokens_cached": done.prompt + max(0, done.generated - 1),
            "timings": await self.service.timings([done]),
        }


def settings_of(request: Request, n_ctx: int) -> dict[str, Any]:
    """What an answer was made with, by llama-server's names."""
    sampling = {key: value for key, value in dataclasses.asdict(request.sampling).items() if key != "logit_bias"}
    more = {"n_predict": request.max_tokens, "stop": list(request.stop), "ignore_eos": request.ignore_end, "n_probs": request.logprobs or 0}
    biases = [[token, bias if bias > float("-inf") else False] for token, bias in request.sampling.logit_bias.items()]
    return {"n_ctx": n_ctx, **sampling, "logit_bias": biases, **more}


def _probabilities(tokens: Sequence[Chosen]) -> list[dict[str, Any]]:
    def one(token: int, text: bytes, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": text.decode("utf-8", "replace"), "bytes": list(text), "logprob": logprob}

    return [{**one(c.token, c.text, c.logprob), "top_logprobs": [one(*row) for row in c.top]} for c in tokens]


async def native(service: Service, fields: Fields) -> Native:
    """A request of /completion, submitted. Raises ApiError and BridgeError."""
    prompt = fields.get("prompt")
    if prompt is None or (isinstance(prompt, list) and any(isinstance(part, list) for part in prompt)):
        raise bad("prompt must be a text, or one list of texts and tokens.", "prompt")
    probabilities = fields.whole("n_probs", 0, 0, 100)
    slot = fields.whole("id_slot", -1, -1, 1 << 16)
    limit = fields.number("t_max_predict_ms", -1)
    request = Request(
        tokens=await tokens_in(service, prompt, "prompt"),
        sampling=sampling_of(fields, service.sampling),
        max_tokens=limit_of(service, fields, "n_predict", "max_tokens"),
        stop=fields.words("stop"),
        logprobs=probabilities or None,
        ignore_end=fields.flag("ignore_eos"),
        stream=None if slot < 0 else slot,
        reuse=fields.flag("cache_prompt", True),
        progress=fields.flag("return_progress"),
        time_limit=limit / 1000 if limit > 0 else None,
    )
    return Native(service, await service.run([request]), request, fields)


async def tokenize(service: Service, fields: Fields) -> dict[str, Any]:
    """llama-server's: add_special is false unless asked for, parse_special true; with_pieces gives each token's text, or its bytes."""
    llama = service.answering.llama
    tokens = await service.tokens(fields.text("content"), special=fields.flag("parse_special", True), bos=fields.flag("add_special"))
    if not fields.flag("with_pieces"):
        return {"tokens": tokens}
    rows: list[dict[str, Any]] = []
    for token in tokens:
        text = llama.piece(token)
        try:
            rows.append({"id": token, "piece": text.decode("utf-8")})
        except UnicodeDecodeError:
            rows.append({"id": token, "piece": list(text)})
    return {"tokens": rows}


async def detokenize(service: Service, fields: Fields) -> dict[str, Any]:
    """The text of tokens, control tokens with theirs."""
    tokens = await tokens_in(service, fields.rows("tokens"), "tokens") if fields.rows("tokens") else []
    return {"content": service.answering.llama.text_of(tokens)}


async def apply_template(service: Service, fields: Fields) -> dict[str, Any]:
    """The prompt of a chat."""
    messages = messages_of(fields, service.prompts.template)
    options = fields.record("chat_template_kwargs")
    return {"prompt": service.prompts.text(messages, tools_of(fields), options.values if options else None)}


async def props(service: Service) -> dict[str, Any]:
    """What a client wants to know of the server."""
    engine = service.engine
    n_ctx = engine.n_ctx if engine is not None else 0
    request = Request([0], service.sampling, service.max_tokens)
    return {
        "default_generation_settings": {"id": 0, "n_ctx": n_ctx, "params": settings_of(request, n_ctx)},
        "total_slots": engine.llama.n_seq if engine is not None else 0,
        "model_alias": service.name,
        "model_path": service.path,
        "modalities": {"vision": False, "audio": False},
        "chat_template": service.prompts.template,
        "bos_token": service.facts.get("bos_token", ""),
        "eos_token": service.facts.get("eos_token", ""),
        "build_info": service.facts.get("build", ""),
        "cache": service.facts.get("cache", {}),
    }
