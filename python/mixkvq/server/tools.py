"""Calls of functions: how a model's template writes them, the grammar that forces them, and how they are read back."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bridge.engine.sampling import grammar_for

from .errors import bad
from .fields import Fields


@dataclass(frozen=True)
class Call:
    """A call of a function. arguments: JSON."""

    name: str
    arguments: str
    id: str

    def as_dict(self) -> dict[str, Any]:
        """As in an answer of /v1/chat/completions."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class Form:
    """How calls are written.

    start: what they begin with. end: what each ends with, "" if they go up to the answer's end. whole: an answer that begins with a brace is a call,
    too. key: of the arguments. listed: several are one JSON list.
    """

    name: str
    start: str
    end: str
    key: str = "arguments"
    whole: bool = False
    listed: bool = False


HERMES = Form("hermes", "<tool_call>", "</tool_call>")
LLAMA = Form("llama", "<|python_tag|>", "", key="parameters", whole=True)
MISTRAL = Form("mistral", "[TOOL_CALLS]", "", listed=True)


def form_of(template: str) -> Form:
    """The form of a chat template. Models whose template knows no tools are told of Hermes' form."""
    if HERMES.start in template:
        return HERMES
    if MISTRAL.start in template:
        return MISTRAL
    if LLAMA.start in template or "ipython" in template:
        return LLAMA
    return HERMES


# --- what is asked ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """The functions of a request, and whether one must be called. choice: "none", "auto", "required", or a name.

    parallel: whether several may be called at once; None: where the model decides to, not where it must call one.
    """

    functions: tuple[dict[str, Any], ...] = ()
    choice: str = "none"
    parallel: bool | None = None

    @property
    def forced(self) -> tuple[dict[str, Any], ...]:
        """Those of which one must be called."""
        if self.choice in ("none", "auto"):
            return ()
        return tuple(f for f in self.functions if self.choice in ("required", f["name"]))


def tools_of(fields: Fields) -> Tools:
    """The fields tools, tool_choice and parallel_tool_calls; in the form of chat completions or of responses. Raises ApiError."""
    functions = []
    for tool in fields.records("tools"):
        if tool.text("type", "function") != "function":
            raise bad(f"{tool.name('type')} is {tool.get('type')!r}; this server calls functions only.", tool.name("type"))
        function = tool.record("function") or tool
        name = function.text("name")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name):
            raise bad(f"{function.name('name')} must be 1 to 128 letters, digits, _, . or -.", function.name("name"))
        parameters = function.record("parameters")
        functions.append(
            {"name": name, "description": function.text("description"), "parameters": parameters.values if parameters else {"type": "object"}}
        )
    names = [f["name"] for f in functions]
    choice = fields.get("tool_choice")
    if isinstance(choice, dict):
        record = Fields(choice, "tool_choice")
        choice = (record.record("function") or record).text("name")
        if choice not in names:
            raise bad(f"tool_choice names the function {choice!r}, which is not in tools.", "tool_choice")
        if choice in ("auto", "none", "required"):
            raise bad(f"A function called {choice!r} cannot be forced.", "tool_choice")
    elif choice is None:
        choice = "auto" if functions else "none"
    elif choice not in ("auto", "none", "required"):
        raise bad('tool_choice must be "auto", "none", "required" or an object that names a function.', "tool_choice")
    if choice == "required" and not functions:
        raise bad("tool_choice is required, and there are no tools.", "tool_choice")
    parallel = None if fields.get("parallel_tool_calls") is None else fields.flag("parallel_tool_calls")
    return Tools(tuple(functions), choice, parallel)


# --- grammars ---------------------------------------------------------------------------------------------------------------------


def grammar(form: Form, tools: Tools, *, started: bool = False) -> str:
    """Of one or several calls. started: what they begin with was written already. Raises SettingsError for parameters that are no JSON schema."""
    wanted = tools.forced or tools.functions
    several = bool(tools.parallel) and tools.choice == "required" if tools.forced else tools.parallel is not False
    definitions: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for function in wanted:
        schema = dict(function["parameters"])
        for key in ("$defs", "definitions"):  # references to them begin at the root
            if isinstance(schema.get(key), dict):
                definitions.setdefault(key, {}).update(schema.pop(key))
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, form.key: {"type": "object", **schema}},
                "required": ["name", form.key],
                "additionalProperties": False,
            }
        )
    one: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if form.listed:
        one = {"type": "array", "items": one, "minItems": 1, **({} if several else {"maxItems": 1})}
    rules = re.sub(r"^root ::=", "tool-calls ::=", grammar_for({**one, **definitions}), flags=re.MULTILINE)
    start, end = json.dumps(form.start), json.dumps(form.end)
    if form.listed:
        return f"root ::= {'' if started else start} tool-calls\n{rules}"
    if form.whole:
        return f"root ::= tool-calls\n{rules}"
    first, more = f'"\\n"? tool-calls "\\n"? {end}', f'("\\n"? {start} "\\n"? tool-calls "\\n"? {end})*'
    return f"root ::= {'' if started else start} {first} {more if several else ''}\n{rules}"


# --- reading --------------------------------------------------------------------------------------------------------------------------


def read_calls(form: Form, text: str, names: Sequence[str]) -> list[Call]:
    """The calls in what stood between a form's start and end; none if it is something else."""
    if form.listed and not text.lstrip().startswith(("[", "{")):
        return _named_calls(text, names)
    found: list[Call] = []
    decoder, at = json.JSONDecoder(), 0
    text = text.strip()
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            for row in value if isinstance(value, list) else [value]:
                found.append(_call(row, names))
            at += len(text[at:]) - len(text[at:].lstrip(" \n\t;,"))
    except (ValueError, RecursionError):
        return []
    return found


def _named_calls(text: str, names: Sequence[str]) -> list[Call]:
    """Mistral's newer form: name[ARGS]{...}, also name{...}."""
    found = []
    for part in text.split(MISTRAL.start):
        match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]+)?(?:\[ARGS\])?\s*(\{.*\})\s*", part, re.DOTALL)
        try:
            found.append(_call({"name": match[1], "arguments": json.loads(match[2])} if match else None, names))
        except (ValueError, RecursionError):
            return []
    return found


def _call(value: Any, names: Sequence[str]) -> Call:
    """Raises ValueError if it is none."""
    if not isinstance(value, dict) or value.get("name") not in names:
        raise ValueError
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False), new_id("call"))


def new_id(kind: str) -> str:
    """A name for what is answered."""
    return f"{kind}_{secrets.token_hex(12)}"
