"""Published builds of llama.cpp as their users have them: one of each layout of ggml's structs, on the CPU and an emulated GPU; what is refused.

`make compat` runs all of bench/builds.py. Builds are fetched once into build/compat; where that cannot be, the tests are skipped.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import builds
import compatibility
import emulated
import pytest

from bridge._compat import C
from bridge.library import library_path
from mixkvq.core.model_file import built_in_model

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"prompt": 640, "tokens": 4, "more": 2, "stream": 384, "stream_tokens": 2}
COMPILER = shutil.which("c++") or shutil.which("g++")


def probe(build, library=None, **more):
    try:
        return compatibility.probe(build, built_in_model(), library or library_path(), **more)
    except builds.NotFetchedError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("build", builds.OF_EACH_LAYOUT, ids=lambda b: b.name)
def test_a_build_of_each_layout(build):
    found, said = probe(build)
    assert (compatibility.faults(build, found), said) == ([], "")


@pytest.mark.parametrize("build", builds.OF_EACH_LAYOUT, ids=lambda b: b.name)
def test_a_gpu_of_each_layout(build):
    if not emulated.LIBRARY.is_file():
        pytest.skip(f"{emulated.LIBRARY} is not built: make test builds it")
    found, said = probe(build, emulated.LIBRARY, device="MIXKVQ-CUDA0", emulated=True, lengths=SHORT, variables={"MIXKVQ_EMULATED_GPUS": "8.0"})
    assert (compatibility.faults(build, found), said) == ([], "")


def test_a_build_with_an_older_interface_is_refused_in_a_sentence():
    found, said = probe(builds.TOO_OLD, runs=False)
    assert found["refused"] and re.fullmatch(
        r"mixkvq: this llama\.cpp cannot be served, its backend API 1 is too old: MixKVQ serves llama\.cpp from b7347 "
        r"\(llama-cpp-python from 0\.3\.17\) up to ggml's backend API 3; use one of these, or a newer MixKVQ",
        said,
    )


def test_faults_are_seen():
    good = {"layout": "b", "mib": 7.3, "mib_f16": 20.0, "streams_mib": 10.0, "streams_mib_f16": 20.0, "operations": {"prompt": {"kld_mean": 0.01}}}
    build = builds.Build("b9000", "pypi", "0.9000", "b")
    assert compatibility.faults(build, good) == []
    for wrong in (
        {"mib": 20.0},
        {"streams_mib": 20.0},
        {"layout": "a"},
        {"operations": {"prompt": {"kld_mean": 0.0}}},
        {"operations": {"prompt": {"kld_mean": 0.1}}},
        {"refused": True},
        {"error": "exit code 1"},
    ):
        assert len(compatibility.faults(build, good | wrong)) == 1


def test_every_layout_and_both_sides_of_each_boundary_are_tried():
    assert len(builds.BUILDS) >= 15 and {b.layout for b in builds.BUILDS} == {b.layout for b in builds.OF_EACH_LAYOUT} == set(compatibility.since())
    assert {"b7347", "b8683", "b8771", "b11327", "b11352"} <= {b.name for b in builds.BUILDS}


# ---- what no published build has (yet) ----------------------------------------------------------------------------------------------------------

# As much of a ggml as the library looks at before it refuses.
GGML = """
#include <cstddef>
#define EXPORT extern "C" __attribute__((visibility("default")))
struct Registry { int api_version; } registry = {API};
EXPORT void * ggml_backend_dev_by_type(int) { return &registry; }
EXPORT void * ggml_backend_dev_backend_reg(void * device) { return device; }
EXPORT size_t ggml_backend_buft_get_alloc_size(void *, const void *) { return 0; }
#define EXPORTED(name) EXPORT void name() {}
FUNCTIONS
EXPORT int load(void * (*init)()) { return init() != nullptr; }
"""
FUNCTIONS = ["ggml_solve_tri", "ggml_backend_tensor_set_2d", "ggml_backend_buft_alloc_buffer_n"]


def refused(folder: Path, api: int, functions: list[str], before: str = "") -> str:
    """What the library says to a ggml with this backend API and these functions. before: what the program does first."""
    if not COMPILER or sys.platform != "linux":
        pytest.skip("there is no C++ compiler that makes ELF libraries")
    text = GGML.replace("{API}", f"{{{api}}}").replace("FUNCTIONS", "\n".join(f"EXPORTED({name})" for name in functions))
    (folder / "ggml.cpp").write_text(text)
    library = folder / "libggml.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", str(folder / "ggml.cpp"), "-o", str(library)], check=True)
    program = f"{before}import ctypes, sys; ggml, ours = map(ctypes.CDLL, sys.argv[1:]); print(ggml.load(ours.ggml_backend_init))"
    done = subprocess.run([sys.executable, "-c", program, str(library), str(library_path())], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n" and done.stderr.count("\n") == 1
    return done.stderr.strip()


@pytest.mark.parametrize(
    ("api", "functions", "words"),
    [
        (1, FUNCTIONS[:1], "its backend API 1 is too old"),
        (2, [], "its ggml is too old"),
        (4, FUNCTIONS, "its backend API 4 is newer than this library"),
        (3, [*FUNCTIONS, "ggml_backend_buft_get_alloc_interface"], "its backend API 3 is newer than this library"),
        (3, FUNCTIONS[:2], "its functions are not those of its backend API 3"),
        (2, FUNCTIONS, "its functions are not those of its backend API 2"),
        (2, FUNCTIONS[:2], "its ggml has no function ggml_init"),
    ],
)
def test_a_ggml_that_cannot_be_served_is_refused_in_a_sentence(tmp_path, api, functions, words):
    said = refused(tmp_path, api, functions)
    assert said.startswith(f"mixkvq: this llama.cpp cannot be served, {words}: MixKVQ serves llama.cpp from b7347 ")


def test_a_second_ggml_with_other_structs_is_refused(tmp_path):
    first = "from bridge.backend import backend; backend(); "
    api, functions = (3, FUNCTIONS) if not hasattr(C._lib, FUNCTIONS[-1]) else (2, FUNCTIONS[:2])
    assert "two copies of ggml with different structs" in refused(tmp_path, api, functions, first)


def swap_functions(library: Path, names: tuple[bytes, bytes]) -> None:
    """Exchange two exported functions of an ELF library: what is called by one name does what the other did."""
    data = bytearray(library.read_bytes())
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
    symbols = next(section for section in sections if section[1] == 11)  # SHT_DYNSYM
    strings = sections[symbols[6]][4]
    found = {}
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        start = strings + struct.unpack_from("<I", data, at)[0]
        found[bytes(data[start : data.index(0, start)])] = at
    first, second = (found[name] for name in names)
    data[first + 8 : first + 24], data[second + 8 : second + 24] = data[second + 8 : second + 24], data[first + 8 : first + 24]
    library.write_bytes(data)


def changed_copy(build: builds.Build, folder: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the build is a copy of itself, with another libggml-base."""
    try:
        fetched = builds.fetch(build)
    except builds.NotFetchedError as e:
        pytest.skip(str(e))
    other = folder / fetched.name
    shutil.copytree(fetched, other, symlinks=True)
    for path in other.glob("libggml-base.so*"):
        if not path.is_symlink():
            change(path)
    monkeypatch.setattr(builds, "fetch", lambda build: other)


@pytest.mark.parametrize("build", builds.OF_EACH_LAYOUT, ids=lambda b: b.name)
def test_structs_that_are_others_are_noticed(tmp_path, monkeypatch, build):
    """The build with two functions exchanged: as if a table of ggml's had them in another order, with everything else as it was."""
    names = (b"ggml_backend_buft_get_alignment", b"ggml_backend_buft_get_max_size")
    changed_copy(build, tmp_path, lambda path: swap_functions(path, names), monkeypatch)
    found, said = probe(build, runs=False)
    assert found.get("refused"), found
    assert "its ggml has other structs than it should: ggml_backend_buft_get_alignment: MixKVQ serves" in said


def import_assert(library: Path) -> None:
    """Let the library import __assert_fail, as one that is built without NDEBUG does, in place of what prints a backtrace where ggml aborts."""
    data, other = library.read_bytes(), b"\0backtrace_symbols_fd\0"
    assert other in data
    library.write_bytes(data.replace(other, b"\0__assert_fail".ljust(len(other), b"\0")))


def test_a_ggml_with_assertions_gets_the_sizes_that_it_asserts(tmp_path, monkeypatch):
    """Of addresses; what is packed is packed."""
    build = builds.OF_EACH_LAYOUT[-1]
    changed_copy(build, tmp_path, import_assert, monkeypatch)
    found, said = probe(build, lengths=SHORT)
    assert (found.get("error"), said) == (None, "")
    assert found["mib"] == found["mib_f16"] and found["streams_mib"] == found["streams_mib_f16"]
    assert all(compatibility.LEAST < figures["kld_mean"] < compatibility.BOUND for figures in found["operations"].values())
