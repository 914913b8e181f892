"""How much memory a new cache may take, and how sizes are written."""

from __future__ import annotations

import os


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            return f.read()
    except OSError:
        return ""


def _cgroup_free() -> int | None:
    """Bytes left under the limit of the control group (containers), or None if there is no limit."""
    for limit_path, used_path, stat_path in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
            "/sys/fs/cgroup/memory/memory.stat",
        ),
    ):
        limit, used = _read(limit_path).strip(), _read(used_path).strip()
        if not limit.isdigit() or not used.isdigit() or int(limit) >= 1 << 60:
            continue
        # File pages that nobody is using count as usage but are given back on demand.
        reclaimable = 0
        for line in _read(stat_path).splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "active_file") and value.isdigit():
                reclaimable += int(value)
        return max(0, int(limit) - int(used) + reclaimable)
    return None


def available_bytes() -> int | None:
    """Bytes that new allocations can take without swapping, or None where the system does not say."""
    free: int | None = None
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            break
    if free is None:
        try:  # no figure for free memory here: all of it is an upper bound
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            free = None
    group = _cgroup_free()
    if group is not None:
        free = group if free is None else min(free, group)
    return free if free is None or free > 0 else None


def format_bytes(n: float) -> str:
    """`1536` -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:,.1f} {unit}"
        n /= 1024
    raise AssertionError
