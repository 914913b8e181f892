"""What a store holds, as values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

ROLES = ("user", "assistant")
STATES = ("done", "running", "stopped", "cut", "failed")
"""Of a message: whole; being written; ended by the user; ended because its process did; ended by an error."""


@dataclass
class Message:
    """A node of a chat's tree.

    parent: the message that it follows, None at the root. shown: which of those that follow it is shown. files: texts that were attached, each
    with "name" and "text". figures: of an answer, as the server counts them.
    """

    id: int
    chat: int
    parent: int | None
    role: str
    content: str
    reasoning: str = ""
    state: str = "done"
    created: float = 0.0
    shown: int | None = None
    files: list[dict[str, str]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def text(self) -> str:
        """What the model reads: the attached files, then the message."""
        return "\n\n".join([*(f"File {f['name']}:\n{fence(f['text'])}" for f in self.files), *([self.content] if self.content else [])])


@dataclass
class Chat:
    """A chat.

    settings: of the sampler, and "at_end": "stop" or "shift", what happens at the end of the context. shown: its first message
    that is shown.
    """

    id: int
    title: str
    system: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0
    changed: float = 0.0
    shown: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Hit:
    """A place that a search has found. message: None if it is the title. around: the text there."""

    chat: int
    title: str
    message: int | None
    around: str


def fence(text: str) -> str:
    """A text as a block of code in Markdown, whatever it holds."""
    ticks = "```"
    while ticks in text:
        ticks += "`"
    return f"{ticks}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{ticks}"


def branch(messages: list[Message], shown: int | None) -> list[Message]:
    """The messages that are shown, from the first to the last; shown: the first of them."""
    by_id = {m.id: m for m in messages}
    found: list[Message] = []
    while shown is not None and shown in by_id:
        found.append(by_id[shown])
        shown = by_id[shown].shown
    return found


def path_to(messages: list[Message], last: int | None) -> list[Message]:
    """The messages from the root to one of them, whether shown or not."""
    by_id = {m.id: m for m in messages}
    found: list[Message] = []
    while last is not None:
        found.append(by_id[last])
        last = by_id[last].parent
    return found[::-1]
