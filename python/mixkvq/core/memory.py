"""How sizes are written, and whether a context fits the memory that is free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .errors import ContextTooLargeError

CELLS = 256  # llama.cpp rounds a context up to this many cells
SEQUENCES = 256  # it allows that many in a context
MARGIN, LEAST_MARGIN = 0.03, 4 << 20  # of what is free: a context that is proposed must fit a moment later as well


@dataclass(frozen=True)
class Free:
    """bytes: what new allocations can take without swapping. limit: of the control group that allows the least, or None if the machine does.

    where: "on CUDA0", or "" for the machine's own memory.
    """

    bytes: int
    limit: int | None = None
    where: str = ""

    def describe(self) -> str:
        """As a part of a sentence."""
        group = f" (a control group limits this process to {format_bytes(self.limit)})" if self.limit is not None else ""
        return f"{format_bytes(self.bytes)} are free {self.where}" if self.where else f"{format_bytes(self.bytes)} of memory are free{group}"


def format_bytes(n: float) -> str:
    """`1536` -> "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:,.1f} {unit}"
        n /= 1024
    raise AssertionError


def check_fits(n_ctx: int, free: Free, least: int, measure: Callable[[int], int | None]) -> None:
    """Refuse a context that does not fit, with the largest one that does.

    least: bytes that a token takes at least. measure: bytes that a full context of so many tokens takes, None if it cannot be created; it is not
    asked about a context that `least` rules out. Raises ContextTooLargeError.
    """
    need: int | None = n_ctx * least
    if need is not None and need <= free.bytes:
        need = measure(n_ctx)
        if need is None or need <= free.bytes:
            return
    assert need is not None
    room = free.bytes - round(max(MARGIN * free.bytes, LEAST_MARGIN))
    fits = largest_that_fits(n_ctx, need, room, least, measure)
    advice = f"at most {fits} tokens fit" if fits else f"not even {CELLS} tokens fit"
    raise ContextTooLargeError(f"A context of {n_ctx} tokens needs at least {format_bytes(need)} and {free.describe()}; {advice}.")


def largest_that_fits(n_ctx: int, need: int, free: int, least: int, measure: Callable[[int], int | None]) -> int:
    """The largest multiple of CELLS below n_ctx, which takes `need` bytes, that takes at most `free`; 0 if none does."""
    low, low_need, high, high_need = 0, 0, n_ctx // CELLS, need
    if least:
        high = min(high, free // (least * CELLS) + 1)
    turn = 0
    while high - low > 1:
        # What a context takes is nearly proportional to its length: the line between what is known, and where it does not get on, the middle.
        turn += 1
        slope = max(1e-9, (high_need - low_need) / (high - low))
        guess = low + int((free - low_need) / slope) if turn % 3 else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        taken = measure(guess * CELLS)
        if taken is not None and taken <= free:
            low, low_need = guess, taken
        else:
            high, high_need = guess, high_need if taken is None else taken
    return low * CELLS
