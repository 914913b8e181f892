"""Where a prompt begins: in the stream that holds most of it, in a copy of that stream, in a parked file, or from nothing.

Streams and files are few (tens), and comparing 100k tokens takes a few milliseconds, so every one is looked at; a trie would save nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_GAIN = 64  # tokens that are worth a copy, or waiting for a prompt that is being read


@dataclass(frozen=True)
class Begin:
    """In which stream a request runs, how many tokens of its prompt are there then, and where they come from: that stream if `source` is None."""

    stream: int
    n: int
    source: int | None = None


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    n = min(len(a), len(b))
    if n < LEAST_GAIN or a[0] != b[0]:
        return next((i for i in range(n) if a[i] != b[i]), n)
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def choose(held: Sequence[int], found: Sequence[int], idle: Sequence[int]) -> Begin:
    """Of streams that hold so many tokens, of which so many begin the prompt and can be used.

    idle: those that are free, at least one, the least recently used first. A stream whose text goes on otherwise for longer than what is shared is
    another chat: it is copied where another stream can take the copy, and stays as it is.
    """
    best = max(range(len(held)), key=lambda i: found[i])
    own = max(idle, key=lambda i: found[i])
    if found[best] - found[own] < LEAST_GAIN and found[own] and (2 * found[own] >= held[own] or len(idle) == 1):
        return Begin(own, found[own])
    target = spare(held, [i for i in idle if i != best or not found[best]] or idle)
    if best != target and found[best] >= LEAST_GAIN and found[best] > found[target]:
        return Begin(target, found[best], best)
    return Begin(target, found[target])


def spare(held: Sequence[int], idle: Sequence[int]) -> int:
    """The stream that can best be done without: the first that is empty, for neighbours are computed together; else the least recently used."""
    return min((i for i in idle if not held[i]), default=idle[0])
