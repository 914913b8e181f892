"""Progress of studies as bars on stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..study.steps import Steps


class Bars(Steps):
    """A bar per step, where stderr is a terminal. A context manager. share: whether the share that is done is shown, too."""

    def __init__(self, *, quiet: bool, share: bool = False) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), *([TextColumn("{task.percentage:>3.0f}%")] if share else []), TimeRemainingColumn()]
        console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self.bar = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)

    def say(self, sentence: str) -> None:
        """A line above the bars, unless quiet."""
        if not self.quiet:
            self.bar.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """As `Steps`."""
        step = self.bar.add_task(name, total=total)
        try:
            yield lambda n: self.bar.advance(step, n)
        finally:
            self.bar.remove_task(step)

    def __enter__(self) -> Bars:
        if not self.bar.disable:  # older versions of rich end one that is disabled with an empty line
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.bar.disable:
            self.bar.stop()
