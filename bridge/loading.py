"""What happens while llama.cpp loads a model: progress, and Ctrl-C, which has to wait for a place where it can be raised."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mixkvq.core.errors import BridgeError, ContextError, ContextTooLargeError, ModelFileError

from ._compat import context_failed, loading_failed
from .log import log, sentence


class Loading:
    """llama.cpp's progress callback. What `on_load` raises, and Ctrl-C, stop the load; `raised` is then what to raise."""

    def __init__(self, on_load: Callable[[float], None] | None) -> None:
        self.on_load = on_load
        self.raised: BaseException | None = None
        self._held: tuple[Any, ...] | None = None
        self._handler: Any = None

    def __call__(self, share: float, _: Any) -> bool:
        """Whether the load goes on; what `on_load` raises is kept in `raised`."""
        try:  # nothing may escape into C
            self._deliver()
            if self.on_load is not None:
                self.on_load(share)
        except BaseException as e:  # noqa: BLE001 - raised again after llama.cpp has given up
            self.raised = e
        return self.raised is None

    @contextlib.contextmanager
    def ctrl_c_held(self) -> Iterator[None]:
        """Keep a SIGINT for the callback: Python would raise KeyboardInterrupt wherever it stands, and ctypes drops what reaches it.

        That holds for llama.cpp's log as well, which it writes while devices are looked at and memory is measured.
        """
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or not callable(handler):
            yield
            return

        def hold(*arguments: Any) -> None:
            self._held = arguments

        self._handler = handler
        signal.signal(signal.SIGINT, hold)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)

    def _deliver(self) -> None:
        if self._held is not None:
            arguments, self._held = self._held, None
            self._handler(*arguments)

    def finish(self) -> None:
        """After a step that went through: raise what came in too late to stop it."""
        self._deliver()
        if self.raised is not None:
            raise self.raised


def explained(e: BaseException, path: str, session: Any) -> BaseException:
    """llama-cpp-python's error about the model at `path` as one of ours, with what the native session (or None) or llama.cpp's log said about it."""
    if isinstance(e, BridgeError) or not isinstance(e, (ValueError, RuntimeError, MemoryError)):
        return e
    said = session.error() if session is not None else ""
    if isinstance(e, MemoryError):
        return ContextTooLargeError(f"There is not enough memory for this context: {sentence(str(e)) or 'allocation failed.'}")
    if loading_failed(e):
        return ModelFileError(sentence(said or log.reason(f"llama.cpp cannot load {path}")))
    if context_failed(e):
        return ContextError(sentence(said or log.reason("llama.cpp could not create the context")))
    return e
