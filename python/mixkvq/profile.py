"""Profiles of models: see `mixkvq.core.profile`."""

from __future__ import annotations

from .core.profile import (
    PREFIX,
    PROFILE_VERSION,
    LayerProfile,
    Profile,
    ProfileError,
    check_model,
    fingerprint,
    from_json,
    load_profile,
    read_json,
    read_profile,
    side_car,
    to_json,
    uniform_profile,
    with_profile,
    write_keys,
    write_profile,
)

__all__ = [
    "PREFIX",
    "PROFILE_VERSION",
    "LayerProfile",
    "Profile",
    "ProfileError",
    "check_model",
    "fingerprint",
    "from_json",
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
