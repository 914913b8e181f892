"""For the tests of the reference and of the kernels: golden cases, and strategies for formats and pages."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from mixkvq.core.reference import KeyFormat, ValueFormat


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


golden = _load(Path(__file__).parents[1] / "golden" / "make_golden.py")

# The awkward ones: not a power of two, one vector too short, the ends of the range.
HEAD_SIZES = (32, 40, 48, 56, 64, 72, 80, 96, 112, 120, 128, 136, 192, 200, 248, 256)

seeds = st.integers(0, 2**32 - 1)
finite_halfs = st.floats(width=16, allow_nan=False, allow_infinity=False)


def head_sizes(largest=256):
    return st.sampled_from([size for size in HEAD_SIZES if size <= largest])


@st.composite
def key_formats(draw, largest=256):
    size = draw(head_sizes(largest))
    cuts = sorted(draw(st.lists(st.integers(0, size // 4), min_size=4, max_size=4)))
    quads = np.diff([0, *cuts, size // 4])
    return KeyFormat(size, tuple(4 * int(n) for n in quads), draw(st.sampled_from([32, 64, 128])))


def value_formats(largest=256):
    return st.builds(ValueFormat, head_sizes(largest), st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 32, 64]))


@st.composite
def rows(draw, head_size):
    """A page of some golden kind with up to four numbers replaced."""
    page = golden.page(draw(st.sampled_from(golden.PAGE_KINDS)), head_size, draw(seeds)).copy()
    cell, channel = st.integers(0, 127), st.integers(0, head_size - 1)
    for t, d, x in draw(st.lists(st.tuples(cell, channel, finite_halfs), max_size=4)):
        page[t, d] = x
    return page


@st.composite
def valid_cells(draw):
    return golden.valid_cells(draw(st.sampled_from(golden.VALID_KINDS)), draw(seeds))


@st.composite
def key_pages(draw, largest=256):
    """Format, rows, importance and valid cells of a key page."""
    fmt = draw(key_formats(largest))
    importance = golden.importances(draw(st.sampled_from(golden.IMPORTANCE_KINDS)), fmt.head_size, draw(seeds))
    return fmt, draw(rows(fmt.head_size)), importance, draw(valid_cells())


@st.composite
def value_pages(draw, largest=256):
    """Format, rows and valid cells of a value page."""
    fmt = draw(value_formats(largest))
    return fmt, draw(rows(fmt.head_size)), draw(valid_cells())
