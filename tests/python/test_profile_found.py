"""Where a profile is looked for when nobody says which cache to use, and what is said about it."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
import tiny_models
from contexts import WITHOUT_GPU
from profiles import GOLDEN_LAYERS, refused

import bridge
from bridge import Kv
from bridge.requantise import requantise
from mixkvq.core import embedding
from mixkvq.core.model_file import open_model, read_header
from mixkvq.core.profile import Profile, found, known_name, read_profile, side_car, uniform_profile, with_profile, write_profile
from mixkvq.core.settings import resolve_kv


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_models.llama(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture
def model(tiny, tmp_path):
    """A model of its own for a test: `model.gguf`, without a profile."""
    return str(shutil.copy(tiny, tmp_path / "model.gguf"))


def put_beside(model, preset="near-lossless", **changes):
    write_profile(side_car(model), uniform_profile(model, preset, **changes))


def put_inside(model, preset="small", **changes):
    embedding.embed(model, uniform_profile(model, preset, **changes), model)


def load(model, **arguments):
    return bridge.Llama(str(model), **{"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **arguments})


def cache(model, **arguments):
    """What the cache of a model that has read 400 tokens is, and the first line of the report."""
    llama = load(model, **arguments)
    llama.eval(list(range(3, 203)) * 2)
    stats = llama.kv_stats()
    title = llama.kv_report().splitlines()[0]
    llama.close()
    return stats, title.removeprefix("cache").strip()


def test_where_a_side_car_lies():
    assert side_car("a/model.gguf") == "a/model.mixkvq.gguf" == side_car(Path("a/model.gguf"))
    assert side_car("a/model.bin") == "a/model.bin.mixkvq.gguf"


def test_order_and_what_the_report_says(model):
    default, title = cache(model)
    assert title == "MixKVQ balanced" and default["profile"] is None and default["found"] is None

    put_inside(model)
    inside, title = cache(model)
    assert title == "MixKVQ profile model.gguf (found in the model)"
    assert inside["profile"] == model and inside["preset"] is None and inside["found"] == "in the model"

    put_beside(model)
    beside, title = cache(model)
    assert title == "MixKVQ profile model.mixkvq.gguf (found beside the model)" and beside["found"] == "beside the model"
    assert inside["body_bits"] < default["body_bits"] < beside["body_bits"]

    preset, title = cache(model, kv="balanced")
    assert title == "MixKVQ balanced" and preset["body_bits"] == default["body_bits"]
    asked, title = cache(model, kv=str(model))
    assert title == "MixKVQ profile model.gguf" and asked["found"] is None and asked["body_bits"] == inside["body_bits"]
    assert cache(model, stock="f16")[1] == "llama.cpp f16"


def quantised(model, type):
    """The same model with other weights, by llama.cpp's own function."""
    path = Path(model).with_name(f"{type}.gguf")
    requantise(model, path, type)
    return str(path)


def test_a_quantisation_is_the_same_model_and_another_one_is_not(model, tmp_path):
    files = [open_model(path) for path in (model, *(quantised(model, type) for type in ("Q8_0", "Q4_0", "F16")))]
    assert len({Path(file.path).stat().st_size for file in files}) >= 3
    assert len({(file.fingerprint, file.norm) for file in files}) == 1 and len(files[0].norm) == 8
    with pytest.raises(bridge.ModelFileError, match="cannot be written while it is read"):
        requantise(model, model, "F16")
    trained_further = tmp_path / "further.gguf"
    raw = Path(model).read_bytes()
    at = read_header(model).tensors["output_norm.weight"].offset
    trained_further.write_bytes(raw[:at] + b"\0\0\x90\x3f" + raw[at + 4 :])
    other = open_model(trained_further)
    assert other.fingerprint == files[0].fingerprint and other.norm != files[0].norm


def test_a_profile_serves_other_quantisations_in_the_folder(model, tmp_path):
    other = quantised(model, "Q4_0")
    put_beside(model)
    stats, title = cache(other)
    assert title == "MixKVQ profile model.mixkvq.gguf (found beside another quantisation of the model)" and stats["profile"] == side_car(model)
    Path(model).unlink()  # whose profile it is cannot be told any more
    assert cache(other)[1] == "MixKVQ balanced"


def test_profiles_that_come_with_mixkvq(model, tmp_path, monkeypatch):
    known = tmp_path / "known"
    known.mkdir()
    monkeypatch.setattr(found, "_FOLDERS", (tmp_path / "none", known))
    assert cache(model)[1] == "MixKVQ balanced"
    write_profile(known / f"a-model.{known_name(open_model(model))}.mixkvq.gguf", uniform_profile(model, "near-lossless"))
    for path in (model, quantised(model, "Q8_0")):
        assert cache(path)[1].endswith("(found among those that come with MixKVQ)")
    put_beside(model, "small")  # one's own goes first
    assert cache(model)[1].endswith("(found beside the model)")
    assert cache(model, kv="balanced")[1] == "MixKVQ balanced"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "models" / "profiles").glob("*.gguf")), ids=lambda path: path.name)
def test_what_comes_with_mixkvq_is_whole_and_says_how_it_was_made(path):
    profile = read_profile(path)
    assert f".{profile.fingerprint[:8]}-" in path.name and path.stat().st_size < 200_000
    assert profile.made_by.startswith("mixkvq.calibrate") and profile.measured and profile.body_bits < 3.3


def test_window_and_sinks_go_with_a_profile_that_is_found(model):
    put_beside(model, window=256, sinks=0)
    file = open_model(model)
    kv = with_profile(resolve_kv(Kv(window=64)), file)
    assert kv.profile == side_car(model) and kv.window == 64 and kv.sinks is None and kv == Kv(profile=side_car(model), window=64)
    small, large = (cache(model, kv={"window": n}, n_ctx=2048)[0] for n in (0, 1024))
    assert small["found"] and large["bytes"] > small["bytes"]


@pytest.mark.parametrize("kv", ["balanced", "mix2.4", Kv(preset="small"), {"preset": "paper"}])
def test_a_preset_is_exactly_that(model, kv):
    Path(side_car(model)).write_text("not even a profile")
    kv = resolve_kv(kv)
    assert with_profile(kv, open_model(model)) is kv
    assert cache(model, kv=kv)[1] == f"MixKVQ {kv.preset}"


def test_what_was_found_survives_pickling(model):
    put_beside(model)
    llama = load(model)
    copy = pickle.loads(pickle.dumps(llama))
    assert copy.kv == llama.kv and copy.kv_stats()["profile"] == side_car(model)
    llama.close()
    copy.close()


@WITHOUT_GPU
def test_attach(model):
    put_beside(model)
    arguments = {"n_ctx": 512, "n_gpu_layers": -1, "flash_attn": True, "verbose": False, "n_threads": 1}
    with bridge.attach(model=str(model)) as attachment:
        llama = llama_cpp.Llama(str(model), **arguments)
        assert attachment.kv_stats()["found"] == "beside the model"
    llama.close()
    with bridge.attach() as attachment:  # the model is not known here
        llama = llama_cpp.Llama(str(model), **arguments)
        assert attachment.kv_stats()["preset"] == "balanced"
    llama.close()


def test_layers_without_formats_stay_f16(model, tmp_path):
    """Because their heads are too large (gemma4: the result is that of the preset), or because the profile leaves them out."""
    gemma4 = str(tiny_models.gemma4(tmp_path / "gemma4.gguf"))
    preset, _ = cache(gemma4, kv="careful")
    put_beside(gemma4, "careful")
    found, _ = cache(gemma4)
    assert found["found"] and len(found["plain_layers"]) == 4
    assert all(found[name] == preset[name] for name in ("body_bits", "bytes", "plain_layers"))

    profile = uniform_profile(model)
    profile.layers[1] = None
    write_profile(side_car(model), profile)
    plain = cache(model)[0]["plain_layers"]
    assert [layer["name"] for layer in plain] == ["cache_k_l1", "cache_v_l1"]
    assert all("no formats for this layer" in layer["reason"] for layer in plain)


def spoil(model, how):
    if how == "another model, beside":
        write_profile(side_car(model), Profile("0" * 32, GOLDEN_LAYERS))
    elif how == "damaged, beside":
        put_beside(model)
        Path(side_car(model)).write_bytes(Path(side_car(model)).read_bytes()[:-100])
    elif how == "a model, beside":
        shutil.copy(model, side_car(model))
    elif how == "damaged, inside":
        put_inside(model)
        raw = Path(model).read_bytes()
        mark = open_model(model).fingerprint.encode()
        Path(model).write_bytes(raw.replace(mark, b"0" * 32))


@pytest.mark.parametrize("how", ["another model, beside", "damaged, beside", "a model, beside", "damaged, inside"])
def test_a_profile_that_does_not_fit_says_how_to_go_on(model, how):
    spoil(model, how)
    words = r"it was found beside the model: delete it, or .*kv='balanced'" if "beside" in how else r"it was found in the model: take it out .*remove"
    with refused(words):
        load(model)
    assert cache(model, kv="balanced")[1] == "MixKVQ balanced"
    if "beside" in how:  # asked for, nobody needs to be told where it is
        with pytest.raises(bridge.ProfileError) as e:
            load(model, kv=side_car(model))
        assert "found" not in str(e.value)


def run(*arguments):
    command = [sys.executable, "-m", "bridge.run", "-t", "1", "-p", "a", "--raw", "-n", "2", "-c", "512", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=600)
    return done.returncode, done.stderr.decode()


def test_command_line(model):
    put_beside(model)
    code, err = run(model)
    assert code == 0 and "MixKVQ profile model.mixkvq.gguf (found beside the model)" in err, err
    assert "MixKVQ balanced" in run(model, "--kv", "balanced")[1]
    code, err = run(model, "--kv", side_car(model))
    assert code == 0 and "MixKVQ profile model.mixkvq.gguf" in err and "found" not in err, err
    code, err = run(model, "--window", "64", "--report", "json")
    assert code == 0 and '"found": "beside the model"' in err
    spoil(model, "another model, beside")
    code, err = run(model)
    assert code == 2 and len(err.splitlines()) == 1 and "--kv balanced" in err
    assert run(model, "--kv", "balanced")[0] == 0 == run(model, "--stock", "f16")[0]
