"""Calibration: allocation against its bounds, statistics against the packer, and the whole command on the built-in model."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

import bridge
from bridge.requantise import requantise
from mixkvq.cli import calibrate as command_line
from mixkvq.core.memory import Free
from mixkvq.core.model_file import open_model
from mixkvq.core.profile import LayerProfile, read_profile, uniform_profile
from mixkvq.core.reference import KeyFormat, ValueFormat, pack_keys, pack_values, unpack_keys, unpack_values
from mixkvq.study import allocate, budget, caches, calibrate, exact, material, measure, search, sensitivity
from mixkvq.study import sizes as budgets
from mixkvq.study.allocate import CODED_BITS, VALUE_BITS, Tables
from mixkvq.study.compare import Passage, compare_caches
from mixkvq.study.sensitivity import SHORT
from mixkvq.study.texts import DEFAULT_TEXT, default_text

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "cot-tiny-34m-q8_0.gguf"


def random_tables(rng, n_heads=2, head_size=32):
    """Errors as real pages have them: falling along the order of salience, four times as large for a bit less."""
    loud = np.sort(rng.gamma(0.5, size=(n_heads, head_size // 4)))[:, ::-1]
    key_error = {g: loud[:, :, None] * 4.0 ** -np.array(CODED_BITS) * (g / 128) ** 0.3 for g in (128, 64)}
    value_error = rng.gamma(2, size=(n_heads, 1)) * 4.0 ** -np.array(VALUE_BITS)
    weights = [rng.gamma(1, size=n_heads) for _ in range(2)]
    zeros = np.zeros((n_heads, head_size), np.float32)
    return Tables(key_error, value_error, *weights, zeros, zeros, zeros, head_size)


# ---- allocation --------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(2.8, 8))
def test_allocation_keeps_the_budget_and_is_no_worse_than_uniform_formats(seed, bits):
    rng = np.random.default_rng(seed)
    layers = [random_tables(rng), None, random_tables(rng)]
    found = allocate.allocate(layers, bits)
    size = allocate.body_bits(layers, found)
    assert size <= bits and found[1] is None
    harm = allocate.harm(layers, found)
    splits = [(0, 0, 8, 8, 16), (0, 0, 0, 32, 0), (0, 4, 8, 0, 20), (0, 0, 32, 0, 0), (0, 32, 0, 0, 0)]
    for counts, value_bits in itertools.product(splits, VALUE_BITS):
        tiers, values = np.array([(*counts, 128)] * 2, np.int32), np.array([(value_bits, 0)] * 2, np.int32)
        uniform = [None if t is None else LayerProfile(tiers, values) for t in layers]
        # A record is a multiple of 64 bytes, so tenths of a bit of these short heads cannot be had.
        if allocate.body_bits(layers, uniform) <= size - 0.15:
            assert harm <= allocate.harm(layers, uniform)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_more_bits_do_less_harm(seed):
    layers = [random_tables(np.random.default_rng(seed))]
    harms = [allocate.harm(layers, allocate.allocate(layers, bits)) for bits in (3, 3.5, 4, 5, 6, 8)]
    assert harms == sorted(harms, reverse=True)


def test_a_part_that_matters_more_gets_more():
    rng = np.random.default_rng(1)
    tables = random_tables(rng)
    quiet, loud = (Tables(**{**vars(tables), "key_weight": tables.key_weight * f, "value_weight": tables.value_weight * f}) for f in (1, 50))
    low, high = allocate.allocate([quiet, loud], 4)
    assert low.packed_bytes()[0] < high.packed_bytes()[0] and low.packed_bytes()[1] < high.packed_bytes()[1]


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["mix2.4", "mix2.5", "mix3.8"]), st.floats(0, 1.5))
def test_no_head_gets_less_than_it_must(seed, preset, more):
    rng = np.random.default_rng(seed)
    layers, least = [random_tables(rng, head_size=128), None], uniform_profile(MODEL, preset).layers[:1] + [None]
    size = allocate.body_bits(layers, least)
    found = allocate.allocate(layers, size + more, least)
    assert allocate.body_bits(layers, found) <= size + more and found[1] is None
    for got, wanted in zip(found[0].tiers, least[0].tiers, strict=True):
        bits = [np.repeat((16, 8, 4, 3, 2), row[:5]) for row in (got, wanted)]
        assert (bits[0] >= bits[1]).all() and got[5] <= wanted[5]
    assert (found[0].values[:, 0] >= least[0].values[:, 0]).all()
    with pytest.raises(ValueError, match="fewer than the smallest formats"):
        allocate.allocate(layers, size - 0.1, least)


class FakeReader:
    """A model of which every part does a known harm, and whatever touches a layer something more."""

    def __init__(self, harms, floor=0.0):
        self.harms, self.floor, self.passes = harms, floor, 0
        self.probe = sensitivity.Probe()

    def divergence_now(self, progress, sample, power):
        self.passes += 1
        done = 0.0
        for (layer, is_value), formats in self.probe.rounding.items():
            done += sum(self.harms[layer, is_value, h] for h, f in enumerate(formats) if f is not None and getattr(f, "bits", 0) != 8)
        return dict.fromkeys(sample, done + self.floor)


@pytest.mark.parametrize(("exact", "floor"), [(True, 0.0), (False, 1.0)])
def test_time_goes_to_the_part_that_does_most(exact, floor):
    """One head of 64 parts does nine tenths of the harm: it is found with a fifth of the passes that all of them would take."""
    rng, n_layers, n_heads = np.random.default_rng(5), 16, 2
    harms = {(i, v, h): 1e-3 for i in range(n_layers) for v in (False, True) for h in range(n_heads)}
    harms[11, False, 1] = 0.6
    layers = [replace(random_tables(rng, head_size=128), key_even=np.ones(2), value_even=np.ones(2)) for _ in range(n_layers)]
    probe = uniform_profile(MODEL, "mix2.4").layers[:1] * n_layers
    options = {"sample": {"text": []}, "shares": {"text": 1.0}, "progress": lambda n: None, "exact": exact}
    reader, most = FakeReader(harms, floor), sensitivity.all_passes([n_heads] * n_layers, exact) // 5
    n_parts = sensitivity.measure_weights(reader, layers, probe, 2, enough=lambda n: n >= most, **options)
    assert reader.passes <= most + 2 and n_parts < 20
    of_key = np.array([[allocate.key_harm(t, h, allocate.key_format(probe[0].tiers[h])) for h in range(n_heads)] for t in layers])
    assert np.unravel_index(of_key.argmax(), of_key.shape) == (11, 1) and of_key.max() > 0.8
    assert allocate.harm(layers, probe) == pytest.approx(1)
    whole = FakeReader(harms, floor)  # with all the time there is every head is measured by itself
    assert sensitivity.measure_weights(whole, layers, probe, n_layers, **options) == 64
    assert whole.passes == sensitivity.all_passes([n_heads] * n_layers, exact)
    assert allocate.value_harm(layers[3], 0, 2) == pytest.approx(max(1e-3 / (63e-3 + 0.6), 1 / (20 * 64)), rel=0.1)


@pytest.mark.parametrize(
    ("text", "retrieval", "better"),
    [
        ((0.9, 0.01), (0.5, 0.1), True),
        ((1.0, 0.01), (0.5, 0.1), True),
        ((1.1, 0.2), (0.5, 0.1), True),  # worse by less than a standard error
        ((1.1, 0.05), (0.5, 0.1), False),  # by more
        ((1.1, 0.2), (0.95, 0.1), False),  # not better in the mean
        ((1.0, 0.0), (1.0, 0.0), False),
    ],
)
def test_a_gain_counts_in_the_mean_and_no_kind_of_text_may_be_worse(text, retrieval, better):
    """Each: mean divergence where the preset's is 1, and the standard error of the difference."""

    def verdict(mean, error):
        return measure.Verdict({"new": {"kld_mean": mean}, "preset": {"kld_mean": 1.0}}, "preset", {"new": (mean - 1, error)})

    verdicts = {"text": verdict(*text), "retrieval": verdict(*retrieval)}
    assert measure.is_better(verdicts, "new", {"text": 0.5, "retrieval": 0.5}) == better


def test_how_long_it_takes_if_nobody_says_it():
    """Up to two minutes, and up to eight where a model is read so slowly that these would do little."""
    assert budget.default_seconds(10_000) == 11 and budget.default_seconds(400) == 110
    assert 300 < budget.default_seconds(90) < 360 and budget.default_seconds(10) == 480


def test_a_copy_in_f32_is_made_where_it_has_room_and_time(tmp_path, monkeypatch):
    assert exact.fits(str(MODEL), tmp_path, "cpu") and exact.fits(str(MODEL), tmp_path, "cpu", 60)
    assert not exact.fits(str(MODEL), tmp_path, "cpu", 1)
    monkeypatch.setattr(exact, "free_memory", lambda: Free(300 << 20))  # of which 135 MB are more than two fifths
    assert not exact.fits(str(MODEL), tmp_path, "cpu")


def test_too_few_bits_are_refused():
    with pytest.raises(ValueError, match="fewer than the smallest formats take"):
        allocate.allocate([random_tables(np.random.default_rng(1))], 2)


def test_thresholds_of_the_paper():
    tables = random_tables(np.random.default_rng(1), n_heads=1)
    salience = np.zeros((1, 2, 32), np.float32)
    salience[0, :, :3], salience[0, 0, 3:12], salience[0, 1, 3:8] = 5.0, 1.0, 1.0  # 3 above t16; 9 and 5 above t4
    tables.salience = salience
    (layer,) = allocate.thresholds([tables], 2.0, 0.5)
    assert layer.tiers.tolist() == [[4, 0, 8, 0, 20, 32]] and layer.values.tolist() == [[2, 32]]


def test_search_of_the_paper_keeps_the_budget():
    pytest.importorskip("optuna")
    rng = np.random.default_rng(2)
    tables = random_tables(rng)
    tables.salience = rng.lognormal(0, 1.5, size=(2, 6, 32)).astype(np.float32)
    tables.key_error[32] = tables.key_error[64]

    class Fake:  # what a calibration measures, without a model: errors fall with the bits
        def __init__(self):
            self.tables, self.seen = [tables], []

        def objective(self, formats):
            self.seen.append(allocate.body_bits(self.tables, formats))
            return 1 / self.seen[-1]

    calibration = Fake()
    found = search.best_thresholds(calibration, 5.0, 20, seed=1)
    size = allocate.body_bits([tables], found)
    assert len(calibration.seen) == 20 and size == max(bits for bits in calibration.seen if bits <= 5)
    with pytest.raises(bridge.SettingsError, match="None of 20 trials"):
        search.best_thresholds(calibration, 2.0, 20, seed=1)


def test_every_kind_of_text_counts_whatever_its_scale_and_a_head_that_decides_one_gets_its_bits():
    """All parts hurt text alike; the keys of one head hurt lookups far more than anything else does, which hardly show in a sum."""
    tables, even, shares = random_tables(np.random.default_rng(4), n_heads=4), np.ones(4), {"text": 0.5, "lookups": 0.5}
    tables.key_kinds = {"text": even, "lookups": 1e-5 * np.array([30, 1, 1, 1])}
    tables.value_kinds = {"text": even, "lookups": 1e-5 * even}

    def product(formats):
        return math.prod(allocate.harm([tables.weighted({kind: 1.0})], formats) ** share for kind, share in shares.items())

    for bits in (3, 3.5, 4, 5):
        found = allocate.allocate_by_kind([tables], bits, shares)
        summed = allocate.allocate([tables.weighted(shares)], bits)
        assert allocate.body_bits([tables], found) <= bits and product(found) < 0.9 * product(summed)
        mean_bits = [allocate.key_format(row).tiers @ np.array([16, 8, 4, 3, 2]) for row in found[0].tiers]
        assert mean_bits[0] == max(mean_bits)
    assert allocate.allocate_by_kind([None, tables], 3.5, shares)[0] is None


# ---- statistics --------------------------------------------------------------------------------------------------------------------------


def page_of(rows, is_value, q_abs=None, q_sqr=None):
    return bridge.Page(0, is_value, 0, 0, rows, np.ones(128, bool), q_abs, q_sqr)


@pytest.mark.parametrize("group", [64, 128])
def test_key_error_is_that_of_the_packer(group):
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(2, 128, 64)) * rng.gamma(0.5, 4, size=(2, 1, 64))).astype(np.float16).astype(np.float32)
    q_abs, q_sqr = (rng.gamma(1, size=(2, 64)).astype(np.float32) for _ in range(2))
    collector = sensitivity.Collector([group])
    collector.add(page_of(rows, False, q_abs, q_sqr))
    collector.add(page_of(rows, True))
    (tables,) = collector.tables(1)
    for tiers in ((0, 0, 16, 32, 16), (0, 8, 0, 0, 56), (4, 0, 60, 0, 0)):
        fmt = KeyFormat(64, tiers, group)
        for head in range(2):
            read = unpack_keys(fmt, pack_keys(fmt, rows[head].astype(np.float16), q_abs[head])).astype(np.float64)
            wanted = (q_sqr[head] * ((read - rows[head]) ** 2).mean(axis=0)).sum()
            assert allocate.key_harm(tables, head, fmt) == pytest.approx(wanted, rel=0.02)
    for bits in VALUE_BITS:
        fmt = ValueFormat(64, bits)
        read = unpack_values(fmt, pack_values(fmt, rows[1].astype(np.float16))).astype(np.float64)
        assert allocate.value_harm(tables, 1, bits) == pytest.approx(((read - rows[1]) ** 2).sum(axis=1).mean(), rel=1e-3)
    np.testing.assert_allclose(tables.key_range[0], rows[0].max(axis=0) - rows[0].min(axis=0))


@pytest.fixture(scope="module")
def reader():
    llm = bridge.Llama(str(MODEL), stock="f16", n_ctx=1024, verbose=False)
    tokens = llm.tokenize(DEFAULT_TEXT.read_bytes())[:800]
    llm.close()
    reader = sensitivity.Reader(str(MODEL), {"text": [Passage(tokens)]}, window=128, sinks=128, threads=1)
    yield reader
    reader.close()


def test_exact_cache_does_not_diverge_and_rounding_does(reader):
    collector = sensitivity.Collector([128])
    reader.read_exact(collector, lambda n: None)
    tables = collector.tables(10)
    reader.probe.rounding = {}
    assert reader.divergence_now(lambda n: None)["text"] < 1e-6
    profile = uniform_profile(MODEL, "mix2.5")
    coarse = reader.divergence(profile.layers, tables, lambda n: None)["text"]
    fine = reader.divergence(uniform_profile(MODEL, "mix8.2").layers, tables, lambda n: None)["text"]
    assert fine < coarse / 3  # what is left is the arithmetic of the cache itself
    reader.change_window(256)
    assert reader.divergence(profile.layers, tables, lambda n: None)["text"] < coarse
    reader.change_window(128)  # what the cache has learnt of the queries is gone
    assert reader.divergence(profile.layers, tables, lambda n: None)["text"] == pytest.approx(coarse, rel=0.05)
    assert reader.passages_from(800) == {"text": [(0, 800)]} and reader.passages_from(801) == reader.sample(800)
    sample = reader.sample(400)
    assert sample == {"text": [(0, SHORT + 1)]}
    options = {"sample": {"text": [(0, 513)]}, "shares": {"text": 1.0}, "progress": lambda n: None}
    assert sensitivity.measure_weights(reader, tables, profile.layers, 3, enough=lambda n: n >= 9, **options) == 6
    assert allocate.harm([t.weighted({"text": 1.0}) for t in tables], profile.layers) == pytest.approx(1, rel=0.01)
    assert allocate.harm(tables, profile.layers) == pytest.approx(1, rel=0.01)
    weights = np.concatenate([t.key_weight / t.key_even for t in tables])
    assert weights.min() > 0 and weights.max() / weights.min() > 1.5  # layers differ


def test_a_sample_cuts_long_passages_but_not_before_their_predictions(reader):
    """Of solved problems three times as many tokens as of text; a prompt alone tells nothing."""
    texts, problems = [Passage([0] * 3000)], [Passage([0] * 2900, 2700), Passage([0] * 2000, 1200), Passage([0] * 1500, 300), Passage([0] * 600, 100)]
    reader.passages, kept = {"text": texts, "retrieval": problems}, reader.passages
    try:
        assert reader.sample(100) == {"text": [(0, SHORT + 1)], "retrieval": [(2, SHORT + 1)]}
        assert reader.sample(640) == {"text": [(0, SHORT + 1)], "retrieval": [(1, 1921)]}
        assert reader.sample(1000) == {"text": [(0, 897)], "retrieval": [(0, 2900)]}
        assert reader.sample(1200) == {"text": [(0, 1153)], "retrieval": [(0, 2900), (2, 641)]}
        reader.passages = {"retrieval": [Passage([0] * 4000, 3000), Passage([0] * 3500, 3400)]}
        assert reader.sample(100) == {"retrieval": [(0, 3201)]}  # if there is none of which so few would do: with some predictions
    finally:
        reader.passages = kept


def test_half_of_the_problems_are_long_lookups():
    llm = bridge.Llama(str(MODEL), stock="f16", n_ctx=4096, vocab_only=True, verbose=False)
    found = material._derivations(llm, 8192, 4096, Random(1))
    hard = [p for p in found if len(p.tokens) > 2000 and b"Trace:" in llm.detokenize(p.tokens[p.first :])]
    assert 2 * sum(len(p.tokens) for p in hard) >= 8192 and len(found) > len(hard)
    few = material._derivations(llm, 1100, 1100, Random(1))  # too few tokens for one of them
    assert few and sum(len(p.tokens) for p in few) <= 1100
    llm.close()


# ---- the command -------------------------------------------------------------------------------------------------------------------------


class Pace:
    """A clock that goes on only when a model reads: so many tokens a second. It stands in for the module `time`."""

    def __init__(self, speed, monkeypatch):
        self.speed, self.now, self.tokens = speed, 0.0, 0
        self.when = {}  # what is done once so many tokens are read
        for module in (measure, budget):
            monkeypatch.setattr(module, "time", self)
        forward = bridge.Llama.forward

        def counted(llm, tokens, *rest, **options):
            self.now += len(tokens) / self.speed
            self.tokens += len(tokens)
            for at in [at for at in self.when if at <= self.tokens]:
                self.when.pop(at)()
            return forward(llm, tokens, *rest, **options)

        monkeypatch.setattr(bridge.Llama, "forward", counted)

    def perf_counter(self):
        return self.now


def stop():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.llama(tmp_path_factory.mktemp("models") / "tiny.gguf", n_kv=2, ratio=1, n_layers=3)


def main(*arguments):
    return command_line.main([*map(str, arguments), "--threads", "1"])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The built-in model with a profile beside it, and what was said."""
    folder = tmp_path_factory.mktemp("calibrate")
    model = folder / "model.gguf"
    model.symlink_to(MODEL)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        Pace(60, patch)
        assert main(model, "--bits", 3, "--minutes", 1) == 0
    return model, said.getvalue()


def test_command_writes_a_profile_that_is_found_and_used(calibrated):
    model, said = calibrated
    path = model.with_name("model.mixkvq.gguf")
    assert "It is used with this model from now on." in said
    profile = read_profile(path, model)
    assert profile.body_bits <= 3 and profile.body_bits == pytest.approx(profile.packed_bits())
    assert profile.made_by.startswith("mixkvq.calibrate")
    assert [entry["text"] for entry in profile.measured] == ["the default text"]  # there was no time for more
    for entry in profile.measured:
        assert entry["tokens"] > 100 and entry["against"] == "f32" and 0 <= entry["kld_median"] <= entry["kld_p999"]
    for layer in profile.layers:
        assert layer.key_range.shape == (2, 128) and (layer.key_range > 0).all()
    llm = bridge.Llama(str(model), n_ctx=512, verbose=False)
    llm.eval(llm.tokenize(b"A short text."))
    assert llm.kv_stats()["body_bits"] == pytest.approx(profile.body_bits, abs=0.01)
    llm.close()


def test_existing_file_is_not_lost(calibrated):
    model, _ = calibrated
    path = model.with_name("model.mixkvq.gguf")
    before = path.read_bytes()
    # In a process of its own.
    done = subprocess.run([sys.executable, "-m", "mixkvq.calibrate", str(model), "--bits", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and "exists; give another name, or --force" in done.stderr and "Traceback" not in done.stderr
    assert path.read_bytes() == before


def test_targets_are_checked_before_anything_is_read(tiny, tmp_path, monkeypatch, capfd):
    """Also with --force: neither the model nor a text, nor anything that is no profile, is replaced."""
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(tiny.read_bytes())
    Path("link.gguf").symlink_to("model.gguf")
    os.link("model.gguf", "hard.gguf")
    Path("notes.txt").write_bytes(DEFAULT_TEXT.read_bytes())
    before = {path: path.read_bytes() for path in Path().iterdir()}
    monkeypatch.setattr(bridge.Llama, "forward", lambda *_, **_options: pytest.fail("the model is read"))
    monkeypatch.setattr(calibrate, "open_model", lambda *_: pytest.fail("the model is opened"))
    for out in ("model.gguf", "link.gguf", "hard.gguf", "./model.gguf", "notes.txt", "/proc/x.gguf", "none/x.gguf", ".", "/dev/null"):
        assert main("model.gguf", "--text", "notes.txt", "-o", out, "--force") == 2
        out_, err = capfd.readouterr()
        assert not out_ and err.startswith("error: ") and len(err.splitlines()) == 1 and f"{Path(out)}" in err and ".mixkvq-" not in err, err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_what_was_measured_is_not_lost_where_it_can_no_longer_be_written(tiny, tmp_path, monkeypatch, capfd):
    Pace(60, monkeypatch)
    out, written = tmp_path / "gone" / "out.gguf", command_line.write_profile
    out.parent.mkdir()

    def write(path, profile, **options):
        if Path(path) == out:
            raise OSError(28, "No space left on device", str(path))
        written(path, profile, **options)

    monkeypatch.setattr(command_line, "write_profile", write)
    assert main(tiny, "--bits", 3, "--minutes", 2, "-o", out) == 2
    said, err = capfd.readouterr()
    instead = re.search(r"the profile is in (\S+)\.$", err.strip())
    assert instead and read_profile(instead[1], tiny).measured and "this profile" in said and "No space left" in err
    shutil.rmtree(Path(instead[1]).parent)


# ---- the minutes ---


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (20, ["no solved problems", "no part of the cache was measured by itself"]),
        (40, ["no solved problems", "parts of the cache were measured instead of 12"]),
        (120, ["1 allocation was tried instead of 2"]),
        (480, []),
    ],
)
def test_minutes_are_kept_and_what_is_left_out_is_said(tiny, tmp_path, monkeypatch, capfd, speed, words):
    pace, out = Pace(speed, monkeypatch), tmp_path / "out.gguf"
    assert main(tiny, "--bits", 3, "--minutes", 5, "--tokens", 1100, "-o", out) == 0
    said, err = capfd.readouterr()
    assert pace.now <= 1.25 * 300
    assert all(word in " ".join(said.split()) for word in words), said
    assert ("coarser" in said) == bool(words), said
    told = re.search(r"this takes about ([\d.]+) minutes", err)
    assert told and float(told[1]) <= 5.05 and pace.now <= 1.25 * 60 * float(told[1]) + 3
    profile = read_profile(out, tiny)
    assert profile.body_bits <= 3
    assert [entry["text"] for entry in profile.measured] == ["the default text", *([] if "no solved problems" in said else ["retrieval"])]


def test_a_machine_that_becomes_slower_reads_less(tiny, tmp_path, monkeypatch, capfd):
    pace = Pace(240, monkeypatch)
    pace.when[15000] = lambda: setattr(pace, "speed", 80)
    assert main(tiny, "--bits", 3, "--minutes", 5, "--tokens", 1100, "-o", tmp_path / "out.gguf") == 0
    assert not pace.when and pace.now <= 1.25 * 300


def test_a_profile_comes_out_of_any_budget(tiny, tmp_path, monkeypatch, capfd):
    """Even where there is no time to read a page: then it is the preset, and says so."""
    pace, out = Pace(8, monkeypatch), tmp_path / "out.gguf"
    assert main(tiny, "--minutes", 2, "-o", out) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "reads about 8 tokens a second of this model, so that nothing could be measured in 2.0 minutes" in said and "preset mix3.2" in said
    profile, preset = read_profile(out, tiny), uniform_profile(tiny)
    assert pace.now < 30 and profile.measured == [] and same_formats(profile, preset)
    assert main(tiny, "--minutes", 2, "--max-kld", 0.1, "-o", out, "--force") == 2
    err = capfd.readouterr().err
    assert "give more --minutes" in err and len(err.splitlines()) == 1 and same_formats(read_profile(out), preset)


def same_formats(one, other):
    return all((a.tiers == b.tiers).all() and (a.values == b.values).all() for a, b in zip(one.layers, other.layers, strict=True))


def test_a_divergence_is_looked_for_as_long_as_there_is_time(tiny, tmp_path, monkeypatch, capfd):
    pace, out = Pace(240, monkeypatch), tmp_path / "out.gguf"
    assert main(tiny, "--max-kld", 0.05, "--minutes", 5, "--tokens", 1024, "-o", out) == 0
    assert pace.now <= 1.25 * 300
    assert max(entry["kld_mean"] for entry in read_profile(out).measured) <= 0.05


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (100, "The model has not been read yet"),
        (3000, "The model has not been read yet"),
        (12000, "has the formats of the preset mix2.5, with what was seen of queries and keys"),
        (None, "has an allocation that is better than the preset on what was read"),  # once one was tried
    ],
)
def test_ctrl_c_keeps_what_there_is(tiny, tmp_path, monkeypatch, capfd, tokens, words):
    pace, out = Pace(240, monkeypatch), tmp_path / "out.gguf"
    if tokens is None:
        monkeypatch.setattr(calibrate, "measure", lambda *_, **__: stop())
    else:
        pace.when[tokens] = stop
    assert main(tiny, "--bits", 3, "--minutes", 5, "--tokens", 1100, "-o", out) == 130
    said, err = capfd.readouterr()
    assert not said and "Traceback" not in err and "stopped: " in err and words in " ".join(err.split())
    assert out.exists() == ("not been read" not in words)
    if out.exists():
        profile = read_profile(out, tiny)
        assert profile.body_bits <= 3 and profile.measured == []
        assert all((layer.key_range > 0).all() for layer in profile.layers)


def test_a_real_ctrl_c_keeps_what_there_is(tiny, tmp_path):
    """The signal arrives while llama.cpp computes, once the text has been read. There is time for it on a busy machine, too."""
    out = tmp_path / "out.gguf"
    program = f"""
import os, signal, sys
from mixkvq.cli.calibrate import main
from mixkvq.study import calibrate
real = calibrate.measure_parts
def signalled(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments, **options)
calibrate.measure_parts = signalled
sys.exit(main([{str(tiny)!r}, "--bits", "3", "--minutes", "30", "--threads", "1", "-o", {str(out)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 130 and not done.stdout and "Traceback" not in done.stderr, done.stderr
    assert "stopped: " in done.stderr and "has the formats of the preset mix2.5" in done.stderr
    assert (read_profile(out, tiny).layers[0].key_range > 0).all()


def test_a_profile_serves_another_quantisation_as_well(calibrated, tmp_path):
    """Made with weights of 8 bits, it is no worse than the preset of its size with weights of 4, either."""
    model, _ = calibrated
    profile, other = str(model.with_name("model.mixkvq.gguf")), tmp_path / "q4_0.gguf"
    requantise(model, other, "Q4_0", 1)
    assert read_profile(profile, other).body_bits <= 3
    llm = bridge.Llama(str(model), stock="f16", n_ctx=256, vocab_only=True, verbose=False)
    tokens = llm.tokenize(default_text()[1].encode())[:1025]
    llm.close()
    (tmp_path / "f32").mkdir()
    for path in (model, other):
        copy = exact.f32_copy(path, tmp_path / "f32", 1)
        options = {"baseline": exact.BASELINE, "lengths": [], "threads": 1}
        (found,) = compare_caches(copy, [profile, "mix2.5"], [Passage(tokens)], **options)
        ours, preset = (each.summary()["kld_mean"] for each in found.values())
        assert 1e-4 < ours < preset


def test_the_preset_to_compare_with_is_that_of_the_nearest_size():
    """Not the largest that is no larger, which may be far smaller."""
    presets = budgets.presets_of(open_model(MODEL))
    sizes = [preset.bits for preset in presets]
    assert sizes == sorted(sizes) and len(sizes) >= 6
    for bits in (2.25, 2.6, 3.0, 3.2, 3.6, 5.0, 8.0):
        within, nearest = budgets.preset_within(presets, bits), budgets.nearest_preset(presets, bits)
        assert within.bits <= max(bits + 0.005, sizes[0]) and abs(nearest.bits - bits) == min(abs(size - bits) for size in sizes)
    assert budgets.preset_within(presets, 3.0).name == "mix2.5" and budgets.nearest_preset(presets, 3.0).name == "mix3.2"


def test_budget_holds_for_the_whole_cache(tmp_path):
    file = open_model(MODEL)
    for mib, n_ctx, window in ((20, 8192, 128), (70, 32768, 256), (9, 2048, 128)):
        bits = budgets.bits_of_budget(file, mib, n_ctx, window, 128)
        preset = budgets.preset_within(budgets.presets_of(file), bits)
        assert preset.bits <= bits
        llm = bridge.Llama(str(MODEL), kv=bridge.Kv(preset=preset.name, window=window), n_ctx=n_ctx, verbose=False)
        llm.eval(llm.tokenize(b"A short text."))
        assert llm.kv_stats()["bytes"] <= mib * 2**20
        llm.close()


def test_a_larger_window_leaves_fewer_bits_and_only_fitting_ones_are_tried():
    file = open_model(MODEL)
    sizes = budgets.sizes_of_budget(file, 70, 32768, None, None)
    assert list(sizes) == [128, 256, 512] and list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for window, bits in sizes.items():
        assert bits == budgets.bits_of_budget(file, 70, 32768, window, 128)
    assert list(budgets.sizes_of_budget(file, 20, 1024, None, None)) == [128, 256]  # at most a quarter of the context
    assert list(budgets.sizes_of_budget(file, 16, 8192, None, None)) == [128, 256]  # more cannot be paid for
    assert list(budgets.sizes_of_budget(file, 70, 32768, 200, None)) == [200]


@pytest.mark.parametrize("window", [0, 512])
@pytest.mark.parametrize("n_ctx", [512, 8192, 32768])
def test_the_budget_counts_what_lies_beside_the_pages(tiny, n_ctx, window):
    for model in (tiny, MODEL):
        llm = caches.open_cache(model, "balanced", window=window, n_ctx=n_ctx, n_batch=128, n_threads=1, n_threads_batch=1)
        own = caches.sizes(llm, "balanced", [n_ctx], window=window)
        pages = caches.total_bits(own["body_bits_k"], own["body_bits_v"], n_ctx, window) * open_model(model).cache_elements(n_ctx) / 8
        beside = own["bytes"] - pages
        assert beside <= budgets.table_bytes(open_model(model), n_ctx) <= 1.2 * beside
        llm.close()


def test_a_window_is_chosen_where_the_budget_is_bytes(tiny, tmp_path, monkeypatch, capfd):
    out, file = tmp_path / "out.gguf", open_model(tiny)
    mib = caches.total_bits(3.6, 3.6, 32768) * file.cache_elements(32768) / 8 / 2**20
    assert len(budgets.sizes_of_budget(file, mib, 32768, None, None)) == 3
    Pace(200, monkeypatch)
    assert main(tiny, "--budget-mib", mib, "--ctx", 32768, "--minutes", 5, "--tokens", 1024, "-o", out) == 0
    said = " ".join(capfd.readouterr().out.split())
    profile = read_profile(out, tiny)
    if "No allocation was better" in said:
        assert profile.window is None
    else:
        assert profile.window in budgets.WINDOWS and f"a window of {profile.window} tokens" in said
    llm = bridge.Llama(str(tiny), kv=out, n_ctx=32768, verbose=False)
    llm.eval(llm.tokenize(b"A short text."))
    assert llm.kv_stats()["bytes"] <= mib * 2**20
    llm.close()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--bits", 3, "--max-kld", 0.01], "give one of them"),
        (["--device", "CUDA7"], "no GPU 'CUDA7' to use"),
        (["--device", ","], "device is ','"),
        (["--bits", 1], "Invalid value for '--bits': 1.0 is not in the range 2.25<=x<=8.0"),
        (["--budget-mib", 100], "go together"),
        (["--budget-mib", 1, "--ctx", 32768], "needs at least"),
        (["--thresholds", "1,2"], "--policy paper"),
        (["--policy", "paper", "--thresholds", "many"], "not two numbers"),
        (["--text", "missing.txt"], "does not exist"),
        (["-o", "/no/such/folder/x.gguf"], "folder"),
    ],
)
def test_mistakes_get_one_sentence(arguments, sentence, tmp_path, capfd):
    if "-o" not in arguments:
        arguments = [*arguments, "-o", tmp_path / "out.gguf"]
    assert main(MODEL, *arguments) in (1, 2)
    out, err = capfd.readouterr()
    assert not out and sentence in err and len(err.strip().splitlines()) == 1


def test_short_text_and_wrong_model_get_one_sentence(tmp_path, capfd):
    text = tmp_path / "short.txt"
    text.write_text("Only a few words.")
    for arguments in ([MODEL, "--text", text, "-o", tmp_path / "out.gguf"], [text], [tmp_path / "none.gguf"]):
        assert main(*arguments) in (1, 2)
        out, err = capfd.readouterr()
        assert not out and len(err.strip().splitlines()) == 1


def test_measured_figures_are_json(calibrated):
    model, _ = calibrated
    profile = read_profile(model.with_name("model.mixkvq.gguf"))
    assert json.loads(json.dumps(profile.measured)) == profile.measured


@pytest.mark.parametrize(("read", "words"), [(8.04, "8.04"), (171.4, "171"), (15712.3, "15712"), (1.5e7, "15000000")])
def test_a_speed_reads_as_a_number(read, words):
    assert budget.Speed(read, 1.0).words() == words
