"""One answer: streaming, progress while the prompt is read, speed, and stopping with Ctrl-C."""

from __future__ import annotations

import contextlib
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import SettingsError

if TYPE_CHECKING:
    from ._llama import Llama

Message = dict[str, str]


@dataclass
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; max_tokens below 1 means up to the end of the context."""

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    max_tokens: int = -1
    seed: int = field(default_factory=lambda: secrets.randbits(31))


@dataclass
class Answer:
    """What came out, and how fast. Seconds are wall-clock time; read_tokens are the prompt tokens that were not cached already."""

    text: str = ""
    prompt_tokens: int = 0
    read_tokens: int = 0
    read_seconds: float = 0.0
    answer_tokens: int = 0
    answer_seconds: float = 0.0
    finish_reason: str = "stop"  # "stop", "length" or "interrupted"

    def speeds(self) -> dict[str, Any]:
        """The figures of the report."""

        def rate(n: int, seconds: float) -> float:
            return round(n / seconds, 2) if n > 0 and seconds > 0 else 0.0

        return {
            "prompt_tokens": self.prompt_tokens,
            "read_tokens": self.read_tokens,
            "read_seconds": round(self.read_seconds, 4),
            "prompt_tokens_per_second": rate(self.read_tokens, self.read_seconds),
            "answer_tokens": self.answer_tokens,
            "answer_seconds": round(self.answer_seconds, 4),
            # The first token comes out of the prompt; the time is that of the others.
            "answer_tokens_per_second": rate(self.answer_tokens - 1, self.answer_seconds),
            "finish_reason": self.finish_reason,
        }


class Interrupted(Exception):
    """Ctrl-C while a prompt was read."""


class _Interrupt:
    """Ctrl-C asks for a stop at the next token or batch; a second one ends the program as usual."""

    def __init__(self) -> None:
        self.asked = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[_Interrupt]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def on_signal(*_: object) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        previous = signal.signal(signal.SIGINT, on_signal)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, previous)


class _Reading:
    """The bar while a prompt of more than one batch is read, and the clock."""

    def __init__(self, console: Console, interrupt: _Interrupt, n_batch: int) -> None:
        self.console, self.interrupt, self.n_batch = console, interrupt, n_batch
        self.progress: Progress | None = None
        self.started = self.ended = time.perf_counter()
        self.tokens = 0

    def __call__(self, done: int, total: int) -> None:
        self.ended, self.tokens = time.perf_counter(), done
        if done == 0:
            self.started = self.ended
            if total > self.n_batch and self.console.is_terminal:
                self.progress = Progress(
                    TextColumn("Reading the prompt"),
                    BarColumn(),
                    TextColumn("{task.completed}/{task.total} tokens, {task.fields[speed]:.0f} tokens/s"),
                    TimeRemainingColumn(),
                    console=self.console,
                    transient=True,
                    redirect_stdout=False,
                    redirect_stderr=False,
                )
                self.task = self.progress.add_task("", total=total, speed=0.0)
                self.progress.start()
        elif self.progress is not None:
            self.progress.update(self.task, completed=done, speed=done / max(1e-9, self.ended - self.started))
        if done >= total:
            self.close()
        if self.interrupt.asked:
            self.close()
            raise Interrupted

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def prompt_tokens(llama: Llama, prompt: str | list[Message]) -> list[int]:
    """The tokens that will be evaluated for a raw text or a conversation.

    Raises SettingsError if they leave no room for an answer, or the chat template refuses the messages.
    """
    if isinstance(prompt, str):
        tokens = llama.tokenize(prompt.encode("utf-8"), add_bos=True, special=True)
    else:
        tokens = llama.chat_tokens(prompt)
    if len(tokens) >= llama.n_ctx():
        raise SettingsError(f"The prompt has {len(tokens)} tokens and the context holds {llama.n_ctx()}; give a larger context (-c).")
    if not tokens:
        raise SettingsError("The prompt is empty.")
    return tokens


def stream_answer(llama: Llama, prompt: str | list[Message], sampling: Sampling, write: Callable[[str], None], console: Console) -> Answer:
    """Evaluate a raw text or a conversation and write the answer piece by piece.

    Ctrl-C ends the answer early; what was written by then is the answer.
    Raises SettingsError if the prompt does not fit, ContextError if llama.cpp fails.
    """
    answer = Answer()
    answer.prompt_tokens = len(prompt_tokens(llama, prompt))
    options: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": 1.0,
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens if sampling.max_tokens > 0 else -1,
        "stream": True,
    }
    pieces: list[str] = []
    interrupt = _Interrupt()
    reading = _Reading(console, interrupt, llama.n_batch)
    before, llama.on_read = llama.on_read, reading
    with interrupt.installed():
        try:
            if isinstance(prompt, str):
                chunks: Any = llama.create_completion(prompt_tokens(llama, prompt), **options)
            else:
                chunks = llama.create_chat_completion(messages=prompt, **options)  # type: ignore[arg-type]
            for chunk in chunks:
                choice = chunk["choices"][0]
                piece = choice["text"] if "text" in choice else choice["delta"].get("content")
                if piece:
                    pieces.append(piece)
                    write(piece)
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
                if interrupt.asked:
                    answer.finish_reason = "interrupted"
                    chunks.close()
                    break
        except Interrupted:
            answer.finish_reason = "interrupted"
        finally:
            reading.close()
            llama.on_read = before
    answer.text = "".join(pieces)
    answer.read_tokens, answer.read_seconds = reading.tokens, reading.ended - reading.started
    answer.answer_seconds = time.perf_counter() - reading.ended
    # Tokens beyond the prompt that were evaluated, and the last one, which was only sampled.
    answer.answer_tokens = max(0, llama.n_tokens - answer.prompt_tokens) + (1 if pieces else 0)
    return answer
