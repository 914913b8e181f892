"""The window's endpoints: the page, the chats, and their answers."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from ...chats import Store
from ...chats.formats import ENDINGS, FORMATS, export, take, title_of
from ...core.errors import StoreError
from ..errors import ApiError, bad, of_exception
from ..fields import Fields, parse
from ..guards import Rules
from ..service import Service
from . import cache
from .answers import Answers
from .history import checked_settings

PAGE = Path(__file__).parent / "page"
POLICY = (
    "default-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing from anywhere else; styles of single elements, which formulas have."""
LARGEST_FILE = 1 << 20  # characters of an attached file


class _Page(StaticFiles):
    """The files of the page, which may load nothing from elsewhere."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await super().__call__(scope, receive, answer)


class Window:
    """Chats of a store with a model.

    states: the folder of packed states that go with chats, if there is one. fits: says how long a context fits this machine.
    """

    def __init__(self, service: Service, store: Store, states: Path | None = None, fits: Callable[[], dict[str, Any]] | None = None) -> None:
        self.service, self.store, self.states, self._fits = service, store, states, fits
        self.answers = Answers(service, store)

    def routes(self, *more: BaseRoute) -> list[BaseRoute]:
        """To be mounted in the server's application. more: further ones, before the page."""
        at = "/window"
        message, chat = f"{at}/messages/{{message:int}}", f"{at}/chats/{{chat:int}}"
        return [
            Route(f"{at}/about", _endpoint(self.about)),
            Route(f"{at}/chats", _endpoint(self.chats)),
            Route(f"{at}/chats", _endpoint(self.create), methods=["POST"]),
            Route(chat, _endpoint(self.chat)),
            Route(chat, _endpoint(self.change), methods=["POST"]),
            Route(chat, _endpoint(self.delete), methods=["DELETE"]),
            Route(f"{chat}/messages", _endpoint(self.say), methods=["POST"]),
            Route(f"{chat}/export", _endpoint(self.export)),
            Route(f"{chat}/cache", _endpoint(self.cache)),
            Route(f"{message}/answer", _endpoint(self.answer), methods=["POST"]),
            Route(f"{message}/show", _endpoint(self.show), methods=["POST"]),
            Route(f"{message}/stop", _endpoint(self.stop), methods=["POST"]),
            Route(f"{message}/events", _endpoint(self.events)),
            Route(f"{at}/import", _endpoint(self.take), methods=["POST"]),
            Route(f"{at}/search", _endpoint(self.search)),
            Route(f"{at}/layers", _endpoint(self.layers)),
            Route(f"{at}/fits", _endpoint(self.fits)),
            *more,
            Mount("/", _Page(directory=PAGE, html=True)),
        ]

    # --- chats ---

    async def about(self, request: Request) -> Any:
        """The model, its defaults, and whether anything is kept."""
        service, s = self.service, self.service.sampling
        sampling = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "min_p": s.min_p, "repeat_penalty": s.repeat_penalty}
        facts = {"model": service.name, "n_ctx": service.answering.n_ctx, "cache": service.facts.get("cache", {}), "sampling": sampling}
        return {**facts, "max_tokens": service.max_tokens, "private": self.store.path is None}

    async def chats(self, request: Request) -> Any:
        """All of them, without their messages."""
        return [chat.as_dict() for chat in await run_in_threadpool(self.store.chats)]

    async def create(self, request: Request) -> Any:
        """A new one."""
        fields = Fields(parse(await request.body()))
        settings = checked_settings(self.service, fields.get("settings") or {})
        return {"id": await run_in_threadpool(self.store.create, fields.text("title"), fields.text("system"), settings)}

    async def chat(self, request: Request) -> Any:
        """A chat and its whole tree."""
        number = request.path_params["chat"]
        chat, messages = await run_in_threadpool(lambda: (self.store.chat(number), self.store.messages(number)))
        return {**chat.as_dict(), "messages": [m.as_dict() for m in messages]}

    async def change(self, request: Request) -> Any:
        """Its title, system message or settings."""
        fields = Fields(parse(await request.body()))
        given: dict[str, Any] = {key: fields.text(key) for key in ("title", "system") if fields.get(key) is not None}
        if fields.get("settings") is not None:
            given["settings"] = checked_settings(self.service, fields.get("settings"))
        await run_in_threadpool(lambda: self.store.change(request.path_params["chat"], **given))
        return {}

    async def delete(self, request: Request) -> Any:
        """The chat, and what the cache has of it."""
        chat = request.path_params["chat"]
        beginnings = await run_in_threadpool(self.store.readings, chat)
        await self.answers.forget(chat)
        await run_in_threadpool(self.store.delete, chat)
        return {"states": await self.service.asked(lambda: cache.forget(self.service, self.states, beginnings))}

    async def export(self, request: Request) -> Any:
        """As a file."""
        form = request.query_params.get("format", "json")
        chat = request.path_params["chat"]
        text = await run_in_threadpool(lambda: export(self.store, chat, form))
        headers = {"Content-Disposition": f'attachment; filename="chat-{chat}{ENDINGS[form]}"'}
        return Response(text, media_type=f"{FORMATS[form]}; charset=utf-8", headers=headers)

    async def take(self, request: Request) -> Any:
        """Chats of a file."""
        try:
            text = (await request.body()).decode("utf-8")
        except UnicodeDecodeError:
            raise bad("The file is not UTF-8 text.") from None
        return {"chats": await run_in_threadpool(take, self.store, text)}

    async def search(self, request: Request) -> Any:
        """Places where the words are."""
        hits = await run_in_threadpool(self.store.search, request.query_params.get("q", ""))
        return [{"chat": h.chat, "title": h.title, "message": h.message, "around": h.around} for h in hits]

    # --- messages ---

    async def say(self, request: Request) -> Any:
        """The user says something, behind a message or as the first; it is answered."""
        fields = Fields(parse(await request.body()))
        content, parent = fields.text("content"), fields.get("parent")
        chat = request.path_params["chat"]
        if parent is not None:
            parent = fields.whole("parent", 0, 0)
        files = [{"name": f.text("name"), "text": f.text("text")} for f in fields.records("files")]
        if not content.strip() and not files:
            raise bad("There is nothing to answer.", "content")
        if any(len(f["text"]) > LARGEST_FILE for f in files):
            raise bad(f"A file of more than {LARGEST_FILE} characters cannot be attached.", "files")

        def add() -> int:
            number = self.store.add(chat, parent, "user", content, files=files)
            if not self.store.chat(chat).title:
                self.store.change(chat, title=title_of(content or files[0]["name"]))
            return number

        question = await run_in_threadpool(add)
        return {"question": question, "answer": await self.answers.begin(question)}

    async def answer(self, request: Request) -> Any:
        """Answer a question once more; the new answer is a branch."""
        return {"answer": await self.answers.begin(request.path_params["message"])}

    async def show(self, request: Request) -> Any:
        """Show the branch of a message."""
        await run_in_threadpool(self.store.show, request.path_params["message"])
        return {}

    async def stop(self, request: Request) -> Any:
        """End an answer; what there is of it stays."""
        running = self.answers.get(request.path_params["message"])
        if running is not None:
            running.stop()
        return {}

    async def events(self, request: Request) -> Any:
        """A running answer, as server-sent events; of one that has ended its end."""
        number = request.path_params["message"]
        running = self.answers.get(number)
        message = await run_in_threadpool(self.store.message, number)

        async def events() -> AsyncIterator[bytes]:
            if running is None:
                yield _event({"type": "start", "content": message.content, "reasoning": message.reasoning})
                yield _event({"type": "end", "state": message.state, "figures": message.figures})
                return
            async for event in running.events():
                yield _event(event)

        return StreamingResponse(events(), media_type="text/event-stream")

    # --- the cache ---

    async def cache(self, request: Request) -> Any:
        """What it holds."""
        answer = self.answers.of(request.path_params["chat"])
        return await self.service.asked(lambda: cache.figures(self.service, answer))

    async def layers(self, request: Request) -> Any:
        """Layer by layer."""
        return await self.service.asked(lambda: cache.layers(self.service))

    async def fits(self, request: Request) -> Any:
        """How long a context fits here: measured, without loading anything."""
        if self._fits is None:
            raise ApiError(501, "This server does not know that.", kind="not_supported_error")
        return await run_in_threadpool(self._fits)


def opened(rules: Rules) -> Route:
    """Where a window comes in with the key in its address, which becomes a cookie: so addresses and histories do not keep it.

    Another page may lead here with any key; that must not take the window's cookie away.
    """

    async def endpoint(request: Request) -> Response:
        # no redirect: a browser that was led here by another page would not send the cookie with it
        response = Response('<!doctype html><meta http-equiv="refresh" content="0;url=/"><title>MixKVQ</title>', media_type="text/html")
        key = request.query_params.get("key", "")
        if not any(secrets.compare_digest(key.encode(), known.encode()) for known in rules.keys):
            return Response("The key is missing or wrong.", status_code=401, media_type="text/plain")
        response.set_cookie(rules.cookie, key, httponly=True, samesite="strict")
        return response

    return Route("/open", endpoint)


def _event(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _endpoint(make: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
    """JSON, and errors as the other endpoints have them."""

    async def endpoint(request: Request) -> Response:
        try:
            found = await make(request)
            return found if isinstance(found, Response) else JSONResponse(found)
        except StoreError as e:
            status = 404 if str(e).startswith("There is no ") else 507 if " full" in str(e) else 400
            error = ApiError(status, str(e), kind="store_error")
        except Exception as e:  # noqa: BLE001 - every error has one shape
            error = of_exception(e)
        return JSONResponse(error.body(), error.status)

    return endpoint
