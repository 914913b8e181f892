"""Files that anybody may have damaged, as the Python side reads them: each target takes bytes and either returns or raises one sentence of ours.

    python tests/fuzz/targets.py TARGET FOLDER [options of libFuzzer]     a fuzzer guided by coverage (needs atheris; `make fuzz`)
    python tests/fuzz/targets.py --make                                   writes the files that the corpora begin with

`tests/python/test_fuzz.py` runs the corpora and some thousand mutations of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from unittest import mock

import numpy as np
from rich.console import Console

import bridge
from bridge import states
from mixkvq.cli import conversations, defaults, inspect
from mixkvq.core import profile
from mixkvq.core.native import native
from mixkvq.core.profile import LayerProfile, Profile
from mixkvq.study import problems, profile_plots, record

_FRESH = {
    **{"bench": "mixkvq.evaluate", "model": {"name": "m"}, "settings": {"ctx": 512}, "files": {"p.gguf": "0"}},
    **{"date": "d", "command": "c", "commit": "0", "machine": {}, "versions": {}},
}
_FIELDS = {
    "model": {"name": "m", "fingerprint": "0" * 32, "weights": "0"},
    "cache": {"type": "mixkvq", "preset": "balanced", "profile": None, "window": 128, "sinks": 128},
    "rope": {"rope_freq_base": 1e4, "yarn_ext_factor": -1.0},
    "adapters": [],
}
CORPUS = Path(__file__).parent / "corpus"
_FOLDER = Path(tempfile.mkdtemp(prefix="mixkvq-fuzz-"))


def _file(data: bytes) -> Path:
    path = _FOLDER / str(os.getpid())
    path.write_bytes(data)
    return path


def profile_gguf(data: bytes) -> None:
    """A profile, side-car or embedded; what is read is written again and shown."""
    found = profile.read_profile(_file(data))
    assert found.error() is None
    text = profile.to_json(found)
    assert profile.to_json(profile.from_json(text)) == text
    inspect.print_tables(found, Console(file=io.StringIO(), width=120))
    profile_plots.maps(found)


def profile_json(data: bytes) -> None:
    """A profile as JSON."""
    found = profile.from_json(data.decode("utf-8", "surrogateescape"))
    profile.write_profile(_FOLDER / "written", found)
    assert profile.to_json(profile.read_profile(_FOLDER / "written")) == profile.to_json(found)


def chat_json(data: bytes) -> None:
    """A conversation."""
    messages = conversations.read_conversation(_file(data))
    assert conversations.parse_conversation(conversations.to_text(messages)) == messages


def settings_toml(data: bytes) -> None:
    """The settings file, and every value in it as the command takes it."""
    from mixkvq.cli.run import command

    path = _file(data)
    with mock.patch.dict(os.environ, {defaults.CONFIG: str(path)}), contextlib.suppress(KeyError):
        table = defaults.Defaults("run", command)
        for name in table:
            table[name]


def results_json(data: bytes) -> None:
    """Results that an evaluation goes on from."""
    record.load_or_start(_file(data), _FRESH, restart=False)


def problems_jsonl(data: bytes) -> None:
    """A file of problems, a line of JSON each."""
    assert problems.NumberFile(_file(data)).draw(1, None)


def state_head(data: bytes) -> None:
    """The head of a state, its checksum set right where there is room for it."""
    data = bytes(data)
    if len(data) >= 40:
        _, _, n_fields, n_tokens, _, n_body = struct.unpack_from("<8sIIIIQ", data)
        end = 32 + n_fields + 4 * n_tokens
        if end + 8 <= len(data):
            data = data[:end] + struct.pack("<Q", native().checksum(data[:end])) + data[end + 8 :]
    head = states.parse_head(data)
    assert head.start <= head.end == len(data)
    states.difference(head.fields, _FIELDS)


_ALL = (profile_gguf, profile_json, chat_json, settings_toml, results_json, problems_jsonl, state_head)
TARGETS: dict[str, Callable[[bytes], None]] = {f.__name__: f for f in _ALL}


def accepts(target: Callable[[bytes], None], data: bytes) -> bool:
    """Whether a target takes the bytes. What it refuses must be refused with one sentence."""
    try:
        target(data)
    except bridge.BridgeError as e:
        text = str(e)
        assert text and "\n" not in text.rstrip("\n"), text
        return False
    return True


# --- what corpora begin with -------------------------------------------------------------------------------------------------------


def _profiles() -> dict[str, bytes]:
    tiers, values = np.array([[4, 8, 16, 20, 16, 32], [0, 0, 64, 0, 0, 128]], np.int32), np.array([[2, 0], [4, 32]], np.int32)
    full = LayerProfile(tiers, values, np.full((2, 64), 0.5, np.float32), np.ones((2, 64), np.float32))
    measured = [{"text": "a", "tokens": 5, "kld_mean": 0.5}]
    all_of_it = Profile("0" * 32, [full, None, LayerProfile(tiers, values)], 64, 128, measured=measured, made_by="me", body_bits=3.5)
    found = {}
    for name, write in {"side-car": profile.write_profile, "embedded": profile.write_keys}.items():
        write(_FOLDER / "made", all_of_it)
        found[name] = (_FOLDER / "made").read_bytes()
    found["json"] = profile.to_json(all_of_it).encode()
    return found


def make() -> None:
    """Write the files that the corpora begin with."""
    profiles = _profiles()
    text = json.dumps(_FIELDS).encode()
    start = struct.pack("<8sIIIIQ", states.MAGIC, states.VERSION, len(text), 3, 0, 16) + text + np.arange(3, dtype="<i4").tobytes()
    head = start + struct.pack("<Q", native().checksum(start))
    good = {
        "profile_gguf": {name: profiles[name] for name in ("side-car", "embedded")},
        "profile_json": {"profile": profiles["json"]},
        "chat_json": {
            "chat": conversations.to_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße"}]).encode(),
            "list": b"[]",
        },
        "settings_toml": {"settings": b'[all]\nthreads = 8\nwindow = 128\n[run]\nctx = 16384\nkv = "quality"\nseed = 1\n'},
        "results_json": {"results": json.dumps(_FRESH).encode()},
        "problems_jsonl": {"problems": b'{"question": "1 + 1?", "answer": "It is two.\\n#### 2"}\n{"question": "2 + 2?", "answer": "#### 4"}\n'},
        "state_head": {"state": head + bytes(-len(head) % 64) + bytes(16)},
    }
    for target, files in good.items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (CORPUS / target / name).write_bytes(data)


def main() -> None:
    """Run a fuzzer on a target."""
    if sys.argv[1:] == ["--make"]:
        return make()
    import atheris

    target = TARGETS[sys.argv.pop(1)]
    for name, module in list(sys.modules.items()):  # our own code, and the reader of TOML: their branches guide it
        if name.split(".")[0] in ("bridge", "mixkvq", "tomllib"):
            classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == name]
            for function in (f for holder in (module, *classes) for f in vars(holder).values()):
                if isinstance(function, FunctionType) and function.__module__ == name:
                    atheris.instrument_func(function)
    counts = [0, 0]

    def one(data: bytes) -> None:
        counts[accepts(target, data)] += 1
        if sum(counts) % 1000 == 0:
            print(f"fuzz: {target.__name__}: {counts[0]} inputs refused, {counts[1]} taken", file=sys.stderr)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
