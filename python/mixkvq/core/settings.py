"""What a cache should be: presets, profiles and llama.cpp's own types, checked before anything is loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Union

from .errors import ProfileError, SettingsError
from .native import native

DEFAULT_PRESET = "balanced"

# llama.cpp's cache types: name -> (ggml type number, bits per element)
STOCK_TYPES: dict[str, tuple[int, float]] = {
    "f32": (0, 32.0),
    "f16": (1, 16.0),
    "bf16": (30, 16.0),
    "q8_0": (8, 8.5),
    "q5_1": (7, 6.0),
    "q5_0": (6, 5.5),
    "q4_1": (3, 5.0),
    "q4_0": (2, 4.5),
    "iq4_nl": (20, 4.5),
}


@dataclass(frozen=True)
class Kv:
    """Settings of a MixKVQ cache. With neither preset nor profile: a profile that lies with the model, else `balanced`.

    preset: name or alias (`python -m bridge.run --list-presets`).
    profile: path of a profile of the model, or of a model in which one is embedded; takes the place of the preset.
    window: recent tokens kept in F16; None: 128, or what the profile says.
    sinks: first tokens kept in F16, rounded up to pages of 128; None: 128, or what the profile says.
    """

    preset: str | None = None
    profile: str | None = None
    window: int | None = None
    sinks: int | None = None
    found: str | None = field(default=None, compare=False)  # where a profile that nobody asked for lies; set by with_profile

    def describe(self) -> str:
        """The preset's name, or the profile's file name."""
        return os.path.basename(self.profile) if self.profile else self.preset or DEFAULT_PRESET


KvLike = Union[str, "os.PathLike[str]", Mapping[str, Any], Kv, None]


def preset_names() -> list[str]:
    """All presets as "name" or "name (alias)", smallest first."""
    return [f"{p['name']} ({p['alias']})" if p["alias"] else p["name"] for p in native().presets()]


def resolve_kv(kv: KvLike) -> Kv:
    """Turn what a user gave as `kv` into checked settings.

    A string is a preset's name or alias, or the path of a profile; a mapping has the fields of `Kv`; None asks for nothing.
    Raises SettingsError for an unknown preset or field, ProfileError for a profile that does not exist.
    """
    if kv is None:
        kv = Kv()
    elif isinstance(kv, Mapping):
        fields = ("preset", "profile", "window", "sinks")
        for name in kv:
            if name not in fields:
                nearest = difflib.get_close_matches(str(name), fields, n=1)
                hint = f"the nearest is {nearest[0]!r}" if nearest else "its fields are preset, profile, window and sinks"
                raise SettingsError(f"kv has no field {name!r}; {hint}.")
        kv = Kv(**kv)
    elif isinstance(kv, (str, os.PathLike)):
        kv = _from_text(os.fspath(kv))
    elif not isinstance(kv, Kv):
        raise SettingsError(f"kv is a {type(kv).__name__}; give a preset, the path of a profile, a mapping or a bridge.Kv.")

    for name, value, most in (("window", kv.window, 1 << 20), ("sinks", kv.sinks, 1 << 20)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most):
            raise SettingsError(f"{name} is {value!r}; it must be a number of tokens from 0 to {most}.")
    if kv.profile is not None:
        if kv.preset is not None:
            raise SettingsError("A profile takes the place of a preset; give one of the two.")
        kv = replace(kv, profile=os.fspath(kv.profile))
        if not os.path.isfile(kv.profile or ""):
            why = "is no file" if os.path.exists(kv.profile or "") else "does not exist"
            raise ProfileError(f"The profile {kv.profile} {why}.")
    elif kv.preset is not None:
        _check_preset(kv.preset)
    return kv


def _from_text(text: str) -> Kv:
    looks_like_path = text.endswith(".gguf") or os.sep in text or os.path.isfile(text)
    return Kv(profile=text) if looks_like_path else Kv(preset=text)


def _check_preset(name: str) -> None:
    if any(name and name in (p["name"], p["alias"]) for p in native().presets()):
        return
    known = ", ".join(preset_names())
    if name in STOCK_TYPES:
        raise SettingsError(f"{name} is a cache type of llama.cpp, not a preset: use stock={name!r}, or one of the presets {known}.")
    raise SettingsError(f"There is no preset {name!r}; the presets are {known}.")


def stock_type(name: str) -> int:
    """The ggml type number of one of llama.cpp's cache types. Raises SettingsError if there is no such type."""
    if name not in STOCK_TYPES:
        raise SettingsError(f"llama.cpp has no cache type {name!r}; its types are {', '.join(STOCK_TYPES)}.")
    return STOCK_TYPES[name][0]


def least_bits(kv: Kv | None, stock: str | None) -> float:
    """A lower bound of the bits per element, to refuse what cannot fit without a look at it."""
    if stock is not None:
        return STOCK_TYPES[stock][1]
    if kv is None or kv.profile is not None:
        return 2.0
    name = kv.preset or DEFAULT_PRESET
    of_128 = next((float(p["body_bits"]) for p in native().presets() if name in (p["name"], p["alias"])), 2.0)
    return 0.98 * of_128  # a head of 256 has half as many scales
