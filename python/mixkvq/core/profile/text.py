"""Profiles as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ProfileError
from .data import ARRAYS, LARGEST, PROFILE_VERSION, LayerProfile, Profile, called, check
from .file import read_profile


def to_json(profile: Profile) -> str:
    """The profile as JSON text; numbers have as many digits as they need to come back the same. Raises ProfileError if it is not valid."""
    check(profile, profile.path)
    fields = {
        "version": PROFILE_VERSION,
        "fingerprint": profile.fingerprint,
        "window": profile.window,
        "sinks": profile.sinks,
        "made_by": profile.made_by,
        "body_bits": None if profile.body_bits is None else float(str(np.float32(profile.body_bits))),
        "measured": profile.measured,
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}" for name, value in fields.items()]
    layers = ["null" if layer is None else _layer_json(layer) for layer in profile.layers]
    return "{\n" + ",\n".join(lines) + ',\n "layers": [\n  ' + ",\n  ".join(layers) + "\n ]\n}\n"


def _layer_json(layer: LayerProfile) -> str:
    parts = []
    for name, _, _, dtype in ARRAYS:
        array = getattr(layer, name)
        if array is not None:
            # str() of a float32 is the shortest text that reads back as the same float32
            rows = [[float(str(x)) if dtype is np.float32 else int(x) for x in row] for row in np.asarray(array, dtype)]
            parts.append(f'"{name}": [' + ",\n    ".join(json.dumps(row) for row in rows) + "]")
    return "{" + ",\n   ".join(parts) + "}"


_FIELDS: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "fingerprint": (str,),
    "window": (int, type(None)),
    "sinks": (int, type(None)),
    "made_by": (str,),
    "body_bits": (int, float, type(None)),
    "measured": (list,),
    "layers": (list,),
}


def from_json(text: str, path: str = "") -> Profile:
    """A profile from the text that `to_json` writes; `path` is what an error calls it. Raises ProfileError."""
    try:
        data = _parsed(text)
        _check_fields(data)
        layers = [None if entry is None else _layer(entry, i) for i, entry in enumerate(data["layers"])]
        bits = data.get("body_bits")
        if bits is not None and not 0 < bits <= 32:  # before it becomes a float32
            raise _Wrong("is not valid: body_bits is out of range")
        profile = Profile(
            fingerprint=data["fingerprint"],
            layers=layers,
            window=data.get("window"),
            sinks=data.get("sinks"),
            path=path,
            measured=data.get("measured", []),
            made_by=data.get("made_by", ""),
            body_bits=bits if bits is None else float(np.float32(bits)),
            version=data["version"],
        )
        if problem := profile.error():
            raise _Wrong(problem)
    except _Wrong as e:
        raise ProfileError(f"{called(path)} {e}.") from None
    return profile


class _Wrong(Exception):
    """What is wrong, to go behind the name of the profile."""


def _parsed(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise _Wrong(f"is not JSON: {e.msg} in line {e.lineno}, column {e.colno}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise _Wrong("is not JSON of a profile") from None
    if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
        raise _Wrong("is not JSON of a profile: it has no list of layers")
    return data


def _check_fields(data: dict[str, Any]) -> None:
    version = data.get("version")
    if type(version) is int and version > PROFILE_VERSION:
        raise _Wrong(f"is of format version {version}, and this MixKVQ reads up to {PROFILE_VERSION}; install a newer MixKVQ")
    for name in ("version", "fingerprint"):
        if name not in data:
            raise _Wrong(f"is not valid: {name} is missing")
    for name, value in data.items():
        if name not in _FIELDS:
            raise _Wrong(f"is not valid: it has an unknown field {name[:40]!r}")
        if type(value) not in _FIELDS[name]:
            raise _Wrong(f"is not valid: {json.dumps(value)[:40]} is no value for {name}")
    if data["version"] < 1:
        raise _Wrong(f"is not valid: version is {data['version']}")


def _layer(entry: Any, i: int) -> LayerProfile:
    if not isinstance(entry, dict) or not set(entry) <= {name for name, *_ in ARRAYS}:
        raise _Wrong(f"is not valid: layer {i} is not an object with {', '.join(name for name, *_ in ARRAYS)}")
    return LayerProfile(*(_array(entry, name, dtype, i) for name, _, _, dtype in ARRAYS))  # type: ignore[arg-type]


def _array(entry: dict[str, Any], name: str, dtype: Any, i: int) -> npt.NDArray[Any] | None:
    rows = entry.get(name)
    if rows is None and dtype is np.float32:
        return None
    largest, types = (2**31 - 1, (int,)) if dtype is np.int32 else (LARGEST, (int, float))
    if not (isinstance(rows, list) and rows and all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows)):
        raise _Wrong(f"is not valid: {name} of layer {i} is not a list of rows of one length")
    if not all(type(x) in types and abs(x) <= largest for row in rows for x in row):
        raise _Wrong(f"is not valid: {name} of layer {i} holds something else than {'whole ' if dtype is np.int32 else ''}numbers in range")
    return np.array(rows, dtype)


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """A profile in any form: a side-car, a model with one embedded, or JSON (by its ending). Raises ProfileError."""
    path = os.fspath(path)
    return read_json(path) if path.endswith(".json") else read_profile(path)


def read_json(path: str | os.PathLike[str]) -> Profile:
    """A profile from a file that `to_json` made. Raises ProfileError."""
    path = os.fspath(path)
    try:
        return from_json(Path(path).read_bytes().decode("utf-8"), path)
    except UnicodeDecodeError as e:
        raise ProfileError(f"The profile {path} is not UTF-8 text (byte {e.start}).") from None
    except OSError as e:
        raise ProfileError(f"The profile {path} cannot be read: {e.strerror or e}.") from None
