"""What a file of results says about its run: command line, machine, commit, versions and files, without absolute paths or host names."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import SettingsError
from ..core.files import PathLike, write_atomically
from ..core.outputs import check_json, check_output

_BLOCK = 1 << 22


def describe_run(
    bench: str,
    model: Path,
    settings: dict[str, Any],
    *,
    hashed: bool,
    words: Sequence[str] = (),
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """The head of a result: which program (`bench`) ran, when, where, on which model, with which command line and settings.

    hashed: whether the result is written to a file, which needs the model's SHA-256; that takes seconds per GiB. words: the command
    line. progress: see `describe_file`.
    """
    return {
        "bench": bench,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(_without_folders(word) for word in words),
        "commit": commit(),
        "machine": machine(),
        "versions": _versions(),
        "model": describe_file(model, progress) if hashed else {"name": model.name, "bytes": model.stat().st_size},
        "settings": settings,
    }


def describe_file(path: Path, progress: Callable[[int], None] = lambda n: None) -> dict[str, Any]:
    """Name, size and SHA-256 of a file. progress: called with the bytes of every block that was read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def check_result(path: PathLike, bench: str, *, force: bool, inputs: Iterable[PathLike] = ()) -> None:
    """Raises SettingsError unless a result of `bench` can be written there without a loss: what is replaced must be one, too."""
    check_output(path, "JSON", force=True, inputs=inputs)
    check_json(path, f"a result of {bench}", lambda found: isinstance(found, dict) and found.get("bench") == bench, force=force, inputs=inputs)


def load_or_start(out: Path | None, fresh: dict[str, Any], restart: bool) -> dict[str, Any]:
    """The result file of an earlier run, if there is one and it was made with the same model and settings.

    Raises SettingsError if it was made with others.
    """
    if out is None or restart or not out.exists():
        return fresh
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
        other = next((key for key in ("bench", "model", "settings") if found.get(key) != fresh[key]), None)
        known = dict(found["files"]) if other is None else {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
        raise SettingsError(f"{out} is not a result of this program; give another --out, or --restart to replace it.") from None
    if other is None:
        changed = [name for name in fresh["files"] if name in known and known[name] != fresh["files"][name]]
        if not changed:
            newer = {key: fresh[key] for key in ("date", "command", "commit", "machine", "versions")}
            return {**found, **newer, "files": {**known, **fresh["files"]}}
        other = f"content of {changed[0]}"
    raise SettingsError(f"{out} holds a run with another {other}; give another --out, or --restart to replace it.")


def save_json(path: PathLike | None, result: dict[str, Any]) -> None:
    """Write atomically, so that an interrupted run leaves the previous state; None: nowhere. Raises OSError."""
    if path is not None:
        write_atomically(path, json.dumps(result, indent=1) + "\n")


def _without_folders(word: str) -> str:
    """A word of a command line in which files have no folders: `--out=/home/a/x.json` becomes `--out=x.json`."""

    def shortened(found: re.Match[str]) -> str:
        folder, name = os.path.split(found[0])
        return name if folder and os.path.isdir(os.path.expanduser(folder)) else found[0]

    return re.sub("[^,=:]+", shortened, word)


def available_cores() -> int:
    """Cores that this process may use, hyper-threads counted."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, cores of this process, instruction sets that matter here, architecture and system."""
    cpu, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key == "model name":
                cpu = value
            elif key in ("flags", "Features"):
                flags = set(value.split())
                break
    isa = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimd", "asimddp", "sve") if name in flags]
    return {"cpu": cpu, "cores": available_cores(), "isa": isa, "arch": platform.machine(), "os": platform.system()}


def commit(file: Path = Path(__file__)) -> str:
    """The commit of the repository that has this file, "+changes" behind it if its work tree has others; else the version of the package.

    A package may be installed within a repository of the user's, which does not have its files. Results do not count as changes: they come from runs.
    """
    file = file.resolve()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's GIT_DIR is not ours

    def git(*arguments: str) -> str:
        command: Sequence[str] = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", file.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"mixkvq {_versions().get('mixkvq', 'of unknown version')}"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("mixkvq", "llama_cpp_python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
