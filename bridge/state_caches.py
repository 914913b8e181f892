"""Caches of whole contexts for `Llama.set_cache`: a prompt that begins like one before goes on from there, without reading it anew.

They hold packed states, which take the memory of the cache itself and come back without loss. Everything else of a cache that llama-cpp-python
expects is `llama_cpp.llama_cache.BaseLlamaCache`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixkvq.core.errors import SettingsError, StateError
from mixkvq.core.files import write_atomically

from . import states
from ._compat import BaseLlamaCache, LlamaState

Tokens = tuple[int, ...]
DEFAULT_CAPACITY = 2 << 30


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    n = 0
    for x, y in zip(a, b):
        if x != y:
            break
        n += 1
    return n


class StateCache(BaseLlamaCache):
    """What both caches do. Of the entries the one with the longest common prefix is used; where there is no room the least recently used ones go.

    capacity_bytes: of all entries together. An entry that another one continues is dropped, unless the model cannot go back to it.
    `Llama.set_cache` takes the cache for the model that it is set for: entries of another one, or of other settings, are never used.
    """

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY) -> None:
        if isinstance(capacity_bytes, bool) or not isinstance(capacity_bytes, int) or capacity_bytes < 0:
            raise SettingsError(f"capacity_bytes is {capacity_bytes!r}; it must be a number of bytes.")
        super().__init__(capacity_bytes)
        self._owner = ""
        self._can_go_back = True

    def serving(self, identity: dict[str, Any], can_go_back: bool) -> StateCache:
        """The same entries for contexts of this identity. can_go_back: whether their tokens can be taken back one by one."""
        view = copy.copy(self)
        view._owner = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        view._can_go_back = can_go_back
        return view

    def _best(self, key: Sequence[int], but: Container[Tokens] = ()) -> Tokens | None:
        best, longest = None, 0
        for tokens in self._keys():
            n = common_prefix(tokens, key)
            if n > longest and tokens not in but and (self._can_go_back or n == len(tokens)):
                best, longest = tokens, n
        return best

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._best(key) is not None

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        gone: set[Tokens] = set()
        while (best := self._best(key, gone)) is not None:
            state = self._take(best)
            if state is not None:
                return state
            gone.add(best)
        raise KeyError("no entry begins like this")

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        """Keep a state that `Llama.save_state` has given, under the tokens that it holds: those of `key` but for the last."""
        if not states.is_state(value.llama_state):
            raise SettingsError("This cache holds packed states, which only bridge.Llama on a MixKVQ cache has; use one of llama-cpp-python's.")
        tokens = tuple(int(token) for token in value.input_ids[: value.n_tokens])
        for other in list(self._keys()):
            if other == tokens or (self._can_go_back and len(other) < len(tokens) and common_prefix(other, tokens) == len(other)):
                self._drop(other)
        if not tokens or len(value.llama_state) + value.scores.nbytes > self.capacity_bytes:
            return
        self._keep(tokens, value)
        while self.cache_size > self.capacity_bytes:
            self._drop_oldest()

    @abstractmethod
    def _keys(self) -> Iterator[Tokens]: ...

    @abstractmethod
    def _take(self, tokens: Tokens) -> LlamaState | None:
        """The entry, which is the most recently used one now; None if it turns out that there is none."""

    @abstractmethod
    def _keep(self, tokens: Tokens, value: LlamaState) -> None: ...

    @abstractmethod
    def _drop(self, tokens: Tokens) -> None: ...

    @abstractmethod
    def _drop_oldest(self) -> None: ...


class RamCache(StateCache):
    """Entries in memory, for as long as the program runs."""

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY) -> None:
        super().__init__(capacity_bytes)
        self._entries: OrderedDict[tuple[str, Tokens], LlamaState] = OrderedDict()

    @property
    def cache_size(self) -> int:
        """Bytes of all entries."""
        return sum(len(state.llama_state) + state.scores.nbytes for state in self._entries.values())

    def _keys(self) -> Iterator[Tokens]:
        return (tokens for owner, tokens in list(self._entries) if owner == self._owner)

    def _take(self, tokens: Tokens) -> LlamaState:
        self._entries.move_to_end((self._owner, tokens))
        return self._entries[self._owner, tokens]

    def _keep(self, tokens: Tokens, value: LlamaState) -> None:
        self._entries[self._owner, tokens] = value

    def _drop(self, tokens: Tokens) -> None:
        del self._entries[self._owner, tokens]

    def _drop_oldest(self) -> None:
        self._entries.popitem(last=False)


class DiskCache(StateCache):
    """Entries as files of a folder, for programs that come later as well; several may use it at once. Each is a file that `Llama.load_file` reads.

    A file that is damaged is deleted and its prompt read anew. Raises SettingsError if the folder cannot be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str], capacity_bytes: int = DEFAULT_CAPACITY) -> None:
        super().__init__(capacity_bytes)
        self.folder = Path(folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise SettingsError(f"{self.folder} cannot be a cache: {e.strerror or e}.") from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise SettingsError(f"{self.folder} cannot be a cache: it is write-protected.")
        self._known: dict[Path, tuple[int, Tokens]] = {}  # by file: when it was written, ns, and what it holds

    @property
    def cache_size(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[int, int, Path]]:
        """When they were used, their sizes, and the files, of whatever model."""
        found = []
        for path in self.folder.glob("*" + states.SUFFIX):
            with contextlib.suppress(OSError):  # another program has deleted it
                status = path.stat()
                found.append((status.st_atime_ns, status.st_size, path))
        return sorted(found)

    def _path(self, tokens: Tokens) -> Path:
        name = hashlib.sha256(repr(tokens).encode()).hexdigest()[:32]
        return self.folder / f"{self._owner}-{name}{states.SUFFIX}"

    def _keys(self) -> Iterator[Tokens]:
        for path in sorted(self.folder.glob(f"{self._owner}-*{states.SUFFIX}")):
            try:
                written = path.stat().st_mtime_ns
                if self._known.get(path, (None,))[0] != written:
                    self._known[path] = written, tuple(states.read_head(path).tokens.tolist())
            except OSError:
                continue
            except StateError:
                self._delete(path)
                continue
            yield self._known[path][1]

    def _take(self, tokens: Tokens) -> LlamaState | None:
        path = self._path(tokens)
        try:
            data = path.read_bytes()
            if not states.is_whole(data):
                self._delete(path)
                return None
            os.utime(path, ns=(max(path.stat().st_atime_ns, *(used + 1 for used, _, _ in self._files())), path.stat().st_mtime_ns))
        except OSError:
            self._known.pop(path, None)
            return None
        head = states.parse_head(data)
        return LlamaState(head.tokens, np.empty((0, 0), np.float32), len(head.tokens), data, len(data), 0)

    def _keep(self, tokens: Tokens, value: LlamaState) -> None:
        path = self._path(tokens)
        try:
            write_atomically(path, bytes(value.llama_state), private=True)
        except OSError as e:
            raise SettingsError(f"{path} cannot be written: {e.strerror or e}.") from None

    def _drop(self, tokens: Tokens) -> None:
        self._delete(self._path(tokens))

    def _drop_oldest(self) -> None:
        self._delete(self._files()[0][2])

    def _delete(self, path: Path) -> None:
        self._known.pop(path, None)
        with contextlib.suppress(OSError):
            path.unlink()
