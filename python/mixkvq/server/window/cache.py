"""What the cache holds of a chat, for the window; and what goes of it with a chat that is deleted."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from bridge import states

from ...core.errors import StateError
from ..service import Service
from .answers import Answer

_PAGE = 128  # tokens
_Q8_0 = 8.5 / 16  # bits of an element of llama.cpp's q8_0, against F16


def figures(service: Service, answer: Answer | None) -> dict[str, Any]:
    """Of a chat whose last answer this is, and of the whole cache; runs in the engine's thread.

    tokens: of the chat in its stream, of n_ctx. f16_tokens, packed_tokens: of all streams, by pages, the mean of the layers. Sizes in bytes, of what
    all streams hold: as it is, in F16, in q8_0.
    """
    engine = service.answering
    llama = engine.llama
    stats = llama.kv_stats()
    layers = llama._session.layers() if llama._session is not None else []
    held = [llama.tokens_of(i) for i in range(llama.n_seq)]
    n = sum(map(len, held))
    f16 = stats["bytes_f16"] * n // stats["n_cells"] if stats["n_cells"] else 0
    packed = _PAGE * sum(layer["pages_packed"] for layer in layers) / max(1, len(layers))
    return {
        "tokens": len(held[answer.stream]) if _holds(held, answer) and answer is not None else 0,
        "n_ctx": engine.n_ctx,
        "all_tokens": n,
        "packed_tokens": min(n, round(packed)),
        "f16_tokens": n - min(n, round(packed)),
        "streams": [len(tokens) for tokens in held],
        "bits": round(stats["total_bits"], 3),
        "bytes": stats["bytes_used"] * llama.n_seq,
        "bytes_f16": f16,
        "bytes_q8_0": round(f16 * _Q8_0),
        "parked": engine.totals["parked"],
        "resumed": engine.totals["resumed"],
    }


def _holds(held: list[list[int]], answer: Answer | None) -> bool:
    """Whether a chat's stream is still its own."""
    return answer is not None and answer.stream >= 0 and bool(answer.prompt) and held[answer.stream][: len(answer.prompt)] == answer.prompt


def layers(service: Service) -> list[dict[str, Any]]:
    """Every cache tensor: its layer, what it is, precision and pages; runs in the engine's thread."""
    session = service.answering.llama._session
    wanted = ("layer", "is_value", "kind", "reason", "tiers", "value_bits", "body_bits", "pages_packed", "pages_f16", "bytes")
    return [] if session is None else [{key: layer[key] for key in wanted} for layer in session.layers()]


def forget(service: Service, folder: Path | None, beginnings: list[bytes]) -> int:
    """Empty the streams and delete the packed states that begin like a chat; runs in the engine's thread. How many files."""
    engine = service.answering
    starts = [np.frombuffer(b, np.int32) for b in beginnings]

    def begins(tokens: Any) -> bool:
        return any(len(tokens) >= len(start) and np.array_equal(tokens[: len(start)], start) for start in starts if len(start))

    for stream in range(engine.llama.n_seq):
        if stream not in engine.jobs() and begins(np.asarray(engine.llama.tokens_of(stream), np.int32)):
            engine.llama.forget(stream)
    n = 0
    for path in folder.glob("*" + states.SUFFIX) if folder is not None else ():
        with contextlib.suppress(StateError, OSError):
            if begins(states.read_head(path).tokens):
                path.unlink()
                n += 1
    return n
