"""cpp/ggml/abi.h against ggml's own declarations, where its source tree is at hand, and always against the layout that was true for this version.

LLAMA_CPP_SOURCE names a source tree of llama.cpp, for example vendor/llama.cpp of the unpacked llama-cpp-python archive.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "native" / "abi_offsets.cpp"
SOURCE = os.environ.get("LLAMA_CPP_SOURCE", "")
COMPILER = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]

# ggml 0.25, where a pointer has 8 bytes. All members of a *_i struct are function pointers, one after the other.
TABLES = {
    "ggml_backend_buffer_type_i": "get_name alloc_buffer get_alignment get_max_size get_alloc_size is_host",
    "ggml_backend_buffer_i": (
        "free_buffer get_base init_tensor memset_tensor set_tensor get_tensor set_tensor_2d get_tensor_2d cpy_tensor clear reset"
    ),
    "ggml_backend_i": (
        "get_name free set_tensor_async get_tensor_async set_tensor_2d_async get_tensor_2d_async cpy_tensor_async synchronize "
        "graph_plan_create graph_plan_free graph_plan_update graph_plan_compute graph_compute event_record event_wait graph_optimize"
    ),
    "ggml_backend_device_i": (
        "get_name get_description get_memory get_type get_props init_backend get_buffer_type get_host_buffer_type buffer_from_host_ptr "
        "supports_op supports_buft offload_op event_new event_free event_synchronize"
    ),
    "ggml_backend_reg_i": "get_name get_device_count get_device get_proc_address",
}
STRUCTS = {  # (member, offset, size)...; the last entry is the size of the struct
    "ggml_backend_buffer_type": [("iface", 0, 48), ("device", 48, 8), ("context", 56, 8), 64],
    "ggml_backend_buffer": [("iface", 0, 88), ("buft", 88, 8), ("context", 96, 8), ("size", 104, 8), ("usage", 112, 4), 120],
    "ggml_backend": [("guid", 0, 8), ("iface", 8, 128), ("device", 136, 8), ("context", 144, 8), 152],
    "ggml_backend_device": [("iface", 0, 120), ("reg", 120, 8), ("context", 128, 8), 136],
    "ggml_backend_event": [("device", 0, 8), ("context", 8, 8), 16],
    "ggml_hash_set": [("size", 0, 8), ("used", 8, 8), ("keys", 16, 8), 24],
    "ggml_cgraph": [
        *((name, 4 * i, 4) for i, name in enumerate(("size", "n_nodes", "n_leafs"))),
        *((name, 16 + 8 * i, 8) for i, name in enumerate(("nodes", "grads", "grad_accs", "leafs", "use_counts"))),
        *(("visited_hash_set", 56, 24), ("order", 80, 4), ("uid", 88, 8)),
        96,
    ],
    "ggml_backend_reg": [("api_version", 0, 4), ("iface", 8, 32), ("context", 40, 8), 48],
}


def stored_layout() -> set[str]:
    lines = {"api version 0 2"}
    for struct, members in TABLES.items():
        names = members.split()
        lines.add(f"{struct} sizeof 0 {8 * len(names)}")
        lines.update(f"{struct} {name} {8 * i} 8" for i, name in enumerate(names))
    for struct, (*members, size) in STRUCTS.items():
        lines.add(f"{struct} sizeof 0 {size}")
        lines.update(f"{struct} {name} {offset} {n}" for name, offset, n in members)
    return lines


def layout(folder: Path, *options: str) -> set[str]:
    """What abi_offsets.cpp prints, compiled with these options. It calls nothing of ggml, so it links nothing."""
    program = folder / "abi_offsets"
    command = [*COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", *options, str(PROGRAM), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(set(lines))
    return set(lines)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> set[str]:
    if not COMPILER:
        pytest.skip("there is no C++ compiler")
    spec = importlib.util.find_spec("llama_cpp")
    headers = Path(spec.origin).resolve().parent.parent / "include"
    if not (headers / "ggml-backend.h").is_file():
        pytest.skip(f"llama-cpp-python has not installed ggml's headers in {headers}")
    return layout(tmp_path_factory.mktemp("abi"), "-isystem", str(headers))


def test_the_layout_is_the_stored_one(ours):
    assert ours == stored_layout()


def test_the_layout_is_that_of_ggml(ours, tmp_path):
    if not SOURCE:
        pytest.skip("LLAMA_CPP_SOURCE does not name a source tree of llama.cpp")
    ggml = Path(SOURCE) / "ggml"
    assert (ggml / "src" / "ggml-backend-impl.h").is_file(), f"{SOURCE} is not a source tree of llama.cpp"
    assert ours == layout(tmp_path, "-DMIXKVQ_GGML_OWN_HEADER", "-isystem", str(ggml / "include"), "-isystem", str(ggml / "src"))


def test_every_declaration_of_abi_h_is_compared():
    """A struct or member that is added to abi.h must be added to the program as well."""
    text = (ROOT / "cpp" / "ggml" / "abi.h").read_text()
    program = PROGRAM.read_text()
    found = 0
    for block in text.split("\nstruct ")[1:]:
        name, _, body = block.partition(" {\n")
        if "\n" in name or ";" in name:
            continue  # a forward declaration
        assert f"SIZE({name});" in program
        for line in body.split("\n};")[0].splitlines():
            code = line.split("//")[0].strip()
            member = code.split("(*")[1].split(")")[0] if "(*" in code else code.rstrip(";").split()[-1].lstrip("*")
            assert f"MEMBER({name}, {member});" in program, f"{name}.{member}"
            found += 1
    assert found == sum(len(members.split()) for members in TABLES.values()) + sum(len(members) - 1 for members in STRUCTS.values())
