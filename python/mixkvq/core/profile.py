"""Profiles: which precision each layer and head of one model gets, and what calibration measured. docs/format.md has the keys and tensors.

A profile is a GGUF file beside its model (a side-car), is embedded in the model as key-value pairs (`mixkvq.convert`), or is JSON:

    profile = read_profile("model.mixkvq.gguf", "model.gguf")
    profile.layers[3].tiers[0]          # the tiers of layer 3, head 0
    write_profile("other.mixkvq.gguf", profile)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from bridge.errors import GeometryError, ModelFileError, ProfileError, SettingsError
from bridge.library import native
from bridge.model_file import HEAD_SIZE_STEP, MAX_HEAD_SIZE, MIN_HEAD_SIZE, Header, ModelFile, open_model, read_header, served
from bridge.settings import check_geometry, side_car

from .outputs import check_output, writing
from .reference import PAGE_CELLS, KeyFormat, ValueFormat

__all__ = [
    "LayerProfile",
    "PROFILE_VERSION",
    "Profile",
    "ProfileError",
    "fingerprint",
    "from_json",
    "read_profile",
    "side_car",
    "to_json",
    "uniform_profile",
    "write_profile",
]

PROFILE_TYPE = "mixkvq-profile"
PROFILE_VERSION = 2
PREFIX = "mixkvq.profile."
KEY_GROUPS = (32, 64, 128)
VALUE_BITS = (2, 3, 4, 8)
VALUE_GROUPS = (0, 32, 64)
MAX_LAYERS = 4096
MAX_TOKENS = 1 << 20
LARGEST = 1e30  # of query_prior and key_range; the backend has the same limit


@dataclass
class LayerProfile:
    """The formats of one layer.

    tiers: int32 [n_head_kv, 6], columns (n16, n8, n4, n3, n2, group); the five counts are multiples of 4 and sum to the head size.
    values: int32 [n_head_kv, 2], columns (bits, group).
    query_prior: float32 [n_head_kv, head size], mean |q| per channel: I_d of the paper (section 3.2) before the first query. Or None.
    key_range: float32 [n_head_kv, head size], mean over pages of max - min of each key channel, or None.
    """

    tiers: npt.NDArray[np.int32]
    values: npt.NDArray[np.int32]
    query_prior: npt.NDArray[np.float32] | None = None
    key_range: npt.NDArray[np.float32] | None = None

    @property
    def n_heads(self) -> int:
        return int(self.tiers.shape[0])

    @property
    def head_size(self) -> int:
        """Channels of a key head."""
        return int(self.tiers[0, :5].sum())

    def packed_bytes(self, head_size_v: int | None = None) -> tuple[int, int]:
        """Bytes of a packed page of this layer: keys, values. head_size_v: of a value head; None: that of a key head."""
        d, dv = self.head_size, self.head_size if head_size_v is None else head_size_v
        keys = sum(KeyFormat(d, tuple(row[:5]), row[5]).record_bytes for row in self.tiers.tolist())
        return keys, sum(ValueFormat(dv, bits, group).record_bytes for bits, group in self.values.tolist())

    def error(self) -> str | None:
        """What is wrong with these formats, or None."""
        t, v = self.tiers, self.values
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
            if not served(d):
                return f"head {head} has {d} channels; multiples of {HEAD_SIZE_STEP} from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE} are served"
            if group not in KEY_GROUPS:
                return f"head {head} has key groups of {group} tokens instead of 32, 64 or 128"
            bits, dims = int(v[head, 0]), int(v[head, 1])
            if bits not in VALUE_BITS or dims not in VALUE_GROUPS:
                return f"head {head} has {bits}-bit values in groups of {dims}; 2, 3, 4 or 8 bits and groups of 0, 32 or 64 are served"
        for name, array in (("query_prior", self.query_prior), ("key_range", self.key_range)):
            if array is None:
                continue
            if array.shape != (t.shape[0], sizes[0]):
                return f"{name} has the shape {list(array.shape)} instead of [{t.shape[0]}, {int(sizes[0])}]"
            if not (np.isfinite(array).all() and (array >= 0).all() and (array < LARGEST).all()):
                return f"{name} holds numbers that are negative, infinite or not numbers"
        return None


@dataclass
class Profile:
    """A profile as in the file.

    fingerprint: of the model (`fingerprint`), 32 hexadecimal digits.
    layers: None where a layer has no cache, or one that stays F16 (its head size cannot be packed, or this profile wants it so).
    window, sinks: tokens kept in F16, the most recent and the first; None: the default.
    path: the file it was read from. embedded: that file is a model. version: of the format in that file.
    measured: what calibration measured; each entry has text, tokens, style, kld_mean, kld_median, kld_p999, perplexity_ratio, same_top and against,
        as far as they are known.
    made_by: program and version that made it, or "".
    body_bits: bits per element of packed pages of the model, or None.
    """

    fingerprint: str
    layers: list[LayerProfile | None]
    window: int | None = None
    sinks: int | None = None
    path: str = ""
    measured: list[dict[str, Any]] = field(default_factory=list)
    made_by: str = ""
    body_bits: float | None = None
    embedded: bool = False
    version: int = PROFILE_VERSION

    def packed_bits(self, head_sizes_v: Sequence[int] | None = None) -> float:
        """Bits per element of packed pages, all layers together. head_sizes_v: value head size per layer; None: as the keys'."""
        n_bits = elements = 0
        for i, layer in enumerate(self.layers):
            if layer is not None:
                size_v = layer.head_size if head_sizes_v is None else head_sizes_v[i]
                n_bits += 8 * sum(layer.packed_bytes(size_v))
                elements += PAGE_CELLS * layer.n_heads * (layer.head_size + size_v)
        return n_bits / elements

    def error(self) -> str | None:
        """What is wrong with this profile, as "is not valid: ..." without a full stop, or None."""
        if not re.fullmatch("[0-9a-f]{32}", self.fingerprint):
            return "does not say which model it is for"
        if not any(layer is not None for layer in self.layers):
            return "says nothing about any layer"
        if len(self.layers) > MAX_LAYERS:
            return f"is not valid: it has {len(self.layers)} layers"
        for i, layer in enumerate(self.layers):
            problem = layer.error() if layer is not None else None
            if problem:
                return f"is not valid: in layer {i}, {problem}"
        for name, n in (("window", self.window), ("sinks", self.sinks)):
            if n is not None and not 0 <= n <= MAX_TOKENS:
                return f"is not valid: its {name} is {n} tokens"
        if self.body_bits is not None and not 0 < self.body_bits <= 32:
            return f"is not valid: its body bits are {self.body_bits}"
        if not self.made_by.isprintable():
            return "is not valid: made_by is not one line of text"
        problem = _measured_error(self.measured)
        return f"is not valid: {problem}" if problem else None


def _measured_error(measured: Any) -> str | None:
    if not isinstance(measured, list) or not all(isinstance(entry, dict) for entry in measured):
        return "what was measured is not a list of objects"
    for entry in measured:
        for name, value in entry.items():
            if name in ("text", "style", "against"):
                good = isinstance(value, str)
            elif name == "tokens" or name.startswith("kld_") or name in ("perplexity_ratio", "same_top"):
                good = isinstance(value, (int, float)) and not isinstance(value, bool)
            else:
                good = value is None or isinstance(value, (str, int, float))
            if isinstance(value, str):
                good = good and value.isprintable()
            elif isinstance(value, (int, float)):
                good = good and abs(value) <= 1e300
            if not (good and name.isprintable()):
                return f"{name!r} in what was measured is {str(value)[:40]!r}"
    return None


def fingerprint(model_path: str | os.PathLike[str]) -> str:
    """32 hexadecimal digits that are the same for every weight quantisation of a model, and differ between models.

    Raises ModelFileError if the file is not a readable GGUF model.
    """
    return open_model(model_path).fingerprint


def write_profile(path: str | os.PathLike[str], profile: Profile, *, overwrite: bool = True) -> None:
    """Write a profile as a side-car, in the newest version of the format; the file appears whole or not at all.

    overwrite: whether a profile that is there is replaced.
    Raises ProfileError naming the layer if a format is not valid, SettingsError if what is there is no profile and would be lost, OSError if the file
    cannot be written, FileExistsError if it must not be replaced.
    """
    check(profile, os.fspath(path))
    check_output(path, "profile", force=True)
    with writing(path, overwrite=overwrite) as temporary:
        writer = GGUFWriter(temporary, arch="mixkvq")
        writer.add_string("general.type", PROFILE_TYPE)
        _add_keys(writer, profile)
        for name, array in _arrays(profile):
            writer.add_tensor(name, array)
        _finish(writer)


def write_keys(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a GGUF file without tensors that holds a profile as a model does that has it embedded: all in keys."""
    check(profile, os.fspath(path))
    writer = GGUFWriter(path, arch="mixkvq")
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
    writer.close()


# Name, type of a tensor, element type of an array in a model's keys, NumPy type; in the order of LayerProfile's fields.
_ARRAYS: tuple[tuple[str, int, int, Any], ...] = (
    ("tiers", GGMLQuantizationType.I32, GGUFValueType.INT32, np.int32),
    ("values", GGMLQuantizationType.I32, GGUFValueType.INT32, np.int32),
    ("query_prior", GGMLQuantizationType.F32, GGUFValueType.FLOAT32, np.float32),
    ("key_range", GGMLQuantizationType.F32, GGUFValueType.FLOAT32, np.float32),
)


def _arrays(profile: Profile) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for i, layer in enumerate(profile.layers):
        if layer is None:
            continue
        for name, _, _, dtype in _ARRAYS:
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

    def layer(self, file: Any, i: int) -> LayerProfile | None:
        tiers = self.array(file, f"blk.{i}.tiers", 0, 6)
        values = self.array(file, f"blk.{i}.values", 1, 2)
        if tiers is None and values is None:
            return None
        if tiers is None or values is None:
            raise self.damaged(f"blk.{i}.{'tiers' if tiers is None else 'values'} is missing")
        size = int(tiers[0, :5].sum())
        return LayerProfile(tiers, values, self.array(file, f"blk.{i}.query_prior", 2, size), self.array(file, f"blk.{i}.key_range", 3, size))

    def array(self, file: Any, name: str, which: int, columns: int) -> npt.NDArray[Any] | None:
        """Any number of rows, at least one, of so many columns; None if it is not there."""
        _, tensor_type, element_type, dtype = _ARRAYS[which]
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


def check(profile: Profile, path: str) -> None:
    """Raises ProfileError, calling the profile `path`, unless it is valid."""
    problem = profile.error()
    if problem:
        raise ProfileError(f"{_called(path)} {problem}.")


def _called(path: str) -> str:
    return f"The profile {path}" if path else "The profile"


def check_model(profile: Profile, model_path: str | os.PathLike[str]) -> ModelFile:
    """The model, if the profile was made for it. Raises ProfileError or ModelFileError."""
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
        if layer.n_heads != model.n_head_kv[i] or layer.head_size != model.head_size_k[i]:
            raise ProfileError(
                f"The profile {profile.path} has {layer.n_heads} heads of {layer.head_size} channels in layer {i}, "
                f"and {os.fspath(model_path)} has {model.n_head_kv[i]} of {model.head_size_k[i]}."
            )
    return model


def uniform_profile(
    model: str | os.PathLike[str] | ModelFile, preset: str = "balanced", *, window: int | None = None, sinks: int | None = None
) -> Profile:
    """A profile that gives every layer and head of a model the formats of one preset: the start of an allocation.

    model: its path, or what was read of it. Raises SettingsError for an unknown preset, ModelFileError for an unreadable model, GeometryError for a
    model that no profile can describe.
    """
    model = model if isinstance(model, ModelFile) else open_model(model)
    known = native().presets()
    if not any(preset in (p["name"], p["alias"]) for p in known):
        raise SettingsError(f"There is no preset {preset!r}; the presets are {', '.join(p['name'] for p in known)}.")
    check_geometry(model)
    if model.windowed_sizes is not None:
        raise GeometryError(f"No profile can describe {model.name} ({model.architecture}): its file does not say the head sizes of each layer.")
    layers: list[LayerProfile | None] = []
    for n, size_k, size_v in zip(model.n_head_kv, model.head_size_k, model.head_size_v):
        if not n or not (served(size_k) and served(size_v)):
            layers.append(None)
            continue
        keys, value = native().preset(preset, size_k)
        tiers = np.tile(np.array([*keys.tiers, keys.group], dtype=np.int32), (n, 1))
        values = np.tile(np.array([value.bits, value.group], dtype=np.int32), (n, 1))
        layers.append(LayerProfile(tiers, values))
    return Profile(model.fingerprint, layers, window, sinks)


# ---- JSON ----------------------------------------------------------------------------------------------------------------------------


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
    for name, _, _, dtype in _ARRAYS:
        array = getattr(layer, name)
        if array is not None:
            # str() of a float32 is the shortest text that reads back as the same float32
            rows = [[float(str(x)) if dtype is np.float32 else int(x) for x in row] for row in np.asarray(array, dtype)]
            parts.append(f'"{name}": [' + ",\n    ".join(json.dumps(row) for row in rows) + "]")
    return "{" + ",\n   ".join(parts) + "}"


def from_json(text: str, path: str = "") -> Profile:
    """A profile from the text that `to_json` writes; `path` is what an error calls it. Raises ProfileError."""

    def refused(why: str) -> ProfileError:
        return ProfileError(f"{_called(path)} {why}.")

    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise refused(f"is not JSON: {e.msg} in line {e.lineno}, column {e.colno}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        raise refused("is not JSON of a profile") from None
    if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
        raise refused("is not JSON of a profile: it has no list of layers")
    version: Any = data.get("version")
    if type(version) is int and version > PROFILE_VERSION:
        raise refused(f"is of format version {version}, and this MixKVQ reads up to {PROFILE_VERSION}; install a newer MixKVQ")
    kinds: dict[str, tuple[type, ...]] = {
        "version": (int,),
        "fingerprint": (str,),
        "window": (int, type(None)),
        "sinks": (int, type(None)),
        "made_by": (str,),
        "body_bits": (int, float, type(None)),
        "measured": (list,),
        "layers": (list,),
    }
    for name in ("version", "fingerprint"):
        if name not in data:
            raise refused(f"is not valid: {name} is missing")
    for name, value in data.items():
        if name not in kinds:
            raise refused(f"is not valid: it has an unknown field {name[:40]!r}")
        if type(value) not in kinds[name]:
            raise refused(f"is not valid: {json.dumps(value)[:40]} is no value for {name}")
    if version < 1:
        raise refused(f"is not valid: version is {version}")

    def array(entry: dict[str, Any], name: str, dtype: Any, i: int) -> npt.NDArray[Any] | None:
        rows = entry.get(name)
        if rows is None and dtype is np.float32:
            return None
        largest, types = (2**31 - 1, (int,)) if dtype is np.int32 else (LARGEST, (int, float))
        if not (isinstance(rows, list) and rows and all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows)):
            raise refused(f"is not valid: {name} of layer {i} is not a list of rows of one length")
        if not all(type(x) in types and abs(x) <= largest for row in rows for x in row):
            raise refused(f"is not valid: {name} of layer {i} holds something else than {'whole ' if dtype is np.int32 else ''}numbers in range")
        return np.array(rows, dtype)

    layers: list[LayerProfile | None] = []
    for i, entry in enumerate(data["layers"]):
        if entry is None:
            layers.append(None)
            continue
        if not isinstance(entry, dict) or not set(entry) <= {name for name, *_ in _ARRAYS}:
            raise refused(f"is not valid: layer {i} is not an object with {', '.join(name for name, *_ in _ARRAYS)}")
        layers.append(LayerProfile(*(array(entry, name, dtype, i) for name, _, _, dtype in _ARRAYS)))  # type: ignore[arg-type]
    bits = data.get("body_bits")
    if bits is not None and not 0 < bits <= 32:  # before it becomes a float32
        raise refused("is not valid: body_bits is out of range")
    profile = Profile(
        fingerprint=data["fingerprint"],
        layers=layers,
        window=data.get("window"),
        sinks=data.get("sinks"),
        path=path,
        measured=data.get("measured", []),
        made_by=data.get("made_by", ""),
        body_bits=bits if bits is None else float(np.float32(bits)),
        version=version,
    )
    problem = profile.error()
    if problem:
        raise refused(problem)
    return profile
