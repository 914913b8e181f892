"""What a codec is, and what all of them share."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import SettingsError
from ...core.page import Page
from ...core.reference import PAGE_CELLS

Rows = NDArray[np.float32]
PageFunction = Callable[[Page], tuple[Rows, float]]
"""Takes a page, returns what it reads back as (float32 [n_heads, 128, head_size]) and the bits that all of it takes."""


@dataclass(frozen=True)
class Codec:
    """A way to store the pages of a cache.

    name: as given to `get`.
    description: one line.
    keys, values: see `PageFunction`. Every cell of the page they are given holds a token (`codec_function` sees to that).
    window, sinks: recent and first tokens that the method keeps in F16 where it is used as published; None: it does not say.
    """

    name: str
    description: str
    keys: PageFunction
    values: PageFunction
    window: int | None = None
    sinks: int | None = None


HOLE_GROUP = 32  # cells: the smallest group of tokens that shares a scale


def codec_function(codec: Codec) -> PageFunction:
    """The function that `bridge.Llama(model, codec=...)` calls for every page that settles."""

    def function(page: Page) -> tuple[Rows, float]:
        page = fill_holes(page)
        return codec.values(page) if page.is_value else codec.keys(page)

    return function


def fill_holes(page: Page) -> Page:
    """The page with another token repeated in every cell that holds none, so that no codec needs to know of such cells.

    The token is one of the same HOLE_GROUP cells if there is one, so that no group of tokens gets a range that it does not have; else the first of
    the page. A page without any token is all zeros.
    """
    if page.valid.all():
        return page
    if not page.valid.any():
        return dataclasses.replace(page, rows=np.zeros_like(page.rows))
    cells = np.arange(PAGE_CELLS).reshape(-1, HOLE_GROUP)
    valid = page.valid.reshape(cells.shape)
    first = np.where(valid.any(axis=1), cells[:, 0] + valid.argmax(axis=1), page.valid.argmax())
    return dataclasses.replace(page, rows=page.rows[:, np.where(valid, cells, first[:, None]).ravel()])


class Options:
    """The part of a name behind its first colon: `key=value` or `flag`, separated by commas or colons.

    Each `take` names an option that the codec has; `finish` refuses the ones that nobody took.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._given: dict[str, str | None] = {}
        self._known: list[str] = []
        for part in filter(None, re.split("[,:]", text)):
            key, equals, value = part.strip().partition("=")
            if key in self._given:
                raise SettingsError(f"The codec {name!r} names {key} twice.")
            self._given[key] = value if equals else None

    def flag(self, key: str) -> bool:
        value = self._take(key, None)
        if value is not None:
            raise SettingsError(f"In {self._name!r}, {key} takes no value.")
        return key in self._given

    def text(self, key: str, default: str, choices: Sequence[str] = ()) -> str:
        value = self._take(key, default)
        if value is None or (choices and value not in choices):
            raise SettingsError(f"In {self._name!r}, {key} must be {' or '.join(filter(None, choices)) if choices else 'given a value'}.")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self._take(key, str(default))
        try:
            number = float(value or "")
        except ValueError:
            number = np.nan
        if not low <= number <= high:
            raise SettingsError(f"In {self._name!r}, {key} is {value!r}, but it must be a number from {low:g} to {high:g}.")
        return number

    def integer(self, key: str, default: int, choices: Sequence[int], bare: int | None = None) -> int:
        """bare: what the option means without a value."""
        if bare is not None and self._given.get(key, "") is None:
            self._known.append(key)
            return bare
        if key not in self._given:
            self._known.append(key)
            return default
        return int(self.text(key, "", [str(c) for c in choices]))

    def has(self, key: str) -> bool:
        return key in self._given

    def fail(self, what: str) -> SettingsError:
        return SettingsError(f"In {self._name!r}, {what}.")

    def finish(self) -> None:
        """Raises SettingsError if something was given that the codec does not have."""
        for key in self._given:
            if key not in self._known:
                has = f"its options are {', '.join(self._known)}" if self._known else "it has none"
                raise SettingsError(f"The codec {self._name!r} has no option {key!r}; {has}.")

    def _take(self, key: str, default: str | None) -> str | None:
        self._known.append(key)
        return self._given.get(key, default)


Maker = Callable[[str, Options], Codec]
"""Makes a codec from the whole name and its options."""


def fixed(codec: Codec) -> Maker:
    """The maker of a codec that has no options and keeps no state."""

    def make(name: str, options: Options) -> Codec:
        return codec

    return make


def per_head(bits: Any, page: Page) -> float:
    """Bits of all heads of a page, each record padded to 64 bytes as docs/format.md has it. bits: of a head, or [n_heads]."""
    n_heads = page.rows.shape[0]
    return float(np.sum(np.ceil(np.broadcast_to(bits, n_heads) / 512) * 512))


def sample_page(head_size: int = 128, is_value: bool = False, n_heads: int = 2, seed: int = 0) -> Page:
    """A full page of made-up rows, for trying a codec without a model.

    Channels of keys differ in spread and offset, as they do after RoPE; tokens differ in length; what queries look at differs by channel.
    """
    rng = np.random.default_rng([seed, head_size, is_value])
    x = rng.standard_normal((n_heads, PAGE_CELLS, head_size)) * rng.lognormal(0, 0.2, (n_heads, PAGE_CELLS, 1))
    q_abs = q_sqr = None
    if not is_value:
        x = x * rng.lognormal(0, 0.7, (n_heads, 1, head_size)) + 2 * rng.standard_normal((n_heads, 1, head_size))
        q_abs = rng.lognormal(0, 0.5, (n_heads, head_size)).astype(np.float32)
        q_sqr = q_abs**2 * np.float32(math.pi / 2)
    rows = x.astype(np.float16).astype(np.float32)
    rows.flags.writeable = False
    return Page(
        layer=0, is_value=is_value, stream=0, first_cell=PAGE_CELLS, rows=rows, valid=np.ones(PAGE_CELLS, dtype=bool), q_abs=q_abs, q_sqr=q_sqr
    )
