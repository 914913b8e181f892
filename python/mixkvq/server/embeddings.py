"""/v1/embeddings: what a model makes of texts, where it is served for that."""

from __future__ import annotations

import base64
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.concurrency import run_in_threadpool

from .errors import ApiError, bad
from .fields import Fields

if TYPE_CHECKING:
    from bridge.llama import Llama

    from .service import Service

MOST = 2048  # texts of a request


class Embedder:
    """A model loaded for its embeddings; one request at a time."""

    def __init__(self, llama: Llama) -> None:
        self.llama, self._lock = llama, threading.Lock()

    def tokens(self, text: str) -> list[int]:
        """As the model reads a text."""
        return list(self.llama.tokenize(text.encode("utf-8")))

    def embed(self, texts: list[str]) -> list[Any]:
        """A vector of length 1 for each text, float32; the mean over tokens where the model makes one for each."""
        with self._lock:
            rows = [np.asarray(self.llama.embed(text, normalize=False), np.float32) for text in texts]
        rows = [row.mean(0) if row.ndim == 2 else row for row in rows]
        return [row / max(float(np.linalg.norm(row)), 1e-12) for row in rows]

    def close(self) -> None:
        """Free the model, once it has ended what it does."""
        with self._lock:
            self.llama.close()


async def embeddings(service: Service, fields: Fields) -> dict[str, Any]:
    """The answer of /v1/embeddings. Raises ApiError."""
    embedder = service.embedder
    if embedder is None:
        raise ApiError(501, "This server does not make embeddings; start it with --embeddings.", kind="not_supported_error")
    texts = fields.get("input", "content")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or len(texts) > MOST or not all(isinstance(text, str) for text in texts):
        raise bad(f"input must be a text, or a list of 1 to {MOST} texts.", "input")
    form = fields.text("encoding_format", "float")
    if form not in ("float", "base64"):
        raise bad("encoding_format must be float or base64.", "encoding_format")
    counts = [len(await run_in_threadpool(embedder.tokens, text)) for text in texts]
    most = min(embedder.llama.n_batch, embedder.llama.n_ctx())
    if max(counts) > most or not min(counts):
        raise bad(f"A text of input has {max(counts) if min(counts) else 0} tokens; from 1 to {most} are taken.", "input")
    rows = await run_in_threadpool(embedder.embed, texts)
    data = [
        {"object": "embedding", "index": i, "embedding": base64.b64encode(row.tobytes()).decode() if form == "base64" else row.tolist()}
        for i, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    return {"object": "list", "model": service.name, "data": data, "usage": usage}
