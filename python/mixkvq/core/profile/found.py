"""The profile that a model is used with: one that was given, or one that lies with the model."""

from __future__ import annotations

import os
from dataclasses import replace

from ..errors import ProfileError
from ..model_file import ModelFile
from ..settings import Kv
from .file import read_profile, side_car


def with_profile(kv: Kv, model: ModelFile) -> Kv:
    """`kv` with its profile checked. If it names neither preset nor profile, one that lies with the model: beside it, or embedded in it.

    Raises ProfileError unless the profile is of a version we read, whole, and made for this model.
    """
    beside = side_car(model.path)
    if kv.preset is None and kv.profile is None and os.path.isfile(beside):
        kv = replace(kv, profile=beside, found="beside the model")
    elif kv.preset is None and kv.profile is None and model.has_profile:
        kv = replace(kv, profile=model.path, found="in the model")
    if kv.profile is None:
        return kv
    try:
        read_profile(kv.profile, model.path)
    except ProfileError as e:
        if kv.found is None:
            raise
        remedy = "delete it" if kv.found == "beside the model" else "take it out (python -m mixkvq.convert remove)"
        raise ProfileError(f"{str(e).rstrip('.')}; it was found {kv.found}: {remedy}, or ask for a preset: kv='balanced'.") from None
    return kv
