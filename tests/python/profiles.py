"""For the tests of profiles: strategies, GGUF files written key by key, and what a refusal looks like."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import strategies as st

import bridge
from mixkvq.core.profile import LayerProfile, Profile

GOLDEN = Path(__file__).parents[1] / "golden" / "profile_v1.gguf"
"""Written by the last version of MixKVQ that wrote version 1 of the format."""

GOLDEN_LAYERS = [
    LayerProfile(
        np.array([[4, 8, 16, 20, 16, 32], [0, 0, 64, 0, 0, 128]], np.int32),
        np.array([[2, 0], [4, 32]], np.int32),
        ((np.arange(128, dtype=np.float32) * 7 % 31 + 1) / 16).reshape(2, 64),
    ),
    None,
    LayerProfile(np.array([[0, 64, 0, 0, 0, 64]], np.int32), np.array([[8, 64]], np.int32)),
]

statistics = st.floats(0, 2.0**96, width=32)
lines = st.text(st.characters(codec="utf-8"), max_size=20).filter(str.isprintable)


@st.composite
def layers(draw):
    size = 8 * draw(st.integers(4, 32))
    n = draw(st.integers(1, 4))
    tiers = []
    for _ in range(n):
        cuts = sorted(draw(st.lists(st.integers(0, size // 4), min_size=4, max_size=4)))
        tiers.append([*(4 * np.diff([0, *cuts, size // 4])), draw(st.sampled_from([32, 64, 128]))])
    values = draw(st.lists(st.tuples(st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 32, 64])), min_size=n, max_size=n))

    def channels():
        few = draw(st.none() | st.lists(statistics, min_size=1, max_size=5))
        return None if few is None else np.resize(np.array(few, np.float32), (n, size))

    return LayerProfile(np.array(tiers, np.int32), np.array(values, np.int32), channels(), channels())


figures = st.floats(-1e9, 1e9, allow_nan=False) | st.integers(0, 10**9)
measurements = st.fixed_dictionaries(
    {"text": lines, "kld_mean": figures},
    optional={"tokens": st.integers(0, 10**9), "style": lines, "same_top": figures, "against": lines, "note": st.none() | lines},
)


@st.composite
def profiles(draw):
    found = draw(st.lists(st.none() | layers(), min_size=1, max_size=4).filter(any))
    tokens = st.none() | st.integers(0, 1 << 20)
    return Profile(
        draw(st.text("0123456789abcdef", min_size=32, max_size=32)),
        found,
        draw(tokens),
        draw(tokens),
        measured=draw(st.lists(measurements, max_size=3)),
        made_by=draw(lines),
        body_bits=draw(st.none() | st.floats(0.125, 32, width=32)),
    )


def same(a, b):
    """Whether two profiles say the same, wherever they come from."""
    for field in dataclasses.fields(Profile):
        if field.name not in ("layers", "path", "embedded", "version") and getattr(a, field.name) != getattr(b, field.name):
            return False
    return len(a.layers) == len(b.layers) and all(same_layer(*pair) for pair in zip(a.layers, b.layers))


def same_layer(a, b):
    if a is None or b is None:
        return a is b
    return all(
        (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y))
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def is_sentence(error):
    text = str(error)
    return text.endswith(".") and not text.endswith("..") and "\n" not in text and ": ." not in text


@contextlib.contextmanager
def refused(words="", kind=bridge.ProfileError):
    with pytest.raises(kind, match=words) as e:
        yield
    assert is_sentence(e.value), e.value


def write_gguf(path, keys, tensors=None, arch="mixkvq"):
    """A GGUF file. keys: name -> (type, value), or (ARRAY, element type, list)."""
    writer = GGUFWriter(path, arch=arch)
    for name, (kind, *rest) in keys.items():
        if kind == GGUFValueType.ARRAY:
            writer.add_key_value(name, rest[1], kind, sub_type=rest[0])
        else:
            writer.add_key_value(name, rest[0], kind)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
