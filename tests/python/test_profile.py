"""Profiles as files: both layouts, every version, JSON, and whatever a damaged or foreign file may hold."""

from __future__ import annotations

import copy
import json
import struct

import numpy as np
import pytest
import tiny_models
from gguf import GGUFValueType as T
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import GOLDEN, GOLDEN_LAYERS, is_sentence, profiles, refused, same, same_layer, write_gguf

import bridge
from mixkvq.core.model_file import built_in_model, open_model
from mixkvq.core.native import native
from mixkvq.core.profile import LayerProfile, Profile, from_json, read_profile, to_json, uniform_profile, write_keys, write_profile

MODEL = str(built_in_model())
FORMS = {"side-car": write_profile, "embedded": write_keys}
in_folder = settings(max_examples=40)


# --- round trips ---


@pytest.mark.parametrize("form", FORMS)
@given(profile=profiles())
@in_folder
def test_written_and_read(tmp_path, form, profile):
    path = tmp_path / "p.gguf"
    FORMS[form](path, profile)
    back = read_profile(path)
    assert same(back, profile)
    assert back.path == str(path) and back.version == 2 and back.embedded is (form == "embedded")
    assert [p.name for p in tmp_path.iterdir()] == ["p.gguf"]


@given(profile=profiles())
@in_folder
def test_json(profile):
    text = to_json(profile)
    assert same(from_json(text), profile)
    assert to_json(from_json(text)) == text


def test_what_is_read_may_be_changed(tmp_path):
    for write in FORMS.values():
        write(tmp_path / "p.gguf", Profile("0" * 32, GOLDEN_LAYERS))
        profile = read_profile(tmp_path / "p.gguf")
        profile.layers[0].tiers[0] = [0, 0, 0, 64, 0, 128]
        profile.layers[0].query_prior[:] = 1
        write_profile(tmp_path / "q.gguf", profile)
        assert read_profile(tmp_path / "q.gguf").layers[0].tiers[0, 3] == 64


# --- versions ---


def test_version_1_is_read_and_comes_out_as_version_2(tmp_path):
    assert GOLDEN.read_bytes().count(b"mixkvq.profile.version" + struct.pack("<II", 4, 1)) == 1
    old = read_profile(GOLDEN)
    assert old.version == 1 and old.fingerprint == "0123456789abcdef" * 2 and old.window == 64 and old.sinks is None
    assert len(old.layers) == 3 and all(map(same_layer, old.layers, GOLDEN_LAYERS))
    for write in FORMS.values():
        write(tmp_path / "new.gguf", old)
        assert read_profile(tmp_path / "new.gguf").version == 2 and same(read_profile(tmp_path / "new.gguf"), old)
    assert same(from_json(to_json(old)), old)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("version", "words"), [(3, "version 3, and this MixKVQ reads up to 2; install"), (0, "damaged")])
def test_other_versions_are_refused(tmp_path, form, version, words):
    FORMS[form](tmp_path / "p.gguf", Profile("0" * 32, GOLDEN_LAYERS))
    raw = (tmp_path / "p.gguf").read_bytes()
    key = b"mixkvq.profile.version" + struct.pack("<I", 4)
    at = raw.index(key) + len(key)
    (tmp_path / "p.gguf").write_bytes(raw[:at] + struct.pack("<I", version) + raw[at + 4 :])
    with refused(words):
        read_profile(tmp_path / "p.gguf")


# --- damage ---


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
@settings(in_folder, max_examples=250)
def test_damaged_files_are_one_sentence(tmp_path, form, data):
    path = tmp_path / "p.gguf"
    if not path.exists():
        profile = Profile("0" * 32, copy.deepcopy(GOLDEN_LAYERS), 64, 128, measured=[{"text": "a", "kld_mean": 0.5}], made_by="me", body_bits=3.5)
        profile.layers[0].key_range = np.ones((2, 64), np.float32)
        FORMS[form](path, profile)
        (tmp_path / "base").write_bytes(path.read_bytes())
    raw = bytearray((tmp_path / "base").read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=5)):
        raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(raw[: data.draw(st.just(len(raw)) | st.integers(0, len(raw)))])
    try:
        profile = read_profile(path)
    except bridge.ProfileError as e:
        assert is_sentence(e), e
    else:
        assert profile.error() is None
        write_profile(tmp_path / "again.gguf", profile)
        assert same(read_profile(tmp_path / "again.gguf"), profile)


TIERS, VALUES = [[4, 8, 16, 20, 16, 32], [0, 0, 64, 0, 0, 128]], [[2, 0], [4, 32]]
ONES = [[1.0] * 64] * 2


def side_car(path, keys=None, drop=(), **tensors):
    """A side-car of one layer with some keys and tensors replaced, added or left out (None)."""
    all_keys = {
        "general.type": (T.STRING, "mixkvq-profile"),
        "mixkvq.profile.version": (T.UINT32, 2),
        "mixkvq.profile.fingerprint": (T.STRING, "0" * 32),
        "mixkvq.profile.layer_count": (T.UINT32, 1),
        **{f"mixkvq.profile.{name}": value for name, value in (keys or {}).items()},
    }
    arrays = {"tiers": np.array(TIERS, np.int32), "values": np.array(VALUES, np.int32), **tensors}
    arrays = {name if "." in name else f"blk.0.{name}": array for name, array in arrays.items() if array is not None}
    return write_gguf(path, {name: value for name, value in all_keys.items() if name.rpartition(".")[2] not in drop}, arrays)


def embedded(path, keys=None, drop=(), **arrays):
    """The same in keys. Arrays are (element type, list)."""
    flat = {"tiers": (T.INT32, sum(TIERS, [])), "values": (T.INT32, sum(VALUES, [])), **arrays}
    flat = {f"mixkvq.profile.blk.0.{name}": (T.ARRAY, *array) for name, array in flat.items() if array is not None}
    all_keys = {
        "mixkvq.profile.version": (T.UINT32, 2),
        "mixkvq.profile.fingerprint": (T.STRING, "0" * 32),
        "mixkvq.profile.layer_count": (T.UINT32, 1),
        **flat,
        **{f"mixkvq.profile.{name}": value for name, value in (keys or {}).items()},
    }
    return write_gguf(path, {name: value for name, value in all_keys.items() if name.rpartition(".")[2] not in drop})


@pytest.mark.parametrize("write", [side_car, embedded])
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"version": (T.INT32, 2)}, "version has the wrong type"),
        ({"version": (T.STRING, "2")}, "version has the wrong type"),
        ({"layer_count": (T.UINT64, 1)}, "layer_count has the wrong type"),
        ({"layer_count": (T.UINT32, 0)}, "layer count is 0"),
        ({"layer_count": (T.UINT32, 5000)}, "layer count is 5000"),
        ({"fingerprint": (T.UINT32, 7)}, "fingerprint has the wrong type"),
        ({"fingerprint": (T.STRING, "zz")}, "which model it is for"),
        ({"window": (T.UINT32, 64)}, "window has the wrong type"),
        ({"window": (T.INT32, -1)}, "window is -1"),
        ({"sinks": (T.FLOAT32, 1.0)}, "sinks has the wrong type"),
        ({"sinks": (T.INT32, 1 << 30)}, "sinks is"),
        ({"body_bits": (T.FLOAT64, 3.0)}, "body_bits has the wrong type"),
        ({"body_bits": (T.FLOAT32, float("nan"))}, "body bits are nan"),
        ({"body_bits": (T.FLOAT32, -1.0)}, "body bits are -1"),
        ({"made_by": (T.STRING, "a\nb")}, "one line"),
        ({"made_by": (T.ARRAY, T.INT32, [1])}, "made_by has the wrong type"),
        ({"measured": (T.STRING, "[{")}, "not JSON"),
        ({"measured": (T.STRING, "[" * 100_000)}, "not JSON"),
        ({"measured": (T.STRING, '{"a": 1}')}, "not a list"),
        ({"measured": (T.STRING, "[1]")}, "not a list"),
        ({"measured": (T.STRING, '[{"kld_mean": "low"}]')}, "kld_mean"),
        ({"measured": (T.STRING, '[{"kld_mean": NaN}]')}, "kld_mean"),
        ({"measured": (T.STRING, '[{"tokens": true}]')}, "tokens"),
        ({"measured": (T.STRING, '[{"text": 1}]')}, "text"),
        ({"measured": (T.STRING, '[{"text": "\\ud800"}]')}, "text"),
        ({"measured": (T.STRING, '[{"text": "\\u001b[2J"}]')}, "text"),
        ({"measured": (T.STRING, '[{"other": [1]}]')}, "other"),
    ],
)
def test_wrong_keys(tmp_path, write, keys, words):
    write(tmp_path / "good.gguf")
    assert read_profile(tmp_path / "good.gguf").layers[0].n_heads == 2
    with refused(words):
        read_profile(write(tmp_path / "p.gguf", keys))


@pytest.mark.parametrize("write", [side_car, embedded])
@pytest.mark.parametrize("name", ["layer_count", "fingerprint", "tiers", "values"])
def test_missing_keys(tmp_path, write, name):
    change = {name: None} if name in ("tiers", "values") else {"drop": (name,)}
    with refused(f"damaged: .*{name}|layer count is None|which model"):
        read_profile(write(tmp_path / "p.gguf", **change))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"tiers": np.array(TIERS, np.int64)}, "tiers has the wrong type"),
        ({"tiers": np.array(TIERS, np.float32)}, "tiers has the wrong type"),
        ({"tiers": np.array(TIERS, np.int32).ravel()}, "wrong type or shape"),
        ({"tiers": np.array(TIERS, np.int32)[None].repeat(2, 0)}, "wrong type or shape"),
        ({"tiers": np.array(TIERS, np.int32)[:, :5].copy()}, "wrong type or shape"),
        ({"tiers": np.array(TIERS, np.int32) * -1}, "multiples of 4"),
        ({"tiers": np.array(TIERS, np.int32) + 1}, "multiples of 4"),
        ({"tiers": np.full((2, 6), 2**31 - 4, np.int32)}, "channels"),
        ({"tiers": np.zeros((2, 6), np.int32)}, "0 channels"),
        ({"values": np.array(VALUES[:1], np.int32)}, "values have the shape"),
        ({"values": np.array([[5, 0]] * 2, np.int32)}, "5-bit"),
        ({"values": np.array([[4, 16]] * 2, np.int32)}, "groups of 16"),
        ({"query_prior": np.array(ONES, np.float32)[:, :32].copy()}, "query_prior has the wrong type or shape"),
        ({"query_prior": np.array(ONES, np.float32)[:1]}, "query_prior has the shape"),
        ({"query_prior": -np.array(ONES, np.float32)}, "query_prior holds"),
        ({"key_range": np.array(ONES, np.float32) * np.inf}, "key_range holds"),
        ({"key_range": np.array(ONES, np.float32) * np.nan}, "key_range holds"),
        ({"key_range": np.array(ONES, np.float32) * 2e30}, "key_range holds"),
        ({"key_range": np.array(ONES, np.float16)}, "key_range has the wrong type"),
        ({"blk.1.tiers": np.array(TIERS, np.int32)}, "1 tensors that belong to no layer"),
        ({"other": np.ones(3, np.float32)}, "1 tensors that belong to no layer"),
    ],
)
def test_wrong_tensors(tmp_path, tensors, words):
    with refused(words):
        read_profile(side_car(tmp_path / "p.gguf", **tensors))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"tiers": (T.INT64, sum(TIERS, []))}, "tiers has the wrong type"),
        ({"tiers": (T.FLOAT32, [1.0] * 12)}, "tiers has the wrong type"),
        ({"tiers": (T.STRING, ["a"] * 12)}, "tiers has the wrong type"),
        ({"tiers": (T.INT32, sum(TIERS, [])[:-1])}, "holds 11 numbers"),
        ({"values": (T.INT32, [3, 0])}, "values have the shape"),
        ({"tiers": (T.INT32, [0] * 12), "query_prior": (T.FLOAT32, [1.0])}, "holds 1 numbers"),
        ({"query_prior": (T.FLOAT32, [1.0] * 127)}, "holds 127 numbers"),
        ({"query_prior": (T.FLOAT32, [1.0] * 64)}, "query_prior has the shape"),
        ({"key_range": (T.FLOAT32, [-1.0] * 128)}, "key_range holds"),
        ({"key_range": (T.INT32, [1] * 128)}, "key_range has the wrong type"),
        ({"other": (T.INT32, [1])}, "1 keys that belong to no layer"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, words):
    with refused(words):
        read_profile(embedded(tmp_path / "p.gguf", **arrays))


def test_files_that_are_no_profiles(tmp_path):
    with refused("does not exist"):
        read_profile(tmp_path / "none.gguf")
    with refused("directory"):
        read_profile(tmp_path)
    (tmp_path / "text").write_text("tiers: many\n")
    with refused("not a GGUF file"):
        read_profile(tmp_path / "text")
    with refused("not a profile but a GGUF file of type 'model', with none embedded"):
        read_profile(MODEL)
    with refused("not a profile but a GGUF file of type 'adapter'"):
        read_profile(write_gguf(tmp_path / "a.gguf", {"general.type": (T.STRING, "adapter")}))


# --- JSON that a person wrote ---


def as_json(profile=None):
    return json.loads(to_json(profile or Profile("0" * 32, GOLDEN_LAYERS, 64)))


def changed(*path_and_value):
    data = as_json()
    *path, last, value = path_and_value
    at = data
    for step in path:
        at = at[step]
    at[last] = value
    return data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "no list of layers"),
        ({}, "no list of layers"),
        (changed("layers", 3), "no list of layers"),
        (changed("layers", [None]), "nothing about any layer"),
        (changed("layers", 0, 7), "layer 0 is not an object"),
        (changed("layers", 0, "tierz", []), "layer 0 is not an object"),
        (changed("layers", 0, "tiers", None), "tiers of layer 0 is not a list of rows"),
        (changed("layers", 0, "tiers", [[0, 0, 64, 0, 0, 128], [0]]), "rows of one length"),
        (changed("layers", 0, "tiers", [[0, 0, 64.0, 0, 0, 128]] * 2), "whole numbers"),
        (changed("layers", 0, "tiers", [[0, 0, True, 0, 0, 128]] * 2), "whole numbers"),
        (changed("layers", 0, "tiers", [[0, 0, 1 << 31, 0, 0, 128]] * 2), "in range"),
        (changed("layers", 0, "tiers", [[0, 0, 64, 0, 128]] * 2), r"\[n_head_kv, 6\]"),
        (changed("layers", 0, "values", [[3, 0]]), "values have the shape"),
        (changed("layers", 0, "query_prior", [["a"]]), "query_prior of layer 0 holds"),
        (changed("layers", 0, "query_prior", [[10**400] * 64] * 2), "query_prior of layer 0 holds"),
        (changed("layers", 0, "key_range", [[float("inf")] * 64] * 2), "key_range of layer 0 holds"),
        (changed("layers", 0, "key_range", [[float("nan")] * 64] * 2), "key_range of layer 0 holds"),
        (changed("layers", 0, "key_range", [[1.0]]), "key_range has the shape"),
        (changed("version", "2"), "no value for version"),
        (changed("version", 3), "newer MixKVQ"),
        (changed("version", 0), "version is 0"),
        (changed("fingerprint", 3), "3 is no value for fingerprint"),
        (changed("fingerprint", "abc"), "which model"),
        (changed("window", 1.5), "1.5 is no value for window"),
        (changed("window", True), "true is no value for window"),
        (changed("sinks", -1), "sinks is -1"),
        (changed("sinks", 10**30), "sinks is"),
        (changed("body_bits", 10**400), "body_bits is out of range"),
        (changed("body_bits", float("nan")), "body_bits is out of range"),
        (changed("measured", {}), "no value for measured"),
        (changed("made_by", None), "null is no value for made_by"),
        (changed("windows", 3), "unknown field 'windows'"),
    ],
)
def test_wrong_json(data, words):
    with refused(words):
        from_json(json.dumps(data), "p.json")


def test_text_that_is_no_json():
    for text in ("", "{", "[" * 100_000, '{"layers": ' + "9" * 5000 + "}"):
        with refused("is not JSON"):
            from_json(text, "p.json")
    for missing in ("version", "fingerprint"):
        data = as_json()
        del data[missing]
        with refused(f"{missing} is missing"):
            from_json(json.dumps(data))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=300)
def test_any_value_anywhere_in_json(data):
    """Walks to some place in the JSON of a good profile and puts something else there."""
    root = {"": as_json()}
    at, key = root, ""
    while isinstance(at[key], (dict, list)) and at[key] and data.draw(st.integers(0, 5)):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
    at[key] = data.draw(anything)
    try:
        assert from_json(json.dumps(root[""]), "p.json").error() is None
    except bridge.ProfileError as e:
        assert is_sentence(e) and "p.json" in str(e)


# --- what is not written ---


@pytest.mark.parametrize(
    ("tiers", "values", "words"),
    [
        ([[0, 4, 40, 0, 83, 128]], [[3, 0]], "multiples of 4"),
        ([[0, 4, 40, 0, -44, 128]], [[3, 0]], "multiples of 4"),
        ([[0, 0, 300, 0, 0, 128]], [[3, 0]], "300 channels"),
        ([[0, 0, 128, 0, 0, 48]], [[3, 0]], "48 tokens"),
        ([[0, 0, 128, 0, 0, 128]], [[5, 0]], "5-bit"),
        ([[0, 0, 128, 0, 0, 128]], [[3, 0], [3, 0]], "shape"),
        ([[0, 0, 128, 0, 0, 128], [0, 0, 64, 0, 0, 128]], [[3, 0], [3, 0]], "64 channels"),
    ],
)
def test_invalid_formats_are_not_written(tmp_path, tiers, values, words):
    layer = LayerProfile(np.array(tiers, np.int32), np.array(values, np.int32))
    for write in FORMS.values():
        with refused(f"layer 1.*{words}"):
            write(tmp_path / "p.gguf", Profile("0" * 32, [None, layer]))
    with refused(words):
        to_json(Profile("0" * 32, [None, layer]))
    assert not list(tmp_path.iterdir())


def test_places_where_nothing_can_be_written(tmp_path):
    profile = Profile("0" * 32, GOLDEN_LAYERS)
    with refused("it is a folder", bridge.SettingsError):
        write_profile(tmp_path, profile)
    with refused("its folder does not exist", bridge.SettingsError):
        write_profile(tmp_path / "none" / "p.gguf", profile)


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.gguf"
    write_profile(path, Profile("1" * 32, GOLDEN_LAYERS))
    old = path.read_bytes()
    monkeypatch.setattr(GGUFWriter, "write_kv_data_to_file", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space") as e:
        write_profile(path, Profile("0" * 32, GOLDEN_LAYERS))
    assert e.value.filename == str(path)  # not the temporary file's
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["p.gguf"]


# --- which model ---


def test_a_profile_of_another_model(tmp_path):
    profile = uniform_profile(MODEL)
    path = tmp_path / "p.gguf"

    def check(words):
        write_profile(path, profile)
        with refused(words):
            read_profile(path, MODEL)

    write_profile(path, profile)
    assert same(read_profile(path, MODEL), profile)
    profile.layers, layers = profile.layers[:9], profile.layers
    check("9 layers")
    profile.layers = [LayerProfile(layer.tiers[:1], layer.values[:1]) for layer in layers]
    check("1 heads")
    profile.layers = [LayerProfile(layer.tiers // 2 // 4 * 4 * [1, 1, 1, 1, 1, 0] + [0, 0, 0, 0, 0, 64], layer.values) for layer in layers]
    check("of 64 channels")
    profile.layers, profile.fingerprint = layers, "0" * 32
    check("another model than .* 00000000 instead of")


def model_header(path, **values):
    """A llama without tensors."""
    keys = {
        "block_count": 4,
        "context_length": 512,
        "embedding_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        **{name.replace("_dot_", "."): value for name, value in values.items()},
    }
    typed = {
        f"llama.{k}": (T.ARRAY, T.BOOL if isinstance(v[0], bool) else T.UINT32, v) if isinstance(v, list) else (T.UINT32, v) for k, v in keys.items()
    }
    return write_gguf(path, {**typed, "tokenizer.ggml.tokens": (T.ARRAY, T.STRING, ["a", "b"])}, arch="llama")


def test_uniform_profile_of_layers_that_differ(tmp_path):
    """Numbers of heads, head sizes and layers without a cache as the header tells; presets scale with the head size."""
    values = {"attention.head_count_kv": [2, 1, 0, 4], "attention.key_length": [64, 128, 64, 96], "attention.value_length": [64, 64, 64, 96]}
    path = model_header(tmp_path / "m.gguf", **values)
    profile = uniform_profile(path, "quality")
    shapes = [None if layer is None else (layer.n_heads, layer.head_size) for layer in profile.layers]
    assert shapes == [(2, 64), (1, 128), None, (4, 96)]
    write_profile(tmp_path / "p.gguf", profile)
    assert same(read_profile(tmp_path / "p.gguf", path), profile)
    sizes = open_model(path).head_size_v
    assert sizes == [64, 64, 0, 96] and profile.packed_bits(sizes) == pytest.approx(4.5, abs=0.2)

    swa = {"attention.key_length_swa": 128, "attention.value_length_swa": 128, "attention.sliding_window": 32}
    pattern = {"attention.sliding_window_pattern": [True, False, True, False]}
    profile = uniform_profile(model_header(tmp_path / "w.gguf", **swa, **pattern))
    assert [layer.head_size for layer in profile.layers] == [128, 64, 128, 64]
    with refused("does not say the head sizes of each layer", bridge.GeometryError):
        uniform_profile(model_header(tmp_path / "v.gguf", **swa))


def test_uniform_profile_of_gemma4(tmp_path):
    """Layers whose heads are too large for the page format, and layers without a cache, are left out."""
    profile = uniform_profile(tiny_models.gemma4(tmp_path / "g.gguf"))
    assert [layer and layer.head_size for layer in profile.layers] == [64, None, 64, None, None, None]
    with refused("cannot pack", bridge.GeometryError):
        uniform_profile(model_header(tmp_path / "m.gguf", **{"attention.key_length": 512, "attention.value_length": 512}))


def test_uniform_profile_is_the_preset():
    profile = uniform_profile(MODEL, "small", window=64, sinks=0)
    bits = next(p["body_bits"] for p in native().presets() if p["alias"] == "small")
    assert profile.packed_bits() == pytest.approx(bits) and (profile.window, profile.sinks) == (64, 0)
    with refused("no preset 'nope'", bridge.SettingsError):
        uniform_profile(MODEL, "nope")
