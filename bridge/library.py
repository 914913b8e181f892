"""Where the compiled parts are. Imports neither llama_cpp nor the native module unless asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType

from .errors import VersionError

_LLAMA_CPP = "0.3.36"
_INSTALL = f"install it with: pip install llama-cpp-python=={_LLAMA_CPP}"
_REPAIR = "install it with `pip install .` in the repository (or `make run`)"


def _folders() -> Iterator[Path]:
    yield Path(__file__).resolve().parent
    # In an editable install the sources and what was built lie in different places; the native module is with the latter.
    spec = util.find_spec("bridge._native")
    if spec is not None and spec.origin:
        yield Path(spec.origin).resolve().parent


def library_path() -> Path:
    """The path of the ggml backend, for `ggml_backend_load` or GGML_BACKEND_PATH.

    Raises VersionError if it was not built.
    """
    suffix = {"darwin": (".so", ".dylib"), "win32": (".dll",)}.get(sys.platform, (".so",))
    for folder in _folders():
        for ending in suffix:
            for name in (f"libggml-mixkvq{ending}", f"ggml-mixkvq{ending}"):
                if (folder / "lib" / name).is_file():
                    return folder / "lib" / name
    raise VersionError(f"The MixKVQ backend library libggml-mixkvq is not built: {_REPAIR}.")


def native() -> ModuleType:
    """The compiled module `bridge._native`.

    Raises VersionError if it was not built or does not load.
    """
    try:
        from . import _native
    except ImportError as e:
        if util.find_spec("bridge._native") is None:
            raise VersionError(f"The native part of MixKVQ is not built: {_REPAIR}.") from None
        raise VersionError(f"The native part of MixKVQ does not load ({e}): {_REPAIR}.") from None
    return _native


def llama() -> ModuleType:
    """The module `bridge._llama`, which imports llama_cpp.

    Raises VersionError if llama-cpp-python is not installed, or is another version than the one that MixKVQ uses.
    """
    try:
        from . import _llama
    except (ImportError, AttributeError) as e:  # another version lacks what _llama imports, or has it elsewhere
        if isinstance(e, ModuleNotFoundError) and e.name == "llama_cpp":
            raise VersionError(f"llama-cpp-python is not installed; {_INSTALL}.") from None
        found = getattr(sys.modules.get("llama_cpp"), "__version__", _LLAMA_CPP)
        if found != _LLAMA_CPP:
            raise VersionError(f"llama-cpp-python {found} is not supported; {_INSTALL}.") from None
        raise
    return _llama
