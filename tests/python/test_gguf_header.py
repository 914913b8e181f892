"""GGUF headers as the core reads them, against ggml's own parser: the same content, and nothing accepted that llama.cpp would refuse."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import pytest
import tiny_models
from gguf import GGML_QUANT_SIZES

from bridge._compat import libraries
from bridge.backend import function
from bridge.log import log
from mixkvq.core.errors import ModelFileError
from mixkvq.core.gguf_header import ParseError, parse
from mixkvq.core.model_file import built_in_model, read_header

ROOT = Path(__file__).resolve().parents[2]
P, I64 = ctypes.c_void_p, ctypes.c_int64
STRING, ARRAY = 8, 9
NUMBERS = {
    0: ctypes.c_uint8, 1: ctypes.c_int8, 2: ctypes.c_uint16, 3: ctypes.c_int16, 4: ctypes.c_uint32, 5: ctypes.c_int32, 6: ctypes.c_float,
    7: ctypes.c_bool, 10: ctypes.c_uint64, 11: ctypes.c_int64, 12: ctypes.c_double,
}  # fmt: skip


class InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def ggml_header(path: Path, shapes: bool = True):
    """Values, types and tensors as ggml reads them, or None if it refuses."""
    context = P()

    def f(name, result, *arguments):
        return function(f"gguf_{name}", result, *arguments)

    def shape_of(i, name):
        if context:  # in a ggml_tensor
            tensor = function("ggml_get_tensor", P, P, ctypes.c_char_p)(context, name)
            return (I64 * 4).from_address(tensor + 16)[:]
        return f("get_tensor_ne", ctypes.POINTER(I64), P, I64)(handle, i)[:4]

    # A ggml before 0.16 says shapes only in tensors.
    where = None if not shapes or hasattr(next(libraries()), "gguf_get_tensor_ne") else ctypes.addressof(context)
    with log.kept():
        handle = f("init_from_file", P, ctypes.c_char_p, InitParams)(str(path).encode(), InitParams(True, where))
    if not handle:
        return None

    def value(i):
        kind = f("get_kv_type", ctypes.c_int, P, I64)(handle, i)
        if kind == STRING:
            return f("get_val_str", ctypes.c_char_p, P, I64)(handle, i).decode(errors="replace"), (kind,)
        if kind != ARRAY:
            return NUMBERS[kind].from_address(f("get_val_data", P, P, I64)(handle, i)).value, (kind,)
        element, n = f("get_arr_type", ctypes.c_int, P, I64)(handle, i), f("get_arr_n", ctypes.c_size_t, P, I64)(handle, i)
        if element == STRING:
            string = f("get_arr_str", ctypes.c_char_p, P, I64, ctypes.c_size_t)
            return [string(handle, i, j) for j in range(n)], (kind, element)
        found = (NUMBERS[element] * n).from_address(f("get_arr_data", P, P, I64)(handle, i))[:] if n else []
        return found, (kind, element)

    pairs = {}
    for i in range(f("get_n_kv", I64, P)(handle)):
        pairs[f("get_key", ctypes.c_char_p, P, I64)(handle, i).decode(errors="replace")] = value(i)
    tensors, data_at = {}, f("get_data_offset", ctypes.c_size_t, P)(handle)
    for i in range(f("get_n_tensors", I64, P)(handle)):
        raw = f("get_tensor_name", ctypes.c_char_p, P, I64)(handle, i)
        name, shape = raw.decode(errors="replace"), shape_of(i, raw) if shapes else []
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        offset = data_at + f("get_tensor_offset", ctypes.c_size_t, P, I64)(handle, i)
        size = f("get_tensor_size", ctypes.c_size_t, P, I64)(handle, i)
        tensors[name] = tuple(shape), f("get_tensor_type", ctypes.c_int, P, I64)(handle, i), offset, size
    f("free", None, P)(handle)
    if context:
        function("ggml_free", None, P)(context)
    return pairs, tensors


def ours(path: Path):
    with path.open("rb") as file:
        header = parse(file)
    return header


def same(a, b):
    """Equal, where a number that is none equals itself."""
    return repr(a) == repr(b)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    made = [getattr(tiny_models, name)(folder / f"{name}.gguf") for name in ("llama", "gemma4", "mamba", "moe") if hasattr(tiny_models, name)]
    return [Path(path) for path in [*made, built_in_model(), ROOT / "tests" / "golden" / "profile_v1.gguf"]]


def test_the_content_is_what_ggml_reads(models):
    for path in models:
        pairs, tensors = ggml_header(path)
        header = ours(path)
        assert list(header.values) == list(pairs) and list(header.tensors) == list(tensors)
        for key, (value, types) in pairs.items():
            assert header.types[key] == types and same(header.values[key], value), key
        for name, (shape, kind, offset, _) in tensors.items():
            assert header.tensors[name] == type(header.tensors[name])(shape, kind, offset)
        assert header.end == max(offset + size for _, _, offset, size in tensors.values()) <= path.stat().st_size


def test_the_places_are_those_of_the_pairs(models):
    """One behind the other, from the first pair to the tensor directory."""
    for path in models:
        header, data = ours(path), path.read_bytes()
        at = 24
        for key, (start, end) in header.places.items():
            assert start == at and data[start + 8 : start + 8 + len(key.encode())] == key.encode()
            at = end
        assert header.directory[0] == at and header.data % header.alignment == 0 and 0 <= header.data - header.directory[1] < header.alignment


def test_whatever_ggml_refuses_is_refused(models, tmp_path):
    """Changed bytes and cut ends, all over the header. What both accept reads the same."""
    if not hasattr(next(libraries()), "gguf_init_from_buffer"):
        pytest.skip("a ggml as old as this one ends the process at some of them")
    rng, path = random.Random(1), tmp_path / "changed.gguf"
    verdicts = {True: 0, False: 0}
    small = [path for path in models if path.stat().st_size < 1 << 20]
    for source in small:
        data, end = source.read_bytes(), ours(source).directory[1]
        places = [*range(24), *(rng.randrange(24, end) for _ in range(600))]
        cases = [data[:at] + bytes([rng.choice((0, 1, 2, 255, rng.randrange(256)))]) + data[at + 1 :] for at in places]
        cases += [data[: rng.randrange(end)] for _ in range(50)]
        for case in cases:
            if case[:4] != b"GGUF" or case[4:8] not in (b"\2\0\0\0", b"\3\0\0\0"):
                continue  # read_header looks at these itself
            path.write_bytes(case)
            theirs = ggml_header(path, shapes=False)
            try:
                header = ours(path)
            except ParseError:
                header = None
            if theirs is None and header is not None:
                unknown = [t for t in header.tensors.values() if t.type not in GGML_QUANT_SIZES]
                assert unknown or header.end > len(case), "accepted, and ggml refuses it"
            if theirs is not None:
                assert header is not None, "refused, and ggml accepts it"
                assert all(same(header.values[key], value) for key, (value, _) in theirs[0].items())
            verdicts[theirs is None] += 1
    assert min(verdicts.values()) > 100


def test_a_count_that_the_file_cannot_hold_allocates_nothing(tmp_path):
    """Of strings, of numbers, of pairs and of tensors."""
    path = tmp_path / "claims.gguf"
    key = (3).to_bytes(8, "little") + b"key"
    head = b"GGUF" + (3).to_bytes(4, "little")
    for counts, rest in (
        ((0, 1), key + (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")),
        ((0, 1), key + (9).to_bytes(4, "little") + (12).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")),
        ((0, 1), key + (8).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")),
        ((0, 1 << 60), b""),
        ((1 << 60, 0), b""),
    ):
        path.write_bytes(head + b"".join(n.to_bytes(8, "little") for n in counts) + rest)
        with pytest.raises(ModelFileError, match="is truncated or damaged: it ends within its header"):
            read_header(path)


def test_the_core_reads_headers_without_llama_cpp(tmp_path):
    import subprocess
    import sys

    code = "import sys; sys.modules['llama_cpp'] = None; from mixkvq.core.model_file import *; print(open_model(built_in_model()).n_layers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
