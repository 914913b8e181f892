"""Profiles as GGUF files: a side-car, or the keys of a model that has one embedded."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType, GGUFWriter

from ..errors import ModelFileError, ProfileError
from ..gguf_header import Header
from ..model_file import read_header
from ..outputs import check_output, writing
from .data import ARRAYS, MAX_LAYERS, PREFIX, PROFILE_TYPE, PROFILE_VERSION, LayerProfile, Profile, check
from .model import check_model


def side_car(model_path: str | os.PathLike[str]) -> str:
    """The path where the profile of a model is looked for first: `model.mixkvq.gguf` beside `model.gguf`."""
    return os.fspath(model_path).removesuffix(".gguf") + ".mixkvq.gguf"


def write_profile(path: str | os.PathLike[str], profile: Profile, *, overwrite: bool = True) -> None:
    """Write a profile as a side-car, in the newest version of the format; the file appears whole or not at all.

    overwrite: whether a profile that is there is replaced.
    Raises ProfileError naming the layer if a format is not valid, SettingsError if what is there is no profile and would be lost, OSError if the file
    cannot be written, FileExistsError if it must not be replaced.
    """
    check(profile, os.fspath(path))
    check_output(path, "profile", force=True)
    with writing(path, overwrite=overwrite) as temporary, contextlib.closing(GGUFWriter(temporary, arch="mixkvq")) as writer:
        writer.add_string("general.type", PROFILE_TYPE)
        _add_keys(writer, profile)
        for name, array in _arrays(profile):
            writer.add_tensor(name, array)
        _finish(writer)


def write_keys(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a GGUF file without tensors that holds a profile as a model does that has it embedded: all in keys."""
    check(profile, os.fspath(path))
    with contextlib.closing(GGUFWriter(path, arch="mixkvq")) as writer:
        _add_keys(writer, profile)
        for name, array in _arrays(profile):
            writer.add_array(PREFIX + name, array.ravel().tolist())
        _finish(writer)


def _add_keys(writer: GGUFWriter, profile: Profile) -> None:
    writer.add_uint32(PREFIX + "version", PROFILE_VERSION)
    writer.add_string(PREFIX + "fingerprint", profile.fingerprint)
    if profile.window is not None:
        writer.add_int32(PREFIX + "window", profile.window)
    if profile.sinks is not None:
        writer.add_int32(PREFIX + "sinks", profile.sinks)
    if profile.made_by:
        writer.add_string(PREFIX + "made_by", profile.made_by)
    if profile.body_bits is not None:
        writer.add_float32(PREFIX + "body_bits", profile.body_bits)
    if profile.measured:
        writer.add_string(PREFIX + "measured", json.dumps(profile.measured, ensure_ascii=False, allow_nan=False))
    writer.add_uint32(PREFIX + "layer_count", len(profile.layers))


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def _arrays(profile: Profile) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for i, layer in enumerate(profile.layers):
        if layer is None:
            continue
        for name, _, _, dtype in ARRAYS:
            array = getattr(layer, name)
            if array is not None:
                yield f"blk.{i}.{name}", np.ascontiguousarray(array, dtype=dtype)


def read_profile(path: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> Profile:
    """Read and check a profile of any version: a side-car, or a model with one embedded. With `model`, also that it was made for that model file.

    Raises ProfileError with one sentence for a file that is not a profile, is damaged, is of a newer version, or is for another model.
    """
    path = os.fspath(path)
    try:
        header = read_header(path)
    except ModelFileError as e:
        raise ProfileError(f"The profile cannot be used: {e}") from None
    profile = _Reader(header).profile()
    check(profile, path)
    if model is not None:
        check_model(profile, model)
    return profile


class _Reader:
    """The keys and arrays of a profile, with their types."""

    def __init__(self, header: Header) -> None:
        self.header = header
        kind = header.values.get("general.type", "model")
        self.embedded = kind != PROFILE_TYPE
        if self.embedded and PREFIX + "version" not in header.values:
            without = ", with none embedded" if kind == "model" else ""
            raise ProfileError(f"{header.path} is not a profile but a GGUF file of type {kind!r}{without}.")

    def damaged(self, why: str) -> ProfileError:
        return ProfileError(f"The profile {self.header.path} is damaged: {why}.")

    def key(self, name: str, kind: GGUFValueType) -> Any:
        value = self.header.values.get(PREFIX + name)
        if value is not None and self.header.types[PREFIX + name] != (kind,):
            raise self.damaged(f"the key {PREFIX}{name} has the wrong type")
        return value

    def profile(self) -> Profile:
        path = self.header.path
        version = self.key("version", GGUFValueType.UINT32)
        if not version:
            raise self.damaged("it does not say its version")
        if version > PROFILE_VERSION:
            raise ProfileError(
                f"The profile {path} is of format version {version}, and this MixKVQ reads up to {PROFILE_VERSION}; install a newer MixKVQ."
            )
        count = self.key("layer_count", GGUFValueType.UINT32)
        if count is None or not 0 < count <= MAX_LAYERS:
            raise self.damaged(f"its layer count is {count}")
        try:
            measured = json.loads(self.key("measured", GGUFValueType.STRING) or "[]")
        except (ValueError, RecursionError):
            raise self.damaged("what was measured is not JSON") from None
        bits = self.key("body_bits", GGUFValueType.FLOAT32)
        with open(path, "rb") as file:
            layers = [self.layer(file, i) for i in range(count)]
        known = sum(name is not None for layer in layers if layer is not None for name in vars(layer).values())
        there = self.header.tensors if not self.embedded else [k for k in self.header.values if k.startswith(PREFIX + "blk.")]
        if known != len(there):
            raise self.damaged(f"it holds {len(there) - known} {'keys' if self.embedded else 'tensors'} that belong to no layer")
        return Profile(
            fingerprint=self.key("fingerprint", GGUFValueType.STRING) or "",
            layers=layers,
            window=self.key("window", GGUFValueType.INT32),
            sinks=self.key("sinks", GGUFValueType.INT32),
            path=path,
            measured=measured,
            made_by=self.key("made_by", GGUFValueType.STRING) or "",
            body_bits=bits,
            embedded=self.embedded,
            version=version,
        )

    def layer(self, file: BinaryIO, i: int) -> LayerProfile | None:
        tiers = self.array(file, f"blk.{i}.tiers", 0, 6)
        values = self.array(file, f"blk.{i}.values", 1, 2)
        if tiers is None and values is None:
            return None
        if tiers is None or values is None:
            raise self.damaged(f"blk.{i}.{'tiers' if tiers is None else 'values'} is missing")
        size = int(tiers[0, :5].sum())
        return LayerProfile(tiers, values, self.array(file, f"blk.{i}.query_prior", 2, size), self.array(file, f"blk.{i}.key_range", 3, size))

    def array(self, file: BinaryIO, name: str, which: int, columns: int) -> npt.NDArray[Any] | None:
        """Any number of rows, at least one, of so many columns; None if it is not there."""
        _, tensor_type, element_type, dtype = ARRAYS[which]
        info = self.header.tensors.get(name) if not self.embedded else None
        if info is not None:
            shape = (*info.shape, 1)[:2]
            if info.type != tensor_type or len(info.shape) > 2 or shape[0] != columns or shape[1] < 1:
                raise self.damaged(f"the tensor {name} has the wrong type or shape")
            file.seek(info.offset)
            flat = np.frombuffer(file.read(4 * columns * shape[1]), dtype).copy()
        elif self.embedded and PREFIX + name in self.header.values:
            if self.header.types[PREFIX + name] != (GGUFValueType.ARRAY, element_type):
                raise self.damaged(f"the key {PREFIX}{name} has the wrong type")
            flat = np.array(self.header.values[PREFIX + name], dtype)
        else:
            return None
        if columns < 1 or not flat.size or flat.size % columns:
            raise self.damaged(f"{name} holds {flat.size} numbers")
        return flat.reshape(-1, columns)
