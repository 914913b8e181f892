"""Whether llama-cpp-python is there, in a version that this package can use."""

from __future__ import annotations

import re
import sys

from mixkvq.core.errors import VersionError

from .versions import LLAMA_CPP, LLAMA_CPP_OLDEST

_INSTALL = f"install it with: pip install '{LLAMA_CPP}'"


def require_llama() -> None:
    """Import all that needs llama-cpp-python.

    Raises VersionError if it is not installed, or lacks what MixKVQ takes from it.
    """
    try:
        from . import attachment, llama, sequences  # noqa: F401 - what is asked for next
    except (ImportError, AttributeError) as e:  # another version lacks what _compat takes, or has it elsewhere
        if isinstance(e, ModuleNotFoundError) and e.name == "llama_cpp":
            raise VersionError(f"llama-cpp-python is not installed; {_INSTALL}.") from None
        found = getattr(sys.modules.get("llama_cpp"), "__version__", None)
        if found is None:
            raise
        if tuple(int(n) for n in re.findall(r"\d+", found)[:3]) < LLAMA_CPP_OLDEST:
            raise VersionError(f"llama-cpp-python {found} is not supported; {_INSTALL}.") from None
        raise VersionError(f"llama-cpp-python {found} lacks what MixKVQ takes from it ({e}); it may be newer than this MixKVQ.") from None
