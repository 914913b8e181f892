"""What the backend does with GPUs, on emulated ones: which it takes, how it records graphs, and what happens when memory is short or threads meet."""

from __future__ import annotations

import pytest
import tiny_models
from emulated import run

FAR = 2e-2  # the kernels turn queries into F16; wrong numbers lie ten times as far apart, and more

# A context on CUDA0 and one on the CPU with the same cache; `step` evaluates a token on a model and gives its logits.
MODELS = """
import numpy as np
from bridge import Llama
def load(device, **settings):
    return Llama(sys.argv[1], kv="balanced", device=device, n_ctx=1024, n_threads=1, n_threads_batch=1, verbose=False, **settings)
def step(model, token):
    model.eval([token])
    return np.array(model.last_logits())
tokens = np.random.default_rng(0).integers(3, 250, 400).tolist()
gpu, cpu = load("gpu"), load("cpu")
gpu.eval(tokens[:150]), cpu.eval(tokens[:150])
def apart(tokens):
    return max(float(np.abs(step(gpu, t) - step(cpu, t)).max()) for t in tokens)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(tiny_models.llama(tmp_path_factory.mktemp("emulated") / "tiny.gguf"))


# --- which GPUs ---

DEVICES = """
from bridge import backend as adapter
from bridge.devices import place
from mixkvq.core.errors import SettingsError
backend = adapter.backend()
gpus, missing = adapter.our_gpus(backend)
def refused(device):
    try:
        place(device, gpus, missing, n_gpu_layers=None, n_layers=2, weights=1, cache=1.0, workspace=0.0)
    except SettingsError as e:
        return str(e)
print(json.dumps([sorted(backend.devices), [gpu.name for gpu in gpus], missing, [refused(f"CUDA{i}") for i in range(2)]]))
"""


@pytest.mark.parametrize("old", [0, 1])
def test_each_gpu_is_judged_by_itself(old):
    gpus = ["8.6", "8.6"]
    gpus[old] = "6.1"
    (devices, taken, missing, refused), said = run(DEVICES, gpus=",".join(gpus))
    new = f"CUDA{1 - old}"
    assert devices == ["MIXKVQ-CPU", f"MIXKVQ-{new}"] and taken == [new]
    why = f"CUDA{old} has no MixKVQ cache: emulator is too old a GPU: its compute capability is 6.1, 7.5 is the least"
    assert missing == why and said == [f"mixkvq: {why}"]
    assert refused[1 - old] is None and why in refused[old] and f"there is {new}" in refused[old]


def test_all_gpus_or_none():
    (devices, taken, missing, _), said = run(DEVICES, gpus="7.5,9.0")
    assert devices == ["MIXKVQ-CPU", "MIXKVQ-CUDA0", "MIXKVQ-CUDA1"] and taken == ["CUDA0", "CUDA1"] and missing == "" and said == []
    (devices, taken, missing, refused), said = run(DEVICES, gpus="6.1,7.0")
    assert devices == ["MIXKVQ-CPU"] and taken == [] and len(said) == 2 and "CUDA0" in missing and "CUDA1" in missing and all(refused)


def test_the_lists_for_weights_do_not_change():
    """llama.cpp asks for them in every load, in whatever thread; what it got before stays what it is."""
    code = """
import ctypes, threading
from bridge import backend as adapter
f, P = adapter.function, ctypes.c_void_p
registry = f("ggml_backend_reg_by_name", P, ctypes.c_char_p)(b"MIXKVQ")
get = f("ggml_backend_reg_dev_get", P, P, ctypes.c_size_t)
devices = [get(registry, i) for i in range(5)]
address = f("ggml_backend_reg_get_proc_address", P, P, ctypes.c_char_p)(registry, b"ggml_backend_dev_get_extra_bufts")
ask = ctypes.CFUNCTYPE(P, P)(address)
inner = f("ggml_backend_dev_buffer_type", P, P)
by_name = f("ggml_backend_dev_by_name", P, ctypes.c_char_p)
found = []
def work():
    for i in range(2000):
        found.append(tuple(ask(device) for device in devices))
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
lists = [ctypes.cast(at, ctypes.POINTER(P)) if at else None for at in found[0]]
right = [lists[i][0] == inner(by_name(b"CUDA%d" % (i - 1))) and lists[i][1] is None for i in range(1, 5)]
print(json.dumps([len(set(found)), lists[0] is None, right, found[0][1] != found[0][2]]))
"""
    assert run(code, gpus="8.0,8.0,8.0,8.0")[0] == [1, True, [True] * 4, True]


def test_the_estimate_is_what_the_backend_counts(tiny):
    """A dry run keeps books as that device will, query statistics included."""
    code = """
import bridge
from test_sizes import estimate
path, found = sys.argv[1], []
for n_ctx in (256, 1024, 8192):
    for device in ("MIXKVQ-CUDA0", "MIXKVQ-CPU"):
        need = estimate(path, device, n_ctx)
        llama = bridge.Llama(path, n_ctx=n_ctx, kv="balanced", device="cpu" if device == "MIXKVQ-CPU" else "CUDA0", verbose=False, n_threads=1)
        found.append([need.cache, llama.kv_stats()["bytes"]])
        llama.close()
print(json.dumps(found))
"""
    found, said = run(code, tiny)
    assert said == [] and all(need == counted for need, counted in found) and found[0] != found[1], found


# --- graphs ---


def test_decoding_is_recorded_and_gives_the_numbers_of_the_cpu(tiny):
    code = MODELS + "print(json.dumps([apart(tokens[150:190]), library.emulated_cuda_launches(), gpu.kv_stats()['device']]))"
    (far, launches, device), said = run(code, tiny)
    assert far < FAR and launches >= 30 and device == "CUDA0" and said == []


def test_packed_states_go_on_with_the_same_bits_and_from_one_device_to_another(tiny):
    code = MODELS + """
gpu.eval(tokens[150:390])
state, other = gpu.save_state(), load("gpu")
other.eval(tokens[:50])
other.load_state(state)
pages = [[(t["pages_packed"], t["pages_f16"]) for t in model._session.layers()] for model in (gpu, other)]
same = all(np.array_equal(step(gpu, t), step(other, t)) for t in tokens[:150])
again = other.save_state().llama_state == gpu.save_state().llama_state
small = len(state.llama_state) < 1.05 * gpu.kv_stats()["bytes_used"]
cpu.load_state(gpu.save_state())
there = apart(tokens[:40])
gpu.load_state(cpu.save_state())
print(json.dumps([pages[0] == pages[1], same, again, small, there, apart(tokens[40:80])]))
"""
    (pages, same, again, small, there, back), said = run(code, tiny)
    assert pages and same and again and small and there < 2 * FAR and back < 2 * FAR and said == []


@pytest.mark.parametrize("call", ["capture", "instantiate", "launch"])
def test_a_graph_for_which_there_is_no_memory_costs_only_time(tiny, call):
    """The operations are queued one by one then, and the context goes on."""
    code = MODELS + f"""
library.emulated_cuda_fail(b"{call}", 0, 2)
first = apart(tokens[150:170])
once = library.emulated_cuda_launches()
rest = apart(tokens[170:176])
print(json.dumps([first, rest, once]))
"""
    (first, rest, launches), said = run(code, tiny)
    assert first < FAR and rest < FAR and launches <= 1 and said == []


@pytest.mark.parametrize("call", ["malloc", "host"])
def test_no_memory_in_a_decode_fails_that_decode_only(tiny, call):
    """Whatever the allocation that fails, the next decode of the same tokens gives the right numbers."""
    code = MODELS + f"""
from bridge import ContextError
results = []
for skip in range(4):
    library.emulated_cuda_fail(b"{call}", skip, 1)
    new = tokens[150:290]
    try:
        gpu.eval(new)
    except ContextError as e:
        results.append(str(e))
    library.emulated_cuda_fail(b"{call}", 0, 0)
    gpu.n_tokens = 150
    gpu._remove_cells(0, 150, -1)
gpu.eval(new), cpu.eval(new)
print(json.dumps([apart(tokens[290:300]), results]))
"""
    (far, failures), said = run(code, tiny)
    assert far < FAR
    if call == "malloc":
        assert failures and said == ["mixkvq: out of GPU memory in the cache"]


@pytest.mark.parametrize("device", ["CPU", "CUDA0"])
def test_a_shift_stops_at_the_first_failure(tiny, device):
    """What ggml's device says of a page is what llama.cpp hears: a page that goes well later does not make it good."""
    code = f'''
from contexts import PACKED, Context, Model, logged, random_tokens
with Context(Model(sys.argv[1], True, "MIXKVQ-{device}"), PACKED) as context:
    context.feed(random_tokens(450), chunk=90)
    context.feed([5])
    def shifted():
        before = [layer["pages_packed_ever"] for layer in context.layers() if not layer["is_value"]]
        context.add(0, 0, -1, 50)
        said = logged(lambda: context.feed([7]))[1]
        after = [layer["pages_packed_ever"] for layer in context.layers() if not layer["is_value"]]
        return [b - a for a, b in zip(before, after)], "failed to compute K-shift" in said
    fine = shifted()
    library.emulated_cuda_fail(b"shift", 1, 1)
    print(json.dumps([fine, shifted(), shifted()]))
'''
    (fine, failed, again), said = run(code, tiny)
    assert fine == again == [[3, 3], False]
    assert failed == [[2, 0], True] and said == []


def test_no_backend_of_ggml_is_freed_during_a_recording(tiny):
    """Destroying a handle of cuBLAS ends a recording in CUDA and the process in ggml, which knows only of recordings of its own."""
    code = MODELS + """
import ctypes, threading
from bridge import backend as adapter
f, P = adapter.function, ctypes.c_void_p
stock = f("ggml_backend_dev_init", P, P, P)(f("ggml_backend_dev_by_name", P, ctypes.c_char_p)(b"CUDA0"), None)
free = f("ggml_backend_free", None, P)
before = library.emulated_cuda_frees()
library.emulated_cuda_wait_for_free()
def work():
    while not library.emulated_cuda_waits():  # the recording has begun
        pass
    free(stock)
thread = threading.Thread(target=work)
thread.start()
far = apart(tokens[150:160])
thread.join()
print(json.dumps([far, library.emulated_cuda_frees() - before, library.emulated_cuda_frees_while_recording()]))
"""
    (far, freed, too_early), _ = run(code, tiny)
    assert far < FAR and freed == 1 and too_early == 0


# --- threads ---


def test_figures_while_another_thread_decodes(tiny):
    code = MODELS + """
import threading
stop, asked, failures = threading.Event(), [0], []
def work():
    while not stop.is_set():
        try:
            for i, layer in enumerate(gpu.kv_layers()):
                found = gpu._session.query_statistics(i)
                assert found is None or np.isfinite(found).all()
            gpu._session.stats(), gpu._session.error()
            asked[0] += 1
        except Exception as e:
            failures.append(repr(e))
            return
threads = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in threads]
far = apart(tokens[150:180])
stop.set()
[t.join() for t in threads]
same = [np.allclose(a, b, rtol=1e-3) for a, b in zip(gpu.query_statistics()[0], cpu.query_statistics()[0])]
print(json.dumps([far, asked[0] > 0, failures, same]))
"""
    (far, asked, failures, same), said = run(code, tiny)
    assert far < FAR and asked and failures == [] and same == [True, True] and said == []


# --- GPUs of others ---

CHOICE = """
import ctypes, re
from bridge import backend as adapter
from bridge._compat import C
from mixkvq.core.model_file import built_in_model
f, P = adapter.function, ctypes.c_void_p
kind = f("ggml_backend_dev_type", ctypes.c_int, P)(f("ggml_backend_dev_by_name", P, ctypes.c_char_p)(b"MIXKVQ-CPU"))
lines = []
keep = C.llama_log_callback(lambda level, text, user: lines.append(text.decode()))
C.llama_log_set(keep, None)
params = C.llama_model_default_params()
params.n_gpu_layers = 99
model = C.llama_model_load_from_file(str(built_in_model()).encode(), params)
context = C.llama_context_default_params()
context.n_ctx = 256
assert C.llama_init_from_model(model, context)
caches = re.findall(r"(\\S+) KV buffer size", "".join(lines))
import bridge
llama = bridge.Llama(str(built_in_model()), n_ctx=256, device="cpu", verbose=False, n_threads=1)
llama.eval([5, 6, 7])
print(json.dumps([kind, caches, llama.kv_stats()["device"]]))
"""


def test_beside_an_integrated_gpu_of_another_backend_llama_cpp_does_not_choose_ours():
    """Which would be slower. Whoever names our device gets it."""
    found, said = run(CHOICE, MIXKVQ_EMULATED_AS="Vulkan")
    assert found == [3, ["CUDA0"], "CPU"] and said == []  # GGML_BACKEND_DEVICE_TYPE_ACCEL


def test_beside_a_discrete_gpu_llama_cpp_does_not_choose_ours():
    found, said = run(CHOICE)
    assert found == [2, ["CUDA0"], "CPU"] and said == []  # GGML_BACKEND_DEVICE_TYPE_IGPU, which it takes where there is nothing else
