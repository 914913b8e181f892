"""What the endpoints share: the engine, the model's name and template, and how a request becomes events of this loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from bridge.engine import Done, Engine, Event, Failed, Job, Request, Sampling

from .embedder import Embedder
from .errors import ApiError, too_long
from .metrics import Metrics
from .prompts import Prompts

T = TypeVar("T")
KEEP_ALIVE = 15.0  # seconds without an event after which a stream gets a comment, so that nobody in between closes it


@dataclass
class Service:
    """A model that is served. engine: None where it is served for its embeddings only; embedder: None where it is not.

    max_tokens: longest answer where a request names none, -1 up to the end of the stream. timeout: seconds that a request may take, None: any.
    thinking: whether thinking is told from the answer where a request does not say.
    """

    name: str
    path: str
    engine: Engine | None
    prompts: Prompts
    embedder: Embedder | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = -1
    timeout: float | None = None
    slots: Path | None = None  # where /slots saves
    shows_slots: bool = True
    shows_metrics: bool = False
    thinking: bool = True
    created: int = field(default_factory=lambda: int(time.time()))
    facts: dict[str, Any] = field(default_factory=dict)  # of the model, for /v1/models and /props

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)

    @property
    def answering(self) -> Engine:
        """The engine. Raises ApiError where there is none."""
        if self.engine is None:
            raise ApiError(501, "This server makes embeddings only; start it without --embeddings for answers.", kind="not_supported_error")
        return self.engine

    async def tokens(self, text: str, *, special: bool = True, bos: bool = True) -> list[int]:
        """A text as tokens. special: whether texts of control tokens are those tokens. bos: whether it begins as the model's texts do."""
        llama = self.answering.llama
        begins = self.facts.get("bos_token") or ""
        bos = bos and not (begins and text.startswith(begins))
        return await run_in_threadpool(lambda: llama.tokenize(text.encode("utf-8"), add_bos=bos, special=special))

    async def asked(self, function: Callable[[], T]) -> T:
        """What a function gives that runs in the engine's thread between two batches."""
        return await asyncio.wrap_future(self.answering.call(function))

    async def run(self, requests: Sequence[Request]) -> Run:
        """Submit requests that belong together. Raises ApiError and BridgeError if one cannot be asked; none runs then."""
        engine = self.answering
        for request in requests:
            if len(request.tokens) >= engine.n_ctx:
                raise too_long(len(request.tokens), engine.n_ctx)
        run = Run(asyncio.get_running_loop(), len(requests))
        try:
            for i, request in enumerate(requests):
                request = replace(request, deadline=self.timeout)
                run.jobs.append(await run_in_threadpool(engine.submit, request, run.listener(i)))
        except BaseException:
            run.cancel()
            raise
        return run

    async def timings(self, done: Sequence[Done]) -> dict[str, Any]:
        """llama-server's figures of a request, and of the cache beside them.

        kv_bits: of an element. kv_tokens: in the request's streams. kv_mib: what all streams take. kv_f16_mib: what their tokens would in F16.
        """
        prompt, cached, generated = sum(d.prompt for d in done), sum(d.cached for d in done), sum(d.generated for d in done)
        read, prompt_s, answer_s = prompt - cached, sum(d.prompt_s for d in done), max((d.answer_s for d in done), default=0.0)
        found = {
            "cache_n": cached,
            "prompt_n": read,
            **_speed("prompt", read, prompt_s),
            "predicted_n": generated,
            **_speed("predicted", generated, answer_s),
        }
        return {**found, **await self.asked(lambda: self._cache(sorted({d.stream for d in done if d.stream >= 0})))}

    def _cache(self, streams: Sequence[int]) -> dict[str, Any]:
        llama = self.answering.llama
        stats = llama.kv_stats()
        cells, used = stats["n_cells"], stats["bytes_used"] * llama.n_seq
        tokens = sum(len(llama.tokens_of(i)) for i in range(llama.n_seq))
        f16 = stats["bytes_f16"] * tokens / cells if cells else 0
        return {
            "kv_bits": round(stats["total_bits"], 3),
            "kv_tokens": sum(len(llama.tokens_of(i)) for i in streams),
            "kv_mib": round(used / (1 << 20), 3),
            "kv_f16_mib": round(f16 / (1 << 20), 3),
        }


def _speed(name: str, n: int, seconds: float) -> dict[str, float]:
    ms = seconds * 1000
    return {
        f"{name}_ms": round(ms, 3),
        f"{name}_per_token_ms": round(ms / n, 3) if n else 0.0,
        f"{name}_per_second": round(n / seconds, 3) if seconds > 0 else 0.0,
    }


class Run:
    """Requests that run, and the events of all of them in the order in which they come."""

    def __init__(self, loop: asyncio.AbstractEventLoop, n: int) -> None:
        self.jobs: list[Job] = []
        self._loop, self._left = loop, n
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def listener(self, i: int) -> Callable[[Event], None]:
        """What hears of request i, in the engine's thread."""

        def listen(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (i, event))

        return listen

    def cancel(self) -> None:
        """End all of them before the next batch."""
        for job in self.jobs:
            job.cancel()

    async def events(self, may_be_stopped: bool = False) -> AsyncIterator[tuple[int, Event | None]]:
        """Request and event; None when nothing has happened for a while. When the iterator is closed, everything is cancelled. Raises what failed.

        may_be_stopped: whether an answer that somebody else has cancelled has ended as it should; otherwise that raises, too.
        """
        try:
            while self._left:
                try:
                    i, event = await asyncio.wait_for(self._events.get(), KEEP_ALIVE)
                except asyncio.TimeoutError:
                    yield -1, None
                    continue
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Done):
                    self._left -= 1
                    if event.reason == "cancelled" and not may_be_stopped:
                        raise ApiError(503, "The server ended before the answer did.", kind="unavailable_error", code="server_ended")
                yield i, event
        finally:
            self.cancel()
