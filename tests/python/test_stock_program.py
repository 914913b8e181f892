"""Programs that know nothing of `bridge`: GGML_BACKEND_PATH=$(python -m bridge.path) alone gives them a MixKVQ cache, MIXKVQ_* variables say which.

The first part is a Python program on llama-cpp-python. Its llama.cpp has the CPU backend linked in and so does not look for others by itself: the
program calls ggml_backend_load_all(), as llama.cpp's own tools do. The second part runs those tools; LLAMA_CPP_BIN names the folder they are in.
Only they use a GPU, where there is one: from all others it is hidden, because llama.cpp would choose it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from contexts import CPU, devices, stock_name
from gguf import GGUFWriter

from mixkvq.core.model_file import built_in_model
from mixkvq.core.profile import LayerProfile, Profile, uniform_profile, write_profile

PROGRAM = """
import json, sys
import llama_cpp
from llama_cpp import llama_cpp as C

C._lib.ggml_backend_load_all()
job = json.loads(sys.argv[1])
try:
    llama = llama_cpp.Llama(job["model"], n_gpu_layers=-1, seed=1, n_threads=1, n_threads_batch=1, **job["arguments"])
except ValueError as e:
    print(json.dumps({"error": str(e)}))
    sys.exit(0)
tokens = llama.tokenize(job["prompt"].encode())
answer = []
for token in llama.generate(tokens, temp=0.0):
    answer.append(token)
    if len(answer) == job["tokens"]:
        break
print(json.dumps({"answer": answer}))
"""

MODEL = str(built_in_model())
PROMPT = (
    "The mill stood on the left bank of the river, a little below the bridge, and its wheel had not turned for many years. The children of the "
    "village played there in summer, when the water was low and the stones were dry. " * 12
)
BINARIES = os.environ.get("LLAMA_CPP_BIN", "")


@functools.lru_cache
def backend_path() -> str:
    done = subprocess.run([sys.executable, "-m", "bridge.path"], capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and Path(done.stdout.strip()).is_file()
    return done.stdout.strip()


def environment(ours: bool = True, device: str = CPU, **variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MIXKVQ_", "GGML_BACKEND_PATH"))}
    clean["OMP_WAIT_POLICY"] = "passive"  # waiting OpenMP threads otherwise take the processor from those that work, when the machine is busy
    if ours:
        clean["GGML_BACKEND_PATH"] = backend_path()
    if device == CPU:
        clean["CUDA_VISIBLE_DEVICES"] = ""
    return {**clean, **variables}


class Result:
    """What a stock program answered, and what the log says about its cache."""

    def __init__(self, done: subprocess.CompletedProcess[str]):
        self.log = done.stderr
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-4000:]}"
        self.out = json.loads(done.stdout.splitlines()[-1])
        self.answer = self.out.get("answer")
        self.error = self.out.get("error")
        self.said = [line for line in done.stderr.splitlines() if line.startswith("mixkvq: ")]
        buffers = re.findall(r"(\S+) KV buffer size = +([\d.]+) MiB", done.stderr)
        self.devices = {name for name, _ in buffers}
        self.mib = sum(float(size) for _, size in buffers)


def stock(model: str = MODEL, prompt: str = PROMPT, tokens: int = 24, ours: bool = True, arguments: dict | None = None, **variables: str) -> Result:
    job = {"model": model, "prompt": prompt, "tokens": tokens, "arguments": {"n_ctx": 2048, "flash_attn": True, "verbose": True, **(arguments or {})}}
    command = [sys.executable, "-c", PROGRAM, json.dumps(job)]
    return Result(subprocess.run(command, env=environment(ours, **variables), capture_output=True, text=True, timeout=600, check=False))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(tiny_models.llama(tmp_path_factory.mktemp("stock") / "tiny.gguf"))


def on_tiny(tiny: str, **options) -> Result:
    return stock(tiny, prompt="abc" * 100, tokens=2, **options)


# --- the cache is ours ---


def test_the_cache_is_on_our_device_and_the_answer_is_that_of_stock():
    theirs = stock(tokens=7, ours=False)  # of the eighth, two are as likely to within the rounding of any cache
    assert theirs.devices == {"CPU"} and theirs.mib == pytest.approx(2048 * 10 * 512 * 2 / 2**20)
    ours = stock(tokens=7, MIXKVQ_PRESET="mix8.2")
    assert ours.devices == {"MIXKVQ-CPU"} and ours.said == []
    assert "using device MIXKVQ-CPU (CPU with a MixKVQ cache)" in ours.log
    assert len(ours.answer) == 7 and ours.answer == theirs.answer
    assert ours.mib < 0.75 * theirs.mib


def test_without_the_variable_nothing_changes(tiny):
    result = on_tiny(tiny, ours=False, MIXKVQ_PRESET="nonesuch")
    assert result.devices == {"CPU"} and result.said == [] and "MIXKVQ" not in result.log


def test_the_size_follows_the_variables(tiny, tmp_path):
    def mib(**variables: str) -> float:
        result = on_tiny(tiny, arguments={"n_ctx": 8192}, **variables)
        assert result.devices == {"MIXKVQ-CPU"} and result.said == []
        return result.mib

    sizes = [mib(MIXKVQ_PRESET=name) for name in ("mix2.4", "balanced", "mix4.3", "mix8.2")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    default = mib()
    assert default == sizes[1] == mib(MIXKVQ_PRESET="mix3.2") == mib(MIXKVQ_PRESET="", MIXKVQ_WINDOW="", MIXKVQ_PROFILE="")
    # The F16 pages: those of the first tokens, of the recent ones, and the one being filled. A page of this model has 128 * 2 * 2 * 128 numbers.
    page = 128 * 512 * 2 / 2**20
    assert mib(MIXKVQ_WINDOW="1024") == pytest.approx(default + 7 * page, abs=0.02)
    assert mib(MIXKVQ_WINDOW="0") == pytest.approx(default - page, abs=0.02)
    fewer_records = page * (default - 3 * page) / (8192 / 128 - 2) / page
    assert mib(MIXKVQ_SINKS="1024") == pytest.approx(default + 7 * (page - fewer_records), abs=0.02)

    for name, same_as, window in (("mix8.2", sizes[3], None), ("mix2.4", sizes[0], None), ("mix2.4", sizes[0] + 7 * page, 1024)):
        path = tmp_path / f"{name}.gguf"
        write_profile(path, uniform_profile(tiny, name, window=window))
        # A profile takes the place of the preset; its window is the default and the variable overrides it.
        assert mib(MIXKVQ_PROFILE=str(path), MIXKVQ_PRESET="paper") == pytest.approx(same_as, abs=0.02)
        if window:
            assert mib(MIXKVQ_PROFILE=str(path), MIXKVQ_WINDOW="128") == pytest.approx(sizes[0], abs=0.02)


def test_flash_attention_off_keeps_values_plain():
    theirs = stock(ours=False, arguments={"flash_attn": False})
    ours = stock(arguments={"flash_attn": False}, MIXKVQ_PRESET="mix8.2")
    assert ours.devices == {"MIXKVQ-CPU"} and ours.answer == theirs.answer
    assert len(ours.said) == 1
    assert re.fullmatch(r"mixkvq: keys or values of some layers are stored plainly in F16: flash attention is off.*", ours.said[0])


def test_a_cache_type_of_llama_cpp_is_left_as_it_is(tiny):
    q8 = 8
    theirs = on_tiny(tiny, ours=False, arguments={"type_k": q8, "type_v": q8})
    ours = on_tiny(tiny, arguments={"type_k": q8, "type_v": q8})
    assert ours.answer == theirs.answer
    assert len(ours.said) == 1 and "plainly" in ours.said[0] and "q8_0" in ours.said[0]


# --- bad values: one sentence, and llama.cpp's own cache ---


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("MIXKVQ_PRESET", "nonesuch", r'MIXKVQ_PRESET: there is no preset "nonesuch"; the presets are mix2\.4.*paper'),
        ("MIXKVQ_PRESET", "q8_0", r'there is no preset "q8_0"'),
        ("MIXKVQ_WINDOW", "many", r'MIXKVQ_WINDOW="many" is not a number of tokens from 0 to 1048576'),
        ("MIXKVQ_WINDOW", "-1", r'MIXKVQ_WINDOW="-1" is not'),
        ("MIXKVQ_WINDOW", "128x", r'MIXKVQ_WINDOW="128x" is not'),
        ("MIXKVQ_WINDOW", " ", r'MIXKVQ_WINDOW=" " is not'),
        ("MIXKVQ_SINKS", "99999999999999999999999", r'MIXKVQ_SINKS="9+" is not'),
        ("MIXKVQ_SINKS", "1.5", r'MIXKVQ_SINKS="1\.5" is not'),
        ("MIXKVQ_KEEP_STATISTICS", "yes", r'MIXKVQ_KEEP_STATISTICS="yes" is neither 0 nor 1'),
        ("MIXKVQ_PROFILE", "/nonesuch.gguf", r"MIXKVQ_PROFILE: the profile /nonesuch\.gguf cannot be read"),
        ("MIXKVQ_PROFILE", "FOLDER", r"MIXKVQ_PROFILE: the profile .* cannot be read"),
        ("MIXKVQ_PROFILE", "EMPTY", r"MIXKVQ_PROFILE: the profile .* is not a GGUF file"),
        ("MIXKVQ_PROFILE", "TEXT", r"MIXKVQ_PROFILE: the profile .* is not a GGUF file"),
        ("MIXKVQ_PROFILE", "TRUNCATED", r"MIXKVQ_PROFILE: the profile .* (damaged|is a damaged GGUF file)"),
        ("MIXKVQ_PROFILE", "MODEL", r"MIXKVQ_PROFILE: .* is not a MixKVQ profile"),
        ("MIXKVQ_PROFILE", "NEWER", r"MIXKVQ_PROFILE: the profile .* has version 3, this library reads versions 1 and 2; install a newer mixkvq"),
        ("MIXKVQ_ISA", "mmx", r'MIXKVQ_ISA="mmx" is not an instruction set; use one of scalar'),
    ],
)
def test_a_bad_value_is_one_sentence(tiny, tmp_path, variable, value, words):
    if value in ("FOLDER", "EMPTY", "TEXT", "TRUNCATED", "MODEL", "NEWER"):
        value = bad_profile(value, tiny, tmp_path)
    result = on_tiny(tiny, **{variable: value})
    assert len(result.said) == 1, result.said
    assert re.match("mixkvq: .*" + words, result.said[0])
    # The device is absent; the program runs on its own cache.
    assert result.devices == {"CPU"} and len(result.answer) == 2 and result.log.count("mixkvq: ") == 1


def bad_profile(kind: str, tiny: str, folder: Path) -> str:
    path = folder / f"{kind.lower()}.gguf"
    if kind == "FOLDER":
        return str(folder)
    if kind == "MODEL":
        return tiny
    if kind == "EMPTY":
        path.write_bytes(b"")
    elif kind == "TEXT":
        path.write_text("window: 128\n")
    elif kind == "TRUNCATED":
        write_profile(path, uniform_profile(tiny, "mix3.2"))
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "NEWER":
        writer = GGUFWriter(path, "mixkvq")
        writer.add_string("general.type", "mixkvq-profile")
        writer.add_uint32("mixkvq.profile.version", 3)
        writer.add_uint32("mixkvq.profile.layer_count", 2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return str(path)


@pytest.mark.parametrize("change", ["layers", "heads", "head size"])
def test_a_profile_for_another_model_is_one_sentence(tiny, tmp_path, change):
    """The program may have several models, a draft model for example; what the profile does not fit gets the preset."""
    n, d = {"layers": (2, 64), "heads": (4, 32), "head size": (1, 64)}[change]
    tiers = np.tile(np.array([[0, 0, 0, d, 0, 128]], np.int32), (n, 1))
    layer = LayerProfile(tiers, np.tile(np.array([[3, 0]], np.int32), (n, 1)))
    path = tmp_path / "other.gguf"
    write_profile(path, Profile("0" * 32, [layer] * (1 if change == "layers" else 2)))
    result = on_tiny(tiny, MIXKVQ_PROFILE=str(path), MIXKVQ_PRESET="mix2.4")
    assert len(result.said) == 1 and result.error is None and len(result.answer) == 2
    assert f"the profile {path} is for another model: " in result.said[0]
    assert result.said[0].endswith("; layers that it does not fit get the preset mix2.4")
    assert result.devices == {"MIXKVQ-CPU"}


def test_a_profile_does_not_stop_another_model(tiny, tmp_path):
    """Two models in a process, as a server with a draft model has them: each is what it is alone."""
    path = tmp_path / "profile.gguf"
    write_profile(path, uniform_profile(MODEL, "mix8.2"))
    code = """
import json, sys
import llama_cpp
from llama_cpp import llama_cpp as C
C._lib.ggml_backend_load_all()
out = []
for model in sys.argv[1:]:
    llama = llama_cpp.Llama(model, n_ctx=1024, n_gpu_layers=-1, flash_attn=True, logits_all=True, n_threads=1, n_threads_batch=1, verbose=True)
    llama.eval([5 + i % 200 for i in range(600)])
    out.append([round(float(x), 4) for x in llama._scores[599][:20]])
print(json.dumps(out))
"""

    def run(*models: str, **variables: str) -> tuple[list, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", code, *models], env=environment(**variables), capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]), [line for line in done.stderr.splitlines() if line.startswith("mixkvq: ")]

    both, said = run(MODEL, tiny, MIXKVQ_PROFILE=str(path))
    assert len(said) == 1 and f"the profile {path} is for another model" in said[0] and "get the preset mix3.2" in said[0]
    assert both == [run(MODEL, MIXKVQ_PROFILE=str(path))[0][0], run(tiny)[0][0]]


@pytest.mark.parametrize("mode", [0, 1, 3], ids=["none", "layer", "tensor"])
def test_split_modes(tiny, mode):
    """-sm tensor divides every tensor between devices, here one; all operations of the model come to our device then."""
    theirs = on_tiny(tiny, ours=False)
    result = on_tiny(tiny, arguments={"split_mode": mode}, MIXKVQ_PRESET="mix8.2")
    assert result.error is None and result.answer == theirs.answer and result.said == []
    assert result.devices == ({"Meta()"} if mode == 3 else {"MIXKVQ-CPU"}) and "MIXKVQ-CPU (CPU with a MixKVQ cache)" in result.log


def test_the_model_is_mapped_into_memory(tiny):
    """llama.cpp asks our device for this property where a program leaves the choice to it, as llama-server does."""
    code = """
import json, sys
from llama_cpp import llama_cpp as C
C._lib.ggml_backend_load_all()
params = C.llama_model_default_params()
params.n_gpu_layers, params.load_mode = 99, C.LLAMA_LOAD_MODE_AUTO
print(json.dumps(bool(C.llama_model_load_from_file(sys.argv[1].encode(), params))))
"""
    done = subprocess.run([sys.executable, "-c", code, tiny], env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.strip() == "true" and "using device MIXKVQ-CPU" in done.stderr, done.stderr[-2000:]
    assert "load_mode = mmap" in done.stderr


ODD = {
    "keys q8_0, values q4_0": {"type_k": 8, "type_v": 2},
    "bf16": {"type_k": 30, "type_v": 30},
    "q8_0 without flash attention": {"type_k": 8, "flash_attn": False},
    "embeddings": {"embedding": True},
    "no offload of the cache": {"offload_kqv": False},
    "small batches": {"n_batch": 32, "n_ubatch": 16},
}


@pytest.mark.parametrize("settings", ODD.values(), ids=ODD)
def test_odd_settings_end_nothing(tiny, settings):
    """As with llama.cpp alone, and at most one sentence for each cause."""
    theirs = stock(tiny, prompt="abc" * 20, tokens=1, ours=False, arguments=settings)
    ours = stock(tiny, prompt="abc" * 20, tokens=1, arguments=settings)
    assert (ours.answer, ours.error) == (theirs.answer, theirs.error)
    assert len(ours.said) == len(set(ours.said)) <= 2 and all("plainly" in line for line in ours.said)


# --- llama.cpp's own programs ---


DEVICES = pytest.mark.parametrize("device", devices())


def on(device: str, ours: bool = True) -> list[str]:
    """Options that put the model on our device, or on llama.cpp's own below it."""
    return ["-dev", device if ours else stock_name(device), "-ngl", "99"] if ours or device != CPU else []


def tool(name: str) -> str:
    if not BINARIES:
        pytest.skip("LLAMA_CPP_BIN does not name a folder with llama.cpp's programs")
    path = Path(BINARIES) / name
    if not path.is_file():
        pytest.skip(f"there is no {name} in {BINARIES}")
    return str(path)


def run_tool(name: str, *arguments: str, device: str, ours: bool = True, **variables: str) -> str:
    """stdout and stderr of one of llama.cpp's programs."""
    command = [tool(name), *arguments]
    done = subprocess.run(
        command, env=environment(ours, device, **variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@DEVICES
def test_llama_bench_lists_our_device(device):
    listed = rf"^ *{device}: .* with a MixKVQ cache \(\d+ MiB, \d+ MiB free\)$"
    assert re.search(listed, run_tool("llama-bench", "--list-devices", device=device), re.MULTILINE)
    assert "MIXKVQ" not in run_tool("llama-bench", "--list-devices", device=device, ours=False)


@DEVICES
def test_llama_bench_runs_on_it(device):
    options = ["-m", MODEL, *on(device), "-fa", "1", "-r", "1", "-t", "1"]
    out = run_tool("llama-bench", *options, "-p", "256", "-n", "16", "-o", "json", device=device)
    runs = json.loads(out[out.index("[") : out.rindex("]") + 1])
    assert len(runs) == 2
    for result in runs:
        assert "MIXKVQ" in result["backends"] and result["devices"] == device and result["avg_ts"] > 0
    assert f"{device} KV buffer size" in run_tool("llama-bench", *options, "-p", "64", "-n", "0", "-v", device=device)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Prose for perplexity: the licence and the documents of the repository."""
    root = Path(__file__).resolve().parents[2]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(file.read_text() for file in [root / "LICENSE", *sorted((root / "docs").glob("*.md"))])[:24000])
    return str(path)


@DEVICES
def test_llama_perplexity_is_that_of_stock(text, device):
    def perplexity(*, ours: bool = True, **settings) -> float:
        options = [*on(device, ours), "-c", "1024", "--chunks", "4", "-t", "1", "-fa", "on", "-lv", "4"]
        out = run_tool("llama-perplexity", "-m", MODEL, "-f", text, *options, device=device, ours=ours, **settings)
        assert (f"{device} KV buffer size" in out) == ours
        return float(re.search(r"Final estimate: PPL = ([\d.]+)", out)[1])

    theirs = perplexity(ours=False)
    ours = perplexity(MIXKVQ_PRESET="mix8.2", MIXKVQ_WINDOW="0", MIXKVQ_SINKS="0")
    assert ours == pytest.approx(theirs, rel=0.02) and ours != theirs
    rough = perplexity(MIXKVQ_PRESET="mix2.4", MIXKVQ_WINDOW="0", MIXKVQ_SINKS="0")
    assert abs(rough - theirs) > abs(ours - theirs)


@DEVICES
@pytest.mark.parametrize("unified", [False, True])
def test_llama_batched_bench_with_four_sequences(unified, device):
    options = ["-m", MODEL, *on(device), "-fa", "on", "-t", "2", "-c", "4096", "-lv", "4", *(["-kvu"] if unified else [])]
    out = run_tool("llama-batched-bench", *options, "-npp", "300", "-ntg", "16", "-npl", "1,4", device=device)
    assert f"{device} KV buffer size" in out
    rows = re.findall(r"^\| +300 \| +16 \| +(\d) \| +(\d+) \|(.*)$", out, re.MULTILINE)
    assert [(int(n), int(kv)) for n, kv, _ in rows] == [(1, 316), (4, 1264)]
    for *_, figures in rows:
        assert all(float(x) > 0 for x in figures.split("|") if x.strip())


@DEVICES
def test_llama_server_answers(tmp_path, device):
    program = tool("llama-server")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path / "log"
    # A problem that the model is sure about: stock llama.cpp itself answers others differently when it finds the prompt in its cache.
    prompt = "<|im_start|>user\nCompute 48291 * 73.<|im_end|>\n<|im_start|>assistant\n"
    n = 200 if device == CPU else 60  # a GPU's kernels change with the length of a batch: in the long run stock llama.cpp's own answers differ
    request = json.dumps({"prompt": prompt, "n_predict": n, "temperature": 0.0, "return_tokens": True}).encode()

    def ask(ours: bool, **settings) -> tuple[list[int], str]:
        with open(log, "w") as out:
            command = [program, "-m", MODEL, "-c", "4096", "-np", "2", "-t", "1", "-fa", "on", "--host", "127.0.0.1", "--port", str(port), "-lv", "4"]
            server = subprocess.Popen(
                command + on(device, ours), env=environment(ours, device, **settings), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        try:
            end = time.monotonic() + 600
            while True:
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except OSError:
                    time.sleep(0.2)
            headers = {"Content-Type": "application/json"}
            answers = []
            for _ in range(2):  # the second reuses the prompt in the cache
                with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/completion", request, headers), timeout=600) as reply:
                    answers.append(json.load(reply)["tokens"])
            assert answers[0] == answers[1] and len(answers[0]) == n
        finally:
            server.terminate()
            code = server.wait(600)
        text = log.read_text()
        assert code == 0, text[-4000:]
        return answers[0], text

    theirs, _ = ask(ours=False)
    ours, said = ask(ours=True, MIXKVQ_PRESET="mix8.2")
    assert f"{device} KV buffer size" in said
    assert ours == theirs
