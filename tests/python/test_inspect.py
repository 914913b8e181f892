"""What inspect prints and draws. Of the pictures the arrays are checked, and that the files are pictures."""

from __future__ import annotations

import re
import struct
import sys
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from profiles import GOLDEN_LAYERS, refused

import bridge
from mixkvq.cli import inspect
from mixkvq.cli.options import run
from mixkvq.core import embedding
from mixkvq.core.native import native
from mixkvq.core.profile import LayerProfile, Profile, to_json, uniform_profile, write_profile
from mixkvq.core.reference import KeyFormat, ValueFormat
from mixkvq.study import profile_plots


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_models.llama(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture
def profile():
    """Layers of 2 heads of 64 channels with prior and range, none, and 1 head of 96 without."""
    rng = np.random.default_rng(1)
    first = LayerProfile(GOLDEN_LAYERS[0].tiers.copy(), GOLDEN_LAYERS[0].values.copy())
    first.query_prior, first.key_range = (rng.random((2, 64), np.float32) + 0.5 for _ in range(2))
    last = LayerProfile(np.array([[0, 32, 64, 0, 0, 128]], np.int32), np.array([[3, 0]], np.int32))
    measured = [{"text": "prose", "tokens": 2048, "style": "decode", "kld_mean": 0.01234567, "against": "f16", "note": "x"}, {"text": "tasks"}]
    return Profile("0" * 32, [first, None, last], 64, None, "some/p.gguf", measured, "a test", None)


# --- the table ---


def test_rows_of_layers(profile):
    rows = inspect.layer_rows(profile)
    first = [KeyFormat(64, tuple(row[:5]), row[5]).record_bytes for row in profile.layers[0].tiers.tolist()]
    values = [ValueFormat(64, bits, group).record_bytes for bits, group in profile.layers[0].values.tolist()]
    bits = [f"{8 * n / (128 * d):.2f}" for n, d in ((sum(first), 128), (sum(values), 128), (sum(first) + sum(values), 256))]
    assert rows[0] == ("0", "0", "4@16+8@8+16@4+20@3+16@2", "32", "2 bits, rotated", *bits)
    assert rows[1] == ("", "1", "64@4", "128", "4 bits, groups of 32", "", "", "")
    assert rows[2][0] == "1" and rows[2][2] == "no packed cache"
    assert rows[3][:5] == ("2", "0", "32@8+64@4", "128", "3 bits, rotated") and len(rows) == 4
    wider = inspect.layer_rows(profile, [64, 0, 128])
    assert wider[3][5] == rows[3][5] and wider[3][6] != rows[3][6]


def test_heads_with_one_format_share_a_row():
    tiers = np.array([[0, 0, 64, 0, 0, 128]] * 3 + [[0, 64, 0, 0, 0, 128]] + [[0, 0, 64, 0, 0, 128]], np.int32)
    rows = inspect.layer_rows(Profile("0" * 32, [LayerProfile(tiers, np.array([[3, 0]] * 5, np.int32))]))
    assert [row[1:3] for row in rows] == [("0-2, 4", "64@4"), ("3", "64@8")]


def test_bits_of_a_profile_are_those_of_the_preset(tiny):
    body = {p["name"]: p["body_bits"] for p in native().presets()}
    model = Profile("0" * 32, [LayerProfile(np.array([[0, 8, 120, 0, 0, 128]], np.int32), np.array([[3, 0]], np.int32))])
    assert dict(inspect.summary(model))["body bits"].startswith(f"{body['mix3.8']:.3f} (")
    assert dict(inspect.summary(model, [128]))["body bits"] == f"{body['mix3.8']:.3f}"
    model.body_bits = 3.0
    assert dict(inspect.summary(model, [128]))["body bits"] == f"3.000 as written; {body['mix3.8']:.3f} by the layers"


def test_what_was_measured(profile):
    assert inspect.measured_columns(profile) == ["text", "tokens", "style", "against", "kld_mean", "note"]
    assert inspect.measured_rows(profile) == [("prose", "2048", "decode", "f16", "0.01235", "x"), ("tasks", "", "", "", "", "")]


def test_printed(tiny, tmp_path, capfd):
    found = uniform_profile(tiny, "careful", window=64)
    found.measured, found.made_by = [{"text": "[bold]prose", "kld_mean": 0.01}], "a [red]test"
    path = str(tmp_path / "p.gguf")
    write_profile(path, found)
    assert run(inspect.command, "x", [path]) == 0
    out = capfd.readouterr().out
    for words in (path, "a [red]test", found.fingerprint, "4@8+60@4", "3 bits, rotated", "[bold]prose", "KLD mean", "0.01", "keys' head size"):
        assert words in out, words
    assert re.search(r"recent tokens in F16 +64", out) and re.search(r"first tokens in F16 +default", out) and max(map(len, out.splitlines())) <= 160
    assert run(inspect.command, "x", [path, "--model", tiny]) == 0
    assert "keys' head size" not in capfd.readouterr().out


def test_every_place_of_a_profile(tiny, tmp_path, capfd):
    """Beside the model comes before inside it, as when the model is run."""
    model = tmp_path / "m.gguf"
    embedding.embed(tiny, uniform_profile(tiny, "small"), model)
    beside = uniform_profile(tiny, "quality")
    (tmp_path / "p.json").write_text(to_json(beside))

    def keys(path):
        assert run(inspect.command, "x", [str(path)]) == 0
        return re.findall(r"\d+@\d\S*", capfd.readouterr().out)

    assert keys(model) == ["8@4+24@3+32@2"] * 2
    assert keys(tmp_path / "p.json") == ["4@8+60@4"] * 2
    write_profile(tmp_path / "m.mixkvq.gguf", beside)
    assert keys(model) == keys(tmp_path / "m.mixkvq.gguf") == ["4@8+60@4"] * 2


# --- what is drawn ---


def test_maps(profile):
    m = profile_plots.maps(profile)
    assert m.rows == [(0, 0), (0, 1), (2, 0)] and m.by_rank.tolist() == [False, False, True]
    first = profile.layers[0]
    assert np.array_equal(m.query_prior[:2, :64], first.query_prior) and np.array_equal(m.key_range[:2, :64], first.key_range)
    assert np.allclose(m.salience[:2, :64], first.query_prior.astype(float) * first.key_range)
    assert all(a.shape == (3, 96) and np.isnan(a[:2, 64:]).all() and np.isnan(a[2]).all() for a in (m.salience, m.key_range, m.query_prior))
    # The most salient channels have the highest tiers, and as many of them as the profile says.
    order = np.argsort(-m.salience[0, :64])
    assert m.tiers[0, order].tolist() == [16] * 4 + [8] * 8 + [4] * 16 + [3] * 20 + [2] * 16
    assert set(m.tiers[1, :64]) == {4} and np.isnan(m.tiers[:2, 64:]).all()
    assert m.tiers[2].tolist() == [8] * 32 + [4] * 64  # nothing is known: by rank


def test_tiers_by_one_statistic_alone_and_ties():
    tiers, values = np.array([[0, 4, 0, 0, 60, 128]], np.int32), np.array([[3, 0]], np.int32)
    prior = np.ones((1, 64), np.float32)
    prior[0, [9, 20]] = 2
    assert np.flatnonzero(profile_plots.likely_tiers(LayerProfile(tiers, values, prior))[0] == 8).tolist() == [0, 1, 9, 20]  # ties: the lower index
    assert np.flatnonzero(profile_plots.likely_tiers(LayerProfile(tiers, values, None, 3 - prior))[0] == 8).tolist() == [0, 1, 2, 3]


def test_figure(profile):
    pytest.importorskip("matplotlib")
    drawn = profile_plots.figure(profile)
    panels = [axes for axes in drawn.axes if axes.images]
    m = profile_plots.maps(profile)
    assert len(panels) == 4
    for axes, values in zip(panels, (m.tiers, m.salience, m.key_range, m.query_prior)):
        assert np.array_equal(np.ma.filled(axes.images[0].get_array().astype(float), np.nan), values, equal_nan=True)
        assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "2"]
    # each tier has a colour of its own
    image = panels[0].images[0]
    colours = [tuple(image.cmap(image.norm(bits))) for bits in (2, 3, 4, 8, 16)]
    assert len(set(colours)) == 5
    for layer in profile.layers:
        if layer is not None:
            layer.query_prior = layer.key_range = None
    assert len([axes for axes in profile_plots.figure(profile).axes if axes.images]) == 1


def test_statistics_of_nothing_but_zeros_are_drawn(profile, tmp_path):
    pytest.importorskip("matplotlib")
    profile.layers[0].query_prior[:] = 0
    profile_plots.draw_profile(profile, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_pictures(profile, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("p.png", "p.svg", "again.svg"):
        profile_plots.draw_profile(profile, tmp_path / name)
    raw = (tmp_path / "p.png").read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, pixels = 8, b""
    while at < len(raw):
        (length,), kind = struct.unpack(">I", raw[at : at + 4]), raw[at + 4 : at + 8]
        body = raw[at + 8 : at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        pixels += body if kind == b"IDAT" else b""
        at += 12 + length
    width, height = struct.unpack(">II", raw[16:24])
    assert width > 1000 and height > 300 and len(set(zlib.decompress(pixels))) > 100
    tree = ElementTree.parse(tmp_path / "p.svg")
    names = [element.tag.rpartition("}")[2] for element in tree.iter()]
    assert names[0] == "svg" and names.count("image") >= 4
    assert (tmp_path / "p.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_without_matplotlib(profile, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with refused(r"pip install 'mixkvq\[plot\]'", bridge.SettingsError):
        profile_plots.draw_profile(profile, tmp_path / "p.png")
    assert not list(tmp_path.iterdir())


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "FILE"),
        (["none.gguf"], "none.gguf does not exist"),
        (["."], "is a directory"),
        (["text"], "not a GGUF file"),
        (["none.json"], "cannot be read"),
        (["MODEL"], "has no profile inside, and there is no tiny.mixkvq.gguf beside it"),
        (["p.gguf", "--plot", "p.pdf"], "ends in .png or .svg"),
        (["p.gguf", "--plot", "none/p.png"], "its folder does not exist"),
        (["p.gguf", "--model", "MODEL"], "another model"),
        (["p.gguf", "--model", "none.gguf"], "does not exist"),
        (["p.gguf", "--draw"], "--draw"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tiny, profile, tmp_path, monkeypatch, capfd, arguments, words):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    write_profile("p.gguf", profile)
    Path("text").write_text("x")
    code = run(inspect.command, "mixkvq.inspect", [tiny if a == "MODEL" else a for a in arguments])
    err = capfd.readouterr().err
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ") and words in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.gguf", "text"]
