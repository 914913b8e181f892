"""Errors as OpenAI's clients read them: a status, and what was wrong in a sentence."""

from __future__ import annotations

import logging
from typing import Any

from ..core.errors import BridgeError, BusyError, SettingsError, TimeLimitError

logger = logging.getLogger("mixkvq.server")


class ApiError(Exception):
    """What a request is answered with instead. kind, code, param: OpenAI's `type`, `code` and `param`; more: further fields."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None, **more: Any
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param, self.more = status, message, kind, code, param, more

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code or self.status, **self.more}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong."""
    return ApiError(400, message, param=param, code=code)


def too_long(n_prompt: int, n_ctx: int) -> ApiError:
    """The prompt does not fit; with llama-server's fields beside OpenAI's."""
    message = f"The prompt has {n_prompt} tokens and the context {n_ctx}, of which the answer needs one at least."
    kind, code = "exceed_context_size_error", "context_length_exceeded"
    return ApiError(400, message, kind=kind, code=code, n_prompt_tokens=n_prompt, n_ctx=n_ctx)


def of_exception(e: BaseException) -> ApiError:
    """The answer for whatever went wrong."""
    if isinstance(e, ApiError):
        return e
    if isinstance(e, BusyError):
        return ApiError(503, str(e), kind="unavailable_error", code="server_busy")
    if isinstance(e, TimeLimitError):
        return ApiError(504, str(e), kind="timeout_error", code="timeout")
    if isinstance(e, SettingsError):
        return bad(str(e))
    if isinstance(e, BridgeError):
        return ApiError(500, str(e), kind="server_error")
    logger.error("a request failed", exc_info=e)
    return ApiError(500, "The server failed; its log says where.", kind="server_error")
