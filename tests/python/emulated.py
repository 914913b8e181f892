"""The backend with GPUs that are emulated (tests/native/emulator), in a process of its own: what cpp/ggml does on a GPU, without one."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "native" / "libggml-mixkvq-emulated.so"


class Emulated:
    """The library's functions for this process's ggml: there is one for each layout of its structs."""

    def __init__(self, ggml: ctypes.CDLL) -> None:
        since = {"b": "ggml_backend_tensor_set_2d", "c": "ggml_backend_buft_alloc_buffer_n"}
        self._layout = max(["a", *(layout for layout, function in since.items() if hasattr(ggml, function))])
        self._library = ctypes.CDLL(str(LIBRARY))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, f"{name}_glue_{self._layout}")


def load() -> Emulated:
    """Register the emulated GPUs with llama.cpp and then the backend, in this process. Before anything asks for a device."""
    from bridge import backend as adapter
    from bridge._compat import C

    library = Emulated(C._lib)
    library.emulated_cuda.restype, library.emulated_cuda.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    library.emulated_cuda_waits.restype = ctypes.c_bool
    C.llama_backend_init()
    cpu = adapter.function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)(b"CPU")
    adapter.function("ggml_backend_register", None, ctypes.c_void_p)(library.emulated_cuda(cpu))
    assert adapter.function("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)(os.fsencode(LIBRARY))
    return library


def run(code: str, *arguments: str, gpus: str = "8.0", **variables: str) -> tuple[Any, list[str]]:
    """What `code` prints last, as JSON, and what the backend said. Before it: `library = load()`; sys.argv[1:] are the arguments."""
    if not LIBRARY.is_file():
        pytest.skip(f"{LIBRARY} is not built: make test builds it")
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport json, emulated\nlibrary = emulated.load()\n" + code
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MIXKVQ_", "GGML_"))}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**clean, "MIXKVQ_EMULATED_GPUS": gpus, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    said = [line for line in done.stderr.splitlines() if line.startswith("mixkvq: ")]
    return json.loads(done.stdout.splitlines()[-1]), said
