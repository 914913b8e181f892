"""bridge.Llama and bridge.attach on the built-in model, through the real backend inside the installed llama-cpp-python."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import threading
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import tiny_models
from contexts import WITHOUT_GPU
from gguf import GGUFWriter
from memory_probe import LINUX, measure

import bridge
from bridge import Kv, Llama
from mixkvq.core.model_file import built_in_model, open_model, read_header
from mixkvq.core.profile import LayerProfile, fingerprint, uniform_profile, write_profile

MODEL = str(built_in_model())
PROBLEM = [{"role": "user", "content": "Compute 48291 * 73."}]
SOLUTION = "#### 3525243"
NOVEL = "It was a dark evening in the early spring, and the old clerk walked slowly to the harbour without saying a word. " * 12


def load(**kwargs):
    """A small context; one thread, because OpenMP threads that wait for each other are slow on a busy machine."""
    arguments = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    return Llama(MODEL, **{**arguments, **kwargs})


def solve(llama, n=400):
    return llama.create_chat_completion(PROBLEM, temperature=0.0, max_tokens=n)["choices"][0]["message"]["content"]


def next_tokens(llama, n):
    """Greedy tokens from where the context stands."""
    found = []
    for _ in range(n):
        token = llama.sample(temp=0.0)
        found.append(token)
        llama.eval([token])
    return found


def is_sentence(error):
    text = str(error)
    return text.endswith(".") and "\n" not in text and ": ." not in text


def write_model(path, **changes):
    """A GGUF file with the geometry of a small llama and no tensors: enough for everything that is checked before loading."""
    values = {
        "block_count": 4,
        "context_length": 512,
        "embedding_length": 256,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        **changes.pop("values", {}),
    }
    architecture = changes.pop("architecture", "llama")
    writer = GGUFWriter(path, arch=architecture)
    for key, value in values.items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(f"{architecture}.{key}", value)
    writer.add_token_list(changes.pop("tokens", ["a", "b", "c"]))
    for key, value in changes.pop("general", {}).items():
        (writer.add_uint16 if isinstance(value, int) else writer.add_string)(key, value)
    assert not changes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


# --- the cache is ours, and it works ---


def test_default_preset_solves_the_problem_on_our_cache():
    llama = load()
    assert SOLUTION in solve(llama)
    stats = llama.kv_stats()
    assert stats["cache"] == "mixkvq" and stats["preset"] == "balanced"
    assert stats["n_layers"] == 10 and stats["n_plain_layers"] == 0 and stats["plain_layers"] == []
    assert 2.9 < stats["body_bits"] <= 3.3
    assert stats["n_cells"] == 1024
    assert 0 < stats["bytes_used"] <= stats["bytes"] < stats["bytes_f16"] == 1024 * 10 * 2 * 256 * 2
    assert stats["times_smaller"] == pytest.approx(stats["bytes_f16"] / stats["bytes"])
    report = llama.kv_report()
    assert "MixKVQ balanced" in report and "times smaller" in report and f"{stats['body_bits']:.2f} body" in report
    llama.close()


def test_eight_bit_preset_gives_the_tokens_of_f16():
    ours, stock = load(kv="near-lossless"), load(stock="f16")
    assert solve(ours, 150) == solve(stock, 150)
    assert stock.kv_stats()["cache"] == "stock"
    assert stock.kv_stats()["bytes"] == ours.kv_stats()["bytes_f16"]
    ours.close()
    stock.close()


@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0"])
def test_stock_types(name):
    llama = load(stock=name)
    llama.eval(llama.tokenize(NOVEL.encode())[:64])
    stats = llama.kv_stats()
    bits = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}[name]
    assert stats["type"] == name and stats["total_bits"] == bits and stats["n_layers"] == 10
    assert stats["bytes"] == pytest.approx(1024 * 10 * 2 * 256 * bits / 8, rel=0.01)
    assert f"llama.cpp {name}" in llama.kv_report()
    llama.close()


def test_every_way_to_say_kv(tmp_path):
    path = tmp_path / "uniform.gguf"
    write_profile(path, uniform_profile(MODEL, "careful"))
    bits = {}
    for kv in ("careful", "mix3.8", {"preset": "careful", "window": 64}, Kv(preset="careful", sinks=0), str(path), path, Kv(profile=str(path)), None):
        llama = load(kv=kv, n_ctx=512)
        llama.eval(llama.tokenize(NOVEL.encode())[:280])
        bits[str(kv)] = llama.kv_stats()["body_bits"]
        llama.close()
    default = bits.pop("None")
    assert len({round(b, 6) for b in bits.values()}) == 1, bits
    assert default < min(bits.values())


def test_layers_of_a_profile_are_used(tmp_path):
    wide = LayerProfile(np.array([[0, 128, 0, 0, 0, 128]] * 2, np.int32), np.array([[8, 0]] * 2, np.int32))
    profile = uniform_profile(MODEL, "mix2.4", window=64, sinks=0)
    profile.layers[3] = wide
    write_profile(tmp_path / "p.gguf", profile)
    llama = load(kv=tmp_path / "p.gguf", n_ctx=512)
    llama.eval(llama.tokenize(NOVEL.encode())[:280])
    by_name = {layer["name"]: layer for layer in llama.kv_layers()}
    assert by_name["cache_k_l3"]["tiers"][1] == 128 and by_name["cache_v_l3"]["value_bits"] == 8
    assert by_name["cache_k_l4"]["tiers"][1] == 4 and by_name["cache_v_l4"]["value_bits"] == 2
    llama.close()


# --- what llama_cpp.Llama does keeps working ---


def test_stream_is_the_whole_answer():
    llama = load()
    chunks = llama.create_chat_completion(PROBLEM, temperature=0.0, max_tokens=60, stream=True)
    pieces = [c["choices"][0]["delta"].get("content") or "" for c in chunks]
    assert len(pieces) > 10 and "".join(pieces) == solve(llama, 60)
    llama.close()


def test_state_goes_back_and_forth_and_to_a_stock_context():
    ours, other, stock = load(), load(), load(stock="f16")
    tokens = ours.tokenize(NOVEL.encode())[:400]
    ours.eval(tokens)
    state = ours.save_state(packed=False)
    expected = next_tokens(ours, 12)
    for llama in (ours, other):
        llama.load_state(state)
        llama.eval([])
        llama.n_tokens -= 1
        llama.eval(tokens[-1:])
        assert next_tokens(llama, 12)[:6] == expected[:6]
    # the same state in llama.cpp's own cache, and its state in ours
    stock.load_state(state)
    stock.n_tokens -= 1
    stock.eval(tokens[-1:])
    assert next_tokens(stock, 4) == expected[:4]
    stock.reset()
    stock.eval(tokens)
    ours.load_state(stock.save_state())
    assert ours.n_tokens == len(tokens)
    ours.n_tokens -= 1
    ours.eval(tokens[-1:])
    assert next_tokens(ours, 4) == expected[:4]
    for llama in (ours, other, stock):
        llama.close()


def test_llama_cache_restores_a_prefix():
    llama = load()
    llama.set_cache(llama_cpp.LlamaRAMCache(64 << 20))
    first = llama.create_completion(NOVEL, max_tokens=8, temperature=0.0)["choices"][0]["text"]
    llama.create_completion("def main():", max_tokens=4, temperature=0.0)
    read = []
    llama.on_read = lambda done, total: read.append(total)
    assert llama.create_completion(NOVEL, max_tokens=8, temperature=0.0)["choices"][0]["text"] == first
    assert not read  # all but one token came from the cache
    llama.close()


def test_logits_and_logprobs():
    ours, stock = load(kv="mix8.2", logits_all=True), load(stock="f16", logits_all=True)
    tokens = ours.tokenize(NOVEL.encode())[:280]
    for llama in (ours, stock):
        llama.eval(tokens)
    a, b = np.array(ours._scores), np.array(stock._scores)
    assert a.shape == b.shape == (280, ours.n_vocab()) and np.isfinite(a).all()
    assert (a.argmax(1) == b.argmax(1)).mean() > 0.95
    completion = ours.create_completion("The ", max_tokens=2, logprobs=2, temperature=0.0)
    assert completion["choices"][0]["logprobs"]["token_logprobs"][0] <= 0
    ours.close()
    stock.close()


def test_forward_gives_the_logits_that_are_asked_for_and_clear_begins_again():
    whole, llama = load(stock="f16", logits_all=True, n_ctx=512, device="cpu"), load(stock="f16", n_ctx=512, device="cpu")
    tokens = whole.tokenize(NOVEL.encode())[:60]
    whole.eval(tokens)
    assert llama.forward(tokens[:40], 0).shape == (0, llama.n_vocab())
    rows = llama.forward(tokens[40:], 3).copy()
    np.testing.assert_allclose(rows, whole._scores[57:60], atol=0.05)
    np.testing.assert_array_equal(llama.last_logits(), rows[-1])
    assert llama.n_tokens == 60 and llama.input_ids[:60].tolist() == tokens
    llama.clear()
    assert llama.n_tokens == 0
    np.testing.assert_allclose(llama.forward(tokens[:10], 1)[0], whole._scores[9], atol=0.05)
    assert llama.ends(llama.token_eos()) and not llama.ends(tokens[5])
    with pytest.raises(bridge.ContextError, match="500 tokens"):
        for _ in range(2):
            llama.forward([tokens[5]] * 500, 1)
    whole.close()
    llama.close()


def test_embeddings():
    texts = ["The captain remembered the harbour.", "def f(x): return x"]
    ours, stock = load(embedding=True, n_ctx=512), load(embedding=True, n_ctx=512, stock="f16")
    for text, one, two in zip(texts, ours.create_embedding(texts)["data"], stock.create_embedding(texts)["data"]):
        a, b = np.array(one["embedding"][-1] if isinstance(one["embedding"][0], list) else one["embedding"]), two["embedding"]
        b = np.array(b[-1] if isinstance(b[0], list) else b)
        assert a.shape == (512,) and a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98, text
    ours.close()
    stock.close()


def test_prompt_is_read_in_batches_and_a_known_prefix_is_not_read_again():
    llama = load(n_batch=64, n_ubatch=64)
    calls = []
    llama.on_read = lambda done, total: calls.append((done, total))
    tokens = llama.tokenize(NOVEL.encode())[:200]
    llama.create_completion(tokens, max_tokens=1, temperature=0.0)
    assert calls == [(0, 200), (64, 200), (128, 200), (192, 200), (200, 200)]
    calls.clear()
    llama.create_completion(tokens + llama.tokenize(b" and nothing more was said", add_bos=False), max_tokens=1, temperature=0.0)
    assert calls[0][1] == calls[-1][0] < 20
    messages = [*PROBLEM, {"role": "assistant", "content": "1"}, {"role": "user", "content": "Again."}]
    expected = llama.chat_tokens(messages)
    assert llama.create_chat_completion(messages, max_tokens=1)["usage"]["prompt_tokens"] == len(expected)
    llama.close()


def test_what_on_read_raises_stops_the_prompt_and_leaves_the_context_whole():
    llama = load(n_batch=64, n_ubatch=64)
    tokens = llama.tokenize(NOVEL.encode())[:200]

    def stop(done, total):
        if done >= 128:
            raise KeyboardInterrupt

    llama.on_read = stop
    with pytest.raises(KeyboardInterrupt):
        llama.create_completion(tokens, max_tokens=4, temperature=0.0)
    assert llama.n_tokens == 128
    llama.on_read = None
    again = llama.create_completion(tokens, max_tokens=8, temperature=0.0)["choices"][0]["text"]
    fresh = load(n_batch=64, n_ubatch=64)
    assert fresh.create_completion(tokens, max_tokens=8, temperature=0.0)["choices"][0]["text"] == again
    llama.close()
    fresh.close()


def test_context_of_the_model_and_odd_sizes():
    llama = load(n_ctx=0)
    assert llama.n_ctx() == 16384
    llama.close()
    # llama.cpp rounds up to 256 cells; the arrays of llama-cpp-python must follow, or the last cells could not be used.
    llama = load(n_ctx=100, n_batch=64)
    assert llama.n_ctx() == len(llama.input_ids) == 256
    assert llama.create_completion("Once", max_tokens=-1, temperature=0.0, stop=[])["usage"]["total_tokens"] <= 256
    llama.close()


def test_pickle_keeps_the_settings():
    llama = load(kv={"preset": "mix2.5", "window": 64}, n_ctx=512)
    copy = pickle.loads(pickle.dumps(llama))
    assert copy.kv == llama.kv and copy.n_ctx() == 512 and copy.kv_stats()["cache"] == "mixkvq"
    llama.close()
    copy.close()


# --- several at once ---


def test_two_models_at_once_have_their_own_caches():
    small, large = load(kv="mix2.4", n_ctx=512), load(kv="mix8.2", n_ctx=1024)
    tokens = small.tokenize(NOVEL.encode())[:280]
    small.eval(tokens)
    large.eval(tokens)
    small.eval(tokens[:50])
    a, b = small.kv_stats(), large.kv_stats()
    assert a["n_cells"] == 512 and b["n_cells"] == 1024 and a["body_bits"] < 2.6 < 8 < b["body_bits"]
    small.close()
    assert SOLUTION in solve(large)
    large.close()
    with pytest.raises(bridge.ContextError):
        large.kv_stats()


@LINUX
def test_created_and_freed_hundreds_of_times(tmp_path):
    """A cache of these has 2.1 MB in F16, its weights another 2.5: 160 would be hundreds. What is left is what the allocator and the log keep."""
    path = tiny_models.llama(tmp_path / "wide.gguf", 128, 8, 1)
    assert measure("models_made_and_closed", str(path), 40, 160) < 8 << 20


def test_threads_each_with_its_own_context():
    expected = {}
    for preset in ("mix2.5", "mix8.2"):
        llama = load(kv=preset)
        expected[preset] = solve(llama, 60)
        llama.close()
    found, failures = [], []

    def work(preset):
        try:
            llama = load(kv=preset)
            found.append((preset, solve(llama, 60), llama.kv_stats()["body_bits"] > 5))
            llama.close()
        except Exception as e:  # noqa: BLE001 - reported below, in the main thread
            failures.append(e)

    threads = [threading.Thread(target=work, args=(p,)) for p in ("mix2.5", "mix8.2", "mix2.5")]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert sorted(found) == sorted([(p, expected[p], p == "mix8.2") for p in ("mix2.5", "mix8.2", "mix2.5")])


# --- programs that build llama_cpp.Llama themselves ---


def plain(**kwargs):
    arguments = {"n_ctx": 512, "n_gpu_layers": -1, "flash_attn": True, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    return llama_cpp.Llama(MODEL, **{**arguments, **kwargs})


@WITHOUT_GPU
def test_attach():
    with bridge.attach("mix2.5", model=MODEL) as attachment:
        with pytest.raises(bridge.CacheNotUsedError):
            attachment.kv_stats()
        llama = plain()
        inner = load(kv="mix8.2", n_ctx=256)  # its own settings, not the attachment's
        with pytest.raises(bridge.SettingsError):
            bridge.attach()
    after = plain()
    for each in (llama, inner, after):
        each.eval(each.tokenize(NOVEL.encode())[:250])
    stats = attachment.kv_stats()
    assert stats["n_cells"] == 512 and stats["n_layers"] == 10 and 2.4 < stats["body_bits"] < 2.7
    assert "MixKVQ mix2.5" in attachment.kv_report()
    attachment.detach()  # again: nothing happens
    for each in (llama, inner, after):
        each.close()


@WITHOUT_GPU
def test_attach_without_flash_attention_says_what_is_kept_plainly():
    with bridge.attach() as attachment:
        llama = plain(flash_attn=False)
    llama.eval(llama.tokenize(NOVEL.encode())[:250])
    assert attachment.kv_stats()["n_plain_layers"] == 10
    assert "kept plainly" in attachment.kv_report()
    llama.close()


def test_what_is_kept_plainly_is_said_once(tmp_path):
    model = tiny_models.gemma4(tmp_path / "m.gguf")
    for verbose in (False, True):
        done = subprocess.run([sys.executable, "-c", f"""
from bridge import Llama
llama = Llama({str(model)!r}, n_ctx=512, n_threads=1, n_threads_batch=1, verbose={verbose})
llama.eval(list(range(3, 200)))
llama.close()
"""], capture_output=True, text=True, check=True)  # fmt: skip
        assert len(re.findall("^mixkvq: .*plainly", done.stderr, re.MULTILINE)) == 1, done.stderr


@WITHOUT_GPU
def test_any_thread_may_detach():
    attachment = bridge.attach("mix2.5")
    with pytest.raises(bridge.SettingsError, match="attached already"):
        bridge.attach()
    detaching = threading.Thread(target=attachment.detach)
    detaching.start()
    detaching.join()
    llama = plain()
    with pytest.raises(bridge.CacheNotUsedError):  # it came after
        attachment.kv_stats()
    with bridge.attach("mix8.2") as second:
        attachment.detach()  # again: the second stays
        inner = plain()
    assert second.kv_stats()["preset"] == "mix8.2" and second.kv_stats()["n_cells"] == 512
    for each in (llama, inner):
        each.close()


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"kv": "nope"}, bridge.SettingsError, ["'nope'", "balanced", "paper"]),
        ({"kv": "q8_0"}, bridge.SettingsError, ["stock='q8_0'"]),
        ({"kv": ""}, bridge.SettingsError, ["presets are"]),
        ({"kv": 3}, bridge.SettingsError, ["int"]),
        ({"kv": {"bits": 3}}, bridge.SettingsError, ["'bits'"]),
        ({"kv": Kv(window=-5)}, bridge.SettingsError, ["-5"]),
        ({"kv": Kv(preset="paper", profile="x.gguf")}, bridge.SettingsError, ["one of the two"]),
        ({"kv": "missing.gguf"}, bridge.ProfileError, ["missing.gguf", "does not exist"]),
        ({"kv": "/"}, bridge.ProfileError, ["The profile / is no file."]),
        ({"kv": MODEL}, bridge.ProfileError, ["not a profile"]),
        ({"kv": "paper", "stock": "f16"}, bridge.SettingsError, ["stock"]),
        ({"stock": "q9"}, bridge.SettingsError, ["'q9'", "q8_0"]),
        ({"type_k": 8}, bridge.SettingsError, ["type_k", "stock="]),
        ({"type_v": 8}, bridge.SettingsError, ["type_v", "stock="]),
        ({"n_ctx": -1}, bridge.SettingsError, ["-1"]),
        ({"n_batch": 0}, bridge.SettingsError, ["n_batch"]),
        ({"n_threads": -3}, bridge.SettingsError, ["n_threads is -3; it must be a number of threads"]),
        ({"n_threads_batch": True}, bridge.SettingsError, ["n_threads_batch is True"]),
        ({"n_threads": 1.5, "stock": "f16"}, bridge.SettingsError, ["n_threads is 1.5"]),
        ({"n_ctx": (1 << 31) - 512}, bridge.ContextTooLargeError, ["2147483136", "GiB", "fit"]),
        ({"n_ctx": (1 << 31) - 512, "stock": "f16"}, bridge.ContextTooLargeError, ["GiB"]),
    ],
)
def test_one_sentence_for_bad_settings(arguments, kind, words):
    with pytest.raises(kind) as e:
        load(**arguments)
    assert is_sentence(e.value) and isinstance(e.value, bridge.BridgeError)
    assert all(word in str(e.value) for word in words), str(e.value)


def test_errors_are_also_the_built_in_ones():
    with pytest.raises(ValueError, match="does not exist"):  # as llama_cpp.Llama raises
        Llama("missing.gguf")
    with pytest.raises(MemoryError):
        load(n_ctx=(1 << 31) - 512)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"not a model", "not a GGUF file"),
        (b"GGUF", "truncated"),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, "truncated"),
        (b"GGUF\0\0\0\3" + b"\0" * 16, "big-endian"),
        (b"GGUF\x09\0\0\0" + b"\0" * 16, "version 9"),
        (b"GGUF\3\0\0\0" + b"\0" * 16, "architecture"),
    ],
)
def test_one_sentence_for_bad_files(tmp_path, content, words):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(bridge.ModelFileError, match=words) as e:
        Llama(str(path))
    assert is_sentence(e.value)


def test_one_sentence_for_a_directory(tmp_path):
    with pytest.raises(bridge.ModelFileError, match="directory"):
        Llama(str(tmp_path))


def test_truncated_anywhere(tmp_path):
    raw = Path(MODEL).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (len(raw) - 1, len(raw) // 2, 400_000, 100_000, 3000, 100, 20, 6):
        path.write_bytes(raw[:size])
        with pytest.raises(bridge.ModelFileError, match="truncated") as e:
            Llama(str(path))
        assert is_sentence(e.value)


def test_damaged_headers_never_crash(tmp_path):
    """Random bytes in the header give ModelFileError or a readable header, nothing else."""
    base = Path(write_model(tmp_path / "m.gguf")).read_bytes()
    rng = np.random.default_rng(7)
    path = tmp_path / "damaged.gguf"
    for _ in range(300):
        raw = bytearray(base)
        for at in rng.integers(4, len(raw), rng.integers(1, 6)):
            raw[at] = rng.integers(256)
        path.write_bytes(raw)
        try:
            read_header(path)
            open_model(path)
        except bridge.ModelFileError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize("value", [["a", "b", "c", "d"], [-1] * 4, [0.5] * 4, 1 << 31])
def test_values_of_other_types_than_expected(tmp_path, value):
    keys = ["attention.head_count_kv", "attention.key_length", "attention.sliding_window_pattern", "rope.freq_base", "vocab_size"]
    for key in keys:
        assert open_model(write_model(tmp_path / f"{key}.gguf", values={key: value})).n_layers == 4


def test_a_context_that_llama_cpp_cannot_count(tmp_path):
    assert open_model(write_model(tmp_path / "m.gguf", values={"context_length": (1 << 31) - 1})).n_ctx_train == (1 << 31) - 1
    for value in (1 << 31, (1 << 32) - 1):
        with pytest.raises(bridge.ModelFileError, match=rf"is damaged: it claims a context of {value} tokens\.$"):
            open_model(write_model(tmp_path / "m.gguf", values={"context_length": value}))


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"attention.head_count_kv": [2, 0]}, "layer 1 claims 0 key/value heads of 64, but its weights make keys of 128 numbers"),
        ({"attention.head_count_kv": [2, 4]}, "layer 1 claims 4 key/value heads of 64"),
        ({"expert_count": 4}, "it claims 4 experts, of which 0 are used"),
        ({"expert_used_count": 2}, "it claims 0 experts, of which 2 are used"),
        ({"expert_count": 2000, "expert_used_count": 2}, "2000 experts"),
        ({"expert_group_count": 2}, "0 experts in 2 groups, of which 0 are used"),
        ({"expert_count": 4, "expert_used_count": [2, 1], "expert_group_count": 2}, "4 experts in 2 groups, of which 0 are used"),
        ({"nextn_predict_layers": 3}, "2 layers, of which 3 predict further tokens"),
        ({"rope.scaling.type": "cubic"}, "a scaling of positions 'cubic', and there are none, linear, yarn, longrope"),
        ({"block_count": 513}, "it claims 513 layers"),
    ],
    ids=str,
)
def test_numbers_with_which_llama_cpp_would_end_the_process(tmp_path, claims, words):
    path = tiny_models.llama(tmp_path / "m.gguf", claims=claims)
    for arguments in ({}, {"stock": "f16"}):
        with pytest.raises(bridge.ModelFileError, match=f"m.gguf is damaged: .*{words}") as e:
            Llama(str(path), n_ctx=256, verbose=False, **arguments)
        assert is_sentence(e.value)


def test_heads_that_are_not_claimed_where_one_weight_makes_all_three(tmp_path):
    path = tiny_models.bloom(tmp_path / "m.gguf", claims={"attention.head_count_kv": [3, 0]})
    with pytest.raises(bridge.ModelFileError, match="layer 1 claims no key/value heads, but has weights that make keys"):
        open_model(path)
    assert open_model(tiny_models.lfm2(tmp_path / "hybrid.gguf")).n_head_kv == [0, 1, 0, 1]


def test_not_language_models(tmp_path):
    for general in ({"general.type": "mmproj"}, {"general.type": "adapter"}, {"general.type": "mixkvq-profile"}):
        path = write_model(tmp_path / "other.gguf", general=general)
        with pytest.raises(bridge.ModelFileError, match="not a language model"):
            Llama(path)


def test_what_llama_cpp_cannot_load_is_said_with_its_reason(tmp_path):
    path = write_model(tmp_path / "new.gguf", architecture="nonesuch")
    for arguments in ({}, {"stock": "f16"}):
        with pytest.raises(bridge.ModelFileError, match="nonesuch") as e:
            Llama(path, verbose=False, **arguments)
        assert is_sentence(e.value)
    llama = load(n_ctx=256)  # nothing is left behind
    assert llama.kv_stats()["n_cells"] == 256
    llama.close()


def test_parts_of_a_split_model(tmp_path):
    second = write_model(tmp_path / "m-00002-of-00002.gguf", general={"split.count": 2, "split.no": 1})
    with pytest.raises(bridge.ModelFileError, match="00001-of-00002"):
        open_model(second)
    first = write_model(tmp_path / "m-00001-of-00002.gguf", general={"split.count": 2, "split.no": 0})
    assert open_model(first).n_layers == 4
    Path(second).unlink()
    with pytest.raises(bridge.ModelFileError, match="00002-of-00002.gguf does not exist"):
        open_model(first)


def test_geometry(tmp_path):
    m = open_model(write_model(tmp_path / "a.gguf", values={"attention.head_count_kv": [2, 0, 2, 0], "attention.value_length": 96}))
    assert m.n_head_kv == [2, 0, 2, 0] and m.head_sizes == [(64, 96), (0, 0), (64, 96), (0, 0)]
    assert m.served_layers() == 2 and m.cache_elements(1024) == 1024 * 2 * 2 * 160
    windowed = open_model(
        write_model(
            tmp_path / "b.gguf",
            values={"attention.sliding_window": 128, "attention.sliding_window_pattern": [True, False, True, False]},
        )
    )
    assert windowed.cache_elements(4096, 512) == 2 * 128 * 4 * 4096  # llama.cpp's default gives windowed layers all cells
    assert windowed.cache_elements(4096, 512, swa_full=False) == 2 * 128 * (2 * 4096 + 2 * 768)
    latent = {"attention.kv_lora_rank": 32, "attention.key_length_mla": 96, "attention.value_length_mla": 64}
    assert open_model(write_model(tmp_path / "c.gguf", values=latent)).served_layers() == 0
    for missing in ("attention.key_length_mla", "attention.value_length_mla"):  # an older file: an ordinary cache
        values = {key: value for key, value in latent.items() if key != missing}
        assert open_model(write_model(tmp_path / "d.gguf", values=values)).served_layers() == 4


def test_geometry_of_windowed_layers(tmp_path):
    sizes = {"attention.key_length": 512, "attention.value_length": 512, "attention.key_length_swa": 128, "attention.value_length_swa": 96}
    window = {"attention.sliding_window": 128, "attention.sliding_window_pattern": [True, False, True, False]}
    m = open_model(write_model(tmp_path / "a.gguf", values={**sizes, **window}))
    assert m.head_sizes == [(128, 96), (512, 512)] * 2 and m.served_layers() == 2
    assert m.cache_elements(4096, 512) == 2 * 2 * (2 * 512 + 128 + 96) * 4096
    assert m.cache_elements(4096, 512, swa_full=False) == 2 * 2 * (2 * 512 * 4096 + (128 + 96) * 768)
    # The file does not say which layers these are: some may be served, and the memory is a lower bound.
    m = open_model(write_model(tmp_path / "b.gguf", values={**sizes, "attention.sliding_window": 128}))
    assert m.head_sizes is None and m.served_layers() > 0
    assert m.cache_elements(4096, 512) == 4 * 2 * (128 + 96) * 4096
    assert m.cache_elements(4096, 512, swa_full=False) == 4 * 2 * (128 + 96) * 768
    # The last layers read the cache of earlier ones.
    m = open_model(write_model(tmp_path / "c.gguf", values={**sizes, **window, "attention.shared_kv_layers": 2}))
    assert m.head_sizes == [(128, 96), (512, 512), (0, 0), (0, 0)] and m.served_layers() == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"attention.key_length": 512, "attention.value_length": 512}, "512/512"),
        ({"attention.key_length": 20, "attention.value_length": 20}, "20/20"),
        ({"attention.head_count": 0, "attention.head_count_kv": 0}, "no attention layers"),
        ({"attention.key_length_mla": 192, "attention.value_length_mla": 128}, "latent"),
    ],
)
def test_geometry_that_is_not_served(tmp_path, values, words):
    with pytest.raises(bridge.GeometryError, match=words) as e:
        Llama(write_model(tmp_path / "odd.gguf", values=values))
    assert is_sentence(e.value) and "stock=" in str(e.value)


@pytest.mark.parametrize("version", ["0.2.90", "0.3.9", "0.3.16"])
def test_llama_cpp_python_that_is_too_old(monkeypatch, version):
    from bridge import backend

    monkeypatch.setattr(llama_cpp, "__version__", version)
    with pytest.raises(bridge.VersionError, match="pip install 'llama-cpp-python>=0.3.17'") as e:
        backend.check_versions()
    assert is_sentence(e.value)


# --- profiles ---


def test_fingerprint_is_of_the_model_not_of_its_weights(tmp_path):
    base = fingerprint(write_model(tmp_path / "a.gguf"))
    assert len(base) == 32 and int(base, 16) >= 0
    assert fingerprint(write_model(tmp_path / "b.gguf", general={"general.file_type": "other"})) == base
    assert fingerprint(write_model(tmp_path / "c.gguf", tokens=["a", "b", "d"])) != base
    assert fingerprint(write_model(tmp_path / "d.gguf", values={"attention.head_count_kv": 1})) != base
    assert fingerprint(write_model(tmp_path / "e.gguf", values={"context_length": 1024})) == base
    # a header that takes more than one read
    long = [f"t{i}" * 100 for i in range(5000)]
    assert fingerprint(write_model(tmp_path / "f.gguf", tokens=long)) == fingerprint(write_model(tmp_path / "g.gguf", tokens=long))
    long[4999] = "x"
    assert fingerprint(write_model(tmp_path / "h.gguf", tokens=long)) != fingerprint(tmp_path / "g.gguf")


COUNT_THREADS = """
import sys
import psutil
import bridge

llm = bridge.Llama(sys.argv[1], n_ctx=1024, n_threads=3, n_threads_batch=3, device="cpu", verbose=False)
before = psutil.Process().num_threads()
llm.eval([1 + i % 200 for i in range(900)])
print(psutil.Process().num_threads() - before)
"""


def test_threads_that_compute_the_model_work_on_the_cache():
    """A pool of our own beside ggml's would be two more threads, which keep processors from each other."""
    done = subprocess.run([sys.executable, "-c", COUNT_THREADS, MODEL], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]
