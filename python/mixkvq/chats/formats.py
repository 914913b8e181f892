"""Chats as files: JSON with the whole tree, Markdown and ShareGPT with the branch that is shown."""

from __future__ import annotations

import json
import re
from typing import Any

from ..core.errors import StoreError
from .records import ROLES, STATES, Message
from .store import Store

FORMAT, VERSION = "mixkvq-chat-tree", 1
FORMATS = {"json": "application/json", "markdown": "text/markdown", "sharegpt": "application/json"}
"""By name, the type of the file."""
ENDINGS = {"json": ".json", "markdown": ".md", "sharegpt": ".sharegpt.json"}

_MARK = re.compile(r"^<!-- (\\*)message: (system|user|assistant|thinking) -->$", re.MULTILINE)
_FROM = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
}
_HEADINGS = {"system": "System", "user": "You", "assistant": "Assistant", "thinking": "Thinking"}


def export(store: Store, chat: int, form: str) -> str:
    """A chat as a text in one of FORMATS. Raises StoreError."""
    if form == "json":
        return _to_json(store, chat)
    if form == "markdown":
        return _to_markdown(store, chat)
    if form == "sharegpt":
        return _to_sharegpt(store, chat)
    raise StoreError(f"{form!r} is no format; there are {', '.join(FORMATS)}.")


def take(store: Store, text: str) -> list[int]:
    """The chats of a file in any of FORMATS, or of `mixkvq run`'s /save, put into a store; their numbers.

    Raises StoreError, and none is added then.
    """
    found = parse(text)
    added: list[int] = []
    try:
        for each in found:
            added.append(_add(store, each))
    except BaseException:
        for chat in added:
            store.delete(chat)
        raise
    return added


# --- reading --------------------------------------------------------------------------------------------------------------------


def parse(text: str) -> list[dict[str, Any]]:
    """Chats as `export` writes them to JSON. Raises StoreError with a sentence if there are none."""
    if text.lstrip("\ufeff \t\r\n")[:1] in ("{", "["):
        try:
            data = json.loads(text.lstrip("\ufeff"))
        except (ValueError, RecursionError) as e:
            raise StoreError(f"The file is not JSON: {e}.") from None
        found = _of_json(data)
    else:
        found = _of_markdown(text)
    if not any(chat["messages"] for chat in found):
        raise StoreError("The file holds no chat: it must be Markdown or JSON as this program exports it, or ShareGPT.")
    for chat in found:
        _check(chat)
    return found


def _of_json(data: Any) -> list[dict[str, Any]]:
    rows = data if isinstance(data, list) else [data]
    if rows and all(isinstance(row, dict) and "role" in row for row in rows):
        return [_of_line(rows)]
    found = []
    for row in rows:
        if not isinstance(row, dict):
            raise StoreError("The file holds something else than chats.")
        if row.get("format") == FORMAT:
            if row.get("version") != VERSION:
                raise StoreError(f"The file is of version {row.get('version')!r}, and this program reads version {VERSION}.")
            found.append(row)
        elif isinstance(row.get("conversations"), list):
            found.append(_of_sharegpt(row))
        elif isinstance(row.get("messages"), list):
            found.append({**_of_line(row["messages"]), "title": row.get("title") or ""})
        else:
            raise StoreError("The file holds something else than chats.")
    return found


def _of_line(rows: list[Any], role: str = "role", content: str = "content") -> dict[str, Any]:
    """Messages one after the other."""
    system: list[str] = []
    messages: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        who = _FROM.get(str(row.get(role))) if isinstance(row, dict) else None
        if who is None or not isinstance(row.get(content), str):
            raise StoreError(f"Message {i + 1} of the file has no known role or no text.")
        if who == "system":
            system.append(row[content])
        else:
            reasoning = row.get("reasoning_content") or ""
            messages.append({"parent": len(messages) - 1 if messages else None, "role": who, "content": row[content], "reasoning": reasoning})
    return {"title": "", "system": "\n\n".join(system), "settings": {}, "messages": messages}


def _of_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    found = _of_line(row["conversations"], "from", "value")
    system = row.get("system") if isinstance(row.get("system"), str) else ""
    return {**found, "title": row.get("title") or "", "system": system or found["system"]}


def _of_markdown(text: str) -> list[dict[str, Any]]:
    text = text.lstrip("\ufeff").replace("\r\n", "\n")
    marks = [m for m in _MARK.finditer(text) if not m[1]]
    title = re.match(r"# (.*)\n", text)
    rows: list[dict[str, Any]] = []
    thinking = ""
    for mark, after in zip(marks, [*marks[1:], None]):
        part = text[mark.end() : after.start() if after is not None else len(text)]
        part = part.removeprefix(f"\n## {_HEADINGS[mark[2]]}\n\n").removesuffix("\n")
        part = _MARK.sub(lambda m: m[0].replace(m[1], m[1][1:], 1), part.removesuffix("\n"))
        if mark[2] == "thinking":
            thinking = part
        else:
            rows.append({"role": mark[2], "content": part, "reasoning_content": thinking})
            thinking = ""
    return [{**_of_line(rows), "title": title[1] if title else ""}]


def _check(chat: dict[str, Any]) -> None:
    """Raises StoreError for what is no tree."""
    for name, kind in (("title", str), ("system", str), ("settings", dict), ("messages", list)):
        if not isinstance(chat.get(name), kind):
            raise StoreError(f"The file holds a chat whose {name} is missing or of another kind.")
    for i, row in enumerate(chat["messages"]):
        parent, shown = (row.get(key) for key in ("parent", "shown")) if isinstance(row, dict) else (-1, None)
        text = isinstance(row, dict) and row.get("role") in ROLES and isinstance(row.get("content"), str)
        known = text and isinstance(row.get("reasoning", ""), str) and row.get("state", "done") in STATES and isinstance(row.get("figures", {}), dict)
        files = row.get("files", []) if known else None
        plain = isinstance(files, list) and all(
            isinstance(f, dict) and isinstance(f.get("name"), str) and isinstance(f.get("text"), str) for f in files
        )
        made = row.get("created") if known else 0.0
        plain = plain and (made is None or type(made) in (int, float))
        before = parent is None or (type(parent) is int and 0 <= parent < i)
        if not (plain and before and (shown is None or type(shown) is int)):
            raise StoreError(f"Message {i + 1} of the file has no known role, no text, or no place in the tree.")


def _add(store: Store, chat: dict[str, Any]) -> int:
    number = store.create(chat["title"] or _title(chat), chat["system"], chat["settings"])
    try:
        ids: list[int] = []
        for row in chat["messages"]:
            parent = None if row["parent"] is None else ids[row["parent"]]
            state = row.get("state", "done")
            more = {
                "reasoning": row.get("reasoning", ""),
                "files": row.get("files", ()),
                "figures": row.get("figures"),
                "created": row.get("created"),
            }
            ids.append(store.add(number, parent, row["role"], row["content"], state="cut" if state == "running" else state, **more))
        for shown in (row.get("shown") for row in chat["messages"]):
            if shown is not None and 0 <= shown < len(ids) and chat["messages"][shown]["parent"] is not None:
                store.show_here(ids[shown])
        first = chat.get("shown")
        if type(first) is int and 0 <= first < len(ids) and chat["messages"][first]["parent"] is None:
            store.show_here(ids[first])
    except BaseException:
        store.delete(number)
        raise
    return number


def _title(chat: dict[str, Any]) -> str:
    return title_of(next((row["content"] for row in chat["messages"] if row["role"] == "user"), ""))


def title_of(question: str, most: int = 60) -> str:
    """What a chat is called by its first question."""
    line = " ".join(question.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


# --- writing --------------------------------------------------------------------------------------------------------------------


def _to_json(store: Store, chat: int) -> str:
    about, messages = store.chat(chat), store.messages(chat)
    index = {m.id: i for i, m in enumerate(messages)}
    rows = []
    for m in messages:
        row = {key: value for key, value in m.as_dict().items() if key not in ("id", "chat")}
        rows.append({**row, "parent": None if m.parent is None else index[m.parent], "shown": None if m.shown is None else index[m.shown]})
    shown = None if about.shown is None else index[about.shown]
    found = {"format": FORMAT, "version": VERSION, "title": about.title, "system": about.system, "settings": about.settings, "shown": shown}
    return json.dumps({**found, "messages": rows}, indent=1, ensure_ascii=False) + "\n"


def _to_markdown(store: Store, chat: int) -> str:
    about = store.chat(chat)

    def part(kind: str, text: str) -> str:
        text = _MARK.sub(lambda m: m[0].replace("<!-- ", "<!-- \\", 1), text.replace("\r\n", "\n"))
        return f"<!-- message: {kind} -->\n## {_HEADINGS[kind]}\n\n{text}\n\n"

    parts = [f"# {' '.join(about.title.split())}\n\n"]
    if about.system:
        parts.append(part("system", about.system))
    for m in store.branch(chat):
        if m.reasoning:
            parts.append(part("thinking", m.reasoning))
        parts.append(part(m.role, m.text()))
    return "".join(parts)


def _to_sharegpt(store: Store, chat: int) -> str:
    about = store.chat(chat)
    rows = [{"from": "system", "value": about.system}] if about.system else []
    rows += [_sharegpt_row(m) for m in store.branch(chat)]
    return json.dumps([{"title": about.title, "conversations": rows}], indent=1, ensure_ascii=False) + "\n"


def _sharegpt_row(m: Message) -> dict[str, str]:
    return {"from": "human" if m.role == "user" else "gpt", "value": m.text(), **({"reasoning_content": m.reasoning} if m.reasoning else {})}
