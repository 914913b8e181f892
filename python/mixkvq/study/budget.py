"""What `mixkvq.calibrate` can afford: how much it reads so that it keeps to the time that it was given, or that it has said."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from ..core.reference import PAGE_CELLS

FEWEST_TOKENS = 1024  # of each kind of text, unless there is too little time for it
OWN_TOKENS = 384  # of the model's own words
SPARE = 0.06  # of the time: allocating, writing
PARTS = 0.5  # of the time, at least, for the parts of the cache, where not all can be had

# Nobody has said how long it may take: as long as it takes to read so many tokens, up to two minutes; as a slow machine reads far fewer in these,
# then up to eight for as many as a useful profile takes.
THOROUGH_TOKENS, THOROUGH_SECONDS = 110_000, 110.0
USEFUL_TOKENS, USEFUL_SECONDS = 30_000, 480.0


def default_seconds(read: float) -> float:
    """How long a calibration takes if nobody says it, where a model is read with so many tokens a second."""
    return max(min(THOROUGH_TOKENS / read, THOROUGH_SECONDS), min(USEFUL_TOKENS / read, USEFUL_SECONDS))


class Clock:
    """The time of a calibration, from now on. seconds: how much it may take; None: that is still open."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self._began = time.perf_counter()

    def taken(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._began

    def left(self) -> float:
        """Seconds until the time is over, but for what is spare."""
        assert self.seconds is not None
        return self.seconds * (1 - SPARE) - self.taken()


@dataclass(frozen=True)
class Speed:
    """How fast a model is here.

    read: tokens per second when a page of 128 is read, all its predictions included. write: seconds for a single token. load: seconds until a model
    that has been read before can be used.
    """

    read: float
    write: float
    load: float = 0.0

    def words(self) -> str:
        """`read` for a person."""
        return f"{self.read:.0f}" if self.read >= 1000 else f"{self.read:.3g}"


@dataclass(frozen=True)
class Plan:
    """What is read.

    tokens: of each kind of text, to calibrate and to hold out; of problems so many times as many to calibrate. 0: there is no time to read anything.
    every_kind: whether solved problems and the model's own words are read, too. own: so many of those.
    tries: allocations that are tried per size, with a pass over the text each; 0: the one that follows from the weights.
    parts: whether parts of the cache are measured, in what time is left.
    windows: whether windows are tried. nearest: whether the preset of the nearest size is measured beside the one that is no larger.
    seconds: what all of it takes, but for the parts.
    """

    tokens: int
    every_kind: bool = True
    own: int = OWN_TOKENS
    tries: int = 2
    parts: bool = True
    windows: bool = True
    nearest: bool = True
    problems: int = 2
    seconds: float = 0.0


@dataclass(frozen=True)
class Demand:
    """What a calibration wants to do.

    tokens: of each kind of text, at most. least: the fewest of which a page is packed. tries: allocations per size. sizes: how many sizes are tried.
    parts: whether the parts are to be measured. windows: how many are tried. judged: caches on the held-out text, the exact one included; nearest:
    whether the preset of the nearest size is one more.
    """

    tokens: int
    least: int
    tries: int
    parts: bool = True
    sizes: int = 1
    windows: int = 0
    judged: int = 3
    nearest: bool = False


def least_tokens(window: int, sinks: int) -> int:
    """The shortest text in which some pages are packed and read afterwards."""
    return PAGE_CELLS * (-(-sinks // PAGE_CELLS) + -(-max(window, 1) // PAGE_CELLS) + 3)


def make_plan(demand: Demand, speed: Speed, clock: Clock) -> Plan:
    """The finest plan that the time allows."""
    left = clock.left()
    coarse = [
        Plan(0, True, OWN_TOKENS, demand.tries, demand.parts, demand.windows > 0, demand.nearest),
        Plan(0, True, 0, demand.tries, demand.parts, demand.windows > 0, False),
        Plan(0, True, 0, min(1, demand.tries), demand.parts, demand.windows > 0, False),
        Plan(0, True, 0, min(1, demand.tries), demand.parts, demand.windows > 0, False, problems=1),
        Plan(0, False, 0, min(1, demand.tries), demand.parts, False, False),
        Plan(0, False, 0, 0, False, False, False),
    ]
    for coarser, plan in enumerate(coarse):
        contexts = 1 + (demand.judged + plan.nearest) * demand.sizes
        passes = 1 + (plan.tries > 0) + plan.tries * demand.sizes + (demand.windows if plan.windows else 0)
        own = plan.own * (speed.write + passes / speed.read)
        if own > 0.1 * left:
            own, plan = 0.0, replace(plan, own=0)
        each = passes * (1 + plan.problems if plan.every_kind else 1) + (contexts - 1) * (2 if plan.every_kind else 1)
        once = own + contexts * speed.load
        tokens = min(demand.tokens, int(((1 - PARTS if plan.parts else 1.0) * left - once) * speed.read / each))
        fewest = (1 if coarser else 2) * FEWEST_TOKENS if plan.every_kind else 0
        if tokens >= min(max(fewest, demand.least), demand.tokens):
            return replace(plan, tokens=tokens, seconds=once + tokens * each / speed.read)
    return Plan(0, False, 0, 0, False, False, False)
