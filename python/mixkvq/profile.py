"""Profiles: which precision each layer and head of one model gets. A GGUF file next to the model.

    general.type                 "mixkvq-profile"
    mixkvq.profile.version       1 (uint32)
    mixkvq.profile.fingerprint   of the model (`fingerprint`)
    mixkvq.profile.window        recent tokens kept in F16 (int32, optional)
    mixkvq.profile.sinks         first tokens kept in F16 (int32, optional)
    mixkvq.profile.layer_count   (uint32)
    blk.I.tiers                  int32 [n_head_kv, 6]: channels at 16, 8, 4, 3, 2 bits, tokens per scale
    blk.I.values                 int32 [n_head_kv, 2]: bits, dimensions per scale (0: rotated, one scale per token)
    blk.I.query_prior            float32 [n_head_kv, D], optional: mean |q| of each channel

A layer without a key/value cache has no tensors.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from bridge.errors import ModelFileError, ProfileError, SettingsError
from bridge.library import native
from bridge.model_file import HEAD_SIZE_STEP, MAX_HEAD_SIZE, MIN_HEAD_SIZE, Header, open_model, read_header

__all__ = [
    "LayerProfile",
    "PROFILE_VERSION",
    "Profile",
    "ProfileError",
    "fingerprint",
    "read_profile",
    "uniform_profile",
    "write_profile",
]

PROFILE_TYPE = "mixkvq-profile"
PROFILE_VERSION = 1
KEY_GROUPS = (32, 64, 128)
VALUE_BITS = (2, 3, 4, 8)
VALUE_GROUPS = (0, 32, 64)


@dataclass
class LayerProfile:
    """The formats of one layer.

    tiers: int32 [n_head_kv, 6], columns (n16, n8, n4, n3, n2, group); the five counts are multiples of 4 and sum to the head size.
    values: int32 [n_head_kv, 2], columns (bits, group).
    query_prior: float32 [n_head_kv, head size], mean |q| per channel, or None.
    """

    tiers: npt.NDArray[np.int32]
    values: npt.NDArray[np.int32]
    query_prior: npt.NDArray[np.float32] | None = None

    @property
    def head_size(self) -> int:
        return int(self.tiers[0, :5].sum())

    def error(self) -> str | None:
        """What is wrong with these formats, or None."""
        t, v, q = self.tiers, self.values, self.query_prior
        if t.ndim != 2 or t.shape[1] != 6 or t.shape[0] < 1:
            return f"tiers have the shape {list(t.shape)} instead of [n_head_kv, 6]"
        if v.shape != (t.shape[0], 2):
            return f"values have the shape {list(v.shape)} instead of [{t.shape[0]}, 2]"
        sizes = t[:, :5].astype(np.int64).sum(axis=1)
        for head, row in enumerate(t):
            counts, group = row[:5], int(row[5])
            if (counts < 0).any() or (counts % 4 != 0).any():
                return f"head {head} has tier counts {counts.tolist()}, which are not multiples of 4"
            d = int(sizes[head])
            if d != sizes[0]:
                return f"head {head} has {d} channels and head 0 has {int(sizes[0])}"
            if not MIN_HEAD_SIZE <= d <= MAX_HEAD_SIZE or d % HEAD_SIZE_STEP:
                return f"head {head} has {d} channels; multiples of {HEAD_SIZE_STEP} from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE} are served"
            if group not in KEY_GROUPS:
                return f"head {head} has key groups of {group} tokens instead of 32, 64 or 128"
            bits, dims = int(v[head, 0]), int(v[head, 1])
            if bits not in VALUE_BITS or dims not in VALUE_GROUPS:
                return f"head {head} has {bits}-bit values in groups of {dims}; 2, 3, 4 or 8 bits and groups of 0, 32 or 64 are served"
        if q is not None:
            if q.shape != (t.shape[0], sizes[0]):
                return f"query_prior has the shape {list(q.shape)} instead of [{t.shape[0]}, {int(sizes[0])}]"
            if not np.isfinite(q).all() or (q < 0).any():
                return "query_prior holds negative or non-finite numbers"
        return None


@dataclass
class Profile:
    """A profile as in the file. `layers[i]` is None where layer i has no cache; window and sinks are None where not said."""

    fingerprint: str
    layers: list[LayerProfile | None]
    window: int | None = None
    sinks: int | None = None
    path: str = ""


def fingerprint(model_path: str | os.PathLike[str]) -> str:
    """32 hexadecimal digits that are the same for every weight quantisation of a model, and differ between models.

    Raises ModelFileError if the file is not a readable GGUF model.
    """
    return open_model(model_path).fingerprint


def write_profile(
    path: str | os.PathLike[str],
    layers: Sequence[LayerProfile | None],
    fingerprint: str,
    *,
    window: int | None = None,
    sinks: int | None = None,
) -> None:
    """Write a profile; the file appears whole or not at all.

    Raises ProfileError naming the layer if a format is not valid, OSError if the file cannot be written.
    """
    path = os.fspath(path)
    _check(path, layers, window, sinks)
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=".profile-", dir=folder)
    os.close(handle)
    try:
        writer = GGUFWriter(temporary, arch="mixkvq")
        writer.add_string("general.type", PROFILE_TYPE)
        writer.add_uint32("mixkvq.profile.version", PROFILE_VERSION)
        writer.add_string("mixkvq.profile.fingerprint", fingerprint)
        if window is not None:
            writer.add_int32("mixkvq.profile.window", window)
        if sinks is not None:
            writer.add_int32("mixkvq.profile.sinks", sinks)
        writer.add_uint32("mixkvq.profile.layer_count", len(layers))
        for i, layer in enumerate(layers):
            if layer is None:
                continue
            writer.add_tensor(f"blk.{i}.tiers", np.ascontiguousarray(layer.tiers, dtype=np.int32))
            writer.add_tensor(f"blk.{i}.values", np.ascontiguousarray(layer.values, dtype=np.int32))
            if layer.query_prior is not None:
                writer.add_tensor(f"blk.{i}.query_prior", np.ascontiguousarray(layer.query_prior, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes the file private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_profile(path: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Profile:
    """Read and check a profile; with `model`, also that it was made for that model file.

    Raises ProfileError with one sentence for a file that is not a profile, is damaged, is of a newer version, or is for another model.
    """
    path = os.fspath(path)
    header = _profile_header(path)
    v = header.values
    count = _integer(header, "mixkvq.profile.layer_count")
    if count is None or not 0 < count <= 4096:
        raise ProfileError(f"The profile {path} is damaged: its layer count is {count}.")
    layers: list[LayerProfile | None] = []
    with open(path, "rb") as f:
        raw = f.read()
    known = 0
    for i in range(count):
        names = [f"blk.{i}.tiers", f"blk.{i}.values", f"blk.{i}.query_prior"]
        known += sum(name in header.tensors for name in names)
        if names[0] not in header.tensors and names[1] not in header.tensors:
            layers.append(None)
            continue
        tiers = _tensor(header, raw, names[0], GGMLQuantizationType.I32, np.int32)
        values = _tensor(header, raw, names[1], GGMLQuantizationType.I32, np.int32)
        prior = None
        if names[2] in header.tensors:
            prior = _tensor(header, raw, names[2], GGMLQuantizationType.F32, np.float32)
        layers.append(LayerProfile(tiers, values, prior))
    if known != len(header.tensors):
        raise ProfileError(f"The profile {path} is damaged: it holds {len(header.tensors) - known} tensors that belong to no layer.")
    profile = Profile(
        fingerprint=str(v["mixkvq.profile.fingerprint"]),
        layers=layers,
        window=_integer(header, "mixkvq.profile.window"),
        sinks=_integer(header, "mixkvq.profile.sinks"),
        path=path,
    )
    _check(path, layers, profile.window, profile.sinks)
    if model is not None:
        _check_model(profile, model)
    return profile


def uniform_profile(model_path: str | os.PathLike[str], preset: str = "balanced", *, window: int | None = None, sinks: int | None = None) -> Profile:
    """A profile that gives every layer and head of a model the formats of one preset: the start of an allocation.

    Raises SettingsError for an unknown preset, ModelFileError for an unreadable model.
    """
    model = open_model(model_path)
    known = native().presets()
    if not any(preset in (p["name"], p["alias"]) for p in known):
        raise SettingsError(f"There is no preset {preset!r}; the presets are {', '.join(p['name'] for p in known)}.")
    layers: list[LayerProfile | None] = []
    for n, head_size in zip(model.n_head_kv, model.head_size_k):
        if not n:
            layers.append(None)
            continue
        keys, value = native().preset(preset, head_size)
        tiers = np.tile(np.array([*keys.tiers, keys.group], dtype=np.int32), (n, 1))
        values = np.tile(np.array([value.bits, value.group], dtype=np.int32), (n, 1))
        layers.append(LayerProfile(tiers, values))
    return Profile(model.fingerprint, layers, window, sinks)


def _profile_header(path: str) -> Header:
    try:
        header = read_header(path)
    except ModelFileError as e:
        raise ProfileError(f"The profile cannot be used: {e}") from None
    v = header.values
    if v.get("general.type") != PROFILE_TYPE:
        raise ProfileError(f"{path} is not a profile but a GGUF file of type {v.get('general.type', 'model')!r}.")
    version = _integer(header, "mixkvq.profile.version")
    if version is None or version < 1:
        raise ProfileError(f"The profile {path} is damaged: it does not say its version.")
    if version > PROFILE_VERSION:
        raise ProfileError(
            f"The profile {path} is of format version {version}, and this MixKVQ reads up to {PROFILE_VERSION}; install a newer MixKVQ."
        )
    mark = v.get("mixkvq.profile.fingerprint")
    if not isinstance(mark, str) or not mark:
        raise ProfileError(f"The profile {path} is damaged: it does not say which model it is for.")
    return header


def _integer(header: Header, key: str) -> int | None:
    value = header.values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _tensor(header: Header, raw: bytes, name: str, kind: int, dtype: Any) -> npt.NDArray[Any]:
    info = header.tensors.get(name)
    if info is None:
        raise ProfileError(f"The profile {header.path} is damaged: the tensor {name} is missing.")
    if info.type != kind or len(info.shape) > 2 or 0 in info.shape:
        raise ProfileError(f"The profile {header.path} is damaged: the tensor {name} has the wrong type or shape.")
    shape = tuple(reversed(info.shape))
    if len(shape) < 2:
        shape = (1,) * (2 - len(shape)) + shape
    return np.frombuffer(raw, dtype=dtype, count=int(np.prod(shape)), offset=info.offset).reshape(shape).copy()


def _check(path: str, layers: Sequence[LayerProfile | None], window: int | None, sinks: int | None) -> None:
    if not any(layer is not None for layer in layers):
        raise ProfileError(f"The profile {path} says nothing about any layer.")
    for i, layer in enumerate(layers):
        problem = layer.error() if layer is not None else None
        if problem:
            raise ProfileError(f"The profile {path} is not valid: in layer {i}, {problem}.")
    for name, n in (("window", window), ("sinks", sinks)):
        if n is not None and not 0 <= n < 1 << 24:
            raise ProfileError(f"The profile {path} is not valid: its {name} is {n} tokens.")


def _check_model(profile: Profile, model_path: str | os.PathLike[str]) -> None:
    model = open_model(model_path)
    if profile.fingerprint != model.fingerprint:
        raise ProfileError(
            f"The profile {profile.path} was made for another model than {os.fspath(model_path)} "
            f"(fingerprint {profile.fingerprint[:8]} instead of {model.fingerprint[:8]})."
        )
    if len(profile.layers) != model.n_layers:
        raise ProfileError(f"The profile {profile.path} has {len(profile.layers)} layers and {os.fspath(model_path)} has {model.n_layers}.")
    for i, layer in enumerate(profile.layers):
        if layer is None or not model.exact:
            continue
        if layer.tiers.shape[0] != model.n_head_kv[i] or layer.head_size != model.head_size_k[i]:
            raise ProfileError(
                f"The profile {profile.path} has {layer.tiers.shape[0]} heads of {layer.head_size} channels in layer {i}, "
                f"and {os.fspath(model_path)} has {model.n_head_kv[i]} of {model.head_size_k[i]}."
            )
