"""Profiles as the backend reads them by itself (MIXKVQ_PROFILE, bridge.attach without a model): both versions, both forms, and every kind of damage.

The backend's reader is C++ and separate from mixkvq.core.profile, which looks at more. So: what Python accepts the backend accepts, with the same
formats, and whatever it refuses it refuses with one sentence.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
import tiny_models
from contexts import Context, Model, devices, random_tokens
from gguf import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_probe import LINUX, measure
from profiles import GOLDEN, GOLDEN_LAYERS, profiles, write_gguf

import bridge
from bridge import Kv
from bridge import backend as adapter
from mixkvq.core.profile import LayerProfile, Profile, read_profile, write_keys, write_profile

T = GGUFValueType
FORMS = {"side-car": write_profile, "in keys": write_keys}

def begin(path):
    """What the backend says of a profile: None if it takes it, else its sentence."""
    try:
        adapter.backend().native.begin(profile=str(path)).end()
    except ValueError as e:
        text = str(e)
        assert text and "\n" not in text and not text.endswith(".") and "gguf" in text.lower(), text
        return text
    return None


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles") / "p.gguf"


# --- what is read ---


@pytest.mark.parametrize("form", FORMS)
@given(profile=profiles())
def test_every_profile_that_python_writes_is_taken(path, form, profile):
    FORMS[form](path, profile)
    assert begin(path) is None


def test_version_1_is_taken():
    assert begin(GOLDEN) is None


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("form", FORMS)
def test_the_formats_are_those_of_the_file(tmp_path, form, device):
    """Seen in the cache: tiers and bits of each layer, and the query prior before the first query."""
    tiny = Model(tiny_models.llama(tmp_path / "m.gguf"), True, device)
    rng = np.random.default_rng(2)
    tiers = [np.array([t] * 2, np.int32) for t in ([0, 8, 16, 20, 20, 64], [4, 0, 0, 0, 60, 32])]
    values = [np.array([v] * 2, np.int32) for v in ([4, 32], [2, 0])]
    prior = np.exp(rng.normal(0, 2, (2, 64))).astype(np.float32)
    layers = [LayerProfile(tiers[0], values[0], prior, prior * 3), LayerProfile(tiers[1], values[1])]
    FORMS[form](tmp_path / "p.gguf", Profile("0" * 32, layers, window=0, sinks=0, made_by="a test"))
    states = []
    for with_prior in (True, False):
        if not with_prior:
            layers[0].query_prior = None
            FORMS[form](tmp_path / "p.gguf", Profile("0" * 32, layers, window=0, sinks=0))
        with Context(tiny, Kv(profile=str(tmp_path / "p.gguf")), head_sizes_known=False) as context, Context(tiny, Kv(sinks=1 << 20)) as exact:
            exact.feed(random_tokens(400))
            state = exact.save(0)
            assert context.load(state, 0) == len(state)
            for layer in context.layers():
                i = layer["layer"]
                assert layer["pages_packed"] == 3 and layer["kind"] == "packed"
                if layer["is_value"]:
                    assert (layer["value_bits"], layer["group"]) == tuple(values[i][0])
                else:
                    assert (*layer["tiers"], layer["group"]) == tuple(tiers[i][0])
            states.append(context.save(0))
    assert states[0] != states[1]  # other channels had more bits
    tiny.close()


def test_keys_come_before_tensors(tmp_path):
    """A file with both is what a model with an embedded profile would be if its weights had our names."""
    good = dict(zip(("blk.0.tiers", "blk.0.values"), (GOLDEN_LAYERS[0].tiers, GOLDEN_LAYERS[0].values)))
    keys = {"mixkvq.profile.version": (T.UINT32, 2), "mixkvq.profile.layer_count": (T.UINT32, 1)}
    arrays = {f"mixkvq.profile.{name}": (T.ARRAY, T.INT32, array.ravel().tolist()) for name, array in good.items()}
    bad = {name: np.full_like(array, 7) for name, array in good.items()}
    assert begin(write_gguf(tmp_path / "a.gguf", {**keys, **arrays}, bad)) is None
    assert "blk.0.tiers and values, head 0" in begin(write_gguf(tmp_path / "b.gguf", keys, bad))


@LINUX
def test_the_tensors_of_a_model_are_not_read(tmp_path):
    """A model of 8 GB, most of it a hole in the file: its profile is there at once."""
    path, name = tmp_path / "large.gguf", b"token_embd.weight"
    write_gguf(path, keys(), {name.decode(): np.zeros(32, np.float32)})
    raw = bytearray(path.read_bytes())
    at = raw.index(name) + len(name) + 4  # after the number of dimensions
    assert struct.unpack_from("<Q", raw, at) == (32,)
    struct.pack_into("<Q", raw, at, 1 << 31)
    with open(path, "wb") as f:
        f.write(raw)
        f.truncate(len(raw) - 4 * 32 + (4 << 31))
    assert begin(path) is None
    taken = measure("bytes_read_of_a_profile", str(path))
    assert taken["read"] < 1 << 20 and taken["grown"] < 8 << 20


# --- what is refused ---


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(max_examples=400)
def test_damaged_files_are_one_sentence(path, form, data):
    base = path.with_name(f"{form}.base")
    if not base.exists():
        layers = [LayerProfile(*(None if a is None else a.copy() for a in vars(layer).values())) if layer else None for layer in GOLDEN_LAYERS]
        layers[0].key_range = np.ones((2, 64), np.float32)
        FORMS[form](base, Profile("0" * 32, layers, 64, 128, measured=[{"text": "a", "kld_mean": 0.5}], made_by="me", body_bits=3.5))
    raw = bytearray(base.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=5)):
        raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
    refused = begin(path)
    try:
        read_profile(path)
    except bridge.ProfileError:
        return
    assert refused is None, refused


def keys(**changes):
    """The keys of an embedded profile of one layer, with changes (None: left out)."""
    found = {
        "version": (T.UINT32, 2),
        "layer_count": (T.UINT32, 1),
        "tiers": (T.ARRAY, T.INT32, [0, 0, 32, 0, 32, 128]),
        "values": (T.ARRAY, T.INT32, [3, 0]),
        **changes,
    }
    blk = ("tiers", "values", "query_prior", "key_range")
    return {f"mixkvq.profile.{'blk.0.' if name in blk else ''}{name}": value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"version": (T.UINT32, 1)}, None),
        ({"key_range": (T.ARRAY, T.FLOAT32, [-1.0])}, None),  # not ours to judge
        ({"query_prior": (T.ARRAY, T.FLOAT32, [0.5] * 64)}, None),
        ({"version": (T.UINT32, 3)}, "has version 3, this library reads versions 1 and 2; install a newer mixkvq"),
        ({"version": (T.UINT32, 0)}, "has version 0"),
        ({"version": (T.STRING, "2")}, "is not a MixKVQ profile"),
        ({"version": (T.ARRAY, T.UINT32, [2])}, "is not a MixKVQ profile"),
        ({"version": None}, "is not a MixKVQ profile"),
        ({"layer_count": None}, "is not a MixKVQ profile"),
        ({"layer_count": (T.UINT32, 0)}, "names 0 layers"),
        ({"layer_count": (T.UINT32, 2**32 - 1)}, "names 4294967295 layers"),
        ({"tiers": None, "values": None}, "says nothing about any layer"),
        ({"tiers": None}, "different numbers of heads"),
        ({"values": None}, "different numbers of heads"),
        ({"values": (T.ARRAY, T.INT32, [3, 0, 3, 0])}, "different numbers of heads"),
        ({"tiers": (T.ARRAY, T.INT32, [0, 0, 64, 0, 0])}, "different numbers of heads"),
        ({"tiers": (T.ARRAY, T.INT64, [0, 0, 64, 0, 0, 128])}, "has no array of int32 under mixkvq.profile.blk.0.tiers"),
        ({"tiers": (T.ARRAY, T.STRING, ["0"] * 6)}, "has no array of int32"),
        ({"tiers": (T.INT32, 5)}, "has no array of int32"),
        ({"query_prior": (T.ARRAY, T.INT32, [1] * 64)}, "has no array of float32"),
        ({"tiers": (T.ARRAY, T.INT32, [0, 0, 30, 0, 34, 128])}, "head 0: "),
        ({"tiers": (T.ARRAY, T.INT32, [0, 0, 2**31 - 4, 0, 2**31 - 4, 128])}, "head 0: "),
        ({"tiers": (T.ARRAY, T.INT32, [-(2**31), 0, 64, 0, 0, 128])}, "head 0: "),
        ({"tiers": (T.ARRAY, T.INT32, [0, 0, 64, 0, 0, 0])}, "head 0: "),
        ({"values": (T.ARRAY, T.INT32, [5, 0])}, "head 0: "),
        ({"values": (T.ARRAY, T.INT32, [3, -1])}, "head 0: "),
        ({"query_prior": (T.ARRAY, T.FLOAT32, [1.0] * 63)}, "query_prior of another size"),
        ({"query_prior": (T.ARRAY, T.FLOAT32, [1.0] * 63 + [-1.0])}, "negative or infinite"),
        ({"query_prior": (T.ARRAY, T.FLOAT32, [1.0] * 63 + [float("nan")])}, "negative or infinite"),
        ({"window": (T.INT32, 1 << 20), "sinks": (T.INT32, 0)}, None),
        ({"window": (T.INT32, (1 << 20) + 1)}, "window is not a number of tokens"),
        ({"window": (T.INT32, 2**31 - 1)}, "window is not a number of tokens"),
        ({"sinks": (T.INT32, -1)}, "sinks is not a number of tokens"),
        ({"sinks": (T.UINT32, 128)}, "sinks is not a number of tokens"),
    ],
    ids=str,
)
def test_wrong_keys(tmp_path, changes, words):
    said = begin(write_gguf(tmp_path / "p.gguf", keys(**changes)))
    assert said is None if words is None else said is not None and words in said, said


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"tiers": np.zeros((1, 6), np.float32)}, "damaged tensor blk.0.tiers"),
        ({"tiers": np.zeros((1, 6), np.int64)}, "damaged tensor blk.0.tiers"),
        ({"tiers": np.zeros(5 << 20, np.int32)}, "damaged tensor blk.0.tiers"),  # more than any layer has
        ({"query_prior": np.ones((1, 64), np.float16)}, "damaged tensor blk.0.query_prior"),
        ({"query_prior": np.ones((1, 32), np.float32)}, "query_prior of another size"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_tensors(tmp_path, tensors, words):
    tensors = {"tiers": np.array([[0, 0, 32, 0, 32, 128]], np.int32), "values": np.array([[3, 0]], np.int32), **tensors}
    path = write_gguf(tmp_path / "p.gguf", keys(tiers=None, values=None), {f"blk.0.{name}": array for name, array in tensors.items()})
    assert words in begin(path)


def test_a_tensor_that_is_cut_off(tmp_path):
    write_profile(tmp_path / "p.gguf", Profile("0" * 32, GOLDEN_LAYERS))
    raw = (tmp_path / "p.gguf").read_bytes()
    for size in range(len(raw) - 600, len(raw), 37):
        (tmp_path / "p.gguf").write_bytes(raw[:size])
        said = begin(tmp_path / "p.gguf")
        assert said is None or "damaged" in said  # None: only padding is missing


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.gguf"):
        try:
            adapter.backend().native.begin(profile=str(path))
        except ValueError as e:
            assert str(e) == f"the profile {path} cannot be read"
        else:
            raise AssertionError(path)
    (tmp_path / "text.gguf").write_text("not a profile")
    assert begin(tmp_path / "text.gguf").endswith("is not a GGUF file")
