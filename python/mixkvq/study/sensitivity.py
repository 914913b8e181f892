"""What calibration measures of a model: its queries, keys and values page by page, and how much the rounding of each layer moves the output.

Everything is seen through the page codec of the backend (`bridge.Llama(codec=...)`), so it is the cache of the running model that is measured:
after RoPE, with its recent window and its first page in F16, in the order of decoding. Texts are read in batches of a page, aligned to pages, in
which every query sees the cache that it would see token by token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge import Llama

from ..core.native import native
from ..core.page import Page
from ..core.profile import LayerProfile
from ..core.reference import PAGE_CELLS, QUAD, KeyFormat, ValueFormat
from ..core.settings import Kv
from .allocate import CODED_BITS, VALUE_BITS, Tables, key_format, key_harm, value_harm
from .compare import Passage, cut, feed

POWER = 0.75
SHORT = 6 * PAGE_CELLS  # tokens of a kind, at least
Progress = Callable[[int], None]
Passages = Mapping[str, Sequence[Passage]]
"""What is read, by kind of text."""
Sample = dict[str, list[tuple[int, int]]]
"""By kind of text: passages, each its index and how many of its tokens are read."""


# ---- the codec that observes and rounds --------------------------------------------------------------------------------------------------


class Probe:
    """A page codec that leaves pages as they are, except those of chosen layers and heads, and can collect statistics of them all.

    rounding: (layer, is_value) -> a format for each head, or None for heads that stay exact.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self.rounding: dict[tuple[int, bool], list[KeyFormat | ValueFormat | None]] = {}
        self.collector: Collector | None = None

    def __call__(self, page: Page) -> tuple[NDArray[np.float32], float]:
        """A page as it reads back, and its bits: the codec of bridge.Llama."""
        if self.collector is not None:
            self.collector.add(page)
        formats = self.rounding.get((page.layer, page.is_value))
        if formats is None:
            return page.rows, 16.0 * page.rows.size
        rows, n_bytes = native().read_back(page.rows, [_native_format(fmt) for fmt in formats], page.q_abs, page.valid, threads=self.threads)
        return rows, 8.0 * n_bytes


def _native_format(fmt: KeyFormat | ValueFormat | None) -> Any:
    if isinstance(fmt, KeyFormat):
        return native().KeyFormat(fmt.head_size, fmt.tiers, fmt.group)
    return None if fmt is None else native().ValueFormat(fmt.head_size, fmt.bits, fmt.group)


class Collector:
    """Sums over pages, by layer."""

    def __init__(self, groups: Sequence[int]) -> None:
        self.groups = tuple(groups)
        self._keys: dict[int, _KeySums] = {}
        self._values: dict[int, _ValueSums] = {}

    def add(self, page: Page) -> None:
        """Count a page; one with holes is left out."""
        if not page.valid.all():
            return
        if page.is_value:
            self._values.setdefault(page.layer, _ValueSums()).add(page.rows)
        else:
            self._keys.setdefault(page.layer, _KeySums()).add(page, self.groups)

    def tables(self, n_layers: int) -> list[Tables | None]:
        """By layer; None where no page was seen. Weights are still 1."""
        result: list[Tables | None] = []
        for i in range(n_layers):
            k, v = self._keys.get(i), self._values.get(i)
            if k is None or v is None:
                result.append(None)
                continue
            ones = np.ones(len(v.error))
            result.append(
                Tables(
                    key_error={g: e / k.n for g, e in k.error.items()},
                    value_error=v.error / v.n,
                    key_weight=ones.copy(),
                    value_weight=ones.copy(),
                    key_even=ones.copy(),
                    value_even=ones.copy(),
                    q_abs=(k.q_abs / k.n).astype(np.float32),
                    q_sqr=(k.q_sqr / k.n).astype(np.float32),
                    key_range=(k.range / k.n).astype(np.float32),
                    size_v=v.size,
                    salience=np.stack(k.salience, axis=1),
                )
            )
        return result


class _KeySums:
    def __init__(self) -> None:
        self.n = 0
        self.error: dict[int, NDArray[np.float64]] = {}
        self.q_abs: NDArray[np.float64] = np.zeros(1)
        self.q_sqr: NDArray[np.float64] = np.zeros(1)
        self.range: NDArray[np.float64] = np.zeros(1)
        self.salience: list[NDArray[np.float32]] = []

    def add(self, page: Page, groups: Sequence[int]) -> None:
        rows = page.rows
        n_heads, _, d = rows.shape
        assert page.q_abs is not None and page.q_sqr is not None
        spread = rows.max(axis=1) - rows.min(axis=1)  # [heads, D]
        for group in groups:
            parts = rows.reshape(n_heads, PAGE_CELLS // group, group, d)
            low, high = parts.min(axis=2), parts.max(axis=2)
            order = np.argsort(-page.q_abs * (high - low).sum(axis=1), axis=1, kind="stable")
            error = np.empty((n_heads, d, len(CODED_BITS)))
            for b, bits in enumerate(CODED_BITS):
                step = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)[:, :, None]
                code = np.divide(parts - low[:, :, None], step, out=np.zeros_like(parts), where=step > 0)
                off = np.rint(code) * step + low[:, :, None] - parts
                error[:, :, b] = (off * off).mean(axis=(1, 2), dtype=np.float64) * page.q_sqr
            ranked = np.take_along_axis(error, order[:, :, None], axis=1)
            quads = ranked.reshape(n_heads, d // QUAD, QUAD, len(CODED_BITS)).sum(axis=2)
            self.error[group] = self.error.get(group, 0.0) + quads
        self.q_abs = self.q_abs + page.q_abs
        self.q_sqr = self.q_sqr + page.q_sqr
        self.range = self.range + spread
        self.salience.append((page.q_abs * spread / 3).astype(np.float32))
        self.n += 1


class _ValueSums:
    def __init__(self) -> None:
        self.n = 0
        self.size = 0
        self.error: NDArray[np.float64] = np.zeros(1)

    def add(self, rows: NDArray[np.float32]) -> None:
        n_heads, _, self.size = rows.shape
        error = np.empty((n_heads, len(VALUE_BITS)))
        for b, bits in enumerate(VALUE_BITS):
            off = native().read_back(rows, [native().ValueFormat(self.size, bits, 0)] * n_heads)[0] - rows
            error[:, b] = (off * off).sum(axis=2, dtype=np.float64).mean(axis=1)
        self.error = self.error + error
        self.n += 1


# ---- reading sequences and comparing ----------------------------------------------------------------------------------------------------


class Reader:
    """A model whose cache goes through a `Probe`, with the predictions of the exact cache for some passages.

    Predictions are kept for at most `max_bytes`; where there are more, the same share of each page's predictions counts.
    """

    def __init__(
        self, model: str, passages: Passages, *, window: int, sinks: int, threads: int, device: str = "auto", max_bytes: int = 1 << 30
    ) -> None:
        self.probe = Probe(threads)
        self.passages = passages
        everything = [p for some in passages.values() for p in some]
        self.n_tokens = sum(len(p.tokens) - 1 for p in everything)
        self._model, self._sinks, self._device = model, sinks, device
        self._n_ctx, self._threads = max(len(p.tokens) for p in everything), threads
        self._open(window)
        n_targets = sum(len(p.tokens) - p.first for p in everything)
        self._every = max(1, -(-n_targets * self.llm.n_vocab() * 4 // max_bytes))
        self._exact: dict[str, list[list[NDArray[np.float32]]]] = {}  # logits

    def _open(self, window: int) -> None:
        self.window = window
        begin = time.perf_counter()
        self.llm = Llama(
            self._model, kv=Kv(window=window, sinks=self._sinks), codec=self.probe, n_ctx=self._n_ctx, n_batch=PAGE_CELLS, n_ubatch=PAGE_CELLS,
            n_threads=self._threads, n_threads_batch=self._threads, verbose=False, device=self._device,
        )  # fmt: skip
        self.load = time.perf_counter() - begin  # seconds

    def change_window(self, window: int) -> None:
        """Go on with another window; what the exact cache predicts stays, if both windows end at pages."""
        if window == self.window:
            return
        if window % PAGE_CELLS or self.window % PAGE_CELLS:
            self._exact = {}
        self.llm.close()
        self._open(window)

    def close(self) -> None:
        """Free the model."""
        self.llm.close()

    def read_exact(self, collector: Collector | None, progress: Progress) -> None:
        """Keep what the exact cache predicts; show every page to the collector."""
        self.probe.rounding, self.probe.collector = {}, collector
        self._exact = {kind: [[rows.copy() for rows in self._chunks(passage, progress)] for passage in some] for kind, some in self.passages.items()}
        self.probe.collector = None

    def divergence(
        self, profiles: Sequence[LayerProfile | None], tables: Sequence[Tables | None], progress: Progress, sample: Sample | None = None
    ) -> dict[str, float]:
        """Divergence from the exact cache, in nats per token, by kind of text, with the cache rounded to these formats: see `divergence_now`."""
        self.probe.rounding = {}
        for i, (profile, table) in enumerate(zip(profiles, tables, strict=True)):
            if profile is not None and table is not None:
                keys, values = head_formats(profile, table.size_v)
                self.probe.rounding[i, False] = list(keys)
                self.probe.rounding[i, True] = list(values)
        return self.divergence_now(progress, sample)

    def divergence_now(self, progress: Progress, sample: Sample | None = None, power: float = POWER) -> dict[str, float]:
        """The same with `probe.rounding` as it stands; of a sample of the passages, if one is given.

        It is a power mean of the KL divergences. The mean (power 1) of a text that is easy to predict hangs on a few tokens, and they are what breaks
        a derivation; the square of the mean root hardly sees them. Where caches are compared it is something between.
        """
        found = {}
        for kind, some in (sample or self.sample(self.n_tokens)).items():
            parts = [
                divergences(exact, rows, self._threads)
                for i, n_tokens in some
                for exact, rows in zip(self._exact[kind][i], self._chunks(self.passages[kind][i], progress, n_tokens))
            ]
            kld = np.concatenate(parts)
            found[kind] = float((kld**power).mean() ** (1 / power))
        return found

    def sample(self, tokens: int) -> Sample:
        """About so many tokens of every kind, three times as many of solved problems, but at least SHORT.

        The first passages whose predictions begin early enough, the last one cut; if there are none, the one that is shortest up to some predictions.
        """
        found: Sample = {}
        for kind, some in self.passages.items():
            left = max(tokens, SHORT) if some[0].first == 1 else max(3 * tokens, SHORT)
            for i, passage in enumerate(some):
                n = len(passage.tokens)
                if n > left:
                    if left < (SHORT if passage.first == 1 else passage.first + 2 * PAGE_CELLS):
                        continue
                    n = self._cut(n, left)
                found.setdefault(kind, []).append((i, n))
                left -= n
            if kind not in found:
                n, i = min((min(len(p.tokens), max(left, p.first + 2 * PAGE_CELLS)), i) for i, p in enumerate(some))
                found[kind] = [(i, n if n == len(some[i].tokens) else self._cut(len(some[i].tokens), n))]
        return found

    def _cut(self, n: int, most: int) -> int:
        """How many tokens of a passage of n are read, if at most `most` are: up to where it is cut into batches."""
        return 1 + max(c for c in cut(n - 1, "decode", [self.window]) if c <= most)

    def passages_from(self, n_tokens: int) -> Sample:
        """The passages of so many tokens or more, whole; if there is none, all."""
        found = {kind: [(i, len(p.tokens)) for i, p in enumerate(some) if len(p.tokens) >= n_tokens] for kind, some in self.passages.items()}
        return {kind: some for kind, some in found.items() if some} or self.sample(self.n_tokens)

    def _chunks(self, passage: Passage, progress: Progress, n_tokens: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Logits of the predictions that count, page by page; each until the next one."""
        self.llm.clear()
        cuts = cut(min(len(passage.tokens), n_tokens or len(passage.tokens)) - 1, "decode", [self.window])
        for start, end in zip(cuts, cuts[1:]):
            wanted = min(end - start, max(0, end + 1 - passage.first))
            rows = feed(self.llm, passage.tokens[start:end], PAGE_CELLS, -(-wanted // self._every))
            progress(end - start)
            if len(rows):
                yield rows


def divergences(reference: NDArray[np.float32], logits: NDArray[np.float32], threads: int = 1) -> NDArray[np.float64]:
    """KL divergence of each row of logits [n, vocabulary] from that of the reference, in nats, at least 0."""
    kld: NDArray[np.float64] = native().compare_predictions(reference, [logits], threads=threads)[0][0]
    return kld


def head_formats(profile: LayerProfile, size_v: int) -> tuple[list[KeyFormat], list[ValueFormat]]:
    """The formats of a layer's heads as the reference describes them."""
    keys = [key_format(row) for row in profile.tiers]
    values = [ValueFormat(size_v, int(bits), int(group)) for bits, group in profile.values]
    return keys, values


# ---- sensitivity -----------------------------------------------------------------------------------------------------------------------------


Part = tuple[bool, list[tuple[int, list[int]]]]
"""A part of the cache: whether it is values, and the heads of each of its layers."""


def parts_of(layers: Sequence[Tables | None], probe: Sequence[LayerProfile | None], n_groups: int) -> list[Part]:
    """Keys and values, each, of so many groups of neighbouring layers."""
    seen = [(i, list(range(t.n_heads))) for i, (t, p) in enumerate(zip(layers, probe, strict=True)) if t is not None and p is not None]
    groups = [[seen[i] for i in group] for group in np.array_split(np.arange(len(seen)), min(n_groups, len(seen)))]
    return [(is_value, group) for group in groups for is_value in (False, True)]


def divided(part: Part) -> list[Part]:
    """A part's two halves by layers; of one layer its heads. One part if it is a single head."""
    is_value, piece = part
    if len(piece) > 1:
        return [(is_value, piece[: len(piece) // 2]), (is_value, piece[len(piece) // 2 :])]
    ((layer, heads),) = piece
    return [(is_value, [(layer, [head])]) for head in heads]


def n_heads(part: Part) -> int:
    """Heads of a part, counted in each of its layers."""
    return sum(len(heads) for _, heads in part[1])


def all_passes(heads: Sequence[int], exact: bool) -> int:
    """Passes over the text in which every head is measured by itself, of layers with so many heads; see `measure_weights`."""
    return sum((2 if exact else 3) + (2 * n if n > 1 else 0) for n in heads)


def measure_weights(
    reader: Reader,
    layers: Sequence[Tables | None],
    probe: Sequence[LayerProfile | None],
    n_groups: int,
    *,
    sample: Sample,
    shares: Mapping[str, float],
    progress: Progress,
    exact: bool = False,
    enough: Callable[[int], bool] = lambda n_passes: False,
) -> int:
    """Sets the weights of `layers`: what rounding one part at a time to the formats of `probe` does to the predictions, per unit of its error.

    It begins with the keys and the values of `n_groups` groups of layers. Then the part that does most is divided, again and again: where little time
    is, it goes to the heads that matter. shares: how much a kind of text counts in that.

    A part's effect on a kind of text is its share of the effects of all parts, so the sum over all parts of weight times error is 1 for `probe`: for
    every kind, and for `key_weight` and `value_weight`, in which kinds count alike. Unless arithmetic is exact, whatever changes a layer at all moves
    the predictions, through the rounding of all that comes behind it. What the values of the part's first layer do at 8 bits is taken for that and
    subtracted.

    enough: asked before every pass, with the number of those that were made; once it says so, parts are not divided any further, and those that were
    not measured at all count as the others. Returns how many parts were measured.
    """
    floors: dict[int, dict[str, float]] = {}
    n_passes = 0

    def divergence(rounding: dict[tuple[int, bool], list[KeyFormat | ValueFormat | None]]) -> dict[str, float]:
        nonlocal n_passes
        reader.probe.rounding = rounding
        n_passes += 1
        return reader.divergence_now(progress, sample, power=1)

    def effect(part: Part) -> dict[str, float]:
        is_value, piece = part
        first = piece[0][0]
        if exact:
            floors[first] = dict.fromkeys(sample, 0.0)
        if first not in floors:
            tables = layers[first]
            assert tables is not None
            floors[first] = divergence({(first, True): [ValueFormat(tables.size_v, 8)] * tables.n_heads})
        rounding: dict[tuple[int, bool], list[KeyFormat | ValueFormat | None]] = {}
        for i, heads in piece:
            formats: Sequence[KeyFormat | ValueFormat] = _formats_of(layers[i], probe[i])[is_value]
            rounding[i, is_value] = [f if h in heads else None for h, f in enumerate(formats)]
        return {kind: max(0.0, kld - floors[first][kind]) for kind, kld in divergence(rounding).items()}

    def measured(parts: Sequence[Part]) -> list[tuple[Part, dict[str, float]]]:
        found = []
        for part in parts:
            if enough(n_passes):
                break
            found.append((part, effect(part)))
        return found

    first = parts_of(layers, probe, n_groups)
    leaves = measured(first)
    if not leaves:
        even_weights(layers, probe, list(sample))
        return 0
    n_measured = len(leaves)
    per_head = {kind: sum(e[kind] for _, e in leaves) / sum(n_heads(part) for part, _ in leaves) for kind in sample}
    leaves += [(part, {kind: n_heads(part) * x for kind, x in per_head.items()}) for part in first[n_measured:]]
    while n_measured >= len(first) and (left := [leaf for leaf in leaves if len(divided(leaf[0])) > 1]):
        total = {kind: sum(e[kind] for _, e in leaves) or 1.0 for kind in sample}
        most = max(left, key=lambda leaf: sum(shares[kind] * e / total[kind] for kind, e in leaf[1].items()))
        pieces = divided(most[0])
        found = measured(pieces)
        if len(found) < len(pieces):
            break
        leaves = [leaf for leaf in leaves if leaf is not most] + found
        n_measured += len(found) - 1
    total = {kind: sum(e[kind] for _, e in leaves) or 1.0 for kind in sample}
    n_all = sum(n_heads(part) for part, _ in leaves)
    # A part whose rounding did not show on a short text is not free.
    raised = [{kind: max(e[kind] / total[kind], n_heads(part) / (20 * n_all)) for kind in total} for part, e in leaves]
    norm = {kind: sum(share[kind] for share in raised) for kind in total}
    _set_weights(layers, probe, [part for part, _ in leaves], [{kind: x / norm[kind] for kind, x in share.items()} for share in raised])
    return n_measured


def even_weights(layers: Sequence[Tables | None], probe: Sequence[LayerProfile | None], kinds: Sequence[str]) -> None:
    """Weights with which every layer's keys and values do the same harm at the formats of `probe`: where nothing of it was measured."""
    parts = parts_of(layers, probe, len(layers))
    _set_weights(layers, probe, parts, [dict.fromkeys(kinds, 1 / len(parts)) for _ in parts])


def _set_weights(
    layers: Sequence[Tables | None], probe: Sequence[LayerProfile | None], parts: Sequence[Part], shares: Sequence[Mapping[str, float]]
) -> None:
    """shares: of each part in the harm of all, by kind of text."""
    n_all = sum(map(n_heads, parts))
    for (is_value, piece), share in zip(parts, shares, strict=True):
        error = 0.0
        for i, heads in piece:
            tables, formats = layers[i], _formats_of(layers[i], probe[i])[is_value]
            assert tables is not None
            (tables.value_weight if is_value else tables.key_weight)[heads] = 1.0
            error += sum(value_harm(tables, h, formats[h].bits) if is_value else key_harm(tables, h, formats[h]) for h in heads)  # type: ignore
        for i, heads in piece:
            tables = layers[i]
            assert tables is not None
            weight, even, kinds = (
                (tables.value_weight, tables.value_even, tables.value_kinds) if is_value else (tables.key_weight, tables.key_even, tables.key_kinds)
            )
            even[heads] = n_heads((is_value, piece)) / (n_all * error)
            for kind, part in share.items():
                kinds.setdefault(kind, np.ones(tables.n_heads))[heads] = part / error
            weight[heads] = np.mean([of[heads] for of in kinds.values()], axis=0)


def _formats_of(tables: Tables | None, profile: LayerProfile | None) -> tuple[list[KeyFormat], list[ValueFormat]]:
    assert tables is not None and profile is not None
    return head_formats(profile, tables.size_v)
