"""/v1/embeddings: what a model makes of texts, where it is served for that."""

from __future__ import annotations

import base64
from typing import Any

from starlette.concurrency import run_in_threadpool

from .errors import ApiError, bad
from .fields import Fields
from .service import Service

MOST = 2048  # texts of a request


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
