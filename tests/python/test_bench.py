"""bench/speed.py on the built-in model: that it measures what it says. Its figures are not looked at, for they depend on the machine."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import plot
import pytest
import speed
from _common import open_model

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "cot-tiny-34m-q8_0.gguf"
CACHES = ["f16", "balanced"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "speed.json"
    options = "--kv f16,balanced --depths 256 --tokens 2 --rounds 2 --threads 1 --prefill 32 --prefill-depth 256 --prefill-rounds 1 --fit-from 0"
    command = [sys.executable, str(ROOT / "bench" / "speed.py"), str(MODEL), *options.split(), "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "balanced" in done.stdout
    return path


@pytest.fixture(scope="module")
def result(saved):
    return json.loads(saved.read_text())


def test_result_describes_its_run(result):
    assert result["bench"] == "speed"
    assert result["model"]["name"] == MODEL.name
    assert result["commit"] and result["machine"]["cpu"] and result["versions"]["llama_cpp_python"]
    settings = result["settings"]
    assert (settings["caches"], settings["depths"], settings["threads"]) == (CACHES, [0, 256], 1)
    ours, stock = result["caches"]["balanced"], result["caches"]["f16"]
    assert ours["preset"] == "balanced" and ours["isa"] and 0 < ours["bytes"]
    assert stock["type"] == "f16" and stock["bytes"] == stock["n_cells"] * 10 * 4 * 128 * 2
    memory = result["read_bandwidth"]
    assert memory["threads"] == 1 and memory["bytes"] >= 256 << 20 and memory["bytes_per_second"] > 0
    assert str(ROOT) not in json.dumps(result)


def test_figures_follow_from_the_rounds(result):
    assert [row["depth"] for row in result["depths"]] == [0, 256]
    for row in result["depths"]:
        assert list(row["caches"]) == CACHES
        for cache, figures in row["caches"].items():
            seconds = figures["seconds_per_token"]
            assert len(seconds["rounds"]) == (4 if row["depth"] == 0 else 2) and min(seconds["rounds"]) > 0
            assert seconds["median"] == pytest.approx(np.median(seconds["rounds"]), abs=1e-6)
            assert seconds["quartiles"][0] <= seconds["median"] <= seconds["quartiles"][1]
            assert figures["tokens_per_second"] == pytest.approx(1 / seconds["median"])
            assert figures["ratio"] == pytest.approx(figures["tokens_per_second"] / row["caches"]["f16"]["tokens_per_second"])
            if row["depth"]:
                attention = seconds["median"] - result["depths"][0]["caches"][cache]["seconds_per_token"]["median"]
                assert figures["attention_seconds_per_token"] == pytest.approx(attention)
                if attention > 0:
                    assert figures["gb_per_second"] == pytest.approx(figures["bytes_read_per_token"] / attention / 1e9)


def test_bytes_read_are_exact(result):
    nothing, filled = (row["caches"] for row in result["depths"])
    cell = 10 * 2 * 2 * 128  # elements: 10 layers, keys and values, 2 heads of 128
    assert [nothing[cache]["bytes_read_per_token"] for cache in CACHES] == [0, 0]
    assert filled["f16"]["bytes_read_per_token"] == 256 * cell * 2
    assert filled["balanced"]["bytes_read_per_token"] == 256 * cell * 2, "the first page and the recent one stay F16"


def test_prompts_are_measured_at_both_depths(result):
    assert [(row["depth"], row["tokens"]) for row in result["prefill"]] == [(0, 32), (256, 32)]
    for row in result["prefill"]:
        assert row["caches"]["f16"]["ratio"] == 1
        for figures in row["caches"].values():
            assert figures["tokens_per_second"] == pytest.approx(32 / figures["seconds"]["median"])


def test_line_through_the_depths(result):
    for cache in CACHES:
        (step,) = result["fit"][cache]["steps"]
        assert (step["from"], step["to"]) == (0, 256)
        assert step["of_fitted_slope"] == pytest.approx(1)
    rows = [{"depth": d, "caches": {"x": {"seconds_per_token": {"median": s}}}} for d, s in ((0, 3.0), (4, 5.0), (8, 7.0), (16, 11.0))]
    fit = speed.fit_line(rows, "x", 4)
    assert fit["seconds_per_token_and_cell"] == pytest.approx(0.5) and fit["seconds_at_0"] == pytest.approx(3)
    assert [step["of_fitted_slope"] for step in fit["steps"]] == pytest.approx([1, 1, 1])
    assert speed.fit_line(rows, "x", 16) is None


@pytest.mark.parametrize("cache", CACHES)
def test_filled_context_is_seen_whole(cache):
    """One chunk gives what a prompt gives; with several, each of them counts in what follows."""
    llm = open_model(MODEL, cache, speed.TwoSequences, n_ctx=1024, n_batch=512, n_threads=1)
    text = np.random.default_rng(1).integers(300, 8000, 768).tolist()

    def next_logits():
        llm.eval([7])
        logits = llm.last_logits().copy()
        llm._ctx.kv_cache_seq_rm(speed.MEASURED, llm.n_tokens - 1, -1)
        llm.n_tokens -= 1
        return logits

    llm.clear()
    llm.eval(text[:256])
    expected = next_logits()
    llm.clear()
    speed.append_chunk(llm, text[:256])
    np.testing.assert_array_equal(next_logits(), expected)

    for start in (256, 512):
        speed.append_chunk(llm, text[start : start + 256])
    before = next_logits()
    assert np.isfinite(before).all()
    np.testing.assert_array_equal(next_logits(), before)
    for start in (0, 256, 512):
        llm._ctx.kv_cache_seq_rm(speed.MEASURED, start, start + 200)
        after = next_logits()
        assert np.abs(after - before).max() > 0.01
        before = after
    llm.close()


def test_plot(saved, tmp_path):
    pytest.importorskip("matplotlib")
    pictures = [tmp_path / name for name in ("one.svg", "same.svg", "one.png")]
    for picture in pictures:
        subprocess.run([sys.executable, str(ROOT / "bench" / "plot.py"), str(saved), str(saved), "--out", str(picture)], check=True)
    svg, again, png = (picture.read_bytes() for picture in pictures)
    assert b"<svg" in svg and svg == again
    assert png.startswith(b"\x89PNG")


def test_plot_without_matplotlib(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(plot.click.ClickException, match="Plots need matplotlib"):
        plot.draw([result], tmp_path / "speed.svg")
