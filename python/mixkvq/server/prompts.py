"""From messages to the text that a model reads: its own chat template, and what templates do not know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bridge.chat_template import ChatTemplate

from .errors import bad
from .fields import Fields
from .output import opens_thinking
from .tools import HERMES, Tools, form_of

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TOLD = """# Tools

You may call one or more functions to assist with the user query. Their signatures are within <tools></tools> tags:
<tools>
{}
</tools>

For each function call, return a JSON object with the function's name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class Prompts:
    """The chat template of a model. template: Jinja2; bos and eos: the tokens' texts."""

    def __init__(self, template: str, bos: str = "", eos: str = "") -> None:
        self.template = template
        self.form = form_of(template)
        self.knows_tools = "tools" in template
        self._render, self._continue = (ChatTemplate(template, eos, bos, add_generation_prompt=more) for more in (True, False))

    def text(self, messages: Sequence[dict[str, Any]], tools: Tools, options: Mapping[str, Any] | None = None) -> str:
        """The prompt. options: further variables of the template, as `chat_template_kwargs`. Raises ApiError if the template refuses the messages.

        Where the last message is the assistant's, the answer goes on from it.
        """
        messages, prefix = [dict(message) for message in messages], ""
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            prefix = messages.pop()["content"]
        functions = [{"type": "function", "function": f} for f in tools.functions] if tools.choice != "none" else []
        if not self.knows_tools:
            messages, functions = _told(messages, functions), []
        if not messages:
            return prefix
        tries = [messages, _joined(messages), [{**m, "tool_calls": _as_text(m["tool_calls"])} if m.get("tool_calls") else m for m in messages]]
        why = ""
        for each in tries:
            try:
                return self._rendered(each, functions, options or {}) + prefix
            except Exception as e:  # noqa: BLE001 - a template is a program of the model's author and may refuse anything
                why = why or f"{e}".strip().rstrip(".") or type(e).__name__
        raise bad(f"The model's chat template does not accept these messages: {why}.", "messages")

    def _rendered(self, messages: Sequence[dict[str, Any]], functions: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        reserved = {"messages", "tools", "functions", "function_call", "tool_choice", "eos_token", "bos_token", "raise_exception", "strftime_now"}
        more = {str(key): value for key, value in options.items() if key not in reserved and key != "add_generation_prompt"}
        render: Any = self._continue if options.get("add_generation_prompt") is False else self._render
        return str(render(messages=messages, tools=functions or None, **more).prompt)

    def closes_thinking(self, prompt: str) -> str:
        """A prompt that begins the model's thinking, with that ended: what is forced by a grammar is no thinking."""
        end = opens_thinking(prompt)
        return prompt if end is None else f"{prompt.rstrip()}\n\n{end}\n\n"


def _told(messages: list[dict[str, Any]], functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tools and their calls as text, for a template that knows none."""
    found = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls") or ():
            function = call["function"]
            text = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
            content += f"{'' if not content else chr(10)}{HERMES.start}\n{text}\n{HERMES.end}"
        if message["role"] == "tool":
            found.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            found.append({"role": message["role"], "content": content})
    if functions:
        told = _TOLD.format("\n".join(json.dumps(f, ensure_ascii=False) for f in functions))
        if found and found[0]["role"] == "system":
            found[0] = {"role": "system", "content": f"{found[0]['content']}\n\n{told}"}
        else:
            found.insert(0, {"role": "system", "content": told})
    return found


def _joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system's messages put before what the user says first, for a template that has none of them; equal roles in a row are one message."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    found: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "system":
            continue
        if system and message["role"] == "user":
            message, system = {**message, "content": f"{system}\n\n{message['content']}"}, ""
        if found and found[-1]["role"] == message["role"] and not message.get("tool_calls") and message["role"] != "tool":
            found[-1] = {**found[-1], "content": f"{found[-1]['content']}\n\n{message['content']}"}
        else:
            found.append(message)
    return found or [{"role": "user", "content": system}]


def _as_text(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls whose arguments are JSON, as OpenAI has them; most templates want objects."""
    return [{**c, "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}} for c in calls]


# --- what is asked ----------------------------------------------------------------------------------------------------------------


def messages_of(fields: Fields, template: str = "") -> list[dict[str, Any]]:
    """The field `messages` as templates want them: content is text, arguments are objects. Raises ApiError."""
    records = fields.records("messages")
    if not records:
        raise bad("messages must be a list of at least one message.", "messages")
    return [_message(record, template) for record in records]


def _message(record: Fields, template: str) -> dict[str, Any]:
    role = record.text("role")
    if role not in ROLES:
        raise bad(f"{record.name('role')} must be one of {', '.join(ROLES)}.", record.name("role"))
    if role == "developer" and "developer" not in template:
        role = "system"
    if role == "function":
        role = "tool"
    message: dict[str, Any] = {"role": role, "content": content_of(record)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if record.get(key) is not None:
            message[key] = record.text(key)
    calls = record.records("tool_calls")
    if calls:
        message["tool_calls"] = [_asked(call) for call in calls]
    elif record.get("content") is None and role not in ("assistant", "tool"):
        raise bad(f"{record.name('content')} is missing.", record.name("content"))
    return message


def _asked(call: Fields) -> dict[str, Any]:
    function = call.record("function")
    if function is None or not function.text("name"):
        raise bad(f"{call.name('function')} must have a name.", call.name("function"))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = {"text": arguments}  # as the model wrote it; templates want an object
    return {"id": call.text("id"), "type": "function", "function": {"name": function.text("name"), "arguments": arguments or {}}}


def content_of(record: Fields, key: str = "content") -> str:
    """Text, or parts of text. Raises ApiError for parts of another kind."""
    value = record.get(key)
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for part in record.records(key):
        kind = part.text("type", "text")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            raise bad(f"{part.name('type')} is {kind!r}; this server reads text only.", part.name("type"))
        texts.append(part.text("refusal" if kind == "refusal" else "text"))
    return "".join(texts)
