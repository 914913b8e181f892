"""stdout and stderr that may be missing, closed, full or read by nobody: what is said there must not cost what is computed."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator


def fill_missing() -> None:
    """Open /dev/null in place of a closed descriptor 0, 1 or 2: the next file would get its number, and what others print with it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)


def discard(fd: int) -> None:
    """Let a descriptor lead nowhere, so that what is still in a buffer can be flushed without an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def say(text: str) -> None:
    """A line on stderr, if there is one that takes it."""
    stream = sys.stderr
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError):
        if not isinstance(stream, io.TextIOWrapper) or not _has_descriptor(stream):
            print(text, file=stream)
            return
        stream.flush()
        # Past its buffer: what stayed there would fail again when the program ends, and change its exit status.
        os.write(stream.fileno(), f"{text}\n".encode(stream.encoding, "backslashreplace"))


def _has_descriptor(stream: io.TextIOWrapper) -> bool:
    try:
        stream.fileno()
    except (OSError, ValueError):
        return False
    return True


class Notes(io.TextIOWrapper):
    """Text on a copy of a descriptor. What cannot be written there is dropped, what the encoding lacks is escaped."""

    def __init__(self, fd: int, encoding: str) -> None:
        super().__init__(os.fdopen(os.dup(fd), "wb"), encoding=encoding, errors="backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            discard(self.fileno())
            return len(text)

    def flush(self) -> None:
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
