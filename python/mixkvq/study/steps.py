"""How a study tells how far it is: to nobody, unless a program shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


def duration(seconds: float) -> str:
    """A time for a person: seconds below a minute and a half, else minutes."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"


class Steps:
    """The steps of a study, silent; `mixkvq.cli.progress` shows them on a terminal."""

    def say(self, sentence: str) -> None:
        """Something that the user should know meanwhile."""

    @contextlib.contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """One step while the body runs: what it is called, and of how many units. The value is called with the units that were done since."""
        yield lambda n: None
