"""cpp/ggml/abi.h against ggml's own declarations, where they are at hand, and always against the layouts that were true.

What llama-cpp-python installs has the public half. LLAMA_CPP_SOURCE names source trees of llama.cpp with all of it, separated by colons: for example
vendor/llama.cpp of unpacked archives of llama-cpp-python.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "native" / "abi_offsets.cpp"
SOURCES = [Path(tree) for tree in os.environ.get("LLAMA_CPP_SOURCE", "").split(":") if tree]
COMPILER = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
LAYOUTS = {letter: int(number) for letter, number in re.findall(r"^    X\((\w), (\d)", (ROOT / "cpp/ggml/layouts.h").read_text(), re.MULTILINE)}

# Where a pointer has 8 bytes. All members of a *_i struct are function pointers, one after the other. In brackets: from that layout on.
TABLES = {
    "ggml_backend_buffer_type_i": "get_name alloc_buffer [3]alloc_buffer_n get_alignment get_max_size get_alloc_size [3]get_alloc_size_n is_host",
    "ggml_backend_buffer_i": (
        "free_buffer get_base init_tensor memset_tensor set_tensor get_tensor [2]set_tensor_2d [2]get_tensor_2d cpy_tensor clear reset"
    ),
    "ggml_backend_i": (
        "get_name free set_tensor_async get_tensor_async [2]set_tensor_2d_async [2]get_tensor_2d_async cpy_tensor_async synchronize "
        "graph_plan_create graph_plan_free graph_plan_update graph_plan_compute graph_compute event_record event_wait graph_optimize"
    ),
    "ggml_backend_device_i": (
        "get_name get_description get_memory get_type get_props init_backend get_buffer_type get_host_buffer_type buffer_from_host_ptr "
        "supports_op supports_buft offload_op event_new event_free event_synchronize"
    ),
    "ggml_backend_reg_i": "get_name get_device_count get_device get_proc_address",
}
# The other structs: their members with sizes, each at the next place where it may lie.
STRUCTS = {
    "ggml_tensor": (
        "type:4 buffer:8 ne:32 nb:32 op:4 op_params:64 flags:4 src:80 view_src:8 view_offs:8 data:8 name:64/1 extra:8 padding:8/1"
    ),
    "ggml_init_params": "mem_size:8 mem_buffer:8 no_alloc:1",
    "gguf_init_params": "no_alloc:1 ctx:8",
    "ggml_backend_buffer_type": "iface:* device:8 context:8",
    "ggml_backend_buffer": "iface:* buft:8 context:8 size:8 usage:4",
    "ggml_backend": "guid:8 iface:* device:8 context:8",
    "ggml_backend_device": "iface:* reg:8 context:8",
    "ggml_backend_event": "device:8 context:8",
    "ggml_backend_reg": "api_version:4 iface:* context:8",
    "ggml_hash_set": "size:8 used:8 keys:8",
    "ggml_cgraph": (
        "size:4 n_nodes:4 n_leafs:4 nodes:8 grads:8 grad_accs:8 leafs:8 use_counts:8 visited_hash_set:24 order:4 [2]uid:8"
    ),
}


def members(text: str, layout: int) -> list[str]:
    """Those of a list above that the layout has."""
    parts = [re.fullmatch(r"(?:\[(\d)\])?(.*)", word).groups() for word in text.split()]
    return [name for since, name in parts if layout >= int(since or 1)]


def stored_layout(layout: int) -> set[str]:
    lines = {f"api version 0 {3 if layout >= 3 else 2}"}
    for struct, names in TABLES.items():
        lines.add(f"{struct} sizeof 0 {8 * len(members(names, layout))}")
        lines.update(f"{struct} {name} {8 * i} 8" for i, name in enumerate(members(names, layout)))
    for struct, text in STRUCTS.items():
        end = 0
        for member in members(text, layout):
            name, size = member.split(":")
            size, _, align = size.partition("/")
            n = 8 * len(members(TABLES[f"{struct}_i"], layout)) if size == "*" else int(size)
            align = int(align or (4 if n == 4 or name == "op_params" else 1 if n == 1 else 8))
            at = (end + align - 1) // align * align
            lines.add(f"{struct} {name} {at} {n}")
            end = at + n
        lines.add(f"{struct} sizeof 0 {(end + 7) // 8 * 8}")
    return lines


def offsets(folder: Path, letter: str, *options: str) -> set[str]:
    """What abi_offsets.cpp prints, compiled with these options. It calls nothing of ggml, so it links nothing."""
    program = folder / "abi_offsets"
    options = (f"-DMIXKVQ_ABI={LAYOUTS[letter]}", f"-DMIXKVQ_GLUE=glue_{letter}", *options)
    command = [*COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-invalid-offsetof", *options, str(PROGRAM), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines())


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> dict[str, set[str]]:
    if not COMPILER:
        pytest.skip("there is no C++ compiler")
    return {letter: offsets(tmp_path_factory.mktemp("abi"), letter) for letter in LAYOUTS}


@pytest.mark.parametrize("letter", LAYOUTS)
def test_the_layout_is_the_stored_one(ours, letter):
    structs = {*TABLES, *STRUCTS, "api"}
    places = {" ".join(line.split()[:4]) for line in ours[letter] if line.split()[0] in structs}
    assert places == stored_layout(LAYOUTS[letter])


def layout_of(headers: str) -> str:
    """By what ggml-backend.h declares, as the library chooses it by what ggml exports."""
    since = re.findall(r'^    X\((\w), \d, \d, "(\w+)"', (ROOT / "cpp/ggml/layouts.h").read_text(), re.MULTILINE)
    return [letter for letter, function in since if re.search(rf"\b{function}\b", headers)][-1]


def test_the_public_half_is_that_of_the_installed_ggml(ours, tmp_path):
    spec = importlib.util.find_spec("llama_cpp")
    headers = Path(spec.origin).resolve().parent.parent / "include"
    if not (headers / "ggml-backend.h").is_file():
        pytest.skip(f"llama-cpp-python has not installed ggml's headers in {headers}")
    letter = layout_of("".join((headers / name).read_text() for name in ("ggml.h", "ggml-backend.h")))
    theirs = offsets(tmp_path, letter, "-DMIXKVQ_GGML_PUBLIC_HEADER", "-isystem", str(headers))
    hidden = "function ggml_backend_buffer_init "
    assert len(theirs) > 100 and {line for line in theirs if not line.startswith(hidden)} <= ours[letter]


def test_the_layout_is_that_of_ggml(ours, tmp_path):
    if not SOURCES:
        pytest.skip("LLAMA_CPP_SOURCE does not name source trees of llama.cpp")
    for source in SOURCES:
        ggml = source / "ggml"
        assert (ggml / "src" / "ggml-backend-impl.h").is_file(), f"{source} is not a source tree of llama.cpp"
        letter = layout_of("".join((ggml / "include" / name).read_text() for name in ("ggml.h", "ggml-backend.h")))
        includes = ("-isystem", str(ggml / "include"), "-isystem", str(ggml / "src"))
        assert ours[letter] == offsets(tmp_path, letter, "-DMIXKVQ_GGML_OWN_HEADER", *includes), source


def test_every_declaration_of_abi_h_is_compared():
    """A struct or member that is added to abi.h must be added to the program as well."""
    text = (ROOT / "cpp" / "ggml" / "abi.h").read_text()
    program = PROGRAM.read_text()
    found = set()
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        for line in body.splitlines():
            code = line.split("//")[0].strip()
            if not code or code.startswith("#"):
                continue
            member = code.split("(*")[1].split(")")[0] if "(*" in code else re.sub(r"\[.*\]", "", code.rstrip(";")).split()[-1].lstrip("*")
            printed = re.search(rf"(MEMBER|PLACE)\({name}, {member}\)|{name} {member} ", program)
            assert printed or member == "mmap_support", f"{name}.{member}"
            found.add((name, member))
    assert len(found) > 100
