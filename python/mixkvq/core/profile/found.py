"""The profile that a model is used with: one that was given, one that lies with the model, or one that comes with MixKVQ."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

from ..errors import ModelFileError, ProfileError
from ..model_file import ModelFile, open_model
from ..settings import Kv
from .file import read_profile, side_car

_SIDE_CAR = side_car("")
_FOLDERS = (Path(__file__).parent / "known", Path(__file__).resolve().parents[4] / "models" / "profiles")  # installed; in the repository


def known_profile(model: ModelFile) -> str | None:
    """The path of the profile that comes with MixKVQ for this model in any quantisation, or None."""
    if not model.norm:
        return None
    for folder in _FOLDERS:
        for path in sorted(folder.glob(f"*.{known_name(model)}{_SIDE_CAR}")):
            return str(path)
    return None


def known_name(model: ModelFile) -> str:
    """What the name of a profile that comes with MixKVQ says of its model."""
    return f"{model.fingerprint[:8]}-{model.norm}"


def beside_others(model: ModelFile) -> str | None:
    """The profile that lies beside another quantisation of a model in the same folder, or None; of several the one that was written last."""
    found = []
    folder = Path(model.path).parent
    for path in folder.glob(f"*{_SIDE_CAR}") if model.norm else ():
        with contextlib.suppress(OSError, ModelFileError):
            other = open_model(folder / path.name.replace(_SIDE_CAR, ".gguf"))
            if (other.fingerprint, other.norm) == (model.fingerprint, model.norm):
                found.append((path.stat().st_mtime, str(path)))
    return max(found)[1] if found else None


def with_profile(kv: Kv, model: ModelFile) -> Kv:
    """`kv` with its profile checked. If it names neither preset nor profile, one that is found.

    That is the first of: beside the model, embedded in it, beside another quantisation of it in the same folder, among those that come with MixKVQ.
    Raises ProfileError unless the profile is of a version we read, whole, and made for this model.
    """
    beside = side_car(model.path)
    if kv.preset is None and kv.profile is None:
        if os.path.isfile(beside):
            kv = replace(kv, profile=beside, found="beside the model")
        elif model.has_profile:
            kv = replace(kv, profile=model.path, found="in the model")
        elif (other := beside_others(model)) is not None:
            kv = replace(kv, profile=other, found="beside another quantisation of the model")
        elif (known := known_profile(model)) is not None:
            kv = replace(kv, profile=known, found="among those that come with MixKVQ")
    if kv.profile is None:
        return kv
    try:
        read_profile(kv.profile, model.path)
    except ProfileError as e:
        if kv.found is None:
            raise
        remedy = "take it out (python -m mixkvq.convert remove)" if kv.found == "in the model" else "delete it"
        raise ProfileError(f"{str(e).rstrip('.')}; it was found {kv.found}: {remedy}, or ask for a preset: kv='balanced'.") from None
    return kv
