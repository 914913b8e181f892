"""Chats that no stream holds any more, as packed state files of a folder: one comes back faster than it is read anew."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from mixkvq.core.errors import StateError

from .. import states
from ..state_caches import DiskCache
from .prefixes import common
from .streams import Streams

LEAST = 256  # tokens that are worth a file


class Parking(DiskCache):
    """A folder of the states of streams, together at most `capacity_bytes`; the least recently used ones go.

    A state fits contexts of as many streams, so others are not looked at. What is damaged is deleted. Raises SettingsError if the folder cannot be
    made or written to.
    """

    def of(self, llama: Streams) -> Parking:
        """The same folder, for one context."""
        view = self.serving({**states.identity(llama), "streams": llama.n_seq}, llama._can_go_back())
        assert isinstance(view, Parking)
        return view

    def best(self, prompt: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """How many tokens of a prompt the best file holds, and which tokens that is in whole."""
        best: tuple[int, tuple[int, ...]] = (0, ())
        for tokens in self._keys():
            n = common(tokens, prompt)
            if n > best[0] and (self._can_go_back or n == len(tokens)):
                best = n, tokens
        return best

    def park(self, llama: Streams, stream: int) -> int:
        """Keep what a stream holds; bytes of the file, 0 if there is no need of it or no room. A full disk costs the file, nothing else."""
        tokens = tuple(llama.tokens_of(stream))
        if len(tokens) < LEAST or any(len(other) >= len(tokens) and other[: len(tokens)] == tokens for other in self._keys()):
            return 0
        path = self._path(tokens)
        try:
            size = llama.save_file(path, stream)
        except OSError:
            return 0
        if self._can_go_back:
            for other in list(self._keys()):
                if len(other) < len(tokens) and tokens[: len(other)] == other:
                    self._drop(other)
        while self.cache_size > self.capacity_bytes:
            self._drop_oldest()
        return size if path.exists() else 0

    def resume(self, llama: Streams, stream: int, tokens: tuple[int, ...]) -> bool:
        """Put a file's state into a stream, in place of what it holds. False if it turned out to be damaged; it is deleted then."""
        path = self._path(tokens)
        try:
            llama.load_file(path, stream)
            with contextlib.suppress(OSError):
                os.utime(path, ns=(max(path.stat().st_atime_ns, *(used + 1 for used, _, _ in self._files())), path.stat().st_mtime_ns))
            return True
        except StateError:
            self._drop(tokens)
            return False
