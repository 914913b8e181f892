"""The application: which endpoint answers what."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from . import native, slots
from .chat import chat
from .completions import completion
from .embeddings import embeddings
from .errors import ApiError, of_exception
from .fields import Fields, parse
from .guards import Guard, Rules, said
from .native import Native
from .responses import Response as ResponsesRun
from .responses import respond
from .service import Run, Service


class Running(Protocol):
    """A request that runs."""

    run: Run

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""

    def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """The answer as it comes."""


def create_app(service: Service, rules: Rules | None = None, more: Sequence[BaseRoute] = ()) -> ASGIApp:
    """The server as an ASGI application. more: further routes, behind its own."""
    endpoint = Endpoints(service)
    answer, give = endpoint.answer, endpoint.give
    routes = [
        Route("/health", endpoint.health),
        Route("/v1/health", endpoint.health),
        *(Route(path, endpoint.models) for path in ("/v1/models", "/models")),
        Route("/v1/models/{model:path}", endpoint.model),
        *(Route(path, answer(chat), methods=["POST"]) for path in ("/v1/chat/completions", "/chat/completions")),
        Route("/v1/completions", answer(completion), methods=["POST"]),
        *(Route(path, answer(respond), methods=["POST"]) for path in ("/v1/responses", "/responses")),
        *(Route(path, answer(native.native), methods=["POST"]) for path in ("/completion", "/completions")),
        *(Route(path, give(embeddings), methods=["POST"]) for path in ("/v1/embeddings", "/embeddings")),
        Route("/tokenize", give(native.tokenize), methods=["POST"]),
        Route("/detokenize", give(native.detokenize), methods=["POST"]),
        Route("/apply-template", give(native.apply_template), methods=["POST"]),
        Route("/props", endpoint.props),
        Route("/slots", endpoint.slots),
        Route("/slots/{slot:int}", endpoint.slot, methods=["POST"]),
        Route("/metrics", endpoint.metrics),
        *more,
    ]
    handlers: dict[Any, Any] = {HTTPException: _http, ApiError: _failed, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, rules or Rules(), service.metrics)


class Endpoints:
    """The endpoints of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def answer(self, begin: Callable[[Service, Fields], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that generates; `stream` in the body says how it answers."""

        async def endpoint(request: Request) -> Response:
            try:
                fields = Fields(parse(await request.body()))
                stream = fields.flag("stream")
                running: Running = await begin(self._service, fields)
                if stream:
                    headers = {"X-Accel-Buffering": "no"}
                    return StreamingResponse(self._events(request, running), media_type="text/event-stream", headers=headers)
                return await self._whole(request, running)
            except Exception as e:  # noqa: BLE001 - every error has OpenAI's shape
                return _failed_response(e)

        return endpoint

    async def _whole(self, request: Request, running: Running) -> Response:
        """The answer in one piece, unless the client goes away."""
        task = asyncio.ensure_future(running.whole())
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                said(request, "the client has gone")
                return Response(status_code=499)
            body = task.result()
            self._say(request, running, body.get("timings"))
            return JSONResponse(body)
        finally:
            running.run.cancel()
            for each in (task, gone):
                each.cancel()
                with contextlib.suppress(BaseException):
                    await each

    async def _events(self, request: Request, running: Running) -> AsyncIterator[bytes]:
        """Server-sent events."""
        typed, plain, timings = isinstance(running, ResponsesRun), isinstance(running, Native), None
        chunks = running.chunks()
        try:
            async for chunk in chunks:
                if chunk is None:
                    yield b": waiting\n\n"
                    continue
                timings = chunk.get("timings") or chunk.get("response", {}).get("timings") or timings
                name = f"event: {chunk['type']}\n" if typed else ""
                text = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
                yield f"{name}data: {text}\n\n".encode()
            if not typed and not plain:
                yield b"data: [DONE]\n\n"
        except Exception as e:  # noqa: BLE001 - the status is sent already: the error is the last event
            error = of_exception(e).body()
            event = {"type": "error", **error["error"]} if typed else error
            yield f"{'event: error' + chr(10) if typed else ''}data: {json.dumps(event)}\n\n".encode()
        finally:
            running.run.cancel()
            self._say(request, running, timings)

    def _say(self, request: Request, running: Running, timings: dict[str, Any] | None) -> None:
        jobs = running.run.jobs
        prompt, cached, generated = len(jobs[0].prompt), max(j.cached for j in jobs), sum(j.generated for j in jobs)
        slots = ",".join(str(j.stream) for j in jobs)
        said(request, f"prompt {prompt} (cached {cached}), answer {generated}, slot {slots}{'' if timings else ', not finished'}")

    def give(self, make: Callable[[Service, Fields], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that answers at once."""

        async def endpoint(request: Request) -> Response:
            try:
                return JSONResponse(await make(self._service, Fields(parse(await request.body()))))
            except Exception as e:  # noqa: BLE001 - every error has OpenAI's shape
                return _failed_response(e)

        return endpoint

    async def health(self, request: Request) -> Response:
        """Whether the server can answer."""
        engine = self._service.engine
        if engine is not None and not engine.runs:
            return _failed_response(ApiError(503, "The server is ending.", kind="unavailable_error"))
        return JSONResponse({"status": "ok"})

    def _about(self) -> dict[str, Any]:
        service = self._service
        return {"id": service.name, "object": "model", "created": service.created, "owned_by": "mixkvq", "meta": service.facts.get("meta", {})}

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        """The model, by its name."""
        if request.path_params["model"] != self._service.name:
            error = ApiError(404, f"There is no such model here; this server has {self._service.name}.", code="model_not_found", param="model")
            return _failed_response(error)
        return JSONResponse(self._about())

    async def props(self, request: Request) -> Response:
        """llama-server's facts."""
        return JSONResponse(await native.props(self._service))

    async def slots(self, request: Request) -> Response:
        """What streams hold."""
        try:
            return JSONResponse(await slots.slots(self._service))
        except Exception as e:  # noqa: BLE001 - every error has OpenAI's shape
            return _failed_response(e)

    async def slot(self, request: Request) -> Response:
        """Save, restore or erase one."""
        try:
            body = await request.body()
            fields = Fields(parse(body) if body else {})
            action = request.query_params.get("action", "")
            return JSONResponse(await slots.act(self._service, request.path_params["slot"], action, fields))
        except Exception as e:  # noqa: BLE001 - every error has OpenAI's shape
            return _failed_response(e)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        if not self._service.shows_metrics:
            return _failed_response(ApiError(501, "This server shows no metrics; start it with --metrics.", kind="not_supported_error"))
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _gone(request: Request) -> None:
    """Until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failed_response(e: BaseException) -> Response:
    if isinstance(e, ClientDisconnect):
        return Response(status_code=499)
    error = of_exception(e)
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body(), error.status, headers)


async def _failed(request: Request, e: Exception) -> Response:
    return _failed_response(e)


async def _http(request: Request, e: Exception) -> Response:
    """What Starlette refuses: paths and methods that are not served."""
    assert isinstance(e, HTTPException)
    kind = "not_found_error" if e.status_code == 404 else "invalid_request_error"
    error = ApiError(e.status_code, f"{request.method} {request.url.path}: {e.detail}.", kind=kind)
    return JSONResponse(error.body(), error.status, e.headers)
