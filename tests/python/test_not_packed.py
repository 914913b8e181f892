"""Nothing stays uncompressed in silence: caches of a llama.cpp that is not known yet, made with ggml alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys
from bridge import backend as adapter
from bridge.backend import backend

f, P, I = adapter.function, ctypes.c_void_p, ctypes.c_int64
class Params(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("buffer", P), ("no_alloc", ctypes.c_bool)]

name, n_rows = sys.argv[1], int(sys.argv[2])
device = backend().cpu
cpu = f("ggml_backend_dev_by_name", P, ctypes.c_char_p)(b"CPU")
buffers = f("ggml_backend_dev_buffer_type", P, P)
new = lambda kind, *ne: f("ggml_new_tensor_3d", P, P, ctypes.c_int, I, I, I)(contexts[-1], kind, *ne)
def place(where):
    assert f("ggml_backend_alloc_ctx_tensors_from_buft", P, P, P)(contexts[-1], buffers(where))
contexts = []
def begin():
    contexts.append(f("ggml_init", P, Params)(Params(1 << 20, None, True)))
begin()
cache = new(1, 64, 1024, 1)
f("ggml_set_name", P, P, ctypes.c_char_p)(cache, name.encode())
place(device)
begin()
rows, cells = new(0, 64, n_rows, 1), new(27, n_rows, 1, 1)
place(cpu)
f("ggml_backend_tensor_set", None, P, P, ctypes.c_size_t, ctypes.c_size_t)(cells, (I * n_rows)(*range(n_rows)), 0, 8 * n_rows)
begin()
graph = f("ggml_new_graph", P, P)(contexts[-1])
result = f("ggml_set_rows", P, P, P, P, P)(contexts[-1], cache, rows, cells)
f("ggml_backend_view_init", ctypes.c_int, P)(result)
f("ggml_build_forward_expand", None, P, P)(graph, result)
ours = f("ggml_backend_dev_init", P, P, ctypes.c_char_p)(device, None)
assert f("ggml_backend_graph_compute", ctypes.c_int, P, P)(ours, graph) == 0
assert f("ggml_backend_graph_compute", ctypes.c_int, P, P)(ours, graph) == 0
"""


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("cache_k_l0", 640, "the cache is not packed: nothing reads cache_k_l0 in a way that MixKVQ knows; llama.cpp may be newer than this MixKVQ"),
        ("cache_k_l0", 256, None),  # sinks and window
        ("cache_new_v_l3", 640, "this llama.cpp has a cache that MixKVQ does not know, cache_new_v_l3: it is not packed; use a newer MixKVQ"),
        ("cache_idx_k_l3", 640, None),
        ("cache_r_l3", 640, None),
    ],
)
def test_a_cache_that_is_not_packed_is_said_once(name, rows, said):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MIXKVQ_", "GGML_"))}
    done = subprocess.run([sys.executable, "-c", PROGRAM, name, str(rows)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("mixkvq: ")]
    assert lines == ([f"mixkvq: {said}"] if said else [])
