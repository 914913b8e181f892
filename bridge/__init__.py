"""MixKVQ inside llama-cpp-python: a key/value cache of about three bits per element.

    from bridge import Llama

    llama = Llama("model.gguf", n_ctx=32768, kv="balanced")

`Llama` is `llama_cpp.Llama` with two more arguments, `attach` serves programs that build `llama_cpp.Llama` themselves, and
`python -m bridge.run` is the command line. llama_cpp is imported when one of the first two is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    BridgeError,
    CacheNotUsedError,
    ContextError,
    ContextTooLargeError,
    GeometryError,
    ModelFileError,
    ProfileError,
    SettingsError,
    StateError,
    VersionError,
)
from .library import llama
from .page import Page
from .settings import Kv

if TYPE_CHECKING:
    from ._llama import Attachment, Llama, attach
    from .state_caches import DiskCache, RamCache

__all__ = [
    "Attachment",
    "BridgeError",
    "CacheNotUsedError",
    "ContextError",
    "ContextTooLargeError",
    "DiskCache",
    "GeometryError",
    "Kv",
    "Llama",
    "ModelFileError",
    "Page",
    "ProfileError",
    "RamCache",
    "SettingsError",
    "StateError",
    "VersionError",
    "attach",
]


def __getattr__(name: str) -> Any:
    if name in ("Attachment", "Llama", "attach"):
        return getattr(llama(), name)
    if name in ("DiskCache", "RamCache"):
        llama()  # says what is missing
        return getattr(importlib.import_module(".state_caches", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
