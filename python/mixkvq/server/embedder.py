"""A model that makes embeddings, as the server uses it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from bridge.llama import Llama


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
