"""What a process may take of the machine, with control groups of both versions as trees of files."""

from __future__ import annotations

import os

import psutil
import pytest

from mixkvq.core.machine import free_memory, physical_cores
from mixkvq.core.memory import Free, check_fits, format_bytes, largest_that_fits

MIB = 1 << 20
V2_MOUNT = "30 20 0:27 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
V1_MOUNTS = """31 20 0:28 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 20 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"""


def tree(folder, membership: str, mounts: str, files: dict[str, object]):
    """A root folder with /proc/self/cgroup and mountinfo, and files below /sys/fs/cgroup."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(membership + "\n")
    (folder / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\nnot a line\n" + mounts + "\n")
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return folder


def test_without_control_groups_the_machine_decides(tmp_path):
    free = free_memory(tmp_path)
    assert free.limit is None and free.where == "" and 0 < free.bytes <= psutil.virtual_memory().total
    siblings = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= physical_cores(tmp_path) <= siblings
    assert "control group" not in free.describe()


@pytest.mark.parametrize("tight", ["a/b/", "a/", ""])
def test_the_smallest_room_along_the_hierarchy_counts(tmp_path, tight):
    """Version 2: each level has 300 MiB left, one only 40."""
    files = {}
    for level in ("a/b/", "a/", ""):
        files |= {level + "memory.max": 400 * MIB, level + "memory.current": 100 * MIB}
    files |= {tight + "memory.max": 120 * MIB, tight + "memory.current": 80 * MIB}
    free = free_memory(tree(tmp_path, "0::/a/b", V2_MOUNT.format(root="/"), files))
    assert free == Free(40 * MIB, 120 * MIB)
    assert free.describe() == "40.0 MiB of memory are free (a control group limits this process to 120.0 MiB)"


def test_file_pages_are_given_back(tmp_path):
    stat = f"anon 1\nfile {60 * MIB}\ninactive_file {30 * MIB}\nactive_file {20 * MIB}\nslab 5"
    files = {"memory.max": 100 * MIB, "memory.current": 90 * MIB, "memory.stat": stat, "a/memory.max": "max", "a/memory.current": 90 * MIB}
    assert free_memory(tree(tmp_path, "0::/a", V2_MOUNT.format(root="/"), files)) == Free(60 * MIB, 100 * MIB)


def test_memory_high_slows_a_process_down_and_counts(tmp_path):
    files = {"memory.max": 100 * MIB, "memory.high": 70 * MIB, "memory.current": 50 * MIB}
    assert free_memory(tree(tmp_path, "0::/", V2_MOUNT.format(root="/"), files)) == Free(20 * MIB, 70 * MIB)


def test_more_in_use_than_allowed_leaves_nothing(tmp_path):
    files = {"memory.max": 50 * MIB, "memory.current": 90 * MIB, "memory.stat": "inactive_file junk"}
    assert free_memory(tree(tmp_path, "0::/", V2_MOUNT.format(root="/"), files)).bytes == 0


def test_version_1(tmp_path):
    membership = "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n0::/"
    files = {
        "memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000,  # none
        "memory/memory.usage_in_bytes": 900 * MIB,
        "memory/docker/memory.limit_in_bytes": 200 * MIB,
        "memory/docker/memory.usage_in_bytes": 150 * MIB,
        "memory/docker/memory.stat": f"inactive_file 0\nactive_file 0\ntotal_inactive_file {9 * MIB}\ntotal_active_file {1 * MIB}",
        "memory/docker/x/memory.limit_in_bytes": 190 * MIB,
        "memory/docker/x/memory.usage_in_bytes": 10 * MIB,
        "cpu,cpuacct/docker/x/cpu.cfs_quota_us": -1,
        "cpu,cpuacct/docker/x/cpu.cfs_period_us": 100000,
        "cpu,cpuacct/docker/cpu.cfs_quota_us": 100000,
        "cpu,cpuacct/docker/cpu.cfs_period_us": 100000,
    }
    root = tree(tmp_path, membership, V1_MOUNTS.format(root="/"), files)
    assert free_memory(root) == Free(60 * MIB, 200 * MIB)
    assert physical_cores(root) == 1


@pytest.mark.parametrize("seen", ["/docker/x", "/"])
def test_in_a_container(tmp_path, seen):
    """Its group is where the hierarchy is mounted; the path may be that of the host (no cgroup namespace) or begin there."""
    files = {"memory.max": 64 * MIB, "memory.current": 4 * MIB, "cpu.max": "100000 100000"}
    root = tree(tmp_path, f"0::{seen}", V2_MOUNT.format(root=seen), files)
    assert free_memory(root) == Free(60 * MIB, 64 * MIB)
    assert physical_cores(root) == 1


def test_a_path_outside_what_is_mounted(tmp_path):
    files = {"memory.max": 64 * MIB, "memory.current": 4 * MIB}
    assert free_memory(tree(tmp_path, "0::/../elsewhere", V2_MOUNT.format(root="/"), files)) == Free(60 * MIB, 64 * MIB)


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("150000 100000", 1), ("350000 100000", 3), ("20000 100000", 1), ("", 8), ("x y", 8)]
)
def test_quota_of_processors(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr("mixkvq.core.machine._cores_of_affinity", lambda: 8)
    root = tree(tmp_path, "0::/a/b", V2_MOUNT.format(root="/"), {"a/cpu.max": quota, "a/b/cpu.max": "max 100000"})
    assert physical_cores(root) == cores


def test_commands_take_their_threads_from_here():
    from mixkvq.cli import running
    from mixkvq.core import machine
    from mixkvq.study import calibrate

    assert running.physical_cores is machine.physical_cores
    assert calibrate.physical_cores is machine.physical_cores


# --- whether it fits ---


def taking(slope: float, fixed: float = 0.0, asked: list | None = None):
    """A measure of contexts that take `slope` bytes a token."""

    def measure(n: int) -> int:
        if asked is not None:
            asked.append(n)
        return int(fixed + slope * n)

    return measure


@pytest.mark.parametrize("slope", [1.5, 3000.0])
@pytest.mark.parametrize("fixed", [0.0, 1e6])
@pytest.mark.parametrize("free", [1 << 20, 40 << 20, 3 << 30])
def test_the_largest_context_that_fits(slope, fixed, free):
    asked: list[int] = []
    n = 1 << 24
    measure = taking(slope, fixed, asked)
    found = largest_that_fits(n, measure(n), free, 0, measure)
    assert found % 256 == 0 and (found == 0 or measure(found) <= free) and (measure(found + 256) > free or found + 256 >= n)
    assert len(asked) < 30


def test_it_is_the_largest_even_where_a_context_grows_in_steps():
    def measure(n: int) -> int:
        return n * 100 + (50_000_000 if n > 100_000 else 0)

    assert largest_that_fits(1 << 20, measure(1 << 20), 20_000_000, 0, measure) == 100_000 // 256 * 256


def test_what_cannot_be_measured_is_not():
    """Even llama.cpp's books of so many cells would not fit."""
    from bridge import ContextTooLargeError

    asked: list[int] = []
    with pytest.raises(ContextTooLargeError, match="A context of 1073741824 tokens needs at least 144.0 GiB") as e:
        check_fits(1 << 30, Free(1 << 30), 144, taking(1000, 0, asked))
    assert max(asked) * 144 <= 1 << 30
    proposed = int(str(e.value).split("at most ")[1].split()[0])
    check_fits(proposed, Free(1 << 30), 144, taking(1000))


def test_the_sentence_names_what_is_needed_and_what_is_free():
    from bridge import ContextTooLargeError

    with pytest.raises(ContextTooLargeError) as e:
        check_fits(4096, Free(64 << 20, 65 << 20), 0, taking(32 << 10))
    assert str(e.value) == (
        "A context of 4096 tokens needs at least 128.0 MiB and 64.0 MiB of memory are free (a control group limits this process to 65.0 MiB); "
        "at most 1792 tokens fit."
    )
    with pytest.raises(ContextTooLargeError, match="1.0 KiB are free on CUDA0; not even 256 tokens fit"):
        check_fits(4096, Free(1 << 10, where="on CUDA0"), 0, taking(1024))
    check_fits(4096, Free(4 << 20), 0, taking(1024))
    check_fits(4096, Free(0), 0, lambda n: None)  # llama.cpp itself will say what is wrong


def test_how_sizes_are_written():
    assert format_bytes(0) == "0 bytes" and format_bytes(1536) == "1.5 KiB" and format_bytes(3 << 30) == "3.0 GiB"
