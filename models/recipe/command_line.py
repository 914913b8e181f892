"""What the recipe's programs share: numbers within bounds, and that nothing is replaced unasked."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: a finite number from `low` to `high`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low:g}" + (f" to {high:g}" if math.isfinite(high) else " on"))
        return value

    parse.__name__ = "number"  # of argparse's own message
    return parse


def add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace files that exist")


def claim(folder: Path, names: Iterable[str], force: bool) -> None:
    """Make the folder and see that these files can be written in it. Ends the program with a sentence if not, or if one exists."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise SystemExit(f"error: {folder} cannot be written: {e.strerror or e}.") from None
    for path in map(folder.joinpath, names):
        if path.is_dir():
            raise SystemExit(f"error: {path} cannot be written: it is a folder.")
        if path.exists() and not force:
            raise SystemExit(f"error: {path} exists; give another folder, or --force to replace it.")
