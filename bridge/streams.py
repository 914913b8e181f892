"""stdout and stderr that may be missing, closed, full or read by nobody: what is said there must not cost what is computed."""

from __future__ import annotations

import contextlib
import io
import os
import sys


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
