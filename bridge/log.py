"""llama.cpp's log: what of it is printed, and what becomes the text of an exception."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from . import streams
from ._compat import C, is_verbose, print_log

_ERROR = 4  # enum ggml_log_level; llama-cpp-python still has the numbers of an older ggml

_SIZES = re.compile(r"^llama_(kv_cache|memory_recurrent): size =|compute buffer size =")  # the lines that are kept


def sentence(text: str) -> str:
    """First letter up (unless the first word is a name like llama.cpp), one full stop, one line."""
    text = " ".join(text.split()).rstrip(".")
    if text and text.split()[0].rstrip(",:").isalpha():
        text = text[:1].upper() + text[1:]
    return text + "." if text else text


class Log:
    """Stands between llama.cpp's log and llama-cpp-python's printer.

    The printer decides by `verbose` as before. Besides, the last errors of each thread are kept to explain a failure that
    llama-cpp-python reports without a reason.
    """

    def __init__(self) -> None:
        self._callback = C.llama_log_callback(self._on_line)
        # llama.cpp may log while the interpreter shuts down and this module is gone already: never free it
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._callback))
        self._installed = False
        self._thread = threading.local()
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self.quiet = False  # True: llama.cpp's own errors go into our exceptions only

    def install(self) -> None:
        """Take the place of llama-cpp-python's own callback."""
        if not self._installed:
            self.attach()
            self._installed = True

    def attach(self) -> None:
        """The same, whether or not it was done before: another may have been installed since."""
        C.llama_log_set(self._callback, ctypes.c_void_p(0))

    def begin(self) -> None:
        """A load begins in this thread: forget what it logged so far."""
        self._thread.errors, self._thread.caches, self._thread.loading = [], [], True

    @contextlib.contextmanager
    def kept(self) -> Iterator[Callable[[], str]]:
        """What this thread logs meanwhile is not printed, whatever `verbose` says; the value returns the first error among it, or ""."""
        self.install()
        before = getattr(self._thread, "errors", [])
        self._thread.errors, self._thread.kept = [], True
        try:
            yield self.first_error
        finally:
            self._thread.errors, self._thread.kept = before, False

    def _on_line(self, level: int, raw: bytes, _: Any) -> None:
        try:
            text = raw.decode("utf-8", errors="replace")
            if level == _ERROR:
                errors = self._thread.__dict__.setdefault("errors", [])
                errors.append(text.strip())
                del errors[:-20]
            elif _SIZES.search(text):
                self._thread.__dict__.setdefault("caches", []).append(text.strip())
            if getattr(self._thread, "kept", False):
                return
            # What a load says becomes the text of an exception; it need not be said twice. Without a stderr print would take stdout.
            if sys.stderr is not None and (is_verbose() or not (self.quiet or getattr(self._thread, "loading", False))):
                print_log(level, text)
        except Exception:  # noqa: BLE001 - nothing may escape into C
            pass

    def say(self, text: str) -> None:
        """A warning on stderr, each text once in a process."""
        with self._lock:
            if text in self._said:
                return
            self._said.add(text)
        streams.say(text)

    def end(self) -> None:
        """The load has ended: errors are printed again as `verbose` says."""
        self._thread.loading = False

    def first_error(self) -> str:
        """What this thread's log said first about a failure, without a full stop, or ""."""
        for line in getattr(self._thread, "errors", []):
            # "llama_model_load: error loading model: unknown model architecture: 'x'": the last error repeats, the first explains
            text = re.sub(r"^[\w~]+: ", "", line)
            text = re.sub(r"^error loading model: ", "", text)
            if text:
                return " ".join(text.split()).rstrip(".")
        return ""

    def reason(self, what: str) -> str:
        """`what`, with what this thread's log said about it."""
        error = self.first_error()
        return f"{what}: {error}" if error else what

    def caches(self) -> list[str]:
        """llama.cpp's own description of the caches that this thread created last."""
        return list(getattr(self._thread, "caches", []))

    def forget_caches(self) -> None:
        """Those that follow are described from here on."""
        self._thread.caches = []


log = Log()


def quiet_log() -> None:
    """From now on llama.cpp's errors are not printed unless `verbose`; what matters is in the exceptions."""
    log.quiet = True
    log.install()
