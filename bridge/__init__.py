"""MixKVQ inside llama-cpp-python: a key/value cache of about three bits per element.

    from bridge import Llama

    llama = Llama("model.gguf", n_ctx=32768, kv="balanced")

`Llama` is `llama_cpp.Llama` with two more arguments, `attach` serves programs that build `llama_cpp.Llama` themselves, and
`python -m bridge.run` is the command line. llama_cpp is imported when one of the first two is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mixkvq.core.errors import (
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
from mixkvq.core.page import Page
from mixkvq.core.settings import Kv

if TYPE_CHECKING:
    from .attachment import Attachment, attach
    from .llama import Llama
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
    if name in ("Attachment", "DiskCache", "Llama", "RamCache", "attach"):
        from .installed import require_llama

        require_llama()
        from . import attachment, llama, state_caches

        return getattr({"Llama": llama, "DiskCache": state_caches, "RamCache": state_caches}.get(name, attachment), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
