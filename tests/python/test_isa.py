"""MIXKVQ_ISA, in processes of their own: it takes effect in the module, in the backend and in the numbers, and a wrong name is one sentence."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys

import pytest
import tiny_models

from bridge.library import library_path
from mixkvq.core import _native as native

PROGRAM = """
import json, sys
import bridge
from mixkvq.core import _native
options = {"device": "cpu", "n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
llama = bridge.Llama(sys.argv[1], kv={"preset": "balanced", "window": 0, "sinks": 0}, **options)
tokens = [3 + i * 37 % 256 for i in range(400)]
llama.eval(tokens[:390])
llama.eval(tokens[390:])  # reads packed pages
logits = [float(llama._ctx.get_logits()[i]) for i in range(llama.n_vocab())]
print(json.dumps([_native.isa(), llama.kv_stats()["isa"], f"CPU ({_native.isa()})" in llama.kv_report(), logits]))
"""

# Loads the backend as a stock program does, without `bridge`.
STOCK = """
from llama_cpp import llama_cpp as C
C._lib.ggml_backend_load_all()
C._lib.ggml_backend_dev_count.restype = C.ctypes.c_size_t
print(C._lib.ggml_backend_dev_count())
"""


def process(*arguments: str, isa: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MIXKVQ_")}
    if isa is not None:
        inherited["MIXKVQ_ISA"] = isa
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, *arguments], env={**inherited, "PYTHONPATH": paths, **environment}, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_models.llama(tmp_path_factory.mktemp("isa") / "m.gguf"))


@functools.lru_cache
def report(model: str, isa: str | None, again: bool = False) -> list:
    """What the program says; with `again` of another process."""
    done = process("-c", PROGRAM, model, isa=isa)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("isa", native.isas())
def test_it_takes_effect_in_the_module_and_in_the_backend(model, isa):
    assert report(model, isa)[:3] == [isa, isa, True]


def test_without_it_the_best_is_used(model):
    best = report(model, None)
    assert best[0] == best[1] == native.isas()[-1] == report(model, "")[0]


def test_the_kernels_that_run_are_others(model):
    """Packed bytes agree on all instruction sets but attention rounds differently: the same logits to every bit would mean the same kernels."""
    if len(native.isas()) < 2:
        pytest.skip(f"this CPU has only {native.isas()[0]}")
    logits = {isa: report(model, isa)[3] for isa in native.isas()}
    scalar = logits.pop("scalar")
    assert report(model, "scalar", again=True)[3] == scalar
    for isa, other in logits.items():
        assert other != scalar, isa
        assert max(abs(a - b) for a, b in zip(scalar, other)) < 0.2, isa


NOT_HERE = [isa for isa in ("avx2", "avx2_vnni", "avx512", "avx512_vnni", "neon", "neon_dotprod") if isa not in native.isas()]


@pytest.mark.parametrize("name", ["mmx", "AVX2", *NOT_HERE])
def test_a_name_that_cannot_be_had_is_one_sentence(model, name):
    done = process("-m", "bridge.run", model, "--prompt", "x", isa=name)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and re.fullmatch(rf'error: MIXKVQ_ISA="{name}".*; use one of scalar.*\.', lines[0]), done.stderr

    done = process("-c", STOCK, isa=name, GGML_BACKEND_PATH=str(library_path()), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr  # ggml's own CPU device
    said = [line for line in done.stderr.splitlines() if line.startswith("mixkvq: ")]
    assert len(said) == 1 and f'MIXKVQ_ISA="{name}"' in said[0]
