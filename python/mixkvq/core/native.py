"""The compiled module, imported when it is asked for."""

from __future__ import annotations

from importlib import util
from types import ModuleType

from .errors import VersionError

REPAIR = "install it with `pip install .` in the repository (or `make run`)"


def native() -> ModuleType:
    """The compiled module `mixkvq.core._native`: presets, pages, kernels, divergences, and the handle of the backend.

    Raises VersionError if it was not built or does not load.
    """
    try:
        from . import _native
    except ImportError as e:
        if util.find_spec("mixkvq.core._native") is None:
            raise VersionError(f"The native part of MixKVQ is not built: {REPAIR}.") from None
        raise VersionError(f"The native part of MixKVQ does not load ({e}): {REPAIR}.") from None
    return _native
