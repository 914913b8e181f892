"""Where the ggml backend lies, which llama.cpp loads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path

from mixkvq.core.errors import VersionError
from mixkvq.core.native import REPAIR


def _folders() -> Iterator[Path]:
    yield Path(__file__).resolve().parent
    # In an editable install the sources and what was built lie in different places; the native module is with the latter.
    spec = util.find_spec("mixkvq.core._native")
    if spec is not None and spec.origin:
        yield Path(spec.origin).resolve().parents[2] / "bridge"


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
    raise VersionError(f"The MixKVQ backend library libggml-mixkvq is not built: {REPAIR}.")
