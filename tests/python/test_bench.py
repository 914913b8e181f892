"""bench/speed.py on the built-in model: that it measures what it says. Its figures are not looked at, for they depend on the machine.

bench/llama_bench.py runs a program that answers as llama-bench does, with times that are known. What is measured on a GPU is measured on one only.
"""

import json
import subprocess
import sys
from pathlib import Path

import _common
import commits
import cuda_trace
import imports
import llama_bench
import numpy as np
import plot
import pytest
import restores
import speed
import tables
import tiny_models
from _common import open_model
from click.testing import CliRunner
from contexts import GPU, devices, library_name

from bridge import SettingsError
from mixkvq.cli.options import run

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "cot-tiny-34m-q8_0.gguf"
CACHES = ["f16", "balanced"]


@pytest.fixture(scope="module", params=devices())
def saved(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("bench") / "speed.json"
    options = "--kv f16,balanced --depths 256 --tokens 2 --rounds 2 --threads 1 --prefill 32 --prefill-depth 256 --prefill-rounds 1 --fit-from 0"
    options += f" --device {library_name(request.param)}"
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
    assert memory["bytes"] >= 256 << 20 and memory["bytes_per_second"] > 0
    if settings["device"] == "cpu":
        assert memory["threads"] == 1 and "gpu" not in result["machine"]
    else:
        assert result["machine"]["gpu"] == memory["gpu"] in plot.heading(result) and 5e10 < memory["bytes_per_second"] < 2e13
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
    llm = open_model(MODEL, cache, speed.TwoSequences, n_ctx=1024, n_batch=512, n_threads=1, device="cpu")
    text = np.random.default_rng(1).integers(300, 8000, 768).tolist()

    def next_logits():
        llm.eval([7])
        logits = llm.last_logits().copy()
        llm._remove_cells(speed.MEASURED, llm.n_tokens - 1, -1)
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
        llm._remove_cells(speed.MEASURED, start, start + 200)
        after = next_logits()
        assert np.abs(after - before).max() > 0.01
        before = after
    llm.close()


def test_a_device_that_is_none_and_a_prompt_that_is_too_long_are_refused():
    for options, words in ((["--device", "fast"], "it must be cpu or the name of a GPU"), (["--prefill", "513"], "--batch is 512")):
        done = CliRunner().invoke(speed.main, [str(MODEL), *options])
        assert done.exit_code == 2 and words in done.output


class Driver:
    """A CUDA driver that copies 1 GiB in a millisecond; `broken` names what fails."""

    def __init__(self, broken=""):
        self.broken, self.called = broken, []

    def __getattr__(self, name):
        def function(*arguments):
            self.called.append(name)
            if name == "cuDeviceGetName":
                arguments[0].value = b"NVIDIA Example"
            if name == "cuEventElapsedTime":
                arguments[0]._obj.value = 1.0
            return 2 if name == self.broken else 0

        return function


def test_copy_bandwidth(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(_common.ctypes, "CDLL", lambda name: driver)
    found = _common.copy_bandwidth(0, passes=3)
    assert found == {"bytes_per_second": pytest.approx(2 * 2**30 * 1e3), "bytes": 1 << 30, "passes": 3, "gpu": "NVIDIA Example"}
    assert driver.called.count("cuMemcpyDtoDAsync_v2") == 6
    assert driver.called.count("cuMemAlloc_v2") == driver.called.count("cuMemFree_v2") == 2
    driver.broken = "cuMemAlloc_v2"
    with pytest.raises(_common.click.ClickException, match="cuMemAlloc_v2 with error 2"):
        _common.copy_bandwidth(0)
    assert [_common.gpu_number(name) for name in ("CUDA0", "CUDA11", "cpu", "CPU", "Vulkan0")] == [0, 11, None, None, None]


@pytest.mark.skipif(GPU not in devices(), reason="there is no GPU")
def test_copy_bandwidth_of_a_gpu():
    assert 5e10 < _common.copy_bandwidth(0)["bytes_per_second"] < 2e13


# --- bench/llama_bench.py ---

LLAMA_BENCH = """#!{python}
import json, os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
ours = given["-dev"].startswith("MIXKVQ-")
assert ours == ("GGML_BACKEND_PATH" in os.environ) == ("-ctk" not in given) and given["-ngl"] == "99" and given["-fa"] == "1"
cache = os.environ["MIXKVQ_PRESET"] if ours else given["-ctk"]
if cache == os.environ.get("BROKEN"):
    sys.stderr.write("mixkvq: something is wrong\\n")
    sys.exit(int(os.environ["STATUS"]))
slope = {{"f16": 4, "q8_0": 6, "mix3.2": 1, "balanced": 1}}[cache]
tests = []
for depth in map(int, given["-d"].split(",")):
    for ubatch in map(int, given["-ub"].split(",")):
        n = int(given["-p"]) + int(given["-n"])
        ns = n * (1000000 + 100 * slope * depth)
        test = {{"devices": os.environ.get("DEVICES", given["-dev"]), "n_depth": depth, "n_ubatch": ubatch, "build_commit": "abc"}}
        tests.append({{**test, "samples_ns": [ns + i for i in range(int(given["-r"]))]}})
print("warning: not JSON")
print(json.dumps(tests))
"""


def test_restores(tmp_path):
    path = tmp_path / "restores.json"
    options = "--kv balanced,f16 --rounds 0,1 --read 300 --after 40 --windows 1 --threads 1"
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "restores.py"), str(MODEL), *options.split(), "--out", str(path)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "balanced" in done.stdout and "1 rounds" in done.stdout
    result = json.loads(path.read_text())
    assert result["bench"] == "restores" and result["settings"] | {"read": 300, "after": 40, "windows": 1} == result["settings"]
    balanced, packed, stock = result["caches"]
    assert [(c["cache"], c["state"]) for c in result["caches"]] == [("balanced", "f16"), ("balanced", "packed"), ("f16", "f16")]
    assert balanced["rounds"] == packed["rounds"] == stock["rounds"] == [0, 1]
    assert stock["kld"] == [0, 0] and min(balanced["kld"]) > 0 and packed["kld"][0] == packed["kld"][1] == balanced["kld"][0]


def test_states(tmp_path):
    path = tmp_path / "states.json"
    options = "--kv balanced,q8_0 --lengths 600,1500 --rounds 2 --threads 1"
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "states.py"), str(MODEL), *options.split(), "--out", str(path)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())["states"]
    assert [(row["tokens"], row["cache"]) for row in found] == [(n, cache) for n in (600, 1500) for cache in ("balanced", "q8_0")]
    assert all(row["same_bits"] and 0 < row["bytes"] and 0 < row["load_seconds"] < row["read_seconds"] for row in found)
    assert all(row["bytes"] < 1.05 * row["bytes_used"] for row in found if row["cache"] == "balanced")


@pytest.mark.parametrize("kind", ["f16", "packed"])
@pytest.mark.parametrize("cache", ["balanced", "near-lossless"])
def test_twelve_restores_change_no_prediction(cache, kind):
    llm = open_model(MODEL, cache, n_ctx=768, n_batch=512, n_threads=1)
    tokens = llm.tokenize(restores.TEXT.read_bytes()[:8192])[:512]
    assert len(tokens) == 512
    before, after = restores.predictions(llm, tokens, 448, [0, 12], kind)
    llm.close()
    np.testing.assert_array_equal(before, after)


@pytest.fixture
def run_llama_bench(tmp_path, monkeypatch):
    program, out = tmp_path / "llama-bench", tmp_path / "out.json"
    program.write_text(LLAMA_BENCH.format(python=sys.executable))
    program.chmod(0o755)

    def run(kv="f16,q8_0,balanced", **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        options = f"--device CPU --kv {kv} --depths 1000,2000 --tokens 10 --prefill 20 --prefill-depth 1000 --ubatch 4,8 --rounds 2"
        done = CliRunner().invoke(llama_bench.main, [str(program), str(MODEL), *options.split(), "--threads", "1", "--out", str(out)])
        return done, json.loads(out.read_text()) if out.exists() else None

    monkeypatch.setenv("MIXKVQ_WINDOW", "7")  # of no concern to the program
    return run


def test_llama_bench(run_llama_bench):
    done, result = run_llama_bench()
    assert done.exit_code == 0, done.output
    assert result["bench"] == "llama_bench" and result["build"] == "abc" and result["settings"]["ubatch"] == [4, 8]
    assert [row["depth"] for row in result["depths"]] == [0, 1000, 2000]
    for row in result["depths"]:
        for cache, slope in (("f16", 4), ("q8_0", 6), ("balanced", 1)):
            figures = row["caches"][cache]
            seconds = 1e-3 + 1e-7 * slope * row["depth"]
            assert len(figures["rounds"]) == 4 and figures["seconds_per_token"] == pytest.approx(seconds, rel=1e-4)
            assert figures["over"]["q8_0"] == pytest.approx((1e-3 + 6e-7 * row["depth"]) / seconds, rel=1e-4)
            if row["depth"]:
                assert figures["attention_seconds_per_token"] == pytest.approx(1e-7 * slope * row["depth"], rel=1e-4)
                assert figures["attention_over"] == {"f16": pytest.approx(4 / slope, rel=1e-4), "q8_0": pytest.approx(6 / slope, rel=1e-4)}
    assert [(row["ubatch"], row["tokens"], row["depth"]) for row in result["prefill"]] == [(4, 20, 1000), (8, 20, 1000)]
    for row in result["prefill"]:
        assert row["caches"]["balanced"]["over"]["f16"] == pytest.approx(1.4 / 1.1, rel=1e-4)
        assert row["caches"]["f16"]["tokens_per_second"] == pytest.approx(1 / 1.4e-3, rel=1e-4)
    assert "6.00x" in done.output and "4.00x" in done.output and "1.27x" in done.output


@pytest.mark.parametrize("variables, words", [
    ({"BROKEN": "q8_0", "STATUS": "3"}, "llama-bench with q8_0 ended with status 3: mixkvq: something is wrong"),
    ({"BROKEN": "balanced", "STATUS": "0"}, "llama-bench with balanced ended with status 0: mixkvq: something is wrong"),
    ({"DEVICES": "CUDA0"}, "llama-bench with f16 ran on CUDA0, not on none"),
])  # fmt: skip
def test_llama_bench_that_did_something_else_is_not_measured(run_llama_bench, variables, words):
    done, result = run_llama_bench(**variables)
    assert done.exit_code == 1 and words in done.output and result is None


def test_llama_bench_says_a_mistake_before_anything_runs(run_llama_bench):
    done, result = run_llama_bench(kv="f16,blanced")
    assert "There is no preset 'blanced'" in str(done.exception) and "round 1" not in done.output and result is None


def test_cuda_trace(tmp_path):
    """Kernels that overlap count once, by their ends; layers unlike the others, and the first ones, do not count."""
    lines, at = [], 1000

    def add(name, start, duration):
        lines.append(f"{at + start}\t{at + start + duration}\t8\t{name}")

    for layer in range(9):
        if layer == 5:  # a longer one
            add("void other<float>(int)", 0, 50000)
            at += 50000
        add("void mul<(kind)8, 1>(void const*)", 0, 4000)
        add("quantize(float const*)", 3000, 2000)  # starts early: adds 1000
        add("void ours::(anonymous namespace)::decode_kernel<2, 1>(ours::Call)", 5500, 2500)  # adds 3000, the wait before it included
        at += 8000
    trace = tmp_path / "trace.tsv"
    trace.write_text("\n".join(reversed(lines)) + "\n")
    layers = cuda_trace.layers_of(cuda_trace.read_trace(trace), "decode_kernel")
    assert len(layers) == 9 - 1 - 1 - cuda_trace.SKIPPED
    assert all(layer == {"mul": (1, 4000), "quantize": (1, 1000), "decode_kernel": (1, 3000)} for layer in layers)
    shown = CliRunner().invoke(cuda_trace.main, [str(trace)])
    assert shown.exit_code == 0 and "8.0" in shown.output and "A token" not in shown.output

    at = 1_000_000
    for token in range(6):  # an input, two kernels, a result; then a copy of the state, without kernels
        copies = [(f"{at + 700}\t{at + 800}\t4\t[to GPU]"), f"{at + 7000}\t{at + 7100}\t4\t[to host]", f"{at + 7200}\t{at + 7300}\t4\t[to host]"]
        lines += copies if token != 2 else copies[1:]  # one that had no input
        add("decode_kernel<2, 1>(Call)", 1000, 2500)
        add("other()", 3000, 3000)
        at += 10000
    trace.write_text("\n".join(lines) + "\n")
    tokens = cuda_trace.tokens_of(cuda_trace.read_trace(trace))
    assert [list(token.values()) for token in tokens] == [[3400, 300, 5000, 1100, 9800]] * (6 - 1 - 1 - cuda_trace.SKIPPED)
    shown = CliRunner().invoke(cuda_trace.main, [str(trace)])
    assert shown.exit_code == 0 and "A token, medians of 1" in shown.output and "9.8" in shown.output

    for text, words in (("no trace\n", "line 1"), ("1\t2\t3\tother()\n", "--attention")):
        trace.write_text(text)
        said = CliRunner().invoke(cuda_trace.main, [str(trace)])
        assert said.exit_code == 1 and words in said.output


def test_plot(saved, tmp_path):
    pytest.importorskip("matplotlib")
    pictures = [tmp_path / name for name in ("one.svg", "same.svg", "one.png")]
    subprocess.run([sys.executable, str(ROOT / "bench" / "plot.py"), str(saved), str(saved), "--out", str(pictures[0])], check=True)
    for picture in pictures[1:]:
        assert run(plot.main, "bench/plot.py", [str(saved), str(saved), "--out", str(picture)]) == 0
    svg, again, png = (picture.read_bytes() for picture in pictures)
    assert b"<svg" in svg and svg == again
    assert png.startswith(b"\x89PNG")


def test_plot_without_matplotlib(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SettingsError, match="Plots need matplotlib"):
        plot.draw([result], tmp_path / "speed.svg")


# ---- how long the tools take -----------------------------------------------------------------------------


def test_timings_of_the_tools_and_their_table(tmp_path, monkeypatch):
    tiny, out = tiny_models.llama(tmp_path / "tiny.gguf", n_kv=2, ratio=1, n_layers=3), tmp_path / "timings.json"
    options = ["--ctx", "512", "--minutes", "0.2", "--device", "cpu", "--threads", "1", "--out", str(out)]
    done = subprocess.run([sys.executable, str(ROOT / "bench" / "timings.py"), str(tiny), *options], capture_output=True, text=True)
    assert done.returncode == 0 and "tiny.gguf" in done.stdout, done.stderr
    result = json.loads(out.read_text())
    (row,) = result["models"]
    assert row["name"] == "tiny.gguf" and len(row["sha256"]) == 64 and "gpu" not in result["machine"]
    for each in (row["evaluate"], row["calibrate"]):
        assert each["seconds"] > 0 and 0 <= each["outside_llama"] < 1
    assert 0 < row["calibrate"]["seconds_said"] <= 12.1 and row["calibrate"]["measured"][0]["text"] == "the default text"
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.result.cache_clear()
    table = tables.timings_table()
    tables.result.cache_clear()
    cores = result["machine"]["cores"]
    assert f"| tiny.gguf | {cores} cores | {row['evaluate']['seconds']:.1f} |" in table and "commit" in table


# ---- imports ---------------------------------------------------------------------------------------------


KERNELS = """
avx2, head size 128, ns per page and head                                    n=1       n=4
  keys 8@4 4@5/16 2@rest         pack         9187
  keys 8@4 4@5/16 2@rest         scores                                       1500      3000
  F16 rows                       values                                        900      1800

avx512, head size 128, ns per page and head                                    n=1       n=4
  values 2 bits, groups of 32    again        2000
"""
ATTENTION = """
avx512_vnni, balanced, 1 threads, 32 query / 8 KV heads of 128: packing 1.25 us a token
     1 tokens at   4096:     0.500 ms   12.34 GB/s
    64 tokens at  16384:    21.000 ms    3.45 GB/s
"""


def test_commits_against_each_other():
    """What the native benchmarks print is understood, and ratios are to the first build."""
    found = commits.kernels(KERNELS)
    keys = "avx2, keys 8@4 4@5/16 2@rest, "
    assert found == {
        **{keys + "pack, 1": 9187, keys + "scores, 1": 1500, keys + "scores, 4": 3000},
        **{"avx2, F16 rows, values, 1": 900, "avx2, F16 rows, values, 4": 1800, "avx512, values 2 bits, groups of 32, again, 1": 2000},
    }
    alone = commits.attention(ATTENTION)
    assert alone == {"avx512_vnni, packing": 1.25, "avx512_vnni, 1 tokens at 4096": 0.5, "avx512_vnni, 64 tokens at 16384": 21}
    twice = {key: [x, 2 * x] for key, x in found.items()}
    twice["avx2, F16 rows, values, 4"] = [1800, 14400]
    result = {"builds": ["a", "b"], "model_ms": {"prompt": [4.0, 2.0]}, "attention_ms": {k: [x, x] for k, x in alone.items()}, "kernels_ns": twice}
    ratios = {name: each[1] for name, each in tables.build_ratios(result)}
    assert ratios["in a model: prompt"] == (0.5, 0.5, 0.5) and ratios["attention alone: packing"] == (1, 1, 1)
    assert ratios["kernels: scores"] == (2, 2, 2) and ratios["kernels: values"] == pytest.approx((4, 2, 8))


def test_the_picture_of_imports_knows_circles_and_heights():
    edges = [("a", "b"), ("b", "c"), ("c", "b"), ("c", "d"), ("a", "e")]
    assert imports.circles(edges) == [{"b", "c"}]
    assert imports.depths(["a", "b", "c", "d", "e"], edges) == {"a": 2, "b": 1, "c": 1, "d": 0, "e": 0}
    tree = imports.Tree("t", {"top": ["a"], "low": ["b", "c", "d", "e"]}, [*edges, ("d", "a")], ROOT)
    up = [edge for edge in tree.edges if imports.is_up(tree, edge, imports.circles(edges))]
    assert up == [("b", "c"), ("c", "b"), ("d", "a")]


def test_no_import_of_ours_leads_up_or_in_a_circle():
    tree = imports.read(ROOT, "now")
    rings = imports.circles(tree.edges)
    assert not rings and not [edge for edge in tree.edges if imports.is_up(tree, edge, rings)]
    assert {"commands", "studies", "bridge: run time", "core"} <= set(tree.bands) and all(tree.bands.values()) and len(tree.edges) > 300
    at, _ = imports.place(tree)
    assert set(at) == {module for modules in tree.bands.values() for module in modules}


def test_a_long_file_says_why():
    """In its docstring or the comment at its head, and with the words "500 lines"."""
    for path in imports.Tree("now", {}, [], ROOT).files():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 500 or "500 lines" in " ".join(lines[:12]), f"{path.name} has {len(lines)} lines"
