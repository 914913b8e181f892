"""GGUF headers through ggml's own parser, which llama.cpp will use on the same file.

The reader of the `gguf` package takes 14 s on a vocabulary of 152k tokens, because it makes an array per string.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, BinaryIO

from .library import llama

_STRING, _ARRAY = 8, 9  # enum gguf_type
_NUMBERS: dict[int, Any] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    6: ctypes.c_float,
    7: ctypes.c_bool,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
    12: ctypes.c_double,
}


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


_HANDLE, _INDEX = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "init_from_buffer": (_HANDLE, ctypes.c_char_p, ctypes.c_size_t, _InitParams),
    "free": (None, _HANDLE),
    "get_n_kv": (ctypes.c_int64, _HANDLE),
    "get_key": (ctypes.c_char_p, _HANDLE, _INDEX),
    "get_kv_type": (ctypes.c_int, _HANDLE, _INDEX),
    "get_val_str": (ctypes.c_char_p, _HANDLE, _INDEX),
    "get_val_data": (ctypes.c_void_p, _HANDLE, _INDEX),
    "get_arr_type": (ctypes.c_int, _HANDLE, _INDEX),
    "get_arr_n": (ctypes.c_size_t, _HANDLE, _INDEX),
    "get_arr_str": (ctypes.c_char_p, _HANDLE, _INDEX, ctypes.c_size_t),
    "get_arr_data": (ctypes.c_void_p, _HANDLE, _INDEX),
    "get_n_tensors": (ctypes.c_int64, _HANDLE),
    "get_tensor_name": (ctypes.c_char_p, _HANDLE, _INDEX),
    "get_tensor_ne": (ctypes.POINTER(ctypes.c_int64), _HANDLE, _INDEX),
    "get_tensor_type": (ctypes.c_int, _HANDLE, _INDEX),
    "get_tensor_offset": (ctypes.c_size_t, _HANDLE, _INDEX),
    "get_tensor_size": (ctypes.c_size_t, _HANDLE, _INDEX),
    "get_data_offset": (ctypes.c_size_t, _HANDLE),
}

# The parser is given the start of the file, not the file: it allocates whatever a length or a count asks for that the rest of the file
# could hold, which in a damaged file of many gigabytes is too much, and where memory runs out it ends the process.
_FIRST_READ, _GROWTH, _LARGEST_READ = 1 << 21, 8, 1 << 27


class ParseError(Exception):
    """ggml refuses the header; the text is its reason, without a full stop."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape in ggml's order (fastest first) without trailing ones, ggml's type number, and the place in the file."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Key-value pairs and tensor directory of one GGUF file; `end` is where the last tensor ends. The strings of arrays stay bytes.

    types: ggml's number of every value's type, and for an array also that of its elements.
    """

    path: str
    values: dict[str, Any]
    types: dict[str, tuple[int, ...]]
    tensors: dict[str, TensorInfo]
    end: int


def parse(file: BinaryIO) -> Header:
    """The header of an open file. Raises ParseError, VersionError or OSError."""
    size = _FIRST_READ
    while True:
        file.seek(0)
        head = file.read(size)
        try:
            return _parse(file.name, head)
        except ParseError:
            if len(head) < size or size >= _LARGEST_READ:
                raise
        size *= _GROWTH


@lru_cache(maxsize=1)
def _functions() -> Any:
    adapter = llama()
    adapter.check_versions()  # signatures differ between versions
    return SimpleNamespace(**{name: adapter._function(f"gguf_{name}", *signature) for name, signature in _SIGNATURES.items()})


def _parse(path: str, head: bytes) -> Header:
    gguf = _functions()
    with llama()._log.kept() as reason:
        handle = gguf.init_from_buffer(head, len(head), _InitParams(no_alloc=True, ctx=None))
        if not handle:
            raise ParseError(reason() or "its header is not valid")
    try:
        keys = [_text(gguf.get_key(handle, i)) for i in range(gguf.get_n_kv(handle))]
        values = {key: _value(gguf, handle, i) for i, key in enumerate(keys)}
        types = {key: _type(gguf, handle, i) for i, key in enumerate(keys)}
        tensors, data = {}, gguf.get_data_offset(handle)
        end = data
        for i in range(gguf.get_n_tensors(handle)):
            shape = gguf.get_tensor_ne(handle, i)[:4]
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            offset = data + gguf.get_tensor_offset(handle, i)
            tensors[_text(gguf.get_tensor_name(handle, i))] = TensorInfo(tuple(shape), gguf.get_tensor_type(handle, i), offset)
            end = max(end, offset + gguf.get_tensor_size(handle, i))
        return Header(path, values, types, tensors, end)
    finally:
        gguf.free(handle)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _type(gguf: Any, handle: int, i: int) -> tuple[int, ...]:
    kind = gguf.get_kv_type(handle, i)
    return (kind, gguf.get_arr_type(handle, i)) if kind == _ARRAY else (kind,)


def _value(gguf: Any, handle: int, i: int) -> Any:
    kind = gguf.get_kv_type(handle, i)
    if kind == _STRING:
        return _text(gguf.get_val_str(handle, i))
    if kind != _ARRAY:
        return _NUMBERS[kind].from_address(gguf.get_val_data(handle, i)).value
    kind, n = gguf.get_arr_type(handle, i), gguf.get_arr_n(handle, i)
    if kind == _STRING:
        return [gguf.get_arr_str(handle, i, j) for j in range(n)]
    return (_NUMBERS[kind] * n).from_address(gguf.get_arr_data(handle, i))[:] if n else []
