"""Published builds of llama.cpp, which `make compat` runs: where they come from, and their libraries on this disk.

Two packages carry shared libraries: llama-cpp-py-sync on PyPI (CPU backend linked in) and @node-llama-cpp/linux-x64 on npm (CPU backends in files of
their own, as in llama.cpp's own archives). They are asked for with pip and npm, as whoever uses this machine has set those up.
"""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "compat"


@dataclass(frozen=True)
class Build:
    """A build by llama.cpp's own name, the package that carries it, and the layout of ggml's backend structs that it should have ("": refused)."""

    name: str
    package: str
    version: str
    layout: str

    @property
    def folder(self) -> Path:
        """Where its libraries lie once they are fetched."""
        return FOLDER / f"{self.name}-{self.package}"

    @property
    def loads_backends(self) -> bool:
        """Whether its CPU backends are files that a program has to load."""
        return self.package == "npm"


def _builds(layout: str, pypi: str, npm: dict[str, str]) -> list[Build]:
    found = [Build(f"b{number}", "pypi", f"0.{number}", layout) for number in pypi.split()]
    return found + [Build(name, "npm", version, layout) for name, version in npm.items()]


BUILDS = [
    *_builds("a", "8305 8508 8589 8683", {"b7347": "3.14.5", "b7698": "3.15.0", "b8179": "3.17.1"}),
    *_builds("b", "8771 8840 9209 9554 9982 10152 10603 10952 11227 11327", {"b10361": "3.20.0", "v0.5.0": "3.22.1"}),
    *_builds("c", "11352 11391 11413 11548 11739", {}),
]
"""On both sides of each boundary: b8683 and b8771, b11327 and b11352."""
TOO_OLD = Build("b6301", "npm", "3.12.4", "")
"""Backend API 1."""
OF_EACH_LAYOUT = [next(b for b in BUILDS if b.name == name) for name in ("b8683", "v0.5.0", "b11739")]
"""What `make test` runs."""


RELEASES = {
    "0.3.17": "8468", "0.3.18": "8468", "0.3.20": "8660", "0.3.22": "9014", "0.3.25": "9554", "0.3.28": "9554", "0.3.30": "9642", "0.3.33": "9879",
    "0.3.34": "9982", "0.3.35": "10603",
}  # fmt: skip
"""Of llama-cpp-python: a build on PyPI of llama.cpp at about the commit that it carries, with the same parameters."""


class NotFetchedError(Exception):
    """Why a build cannot be had on this machine, as a sentence."""


def _call(command: list[str], folder: Path, build: Build) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise NotFetchedError(f"{build.name} is on npm, and there is no npm on this machine.")
    try:
        done = subprocess.run([program, *command[1:]], cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise NotFetchedError(f"{build.name} did not come within five minutes.") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no reason").splitlines()[-1]
        raise NotFetchedError(f"{build.name} cannot be fetched ({Path(command[0]).name}: {reason}).")


def fetch(build: Build) -> Path:
    """The folder with the build's libraries, which are downloaded the first time. Raises NotFetchedError."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NotFetchedError("The published builds that are tried are for Linux on x86-64.")
    if build.folder.is_dir():
        return build.folder
    raw = FOLDER / "raw" / build.folder.name
    shutil.rmtree(raw, ignore_errors=True)
    raw.mkdir(parents=True)
    if build.package == "pypi":
        options = ["-q", "--no-deps", "--only-binary", ":all:"]
        _call([sys.executable, "-m", "pip", "download", *options, f"llama-cpp-py-sync=={build.version}"], raw, build)
        with zipfile.ZipFile(next(raw.glob("*.whl"))) as archive:
            archive.extractall(raw)
    else:
        _call(["npm", "pack", "--silent", f"@node-llama-cpp/linux-x64@{build.version}"], raw, build)
        with tarfile.open(next(raw.glob("*.tgz"))) as archive:
            archive.extractall(raw, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    libraries = next(raw.rglob("libggml-base*")).parent
    if not glibc_is_new():
        for path in libraries.glob("*.so*"):
            path.write_bytes(_without_new_glibc(path.read_bytes()))
    libraries.rename(build.folder)
    shutil.rmtree(raw)
    return build.folder


def fetch_release(version: str) -> dict[str, str]:
    """Variables of a process that imports this llama-cpp-python: its Python from the archive, its libraries from a build. Raises NotFetchedError."""
    if version not in RELEASES:
        raise NotFetchedError(f"There is no build for llama-cpp-python {version}: {', '.join(RELEASES)}.")
    build = Build(f"b{RELEASES[version]}", "pypi", f"0.{RELEASES[version]}", "")
    libraries, folder = fetch(build), FOLDER / f"llama-cpp-python-{version}"
    if not folder.is_dir():
        raw = FOLDER / "raw" / folder.name
        shutil.rmtree(raw, ignore_errors=True)
        raw.mkdir(parents=True)
        options = ["-q", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        _call([sys.executable, "-m", "pip", "download", *options, f"llama-cpp-python=={version}"], raw, build)
        with tarfile.open(next(raw.glob("*.tar.gz"))) as archive:
            package = [m for m in archive.getmembers() if m.name.split("/")[1:2] == ["llama_cpp"]]
            archive.extractall(raw, members=package, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        next(raw.glob("*/llama_cpp")).parent.rename(folder)
        shutil.rmtree(raw)
    found = {"PYTHONPATH": str(folder), "LLAMA_CPP_LIB_PATH": str(libraries), "LD_LIBRARY_PATH": str(libraries)}
    return found | ({"LD_PRELOAD": preload()} if preload() else {})


# ---- libraries for a newer glibc than this machine has --------------------------------------------------------------------------------------

_NEW = (b"GLIBC_2.37", b"GLIBC_2.38", b"GLIBC_2.39")


def glibc_is_new() -> bool:
    """Whether this machine's glibc has what the wheels want: 2.38."""
    return tuple(map(int, platform.libc_ver()[1].split(".")[:2] or [0])) >= (2, 38)


def _without_new_glibc(data: bytes) -> bytes:
    """An ELF library whose need for versions of glibc that this machine lacks is weak: functions that it takes from them come from `preload`."""
    library = bytearray(data)
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, count = struct.unpack_from("<HH", library, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", library, table + i * size) for i in range(count)]
    for kind, at, link in ((s[1], s[4], s[6]) for s in sections):
        if kind != 0x6FFFFFFE:  # what versions of which libraries are needed
            continue
        names = sections[link][4]
        while True:
            _, n, _, first, following = struct.unpack_from("<HHIII", library, at)
            entry = at + first
            for _ in range(n):
                _, flags, _, name, next_entry = struct.unpack_from("<IHHII", library, entry)
                start = names + name
                if bytes(library[start : library.index(0, start)]) in _NEW:
                    struct.pack_into("<H", library, entry + 4, flags | 2)  # VER_FLG_WEAK
                entry += next_entry
            if not following:
                break
            at += following
    return bytes(library)


def preload() -> str:
    """A library for LD_PRELOAD with what glibc has since 2.38, or "" where that is there. Raises NotFetchedError."""
    if glibc_is_new():
        return ""
    path = FOLDER / "glibc_2_38.so"
    compiler = shutil.which("cc")
    if compiler is None:
        raise NotFetchedError("The published builds want glibc 2.38; on an older one they need a C compiler.")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        source = Path(__file__).with_name("glibc_2_38.c")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(source), "-o", str(path)], check=True)
    return str(path)


if __name__ == "__main__":
    try:
        print(*(f"{name}={value}" for name, value in fetch_release(sys.argv[1]).items()))
    except NotFetchedError as e:
        sys.exit(f"error: {e}")
