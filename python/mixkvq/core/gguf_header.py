"""GGUF headers: the key-value pairs and the tensor directory of a file, without llama.cpp.

The reader of the `gguf` package takes 14 s on a vocabulary of 152k tokens, because it makes an array per string; its tables of types serve here.
What llama.cpp's parser refuses is refused here as well (test_gguf_header.py compares the two), but for types of tensors that `gguf` does not know.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

_NUMBERS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_SIZES = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
_ALIGNMENT = 32  # where general.alignment says nothing
_MOST_DIMENSIONS, _LONGEST_NAME = 4, 63  # of a tensor
_LARGEST = 1 << 63
_LENGTH = struct.Struct("<Q")  # before each string
_BLOCK = 1 << 18  # bytes that are read at once where strings follow one another


class ParseError(Exception):
    """The header is not valid; the text is the reason, without a full stop."""

    def __init__(self, text: str) -> None:
        super().__init__("".join(c if c.isprintable() else "?" for c in text))  # names in a damaged file may hold anything


@dataclass(frozen=True)
class TensorInfo:
    """Shape in ggml's order (fastest first) without trailing ones, ggml's type number, and the place in the file."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Header:
    """Key-value pairs and tensor directory of one GGUF file. The strings of arrays stay bytes; all strings end at their first zero byte, as in ggml.

    types: ggml's number of every value's type, and for an array also that of its elements.
    places: where in the file each pair begins and ends. directory: the same of the tensor directory. data: where the tensors' data begin.
    end: where the last tensor ends.
    """

    path: str
    values: dict[str, Any]
    types: dict[str, tuple[int, ...]]
    tensors: dict[str, TensorInfo]
    places: dict[str, tuple[int, int]]
    directory: tuple[int, int]
    data: int
    end: int

    @property
    def alignment(self) -> int:
        """Of the data of tensors, in bytes."""
        return int(self.values.get("general.alignment", _ALIGNMENT))


def parse(file: BinaryIO) -> Header:
    """The header of an open file of version 2 or 3, little-endian. Raises ParseError or OSError."""
    return _Parser(file).header()


class _Parser:
    """Reads forward; nothing is allocated that the rest of the file could not hold."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def take(self, n: int) -> bytes:
        data = self.file.read(n) if n <= self.size else b""
        if len(data) < n:
            raise ParseError("it ends within its header")
        return data

    def numbers(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> bytes:
        return self.take(*self.numbers("<Q")).partition(b"\0")[0]

    def text(self) -> str:
        return self.string().decode("utf-8", errors="replace")

    def header(self) -> Header:
        self.file.seek(8)
        n_tensors, n_pairs = self.numbers("<QQ")
        values: dict[str, Any] = {}
        types: dict[str, tuple[int, ...]] = {}
        places: dict[str, tuple[int, int]] = {}
        at = self.file.tell()
        for _ in range(n_pairs):
            key = self.text()
            if key in values:
                raise ParseError(f"the key {key} is there twice")
            values[key], types[key] = self.value(key)
            places[key] = at, self.file.tell()
            at = self.file.tell()
        alignment = values.get("general.alignment", _ALIGNMENT)
        if types.get("general.alignment", (GGUFValueType.UINT32,)) != (GGUFValueType.UINT32,) or alignment < 1 or alignment & (alignment - 1):
            raise ParseError(f"general.alignment is {alignment!r}, which is not a power of 2")
        infos = self.directory(n_tensors)
        directory = at, self.file.tell()
        data = padded(directory[1], alignment)
        end, tensors = (data if infos else directory[1]), {}
        for name, (shape, kind, offset) in infos.items():
            tensors[name] = TensorInfo(shape, kind, data + offset)
            end = max(end, data + offset + _bytes(name, shape, kind))
        _check_offsets(infos, alignment)
        return Header(self.file.name, values, types, tensors, places, directory, data, end)

    def value(self, key: str) -> tuple[Any, tuple[int, ...]]:
        (kind,) = self.numbers("<I")
        if kind == GGUFValueType.STRING:
            return self.text(), (kind,)
        if kind in _NUMBERS:
            return self.numbers("<" + _NUMBERS[kind])[0], (kind,)
        if kind != GGUFValueType.ARRAY:
            raise ParseError(f"the key {key} has the unknown type {kind}")
        element, n = self.numbers("<IQ")
        if element == GGUFValueType.STRING:
            return self.strings(n), (kind, element)
        if element not in _NUMBERS:
            raise ParseError(f"the key {key} is an array of the unknown type {element}")
        dtype = np.dtype("<" + _NUMBERS[element])
        return np.frombuffer(self.take(n * dtype.itemsize), dtype).tolist(), (kind, element)

    def strings(self, n: int) -> list[bytes]:
        """A vocabulary, mostly: read in blocks, as one string after the other takes seconds."""
        if 8 * n > self.size:
            raise ParseError("it ends within its header")
        found: list[bytes] = []
        block, at = b"", 0
        for _ in range(n):
            if len(block) - at < _LENGTH.size:
                block, at = self._more(block[at:], _LENGTH.size), 0
            (length,) = _LENGTH.unpack_from(block, at)
            if len(block) - at < _LENGTH.size + length:
                block, at = self._more(block[at:], _LENGTH.size + length), 0
            begin, at = at + _LENGTH.size, at + _LENGTH.size + length
            found.append(block[begin:at].partition(b"\0")[0])
        self.file.seek(at - len(block), os.SEEK_CUR)
        return found

    def _more(self, left: bytes, n: int) -> bytes:
        """At least n bytes: what is left of a block, and what follows in the file."""
        return left + self.take(n - len(left)) + self.file.read(_BLOCK)

    def directory(self, n: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Shape, type and offset from the start of the data, by name."""
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n):
            name = self.text()
            if name in infos:
                raise ParseError(f"the tensor {name} is there twice")
            if len(name.encode()) > _LONGEST_NAME:
                raise ParseError(f"the name of the tensor {name[:20]}... is longer than {_LONGEST_NAME} bytes")
            (n_dimensions,) = self.numbers("<I")
            if n_dimensions > _MOST_DIMENSIONS:
                raise ParseError(f"the tensor {name} has {n_dimensions} dimensions")
            shape = list(self.numbers(f"<{n_dimensions}q")) or [1]
            while len(shape) > 1 and shape[-1] == 1:
                shape.pop()
            kind, offset = self.numbers("<IQ")
            if min(shape) < 0 or prod(shape) >= _LARGEST:
                raise ParseError(f"the tensor {name} has the shape {shape}")
            infos[name] = tuple(shape), kind, offset
        return infos


def _bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    """What a tensor takes in the file; 0 for a type that is not known here."""
    block, size = _SIZES.get(kind, (1, 0))
    if shape[0] % block:
        raise ParseError(f"the tensor {name} of type {GGMLQuantizationType(kind).name} has rows of {shape[0]}, which are not multiples of {block}")
    return prod(shape) // block * size


def _check_offsets(infos: dict[str, tuple[tuple[int, ...], int, int]], alignment: int) -> None:
    """Each tensor's data begin where those of the one before it end."""
    expected: int | None = 0
    for name, (shape, kind, offset) in infos.items():
        if expected is not None and offset != expected:
            raise ParseError(f"the data of the tensor {name} are not behind those of the one before it")
        expected = padded(offset + _bytes(name, shape, kind), alignment) if kind in _SIZES else None


def padded(n: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-n // alignment) * alignment
