"""Profiles inside models, and the command line that puts them there and takes them out."""

from __future__ import annotations

import collections
import hashlib
import os
import re
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
from gguf import GGUFReader, GGUFWriter
from gguf import GGUFValueType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import GOLDEN, GOLDEN_LAYERS, is_sentence, profiles, refused, same, write_gguf

import bridge
from mixkvq.cli import convert
from mixkvq.cli.options import run
from mixkvq.core import embedding
from mixkvq.core.model_file import built_in_model, open_model
from mixkvq.core.profile import Profile, load_profile, read_profile, to_json, uniform_profile, write_profile

MODEL = str(built_in_model())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_models.llama(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture
def profile(tiny):
    found = uniform_profile(tiny, "careful", window=64)
    for layer in found.layers:
        layer.query_prior = np.linspace(0, 2, layer.tiers.shape[0] * 64, dtype=np.float32).reshape(-1, 64)
    found.measured, found.made_by, found.body_bits = [{"text": "prose", "kld_mean": 0.01}], "a test", 3.75
    return found


def contents(path):
    """Keys with their types and values, and tensors, as the gguf package reads them."""
    reader = GGUFReader(path)
    fields = {f.name: (f.types, f.contents()) for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    tensors = {t.name: (t.tensor_type, t.shape.tolist(), hashlib.sha256(t.data.tobytes()).digest()) for t in reader.tensors}
    assert len(tensors) == reader.get_field("GGUF.tensor_count").contents()
    return fields, tensors


# --- embedding ---


def test_everything_else_in_the_model_stays(tiny, profile, tmp_path):
    out = tmp_path / "out.gguf"
    embedding.embed(tiny, profile, out)
    assert same(read_profile(out, tiny), profile) and same(read_profile(out, out), profile)
    (fields, tensors), (new_fields, new_tensors) = contents(tiny), contents(out)
    added = {name for name in new_fields if name.startswith("mixkvq.profile.")}
    assert added > {"mixkvq.profile.version", "mixkvq.profile.blk.1.query_prior"} and set(new_fields) - added == set(fields)
    assert {name: new_fields[name] for name in fields} == fields and new_tensors == tensors
    assert list(new_fields)[: len(fields)] == list(fields) and len(tensors) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_out_and_back_is_the_same_file(tiny, profile, tmp_path):
    out, back = tmp_path / "out.gguf", tmp_path / "back.gguf"
    embedding.embed(tiny, profile, out)
    embedding.remove(out, back)
    assert back.read_bytes() == Path(tiny).read_bytes() != out.read_bytes()
    write_profile(tmp_path / "a.mixkvq.gguf", profile)
    embedding.extract(out, tmp_path / "b.mixkvq.gguf")
    assert (tmp_path / "a.mixkvq.gguf").read_bytes() == (tmp_path / "b.mixkvq.gguf").read_bytes()


def test_in_place_and_in_place_of_another(tiny, profile, tmp_path):
    out = tmp_path / "m.gguf"
    out.write_bytes(Path(tiny).read_bytes())
    embedding.embed(out, profile, out)
    first = out.read_bytes()
    other = uniform_profile(tiny, "small")
    embedding.embed(out, other, out)
    assert same(read_profile(out), other) and b"a test" not in out.read_bytes()
    embedding.embed(out, profile, out)
    assert out.read_bytes() == first
    embedding.remove(out, out)
    assert out.read_bytes() == Path(tiny).read_bytes() and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_the_fingerprint_stays(tiny, profile, tmp_path):
    embedding.embed(tiny, profile, tmp_path / "m.gguf")
    before, after = open_model(tiny), open_model(tmp_path / "m.gguf")
    assert after.fingerprint == before.fingerprint and after.has_profile and not before.has_profile


@given(data=st.data(), alignment=st.sampled_from([None, 8, 32, 64, 256]))
@settings(max_examples=30)
def test_keys_of_every_type(tmp_path, data, alignment):
    """Whatever else a model's header holds is carried over byte by byte."""
    numbers = {
        T.UINT8: st.integers(0, 255),
        T.INT8: st.integers(-128, 127),
        T.UINT16: st.integers(0, 65535),
        T.INT16: st.integers(-32768, 32767),
        T.UINT32: st.integers(0, 2**32 - 1),
        T.INT32: st.integers(-(2**31), 2**31 - 1),
        T.UINT64: st.integers(0, 2**64 - 1),
        T.INT64: st.integers(-(2**63), 2**63 - 1),
        T.FLOAT32: st.floats(-1024, 1024, width=16),
        T.FLOAT64: st.floats(-1e9, 1e9),
        T.BOOL: st.booleans(),
        T.STRING: st.text(st.characters(codec="utf-8"), min_size=1, max_size=9),
    }
    keys = {"tokenizer.ggml.tokens": (T.ARRAY, T.STRING, ["a", "b"])}
    for name in ("block_count", "attention.head_count", "attention.key_length", "attention.value_length", "embedding_length"):
        keys[f"llama.{name}"] = (T.UINT32, {"block_count": 1, "attention.head_count": 2}.get(name, 64))
    for i, kind in enumerate(data.draw(st.lists(st.sampled_from(list(numbers)), max_size=6))):
        if data.draw(st.booleans()):
            keys[f"extra.{i}"] = (kind, data.draw(numbers[kind]))
        else:
            keys[f"extra.{i}"] = (T.ARRAY, kind, data.draw(st.lists(numbers[kind], min_size=1, max_size=5)))
    if alignment is not None:
        keys["general.alignment"] = (T.UINT32, alignment)
    path, out, back = (tmp_path / name for name in ("m.gguf", "out.gguf", "back.gguf"))
    writer_tensors = {f"t{i}": np.arange(n, dtype=np.float32) for i, n in enumerate(data.draw(st.lists(st.integers(1, 70), max_size=3)))}
    write_aligned(path, keys, writer_tensors, alignment)
    wanted = uniform_profile(path)
    embedding.embed(path, wanted, out)
    assert same(read_profile(out, path), wanted)
    fields, tensors = contents(out)
    assert {k: v for k, v in fields.items() if not k.startswith("mixkvq.")} == contents(path)[0] and tensors == contents(path)[1]
    embedding.remove(out, back)
    assert back.read_bytes() == path.read_bytes()


def write_aligned(path, keys, tensors, alignment):
    writer = GGUFWriter(path, arch="llama")
    if alignment is not None:
        writer.data_alignment = alignment
    for name, (kind, *rest) in keys.items():
        writer.add_key_value(name, rest[-1], kind, sub_type=rest[0] if kind == T.ARRAY else None)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@given(profile=profiles())
@settings(max_examples=20)
def test_json_and_side_cars_of_any_profile(tmp_path, profile):
    a, b, c = (str(tmp_path / name) for name in ("a.gguf", "b.json", "c.gguf"))
    write_profile(a, profile)
    assert run(convert.command, "x", ["to-json", a, "-o", b, "--force"]) == run(convert.command, "x", ["from-json", b, "-o", c, "--force"]) == 0
    assert Path(a).read_bytes() == Path(c).read_bytes() and same(load_profile(b), profile)


def test_a_large_model_is_copied_in_blocks(tmp_path):
    path = tmp_path / "m.gguf"
    keys = {"tokenizer.ggml.tokens": (T.ARRAY, T.STRING, ["a"])}
    for name in ("block_count", "attention.head_count", "attention.key_length", "attention.value_length", "embedding_length"):
        keys[f"llama.{name}"] = (T.UINT32, {"block_count": 1, "attention.head_count": 2}.get(name, 64))
    write_gguf(path, keys, {"t": np.resize(np.arange(1000, dtype=np.int32), 20 << 20)}, arch="llama")
    profile, seen = uniform_profile(path), []
    assert path.stat().st_size > 80 << 20
    tracemalloc.start()
    embedding.embed(path, profile, tmp_path / "out.gguf", lambda done, total: seen.append((done, total)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20, peak
    assert seen == sorted(seen) and len(seen) > 20 and seen[-1][0] == seen[-1][1]


def split(path, folder, name="m"):
    """A model as two files, as llama.cpp's own tool makes them: the second has tensors and no metadata of the model."""
    reader = GGUFReader(path)
    half = len(reader.tensors) // 2
    parts = []
    for i, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
        parts.append(folder / f"{name}-{i + 1:05d}-of-00002.gguf")
        writer = GGUFWriter(parts[-1], reader.get_field("general.architecture").contents())
        if i == 0:
            for field in reader.fields.values():
                if field.name != "general.architecture" and not field.name.startswith("GGUF."):
                    writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def logits(path, kv="balanced"):
    llama = bridge.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, kv=kv)
    llama.eval(list(range(3, 203)))
    result = np.array(llama.scores[: llama.n_tokens])
    llama.close()
    return result


def test_a_model_in_several_files(tiny, profile, tmp_path):
    first, second = split(tiny, tmp_path)
    before = second.read_bytes()
    assert open_model(first).fingerprint == open_model(tiny).fingerprint
    embedding.embed(first, profile, first)
    assert same(read_profile(first, first), profile) and second.read_bytes() == before
    assert np.array_equal(logits(first), logits(tiny))
    with refused("give .*-00001-of-00002", bridge.ModelFileError):
        embedding.embed(second, profile, tmp_path / "x-00002-of-00002.gguf")
    with refused("must end in -00001-of-00002.gguf", bridge.ModelFileError):
        embedding.embed(first, profile, tmp_path / "whole.gguf")
    embedding.remove(first, tmp_path / "other-00001-of-00002.gguf")
    assert sorted(p.name[:5] for p in tmp_path.iterdir()) == ["m-000", "m-000", "other"]


@pytest.mark.parametrize("which", ["tiny", "built-in"])
def test_llama_cpp_loads_the_model_and_gives_the_same_logits(tiny, tmp_path, which):
    path = tiny if which == "tiny" else MODEL
    out = tmp_path / "out.gguf"
    embedding.embed(path, uniform_profile(path, "small"), out)
    assert np.array_equal(logits(out), logits(path))


# --- what can go wrong ---


def test_no_room_on_the_disk(tiny, profile, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(embedding.shutil, "disk_usage", lambda folder: usage(1 << 40, 0, 1 << 17))
    with refused(r"takes [\d.]+ KiB, and 128.0 KiB are free in "):
        embedding.embed(tiny, profile, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["data", "order"])
def test_a_copy_that_is_not_the_same_is_not_kept(tiny, profile, tmp_path, monkeypatch, damage):
    out = tmp_path / "out.gguf"
    old = Path(tiny).read_bytes()
    out.write_bytes(old)
    copy = embedding._copy

    def wrong(f, start, to, report):
        result = copy(f, start, to, report)
        if to is not None:
            to.seek(-9 if damage == "data" else 40, os.SEEK_END if damage == "data" else os.SEEK_SET)
            to.write(b"!")
        return result

    monkeypatch.setattr(embedding, "_copy", wrong)
    with pytest.raises(bridge.BridgeError) as e:
        embedding.embed(tiny, profile, out)
    assert is_sentence(e.value)
    assert out.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_a_damaged_profile_can_be_taken_out(tiny, profile, tmp_path):
    out = tmp_path / "out.gguf"
    embedding.embed(tiny, profile, out)
    raw = out.read_bytes()
    assert raw.count(profile.fingerprint.encode()) == 1
    out.write_bytes(raw.replace(profile.fingerprint.encode(), b"?" * 32))
    with refused("which model"):
        read_profile(out)
    embedding.remove(out, out)
    assert out.read_bytes() == Path(tiny).read_bytes()


def test_command_line(tiny, profile, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_profile("p.gguf", profile)

    def do(*arguments):
        assert run(convert.command, "mixkvq.convert", [str(a) for a in arguments]) == 0
        captured = capfd.readouterr()
        assert captured.err.count("\n") <= 1
        return captured

    assert "byte for byte" in do("embed", tiny, "p.gguf", "-o", "m.gguf").err
    do("extract", "m.gguf", "-o", "q.gguf")
    assert Path("q.gguf").read_bytes() == Path("p.gguf").read_bytes()
    assert do("to-json", "m.gguf").out == to_json(profile)
    do("to-json", "p.gguf", "-o", "p.json")
    do("embed", tiny, "p.json", "-o", "m2.gguf")
    assert Path("m2.gguf").read_bytes() == Path("m.gguf").read_bytes()
    do("remove", "m.gguf", "-o", "m3.gguf")
    assert Path("m3.gguf").read_bytes() == Path(tiny).read_bytes()
    do("remove", "m2.gguf", "-o", "m3.gguf", "--force")
    assert Path("m3.gguf").read_bytes() == Path(tiny).read_bytes()
    Path("old.gguf").write_bytes(GOLDEN.read_bytes())
    assert "old.gguf was of version 1" in do("upgrade", "old.gguf").err
    assert read_profile("old.gguf").version == 2 and read_profile("old.gguf").window == 64
    do("upgrade", GOLDEN, "-o", "new.gguf")
    assert Path("new.gguf").read_bytes() == Path("old.gguf").read_bytes()
    before = Path("m2.gguf").read_bytes()
    do("upgrade", "m2.gguf")
    assert Path("m2.gguf").read_bytes() == before


# --- nothing is lost ---

WRITERS = {
    "embed": (["embed", "m.gguf", "p.gguf"], "model"),
    "extract": (["extract", "e.gguf"], "profile"),
    "remove": (["remove", "e.gguf"], "model"),
    "to-json": (["to-json", "p.gguf"], "JSON"),
    "from-json": (["from-json", "p.json"], "profile"),
    "upgrade": (["upgrade", "p.gguf"], "profile"),
    "upgrade a model": (["upgrade", "e.gguf"], "model"),
}
EXISTING = ["m.gguf", "e.gguf", "p.gguf", "p.json", "result.json", "notes.txt", "picture.png", "damaged.gguf"]
EXISTING += ["link.gguf", "hard.gguf", "./sub/../p.gguf"]  # other names of e.gguf and p.gguf


@pytest.fixture
def files(tiny, profile, tmp_path, monkeypatch):
    """A model, one with a profile inside, a profile, JSON of it, and files that are none of these; by name, their contents."""
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("m.gguf").write_bytes(Path(tiny).read_bytes())
    embedding.embed(tiny, profile, "e.gguf")
    write_profile("p.gguf", profile)
    Path("p.json").write_text(to_json(profile))
    Path("result.json").write_text('{"bench": "evaluate"}')
    Path("notes.txt").write_text("mine")
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    Path("damaged.gguf").write_bytes(Path(tiny).read_bytes()[:500])
    Path("link.gguf").symlink_to("e.gguf")
    os.link("p.gguf", "hard.gguf")
    return {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}


def kind_of(name):
    name = {"link.gguf": "e.gguf", "hard.gguf": "p.gguf", "./sub/../p.gguf": "p.gguf"}.get(name, name)
    return name, {"m.gguf": "model", "e.gguf": "model", "p.gguf": "profile", "p.json": "JSON"}.get(name)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("out", EXISTING)
@pytest.mark.parametrize("which", WRITERS)
def test_only_a_file_of_the_same_kind_is_replaced_and_only_by_force(files, which, out, force, capfd):
    arguments, kind = WRITERS[which]
    real, there = kind_of(out)
    code = run(convert.command, "mixkvq.convert", [*arguments, "-o", out, *(["--force"] if force else [])])
    err = capfd.readouterr().err
    lost = {path.name for path, before in files.items() if path.read_bytes() != before}
    if force and kind == there and real not in arguments:
        assert code == 0 and lost <= {real, "link.gguf"}, err
        # the other name of a file keeps what it had
        assert Path("link.gguf").is_symlink() and Path("hard.gguf").read_bytes() in (files[Path("hard.gguf")], Path("p.gguf").read_bytes())
    else:
        assert code == 2 and not lost and len(err.splitlines()) == 1 and out in err, err
    assert {path for path in Path().iterdir() if path.is_file()} == set(files)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("which", WRITERS)
def test_a_file_that_appears_meanwhile_is_replaced_by_force_only(files, which, force, monkeypatch, capfd):
    """As where two processes write one file: what was asked before is not true any more."""
    real = os.chmod  # the last step before the name is taken

    def other_process(*arguments):
        real(*arguments)
        if not Path("new.gguf").exists():
            Path("new.gguf").write_text("theirs")

    monkeypatch.setattr(os, "chmod", other_process)
    arguments, _ = WRITERS[which]
    code = run(convert.command, "mixkvq.convert", [*arguments, "-o", "new.gguf", *(["--force"] if force else [])])
    err = capfd.readouterr().err
    assert (code, Path("new.gguf").read_bytes() == b"theirs") == ((0, False) if force else (1, True)), err
    assert force or err == "error: new.gguf: File exists.\n"
    assert {path.name for path in Path().iterdir() if path.is_file()} == {*map(str, files), "new.gguf"}


def test_a_device_and_a_folder_that_is_read_only(files, tmp_path, capfd):
    for arguments, _ in WRITERS.values():
        for out in ("/dev/null", "/proc/x.gguf", "sub", "none/x.gguf"):
            if arguments[0] == "to-json" and out == "/dev/null":
                continue  # text can be written there
            assert run(convert.command, "mixkvq.convert", [*arguments, "-o", out, "--force"]) == 2
            err = capfd.readouterr().err
            assert f"{out} cannot be written" in err and len(err.splitlines()) == 1, err
    assert Path("/dev/null").is_char_device()
    assert run(convert.command, "mixkvq.convert", ["to-json", "p.gguf", "-o", "/dev/null"]) == 0


def test_functions_do_not_replace_a_file_of_another_kind_either(files, profile):
    for write in (lambda out: embedding.extract("e.gguf", out), lambda out: write_profile(out, profile)):
        for out in ("m.gguf", "e.gguf", "p.json", "notes.txt", "link.gguf"):
            with refused("not replaced by a profile", bridge.SettingsError):
                write(out)
    for out in ("p.gguf", "p.json", "picture.png"):
        with refused("not replaced by a model", bridge.SettingsError):
            embedding.embed("m.gguf", profile, out)
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing command"),
        (["bake"], "No such command 'bake'"),
        (["embed", "MODEL", "p.gguf"], "-o"),
        (["embed", "MODEL"], "PROFILE"),
        (["embed", "MODEL", "none.gguf", "-o", "x.gguf"], "none.gguf does not exist"),
        (["embed", "MODEL", "none.json", "-o", "x.gguf"], "none.json cannot be read: No such file"),
        (["embed", "none.gguf", "p.gguf", "-o", "x.gguf"], "none.gguf does not exist"),
        (["embed", "p.gguf", "p.gguf", "-o", "x.gguf"], "not a language model"),
        (["embed", "MODEL", "MODEL", "-o", "x.gguf"], "not a profile"),
        (["embed", "MODEL", "other.gguf", "-o", "x.gguf"], "another model"),
        (["embed", "MODEL", "p.gguf", "-o", "none/x.gguf"], "its folder does not exist"),
        (["embed", "MODEL", "p.gguf", "-o", "."], "it is a folder"),
        (["embed", "MODEL", "p.txt", "-o", "x.gguf"], "not a GGUF file"),
        (["extract", "MODEL", "-o", "x.gguf"], "not a profile .* with none embedded"),
        (["extract", "p.gguf", "-o", "x.gguf"], "is a profile already"),
        (["remove", "MODEL", "-o", "x.gguf"], "has no profile embedded"),
        (["remove", "p.gguf", "-o", "x.gguf"], "has no profile embedded"),
        (["remove", ".", "-o", "x.gguf"], "is a directory"),
        (["to-json", "MODEL"], "not a profile"),
        (["to-json", "p.gguf", "-o", "none/x.json"], "its folder does not exist"),
        (["from-json", "p.gguf", "-o", "x.gguf"], "not UTF-8|not JSON"),
        (["from-json", "p.txt", "-o", "x.gguf"], "is not JSON: .* line 1, column 1"),
        (["from-json", "latin.json", "-o", "x.gguf"], "not UTF-8 text"),
        (["upgrade", "MODEL"], "not a profile"),
        (["upgrade", "p.gguf", "--fast"], "--fast"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tiny, profile, tmp_path, monkeypatch, capfd, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_profile("p.gguf", profile)
    write_profile("other.gguf", Profile("0" * 32, GOLDEN_LAYERS))
    Path("p.txt").write_text("tiers: many")
    Path("latin.json").write_bytes(b'{"a": "\xe9"}')
    there = sorted(p.name for p in tmp_path.iterdir())
    code = run(convert.command, "mixkvq.convert", [tiny if a == "MODEL" else a for a in arguments])
    err = capfd.readouterr().err
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert re.search(words, err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == there


def test_failures_of_the_machine_are_exit_code_1(tiny, profile, tmp_path, monkeypatch, capfd):
    def full(self):
        raise OSError(28, "No space left on device", "x.gguf")

    write_profile(tmp_path / "p.gguf", profile)
    monkeypatch.setattr(gguf.GGUFWriter, "write_kv_data_to_file", full)
    assert run(convert.command, "mixkvq.convert", ["upgrade", str(tmp_path / "p.gguf"), "-o", str(tmp_path / "x.gguf")]) == 1
    assert capfd.readouterr().err == "error: x.gguf: No space left on device.\n"
    assert [p.name for p in tmp_path.iterdir()] == ["p.gguf"]
