"""What is asked of the engine, and how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .events import Chosen, Done, Event, Failed
from .sampling import Sampler, Sampling
from .stopping import Writer


@dataclass(frozen=True)
class Request:
    """One answer to a prompt.

    tokens: the prompt. max_tokens: longest answer, -1 up to the end of the stream. stop: strings that end it, and are no part of it. logprobs: of how
    many likeliest tokens, None for none. trigger, triggered: once the answer ends in the first, it follows the second, a grammar. stream: the one
    to use, or None for the best. reuse: whether what a stream or file holds of the prompt is gone on from. time_limit: seconds that answering may
    take, then it ends as at max_tokens; deadline: seconds that everything may take, then it fails.
    """

    tokens: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = -1
    stop: Sequence[str] = ()
    logprobs: int | None = None
    ignore_end: bool = False
    trigger: str = ""
    triggered: str = ""
    stream: int | None = None
    reuse: bool = True
    progress: bool = False
    time_limit: float | None = None
    deadline: float | None = None


class Job:
    """A request that the engine has taken. `cancel` may be called from any thread; all else is the engine's."""

    def __init__(self, request: Request, sampler: Sampler, listen: Callable[[Event], None], number: int) -> None:
        self.request, self.sampler, self.number = request, sampler, number
        self.prompt = list(request.tokens)
        self.writer = Writer(request.stop)
        self.stream = -1  # none yet
        self.read = self.cached = 0  # tokens of the prompt
        self.next: int | None = None  # token that was chosen and is not evaluated yet
        self.generated = 0
        self.text = ""  # the end of it, for the trigger
        self.asked = time.monotonic()
        self.began = self.answering = 0.0
        self.ended = threading.Event()
        self._listen, self._cancelled = listen, False

    def cancel(self) -> None:
        """End the request before the next batch."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked for that."""
        return self._cancelled

    def tell(self, event: Event) -> None:
        """A listener that fails is no longer interested."""
        try:
            self._listen(event)
        except Exception:  # noqa: BLE001 - whatever it is, the other requests go on
            self._cancelled = True

    def take(self, chosen: Chosen) -> bool:
        """A token of the answer; whether a stop string ends it."""
        piece = self.writer.add(chosen)
        if piece is not None:
            self.tell(piece)
        return bool(self.writer.word)

    def end(self, reason: str) -> None:
        """The last event of an answer."""
        now = time.monotonic()
        if not self.writer.word and (rest := self.writer.end()) is not None:
            self.tell(rest)
        began = self.began or now
        answering = self.answering or now
        self._finish(
            Done(
                *(reason, self.writer.word, self.stream, len(self.prompt), self.cached, self.generated),
                *(began - self.asked, answering - began, now - answering),
            )
        )

    def fail(self, error: Exception) -> None:
        """The last event of a request that failed."""
        self._finish(Failed(error))

    def _finish(self, event: Event) -> None:
        self.sampler.close()
        self.tell(event)
        self.ended.set()
