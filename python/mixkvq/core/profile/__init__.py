"""Profiles: which precision each layer and head of one model gets, and what calibration measured. docs/format.md has the keys and tensors.

A profile is a GGUF file beside its model (a side-car), is embedded in the model as key-value pairs (`mixkvq.convert`), or is JSON:

    profile = read_profile("model.mixkvq.gguf", "model.gguf")
    profile.layers[3].tiers[0]          # the tiers of layer 3, head 0
    write_profile("other.mixkvq.gguf", profile)
"""

from __future__ import annotations

from ..errors import ProfileError
from .data import PREFIX, PROFILE_VERSION, LayerProfile, Profile
from .file import read_profile, side_car, write_keys, write_profile
from .found import known_name, known_profile, with_profile
from .model import check_model, fingerprint, uniform_profile
from .text import from_json, load_profile, read_json, to_json

__all__ = [
    "PREFIX",
    "PROFILE_VERSION",
    "LayerProfile",
    "Profile",
    "ProfileError",
    "check_model",
    "fingerprint",
    "from_json",
    "known_name",
    "known_profile",
    "load_profile",
    "read_json",
    "read_profile",
    "side_car",
    "to_json",
    "uniform_profile",
    "with_profile",
    "write_keys",
    "write_profile",
]
