"""Memory that something takes, measured in a process of its own, where nothing else is taken or given back meanwhile.

`measure(NAME, ...)` runs the function of that name below in a new process and returns what it returns. What counts are anonymous pages: mapped
weights and libraries become resident when the system likes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def measure(name: str, *arguments: Any) -> Any:
    done = subprocess.run([sys.executable, __file__, name, json.dumps(arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def anonymous_bytes() -> int:
    """Of this process, after the allocator has given back what nobody uses."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024


# ---- what is measured ------------------------------------------------------------------------------------


def filled_cache(path: str, ours: bool, n_ctx: int, n_tokens: int) -> dict[str, Any]:
    """What a context with `n_tokens` in it takes, on our device or on llama.cpp's own, and what the cache says of itself."""
    from contexts import Context, Model, random_tokens

    from bridge import Kv

    model = Model(path, ours)
    with Context(model, n_ctx=512) as warm:
        warm.feed(random_tokens(100))
    before = anonymous_bytes()
    with Context(model, Kv(preset="balanced"), n_ctx=n_ctx, n_ubatch=128) as context:
        for at in range(0, n_tokens, 512):
            context.feed(random_tokens(512, at))
        context.feed([5])
        return {"grown": anonymous_bytes() - before, **(context.stats() if ours else {})}


def contexts_made_and_freed(path: str, warm: int, n: int) -> dict[str, int]:
    """What `n` contexts leave behind, each used a little and freed: bytes, and descriptors of open files."""
    from contexts import BALANCED, Context, Model, random_tokens

    model = Model(path, True)
    before = descriptors = 0
    for i in range(warm + n):
        if i == warm:
            before, descriptors = anonymous_bytes(), len(os.listdir("/proc/self/fd"))
        with Context(model, BALANCED, n_ctx=512, n_ubatch=128) as context:
            context.feed(random_tokens(300))
            context.feed([5])
    return {"bytes": anonymous_bytes() - before, "descriptors": len(os.listdir("/proc/self/fd")) - descriptors}


def models_made_and_closed(path: str, warm: int, n: int) -> int:
    """What `n` bridge.Llama of two presets in turns leave behind."""
    from bridge import Llama

    before = 0
    for i in range(warm + n):
        if i == warm:
            before = anonymous_bytes()
        llama = Llama(path, n_ctx=256, n_batch=32, n_threads=1, n_threads_batch=1, kv=("balanced", "paper")[i % 2], device="cpu", verbose=False)
        llama.eval([1, 2, 3])
        assert llama.kv_stats()["n_cells"] == 256
        llama.close()
    return anonymous_bytes() - before


def bytes_read_of_a_profile(path: str) -> dict[str, int]:
    """Bytes read from files, and memory taken at most, while a session with the profile begins."""
    import resource

    from bridge.backend import backend

    def read() -> int:
        return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])

    begin = backend().native.begin
    peak, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, read()
    begin(profile=path).end()
    return {"read": read() - before, "grown": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)}


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
