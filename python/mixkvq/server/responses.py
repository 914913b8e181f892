"""/v1/responses: OpenAI's newer interface, without what a server would have to remember."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from bridge.engine import Done, Piece

from .chat import Choice, Plan, limit_of, plan
from .errors import bad
from .fields import Fields
from .output import Delta
from .prompts import content_of, messages_of
from .service import Run, Service
from .tools import new_id, tools_of

_KINDS = {"reasoning": "reasoning", "content": "message", "call": "function_call"}


async def respond(service: Service, fields: Fields) -> Response:
    """A request, submitted. Raises ApiError and BridgeError."""
    for name in ("previous_response_id", "conversation"):
        if fields.get(name) is not None:
            raise bad(f"{name} is not served: nothing is kept here. Send the whole conversation as input.", name)
    if fields.flag("background"):
        raise bad("background is not served.", "background")
    messages = messages_of(Fields({"messages": _messages(fields)}), service.prompts.template)
    form = fields.record("text")
    most = limit_of(service, fields, "max_output_tokens")
    planned = await plan(service, fields, messages, tools_of(fields), form.record("format") if form else None, most, 1)
    return Response(service, await service.run(planned.requests), planned, fields)


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """The fields instructions and input as messages of chat completions."""
    found: list[dict[str, Any]] = []
    if fields.get("instructions") is not None:
        found.append({"role": "system", "content": fields.text("instructions")})
    if isinstance(fields.get("input"), str):
        return [*found, {"role": "user", "content": fields.text("input")}]
    for item in fields.records("input"):
        kind = item.text("type", "message")
        if kind == "message":
            found.append({"role": item.text("role"), "content": content_of(item)})
        elif kind == "function_call":
            call = {"id": item.text("call_id"), "type": "function", "function": {"name": item.text("name"), "arguments": item.get("arguments")}}
            if found and found[-1].get("tool_calls"):
                found[-1]["tool_calls"].append(call)
            else:
                found.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            found.append({"role": "tool", "tool_call_id": item.text("call_id"), "content": content_of(item, "output")})
        elif kind != "reasoning":  # which the model has no use for
            raise bad(f"{item.name('type')} is {kind!r}, which this server does not read.", item.name("type"))
    if not any(message["role"] != "system" for message in found):
        raise bad("input must be a text, or a list with at least one message.", "input")
    return found


class Response:
    """A request that runs."""

    def __init__(self, service: Service, run: Run, plan: Plan, fields: Fields) -> None:
        self.service, self.run = service, run
        self._choice = Choice(plan.reader(service))
        self._output: list[dict[str, Any]] = []
        self._number = 0
        self._body: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": service.name,
            "instructions": fields.get("instructions"),
            "max_output_tokens": fields.get("max_output_tokens"),
            "metadata": fields.get("metadata") or {},
            "parallel_tool_calls": plan.tools.parallel is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": plan.requests[0].sampling.temperature,
            "top_p": plan.requests[0].sampling.top_p,
            "text": fields.get("text") or {"format": {"type": "text"}},
            "tool_choice": fields.get("tool_choice") or "auto",
            "tools": fields.get("tools") or [],
            "truncation": "disabled",
        }

    def _state(self, status: str, **more: Any) -> dict[str, Any]:
        found = {"status": status, "error": None, "incomplete_details": None, "output": list(self._output), "usage": None}
        return {**self._body, **found, **more}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        last: dict[str, Any] = {}
        async for event in self.chunks():
            last = event or last
        response: dict[str, Any] = last["response"]
        return response

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """The typed events of a stream; None to keep the connection open."""
        yield self._event("response.created", response=self._state("in_progress"))
        yield self._event("response.in_progress", response=self._state("in_progress"))
        async for _, event in self.run.events():
            if event is None:
                yield None
            elif isinstance(event, (Piece, Done)):
                for delta in self._choice.add(event):
                    for chunk in self._of(delta):
                        yield chunk
        done = self._choice.done
        assert done is not None
        if not self._output:
            for chunk in self._begin("message"):
                yield chunk
        for chunk in self._end():
            yield chunk
        cut = self._choice.reason == "length"
        status = "incomplete" if cut else "completed"
        usage = {
            "input_tokens": done.prompt,
            "input_tokens_details": {"cached_tokens": done.cached},
            "output_tokens": done.generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": done.prompt + done.generated,
        }
        details = {"reason": "max_output_tokens"} if cut else None
        timings = await self.service.timings([done])
        yield self._event(f"response.{status}", response=self._state(status, usage=usage, incomplete_details=details, timings=timings))

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}

    def _of(self, delta: Delta) -> list[dict[str, Any]]:
        """Events of more of the answer; an item ends where one of another kind begins, or another call."""
        kind, found = _KINDS[delta.kind], []
        if not self._output or self._output[-1]["type"] != kind or kind == "function_call" or self._output[-1]["status"] != "in_progress":
            found += self._end()
            found += self._begin(kind, delta)
        item, place = self._output[-1], {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        if kind == "function_call":
            item["arguments"] = delta.call.arguments if delta.call else ""
            return [*found, self._event("response.function_call_arguments.delta", **place, delta=item["arguments"]), *self._end()]
        item["content"][0]["text"] += delta.text
        name = "response.output_text.delta" if kind == "message" else "response.reasoning_text.delta"
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return [*found, self._event(name, **place, content_index=0, delta=delta.text, **more)]

    def _begin(self, kind: str, delta: Delta | None = None) -> list[dict[str, Any]]:
        item: dict[str, Any] = {"type": kind, "status": "in_progress"}
        if kind == "function_call" and delta is not None and delta.call is not None:
            item.update(id=new_id("fc"), call_id=delta.call.id, name=delta.call.name, arguments="")
        elif kind == "reasoning":
            item.update(id=new_id("rs"), summary=[], content=[])
        else:
            item.update(id=new_id("msg"), role="assistant", content=[])
        at = len(self._output)
        found = [self._event("response.output_item.added", output_index=at, item=dict(item))]
        if kind != "function_call":
            part = (
                {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                if kind == "message"
                else {"type": "reasoning_text", "text": ""}
            )
            found.append(self._event("response.content_part.added", item_id=item["id"], output_index=at, content_index=0, part=dict(part)))
            item["content"] = [part]
        self._output.append(item)
        return found

    def _end(self) -> list[dict[str, Any]]:
        """Events of the end of the last item, if it has not ended."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            return []
        item, place = self._output[-1], {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        item["status"] = "completed"
        found = []
        if item["type"] == "function_call":
            found.append(self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]))
        else:
            part = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            name = "output_text" if more else "reasoning_text"
            found.append(self._event(f"response.{name}.done", **place, content_index=0, text=part["text"], **more))
            found.append(self._event("response.content_part.done", **place, content_index=0, part=part))
        return [*found, self._event("response.output_item.done", output_index=place["output_index"], item=item)]
