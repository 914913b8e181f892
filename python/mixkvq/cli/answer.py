"""One answer: streaming, progress while the prompt is read, speed, and stopping with Ctrl-C or a signal that ends the program."""

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

from ..core.errors import SettingsError, check_text

if TYPE_CHECKING:
    from bridge.llama import Llama

Message = dict[str, str]
LARGEST_SEED = (1 << 32) - 2  # the next one makes llama.cpp choose a seed of its own


@dataclass
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. max_tokens: -1 is up to the end of the context, 0 only reads the prompt.

    seed: from 0 to LARGEST_SEED.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    max_tokens: int = -1
    seed: int = field(default_factory=lambda: secrets.randbits(31))


@dataclass
class Answer:
    """What came out, and how fast. Seconds are wall-clock time.

    Of the prompt_tokens, cached_tokens were in the cache already and read_tokens were read; the rest was not, if the answer was interrupted.
    answer_tokens were sampled, the one that ends the answer included. signal: the one that interrupted the answer and means the program, or 0.
    """

    text: str = ""
    seed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    read_tokens: int = 0
    read_seconds: float = 0.0
    answer_tokens: int = 0
    answer_seconds: float = 0.0
    finish_reason: str = "stop"  # "stop", "length" or "interrupted"
    signal: int = 0

    def speeds(self) -> dict[str, Any]:
        """The figures of the report."""

        def rate(n: int, seconds: float) -> float:
            return round(n / seconds, 2) if n > 0 and seconds > 0 else 0.0

        return {
            "seed": self.seed,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
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


_ENDINGS = [getattr(signal, name) for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name)]


class _Interrupt:
    """Ctrl-C asks for a stop at the next token or batch; a second one ends the program as usual.

    So do a terminal that is closed and a request to end, which would end the program at once: `signal` is then what it was.
    """

    def __init__(self) -> None:
        self.asked = False
        self.signal = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[_Interrupt]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def on_signal(number: int, _: object) -> None:
            if number != signal.SIGINT:
                self.signal = number
            elif self.asked:
                raise KeyboardInterrupt
            self.asked = True

        caught = [signal.SIGINT, *(s for s in _ENDINGS if signal.getsignal(s) is signal.SIG_DFL)]
        previous = [signal.signal(s, on_signal) for s in caught]
        try:
            yield self
        finally:
            for s, handler in zip(caught, previous):
                signal.signal(s, handler)


class _Reading:
    """The bar while a prompt of more than one batch is read, and the clock."""

    def __init__(self, console: Console, interrupt: _Interrupt, n_batch: int, on_read: Callable[[], None] | None) -> None:
        self.console, self.interrupt, self.n_batch, self.on_read = console, interrupt, n_batch, on_read
        self.aside = 0.0  # seconds that on_read took
        self.progress: Progress | None = None
        self.started = self.ended = time.perf_counter()
        self.tokens = self.total = 0

    def __call__(self, done: int, total: int) -> None:
        self.ended, self.tokens, self.total = time.perf_counter(), done, total
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
            if self.on_read is not None:
                self.on_read()
                self.aside = time.perf_counter() - self.ended
        if self.interrupt.asked:
            self.close()
            raise Interrupted

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def prompt_tokens(llama: Llama, prompt: str | list[Message]) -> list[int]:
    """The tokens that will be evaluated for a raw text or a conversation.

    Raises SettingsError if they leave no room for an answer, are no Unicode text, or the chat template refuses the messages.
    """
    if isinstance(prompt, str):
        check_text(prompt, "The prompt")
        tokens = llama.tokenize(prompt.encode("utf-8"), add_bos=True, special=True)
    else:
        tokens = llama.chat_tokens(prompt)
    if len(tokens) >= llama.n_ctx():
        raise SettingsError(f"The prompt has {len(tokens)} tokens and the context holds {llama.n_ctx()}; give a larger context (-c).")
    if not tokens:
        raise SettingsError("The prompt is empty.")
    return tokens


def stream_answer(
    llama: Llama,
    prompt: str | list[Message],
    sampling: Sampling,
    write: Callable[[str], None],
    console: Console,
    on_read: Callable[[], None] | None = None,
) -> Answer:
    """Evaluate a raw text or a conversation and write the answer piece by piece.

    on_read: called when the prompt is in the context, unless all of it was.
    Ctrl-C ends the answer early; what was written by then is the answer. What `write` raises is passed on.
    Raises SettingsError if the prompt does not fit, ContextError if llama.cpp fails.
    """
    tokens = prompt_tokens(llama, prompt)
    answer = Answer(seed=sampling.seed, prompt_tokens=len(tokens))
    pieces: list[str] = []
    interrupt = _Interrupt()
    reading = _Reading(console, interrupt, llama.n_batch, on_read)
    before, llama.on_read = llama.on_read, reading
    llama.generated = 0
    with interrupt.installed():
        try:
            if sampling.max_tokens == 0:
                answer.finish_reason = "length"
                next(llama.generate(tokens))
            for piece, reason in _pieces(llama, tokens if isinstance(prompt, str) else prompt, sampling):
                if piece:
                    pieces.append(piece)
                    write(piece)
                answer.finish_reason = reason or answer.finish_reason
                if interrupt.asked:
                    answer.finish_reason = "interrupted"
                    break
        except Interrupted:
            answer.finish_reason = "interrupted"
        finally:
            reading.close()
            llama.on_read = before
    answer.text, answer.signal = "".join(pieces), interrupt.signal
    # Without a call of on_read all but one token, or that as well, were in the cache.
    answer.cached_tokens = answer.prompt_tokens - reading.total
    answer.read_tokens, answer.read_seconds = reading.tokens, reading.ended - reading.started
    if sampling.max_tokens != 0:
        answer.answer_tokens, answer.answer_seconds = llama.generated, time.perf_counter() - reading.ended - reading.aside
    return answer


def _pieces(llama: Llama, prompt: list[int] | list[Message], sampling: Sampling) -> Iterator[tuple[str, str | None]]:
    """Pieces of an answer, and with the last one the reason why it ends."""
    if sampling.max_tokens == 0:
        return
    options: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": 1.0,
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens,
        "stream": True,
    }
    raw = not isinstance(prompt[0], dict)
    chunks: Any = llama.create_completion(prompt, **options) if raw else llama.create_chat_completion(messages=prompt, **options)  # type: ignore[arg-type]
    with contextlib.closing(chunks):
        for chunk in chunks:
            choice = chunk["choices"][0]
            yield choice["text"] if "text" in choice else choice["delta"].get("content") or "", choice["finish_reason"]
