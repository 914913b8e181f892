"""What this process may take of the machine: memory and processors, with the limits of its control groups (containers, services)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from .memory import Free

_NO_LIMIT = 1 << 60  # version 1 writes a number near 2^63
_RECLAIMABLE = ("inactive_file", "active_file")  # file pages count as usage but are given back on demand


def free_memory(root: str | os.PathLike[str] = "/") -> Free:
    """root: where /proc and /sys of the control groups are."""
    free = Free(psutil.virtual_memory().available)
    for folder in _groups(Path(root), "memory"):
        group = _room(folder)
        if group is not None and group.bytes < free.bytes:
            free = group
    return free


def physical_cores(root: str | os.PathLike[str] = "/") -> int:
    """Cores this process may keep busy: the number of threads that is fastest for llama.cpp.

    Hyper-threads do not count, nor what its CPU affinity or the quota of a control group leaves out. root: as above.
    """
    cores = _cores_of_affinity()
    for folder in _groups(Path(root), "cpu"):
        quota = _quota(folder)
        if quota is not None:
            cores = min(cores, int(quota))  # a thread without a whole core keeps all others waiting
    return max(1, cores)


def _cores_of_affinity() -> int:
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    siblings = Path("/sys/devices/system/cpu")
    return len({_read(siblings / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path)
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups that have a say, innermost first: in the unified hierarchy and in the controller's own."""
    paths: dict[str, str] = {}  # by controller; the unified hierarchy's is ""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = (*line.split(":", 2), "", "")[:3]
        paths.update(dict.fromkeys(names.split(","), path))
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, kind_fields = mount.split(), kind.split()
        if len(fields) < 5 or len(kind_fields) < 3:
            continue
        unified = kind_fields[0] == "cgroup2"
        if not unified and not (kind_fields[0] == "cgroup" and controller in kind_fields[2].split(",")):
            continue
        group = paths.get("" if unified else controller)
        if group is None:
            continue
        top = root / fields[4].lstrip("/")
        # In a container the mount may begin at the container's group, or the path may be one that is not to be seen from here.
        inner = os.path.relpath(group, fields[3])
        folder = top if inner.startswith("..") else Path(os.path.normpath(top / inner))
        while folder != top:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        yield top


def _room(folder: Path) -> Free | None:
    """What the limits of one group leave."""
    limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limit = min((n for n in limits if n is not None), default=None)
    used = next((n for name in ("memory.current", "memory.usage_in_bytes") if (n := _number(folder / name)) is not None), None)
    if limit is None or used is None:
        return None
    values = dict(line.split(" ", 1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    # Version 1 has figures of the group alone beside those with all groups below, which its usage counts.
    pages = [values.get("total_" + name, values.get(name, "")) for name in _RECLAIMABLE]
    reclaimable = sum(int(n) for n in pages if n.isdigit())
    return Free(max(0, limit - used + min(used, reclaimable)), limit)


def _quota(folder: Path) -> float | None:
    """Cores' worth of time that one group allows."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None
