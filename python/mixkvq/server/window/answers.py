"""Answers that run, whoever listens: what comes is stored several times a second, and told to every window that shows the chat."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from bridge.engine import Done, Piece, Progress

from ...chats import Store
from ...chats.records import path_to
from ...core.errors import StoreError
from ..chat import progress_of
from ..errors import bad, of_exception
from ..service import Run, Service
from .history import History

STORED = 0.2  # seconds after which what has come is stored
_LAST_TRIES = 3
_AGAIN = 1.0  # seconds after which a store that failed is tried again


class Answer:
    """One answer. message: its number in the store."""

    def __init__(self, service: Service, store: Store, chat: int, message: int, history: History, writer: Executor) -> None:
        self._service, self._store, self._chat, self.message, self._history = service, store, chat, message, history
        self._writer = writer
        self.content = self.reasoning = ""
        self.prompt: list[int] = []
        self.stream = -1
        self.stopped = False
        self._pending: deque[tuple[str, str]] = deque()
        self._listeners: set[asyncio.Queue[dict[str, Any] | None]] = set()
        self._notes: list[dict[str, Any]] = []  # for windows that come later
        self._run: Run | None = None
        self._began = time.monotonic()
        self._thinking: list[float] = []  # when it began and ended
        self._over = False
        self.task = asyncio.ensure_future(self._answer())

    def stop(self) -> None:
        """End it before the next token."""
        self.stopped = True
        if self._run is not None:
            self._run.cancel()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What there is, then what comes, up to the event "end"."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield {"type": "start", "content": self.content, "reasoning": self.reasoning}
            for note in list(self._notes):
                yield note
            while not (self._over and queue.empty()):
                event = await queue.get()
                if event is None:
                    return
                yield event
        finally:
            self._listeners.discard(queue)

    def _tell(self, event: dict[str, Any] | None) -> None:
        if event is not None and event["type"] in ("note", "progress"):
            self._notes = [n for n in self._notes if n["type"] != event["type"] or event["type"] == "note"] + [event]
        for queue in self._listeners:
            queue.put_nowait(event)

    def _note(self, text: str, kind: str = "") -> None:
        self._tell({"type": "note", "kind": kind, "text": text})

    # --- its course ---

    async def _answer(self) -> None:
        storing = asyncio.ensure_future(self._store_now_and_then())
        state = "failed"
        figures: dict[str, Any] = {}
        try:
            state, figures = await self._written()
        except asyncio.CancelledError:
            state = "stopped"
        except Exception as e:  # noqa: BLE001 - the window says it
            figures = {"error": of_exception(e).message}
        finally:
            storing.cancel()
            with contextlib.suppress(BaseException):
                await storing
            await self._end(state, figures)

    async def _end(self, state: str, figures: dict[str, Any]) -> None:
        if self._thinking:
            figures["thought_s"] = round((self._thinking[1] if len(self._thinking) > 1 else time.monotonic()) - self._thinking[0], 2)
        if self._history.dropped:
            figures["dropped"] = self._history.dropped
        tries = _LAST_TRIES if state == "stopped" and not self.stopped else None  # the server ends
        while not await self._tried(state, figures) and tries != 0:
            tries = tries and tries - 1
            await asyncio.sleep(_AGAIN)
        self._over = True
        self._tell({"type": "end", "state": state, "figures": figures})
        self._tell(None)

    async def _tried(self, state: str, figures: dict[str, Any]) -> bool:
        """Store the rest and the end; False if that is not possible now."""

        def end() -> None:
            self._write()
            self._store.end(self.message, state, figures)

        try:
            await self._in_turn(end)
            return True
        except StoreError as e:
            self._note(str(e), "unsaved")
        try:
            await self._in_turn(lambda: self._store.message(self.message))
            return False
        except StoreError:
            return True  # another window has deleted the chat

    async def _in_turn(self, function: Callable[[], Any]) -> None:
        """Run what writes in the one thread for that: in the order of the calls, and to its end if we are cancelled meanwhile."""
        await asyncio.get_running_loop().run_in_executor(self._writer, function)

    async def _store_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(STORED)
            try:
                if self._pending:
                    await self._in_turn(self._write)
            except StoreError as e:
                if not any(note.get("kind") == "unsaved" for note in self._notes):
                    self._note(str(e), "unsaved")
                await asyncio.sleep(_AGAIN)

    def _write(self) -> None:
        """Store what has come; on a full disk it stays here and is stored later. Runs in the thread that writes."""
        pieces = [self._pending.popleft() for _ in range(len(self._pending))]
        try:
            if pieces:
                self._store.append(self.message, pieces)
        except StoreError:
            self._pending.extendleft(reversed(pieces))
            raise

    async def _written(self) -> tuple[str, dict[str, Any]]:
        """Write the answer; its state and figures."""
        reader, raw, generated, dropped = None, "", 0, 0
        while True:
            planned = await self._history.plan(raw, self._history.max_tokens - generated if self._history.max_tokens > 0 else None)
            if self._history.dropped > dropped:
                dropped = self._history.dropped
                self._note(str(dropped), "dropped")
                await run_in_threadpool(self._store.read, self._chat, await self._history.beginning())
            reader = reader or planned.reader(self._service)
            self.prompt = list(planned.requests[0].tokens)
            if self.stopped:
                return "stopped", {}
            done: Done | None = None
            self._run = await self._service.run([replace(planned.requests[0], progress=True)])
            async for _, event in self._run.events(may_be_stopped=True):
                if isinstance(event, Progress):
                    self.stream = self._run.jobs[0].stream
                    self._tell({"type": "progress", **progress_of(event)})
                elif isinstance(event, Piece):
                    raw += event.text
                    self._take(reader.feed(event.text))
                elif isinstance(event, Done):
                    done = event
            assert done is not None
            generated += done.generated
            self.stream = done.stream
            if done.reason == "full" and self._history.shifts and self._history.drop():
                continue
            self._take(reader.end())
            figures = {**await self._service.timings([done]), "reason": done.reason, "n_ctx": self._service.answering.n_ctx, "tokens": generated}
            return ("stopped" if done.reason == "cancelled" else "done"), {**figures, "model": self._service.name}

    def _take(self, deltas: list[Any]) -> None:
        for delta in deltas:
            kind = "reasoning" if delta.kind == "reasoning" else "content"
            if kind == "reasoning" and not self._thinking:
                self._thinking.append(time.monotonic())
            elif kind == "content" and len(self._thinking) == 1:
                self._thinking.append(time.monotonic())
            setattr(self, kind, getattr(self, kind) + delta.text)
            self._pending.append((kind, delta.text))
            self._tell({"type": kind, "text": delta.text})


class Answers:
    """The answers of a server that run, and where in the cache each chat lies."""

    def __init__(self, service: Service, store: Store) -> None:
        self._service, self._store = service, store
        self._writer = ThreadPoolExecutor(1, "mixkvq-chats")
        self._running: dict[int, Answer] = {}
        self._last: dict[int, Answer] = {}  # by chat

    def get(self, message: int) -> Answer | None:
        """The answer, while it runs."""
        return self._running.get(message)

    def of(self, chat: int) -> Answer | None:
        """The last answer of a chat since the server began."""
        return self._last.get(chat)

    async def begin(self, question: int) -> int:
        """Answer a question; the answer's number. Raises ApiError and StoreError."""
        store = self._store

        def gather() -> Any:
            message = store.message(question)
            if message.role != "user":
                raise bad("Only what the user says can be answered.", "message")
            return message.chat, store.chat(message.chat), path_to(store.messages(message.chat), question)

        chat, about, messages = await run_in_threadpool(gather)
        history = History(self._service, about, messages)
        beginning = await history.beginning()
        number = await run_in_threadpool(store.begin, chat, question, {"model": self._service.name})
        await run_in_threadpool(store.read, chat, beginning)
        answer = self._running[number] = self._last[chat] = Answer(self._service, store, chat, number, history, self._writer)
        answer.task.add_done_callback(lambda _: self._running.pop(number, None))
        return number

    async def forget(self, chat: int) -> None:
        """End what runs for a chat, and wait until it has ended."""
        self._last.pop(chat, None)
        for message, answer in list(self._running.items()):
            if (await run_in_threadpool(self._store.message, message)).chat == chat:
                answer.stop()
                await asyncio.wait({answer.task})
