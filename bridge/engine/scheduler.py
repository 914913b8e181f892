"""The engine: one thread that owns a context, and answers several requests at once, a batch after the other."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from mixkvq.core.errors import BusyError, ContextError, SettingsError, TimeLimitError

from .events import Answer, Chosen, Done, Event, Failed, Progress
from .parking import LEAST, Parking
from .prefixes import LEAST_GAIN, Begin, choose, common, spare
from .requests import Job, Request
from .sampling import Sampler, StuckError, logprobs
from .streams import Streams

T = TypeVar("T")
LONGEST_QUEUE = 256
PAUSE = 0.3
_LEAST_CHUNK = 16  # tokens of prompts in a batch
_IDLE = 2.0  # seconds without a request after which chats are parked

logger = logging.getLogger(__name__)


class Engine:
    """Answers requests on the streams of a context. Every method may be called from any thread.

    llama: the context, which is the engine's from now on; `close` frees it. parking: where chats go that no stream holds any more. longest_queue:
    requests that may wait for a stream; further ones get a BusyError. pause: seconds that a batch should take at most while requests run beside each
    other; a prompt alone is read in whole batches.
    """

    def __init__(self, llama: Streams, *, parking: Parking | None = None, longest_queue: int = LONGEST_QUEUE, pause: float = PAUSE) -> None:
        self.llama, self.longest_queue, self.pause = llama, longest_queue, pause
        self.parking = parking.of(llama) if parking is not None else None
        self.n_ctx = llama.n_ctx() // llama.n_seq  # of a stream
        self.totals = {"requests": 0, "failed": 0, "prompt": 0, "cached": 0, "generated": 0, "batches": 0, "parked": 0, "resumed": 0}
        self.seconds = {"prompt": 0.0, "answer": 0.0}
        self._wake = threading.Condition()
        self._waiting: list[Job] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._jobs: dict[int, Job] = {}  # by stream
        self._used = [0.0] * llama.n_seq  # when a stream was used last
        self._unparked: set[int] = set()  # streams with tokens that no file has
        self._copying = False  # until the next batch
        self._rate = 0.0  # prompt tokens read per second, lately
        self._closing = False
        self._number = 0
        self._thread = threading.Thread(target=self._run, name="mixkvq-engine", daemon=True)
        self._thread.start()

    # --- for any thread ---

    def submit(self, request: Request, listen: Callable[[Event], None]) -> Job:
        """Take a request; `listen` hears of it in the engine's thread, the last event is a `Done` or a `Failed`.

        Raises SettingsError for what is no prompt or no grammar, ContextError if the prompt does not fit, BusyError if too many wait.
        """
        self._check(request)
        job = Job(request, Sampler(self.llama, request.sampling), listen, 0)
        try:
            last = Sampler.last_n(self.llama, request.sampling.repeat_last_n)
            job.sampler.saw(job.prompt[-last:] if last else [])
            with self._wake:
                if self._closing:
                    raise ContextError("The engine is closed.")
                if len(self._jobs) + len(self._waiting) >= self.llama.n_seq + self.longest_queue:
                    raise BusyError(f"All streams are busy, and as many requests wait as may, {self.longest_queue}; try again later.")
                self._number += 1
                job.number = self._number
                self.totals["requests"] += 1
                self._waiting.append(job)
                self._wake.notify()
        except BaseException:
            job.sampler.close()
            raise
        return job

    def _check(self, request: Request) -> None:
        n_vocab = self.llama.n_vocab()
        if not len(request.tokens):
            raise SettingsError("The prompt is empty; there is nothing to answer.")
        for token in request.tokens:
            if not isinstance(token, int) or not 0 <= token < n_vocab:
                raise SettingsError(f"Token {token!r} is not in the vocabulary; tokens are numbers from 0 to {n_vocab - 1}.")
        for token in request.sampling.logit_bias:
            if not 0 <= token < n_vocab:
                raise SettingsError(f"Token {token!r} of logit_bias is not in the vocabulary; tokens are numbers from 0 to {n_vocab - 1}.")
        if len(request.tokens) >= self.n_ctx:
            raise ContextError(f"The prompt has {len(request.tokens)} tokens, and the context {self.n_ctx}, of which an answer needs one at least.")
        if request.stream is not None and not 0 <= request.stream < self.llama.n_seq:
            raise SettingsError(f"There is no stream {request.stream}; they are numbered from 0 to {self.llama.n_seq - 1}.")

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of a request, as they come; an iterator that is closed early cancels it. Raises as `submit`."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        job = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if isinstance(event, (Done, Failed)):
                    return
        finally:
            job.cancel()

    def answer(self, request: Request) -> Answer:
        """The whole answer. Raises as `submit`, and what the request failed with."""
        answer = Answer()
        for event in self.stream(request):
            answer.add(event)
        return answer

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function in the engine's thread between two batches. Raises ContextError after `close`."""
        future: Future[T] = Future()
        with self._wake:
            if self._closing:
                raise ContextError("The engine is closed.")
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        with self._wake:
            return len(self._jobs), len(self._waiting)

    @property
    def runs(self) -> bool:
        """Whether requests are answered: not after `close`, nor after a fault of the engine itself."""
        return not self._closing

    def jobs(self) -> dict[int, Job]:
        """Which run, by stream; a copy."""
        with self._wake:
            return dict(self._jobs)

    def cancel_all(self) -> None:
        """End what runs and what waits before the next batch."""
        with self._wake:
            for job in [*self._jobs.values(), *self._waiting]:
                job.cancel()

    def close(self) -> None:
        """End what runs, park what streams hold, free the context; safe to call twice."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for `call`: what is asked of streams between batches ---

    def check_idle(self, stream: int) -> None:
        """Raises BusyError if a request uses the stream, SettingsError if there is none."""
        if not 0 <= stream < self.llama.n_seq:
            raise SettingsError(f"There is no stream {stream}; they are numbered from 0 to {self.llama.n_seq - 1}.")
        if stream in self._jobs:
            raise BusyError(f"Stream {stream} is answering a request.")

    def used(self, stream: int) -> None:
        """What a stream holds has changed."""
        self._used[stream] = time.monotonic()
        self._unparked.add(stream)

    # --- the engine's own thread ---

    def _run(self) -> None:
        try:
            while not self._closing:
                self._wait()
                self._do_calls()
                self._drop_ended()
                self._admit()
                if self._jobs:
                    self._step()
        except BaseException:
            logger.critical("the engine has failed, and answers nothing any more", exc_info=True)
            raise
        finally:
            self._end()

    def _wait(self) -> None:
        """Until there is something to do; when nothing is for a while, chats are parked."""
        with self._wake:
            if self._jobs or self._waiting or self._calls or self._closing:
                return
            if not self._wake.wait(_IDLE if self._must_park() else None):
                stream = self._must_park()
            else:
                return
        if stream:
            self._park(stream[0])

    def _must_park(self) -> list[int]:
        return sorted(self._unparked) if self.parking is not None else []

    def _do_calls(self) -> None:
        with self._wake:
            calls, self._calls = self._calls, []
        for function, future in calls:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as e:  # noqa: BLE001 - it is the caller's
                future.set_exception(e)

    def _drop_ended(self) -> None:
        """Requests that were cancelled, or have taken too long."""
        now = time.monotonic()
        for job in [*self._jobs.values(), *self._waiting]:
            limit, late = job.request.time_limit, job.request.deadline
            if job.cancelled:
                self._release(job, "cancelled")
            elif late is not None and now - job.asked > late:
                self._release(job, TimeLimitError(f"The request has taken longer than {late:g} seconds."))
            elif limit is not None and job.answering and now - job.answering > limit:
                self._release(job, "limit")

    def _release(self, job: Job, ending: str | Exception) -> None:
        """End a request; its stream keeps what it holds."""
        with self._wake:
            if job in self._waiting:
                self._waiting.remove(job)
            if self._jobs.get(job.stream) is job:
                del self._jobs[job.stream]
                self.used(job.stream)
        now = time.monotonic()
        if job.answering:
            self.seconds["answer"] += now - job.answering
        self.totals["generated"] += job.generated
        if isinstance(ending, str):
            job.end(ending)
        else:
            self.totals["failed"] += 1
            job.fail(ending)

    def _admit(self) -> None:
        """Give waiting requests, the oldest first, the streams that are free."""
        for job in list(self._waiting):
            idle = sorted((i for i in range(self.llama.n_seq) if i not in self._jobs), key=lambda i: self._used[i])
            if not idle:
                return
            if job.request.stream is not None:
                idle = [i for i in idle if i == job.request.stream]
            if not idle or self._is_being_read(job):
                continue
            try:
                if not self._begin(job, idle):
                    return
            except Exception as e:  # noqa: BLE001 - whatever it is, it is this request's
                logger.debug("a request could not begin", exc_info=True)
                self._release(job, e)

    def _is_being_read(self, job: Job) -> bool:
        """Whether another request is reading what this one begins with: then its stream is copied once it has."""
        if not job.request.reuse or not self.llama._can_go_back():
            return False
        for other in self._jobs.values():
            if other.next is None and other.read < len(other.prompt):
                n = min(common(other.prompt, job.prompt), len(job.prompt) - 1)
                if n - other.read >= LEAST_GAIN:
                    return True
        return False

    def _begin(self, job: Job, idle: list[int]) -> bool:
        """Put a request into a stream that holds as much of its prompt as can be had. False if that must wait for the next batch."""
        llama, most = self.llama, len(job.prompt) - 1  # the last token is read in any case: its logits are needed
        held = [len(llama.tokens_of(i)) for i in range(llama.n_seq)]
        found = [0] * llama.n_seq
        if job.request.reuse:
            found = [llama.usable(i, min(common(llama.tokens_of(i), job.prompt), most)) for i in range(llama.n_seq)]
            found = [n if n <= most else 0 for n in found]
        if job.request.stream is not None:
            found = [n if i in idle else 0 for i, n in enumerate(found)]
        begin = choose(held, found, idle)
        parked = self._parked(job, begin.n)
        if parked is not None:
            if self._copying:
                return False  # llama.cpp has yet to copy what this may write over
            begin = Begin(spare(held, idle), 0)
        self._make_room(begin)
        n = begin.n
        if parked is not None:
            n = self._resume(begin.stream, parked, min(common(parked, job.prompt), most))
        elif begin.source is not None:
            self._copying = True
            n = n if llama.copy_prefix(begin.source, begin.stream, n) else 0
        else:
            n = n if llama.cut(begin.stream, n) else 0
        job.stream, job.read, job.cached, job.began = begin.stream, n, n, time.monotonic()
        self.totals["cached"] += n
        with self._wake:
            self._waiting.remove(job)
            self._jobs[begin.stream] = job
        self._progress(job)
        return True

    def _parked(self, job: Job, n: int) -> tuple[int, ...] | None:
        """The file that holds more of the prompt than the streams, if one does."""
        if self.parking is None or not job.request.reuse:
            return None
        found, tokens = self.parking.best(job.prompt)
        return tokens if found - n >= LEAST_GAIN else None

    def _make_room(self, begin: Begin) -> None:
        """What a stream holds beyond what is used of it is parked, if no file has it."""
        kept = begin.n if begin.source is None else 0
        if begin.stream in self._unparked and len(self.llama.tokens_of(begin.stream)) - kept >= LEAST:
            self._park(begin.stream)

    def _park(self, stream: int) -> None:
        self._unparked.discard(stream)
        if self.parking is None:
            return
        try:
            self.totals["parked"] += bool(self.parking.park(self.llama, stream))
        except Exception:  # noqa: BLE001 - a chat that is not parked is read anew, later
            logger.debug("a stream could not be parked", exc_info=True)

    def _resume(self, stream: int, tokens: tuple[int, ...], n: int) -> int:
        """How many of the first n tokens of a file a stream holds now."""
        assert self.parking is not None
        if not self.parking.resume(self.llama, stream, tokens):
            self.llama.forget(stream)
            return 0
        self.totals["resumed"] += 1
        self._unparked.discard(stream)
        if self.llama.usable(stream, n) != n:
            self.llama.forget(stream)
            return 0
        return n if self.llama.cut(stream, n) else 0

    def _step(self) -> None:
        """One batch: a token of every running answer, and some of the prompts that are being read."""
        parts = self._parts()
        try:
            self._decode(parts)
        except Exception as e:  # noqa: BLE001 - an error ends requests, not the engine
            self._failed(parts, e)

    def _parts(self) -> list[tuple[Job, list[int]]]:
        """Which tokens are evaluated next, by request, in the order of streams: in any other llama.cpp cuts the batch into more computations."""
        running = [job for job in self._jobs.values() if job.next is not None]
        reading = sorted((job for job in self._jobs.values() if job.next is None), key=lambda job: len(job.prompt) - job.read)
        room = self.llama.n_batch - len(running)
        if len(self._jobs) > 1:
            room = min(room, max(_LEAST_CHUNK, int(self._rate * self.pause)))
        parts: list[tuple[Job, list[int]]] = []
        for i, job in enumerate(reading):  # equal shares, and what the shortest leave goes to the others
            share = room // (len(reading) - i)
            if share:
                parts.append((job, job.prompt[job.read : job.read + share]))
                room -= len(parts[-1][1])
        parts += [(job, [job.next]) for job in running if job.next is not None]
        return sorted(parts, key=lambda part: part[0].stream)

    def _decode(self, parts: list[tuple[Job, list[int]]]) -> None:
        """Evaluate a batch and go on with every request of it. Raises what llama.cpp says; nothing of the batch counts then."""
        batch: list[tuple[int, int]] = []
        rows: dict[int, Job] = {}  # whose next token is chosen by which place of the batch
        for job, tokens in parts:
            batch += [(job.stream, token) for token in tokens]
            if job.next is not None or job.read + len(tokens) == len(job.prompt):
                rows[len(batch) - 1] = job
        began = time.monotonic()
        self.llama.advance(batch, rows)
        self._copying = False
        took = time.monotonic() - began
        self.totals["batches"] += 1
        if len(batch) >= len(parts) + _LEAST_CHUNK // 2:
            self._rate = 0.5 * self._rate + 0.5 * len(batch) / took if self._rate else len(batch) / took
        for job, tokens in parts:
            if job.next is None:
                job.read += len(tokens)
                self.totals["prompt"] += len(tokens)
                self.seconds["prompt"] += took * len(tokens) / len(batch)
                self._progress(job)
            job.next = None
        for row, job in rows.items():
            self._choose(job, row)

    def _progress(self, job: Job) -> None:
        if job.request.progress:
            job.tell(Progress(job.read, len(job.prompt), job.cached, time.monotonic() - job.began))

    def _choose(self, job: Job, row: int) -> None:
        """The next token of an answer, or its end."""
        request, llama = job.request, self.llama
        job.answering = job.answering or time.monotonic()
        if request.max_tokens == 0:
            self._release(job, "limit")
            return
        try:
            token = job.sampler.sample(row)
        except StuckError:
            self._release(job, "stuck")
            return
        except Exception as e:  # noqa: BLE001 - of this request only
            self._release(job, e)
            return
        job.generated += 1
        if llama.ends(token) and not request.ignore_end:
            self._release(job, "end")
            return
        text = llama.piece(token)
        chosen = Chosen(token, text)
        if request.logprobs is not None:
            own, top = logprobs(llama.logits_row(row), token, request.logprobs)
            chosen = Chosen(token, text, own, tuple((t, llama.piece(t), p) for t, p in top))
        if job.take(chosen):
            self._release(job, "word")
        elif 0 <= request.max_tokens <= job.generated:
            self._release(job, "limit")
        elif len(llama.tokens_of(job.stream)) >= self.n_ctx:
            self._release(job, "full")
        else:
            job.next = token
            self._trigger(job, text)

    def _trigger(self, job: Job, text: bytes) -> None:
        """Whether the answer must follow a grammar from here on."""
        if not job.request.trigger:
            return
        job.text = (job.text + text.decode("utf-8", "replace"))[-len(job.request.trigger) :]
        if job.text == job.request.trigger:
            job.sampler.follow(job.request.triggered)

    def _failed(self, parts: list[tuple[Job, list[int]]], error: Exception) -> None:
        """A batch was not evaluated. Where streams can be cut back, each of its requests is tried alone, and only those end that fail again."""
        logger.debug("a batch failed", exc_info=error)
        self._copying = False
        before = {job.stream: len(self.llama.tokens_of(job.stream)) for job, _ in parts}
        alone = len(parts) > 1 and self.llama._can_go_back()
        for job, tokens in sorted(parts, key=lambda part: -len(part[1])):  # whose is the largest part is the likeliest to be at fault
            kept = alone and self._rewound(job.stream, before[job.stream])
            if kept:
                try:
                    self._decode([(job, tokens)])
                    continue
                except Exception as e:  # noqa: BLE001 - this is the one, or one of them
                    error = e
            self._release(job, error)
            self.llama.forget(job.stream)
            self._unparked.discard(job.stream)

    def _rewound(self, stream: int, n: int) -> bool:
        """llama.cpp may have taken a part of the batch: take it back."""
        return self.llama._removed(stream, n)

    def _end(self) -> None:
        with self._wake:
            self._closing = True
            left, calls = [*self._jobs.values(), *self._waiting], self._calls
        for job in left:
            self._release(job, "cancelled")
        for _, future in calls:
            future.set_exception(ContextError("The engine is closed."))
        for stream in self._must_park():
            self._park(stream)
        self.llama.close()
