"""What a file of results says about its run: machine, commit, versions and files, without paths or host names."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from bridge.run import write_atomically


def describe_run(bench: str, model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The head of a result: which program (`bench`) ran, when, where, on which model, with which settings."""
    return {
        "bench": bench,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
        "versions": _versions(),
        "model": describe_file(model),
        "settings": settings,
    }


def describe_file(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def save_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write atomically, so that an interrupted run leaves the previous state; None: nowhere."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def available_cores() -> int:
    """Cores that this process may use, hyper-threads counted."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _machine() -> dict[str, Any]:
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


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # an installed package


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    for name in ("mixkvq", "llama_cpp_python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
