"""Whether llama-cpp-python is there, in the version that this package is made for."""

from __future__ import annotations

import sys

from mixkvq.core.errors import VersionError

from .versions import LLAMA_CPP

_INSTALL = f"install it with: pip install llama-cpp-python=={LLAMA_CPP}"


def require_llama() -> None:
    """Import all that needs llama-cpp-python.

    Raises VersionError if it is not installed, or is another version than the one that MixKVQ uses.
    """
    try:
        from . import attachment, llama, sequences  # noqa: F401 - what is asked for next
    except (ImportError, AttributeError) as e:  # another version lacks what _compat takes, or has it elsewhere
        if isinstance(e, ModuleNotFoundError) and e.name == "llama_cpp":
            raise VersionError(f"llama-cpp-python is not installed; {_INSTALL}.") from None
        found = getattr(sys.modules.get("llama_cpp"), "__version__", LLAMA_CPP)
        if found != LLAMA_CPP:
            raise VersionError(f"llama-cpp-python {found} is not supported; {_INSTALL}.") from None
        raise
