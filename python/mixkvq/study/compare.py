"""How far a cache moves the model's predictions: caches walk through the same tokens in lock-step and every prediction is compared.

A cache packs whole pages, and only between batches. Feeding the tokens in batches that end exactly where a page would be packed (`cut`) therefore
shows every query the cache that it would see token by token, at the speed of batches: the style "decode". "token" feeds single tokens and is the
proof; "prefill" feeds long batches, in which a prompt sees itself unquantised.

    for found in compare_caches("model.gguf", ["q4_0", "balanced"], [Passage(tokens)]):
        for name, measured in found.items():
            print(name, measured.summary()["kld_mean"])
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..core.errors import ContextError, ContextTooLargeError, SettingsError
from ..core.native import native
from ..core.reference import PAGE_CELLS
from .caches import LENGTHS, f16_tokens, is_stock, open_cache, sizes
from .record import available_cores

if TYPE_CHECKING:
    from bridge import Llama

STYLES = ("decode", "prefill", "token")
NOISE_FLOOR = "noise floor"  # the baseline's own cache in batches of another size
CELLS = 256  # a context is a multiple of this
BLOCK, LEAST_BLOCKS = 128, 4  # predictions of a block, and blocks that a standard error takes
SINGLE_STEPS = 64  # single tokens that a cache is fed before the next one's turn
_BATCH = {"decode": PAGE_CELLS, "prefill": 512, "token": 1}
# A size at which the CPU backend takes another path through attention: one query at a time, or a tile of 64.
_OTHER_BATCH = {"decode": 8, "prefill": 8, "token": 64}

Rows = npt.NDArray[np.float32]


# ---- one sequence of tokens ------------------------------------------------------------------------------


@dataclass
class Passage:
    """Tokens to walk through. Predictions of the tokens from position `first` (at least 1) on count."""

    tokens: list[int]
    first: int = 1


def cut(n: int, style: str, windows: Iterable[int] = (PAGE_CELLS,)) -> list[int]:
    """Where `n` tokens are cut into batches: positions from 0 to n, the same for every cache of a comparison.

    windows: recent tokens in F16, of all caches that are compared. The query at position c sees page p packed if c >= 128 (p + 1) + max(window, 1)
    (the page being written is never packed), so with cuts at max(window, 1) modulo 128 nothing changes inside a batch.
    """
    if style == "decode":
        phases = {max(window, 1) % PAGE_CELLS for window in windows} or {0}
        inner = {start + phase for start in range(0, n, PAGE_CELLS) for phase in phases}
    elif style in STYLES:
        inner = set(range(0, n, SINGLE_STEPS if style == "token" else _BATCH[style]))
    else:
        raise SettingsError(f"There is no style {style!r}; the styles are {', '.join(STYLES)}.")
    return sorted({0, n} | {c for c in inner if c < n})


def feed(llm: Llama, tokens: Sequence[int], batch: int, wanted: int) -> Rows:
    """Evaluate `tokens`, at most `batch` at a time; the logits of the last `wanted` ones, [wanted, vocabulary], until the next evaluation."""
    if len(tokens) <= batch:
        last: npt.NDArray[np.float32] = llm.forward(tokens, wanted, copy=False)
        return last
    rows = np.empty((wanted, llm.n_vocab()), np.float32)
    for start in range(0, len(tokens), batch):
        part = tokens[start : start + batch]
        end = wanted - (len(tokens) - start - len(part))  # in rows
        n = min(len(part), max(0, end))
        found = llm.forward(part, n, copy=False)
        if n:
            rows[end - n : end] = found
    return rows


# ---- figures ---------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """A cache against the baseline on one passage, per prediction: divergence in nats, -log p of the token that really follows, first choices."""

    kld: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    nll_baseline: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    right_baseline: list[bool] = field(default_factory=list)

    def add(self, baseline: Rows, cache: Rows, targets: Sequence[int], threads: int = 1) -> None:
        """Logits of both, float32 [n, vocabulary], and the tokens that really follow. ValueError for logits that are no distribution."""
        add_predictions([self], baseline, [cache], targets, threads)


def add_predictions(found: Sequence[Comparison], baseline: Rows, caches: Sequence[Rows], targets: Sequence[int], threads: int = 1) -> None:
    """`Comparison.add` for several caches, with one look at the baseline."""
    target = np.asarray(targets, np.int64)
    kld, nll, top = native().compare_predictions(baseline, caches, target, threads=threads)
    for i, comparison in enumerate(found):
        comparison.kld += kld[i].tolist()
        comparison.same_top += (top[i + 1] == top[0]).tolist()
        comparison.nll += nll[i + 1].tolist()
        comparison.nll_baseline += nll[0].tolist()
        comparison.right += (top[i + 1] == target).tolist()
        comparison.right_baseline += (top[0] == target).tolist()


def summarise(parts: Sequence[Comparison]) -> dict[str, Any]:
    """The figures of one or more passages: predictions, mean KLD with its standard error, quantiles, agreement, perplexities."""
    kld, nll, nll_baseline = (np.concatenate([getattr(part, name) for part in parts]) for name in ("kld", "nll", "nll_baseline"))
    same = np.concatenate([part.same_top for part in parts])
    difference = float(np.mean(nll - nll_baseline))
    ratio_error = standard_error([np.subtract(part.nll, part.nll_baseline) for part in parts])
    return {
        "tokens": len(kld),
        "kld_mean": float(kld.mean()),
        "kld_standard_error": standard_error([part.kld for part in parts]),
        "kld_median": float(np.median(kld)),
        "kld_99%": float(np.quantile(kld, 0.99)),
        "kld_99.9%": float(np.quantile(kld, 0.999)),
        "kld_max": float(kld.max()),
        "kld_by_quarter": _by_quarter(parts),
        "same_top": float(same.mean()),
        "flips": int((~same).sum()),
        "perplexity": math.exp(nll.mean()),
        "perplexity_baseline": math.exp(nll_baseline.mean()),
        "perplexity_ratio": math.exp(difference),
        "perplexity_ratio_standard_error": None if ratio_error is None else math.exp(difference) * ratio_error,
    }


def n_blocks(lengths: Iterable[int]) -> int:
    """Into how many blocks `standard_error` cuts parts of these lengths."""
    return sum(max(1, n // BLOCK) for n in lengths if n)


def standard_error(parts: Sequence[Sequence[float] | npt.NDArray[Any]], block: int = BLOCK) -> float | None:
    """Standard error of the mean of all values, from blocks: neighbouring tokens are not independent.

    Each part is cut into blocks of at least `block` values (a shorter part is one). None with fewer than four blocks.
    """
    blocks = [piece for part in parts if len(part) for piece in np.array_split(np.asarray(part, np.float64), max(1, len(part) // block))]
    m = len(blocks)
    if m < LEAST_BLOCKS:
        return None
    sums, counts = np.array([piece.sum() for piece in blocks]), np.array([len(piece) for piece in blocks])
    rest = sums - sums.sum() / counts.sum() * counts
    return float(math.sqrt(m / (m - 1) * (rest**2).sum()) / counts.sum())


def _by_quarter(parts: Sequence[Comparison]) -> list[float]:
    """Mean divergence in the quarters of the passages: how it grows with the context."""
    quarters = [np.array_split(np.asarray(part.kld), 4) for part in parts]
    return [float(np.concatenate(pieces).mean()) if sum(map(len, pieces)) else 0.0 for pieces in zip(*quarters)]


# ---- caches side by side ---------------------------------------------------------------------------------


@dataclass
class Measured:
    """A cache on all passages: a comparison for each, what the cache takes (`caches.sizes`), and the seconds it was evaluated."""

    passages: list[Comparison]
    sizes: dict[str, Any]
    seconds: float

    def summary(self) -> dict[str, Any]:
        """All figures by name, as JSON can hold them."""
        return {**self.sizes, **summarise(self.passages), "seconds": round(self.seconds, 3)}


@dataclass
class _Walker:
    name: str
    llm: Llama
    batch: int
    seconds: float = 0.0

    def feed(self, tokens: Sequence[int], wanted: int) -> Rows:
        begin = time.perf_counter()
        rows = feed(self.llm, tokens, self.batch, wanted)
        self.seconds += time.perf_counter() - begin
        return rows


def compare_caches(
    model: str,
    names: Sequence[str],
    passages: Sequence[Passage],
    *,
    baseline: str = "f16",
    style: str = "decode",
    at_once: int = 4,
    window: int | None = None,
    sinks: int | None = None,
    windows: Iterable[int] | None = None,
    lengths: Iterable[int] = LENGTHS,
    threads: int | None = None,
    device: str = "auto",
    progress: Callable[[int], None] = lambda n: None,
) -> Iterator[dict[str, Measured]]:
    """Compare the named caches (and NOISE_FLOOR, if it is among them) with the baseline on the passages.

    Yields the results of `at_once` caches at a time, in order: so many contexts, and the baseline's, are in memory; weights are shared, as far as
    llama.cpp maps them from the file. windows: as for `cut`; None: those of the named caches and of the baseline. lengths: where total bits are
    given. progress gets numbers of tokens, `work(...)` of them in all. Raises the errors of bridge.Llama.
    """
    if not passages or any(not 1 <= p.first < len(p.tokens) for p in passages):
        raise SettingsError("There is nothing to predict: a passage needs at least two tokens.")
    if windows is None:
        windows = windows_of([baseline, *names], window)
    n_ctx = -(-max(len(p.tokens) for p in passages) // CELLS) * CELLS
    n_batch = max(_BATCH[style], _OTHER_BATCH[style]) if style in STYLES else PAGE_CELLS
    options: dict[str, Any] = {"n_ctx": n_ctx, "n_batch": n_batch, "n_ubatch": n_batch, "window": window, "sinks": sinks}
    options["device"] = device
    if threads:
        options |= {"n_threads": threads, "n_threads_batch": threads}
    cuts = {len(p.tokens): cut(len(p.tokens) - 1, style, windows) for p in passages}  # nothing follows the last token

    with contextlib.ExitStack() as stack:

        def walker(name: str, stack: contextlib.ExitStack) -> _Walker:
            try:
                llm = open_cache(model, baseline if name == NOISE_FLOOR else name, **options)
            except ContextTooLargeError as e:
                raise ContextTooLargeError(f"{e} Caches are walked {at_once} at a time; --at-once 1 and a smaller --ctx take less.") from None
            stack.callback(llm.close)
            return _Walker(name, llm, (_OTHER_BATCH if name == NOISE_FLOOR else _BATCH)[style])

        reference = walker(baseline, stack)
        for i in range(0, len(names), at_once):
            with contextlib.ExitStack() as group:
                walkers = [walker(name, group) for name in names[i : i + at_once]]
                found: list[list[Comparison]] = [[] for _ in walkers]
                for passage in passages:
                    walked = _walk(reference, walkers, passage, cuts[len(passage.tokens)], threads or available_cores(), progress)
                    for parts, comparison in zip(found, walked):
                        parts.append(comparison)
                yield {
                    w.name: Measured(
                        parts,
                        sizes(w.llm, baseline if w.name == NOISE_FLOOR else w.name, lengths, window=window, sinks=sinks),
                        w.seconds,
                    )
                    for w, parts in zip(walkers, found)
                }


def windows_of(names: Iterable[str], window: int | None = None) -> set[int]:
    """The windows of those of the named caches that pack pages, for `cut`."""
    return {f16_tokens(name, window)[0] for name in names if name != NOISE_FLOOR and not is_stock(name)}


def work(n_names: int, passages: Sequence[Passage], at_once: int) -> int:
    """The tokens that `compare_caches` reports to `progress`: the baseline walks once with every group."""
    return (n_names + -(-n_names // at_once)) * sum(len(p.tokens) - 1 for p in passages)


def _walk(
    baseline: _Walker, others: Sequence[_Walker], passage: Passage, cuts: Sequence[int], threads: int, progress: Callable[[int], None]
) -> list[Comparison]:
    """Nothing of the size of the passage is kept: every batch is compared at once."""
    found = [Comparison() for _ in others]
    walkers = (baseline, *others)
    for w in walkers:
        w.llm.clear()
    tokens = passage.tokens
    for start, end in zip(cuts, cuts[1:]):
        wanted = min(end - start, max(0, end + 1 - passage.first))
        rows = []
        for w in walkers:
            rows.append(w.feed(tokens[start:end], wanted))
            progress(end - start)
        try:
            add_predictions(found, rows[0], rows[1:], tokens[end + 1 - wanted : end + 1], threads)
        except ValueError:
            for w, logits in zip(walkers, rows):
                bad = np.flatnonzero(~np.isfinite(logits.max(axis=1)))
                if len(bad):
                    at = end - wanted + bad[0] + 1
                    raise ContextError(f"With {w.name} the model's logits after {at} tokens are no prediction (NaN or infinite).") from None
            raise
    return found


# ---- texts -----------------------------------------------------------------------------------------------


def tokenize_text(llm: Llama, text: bytes) -> tuple[list[int], list[int]]:
    """The text's tokens, and what the model puts before a text (its BOS token, or nothing)."""
    return llm.tokenize(text, add_bos=False), llm.tokenize(b"", add_bos=True)


def draw_windows(n_tokens: int, size: int, count: int, seed: int) -> list[int]:
    """Offsets of at most `count` different windows of `size` tokens, in order. Empty if the text is shorter than one."""
    n_windows = n_tokens // size
    return sorted(size * i for i in Random(seed).sample(range(n_windows), min(count, n_windows)))
