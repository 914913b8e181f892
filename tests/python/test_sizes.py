"""What a context takes: the dry run before loading, against the backend's books afterwards, against what is touched while the context fills, and
against what the process really takes.

Reserved are addresses, filled are bytes in memory when all cells hold tokens, in use are those of the cells written so far.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny_models
from contexts import BALANCED, EXACT, PACKED, Context, Model, devices, library_name, random_tokens, stock_name
from test_architectures import PLAIN, SERVED

import bridge
from bridge import Kv, placement
from bridge.backend import backend
from bridge.dry_run import DryRun, Need
from mixkvq.core.model_file import open_model
from mixkvq.core.profile import with_profile
from mixkvq.core.settings import STOCK_TYPES, resolve_kv

SPARE = {"verbose": False, "n_threads": 1, "n_threads_batch": 1}
ARCHITECTURES = {**SERVED, "gemma4": tiny_models.gemma4, "two layers of eight heads": lambda path: tiny_models.llama(path, 128, 8, 1)}
WINDOWED = ("gemma2", "gpt-oss", "gemma4")  # of the others every layer has all cells
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(scope="module", params=devices())
def device(request):
    return request.param


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("sizes"), {}

    def get(name):
        if name not in made:
            make = ARCHITECTURES.get(name) or (PLAIN[name][0] if name in PLAIN else getattr(tiny_models, name))
            made[name] = str(make(folder / f"{name.replace(' ', '-')}.gguf"))
        return made[name]

    return get


def estimate(path, device, n_ctx, kv="balanced", stock=None, codec=None, **options):
    loaded = backend()
    if stock:
        options.update(type_k=STOCK_TYPES[stock][0], type_v=STOCK_TYPES[stock][0])
    settings = with_profile(resolve_kv(kv), open_model(path))
    begin = None if stock else lambda: loaded.begin(settings, open_model(path), codec)
    with DryRun(path, [] if stock else [loaded.devices[device]], options, begin, stock or "f16") as dry:
        return dry.measure(n_ctx)


def packed_within(stats, expected, tolerance=0.03):
    return abs(stats / expected - 1) <= tolerance


# --- before loading and after ---


@pytest.mark.parametrize("n_ctx", [256, 1024, 32768])
@pytest.mark.parametrize(("name", "swa_full"), [*((name, None) for name in ARCHITECTURES), *((name, False) for name in WINDOWED)])
def test_the_estimate_is_what_the_backend_counts(paths, device, name, swa_full, n_ctx):
    path = paths(name)
    need = estimate(path, device, n_ctx, swa_full=swa_full)
    with_library = bridge.Llama(path, n_ctx=n_ctx, kv="balanced", swa_full=swa_full, device=library_name(device), **SPARE)
    stats = with_library.kv_stats()
    layers = with_library._session.layers()
    with_library.close()
    assert need.cache == stats["bytes"] == stats["bytes_filled"]
    assert sum(need.layers.values()) == sum(layer["bytes"] for layer in layers) <= need.cache
    assert need.recurrent == stats["bytes_recurrent"]
    assert (need.recurrent > 0) == (name == "lfm2")
    assert 8 * stats["bytes"] / stats["elements"] == pytest.approx(stats["total_bits"])


@pytest.mark.parametrize("kv", ["tiny", "near-lossless", "paper", Kv("small", window=1024, sinks=0), Kv(window=0, sinks=1000)], ids=str)
@pytest.mark.parametrize("name", ["gemma2", "llama-80x1-gqa3", "deepseek2-k96-v64"])
def test_of_every_preset_and_window(paths, device, name, kv):
    need = estimate(paths(name), device, 4096, kv)
    llama = bridge.Llama(paths(name), n_ctx=4096, kv=kv, device=library_name(device), **SPARE)
    assert need.cache == llama.kv_stats()["bytes"]
    llama.close()


@pytest.mark.parametrize(
    "options", [{"n_batch": 64}, {"n_batch": 1024, "n_ubatch": 128}, {"n_batch": 2048, "n_ubatch": 2048}, {"embedding": True}], ids=str
)
def test_of_batches_that_change_a_ring(paths, device, options):
    options = {"swa_full": False, **options}
    need = estimate(paths("gpt-oss"), device, 8192, **options)
    llama = bridge.Llama(paths("gpt-oss"), n_ctx=8192, device=library_name(device), **options, **SPARE)
    assert need.cache == llama.kv_stats()["bytes"]
    llama.close()


@pytest.mark.parametrize("stock", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["gemma2", "gpt-oss", "llama-64x2-gqa2", "llama-24", "deepseek2-latent", "mamba"])
def test_of_llama_cpps_own_caches(paths, name, stock):
    if name == "llama-24" and stock != "f16":
        pytest.skip("llama.cpp has blocks of 32")
    need = estimate(paths(name), None, 4096, stock=stock)
    llama = bridge.Llama(paths(name), n_ctx=4096, stock=stock, device="cpu", **SPARE)
    assert need.cache == llama.kv_stats()["bytes"] and (need.cache > 0) == (name != "mamba")
    assert (need.recurrent > 0) == (name == "mamba")
    llama.close()


def test_of_a_codec_which_keeps_its_pages_in_f16(paths, device):
    def codec(page):
        return page.rows, 3.0 * page.rows.size

    need = estimate(paths("llama-64x2-gqa2"), device, 2048, codec=codec)
    llama = bridge.Llama(paths("llama-64x2-gqa2"), n_ctx=2048, codec=codec, device=library_name(device), **SPARE)
    stats = llama.kv_stats()
    assert need.cache == stats["bytes"] and stats["bytes_f16"] < stats["bytes"] < 1.05 * stats["bytes_f16"]
    llama.close()


def test_what_stays_on_the_cpu():
    """A cache is divided layer by layer, as far as layers are known; work is where it is computed, and on both sides of a model that is divided."""
    need = Need(cache=100, layers={0: 40, 1: 50}, recurrent=10, books=5, work={"CPU": 7, "MIXKVQ-CUDA0": 9})
    gpu = {"CUDA0", "MIXKVQ-CUDA0"}
    assert need.all == need.on_cpu(2, 1.0, ()) == 100 + 10 + 5 + 7 + 9
    assert need.on_cpu(0, 0.0, gpu) == 5 + 7
    assert need.on_cpu(1, 0.5, gpu) == 40 + 5 + 5 + 7 + 9
    stock = Need(cache=100, layers={}, recurrent=0, books=5, work={"CPU": 7, "CUDA0": 9})
    assert stock.on_cpu(1, 0.25, gpu) == 25 + 5 + 7 + 9 and stock.on_cpu(4, 1.0, ()) == stock.all


# --- several sequences, and contexts that are filled ---


@pytest.fixture(scope="module")
def models(paths, device):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Model(paths(name), True, device), Model(paths(name), True, device, no_alloc=True)
        return made[name]

    yield get
    for pair in made.values():
        for model in pair:
            model.close()


FILLED = {**ARCHITECTURES, **{name: make for name, (make, _) in PLAIN.items()}}


@pytest.mark.parametrize(("n_seq", "unified"), [(1, False), (3, False), (3, True)], ids=["one", "streams", "unified"])
@pytest.mark.parametrize(("name", "full"), [*((name, True) for name in FILLED), *((name, False) for name in WINDOWED)])
def test_a_context_that_fills_touches_what_was_estimated(models, name, full, n_seq, unified):
    """Pages of both kinds, the most there ever were of each: what has been touched stays in memory. Tables come on top."""
    loaded, dry_model = models(name)
    options = {"n_ctx": 1536, "n_ubatch": 64, "n_seq": n_seq, "unified": unified, "swa_full": full}
    with Context(dry_model, Kv(preset="balanced"), **options) as dry:
        expected, planned = dry.stats(), dry.layers()
    with Context(loaded, Kv(preset="balanced"), **options) as context:
        most: dict[str, tuple[int, int]] = {}
        streams = 1 if unified else n_seq
        for step in range(1536 // streams // 64):
            for seq in range(streams):
                context.feed(random_tokens(64, step), seq)
            for layer in context.layers():
                f16, packed = most.get(layer["name"], (0, 0))
                most[layer["name"]] = max(f16, layer["pages_f16"]), max(packed, layer["pages_packed"])
        stats, layers = context.stats(), context.layers()
    assert [layer["name"] for layer in planned] == [layer["name"] for layer in layers] or len(planned) == len(layers)
    assert expected["bytes"] == stats["bytes"] and expected["total_bits"] == stats["total_bits"]
    assert expected["bytes_used"] == 0 < stats["bytes_used"] <= stats["bytes"] <= stats["bytes_reserved"]
    touched = 0.0
    for layer in layers:
        cells, row = 128, layer["head_size"] * layer["n_heads"]
        f16, packed = most[layer["name"]]
        if layer["kind"] == "plain":
            touched += layer["bytes"]
            continue
        touched += f16 * 2 * cells * row + packed * cells * row * layer["body_bits"] / 8
    filled = sum(layer["bytes"] for layer in layers)
    assert packed_within(filled, touched), f"{filled} bytes filled, {touched:.0f} touched"


# --- what the process takes ---


def in_a_process(code: str, *arguments: str, group: str = "") -> dict:
    """The JSON that a program prints; `group`: a folder of a control group that it joins first."""
    join = f"open({group + '/cgroup.procs'!r}, 'w').write('0')\n" if group else ""
    source = join + textwrap.dedent(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], capture_output=True, text=True, env=env, timeout=600, cwd=Path(bridge.__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


FILL = """
    import ctypes, gc, json, os, sys
    import bridge
    from bridge import placement
    options = {"n_threads": 1, "n_threads_batch": 1, "verbose": False, "n_batch": 128, "n_ubatch": 128, "device": "cpu", **json.loads(sys.argv[2])}
    check, needs, taken, stats = placement.check_fits, [], [], {}
    def note(n, free, least, measure):
        needs.append(measure(n))
        check(n, free, least, measure)
    placement.check_fits = note
    def resident():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        lines = open("/proc/self/status").read().splitlines()  # weights are a file's pages
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10
    for n in (512, 1024, 5120):
        before = resident()
        llama = bridge.Llama(sys.argv[1], n_ctx=n, **options)
        llama.eval([3 + i * 7919 % 250 for i in range(n - 1)])
        llama.eval([5])
        taken.append(resident() - before)
        stats[n] = llama.kv_stats()
        llama.close()
    print(json.dumps({"needs": needs, "taken": taken, "bytes": [s["bytes"] for s in stats.values()]}))
"""


@LINUX
@pytest.mark.parametrize("kind", ["balanced", "near-lossless", "f16", "windowed"])
def test_a_full_context_takes_what_was_estimated(paths, kind):
    """Two layers of eight heads of 128: 8 KiB a token in F16. Between two lengths what is the same for every context cancels out."""
    name = "gemma2" if kind == "windowed" else "two layers of eight heads"
    options = {"stock": "f16"} if kind == "f16" else {"kv": "balanced", "swa_full": False} if kind == "windowed" else {"kv": kind}
    found = in_a_process(FILL, paths(name), json.dumps(options))
    (_, small, large), (_, few, many), (_, less, more) = found["taken"], found["needs"], found["bytes"]
    assert large - small == pytest.approx(many - few, rel=0.05, abs=3 << 18), found
    assert more - less < large - small  # the cache is in it
    assert large < many + (1 << 20), found


@pytest.fixture
def memory_group():
    """The folder of a control group of our own, where this machine lets us make one that can have a limit."""
    top = Path("/sys/fs/cgroup")
    folder = (top / "memory" if (top / "memory").is_dir() else top) / f"mixkvq-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as e:
        pytest.skip(f"no control group can be made here: {e}")
    try:
        if not os.access(folder / "memory.max", os.W_OK) and not os.access(folder / "memory.limit_in_bytes", os.W_OK):
            pytest.skip("a control group that is made here cannot have a limit")
        yield str(folder)
    finally:
        folder.rmdir()


LARGEST = """
    import json, os, re, sys
    import bridge
    path, group, spare = sys.argv[1], sys.argv[2], int(sys.argv[3])
    options = dict(n_threads=1, n_threads_batch=1, verbose=False, n_batch=64, n_ubatch=64, device="cpu", kv="balanced")
    bridge.Llama(path, n_ctx=256, **options).close()
    used, limit = ("memory.current", "memory.max") if os.path.exists(group + "/memory.max") else ("memory.usage_in_bytes", "memory.limit_in_bytes")
    open(f"{group}/{limit}", "w").write(str(int(open(f"{group}/{used}").read()) + spare))
    try:
        bridge.Llama(path, n_ctx=1 << 20, **options)
        said = ""
    except bridge.ContextTooLargeError as e:
        said = str(e)
    n = int(re.search(r"at most (\\d+) tokens fit", said)[1])
    llama = bridge.Llama(path, n_ctx=n, **options)
    for i in range(0, n, 64):
        llama.eval([3 + (i + j) * 7919 % 250 for j in range(64)])
    print(json.dumps({"said": said, "n": n, "filled": llama.n_tokens}))
"""


@LINUX
def test_under_the_limit_of_a_control_group(paths, memory_group):
    """A context of a million tokens is refused; the one that is proposed is loaded and filled to the last cell, and the process is not killed."""
    found = in_a_process(LARGEST, paths("two layers of eight heads"), memory_group, str(28 << 20), group=memory_group)
    assert "a control group limits this process to " in found["said"] and "A context of 1048576 tokens needs at least 1.7 GiB" in found["said"]
    assert found["filled"] == found["n"] >= 2048, found


# --- refused before loading ---


def test_what_cannot_fit_is_refused_before_weights_are_read(paths, monkeypatch):
    from mixkvq.core.memory import Free

    path = paths("two layers of eight heads")
    free = Free(64 << 20, 70 << 20)
    monkeypatch.setattr(placement, "free_memory", lambda: free)
    loaded = []
    for swa_full in (True, False):
        with pytest.raises(bridge.ContextTooLargeError, match="A context of 65536 tokens needs at least .* MiB and 64.0 MiB of memory are free") as e:
            bridge.Llama(path, n_ctx=65536, on_load=loaded.append, swa_full=swa_full, device="cpu", **SPARE)
        assert loaded == [] and "a control group limits this process to 70.0 MiB" in str(e.value)
        proposed = int(str(e.value).split("at most ")[1].split()[0])
        assert proposed % 256 == 0 and proposed >= 256
        bridge.Llama(path, n_ctx=proposed, swa_full=swa_full, device="cpu", **SPARE).close()
        with pytest.raises(bridge.ContextTooLargeError):
            bridge.Llama(path, n_ctx=proposed + proposed // 5, swa_full=swa_full, device="cpu", **SPARE)


def test_a_window_lets_a_larger_context_fit(paths, monkeypatch):
    from mixkvq.core.memory import Free

    monkeypatch.setattr(placement, "free_memory", lambda: Free(64 << 20))
    fits = []
    for swa_full in (True, False):
        with pytest.raises(bridge.ContextTooLargeError) as e:
            bridge.Llama(paths("gemma2"), n_ctx=1 << 20, swa_full=swa_full, device="cpu", **SPARE)
        fits.append(int(str(e.value).split("at most ")[1].split()[0]))
    assert fits[1] > 1.1 * fits[0]


def test_what_a_program_asks_for_beside_the_cache_counts(paths, monkeypatch):
    """logits_all keeps a row of the vocabulary for every token."""
    from mixkvq.core.memory import Free

    monkeypatch.setattr(placement, "free_memory", lambda: Free(56 << 20))
    path = paths("llama-64x2-gqa2")
    bridge.Llama(path, n_ctx=32768, device="cpu", **SPARE).close()
    with pytest.raises(bridge.ContextTooLargeError):
        bridge.Llama(path, n_ctx=32768, logits_all=True, device="cpu", **SPARE)


# --- reset ---


def test_reset_gives_the_memory_back(paths, device):
    llama = bridge.Llama(paths("gemma2"), n_ctx=4096, kv="balanced", device=library_name(device), **SPARE)
    llama.eval(random_tokens(50))
    little = llama.kv_stats()["bytes_used"]
    llama.eval(random_tokens(3500))
    assert llama.kv_stats()["bytes_used"] > 2 * little
    llama.reset()
    assert llama.n_tokens == 0 and llama.kv_stats()["bytes_used"] == 0
    llama.eval(random_tokens(50))
    assert llama.kv_stats()["bytes_used"] == little
    llama.close()


RESET = """
    import ctypes, gc, json, sys
    import bridge
    def resident():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10
    options = dict(n_threads=1, n_threads_batch=1, n_batch=128, n_ubatch=128, verbose=False, device="cpu")
    llama = bridge.Llama(sys.argv[1], n_ctx=4096, kv="near-lossless", **options)
    tokens = [3 + i * 7919 % 250 for i in range(4000)]
    llama.eval(tokens)
    full, used = resident(), llama.kv_stats()["bytes_used"]
    llama.reset()
    llama.eval(tokens[:50])
    print(json.dumps({"full": full, "used": used, "after": resident(), "left": llama.kv_stats()["bytes_used"]}))
"""


@LINUX
def test_reset_makes_the_process_smaller(paths):
    found = in_a_process(RESET, paths("two layers of eight heads"))
    assert found["used"] > 16 << 20 > found["left"]
    assert found["full"] - found["after"] == pytest.approx(found["used"] - found["left"], rel=0.1), found


def test_a_repeated_request_reads_only_what_is_new(paths, device):
    llama = bridge.Llama(paths("llama-64x2-gqa2"), n_ctx=1024, device=library_name(device), **SPARE)
    read = []
    llama.on_read = lambda done, total: read.append((done, total))
    prompt = random_tokens(600)
    first = llama.create_completion(prompt, max_tokens=4, temperature=0.0)
    second = llama.create_completion(prompt + random_tokens(40, 2), max_tokens=4, temperature=0.0)
    assert max(total for _, total in read[:3]) == 600 and read[-1] == (40, 40), read
    assert first["usage"]["prompt_tokens"] == 600 and second["usage"]["prompt_tokens"] == 640
    llama.close()


def test_the_chat_forgets_and_gives_the_memory_back(paths, device):
    import io

    from rich.console import Console

    from mixkvq.cli.answer import Sampling
    from mixkvq.cli.chat import Chat

    llama = bridge.Llama(paths("llama-64x2-gqa2"), n_ctx=4096, device=library_name(device), **SPARE)
    chat = Chat(llama, Sampling(max_tokens=2, temperature=0.0), None, Console(file=io.StringIO()), lambda s: None, lambda s: "")
    chat.turn("Say it again. " * 200)
    full = llama.kv_stats()["bytes_used"]
    chat.command("/reset")
    assert llama.kv_stats()["bytes_used"] == 0
    chat.turn("Hello")
    assert llama.kv_stats()["bytes_used"] < full / 2
    llama.close()


# --- small contexts, and the words of the report ---


def test_a_context_in_which_nothing_is_gained_says_from_where_on(paths, device):
    path = paths("llama-64x2-gqa2")
    llama = bridge.Llama(path, n_ctx=256, kv="balanced", device=library_name(device), **SPARE)
    stats, report = llama.kv_stats(), llama.kv_report()
    llama.close()
    n = stats["n_cells_gain"]
    assert stats["times_smaller"] <= 1 and f"against F16       not smaller: nothing is gained below {n} tokens" in report and "times" not in report
    for n_ctx, gains in ((n - 256, False), (n, True)):
        llama = bridge.Llama(path, n_ctx=n_ctx, kv="balanced", device=library_name(device), **SPARE)
        stats = llama.kv_stats()
        assert (stats["times_smaller"] > 1) == gains == (stats["n_cells_gain"] == 0)
        assert ("times smaller" in llama.kv_report()) == gains
        llama.close()


def test_a_cache_that_never_gains_says_so(paths, device):
    llama = bridge.Llama(paths("llama-64x2-gqa2"), n_ctx=512, kv=EXACT, device=library_name(device), **SPARE)
    assert llama.kv_stats()["n_cells_gain"] == 0 and "against F16       not smaller (" in llama.kv_report()
    llama.close()


def test_a_context_below_the_smallest_is_said_once(paths, capfd):
    for _ in range(2):
        llama = bridge.Llama(paths("llama-64x2-gqa2"), n_ctx=77, device="cpu", **SPARE)
        assert llama.n_ctx() == 256
        llama.close()
    assert capfd.readouterr().err.count("77 tokens of context were asked for; llama.cpp makes it 256") == 1


def test_the_three_words(paths, device):
    """In use <= filled <= reserved, and the report names the first two."""
    llama = bridge.Llama(paths("gemma2"), n_ctx=2048, kv=Kv("balanced", window=512), device=library_name(device), **SPARE)
    llama.eval(random_tokens(1000))
    stats, report = llama.kv_stats(), llama.kv_report()
    llama.close()
    assert 0 < stats["bytes_used"] < stats["bytes_filled"] == stats["bytes"] < stats["bytes_reserved"]
    assert report.splitlines()[1].startswith("filled  ") and report.splitlines()[2].startswith("in use  ")


def test_a_dry_run_counts_both_devices_alike(models):
    """The same figures with and without head sizes that the program knows, and without a byte reserved."""
    _, dry_model = models("gpt-oss")
    found = []
    for known in (True, False):
        with Context(dry_model, BALANCED, n_ctx=4096, head_sizes_known=known) as context:
            found.append(context.stats())
    assert found[0]["bytes"] == found[1]["bytes"] and found[0]["bytes_used"] == 0
    with Context(dry_model, PACKED, n_ctx=4096) as context:
        assert context.stats()["bytes"] > found[0]["bytes"] and stock_name(dry_model.device) != dry_model.device
