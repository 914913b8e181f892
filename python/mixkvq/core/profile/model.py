"""Which model a profile is for, and the profile that a model starts from."""

from __future__ import annotations

import os

import numpy as np

from ..errors import GeometryError, ProfileError, SettingsError
from ..model_file import ModelFile, check_geometry, open_model, served
from ..native import native
from .data import LayerProfile, Profile


def fingerprint(model_path: str | os.PathLike[str]) -> str:
    """32 hexadecimal digits that are the same for every weight quantisation of a model, and differ between models.

    Raises ModelFileError if the file is not a readable GGUF model.
    """
    return open_model(model_path).fingerprint


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
