"""What of a chat the model reads, and what no longer fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...chats import Chat, Message
from ..chat import Plan, plan
from ..errors import ApiError, bad
from ..fields import Fields
from ..sampling import sampling_of
from ..service import Service
from ..tools import Tools

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed", "max_tokens")
AT_END = ("stop", "shift")
_LEAST_ROOM = 16


def checked_settings(service: Service, settings: Any) -> dict[str, Any]:
    """Settings of a chat, as the page sends them. Raises ApiError."""
    if not isinstance(settings, dict) or not set(settings) <= {*SAMPLING, "at_end"}:
        raise bad(f"settings must be an object with some of {', '.join([*SAMPLING, 'at_end'])}.", "settings")
    found = {key: value for key, value in settings.items() if value is not None}
    sampling_of(Fields(found, "settings"), service.sampling)
    Fields(found, "settings").whole("max_tokens", -1, -1)
    if found.get("at_end", "stop") not in AT_END:
        raise bad("settings.at_end must be stop or shift.", "settings.at_end")
    return found


class History:
    """The messages before an answer, as many of them as fit.

    dropped: how many messages were left out so far, the oldest ones; only where the chat says "shift".
    """

    def __init__(self, service: Service, chat: Chat, messages: Sequence[Message]) -> None:
        self._service, self._fields = service, Fields(chat.settings)
        self.shifts = chat.settings.get("at_end") == "shift"
        self._system = [{"role": "system", "content": chat.system}] if chat.system else []
        self._messages = [_record(m) for m in messages if m.content or m.files or m.role == "user"]
        self.max_tokens = self._fields.whole("max_tokens", service.max_tokens, -1)
        self.dropped = 0

    async def plan(self, written: str = "", left: int | None = None) -> Plan:
        """The request for the rest of an answer. written: what there is of it; left: tokens that it may have.

        Raises ApiError if the chat does not fit.
        """
        n_ctx = self._service.answering.n_ctx
        most = self.max_tokens if left is None else left
        room = min(most, n_ctx // 2) if most > 0 else n_ctx // 4
        planned = await self._planned(written, most)
        n = len(planned.requests[0].tokens)
        limit = n_ctx - (room if self.shifts else _LEAST_ROOM)
        while self.shifts and n > limit and self.drop():
            limit = (n_ctx - room) // 2  # so that not every turn from now on is read anew
            planned = await self._planned(written, most)
            n = len(planned.requests[0].tokens)
        if n > n_ctx - _LEAST_ROOM:
            raise ApiError(
                400,
                f"The chat has {n} tokens and the context {n_ctx}: shorten it, let it shift, or start with a larger -c.",
                kind="exceed_context_size_error",
                code="context_length_exceeded",
            )
        return planned

    def drop(self) -> bool:
        """Leave out the oldest question with what follows it; False if it is the only one."""
        questions = [i for i, m in enumerate(self._messages) if m["role"] == "user"]
        if len(questions) < 2:
            return False
        self.dropped += questions[1]
        del self._messages[: questions[1]]
        return True

    async def _planned(self, written: str, most: int) -> Plan:
        messages = [*self._system, *self._messages, *([{"role": "assistant", "content": written}] if written else [])]
        return await plan(self._service, self._fields, messages, Tools(), None, most, 1)

    async def beginning(self) -> bytes:
        """The prompt up to the end of the first question, as 32-bit tokens: what every state of this chat begins with."""
        first = next((m for m in self._messages if m["role"] == "user"), None)
        if first is None:
            return b""
        text = self._service.prompts.text([*self._system, first], Tools())
        at = text.rfind(first["content"])
        tokens = await self._service.tokens(text[: at + len(first["content"])] if at >= 0 else text)
        return np.asarray(tokens[:-1], np.int32).tobytes()


def _record(m: Message) -> dict[str, Any]:
    return {"role": m.role, "content": m.text(), **({"reasoning_content": m.reasoning} if m.reasoning else {})}
