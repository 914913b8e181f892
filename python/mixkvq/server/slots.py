"""/slots: what streams hold, and their states saved, restored and erased."""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any

from bridge.states import SUFFIX

from ..core.errors import StateError
from .errors import ApiError, bad
from .fields import Fields
from .native import settings_of
from .service import Service

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


async def slots(service: Service) -> list[dict[str, Any]]:
    """Every stream, without its text."""
    if not service.shows_slots:
        raise ApiError(501, "This server does not show its slots; start it without --no-slots.", kind="not_supported_error")
    engine = service.answering
    held = await service.asked(lambda: [len(engine.llama.tokens_of(i)) for i in range(engine.llama.n_seq)])
    jobs = engine.jobs()
    found: list[dict[str, Any]] = []
    for i, n in enumerate(held):
        job = jobs.get(i)
        row: dict[str, Any] = {"id": i, "n_ctx": engine.n_ctx, "n_tokens": n, "speculative": False, "is_processing": job is not None}
        if job is not None:
            row.update(id_task=job.number, params=settings_of(job.request, engine.n_ctx))
            row["next_token"] = {
                "n_decoded": job.generated,
                "n_remain": job.request.max_tokens - job.generated if job.request.max_tokens >= 0 else -1,
            }
        found.append(row)
    return found


async def act(service: Service, slot: int, action: str, fields: Fields) -> dict[str, Any]:
    """Save a slot's state into a file, put one back, or empty the slot. Raises ApiError."""
    engine = service.answering
    if action == "erase":

        def erase() -> int:
            engine.check_idle(slot)
            n = len(engine.llama.tokens_of(slot))
            engine.llama.forget(slot)
            return n

        return {"id_slot": slot, "n_erased": await service.asked(erase)}
    if action not in ("save", "restore"):
        raise bad("action must be save, restore or erase.", "action")
    if service.slots is None:
        raise ApiError(501, "This server saves no slots; start it with --slot-save-path FOLDER.", kind="not_supported_error")
    name = fields.text("filename")
    if not _NAME.fullmatch(name):
        raise bad("filename must be a name of letters, digits, ., _ and -, without a folder.", "filename")
    path = service.slots / (name if name.endswith(SUFFIX) else name + SUFFIX)
    began = time.monotonic()

    def save() -> tuple[int, int]:
        engine.check_idle(slot)
        size = engine.llama.save_file(path, slot)
        return len(engine.llama.tokens_of(slot)), size

    def restore() -> tuple[int, int]:
        engine.check_idle(slot)
        n = engine.llama.load_file(path, slot)
        engine.used(slot)
        return n, path.stat().st_size

    try:
        n, size = await service.asked(save if action == "save" else restore)
    except StateError as e:
        raise bad(str(e).replace(str(path), name), "filename") from None
    except OSError as e:
        raise ApiError(500, f"{name}: {e.strerror}.", kind="server_error") from None
    with contextlib.suppress(OSError):
        path.chmod(0o600)
    ms = round((time.monotonic() - began) * 1000, 3)
    if action == "save":
        return {"id_slot": slot, "filename": name, "n_saved": n, "n_written": size, "timings": {"save_ms": ms}}
    return {"id_slot": slot, "filename": name, "n_restored": n, "n_read": size, "timings": {"restore_ms": ms}}
