"""What `mixkvq.calibrate` can afford: how much it reads so that it keeps to the minutes that it was given."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from ..core.errors import SettingsError
from ..core.reference import PAGE_CELLS

FEWEST_TOKENS = 1024  # of each kind of text, unless there is too little time for it
OWN_TOKENS = 384  # of the model's own words
SPARE = 0.06  # of the minutes: allocating, opening contexts, writing


class Clock:
    """The minutes that a calibration may take, from now on."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._began = time.perf_counter()

    def taken(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._began

    def left(self) -> float:
        """Seconds until the minutes are over."""
        return 60 * self.minutes * (1 - SPARE) - self.taken()


@dataclass(frozen=True)
class Speed:
    """How fast a model is here.

    read: tokens per second when a page of 128 is read, all its predictions included. write: seconds for a single token.
    """

    read: float
    write: float

    def words(self) -> str:
        """`read` for a person."""
        return f"{self.read:.0f}" if self.read >= 1000 else f"{self.read:.3g}"


@dataclass(frozen=True)
class Plan:
    """What is read.

    tokens: of each kind of text, to calibrate and to hold out; of problems twice as many to calibrate.
    every_kind: whether solved problems and the model's own words are read, too. own: so many of those.
    tries: allocations that are tried per size, with a pass over the text each; 0: the one that follows from the weights.
    parts: whether the parts of the cache are measured one by one, in what time is left.
    windows: whether windows are tried.
    seconds: what all of it takes, but for the parts.
    """

    tokens: int
    every_kind: bool = True
    own: int = OWN_TOKENS
    tries: int = 4
    parts: bool = True
    windows: bool = True
    seconds: float = 0.0


@dataclass(frozen=True)
class Demand:
    """What a calibration wants to do.

    tokens: of each kind of text, at most. least: the fewest of which a page is packed. tries: allocations per size. sizes: how many sizes are tried.
    parts: whether the parts are to be measured. windows: how many are tried. judged: caches on the held-out text, the exact one included.
    """

    tokens: int
    least: int
    tries: int
    parts: bool = True
    sizes: int = 1
    windows: int = 0
    judged: int = 3


def least_tokens(window: int, sinks: int) -> int:
    """The shortest text in which some pages are packed and read afterwards."""
    return PAGE_CELLS * (-(-sinks // PAGE_CELLS) + -(-max(window, 1) // PAGE_CELLS) + 3)


def make_plan(demand: Demand, speed: Speed, clock: Clock) -> Plan:
    """The finest plan that the minutes allow. Raises SettingsError, with the minutes that it takes, if there is none."""
    left = clock.left()
    needed = 0.0
    one = min(1, demand.tries)
    for every_kind, tries, parts in ((True, demand.tries, True), (True, one, True), (False, one, True), (False, 0, False)):
        parts = parts and demand.parts
        n_windows = demand.windows if every_kind else 0
        passes = 1 + (tries > 0) + tries * demand.sizes + n_windows
        own = min(OWN_TOKENS, int(0.1 * left / speed.write)) if every_kind else 0
        own = own if own >= 3 * PAGE_CELLS else 0
        each = passes * (3 if every_kind else 1) + demand.judged * demand.sizes * (2 if every_kind else 1)
        once = own * (speed.write + passes / speed.read)
        least = max(FEWEST_TOKENS if every_kind else 0, demand.least)
        share = 0.7 if parts else 1.0
        tokens = min(demand.tokens, int((share * left - once) * speed.read / each))
        if tokens >= min(least, demand.tokens):
            return Plan(tokens, every_kind, own, tries, parts, n_windows > 0, once + tokens * each / speed.read)
        needed = demand.least * each / speed.read
    minutes = math.ceil(10 * (clock.taken() + needed) / 60 / (1 - SPARE)) / 10
    raise SettingsError(
        f"This machine reads about {speed.words()} tokens a second of this model, so that measuring takes {minutes:g} minutes at least; "
        f"--minutes {clock.minutes:g} is too short."
    )
