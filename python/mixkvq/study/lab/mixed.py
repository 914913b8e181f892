"""Our own page format in NumPy, with every parameter that we want to try: docs/codec-laboratory.md lists the options of `mixkvq:...`.

Without options it is the default preset, number for number what `mixkvq.core.reference` reads back from a record.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...core import reference
from ...core.errors import SettingsError
from ...core.page import Page
from ...core.reference import PAGE_CELLS
from . import kvarn
from ._base import Codec, Maker, Options, Rows, per_head
from ._tools import (
    HALF,
    UNIFORM_STEP,
    Array,
    between,
    between_twice,
    by_tokens,
    code_on,
    gaussian_levels,
    hadamard,
    half,
    inverse,
    mid_rise,
    min_max_dims,
    nearest,
    power_of_two,
    random_signs,
)

Order = NDArray[np.intp]

# ---- which channels matter -----------------------------------------------------------------------------------------------------------
# Each gets the page and the range of every channel and group, [n_heads, groups, D], and returns [n_heads, D].


def _spread(ranges: Array) -> Array:
    spread = np.zeros_like(ranges[:, 0])
    for g in range(ranges.shape[1]):  # in this order, as docs/format.md says
        spread = spread + ranges[:, g]
    return spread


def _queries(page: Page, square: bool = False) -> Array:
    q = page.q_sqr if square else page.q_abs
    return np.ones_like(page.rows[:, 0]) if q is None else np.asarray(q, np.float32)


SCORES: dict[str, Callable[[Page, Array], Array]] = {
    "A": lambda page, ranges: _queries(page) * _spread(ranges),
    "S": lambda page, ranges: _spread(ranges),
    "I": lambda page, ranges: _queries(page),
    "E": lambda page, ranges: _queries(page, square=True) * (ranges * ranges).sum(axis=1),
    "M": lambda page, ranges: np.abs(page.rows).mean(axis=1),
}

TIERS = re.compile(r"(?:(\d+)@)?(\d+)")
MOST_BITS = 8  # of a code; 16 stands for F16


@dataclass(frozen=True)
class Tiers:
    """Bits of the channels of a head by rank: (count of 128, bits), or bits that are dealt out page by page."""

    counts: tuple[tuple[int, int], ...] = ()
    mean: float | None = None

    def by_rank(self, size: int) -> NDArray[np.float32]:
        """[size]. Counts that add up to 128 are scaled to other head sizes, in quads, as presets are."""
        total = sum(n for n, _ in self.counts)
        counts = [n for n, _ in self.counts]
        if total != size:
            if total != PAGE_CELLS:
                raise SettingsError(f"K names {total} channels, but the head has {size}.")
            left = size
            for i, n in enumerate(counts):
                counts[i] = min(max(4 * round(n / total * size / 4), 4 if n else 0), left) if i < len(counts) - 1 else left
                left -= counts[i]
        return np.repeat(np.array([b for _, b in self.counts], np.float32), counts)

    @property
    def ordered(self) -> bool:
        """Whether a page keeps an order of its channels."""
        return self.mean is not None or len(self.counts) > 1


@dataclass(frozen=True)
class KeyOptions:
    """The options of keys; docs/codec-laboratory.md says what each means."""

    tiers: Tiers
    group: int
    nested: bool
    score: str
    static: bool
    prior: str
    queries: str
    pairs: str
    clip: float
    clip_bits: int
    search_bits: int
    refit: bool
    normed: bool
    rotated: bool
    power: float
    levels: bool


@dataclass(frozen=True)
class ValueOptions:
    """The options of values; docs/codec-laboratory.md says what each means."""

    bits: int
    group: int
    shared: int
    scale_bits: int
    mean_bits: int
    clip: float
    search: bool
    fit: str
    signs: int
    levels: bool


# ---- keys ----------------------------------------------------------------------------------------------------------------------------


class Keys:
    """The keys of a page. Keeps the order of the channels between pages if that is static."""

    def __init__(self, options: KeyOptions) -> None:
        self._o = options
        self._frozen: dict[tuple[int, int], tuple[int, Order]] = {}
        self._prior = _read_prior(options.prior) if options.prior else {}
        self._queries = _read_prior(options.queries, ranges=False) if options.queries else {}

    def __call__(self, page: Page) -> tuple[Rows, float]:
        """See `PageFunction`."""
        o, x = self._o, page.rows
        n_heads, n_tokens, size = x.shape
        if o.normed:
            token = half(kvarn.balance(x)[1])
            x = x / token
        groups = by_tokens(x, o.group)
        low, high = groups.min(axis=2) + np.float32(0), groups.max(axis=2) + np.float32(0)
        if o.nested:
            low, high = _nested(low, high)
        score, order = self._order(page, high - low)
        bits = self._bits(score, order)

        turned = bits == bits.min(axis=1, keepdims=True) if o.rotated else np.zeros_like(bits, dtype=bool)
        out = self._per_channel(groups, low, high, bits).reshape(x.shape)
        out = np.where(bits[:, None] == 16, x, out)
        codes = n_tokens * np.where(turned, 0, bits).sum(axis=1)
        coded = (~turned & (bits < 16)).sum(axis=1)
        total = codes + coded * (n_tokens // o.group * 8 + 2 * HALF if o.nested else n_tokens // o.group * 2 * HALF)
        if o.tiers.ordered and not o.static:
            total = total + 8 * size
        if o.rotated:
            part, part_bits = self._rotated(page, x, turned, bits)
            out = np.where(turned[:, None], part, out)
            total = total + part_bits
        if o.normed:
            out, total = out * token, total + n_tokens * HALF
        return reference.to_half(out).astype(np.float32), per_head(total, page)

    def _order(self, page: Page, ranges: Array) -> tuple[Array, Order]:
        """The score of every channel, and the channels from the most salient to the least."""
        o = self._o
        if page.layer in self._queries:
            page = replace(page, q_abs=self._queries[page.layer])
        score = SCORES[o.score](page, ranges)
        if page.layer in self._prior:
            score = self._prior[page.layer]
        if o.pairs:
            size = score.shape[1]
            partner = np.arange(size) ^ 1 if o.pairs == "near" else (np.arange(size) + size // 2) % size
            score = (score + score[:, partner]) / np.float32(2)
        order = np.argsort(-score, axis=1, kind="stable")
        if o.static:
            # The first page of a text decides; a page at or before that one begins another text.
            place = (page.layer, page.stream)
            first, frozen = self._frozen.get(place, (page.first_cell, order))
            if page.first_cell <= first:
                self._frozen[place] = (page.first_cell, order)
            else:
                order = frozen
        return score, order

    def _bits(self, score: Array, order: Order) -> Array:
        """Bits of each channel, [n_heads, D]."""
        tiers, (n_heads, size) = self._o.tiers, score.shape
        if tiers.mean is None:
            return np.take_along_axis(np.broadcast_to(tiers.by_rank(size), score.shape), np.argsort(order, axis=1), axis=1)
        # Greedy: from 2 bits up, the next bit goes where it lowers the expected error of the score the most. Gains fall with the bits, so
        # the largest gains of all are the ones that greed would take one by one.
        harm = (score if self._o.score == "E" else score * score)[..., None]
        step = 1 / (2.0 ** np.arange(2, MOST_BITS + 1) - 1) ** 2
        gains = (harm * (step[:-1] - step[1:])).reshape(n_heads, -1)
        n_steps = round((tiers.mean - 2) * size)
        taken = np.zeros(gains.shape, dtype=np.float32)
        np.put_along_axis(taken, np.argsort(-gains, axis=1, kind="stable")[:, :n_steps], 1, axis=1)
        steps: Array = taken.reshape(n_heads, size, -1).sum(axis=2)
        return 2 + steps

    def _per_channel(self, x: Array, low: Array, high: Array, bits: Array) -> Array:
        """x: [n_heads, groups, group, D]; low, high: [n_heads, groups, D]; bits: [n_heads, D]."""
        o = self._o
        b, low, high = np.minimum(bits, 15)[:, None, None], low[:, :, None], high[:, :, None]
        if o.clip < 1:
            cut = b <= o.clip_bits
            least, most = np.quantile(x, [1 - o.clip, o.clip], axis=2, keepdims=True).astype(np.float32)
            low, high = np.where(cut, least, low), np.where(cut, most, high)
        if o.search_bits:
            low, high = _least_error(x, low, high, b, b <= o.search_bits)
        if not o.refit:
            return between_twice(x, low, high, b)
        low, top = half(low), np.exp2(b) - 1
        code = code_on(x, low, half((high - low) / top), top)
        # Least squares: the best scale and minimum for the codes as they are.
        c_mean, x_mean = code.mean(axis=2, keepdims=True), x.mean(axis=2, keepdims=True)
        c, variance = code - c_mean, ((code - c_mean) ** 2).mean(axis=2, keepdims=True)
        scale = half((c * (x - x_mean)).mean(axis=2, keepdims=True) * inverse(variance))
        return half(x_mean - scale * c_mean) + code * scale

    def _rotated(self, page: Page, x: Array, turned: NDArray[np.bool_], bits: Array) -> tuple[Array, Array]:
        """The channels of the last tier: page mean subtracted, scaled by q^power, rotated together, one scale per token.

        The others count as zeros: a rotation of the whole head costs codes for all its coordinates, and is a fast one.
        """
        o, (n_heads, n_tokens, size) = self._o, x.shape
        b = int(bits.min())
        mean = half(x.mean(axis=1, keepdims=True))
        weight = np.ones((n_heads, 1, size), np.float32)
        if o.power:
            rms = np.sqrt(_queries(page, square=True))
            rms = np.maximum(rms, np.float32(1e-3) * rms.max(axis=1, keepdims=True) + np.float32(1e-30))
            weight = half((rms / np.exp(np.log(rms).mean(axis=1, keepdims=True))) ** np.float32(o.power))[:, None]
        y = hadamard(np.where(turned[:, None], (x - mean) * weight, np.float32(0)))
        y = _gaussian(y, np.sqrt((y * y).mean(axis=2, keepdims=True)), b, o.levels)
        per_channel = HALF * (1 + (o.power != 0)) * turned.sum(axis=1)
        return hadamard(y) / weight + mean, n_tokens * (size * b + HALF) + per_channel


def _nested(low: Array, high: Array) -> tuple[Array, Array]:
    """Ranges of groups, [n_heads, groups, D], as whole sixteenths of the page's range, outwards."""
    first = half(low.min(axis=1, keepdims=True))
    step = half((high.max(axis=1, keepdims=True) - first) / np.float32(16))
    below = np.clip(np.floor((low - first) * inverse(step)), 0, 15)
    above = np.clip(np.ceil((high - first) * inverse(step)), 1, 16)
    return first + below * step, first + above * step


def _least_error(x: Array, low: Array, high: Array, bits: Array, where: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Ranges drawn in around their middle by the factor, of a few, that reads back with the least squared error."""
    middle, width = (low + high) / 2, (high - low) / 2
    least = np.full_like(low, np.inf)
    best = np.ones_like(low)
    for part in np.array([1, 0.94, 0.88, 0.82, 0.76, 0.7, 0.62], np.float32):
        error = ((between(x, middle - part * width, middle + part * width, bits) - x) ** 2).sum(axis=2, keepdims=True)
        best = np.where(error < least, part, best)
        least = np.minimum(error, least)
    # Where nothing changes, the range stays the exact one.
    changed = where & (best < 1)
    return np.where(changed, middle - best * width, low), np.where(changed, middle + best * width, high)


def _read_prior(path: str, ranges: bool = True) -> dict[int, Array]:
    """What a profile has seen by layer: mean |q|, times mean range if it has it and `ranges`."""
    from ...core.profile import read_profile

    prior = {}
    for i, layer in enumerate(read_profile(path).layers):
        if layer is not None and layer.query_prior is not None:
            prior[i] = layer.query_prior * layer.key_range if ranges and layer.key_range is not None else layer.query_prior
    return prior


# ---- values --------------------------------------------------------------------------------------------------------------------------


def _gaussian(y: Array, sigma: Array, bits: int, levels: bool) -> Array:
    """Rotated numbers of deviation sigma there and back: the best uniform step, or the Lloyd-Max levels. The scale is in F16."""
    if levels:
        scale = half(sigma)
        return nearest(y * inverse(scale), gaussian_levels(bits)) * scale
    scale = half(sigma * np.float32(UNIFORM_STEP[bits]))
    return mid_rise(y, scale, bits) * scale


def values(o: ValueOptions) -> Callable[[Page], tuple[Rows, float]]:
    """The codec of values."""
    def function(page: Page) -> tuple[Rows, float]:
        x = page.rows
        n_heads, n_tokens, size = x.shape
        if o.bits == 16:
            return x, 16.0 * x.size
        if o.group:
            y = min_max_dims(x, o.bits, o.group, o.clip, between_twice)
            bits = n_tokens * (size * o.bits + -(-size // o.group) * 2 * HALF)
        else:
            block = power_of_two(size)
            signs = [random_signs(size, i) for i in range(o.signs)]

            def rotated(y: Array) -> Array:
                for sign in signs[1:]:
                    y = reference.rotate(y * sign, block)
                return reference.rotate(y * signs[0] if signs else y, block)

            # Token by token, as docs/format.md says.
            total = np.cumsum(np.where(page.valid[:, None], x, np.float32(0)), axis=1, dtype=np.float32)[:, -1:]
            count = max(int(page.valid.sum()), 1)
            exact = rotated(np.asarray(total / count, np.float32))
            mean = _stored_mean(exact, o.mean_bits)
            if o.mean_bits == 8:
                squares = np.cumsum(np.where(page.valid[:, None], x * x, np.float32(0)), axis=1, dtype=np.float32)[:, -1]
                rms = np.sqrt(reference.sum_of_lanes(squares) / np.float32(count * size))[..., None]
                mean = np.where(np.abs(exact) < rms * reference.LEAST_MEAN, np.float32(0), mean)
            y = reference.rotate(mean + _coded(rotated(x) - mean, o), block)
            for i, sign in enumerate(signs):
                y = (reference.rotate(y, block) if i else y) * sign
            bits = n_tokens * size * o.bits + n_tokens // o.shared * o.scale_bits + size * o.mean_bits
        return reference.to_half(y).astype(np.float32), per_head(bits, page)

    return function


def _stored_mean(mean: Array, bits: int) -> Array:
    """In F16, in its upper byte, or not at all."""
    if not bits:
        return np.zeros_like(mean)
    return half(mean) if bits == 16 else reference.unpack_mean(reference.pack_mean(mean))


def _stored_scale(scale: Array, bits: int, upwards: bool = False) -> Array:
    return half(scale) if bits == 16 else reference.unpack_scale(reference.pack_scale(scale, upwards))


def _dot(a: Array, b: Array) -> Array:
    product: Array = (a * b).sum(axis=2, keepdims=True)
    return product


# What the scale of rotated rows y may be once their codes c are known. Codes of least error are shorter than the row, and attention, which
# averages away what errors have no direction, is left with that.
FITS: dict[str, Callable[[Array, Array], Array]] = {
    "ls": lambda y, c: _dot(c, y) * inverse(_dot(c, c)),  # least squared error
    "length": lambda y, c: np.sqrt(_dot(y, y) * inverse(_dot(c, c))),  # as long as the row
    "dot": lambda y, c: _dot(y, y) * inverse(_dot(c, y)),  # as far along the row as the row itself
}


def _coded(y: Array, o: ValueOptions) -> Array:
    """Rotated rows there and back."""
    if o.bits == 8:
        scale = _stored_scale(np.abs(y).max(axis=2, keepdims=True) / np.float32(127.5), o.scale_bits, upwards=True)
        return mid_rise(y, scale, 8) * scale
    n_heads, n_tokens, size = y.shape
    # In the order of additions that docs/format.md fixes.
    mean_square = reference.sum_of_lanes(np.square(y.reshape(-1, size))).reshape(n_heads, n_tokens, 1) / np.float32(size)
    if o.shared > 1:
        mean_square = np.repeat(mean_square.reshape(n_heads, -1, o.shared).mean(axis=2), o.shared, axis=1)[..., None]
    sigma = np.sqrt(mean_square)
    unit = gaussian_levels(o.bits) if o.levels else None
    step = np.float32(1 if o.levels else UNIFORM_STEP[o.bits])
    if o.clip < 1:
        sigma = np.quantile(np.abs(y), o.clip, axis=2, keepdims=True).astype(np.float32) / (2 ** (o.bits - 1) * step)

    def code(scale: Array) -> Array:
        return nearest(y * inverse(scale), unit) if unit is not None else mid_rise(y, scale, o.bits)

    scale = _stored_scale(sigma * step, o.scale_bits)
    if o.search:
        least, best = np.full_like(scale, np.inf), scale
        for factor in np.array([0.8, 0.87, 0.94, 1, 1.06, 1.13, 1.2], np.float32):
            tried = _stored_scale(scale * factor, o.scale_bits)
            error = ((code(tried) * tried - y) ** 2).sum(axis=2, keepdims=True)
            best, least = np.where(error < least, tried, best), np.minimum(error, least)
        scale = best
    c = code(scale)
    return c * (_stored_scale(FITS[o.fit](y, c), o.scale_bits) if o.fit else scale)


# ---- names ---------------------------------------------------------------------------------------------------------------------------


def _tiers(options: Options, text: str) -> Tiers:
    if text.startswith("auto@"):
        try:
            mean = float(text[5:])
        except ValueError:
            mean = math.nan
        if not 2 <= mean <= MOST_BITS:
            raise options.fail(f"K is {text!r}, but auto@ is followed by the mean bits of a code, 2 to {MOST_BITS}")
        return Tiers(mean=mean)
    counts = []
    parts = text.split("+")
    for part in parts:
        match = TIERS.fullmatch(part)
        if not match or int(match[2]) not in (*range(1, MOST_BITS + 1), 16) or (match[1] is None and len(parts) > 1):
            raise options.fail(f"K is {text!r}, but it must be like 32@4+64@3+32@2 (channels@bits, most salient first), 3, or auto@3")
        counts.append((int(match[1] or PAGE_CELLS), int(match[2])))
    return Tiers(tuple(counts))


def _limit(options: Options, key: str) -> int:
    """`key`: channels of any bits; `key=B`: channels of at most B bits; absent: none."""
    return options.integer(key, 0, range(1, MOST_BITS + 1), bare=MOST_BITS)


def make(name: str, options: Options) -> Codec:
    """The codec `mixkvq` with its options. Raises SettingsError for what does not go together."""
    tiers = options.text("K", "32@4+64@3+32@2")
    score = options.text("score", "A", [*SCORES, "static"])
    prior = options.text("prior", "")
    key_options = KeyOptions(
        tiers=_tiers(options, tiers),
        group=options.integer("G", PAGE_CELLS, (32, 64, 128)),
        nested=options.flag("nested"),
        score="A" if score == "static" else score,
        static=options.flag("static") or score == "static" or bool(prior),
        prior=prior,
        queries=options.text("queries", ""),
        pairs=options.text("pairs", "", ["", "near", "far"]),
        clip=options.number("clip", 1, 0.5, 1),
        clip_bits=options.integer("clipbits", MOST_BITS, range(1, MOST_BITS + 1)),
        search_bits=_limit(options, "mse"),
        refit=options.flag("ls"),
        normed=options.flag("norm"),
        rotated=options.flag("rotk"),
        power=options.number("qpow", 0, -2, 2),
        levels=options.flag("klm"),
    )
    value_options = ValueOptions(
        bits=options.integer("V", 3, (1, 2, 3, 4, 5, 6, 8, 16)),
        group=options.integer("vg", 0, (0, 16, 32, 64, 128)),
        shared=options.integer("vshare", 1, (1, 2, 4, 8)),
        scale_bits=options.integer("vscale", 8, (8, 16)),
        mean_bits=options.integer("vmean", 8, (0, 8, 16)),
        clip=options.number("vclip", 1, 0.5, 1),
        search=options.flag("vmse"),
        fit=options.text("vfit", "", ["", *FITS]),
        signs=options.integer("vsign", 0, (1, 2), bare=1),
        levels=options.flag("vlm"),
    )
    _check(options, key_options, value_options)
    return Codec(name, f"our page: key channels {tiers} by {score}, {value_options.bits}-bit values", Keys(key_options), values(value_options))


def _check(options: Options, k: KeyOptions, v: ValueOptions) -> None:
    """Raises SettingsError for what does not go together."""
    lowest = min((b for _, b in k.tiers.counts), default=2)
    if k.rotated and (k.tiers.mean is not None or lowest not in UNIFORM_STEP):
        raise options.fail("rotk needs a last tier of 1 to 6 bits")
    if (k.power or k.levels) and not k.rotated:
        raise options.fail("qpow and klm are for rotated keys; add rotk")
    if v.group and (v.shared > 1 or v.mean_bits != 8 or v.scale_bits != 8 or v.search or v.fit or v.signs or v.levels):
        raise options.fail("vshare, vmean, vscale, vmse, vfit, vsign and vlm are for rotated values, without vg")
    if v.bits in (8, 16) and (v.shared > 1 or v.search or v.fit or v.levels or v.clip < 1) and not v.group:
        raise options.fail("8-bit values scale with the loudest number and have none of vshare, vclip, vmse, vfit, vlm")


MAKERS: dict[str, Maker] = {"mixkvq": make}
