"""Packed states: what a context holds, in a file or in memory, as small as the cache itself. docs/format.md, "Packed states", is the format."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mixkvq.core.errors import ContextError, StateError
from mixkvq.core.files import replacing
from mixkvq.core.model_file import ModelFile, read_header
from mixkvq.core.native import native
from mixkvq.core.profile import read_profile, to_json
from mixkvq.core.settings import Kv

MAGIC, VERSION = b"MIXKVQSF", 1
SUFFIX = ".mixkvq-state"
_FIXED = struct.Struct("<8sIIIIQ")  # magic, version, bytes of the fields, tokens, 0, bytes of the body; then a checksum of all before the body
_SUM = struct.Struct("<Q")
_ALIGN = 64
_LARGEST_FIELDS = 1 << 20

# Of the context's parameters, those that say how keys are turned.
ROPE = (
    *("rope_scaling_type", "rope_freq_base", "rope_freq_scale"),
    *("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx"),
)


@dataclass(frozen=True)
class Head:
    """What stands before the body. fields: what the state is of. tokens: int32, what was read. start, end: where the body is."""

    fields: dict[str, Any]
    tokens: npt.NDArray[np.int32]
    start: int
    end: int


# --- what a state is of ---------------------------------------------------------------------------------------------------------


def identity(llama: Any) -> dict[str, Any]:
    """Of a `bridge.Llama`: what a state must agree in with a context that it is loaded into; JSON."""
    parameters = llama.context_params
    rope = {name: getattr(parameters, name) for name in ROPE}
    n_ctx = llama.n_ctx() // llama.n_seq
    return {
        "model": {"name": llama._file.name, "fingerprint": llama._file.fingerprint, "weights": _weights(llama._file)},
        "cache": _cache(llama),
        "rope": {**rope, "long_factors": _has_long_factors(llama._file, n_ctx)},
        "adapters": [] if not llama.lora_path else [{"file": _file_sum(llama.lora_path), "scale": llama.lora_scale}],
    }


def _cache(llama: Any) -> dict[str, Any]:
    if llama.stock is not None:
        return {"type": llama.stock}
    kv: Kv = llama.kv
    window, sinks = kv.window, kv.sinks
    profile = None
    if kv.profile is not None:
        found = read_profile(kv.profile)
        window, sinks = (found.window if window is None else window), (found.sinks if sinks is None else sinks)
        profile = hashlib.sha256(to_json(found).encode()).hexdigest()[:32]
    names = {name: p["name"] for p in native().presets() for name in (p["name"], p["alias"]) if name}
    default = next(p["name"] for p in native().presets() if p["default"])
    return {
        "type": "mixkvq" if llama.codec is None else "codec",
        "preset": None if profile or llama.codec is not None else names.get(kv.preset or default, default),
        "profile": profile,
        "window": 128 if window is None else window,
        "sinks": 128 if sinks is None else sinks,
    }


def _has_long_factors(file: ModelFile, n_ctx: int) -> bool | None:
    """Which of two sets of RoPE factors llama.cpp takes at this length, for models that have them; else None."""
    header = _header(file.path, os.stat(file.path).st_mtime_ns)
    if "rope_factors_long.weight" not in header.tensors:
        return None
    trained = header.values.get(f"{file.architecture}.rope.scaling.original_context_length", file.n_ctx_train)
    return bool(isinstance(trained, int) and n_ctx > trained)


@lru_cache(maxsize=16)
def _header(path: str, _: int) -> Any:
    return read_header(path)


def _weights(file: ModelFile) -> str:
    """A checksum that tells models of the same shape apart, and quantisations: some bytes of every tensor."""
    return _weights_of((file.path, *file.parts), tuple(os.stat(path).st_mtime_ns for path in (file.path, *file.parts)))


@lru_cache(maxsize=16)
def _weights_of(paths: tuple[str, ...], times: tuple[int, ...]) -> str:
    pieces: dict[str, bytes] = {}
    for path, time in zip(paths, times):
        with open(path, "rb") as f:
            for name, tensor in _header(path, time).tensors.items():
                f.seek(tensor.offset)
                pieces[name] = repr((name, tensor.shape, tensor.type)).encode() + f.read(256)
    return f"{native().checksum(b''.join(pieces[name] for name in sorted(pieces))):016x}"


def _file_sum(path: str) -> str:
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return f"{native().checksum(data):016x}"


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """Why a state does not fit, "it was saved ...", or None."""

    def get(fields: dict[str, Any], *path: str) -> Any:
        found: Any = fields
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    if get(theirs, "model", "fingerprint") != get(ours, "model", "fingerprint"):
        return f"it is of another model ({get(theirs, 'model', 'name')!r})"
    if get(theirs, "model", "weights") != get(ours, "model", "weights"):
        return "it is of a model with other weights, maybe another quantisation"
    if theirs.get("cache") != ours["cache"]:
        return f"it was saved from a cache {_described(theirs.get('cache'))}, and this one is {_described(ours['cache'])}"
    for name, here in ours["rope"].items():
        there = get(theirs, "rope", name)
        if there != here:
            return f"it was saved with other RoPE settings: {name} {there}, and here {here}"
    if theirs.get("adapters") != ours["adapters"]:
        return "it was saved with other LoRA adapters, or another scale of them"
    return None


def _described(cache: Any) -> str:
    if not isinstance(cache, dict):
        return repr(cache)
    if cache.get("type") != "mixkvq":
        return repr(cache.get("type"))
    name = f"of profile {cache['profile']}" if cache.get("profile") else repr(cache.get("preset"))
    return f"{name} with window {cache.get('window')} and sinks {cache.get('sinks')}"


# --- bytes ----------------------------------------------------------------------------------------------------------------------


def _head(fields: dict[str, Any], tokens: Sequence[int], n_body: int) -> bytes:
    text = json.dumps(fields, ensure_ascii=False).encode()
    numbers = np.asarray(tokens, "<i4").tobytes()
    start = _FIXED.pack(MAGIC, VERSION, len(text), len(tokens), 0, n_body) + text + numbers
    head = start + _SUM.pack(native().checksum(start))
    return head + bytes(-len(head) % _ALIGN)


def is_state(data: Any) -> bool:
    """Whether bytes are a state of this format, of whatever version."""
    return bytes(data[: len(MAGIC)]) == MAGIC


def parse_head(data: Any) -> Head:
    """The head of a state. Raises StateError, "it ...", if it is none, damaged, or of another version."""
    if not is_state(data):
        raise StateError("it is no packed state")
    if len(data) < _FIXED.size + _SUM.size:
        raise StateError("it is truncated")
    _, version, n_fields, n_tokens, zero, n_body = _FIXED.unpack_from(data)
    if version != VERSION:
        raise StateError(f"it is of version {version}, and this program reads version {VERSION}")
    end = _FIXED.size + n_fields + 4 * n_tokens
    if n_fields > _LARGEST_FIELDS or zero:
        raise StateError("it is damaged")
    start = end + _SUM.size + -(end + _SUM.size) % _ALIGN
    if len(data) < start + n_body:
        raise StateError(f"it is truncated: {len(data)} bytes of {start + n_body}")
    with memoryview(data) as view, view[:end] as head, view[end + _SUM.size : start] as padding:
        damaged = len(data) != start + n_body or native().checksum(head) != _SUM.unpack_from(data, end)[0] or any(padding)
    if damaged:
        raise StateError("it is damaged: its checksum is another one")
    try:
        fields = json.loads(bytes(data[_FIXED.size : _FIXED.size + n_fields]))
    except (ValueError, RecursionError):
        raise StateError("it is damaged") from None
    if not isinstance(fields, dict):
        raise StateError("it is damaged")
    tokens = np.frombuffer(bytes(data[_FIXED.size + n_fields : end]), "<i4").astype(np.int32)
    return Head(fields, tokens, start, start + n_body)


def is_whole(data: Any) -> bool:
    """Whether bytes are a state of this version, head and body as they were written."""
    try:
        head = parse_head(data)
    except StateError:
        return False
    with memoryview(data) as view, view[head.start : head.end] as body:
        n = len(body) - _SUM.size
        return n >= 0 and native().checksum(body[:n]) == _SUM.unpack(body[n:])[0]


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[mmap.mmap]:
    """The bytes of a file, as they are needed. Raises StateError that names it if it cannot be read or is empty."""
    try:
        with open(path, "rb") as f:
            if os.fstat(f.fileno()).st_size == 0:
                raise StateError(f"{os.fspath(path)} is empty.")
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as e:
        raise StateError(f"{os.fspath(path)} cannot be read: {(e.strerror or str(e)).rstrip('.')}.") from None
    with data:
        yield data


def read_head(path: str | os.PathLike[str]) -> Head:
    """The head of a file. Raises StateError that names it."""
    with opened(path) as data, _named(path):
        return parse_head(data)


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except StateError as e:
        raise StateError(f"{os.fspath(path)} cannot be loaded: {e}.") from None


# --- saving and loading ---------------------------------------------------------------------------------------------------------


class _Saving:
    """A state that is about to be written: its head, and how to write its body to a file or into memory."""

    def __init__(self, llama: Any, tokens: Sequence[int], sequence: int | None) -> None:
        self._llama, self._state, self._plain = llama, None, b""
        port = llama._state_port(sequence)
        size = port.size()
        if llama._session is None:
            buffer = np.empty(size, np.uint8)
            self._n = port.get(buffer.ctypes.data, size)
            self._plain = buffer[: self._n].tobytes()
            n_body = self._n + _SUM.size
        else:
            try:
                self._state = llama._session.save_state(size, port.flags)
                address, size = self._state.data()
                self._n = port.get(address, size)
                n_body = self._state.n_bytes(self._n)
            except (RuntimeError, ValueError) as e:
                self.close()
                raise ContextError(f"The state cannot be saved: {e}.") from None
        kind = {"kind": "context" if sequence is None else "sequence", "n_tokens": len(tokens), "format": native().FORMAT_VERSION}
        self.head = _head({**kind, **identity(llama)}, tokens, n_body)
        self.size: int = len(self.head) + n_body

    def to_bytes(self) -> bytes:
        if self._state is None:
            return self.head + self._plain + _SUM.pack(native().checksum(self._plain))
        return self.head + bytes(self._state.to_bytes(self._n))

    def write(self, descriptor: int) -> None:
        """Raises OSError."""
        with os.fdopen(os.dup(descriptor), "wb") as f:
            f.write(self.head if self._state is not None else self.to_bytes())
        if self._state is not None:
            self._state.write(self._n, descriptor)

    def close(self) -> None:
        if self._state is not None:
            self._state.close()


def to_bytes(llama: Any, tokens: Sequence[int], sequence: int | None = None) -> bytes:
    """The state of a context, or of one sequence, that has read these tokens. Raises ContextError if llama.cpp does not give it."""
    with llama._evaluating, contextlib.closing(_Saving(llama, tokens, sequence)) as saving:
        return saving.to_bytes()


def to_file(path: str | os.PathLike[str], llama: Any, tokens: Sequence[int], sequence: int | None = None) -> int:
    """The same into a file, which appears whole or not at all; how many bytes it has. Raises OSError that names it as well.

    A new one can be read by its owner only: it holds what was said. One that is replaced keeps its permissions.
    """
    is_new = not os.path.exists(path)
    with replacing(path, private=is_new) as temporary, llama._evaluating, contextlib.closing(_Saving(llama, tokens, sequence)) as saving:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | getattr(os, "O_BINARY", 0))
            try:
                saving.write(descriptor)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as e:
            raise OSError(e.errno, e.strerror, os.fspath(path)) from None
        return int(saving.size)


def from_bytes(data: Any, llama: Any, sequence: int | None = None) -> npt.NDArray[np.int32]:
    """Put a state into a context, or a sequence of it; its tokens. Raises StateError, "it ...", if it does not fit, and nothing has changed then."""
    head = parse_head(data)
    why = difference(head.fields, identity(llama))
    if why is not None:
        raise StateError(why)
    kind = "context" if sequence is None else "sequence"
    if head.fields.get("kind") != kind:
        raise StateError(f"it holds a {head.fields.get('kind')}, not a {kind}")
    n_ctx, n_vocab = llama.n_ctx() // llama.n_seq, llama.n_vocab()
    if len(head.tokens) > n_ctx:
        raise StateError(f"it holds {len(head.tokens)} tokens, and the context {n_ctx}")
    if len(head.tokens) and not 0 <= int(head.tokens.min()) <= int(head.tokens.max()) < n_vocab:
        raise StateError("it is damaged: it holds tokens that are not in the vocabulary")
    port = llama._state_port(sequence)
    with llama._evaluating, memoryview(data) as view, view[head.start : head.end] as body:
        if llama._session is None:
            _load_plain(body, port)
        else:
            _load_packed(body, port, llama)
    return head.tokens


def _load_plain(body: memoryview, port: Any) -> None:
    n = len(body) - _SUM.size
    if n < 0 or native().checksum(body[:n]) != _SUM.unpack(body[n:])[0]:
        raise StateError("it is damaged: its checksum is another one")
    if port.set(np.frombuffer(body, np.uint8).ctypes.data, n) == 0:
        raise ContextError("llama.cpp did not take the state; the context is empty now.")


def _load_packed(body: memoryview, port: Any, llama: Any) -> None:
    try:
        state = llama._session.load_state(body, port.flags)
    except ValueError as e:
        raise StateError(str(e)) from None
    try:
        address, size = state.data()
        port.cut(state.finish(port.set(address, size, may_write=True)))
    except RuntimeError as e:
        raise ContextError(f"The state was not loaded: {e}; the context is empty now.") from None
    finally:
        state.close()


def from_file(path: str | os.PathLike[str], llama: Any, sequence: int | None = None) -> npt.NDArray[np.int32]:
    """The same from a file. Raises StateError that names it."""
    with opened(path) as data, _named(path):
        return from_bytes(data, llama, sequence)
