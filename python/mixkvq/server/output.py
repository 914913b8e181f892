"""What a model writes, taken apart as it comes: its thinking, its answer, and calls of functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .tools import Call, Form, read_calls

_UNMARKED = ('{"name":', '```json{"name":', '```{"name":')  # without white space
_FENCE = re.compile(r"^\s*```(?:json)?|```\s*$")
THINK = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class Delta:
    """More of one of the three: kind is "reasoning", "content" or "call"."""

    kind: str
    text: str = ""
    call: Call | None = None


def opens_thinking(prompt: str) -> str | None:
    """What ends the thinking that a prompt begins by itself, or None."""
    return next((end for start, end in THINK if prompt.rstrip().endswith(start)), None)


class Reader:
    """Takes text and gives deltas. What may be the beginning of a mark is held back until it is clear.

    form: of the calls of the functions with these names; None if none can be called. thinking: whether thinking is told from the answer; ends: what
    ends it, if the prompt has begun it.
    """

    def __init__(self, form: Form | None = None, names: Sequence[str] = (), *, thinking: bool = True, ends: str | None = None) -> None:
        self._form, self._names, self._thinking = form, names, thinking
        self._held = ""
        self._end = ends or ""
        self._state = "opened" if thinking and ends else "start"
        self.n_calls = 0

    def feed(self, text: str) -> list[Delta]:
        """What is clear now."""
        self._held += text
        found: list[Delta] = []
        while self._step(found):
            pass
        return found

    def end(self) -> list[Delta]:
        """The rest."""
        found = self.feed("")
        if self._state == "call":
            found += self._calls(self._held, whole=True)
        elif self._state == "unmarked" and (calls := self._read(_FENCE.sub("", self._held))):
            found += calls
        elif self._state == "content" and self.n_calls and not self._held.strip():
            pass
        elif self._held and not (self._state == "start" and not self._held.strip()):
            found.append(Delta("reasoning" if self._state == "reasoning" else "content", self._held))
        self._held = ""
        return found

    def _step(self, found: list[Delta]) -> bool:
        """One mark further; False if more text is needed."""
        if self._state == "start":
            return self._start()
        if self._state == "reasoning":
            return self._say(found, "reasoning", self._end, "closed")
        if self._state in ("opened", "closed"):  # line breaks behind the marks of thinking belong to nothing
            self._held = self._held.lstrip("\n")
            if not self._held:
                return False
            self._state = "reasoning" if self._state == "opened" else "content"
            return self._state == "reasoning" or self._begins_call()
        if self._state == "unclear":
            return self._begins_call()
        if self._state == "unmarked":  # up to its end it may be a call
            return False
        if self._state == "content":
            return self._say(found, "content", self._form.start, "call") if self._form is not None else self._say(found, "content", "", "")
        return self._call(found)

    def _start(self) -> bool:
        held = self._held.lstrip()
        if not held:
            return False
        if self._thinking:
            for start, end in THINK:
                if held.startswith(start):
                    self._held, self._state, self._end = held[len(start) :], "opened", end
                    return True
                if start.startswith(held):
                    return False
        self._state = "content"
        return self._begins_call()

    def _begins_call(self) -> bool:
        """Whether it is clear that what is held begins an answer or a call. Small models leave a call's marks out, or write a block of code."""
        if self._form is None:
            return True
        held = re.sub(r"\s+", "", self._held)
        if self._form.whole and held.startswith("{"):
            self._state = "call"
        elif any(begin.startswith(held) for begin in _UNMARKED):
            self._state = "unclear"
            return False
        else:
            self._state = "unmarked" if held.startswith(_UNMARKED) else "content"
        return True

    def _say(self, found: list[Delta], kind: str, mark: str, state: str) -> bool:
        """Text up to a mark, which leads into another state."""
        at = self._held.find(mark) if mark else -1
        n = at if at >= 0 else len(self._held) - _at_end(self._held, mark)
        if self.n_calls and not self._held[:n].strip():  # white space behind a call is no answer
            self._held, n, at = self._held[n:], 0, 0 if at >= 0 else at
        if n:
            found.append(Delta(kind, self._held[:n]))
        self._held = self._held[n:]
        if at < 0:
            return False
        self._held, self._state = self._held[len(mark) :], state
        return True

    def _call(self, found: list[Delta]) -> bool:
        assert self._form is not None
        if not self._form.end:
            return False
        at = self._held.find(self._form.end)
        if at < 0:
            return False
        found += self._calls(self._held[:at], whole=False)
        self._held = self._held[at + len(self._form.end) :].lstrip("\n")
        self._state = "content"
        return True

    def _calls(self, text: str, *, whole: bool) -> list[Delta]:
        """The calls in a text, or the text as it was written."""
        assert self._form is not None
        calls = self._read(text)
        if calls or (whole and self.n_calls and self._form.end):  # a further call that was cut off is none
            return calls
        if self._form.whole and text.lstrip().startswith("{"):
            return [Delta("content", text)]
        return [Delta("content", self._form.start + text + ("" if whole else self._form.end))]

    def _read(self, text: str) -> list[Delta]:
        assert self._form is not None
        calls = read_calls(self._form, text, self._names)
        self.n_calls += len(calls)
        return [Delta("call", call=call) for call in calls]


def _at_end(text: str, mark: str) -> int:
    """How many characters at the end may begin a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
