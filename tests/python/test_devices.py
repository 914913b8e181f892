"""Where a model is computed: the choice of GPUs and of their layers, and what is said where there is none."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import tiny_models
from contexts import BALANCED, GPU, Context, Model, devices, random_tokens

from bridge import Llama
from bridge.devices import WORKSPACE, Gpu, Placement, check_device, place
from mixkvq.core.errors import SettingsError
from mixkvq.core.model_file import built_in_model

GIB = 1 << 30
A, B = Gpu("CUDA0", 1, 8 * GIB), Gpu("CUDA1", 2, 4 * GIB)
MODEL = {"n_gpu_layers": None, "n_layers": 32, "weights": 2 * GIB, "cache": 0.5 * GIB, "workspace": 0.0}


def chosen(device, gpus=(A, B), missing="", **other):
    return place(device, gpus, missing, **{**MODEL, **other})


def test_auto_takes_the_gpus_that_there_are():
    assert chosen("auto") == Placement((A, B))
    assert chosen("auto", ()) == Placement()
    assert chosen("gpu", (A,)) == Placement((A,))


def test_cpu_and_no_layers_mean_the_cpu():
    for device, layers in (("cpu", None), ("cpu", -1), ("auto", 0), ("gpu", 0), ("CUDA0", 0)):
        assert chosen(device, n_gpu_layers=layers) == Placement()


def test_gpus_by_name_in_their_own_order():
    assert chosen("CUDA1") == Placement((B,))
    assert chosen("CUDA1,CUDA0") == Placement((A, B))


def test_a_gpu_that_is_not_there_is_an_error_and_auto_says_why_it_uses_the_cpu():
    with pytest.raises(SettingsError, match="no GPU 'CUDA2' to use: there is CUDA0, CUDA1"):
        chosen("CUDA2")
    for device in ("gpu", "CUDA0"):
        with pytest.raises(SettingsError, match="to use: llama.cpp knows none"):
            chosen(device, ())
        with pytest.raises(SettingsError, match="to use: built without CUDA"):
            chosen(device, (), "built without CUDA")
    assert chosen("auto", (), "built without CUDA").note == "the model is computed on the CPU: built without CUDA"
    assert chosen("cpu", (), "built without CUDA").note == ""


def test_a_gpu_that_is_left_out_is_said_beside_one_that_is_taken():
    missing = "CUDA1 has no MixKVQ cache: it is too old"
    for device in ("auto", "gpu", "CUDA0"):
        assert chosen(device, (A,), missing) == Placement((A,))
    for device in ("CUDA1", "CUDA0,CUDA1"):
        with pytest.raises(SettingsError, match="There is no GPU 'CUDA1' to use: there is CUDA0; CUDA1 has no MixKVQ cache: it is too old"):
            chosen(device, (A,), missing)


def test_as_many_layers_as_fit():
    all_of_them = chosen("CUDA1", weights=3 * GIB, cache=0.4 * GIB)
    assert all_of_them == Placement((B,))
    half = chosen("CUDA1", weights=6 * GIB, cache=1.0 * GIB)
    assert half.gpus == (B,) and half.n_layers == 16 and "16 of 32 layers" in half.note and "4.0 GiB are free on CUDA1" in half.note
    assert half.describe(32) == "CUDA1 (16 of 32 layers), CPU"
    less = chosen("CUDA1", weights=6 * GIB, cache=1.0 * GIB, workspace=1.75 * GIB)
    assert less.n_layers == 8
    none = chosen("CUDA1", weights=200 * GIB)
    assert none.gpus == () and "too little for one of its layers" in none.note
    assert chosen("CUDA1", (A, Gpu("CUDA1", 2, WORKSPACE // 2))).gpus == ()


def test_layers_that_are_asked_for_are_not_second_guessed():
    assert chosen("CUDA1", n_gpu_layers=5, weights=200 * GIB).n_layers == 5
    assert chosen("CUDA1", n_gpu_layers=-1, weights=200 * GIB) == Placement((B,))
    assert chosen("CUDA1", n_gpu_layers=32) == chosen("CUDA1", n_gpu_layers=99) == Placement((B,))


@pytest.mark.parametrize("device", ["", "CUDA0,", ",", None, 3])
def test_names_that_are_none(device):
    with pytest.raises(SettingsError, match="give auto"):
        check_device(device)


def test_the_report_says_where():
    model = str(built_in_model())
    for settings in ({"kv": "balanced"}, {"stock": "f16"}):
        with closing(Llama(model, n_ctx=256, verbose=False, device="cpu", **settings)) as llama:
            assert llama.kv_stats()["device"] == "CPU" and "computed on" in llama.kv_report()


@pytest.mark.skipif(len(devices()) > 1, reason="there is a GPU")
def test_without_a_gpu():
    model = str(built_in_model())
    with pytest.raises(SettingsError, match="There is no GPU"):
        Llama(model, n_ctx=256, verbose=False, device="gpu")
    with pytest.raises(SettingsError, match="There is no GPU 'CUDA0' to use"):
        Llama(model, n_ctx=256, verbose=False, stock="f16", device="CUDA0")
    with pytest.raises(SettingsError, match="n_gpu_layers is 'many'"):
        Llama(model, n_ctx=256, verbose=False, n_gpu_layers="many")


@pytest.mark.skipif(len(devices()) == 1, reason="there is no GPU that llama.cpp and MixKVQ both can use, or MIXKVQ_TEST_DEVICE leaves it out")
@pytest.mark.parametrize(
    "settings", [{"kv": "balanced"}, {"stock": "f16"}, {"codec": lambda page: (page.rows, 16.0 * page.rows.size)}], ids=["ours", "stock", "codec"]
)
@pytest.mark.parametrize("layers", [-1, 4], ids=["all", "some"])
def test_on_a_gpu(settings, layers):
    model = str(built_in_model())
    answers = []
    for device in ("cpu", "auto"):
        with closing(Llama(model, n_ctx=1024, verbose=False, device=device, n_gpu_layers=layers, **settings)) as llama:
            where = llama.kv_stats()["device"]
            assert where == ("CPU" if device == "cpu" else "CUDA0" if layers < 0 else "CUDA0 (4 of 10 layers), CPU") or "CUDA1" in where
            text = llama.create_chat_completion([{"role": "user", "content": "Compute 12 * 13."}], temperature=0.0, max_tokens=40)
            answers.append(text["choices"][0]["message"]["content"])
    assert answers[0] == answers[1]


@pytest.mark.skipif(len(devices()) == 1, reason="there is no GPU that llama.cpp and MixKVQ both can use, or MIXKVQ_TEST_DEVICE leaves it out")
def test_llama_cpps_own_contexts_may_go_while_a_graph_is_recorded(tmp_path):
    """The end of one destroys its handle of cuBLAS. During a recording of another thread CUDA refuses that, and ggml ends the process."""
    path = tiny_models.llama(tmp_path / "tiny.gguf")
    ours, theirs = Model(path, True, GPU), Model(path, False, GPU)
    tokens, stop, n_freed = random_tokens(64), threading.Event(), 0

    def come_and_go() -> None:
        nonlocal n_freed
        while not stop.is_set():
            with Context(theirs) as context:
                context.feed(tokens)  # matrices large enough for cuBLAS
            n_freed += 1

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        expected = None
        for _ in range(60):  # each records anew
            with Context(ours, BALANCED) as context:
                context.feed(tokens[:32])
                last = [context.feed([token])[-1] for token in tokens[32:44]][-1]
                expected = last if expected is None else expected
                assert abs(last - expected).max() < 1e-3
    finally:
        stop.set()
        thread.join()
        ours.close()
        theirs.close()
    assert n_freed >= 10
