"""What stands before every endpoint: who may ask, from where, how much at a time; and the line in the log."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics

logger = logging.getLogger("mixkvq.server")
OPEN = ("/health", "/v1/health", "/open")  # without a key; the last brings one
BODY_SECONDS = 60.0


@dataclass(frozen=True)
class Rules:
    """Who may ask, and how much at a time.

    host: what the server listens on. keys: one of them must come with a request; none: any may ask. hosts: further names by which the server is
    called. origins: pages of other servers that may ask. largest: bytes of a body. cookie: a key may come in the one of this name.
    """

    host: str = "127.0.0.1"
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    largest: int = 32 << 20
    cookie: str = ""

    def knows_host(self, name: str) -> bool:
        """Whether a request's Host is one of ours. A page whose name was made to lead here (DNS rebinding) sends its own.

        A name is known if it was given. Addresses cannot be rebound: where the server listens on all of them, any is ours.
        """
        try:
            host = (urlsplit(f"//{name}").hostname or "").lower()
        except ValueError:
            return False
        if host in ("localhost", "127.0.0.1", "::1", self.host.lower(), *(h.lower() for h in self.hosts)):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return self.host in ("0.0.0.0", "::", "")

    def knows_origin(self, origin: str, host: str, scheme: str) -> bool:
        """Whether a page from there may ask: ours, or one that was named."""
        return origin.rstrip("/") in self.origins or origin == f"{scheme}://{host}"


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["said"] = ""
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *_headers(origin)]}
            await send(message)

        try:
            refused = self._refused(scope, headers)
            if refused is not None:
                await refused(scope, receive, answer)
            else:
                await self._app(scope, _Limited(receive, self._rules.largest), answer)
        finally:
            route = scope.get("route")
            self._metrics.answers[getattr(route, "path", "other"), str(status or 499)] += 1
            took, said = time.monotonic() - began, scope["state"]["said"]
            path = scope["path"].encode("ascii", "backslashreplace").decode()[:200]
            logger.info("%s %s %s %.3f s%s", scope["method"], path.replace("\n", "\\n"), status or "gone", took, f" {said}" if said else "")

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that may not be asked; to a browser's question whether it may be (CORS), too."""
        rules, host, origin = self._rules, headers.get("host", ""), headers.get("origin")
        if not rules.knows_host(host):
            return _error(ApiError(403, "The server is not known by this Host; --allow-host names further ones.", kind="permission_error"))
        if origin is not None and not rules.knows_origin(origin, host, scope["scheme"]):
            return _error(ApiError(403, "Pages of this Origin may not ask; --allow-origin names those that may.", kind="permission_error"))
        if scope["method"] == "OPTIONS":
            allowed = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key"}
            return Response(status_code=204, headers=allowed)
        if rules.keys and scope["path"] not in OPEN and not self._has_key(headers):
            error = ApiError(401, "The API key is missing or wrong.", kind="authentication_error", code="invalid_api_key")
            return _error(error, {"WWW-Authenticate": "Bearer"})
        if _number(headers.get("content-length")) > rules.largest:
            return _error(too_large(rules.largest))
        return None

    def _has_key(self, headers: Headers) -> bool:
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not given and self._rules.cookie:
            given = cookie_parser(headers.get("cookie", "")).get(self._rules.cookie, "")
        return any([hmac.compare_digest(given.encode(), key.encode()) for key in self._rules.keys])


def too_large(largest: int) -> ApiError:
    """A body of more bytes than are taken."""
    return ApiError(413, f"The body is larger than {largest} bytes; --max-body sets the limit.", code="request_too_large")


class _Limited:
    """Receives a body of limited size in limited time."""

    def __init__(self, receive: Receive, largest: int) -> None:
        self._receive, self._left, self._largest = receive, largest, largest
        self._until, self._whole = time.monotonic() + BODY_SECONDS, False

    async def __call__(self) -> Message:
        """ASGI."""
        if self._whole:  # what comes now is that the client has gone
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._until - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(408, f"The body did not come within {BODY_SECONDS:g} seconds.", kind="timeout_error") from None
        self._left -= len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._left < 0:
            raise too_large(self._largest)
        return message


def _headers(origin: str | None) -> list[tuple[bytes, bytes]]:
    """Of every answer. Never credentials, and never any origin: only the one that was checked."""
    found = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
    if origin is not None:
        found += [(b"access-control-allow-origin", origin.encode("latin-1", "replace")), (b"vary", b"Origin")]
    return found


def _error(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error.body(), error.status, headers)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 20 else 0


def said(request: Any, text: str) -> None:
    """What the log says of a request beside its status: figures, no text of it."""
    request.scope["state"]["said"] = text
