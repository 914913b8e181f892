"""Python files of the user's: codecs and checkers of answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from ..core.errors import SettingsError


def load_module(path: Path) -> ModuleType:
    """Runs the file anew. Raises SettingsError, whatever goes wrong in it."""
    if not path.is_file():
        raise SettingsError(f"The file {path} does not exist.")
    try:
        spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ImportError("it is not a Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # noqa: BLE001 - anything may happen there
        raise SettingsError(f"{path} cannot be loaded: {said(e)}.") from e
    return module


def said(e: BaseException) -> str:
    """An error as the end of a sentence."""
    return " ".join(f"{type(e).__name__}: {e}".split()).rstrip(".: ")
