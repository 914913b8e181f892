"""How long llama.cpp has loaded and computed in this process. What a tool takes beyond that is its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

_lock = threading.Lock()
_seconds = 0.0


def seconds() -> float:
    """Of all models and threads together."""
    return _seconds


@contextlib.contextmanager
def computing(sign: int = 1) -> Iterator[None]:
    """llama.cpp works in the body; with -1 it has called us there, and does not."""
    global _seconds
    begin = time.perf_counter()
    try:
        yield
    finally:
        with _lock:
            _seconds += sign * (time.perf_counter() - begin)


class Share:
    """A stopwatch from now on."""

    def __init__(self) -> None:
        self._began, self._computed = time.perf_counter(), seconds()

    def taken(self) -> dict[str, float]:
        """seconds: since then. outside_llama: the share of them in which llama.cpp neither loaded a model nor computed."""
        taken = time.perf_counter() - self._began
        share = 1 - (seconds() - self._computed) / taken if taken > 0 else 0.0
        return {"seconds": round(taken, 3), "outside_llama": round(max(0.0, share), 4)}
