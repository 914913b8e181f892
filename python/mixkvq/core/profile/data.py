"""What a profile says, and what makes one invalid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from ..errors import ProfileError
from ..model_file import HEAD_SIZE_STEP, MAX_HEAD_SIZE, MIN_HEAD_SIZE, served
from ..reference import PAGE_CELLS, KeyFormat, ValueFormat

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
        """Key/value heads."""
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


def check(profile: Profile, path: str) -> None:
    """Raises ProfileError, calling the profile `path`, unless it is valid."""
    problem = profile.error()
    if problem:
        raise ProfileError(f"{called(path)} {problem}.")


def called(path: str) -> str:
    """How a sentence begins that is about the profile at `path`."""
    return f"The profile {path}" if path else "The profile"


# Name, type of a tensor, element type of an array in a model's keys, NumPy type; in the order of LayerProfile's fields.
ARRAYS: tuple[tuple[str, int, int, Any], ...] = (
    ("tiers", GGMLQuantizationType.I32, GGUFValueType.INT32, np.int32),
    ("values", GGMLQuantizationType.I32, GGUFValueType.INT32, np.int32),
    ("query_prior", GGMLQuantizationType.F32, GGUFValueType.FLOAT32, np.float32),
    ("key_range", GGMLQuantizationType.F32, GGUFValueType.FLOAT32, np.float32),
)
