"""What a request hears of: progress, pieces of the answer, and its end."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Chosen:
    """A token of the answer, its text, and of what the model predicted there (before sampling settings): natural logarithms of probabilities."""

    token: int
    text: bytes
    logprob: float = 0.0
    top: tuple[tuple[int, bytes, float], ...] = ()  # the likeliest tokens, their texts and logprobs


@dataclass(frozen=True)
class Progress:
    """Of `total` tokens of a prompt `read` are in the cache now; `cached` were there before. seconds: since reading began."""

    read: int
    total: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class Piece:
    """More of the answer. Text that may turn out to begin a stop string comes with a later piece, or not at all."""

    text: str
    tokens: tuple[Chosen, ...]


@dataclass(frozen=True)
class Done:
    """The answer has ended.

    reason: "end" (the model ended its turn), "word" (a stop string), "limit" (max_tokens), "full" (the stream), "cancelled", or "stuck" (the grammar
    allows no token of the vocabulary). cached: tokens of the prompt that were not read, because a stream or a file had them. seconds: waiting,
    reading the prompt, answering.
    """

    reason: str
    word: str = ""
    stream: int = -1
    prompt: int = 0
    cached: int = 0
    generated: int = 0
    waited_s: float = 0.0
    prompt_s: float = 0.0
    answer_s: float = 0.0


@dataclass(frozen=True)
class Failed:
    """The request has ended with an error; the engine goes on."""

    error: Exception


Event = Progress | Piece | Done | Failed


@dataclass
class Answer:
    """All that was heard, put together."""

    text: str = ""
    tokens: list[Chosen] = field(default_factory=list)
    done: Done = field(default_factory=lambda: Done("cancelled"))

    @property
    def reason(self) -> str:
        """Why it ended, see `Done`."""
        return self.done.reason

    def add(self, event: Event) -> None:
        """Take the next event. Raises the error of `Failed`."""
        if isinstance(event, Piece):
            self.text += event.text
            self.tokens += event.tokens
        elif isinstance(event, Done):
            self.done = event
        elif isinstance(event, Failed):
            raise event.error
