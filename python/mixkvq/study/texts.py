"""Texts that are read to measure with: files, and the text that comes with this package."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import SettingsError

DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")
PIECE, HELD_OUT = "%%%%", "%%%% held out"
"""Lines of the default text: between its pieces, and where the part begins that calibration does not read."""


def default_text() -> tuple[str, str]:
    """The default text, pieces of many kinds one after the other: what is read to calibrate, and what is held out to measure with.

    Raises SettingsError if this installation has none.
    """
    try:
        first, _, second = DEFAULT_TEXT.read_text(encoding="utf-8").partition(f"\n{HELD_OUT}\n")
    except OSError:
        raise SettingsError("The default text is not part of this installation; give --text FILE.") from None
    return _joined(first), _joined(second)


def _joined(text: str) -> str:
    return "\n\n".join(piece.strip() for piece in text.split(f"\n{PIECE}\n"))


def read_utf8(path: Path) -> str:
    """The text of a file, with its line ends as they are. Raises SettingsError if it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as e:
        raise SettingsError(f"{path} cannot be read: {e.strerror or e}.") from None
    except UnicodeDecodeError as e:
        raise SettingsError(f"{path} is not UTF-8 text (byte {e.start}).") from None
