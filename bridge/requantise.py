"""The same model with weights of another type, by llama.cpp's own function."""

from __future__ import annotations

import ctypes
import math
import os
import shutil

from mixkvq.core.errors import ModelFileError
from mixkvq.core.memory import format_bytes
from mixkvq.core.model_file import open_model, read_header

from ._compat import C
from .computing import computing
from .log import log

TYPES = {"F32": C.LLAMA_FTYPE_ALL_F32, "F16": C.LLAMA_FTYPE_MOSTLY_F16, "Q8_0": C.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": C.LLAMA_FTYPE_MOSTLY_Q4_0}


def f32_bytes(model: str | os.PathLike[str]) -> int:
    """What the weights of a model take in F32. Raises ModelFileError."""
    file = open_model(model)
    return 4 * sum(math.prod(tensor.shape) for part in (file.path, *file.parts) for tensor in read_header(part).tensors.values())


def requantise(model: str | os.PathLike[str], out: str | os.PathLike[str], type: str, threads: int = 1) -> None:
    """Write the model with its weights as one of TYPES; numbers that were rounded before stay what they read back as in F32.

    Raises ModelFileError if it cannot be read or written, KeyError for an unknown type.
    """
    if os.path.exists(out) and os.path.samefile(model, out):
        raise ModelFileError(f"{os.fspath(model)} cannot be written while it is read; give another name.")
    folder = os.path.dirname(os.path.abspath(out))
    file = open_model(model)
    params = C.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = threads, TYPES[type], True
    if type == "F32":
        need = f32_bytes(model)
        if (free := shutil.disk_usage(folder).free) < need:
            raise ModelFileError(f"{file.path} with weights in F32 takes {format_bytes(need)}, and {format_bytes(free)} are free in {folder}.")
    with log.kept() as first_error, computing():
        if C.llama_model_quantize(os.fsencode(file.path), os.fsencode(out), ctypes.byref(params)):
            raise ModelFileError(f"llama.cpp could not write {file.path} with weights of type {type}: {first_error() or 'it does not say why'}.")
