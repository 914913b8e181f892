"""mixkvq.evaluate and what it is made of, on the built-in model and on tiny ones."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from bridge import ContextError, GeometryError, Kv, Llama, SettingsError
from mixkvq.cli import calibrate as calibrate_command
from mixkvq.cli import evaluate as evaluate_command
from mixkvq.cli.evaluate import main
from mixkvq.core.model_file import built_in_model
from mixkvq.core.native import native
from mixkvq.core.profile import uniform_profile, write_profile
from mixkvq.study import caches, compare, evaluate, plots, problems, record, tokens
from mixkvq.study.compare import NOISE_FLOOR, Comparison, Passage, compare_caches, cut, feed
from mixkvq.study.texts import default_text

MODEL = str(built_in_model())
PROSE = Path(evaluate.__file__).with_name("calibration.txt")
THREADS = ["--threads", "1"]  # waiting threads are slow on a busy machine


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_models.llama(tmp_path_factory.mktemp("models") / "tiny.gguf"))


@pytest.fixture(scope="module")
def prose():
    """Tokens of running text for the built-in model."""
    llm = caches.open_cache(MODEL, "f16", n_ctx=256, vocab_only=True)
    return compare.tokenize_text(llm, default_text()[1].encode())[0]


def random_tokens(n, seed=0):
    return np.random.default_rng(seed).integers(3, 259, n).tolist()


def run(capfd, *arguments):
    """The command line in this process: exit code, stdout, stderr."""
    code = main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    return code, out, err


# ---- names and sizes -------------------------------------------------------------------------------------


def test_split_names():
    assert caches.split_names(" f16, q8_0,,f16 ") == ["f16", "q8_0"]
    assert caches.split_names(["f16,lab:mixkvq:K=32@4+96@3,V=3,score=S,q4_0", "lab:kivi-2"]) == [
        "f16",
        "lab:mixkvq:K=32@4+96@3,V=3,score=S",
        "q4_0",
        "lab:kivi-2",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [("nope", "no cache 'nope'"), ("q4_1-nope", "no cache"), ("missing.gguf", "missing.gguf does not exist"), ("lab:nope", "no codec 'nope'")],
)
def test_unknown_name_is_a_sentence(name, words):
    with pytest.raises(ValueError, match=words):
        caches.open_cache(MODEL, name)


@pytest.mark.parametrize(("window", "sinks"), list(product((0, 1, 128, 300), (0, 128, 200))))
def test_total_bits_agree_with_what_is_allocated(tiny, window, sinks):
    llm = caches.open_cache(tiny, "balanced", window=window, sinks=sinks, n_ctx=2048, n_batch=128)
    llm.eval(random_tokens(8))
    own = caches.sizes(llm, "balanced", [2048, 8192], window=window, sinks=sinks)
    expected = caches.total_bits(own["body_bits_k"], own["body_bits_v"], 2048, window, sinks)
    tables = own["total_bits"]["2048"] - expected
    # Page tables, and of every key channel 4 bytes each of mean and square, now and at three marks, and of its importance: 36 bytes by 4096 elements
    # of a key and a value channel are 0.07 bits. The rest are the books of four tiny tensors.
    assert 0 <= tables < 0.12
    assert own["bytes"] == pytest.approx(own["total_bits"]["2048"] * llm.kv_stats()["elements"] / 8)
    longer = caches.open_cache(tiny, "balanced", window=window, sinks=sinks, n_ctx=8192, n_batch=128)
    assert 0 <= longer.kv_stats()["total_bits"] - own["total_bits"]["8192"] < 0.05
    assert (own["window"], own["sinks"]) == (window, sinks)


@given(
    st.floats(2, 16), st.floats(2, 16), st.integers(1, 1 << 17), st.integers(0, 1024), st.integers(0, 1024), st.floats(0, 1)
)  # fmt: skip
def test_total_bits_properties(k, v, n_ctx, window, sinks, share):
    bits = caches.total_bits(k, v, n_ctx, window, sinks, key_share=share)
    body = share * k + (1 - share) * v
    assert bits > 0 and bits >= min(16, body) * (1 - 1e-9) - 128 * 16 / n_ctx
    pages = [-(-n // 128) for n in (n_ctx, sinks, window + 128)]
    if pages[0] > sum(pages[1:]) + 1:  # else the F16 page of each token is what a full context has, and packed pages beside them are no more
        assert caches.total_bits(k, v, n_ctx, window + 128, sinks, key_share=share) >= bits
    assert caches.total_bits(k, v, 1 << 30, window, sinks, key_share=share) == pytest.approx(body, rel=1e-3)


def test_sliding_window_layers_do_not_grow(tmp_path):
    path = str(tiny_models.gemma2(tmp_path / "gemma2.gguf"))
    llm = caches.open_cache(path, "balanced", n_ctx=1024, n_batch=64, n_ubatch=64)
    llm.eval(random_tokens(8))
    expected = caches.sizes(llm, "balanced", [2048])["total_bits"]["2048"]
    longer = caches.open_cache(path, "balanced", n_ctx=2048, n_batch=64, n_ubatch=64)
    assert longer.kv_stats()["total_bits"] == pytest.approx(expected, abs=0.2)


def test_codec_is_sized_as_its_format():
    llm = caches.open_cache(MODEL, "lab:kivi-2", sinks=128, n_ctx=1024, n_batch=128, n_threads=1)
    llm.eval(random_tokens(600))
    own = caches.sizes(llm, "lab:kivi-2", sinks=128)
    assert own["body_bits"] == own["body_bits_k"] == own["body_bits_v"] == 3.0
    assert own["total_bits"]["1024"] == pytest.approx(caches.total_bits(3, 3, 1024), abs=0.06)
    assert own["bytes"] == pytest.approx(own["total_bits"]["1024"] * llm.kv_stats()["elements"] / 8)
    stock = caches.sizes(caches.open_cache(MODEL, "q8_0", n_ctx=512), "q8_0", [512, 8192])
    assert stock["body_bits"] == 8.5 and stock["total_bits"] == {"512": 8.5, "8192": 8.5} and stock["window"] is None


def test_window_and_sinks_come_from_the_profile_unless_given(tiny, tmp_path):
    profile = uniform_profile(tiny, "small", window=256, sinks=0)
    path = tmp_path / "own.gguf"
    write_profile(path, profile)
    assert caches.f16_tokens(str(path)) == (256, 0)
    assert caches.f16_tokens(str(path), sinks=128) == (256, 128)
    assert caches.f16_tokens("balanced") == (128, 128)
    assert compare.windows_of(["q4_0", "balanced", str(path), NOISE_FLOOR]) == {128, 256}
    assert caches.file_of(str(path)) == path and caches.file_of("balanced") is caches.file_of("q8_0") is None
    assert caches.file_of("lab:some/file.py:mine") == Path("some/file.py")


# ---- decode style ----------------------------------------------------------------------------------------


@given(st.integers(1, 1500), st.sets(st.integers(0, 700), max_size=3))
def test_cuts_are_where_pages_are_packed(n, windows):
    cuts = cut(n, "decode", windows)
    assert cuts[0] == 0 and cuts[-1] == n and cuts == sorted(set(cuts))
    assert max(b - a for a, b in zip(cuts, cuts[1:])) <= 128
    changes = {128 * (p + 1) + max(w, 1) for w in windows for p in range(n // 128 + 1)}
    assert {c for c in changes if c < n} <= set(cuts)
    for style, step in (("prefill", 512), ("token", compare.SINGLE_STEPS)):
        assert cut(n, style, windows) == [*range(0, n, step), n]


def packed(llm):
    return [layer["pages_packed"] for layer in llm.kv_layers()]


@pytest.mark.parametrize(("window", "sinks"), [(128, 128), (0, 0), (64, 128), (200, 128), (256, 0)])
def test_decode_style_is_token_by_token(tiny, window, sinks):
    """Every query meets the same packed pages in both styles, and predicts the same; long batches do neither."""
    tokens = random_tokens(1000)

    def walk(cuts, batch):
        llm = caches.open_cache(tiny, "balanced", window=window, sinks=sinks, n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=1, device="cpu")
        met, rows = [], []
        for start, end in zip(cuts, cuts[1:]):
            met += [packed(llm)] * (end - start)
            rows.append(feed(llm, tokens[start:end], batch, end - start).copy())
        logits = np.concatenate(rows).astype(np.float64)
        return met, logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), llm.kv_stats()["bytes_used"]

    met, p, used = walk(range(len(tokens) + 1), 1)
    met_by_pages, q, used_by_pages = walk(cut(len(tokens), "decode", [window]), 128)
    met_by_batches, r, _ = walk(cut(len(tokens), "prefill"), 512)
    assert met_by_pages == met and used_by_pages == used
    assert met[-1][0] >= 3 and met_by_batches != met

    def kld(other):
        return float((np.exp(p) * (p - other)).sum(axis=1).mean())

    assert kld(q) < 0.0005  # rounding; queries old and new are weighed a little differently when they fade
    assert kld(r) > 0.005


def test_decode_style_has_the_divergence_of_single_tokens(prose):
    passage, names = Passage(prose[:530]), {"balanced": 0.01, "q4_0": 0.2}
    found = {}
    for style in ("decode", "token"):
        groups = compare_caches(MODEL, list(names), [passage], style=style, threads=1, device="cpu")
        found[style] = {name: one.summary() for group in groups for name, one in group.items()}
    for name, most in names.items():
        decode, token = found["decode"][name], found["token"][name]
        assert decode["tokens"] == token["tokens"] == 529 and decode["total_bits"] == token["total_bits"]
        assert decode["kld_mean"] == pytest.approx(token["kld_mean"], abs=0.0005 + 3 * decode["kld_standard_error"] * 0.3)
        assert decode["perplexity"] == pytest.approx(token["perplexity"], rel=0.01)
        assert 0.0005 < decode["kld_mean"] < most


def test_only_wanted_rows_come_back(tiny):
    tokens = random_tokens(40)
    whole, part = (caches.open_cache(tiny, "f16", n_ctx=256, n_batch=64, n_threads=1, device="cpu") for _ in range(2))
    rows = feed(whole, tokens, 64, 40).copy()
    assert feed(part, tokens[:20], 8, 0).shape == (0, tiny_models.N_VOCAB)
    np.testing.assert_allclose(feed(part, tokens[20:], 7, 9), rows[-9:], atol=2e-2)
    np.testing.assert_array_equal(whole.last_logits().shape, [tiny_models.N_VOCAB])
    assert part.n_tokens == 40 and part.input_ids[:40].tolist() == tokens


def test_what_a_codec_raises_is_the_error():
    def codec(page):
        raise ZeroDivisionError("on purpose")

    import bridge

    llm = bridge.Llama(MODEL, kv=Kv(window=0, sinks=0), codec=codec, n_ctx=512, n_batch=128, n_threads=1, verbose=False)
    with pytest.raises(ContextError, match="on purpose") as e:
        for _start in range(0, 512, 128):
            feed(llm, random_tokens(128), 128, 0)
    assert isinstance(e.value.__cause__, ZeroDivisionError)


# ---- figures ---------------------------------------------------------------------------------------------


def test_comparison_by_hand():
    one = Comparison()
    p, q = np.array([[0.5, 0.5, 0.0], [0.1, 0.7, 0.2]]), np.array([[0.25, 0.75, 0.0], [0.1, 0.7, 0.2]])
    with np.errstate(divide="ignore"):
        one.add(np.log(p, dtype=np.float32), np.log(q, dtype=np.float32), [1, 0])
    assert one.kld == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), 0], abs=1e-7)
    assert one.same_top == [False, True] and one.right == [True, False] and one.right_baseline == [False, False]
    figures = compare.summarise([one])
    assert figures["perplexity"] == pytest.approx(1 / math.sqrt(0.75 * 0.1))
    assert figures["perplexity_ratio"] == pytest.approx(figures["perplexity"] / figures["perplexity_baseline"])
    assert figures["flips"] == 1 and figures["same_top"] == 0.5 and figures["kld_max"] == max(one.kld)
    assert figures["kld_standard_error"] is None


def test_standard_error_counts_blocks():
    rng = np.random.default_rng(5)
    independent = rng.normal(size=128 * 200)
    assert compare.standard_error([independent]) == pytest.approx(1 / math.sqrt(128 * 200), rel=0.2)
    dependent = np.repeat(rng.normal(size=200), 128)
    assert compare.standard_error([dependent]) == pytest.approx(1 / math.sqrt(200), rel=0.2)
    parts = np.split(dependent, 50)
    assert compare.standard_error(parts) == pytest.approx(compare.standard_error([dependent]))
    assert compare.standard_error([np.ones(511)]) is None and compare.standard_error([np.ones(512)]) == 0
    assert compare.standard_error([np.ones(3), np.ones(2), np.ones(1), np.zeros(1)]) > 0


@given(st.integers(0, 30), st.integers(0, 30))
def test_sign_test(lost, won):
    n = lost + won
    likely = [math.comb(n, k) for k in range(n + 1)]
    expected = sum(x for x in likely if x <= likely[lost] * (1 + 1e-12)) / 2**n
    assert problems.sign_test(lost, won) == pytest.approx(min(1.0, expected))


@pytest.mark.parametrize(("right", "n"), [(203, 208), (0, 10), (10, 10), (1, 1), (57, 200), (1, 100000)])
def test_wilson(right, n):
    interval = scipy_stats.binomtest(right, n).proportion_ci(0.95, "wilson")
    assert problems.wilson(right, n) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert problems.wilson(0, 0) == (0.0, 1.0)
    for lost, won in ((right, n - right), (n - right, right), (0, right)):
        p = scipy_stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
        if lost + won < 1000:
            assert problems.sign_test(lost, won) == pytest.approx(p, rel=1e-9)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1))
def test_frontier(points):
    best = plots.frontier(points)
    assert set(best) <= set(points) and best == sorted(best)
    for bits, kld in points:
        assert any(b <= bits and k <= kld for b, k in best)
    for b, k in best:
        assert not any((bits <= b and kld < k) or (bits < b and kld <= k) for bits, kld in points)


# ---- the command line on text ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A result: two styles, four caches, with the default text."""
    folder = tmp_path_factory.mktemp("run")
    profile = folder / "mine.gguf"
    write_profile(profile, uniform_profile(MODEL, "mix8.2", window=256))
    out = folder / "kld.json"
    arguments = [MODEL, "--kv", f"q4_0,balanced,{profile}", "--kv", "lab:kivi-2", "--ctx", "520", "--style", "decode,prefill", *THREADS]
    assert main([*arguments, "--out", str(out)]) == 0
    return out, arguments, str(profile)


def test_result_is_consistent(run_file):
    out, _, profile = run_file
    result = json.loads(out.read_text())
    assert result["bench"] == "evaluate" and result["commit"] and result["machine"]["cpu"] and result["versions"]["llama_cpp_python"]
    assert result["model"]["name"] == Path(MODEL).name and len(result["model"]["sha256"]) == 64
    assert result["settings"]["cuts"] == [128, 256] and result["settings"]["seed"] == 1
    assert list(result["files"]) == [profile]
    decode, prefill = result["sections"]
    assert (decode["style"], prefill["style"]) == ("decode", "prefill")
    assert decode["text"]["name"] == "the default text" and decode["offsets"] == prefill["offsets"]
    assert decode["offsets"][0] % 520 == 0
    for section in (decode, prefill):
        assert list(section["caches"]) == [NOISE_FLOOR, "q4_0", "balanced", profile, "lab:kivi-2"]
        for name, f in section["caches"].items():
            assert f["tokens"] == 519 and f["kld_mean"] >= 0 and f["kld_standard_error"] > 0 and f["seconds"] > 0
            assert f["kld_median"] <= f["kld_99%"] <= f["kld_99.9%"] <= f["kld_max"]
            assert f["same_top"] == pytest.approx(1 - f["flips"] / 519)
            assert f["perplexity_ratio"] == pytest.approx(f["perplexity"] / f["perplexity_baseline"])
            assert np.mean(f["kld_by_quarter"]) == pytest.approx(f["kld_mean"], rel=0.01)
            assert list(f["total_bits"]) == ["768", "8192", "32768"]
            assert f["bytes"] == pytest.approx(f["total_bits"]["768"] * 768 * 10 * 2 * 2 * 128 / 8, rel=0.01), name
    caches_ = decode["caches"]
    assert caches_["lab:kivi-2"]["body_bits"] == 3.0 and caches_["lab:kivi-2"]["sinks"] == 0
    assert caches_[profile]["window"] == 256 and caches_["balanced"]["window"] == 128
    # A cache that stays F16 for most of such a short text is at the floor; 4 bits without a window are far away, in every style.
    assert caches_[profile]["kld_mean"] < 2 * caches_[NOISE_FLOOR]["kld_mean"] < caches_["q4_0"]["kld_mean"] / 5
    assert prefill["caches"]["q4_0"]["kld_mean"] == pytest.approx(caches_["q4_0"]["kld_mean"], rel=0.1)
    assert str(Path(MODEL).parent) not in json.dumps({**result, "files": {}, "sections": []})


def test_what_is_there_is_not_measured_again(run_file, capfd):
    out, arguments, profile = run_file
    before = json.loads(out.read_text())
    code, printed, _ = run(capfd, *arguments, "--kv", "small", "--at-once", "1", "--out", out)
    after = json.loads(out.read_text())
    assert code == 0 and "small" in printed and "the default text" in printed and "No --text was given" in printed
    for old, new in zip(before["sections"], after["sections"], strict=True):
        assert set(new["caches"]) - set(old["caches"]) == {"small"}
        assert all(new["caches"][name] == old["caches"][name] for name in old["caches"])
    # Another number of caches at a time gives the same figures.
    code, _, _ = run(capfd, *arguments, "--no-floor", "--at-once", "2", "--style", "decode", "-q", "--out", out.with_name("other.json"))
    again = json.loads(out.with_name("other.json").read_text())["sections"][0]
    for name, figures in again["caches"].items():
        old = {key: x for key, x in before["sections"][0]["caches"][name].items() if key != "kld_over_floor"}  # there is no floor here
        assert {**figures, "seconds": 0} == {**old, "seconds": 0}
    # Other settings, or another file under the same name, are another run.
    assert run(capfd, *arguments, "--seed", "2", "--out", out)[0] == 2
    write_profile(profile, uniform_profile(MODEL, "mix8.2"))
    code, _, err = run(capfd, *arguments, "--window", "256", "--out", out)
    assert code == 2 and "another" in err and "--restart" in err


def test_plot(run_file, tmp_path):
    pytest.importorskip("matplotlib")
    result = json.loads(run_file[0].read_text())
    result["problems"] = {
        "kind": "problems", "count": 10, "source": "built in", "sizes": {"balanced": {"body_bits": 3.2, "total_bits": {"512": 5.0}}},
        "summary": {"balanced": {"accuracy": 0.5, "accuracy_95%": [0.2, 0.8]}},
    }  # fmt: skip
    for name in ("one.svg", "same.svg", "one.png"):
        plots.draw_evaluation(result, tmp_path / name)
    svg, again, png = ((tmp_path / name).read_bytes() for name in ("one.svg", "same.svg", "one.png"))
    assert svg == again and b"<svg" in svg and png.startswith(b"\x89PNG")
    for words in (b"the default text, prefill", b"body bits", b"at 768 tokens", b"noise floor", b"lab:kivi-2", b"10 problems"):
        assert b"<!-- " in svg and words in svg, words


def test_plot_without_matplotlib_is_said_at_once(capfd, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capfd, MODEL, "--plot", tmp_path / "x.svg")
    assert code == 2 and "Plots need matplotlib" in err and "mixkvq[plot]" in err


# ---- nothing is lost -------------------------------------------------------------------------------------


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A folder with a short text in it, and the options that read it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(bytes(Random(3).choices(range(97, 123), k=2000)))
    return ["--text", "text.txt", "--ctx", "300", "--no-floor", "--at-once", "1", *THREADS]


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_targets_are_checked_before_anything_is_measured(tiny, short, option, monkeypatch, capfd):
    pytest.importorskip("matplotlib")
    Path("m.gguf").write_bytes(Path(tiny).read_bytes())
    Path("link.svg").symlink_to("m.gguf")
    Path("link.json").symlink_to("m.gguf")
    Path("profile.json").write_text('{"fingerprint": "0", "layers": []}')
    Path("speed.json").write_text('{"bench": "speed"}')
    Path("old.svg").write_text("<svg></svg>")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    monkeypatch.setattr(evaluate, "open_model", lambda *_: pytest.fail("the model is opened"))
    ending = "json" if option == "--out" else "svg"
    outs = [f"link.{ending}", f"/proc/x.{ending}", f"none/x.{ending}", ".", "text.txt", "m.gguf"]
    outs += ["profile.json", "speed.json", "/dev/null"] if option == "--out" else ["old.svg"]
    for out in outs:
        for force in ([], ["--restart"]) if option == "--out" else ([], ["--force"]):
            if (out, force) == ("old.svg", ["--force"]):
                continue
            code, printed, err = run(capfd, "m.gguf", *short, option, out, *force)
            assert (code, printed) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and out in err and ".mixkvq-" not in err, err
    code, _, err = run(capfd, "m.gguf", *short, "--out", "a.svg", "--plot", "./a.svg")
    assert code == 2 and "two files at once" in err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_a_plot_that_cannot_be_written_does_not_cost_the_tables(tiny, short, monkeypatch, capfd):
    pytest.importorskip("matplotlib")

    def fail(*_, **__):
        raise OSError(28, "No space left on device", "x.svg")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "draw_evaluation", fail)
        code, printed, err = run(capfd, tiny, *short, "--kv", "balanced", "--plot", "x.svg", "--out", "x.json")
    assert code == 1 and "balanced" in printed and "No space left" in err and json.loads(Path("x.json").read_text())["sections"]


def test_a_picture_that_appears_while_measuring_stays_unless_forced(tiny, short, monkeypatch, capfd):
    pytest.importorskip("matplotlib")
    measure = evaluate_command.evaluate

    def appears(*arguments):
        measure(*arguments)
        Path("x.svg").write_text("<svg>mine</svg>")

    monkeypatch.setattr(evaluate_command, "evaluate", appears)
    code, printed, err = run(capfd, tiny, *short, "--kv", "balanced", "--plot", "x.svg")
    assert code == 1 and "balanced" in printed and err == "error: x.svg: File exists.\n" and Path("x.svg").read_text() == "<svg>mine</svg>"
    assert run(capfd, tiny, *short, "--kv", "balanced", "--plot", "x.svg", "--force")[0] == 0 and "balanced" in Path("x.svg").read_text()


def test_figures_that_cannot_be_written_are_printed(tiny, short, monkeypatch, capfd):
    def fail(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(evaluate, "save_json", fail)
    code, printed, err = run(capfd, tiny, *short, "--kv", "balanced,small", "--out", "x.json")
    assert code == 1 and "balanced" in printed and err == "error: x.json: No space left on device.\n"


@pytest.mark.parametrize("out", [[], ["--out", "x.json"]])
def test_ctrl_c_says_what_is_kept(tiny, short, out, monkeypatch, capfd):
    """The second cache is not read to its end; the first is there, and is not measured again."""
    forward, opened = Llama.forward, []

    def counted(llm, *rest, **options):
        opened.append(llm)
        if len(set(map(id, opened))) == 3:  # the baseline, the first cache, the second
            raise KeyboardInterrupt
        return forward(llm, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Llama, "forward", counted)
        code, printed, err = run(capfd, tiny, *short, "--kv", "balanced,small", *out)
    assert code == 130 and "balanced" in printed and "small" not in printed
    said = "in x.json; the same command goes on" if out else "not in a file"
    assert err.startswith(f"stopped: What was measured is {said}") and err.count("\n") == 1
    if out:
        assert list(json.loads(Path("x.json").read_text())["sections"][0]["caches"]) == ["balanced"]
        assert run(capfd, tiny, *short, "--kv", "balanced,small", *out)[0] == 0
        assert list(json.loads(Path("x.json").read_text())["sections"][0]["caches"]) == ["balanced", "small"]


def test_ctrl_c_before_anything_is_measured(tiny, short, monkeypatch, capfd):
    def stop(*_, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Llama, "forward", stop)
    assert run(capfd, tiny, *short, "--out", "x.json") == (130, "", "stopped: Nothing was measured yet, and nothing is written.\n")
    assert not Path("x.json").exists()


def test_only_a_result_that_is_written_needs_the_hash_of_the_model(tiny, short, monkeypatch, capfd):
    hashed, describe = [], record.describe_file
    monkeypatch.setattr(record, "describe_file", lambda path, *rest: hashed.append(path) or describe(path, *rest))
    assert run(capfd, tiny, *short, "--kv", "balanced")[0] == 0 and not hashed
    assert run(capfd, tiny, *short, "--kv", "balanced", "--out", "x.json")[0] == 0 and hashed == [Path(tiny)]
    result = json.loads(Path("x.json").read_text())
    assert len(result["model"]["sha256"]) == 64 and result["command"].startswith(f"python -m mixkvq.evaluate {Path(tiny).name} --text text.txt")
    assert {"date", "commit", "machine", "versions"} <= set(result) and {"baseline", "seed", "ctx"} <= set(result["settings"])
    assert result["sections"][0]["text"]["name"] == "text.txt"


def test_a_guarantee_that_needs_more_text_says_so_before_it_is_measured(tiny, short, monkeypatch, capfd):
    monkeypatch.setattr(Llama, "forward", lambda *_, **_options: pytest.fail("the text is read"))
    code, printed, err = run(capfd, tiny, *short, "--guarantee", "0.1")
    assert (code, printed) == (2, "") and "at least 512 predictions" in err


def heed_sigint():
    """As in a terminal: tests in the background are deaf to it, and so would be what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("workers", ["1", "3"])
def test_ctrl_c_while_problems_are_answered(tmp_path, workers):
    """Every process of a terminal gets it; one says so."""
    out = tmp_path / "x.json"
    arguments = [MODEL, "--problems", "40", "--levels", "easy", "--kv", "balanced", "--workers", workers, "--out", str(out), *map(str, THREADS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mixkvq.evaluate", *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed_sigint
    )
    while not out.exists() and process.poll() is None:  # the first answer
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    err = process.communicate()[1]
    assert process.returncode == 130 and err == f"stopped: What was measured is in {out}; the same command goes on from there.\n"
    assert json.loads(out.read_text())["problems"]["records"]


@pytest.mark.parametrize("answered", [0, 5])
def test_ctrl_c_keeps_the_answers_that_there_are(tmp_path, answered, monkeypatch, capfd):
    """The baseline's four, and one of a cache: of two problems at once, the second comes to its end first or not at all."""
    out = tmp_path / "x.json"
    arguments = [MODEL, "--problems", 4, "--tasks", "add", "--levels", "easy", "--kv", "small,q4_0", "--workers", 2, "--max-tokens", 5, "--out", out]
    solve = problems.Solver.solve

    def stopped(self, jobs, at_once):
        for n, found in enumerate(solve(self, jobs, at_once)):
            if n == answered:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(evaluate, "time", SlowToSave)
    with monkeypatch.context() as patch:
        patch.setattr(problems.Solver, "solve", stopped)
        code, printed, err = run(capfd, *arguments, *THREADS)
    assert code == 130 and out.exists() == (answered > 0)
    if not answered:
        assert printed == "" and err == "stopped: Nothing was measured yet, and nothing is written.\n"
        return
    assert "small" in printed and "q4_0" not in printed and f"is in {out}; the same command goes on" in err
    part = json.loads(out.read_text())["problems"]
    assert sum(len(r["answers"]) for r in part["records"]) == answered
    assert {name: f["problems"] for name, f in part["summary"].items()} == {"f16": 1, "small": 1}
    kept = {r["index"]: r["answers"] for r in part["records"]}
    assert run(capfd, *arguments, *THREADS)[0] == 0
    part = json.loads(out.read_text())["problems"]
    assert [f["problems"] for f in part["summary"].values()] == [4, 4, 4]
    assert all(r["answers"][cache] == answer for r in part["records"] for cache, answer in kept[r["index"]].items())
    found = part["records"]
    assert run(capfd, *arguments, "--restart", *THREADS)[0] == 0
    again = json.loads(out.read_text())["problems"]["records"]
    for one, other in zip(found, again, strict=True):
        assert all(answer["tokens"] == other["answers"][cache]["tokens"] for cache, answer in one["answers"].items())


class SlowToSave:
    """A clock with which saving takes so long that only the first answer and the end are saved."""

    now = 0.0

    @classmethod
    def perf_counter(cls):
        cls.now += 1
        return cls.now


def test_windows_and_skip(tiny, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(Random(3).choices(range(97, 123), k=2000)))
    out = tmp_path / "out.json"
    arguments = ["--kv", "small", "--ctx", 300, "--windows", 3, "--skip", 100, "--device", "cpu", "--out", out, "-q"]
    code, _, _ = run(capfd, tiny, "--text", text, *arguments, *THREADS)
    result = json.loads(out.read_text())
    (section,) = result["sections"]
    assert result["settings"]["device"] == "cpu"
    assert code == 0 and len(section["offsets"]) == 3 and all(at % 299 == 0 for at in section["offsets"])  # one token is the BOS
    assert section["caches"]["small"]["tokens"] == 3 * (299 - 100)


# ---- the guarantee ---------------------------------------------------------------------------------------


def test_guarantee_picks_the_smallest_that_holds(tmp_path, capfd):
    out = tmp_path / "g.json"
    arguments = [MODEL, "--ctx", 640, "--out", out, *THREADS]
    code, printed, _ = run(capfd, *arguments, "--guarantee", 10)
    assert code == 0
    assert "measured on your model: tiny (2.41 body bits) keeps mean KLD at" in printed and "<= 10 on the default text (639 predictions" in printed
    assert printed.rstrip().endswith("use --kv tiny")
    result = json.loads(out.read_text())
    klds = {name: f["kld_mean"] + f["kld_standard_error"] for name, f in result["sections"][0]["caches"].items()}
    assert list(klds) == ["tiny", "small", "balanced", "paper"]
    # Between the smallest and the next: a limit that only the second one keeps.
    assert klds["small"] < klds["tiny"]
    limit = (klds["small"] + klds["tiny"]) / 2
    code, printed, _ = run(capfd, *arguments, "--guarantee", limit, "-q")
    assert (code, printed) == (0, "small\n")
    code, printed, err = run(capfd, *arguments, "--guarantee", 1e-9, "--kv", "small,tiny", "-q")
    assert code == 1 and printed == "" and "no cache that was tried" in err and "small" in err
    found = json.loads(out.read_text())["guarantee"]
    assert found["cache"] is None and [entry["cache"] for entry in found["tried"]] == ["tiny", "small"]


# ---- derivations and answers -----------------------------------------------------------------------------


def test_derivations(tmp_path, capfd):
    out = tmp_path / "d.json"
    code, printed, _ = run(
        capfd, MODEL, "--derivations", 3, "--tasks", "add,mul,sort", "--levels", "easy", "--kv", "q4_0,tiny", "--out", out, *THREADS
    )  # fmt: skip
    (section,) = json.loads(out.read_text())["sections"]
    assert code == 0 and "3 derivations, decode" in printed and section["kind"] == "derivations"
    assert [p["task"] for p in section["problems"]] == ["add", "mul", "sort"]
    n = sum(p["tokens"] for p in section["problems"])
    for name in (NOISE_FLOOR, "q4_0", "tiny"):
        f = section["caches"][name]
        assert f["tokens"] == n and len(f["by_problem"]) == 3 and f["baseline_exact"] == 3
        assert f["wrong"] == sum(p["wrong"] for p in f["by_problem"]) and f["flips"] == sum(p["flips"] for p in f["by_problem"])
        assert f["exact"] == sum(p["wrong"] == 0 for p in f["by_problem"])
    assert section["caches"]["tiny"]["kld_mean"] < 0.01


def test_built_in_problems_go_on_where_they_stopped(tmp_path, capfd):
    out = tmp_path / "p.json"
    common = [MODEL, "--tasks", "add,mul", "--levels", "easy", "--out", out, "--first", 50, "-q", *THREADS]
    assert run(capfd, *common, "--problems", 2, "--kv", "balanced", "--workers", 1)[0] == 0
    before = json.loads(out.read_text())["problems"]
    assert run(capfd, *common, "--problems", 4, "--kv", "balanced,q8_0", "--workers", 2)[0] == 0
    after = json.loads(out.read_text())["problems"]
    assert len(before["records"]) == 2 and len(after["records"]) == 4 and after["count"] == 4
    for old, new in zip(before["records"], after["records"]):
        assert all(new["answers"][name] == answer for name, answer in old["answers"].items())
    assert [r["task"] for r in after["records"]] == ["add", "mul"] * 2
    for name in ("f16", "balanced", "q8_0"):
        f = after["summary"][name]
        assert f["problems"] == 4 and f["correct"] == 4 and f["cut"] == 0 and f["lost"] == f["won"] == 0 and f["sign_test_p"] == 1
        assert f["tokens"] == sum(len(r["answers"][name]["tokens"]) for r in after["records"])
    assert after["sizes"]["balanced"]["body_bits"] == pytest.approx(3.21875)
    # Other problems do not go into the same file.
    code, printed, err = run(capfd, *common, "--problems", 2, "--max-tokens", 9)
    assert code == 2 and "other problems" in err and not printed


def test_answers_do_not_depend_on_what_came_before():
    """The cache learns from queries, so a context that had answered something else would answer a little differently."""
    source = problems.BuiltIn(("chain",), ("medium",))
    vocabulary = caches.open_cache(MODEL, "f16", n_ctx=256, vocab_only=True)
    drawn = source.draw(3, 2)
    n_ctx = problems.add_tokens(vocabulary, drawn, 80)
    solver = problems.Solver(MODEL, source, n_ctx, 1)
    first, second = (solver.answers(problem, ["tiny"])["tiny"]["tokens"] for problem in drawn)
    fresh = problems.Solver(MODEL, source, n_ctx, 1)
    assert fresh.answers(drawn[1], ["tiny"])["tiny"]["tokens"] == second
    assert fresh.answers(drawn[0], ["tiny"])["tiny"]["tokens"] == first


def test_problems_from_a_file(tmp_path, capfd):
    file = tmp_path / "gsm.jsonl"
    sums = [(917, 46), (1234, 8), (56, 37)]
    lines = [{"question": f"Compute {a} * {b}.", "answer": f"We say {a}*{b}.\n#### {a * b:,}"} for a, b in sums]
    lines.append({"question": "Compute 91 * 7.", "answer": "Wrong on purpose\n#### 638"})
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    out = tmp_path / "out.json"
    code, printed, _ = run(
        capfd, MODEL, "--problems-file", file, "--instruction", "", "--kv", "balanced", "--workers", 1, "--out", out, *THREADS
    )  # fmt: skip
    part = json.loads(out.read_text())["problems"]
    assert code == 0 and "4 problems, gsm.jsonl" in printed and part["count"] == 4
    assert part["summary"]["f16"]["correct"] == part["summary"]["balanced"]["correct"] == 3
    code, printed, _ = run(
        capfd, MODEL, "--problems-file", file, "--shots", 2, "--max-tokens", 3, "--kv", "balanced", "--restart", "--out", out, *THREADS
    )  # fmt: skip
    part = json.loads(out.read_text())["problems"]
    assert code == 0 and part["shots"] == 2 and part["count"] == 2 and "2 problems" in printed
    code, _, err = run(capfd, MODEL, "--problems", 2, "--shots", 2, "--kv", "balanced", *THREADS)
    assert code == 2 and "--shots needs --problems-file" in err
    drawn = problems.NumberFile(file).draw(1, 2)
    assert drawn == problems.NumberFile(file).draw(1, None)[:2] and drawn[0]["prompt"].endswith(problems.INSTRUCTION)


def test_numbers():
    assert problems.last_number("It is 3.\n#### $1,234.50 dollars 7") == problems.number("1234.5")
    assert problems.last_number("so 5 apples and 12 pears.") == 12
    assert problems.last_number("#### none, but 4 before 6") == 4
    assert problems.last_number("the answer is 3/4") == problems.number("0.75")
    assert problems.last_number("so 16-7") == 7 and problems.last_number("x=-7") == -7
    assert problems.last_number("-18") == -18 and problems.last_number("none") is None
    assert problems.number("18") == problems.number("18.00") != problems.number("18.01")
    assert problems.number("1/0") is None and problems.number("") is None and problems.number("x") is None


CHECKER = """
from mixkvq.study import tasks

def problems(rng, n):
    for _ in range(n):
        prompt, _, answer = tasks.make("add", rng, 0)
        yield {"prompt": prompt, "answer": answer, "note": [len(prompt)]}

def check(problem, text):
    assert problem["note"] == [len(problem["prompt"])]
    return text.replace("<|im_end|>", "").split("####")[-1].strip() == str(problem["answer"])
"""


def test_checker_module(tmp_path, capfd):
    module = tmp_path / "sums.py"
    module.write_text(CHECKER)
    out = tmp_path / "out.json"
    limits = ["--workers", 2, "--max-tokens", 200, *THREADS]
    code, _, _ = run(capfd, MODEL, "--checker", module, "--problems", 3, "--kv", "balanced", *limits, "-q", "--out", out)
    part = json.loads(out.read_text())["problems"]
    assert code == 0 and part["summary"]["balanced"]["correct"] == 3 and part["source"] == "sums.py"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "has no function problems"),
        ("import nonsense_that_is_not_there", "cannot be loaded: ModuleNotFoundError"),
        ("def check(p, t): return 1\ndef problems(rng, n): return []", "must give 2 dictionaries"),
        ("def check(p, t): return 1\ndef problems(rng, n): raise OSError('off')", "failed: OSError: off"),
        ("def check(p, t): return 1 / 0\ndef problems(rng, n): return [{'prompt': 'a', 'answer': 1}] * n", "check.. of .* failed: ZeroDivisionError"),
    ],
)
def test_bad_checker_is_one_sentence(tmp_path, capfd, text, words):
    module = tmp_path / "bad.py"
    module.write_text(text)
    code, _, err = run(capfd, MODEL, "--checker", module, "--problems", 2, "--kv", "tiny", "--max-tokens", 1, "--workers", 2, *THREADS)
    assert code == 2 and err.count("\n") == 1 and re.search(words, err), err


# ---- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.gguf"], "missing.gguf does not exist"),
        ([__file__], "not a GGUF file"),
        ([MODEL, "--text", "missing.txt"], "missing.txt"),
        ([MODEL, "--text", MODEL], "not UTF-8"),
        ([MODEL, "--text", "SHORT"], "fewer|less than 1 window of 4096"),
        ([MODEL, "--ctx", "4000", "--windows", "9"], "less than 9 windows"),
        ([MODEL, "--kv", "q9_9"], "no cache 'q9_9'"),
        ([MODEL, "--kv", "f16"], "no cache beside the baseline"),
        ([MODEL, "--baseline", "nope"], "no cache 'nope'"),
        ([MODEL, "--kv", "missing.gguf"], "missing.gguf does not exist"),
        ([MODEL, "--kv", MODEL], "profile"),
        ([MODEL, "--kv", "lab:nope"], "no codec 'nope'"),
        ([MODEL, "--kv", "lab:missing.py:x"], "missing.py does not exist"),
        ([MODEL, "--style", "sideways"], "no style 'sideways'"),
        ([MODEL, "--style", ","], "no style"),
        ([MODEL, "--ctx", "100", "--skip", "99"], "--skip 99 leaves nothing"),
        ([MODEL, "--plot", "x.gif"], "ends in .png or .svg"),
        ([MODEL, "--guarantee", "-1"], "Invalid value for '--guarantee'"),
        ([MODEL, "--guarantee", "0.01", "--kv", "q8_0"], "q8_0 is neither"),
        ([MODEL, "--guarantee", "0.01", "--ctx", "300", "--kv", "tiny"], "at least 512 predictions"),
        ([MODEL, "--derivations", "2", "--tasks", "sums"], "no task or level 'sums'"),
        ([MODEL, "--problems", "2", "--levels", "huge"], "no task or level 'huge'"),
        ([MODEL, "--problems", "2", "--levels", ","], "No task or no level"),
        ([MODEL, "--checker", __file__], "needs --problems N"),
        ([MODEL, "--checker", __file__, "--problems-file", __file__], "do not go together"),
        ([MODEL, "--problems-file", "SHORT"], "line 1, is not"),
        ([MODEL, "--problems-file", "EMPTY"], "holds no problems"),
        ([MODEL, "--problems-file", "ONE", "--problems", "2"], "holds 1 problems, fewer than 2"),
        ([MODEL, "--out", "SHORT"], "is text, so it is not replaced by JSON"),
        ([MODEL, "--at-once", "0"], "at-once"),
        ([MODEL, "--device", "cpu,"], "device is 'cpu,'"),
        ([MODEL, "--device", "CUDA7", "--ctx", "300"], "no GPU 'CUDA7' to use"),
        ([MODEL, "--what"], "--what"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capfd, arguments, words):
    files = {"SHORT": "A short text.\n", "EMPTY": "\n", "ONE": '{"question": "2?", "answer": "#### 2"}\n'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    arguments = [str(tmp_path / a) if a in files else a for a in arguments]
    code, out, err = run(capfd, *arguments, *THREADS)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert re.search(words, err), err


@pytest.mark.parametrize("tool", ["evaluate", "calibrate"])
def test_an_encoder_decoder_model_is_refused(tmp_path, tool):
    model = tiny_models.t5(tmp_path / "t5.gguf")
    done = subprocess.run([sys.executable, "-m", f"mixkvq.{tool}", str(model), *THREADS], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: t5") and len(done.stderr.splitlines()) == 1, done.stderr[-500:]


@pytest.mark.parametrize("tool", [evaluate_command, calibrate_command])
def test_a_model_that_bridge_refuses_is_one_sentence(tiny, tool, monkeypatch, capfd):
    def refuse(*_, **__):
        raise GeometryError("It has an encoder.")

    monkeypatch.setattr(Llama, "__init__", refuse)
    assert tool.main([tiny, *THREADS]) == 2
    assert capfd.readouterr() == ("", "error: It has an encoder.\n")


def test_presets_are_tried_by_rising_size():
    names = evaluate.presets_by_size()
    bits = {p["alias"] or p["name"]: p["body_bits"] for p in native().presets()}
    assert sorted(bits.values()) == [bits[name] for name in names] and "balanced" in names


# ---- exact arithmetic, single predictions, and what survives ---------------------------------------------


def test_exact_arithmetic_takes_the_noise_out(tmp_path, capfd):
    """The floor falls by four orders of magnitude, and what a cache of 8 bits does is told from it."""
    sections = {}
    for way in ((), ("--exact",)):
        out = tmp_path / f"{len(way)}.json"
        code, shown, _ = run(capfd, MODEL, "--kv", "f16,q8_0,mix8.2", "--ctx", "512", *way, *THREADS, "--out", out)
        result = json.loads(out.read_text())
        assert code == 0 and "noise floor: the cache" in shown and result["settings"]["baseline"] == ("f32" if way else "f16")
        assert ("in F32 against f32" in " ".join(shown.split())) == bool(way)
        (section,) = result["sections"]
        floor = section["caches"][NOISE_FLOOR]["kld_mean"]
        for figures in section["caches"].values():
            assert figures["kld_over_floor"] == pytest.approx(figures["kld_mean"] - floor)
        assert 0 <= result["run"]["outside_llama"] < 0.9 and result["run"]["seconds"] > 0
        sections[bool(way)] = {name: figures["kld_mean"] for name, figures in section["caches"].items()}
    plain, exact = sections[False], sections[True]
    assert exact[NOISE_FLOOR] < 1e-4 * plain[NOISE_FLOOR] and exact["mix8.2"] < 1e-4 < exact["q8_0"]
    assert exact[NOISE_FLOOR] < exact["f16"] < exact["mix8.2"] < plain["mix8.2"]


def test_exact_leaves_no_copy_behind(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run(capfd, tiny, "--exact", "--kv", "q8_0", "--ctx", "256", "--no-floor", *THREADS)[0] == 0
    assert not list(tmp_path.iterdir())


def test_figures_of_single_predictions(tmp_path, capfd):
    out, rows_file = tmp_path / "out.json", tmp_path / "tokens.npz"
    common = (MODEL, "--ctx", "400", "--windows", "2", "--skip", "100", "--no-floor", *THREADS, "--out", out, "--tokens", rows_file)
    assert run(capfd, *common, "--kv", "q4_0")[0] == 0
    assert run(capfd, *common, "--kv", "q4_0,q8_0")[0] == 0  # goes on, in the same file
    (section,) = json.loads(out.read_text())["sections"]
    rows = dict(np.load(rows_file))
    n = 2 * (400 - 101)
    assert all(len(rows[name]) == 2 * n for name in tokens.COLUMNS) and (rows["seed"] == 1).all()
    for name in ("q4_0", "q8_0"):
        own = rows["cache"] == name
        assert own.sum() == n and rows["kld"][own].mean() == pytest.approx(section["caches"][name]["kld_mean"])
        assert rows["same_top"][own].mean() == pytest.approx(section["caches"][name]["same_top"])
        for window in (0, 1):
            assert rows["position"][own & (rows["passage"] == window)].tolist() == list(range(101, 400))
    assert set(rows["text"]) == {"the default text, decode"} and rows["token"].max() > 256
    code, _, err = run(capfd, *common, "--seed", "2", "--restart")
    assert code == 2 and "holds rows of another run" in err
    rows_file.unlink()
    code, _, err = run(capfd, *common, "--kv", "q4_0")
    assert code == 2 and "does not exist, and the --out file holds figures already" in err
    code, _, err = run(capfd, *common[:-1], tmp_path / "tokens.csv", "--kv", "q4_0")
    assert code == 2 and "must end in .npz" in err


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_figures(tmp_path, capfd):
    """At moments that a seed draws, wherever they fall."""
    rng = Random(3)

    def command(folder):
        caches = "q8_0,q4_0,mix2.4,balanced"
        files = ("--out", folder / "out.json", "--tokens", folder / "tokens.npz")
        return [MODEL, "--kv", caches, "--ctx", "640", "--at-once", "1", "--derivations", "1", "--tasks", "add", *THREADS, *files]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    begin = time.monotonic()
    assert run(capfd, *command(whole))[0] == 0
    longest, deaths = (time.monotonic() - begin) / 2, 0
    while True:
        process = subprocess.Popen([sys.executable, "-m", "mixkvq.evaluate", *map(str, command(killed)), "-q"])
        try:
            assert process.wait(longest * (0.5 + rng.random())) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            deaths, longest = deaths + 1, 1.15 * longest
    assert deaths
    results = [json.loads((folder / "out.json").read_text())["sections"] for folder in (whole, killed)]
    for section in (section for sections in results for section in sections):
        for figures in section["caches"].values():
            figures.pop("seconds")
    assert results[0] == results[1]
    rows = [dict(np.load(folder / "tokens.npz")) for folder in (whole, killed)]
    orders = [np.lexsort((r["position"], r["cache"], r["text"])) for r in rows]
    for name in tokens.COLUMNS:
        np.testing.assert_array_equal(rows[0][name][orders[0]], rows[1][name][orders[1]])


def test_compare_refuses_an_empty_passage():
    with pytest.raises(SettingsError, match="nothing to predict"):
        list(compare_caches(MODEL, ["tiny"], [Passage([1])]))
    with pytest.raises(SettingsError, match="no style"):
        list(compare_caches(MODEL, ["tiny"], [Passage([1, 2, 3])], style="sideways"))
