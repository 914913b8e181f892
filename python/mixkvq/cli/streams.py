"""stdout and stderr of a command: what cannot be written there must not cost what is computed."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator

from bridge.streams import discard, fill_missing, say

__all__ = ["Notes", "flush_stdout", "of_command", "say"]


class Notes(io.TextIOWrapper):
    """Text on a copy of a descriptor. What cannot be written there is dropped, what the encoding lacks is escaped."""

    def __init__(self, fd: int, encoding: str) -> None:
        super().__init__(os.fdopen(os.dup(fd), "wb"), encoding=encoding, errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        """Never fails; returns how many characters were taken."""
        try:
            return super().write(text)
        except OSError:
            discard(self.fileno())
            return len(text)

    def flush(self) -> None:
        """Never fails."""
        try:
            super().flush()
        except OSError:
            discard(self.fileno())
            super().flush()


@contextlib.contextmanager
def of_command() -> Iterator[None]:
    """While a command line runs: stderr takes everything, and no character is missing in stdout's encoding.

    llama-cpp-python points descriptor 2 at /dev/null while it loads; sys.stderr is a copy, so progress reaches the terminal nevertheless.
    """
    fill_missing()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    before = sys.stderr
    with Notes(2, getattr(before, "encoding", None) or "utf-8") as notes:
        sys.stderr = notes
        try:
            yield
        finally:
            sys.stderr = before


def flush_stdout() -> OSError | None:
    """Flush stdout. The error, if it cannot be written; nothing is left in its buffer then."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as e:
        discard(1)
        return e
    return None
