"""bridge/_compat.py: each name that llama-cpp-python keeps to itself means what we take it for, and none is used elsewhere."""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
import logging
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llama_cpp import _internals

import bridge
from bridge import ContextError, _compat
from bridge._compat import ARGUMENTS, C
from mixkvq.core.model_file import built_in_model

BRIDGE = Path(bridge.__file__).resolve().parent
MODEL = str(built_in_model())
OPTIONS = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "device": "cpu"}


@pytest.fixture(scope="module")
def llama():
    llama = bridge.Llama(MODEL, **OPTIONS)
    yield llama
    llama.close()


def test_no_other_module_uses_what_llama_cpp_python_keeps_to_itself(llama):
    """Attributes of its class and its internals that begin with an underscore, and those of its objects behind them."""
    own = set(vars(llama_cpp.Llama(MODEL, vocab_only=True, verbose=False))) | set(dir(llama_cpp.Llama))
    private = {name for name in own if name.startswith("_") and not name.startswith("__")}
    private |= {"_logger", "_internals", "_lib", "kv_cache_seq_rm", "kv_cache_clear", "set_batch", "get_logits", "get_logits_ith"}
    assert {"_ctx", "_model", "_batch", "_stack", "_logits_all", "_n_ctx", "_chat_handlers"} <= private
    for path in sorted(BRIDGE.glob("*.py")):
        if path.name == "_compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else None
            # DryRun has a _model of its own: a model without weights
            assert name not in private - ({"_model"} if path.name == "dry_run.py" else set()), f"{path.name}:{node.lineno}: {name}"


def names_of_llama_h():
    """What the package takes from llama.h, by module."""
    found = set()
    for path in sorted(BRIDGE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "C":
                found.add(node.attr)
    return sorted(found)


@pytest.mark.parametrize("name", names_of_llama_h())
def test_every_name_of_llama_h_is_there(name):
    """In every llama-cpp-python that is served. What only some have, `_compat` alone asks for."""
    found = getattr(C, name, None)
    if name == "LLAMA_LOAD_MODE_NONE":
        assert (found is None) == hasattr(C.llama_model_default_params(), "use_mmap")
    elif name.isupper():
        assert isinstance(found, int)
    else:
        assert found is not None and (name == "_lib" or callable(found))


def test_a_model_without_weights():
    """Nothing of it is read or mapped: it is for dry runs."""
    params = C.llama_model_default_params()
    _compat.leave_weights_out(params)
    assert params.no_alloc
    assert not params.use_mmap if hasattr(params, "use_mmap") else params.load_mode == C.LLAMA_LOAD_MODE_NONE
    model = C.llama_model_load_from_file(MODEL.encode(), params)
    assert model and C.llama_model_n_embd(model) > 0
    C.llama_model_free(model)


def test_a_model_that_is_not_loaded_leaves_nothing_to_complain_of(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF")
    code = f"import llama_cpp, bridge._compat\ntry:\n    llama_cpp.Llama({str(path)!r}, verbose=False)\nexcept ValueError:\n    pass"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exception ignored" not in done.stderr


def test_the_keywords_are_those_of_the_class():
    assert ARGUMENTS[:2] == ("n_gpu_layers", "split_mode") and {"n_ctx", "logits_all", "verbose"} <= set(ARGUMENTS) and "kwargs" not in ARGUMENTS
    assert list(inspect.signature(llama_cpp.Llama.__init__).parameters)[-1] == "kwargs"


def test_the_library_is_the_one_that_llama_cpp_uses():
    library = next(_compat.libraries())
    address = ctypes.cast(library.llama_backend_init, ctypes.c_void_p).value
    assert address == ctypes.cast(C._lib.llama_backend_init, ctypes.c_void_p).value
    assert library.ggml_version  # a look-up goes on in the libraries that it depends on
    assert _compat.version() == llama_cpp.__version__ and (_compat.folder() / "llama_cpp.py").is_file()


def test_the_log_goes_where_verbose_says(capfd):
    logger = logging.getLogger("llama-cpp-python")
    before = logger.level
    try:
        for level, verbose, printed in ((logging.DEBUG, True, "a line\n"), (logging.ERROR, False, "")):
            logger.setLevel(level)
            assert _compat.is_verbose() is verbose
            _compat.print_log(1, "a line\n")  # of information, in ggml's old numbers
            assert capfd.readouterr().err == printed
        logger.setLevel(logging.NOTSET)
        assert not _compat.is_verbose()
    finally:
        logger.setLevel(before)


def test_its_errors_are_told_apart(tmp_path):
    path = tmp_path / "no.gguf"
    with pytest.raises(ValueError) as missing:
        llama_cpp.Llama(str(path), verbose=False)
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError) as broken:
        llama_cpp.Llama(str(path), verbose=False)
    with pytest.raises(ValueError) as context:
        llama_cpp.Llama(MODEL, n_ctx=256, type_k=C.GGML_TYPE_Q8_0, type_v=C.GGML_TYPE_Q8_0, flash_attn=False, verbose=False)
    assert _compat.loading_failed(missing.value) and _compat.loading_failed(broken.value) and not _compat.loading_failed(context.value)
    assert _compat.context_failed(context.value) and not _compat.context_failed(missing.value)
    llama = llama_cpp.Llama(MODEL, n_ctx=256, verbose=False)
    with pytest.raises(RuntimeError) as decode:
        llama.eval(list(range(300, 600)))
    assert _compat.decoding_failed(decode.value) and not _compat.context_failed(decode.value)


def test_parameters_pass_through_before_they_are_used():
    seen = []

    class Spy(bridge.Llama):
        def _adjust_model_params(self, params):
            seen.append((type(params).__name__, params.vocab_only))
            super()._adjust_model_params(params)

        def _adjust_context_params(self, params):
            seen.append((type(params).__name__, params.n_ctx))
            params.n_seq_max = 2

    llama = Spy(MODEL, **OPTIONS)
    assert [name for name, _ in seen] == ["llama_model_params", "llama_context_params"]
    assert C.llama_n_seq_max(llama._context) == 2 and llama.context_params.n_seq_max == 2 and llama.model_params.n_gpu_layers
    llama.close()


def test_the_handles(llama):
    assert C.llama_n_ctx(llama._context) == llama.n_ctx() == 256 and llama._has_memory
    assert C.llama_model_n_embd(llama._model_handle) == llama.n_embd()
    assert C.llama_vocab_n_tokens(llama._vocabulary) == llama.n_vocab()
    for owner, names in ((_internals.LlamaContext, ("decode", "get_logits", "kv_cache_seq_rm", "kv_cache_seq_cp", "kv_cache_clear")),):
        assert all(callable(getattr(owner, name)) for name in names)


def test_cells_and_logits(llama):
    """What is evaluated, where, and which tokens have logits."""
    llama.reset()
    tokens = [5, 6, 7, 8]
    llama._decode_cells([(0, i, token) for i, token in enumerate(tokens)], range(len(tokens) - 2, len(tokens)))
    assert llama._batch_size() == 4
    rows = llama._outputs(2).copy()
    assert rows.shape == (2, llama.n_vocab()) and np.isfinite(rows).all()
    last = np.ctypeslib.as_array(llama._output(-1), shape=(llama.n_vocab(),))
    assert np.array_equal(last, rows[1]) and llama._output(2) and not llama._output(0)
    memory = C.llama_get_memory(llama._context)
    assert C.llama_memory_seq_pos_max(memory, 0) == 3
    llama._remove_cells(0, 2, -1)
    assert C.llama_memory_seq_pos_max(memory, 0) == 1
    llama._decode_cells([(0, 2, 7), (0, 3, 8)], [1])  # without the other tokens it would be another prediction
    assert np.allclose(llama._outputs(1)[0], rows[1], atol=1e-3)
    llama._clear_cells()
    assert C.llama_memory_seq_pos_max(memory, 0) == -1


def test_the_flag_of_all_logits(llama):
    assert llama._keeps_all_logits is False
    kept = bridge.Llama(MODEL, logits_all=True, **OPTIONS)
    assert kept._keeps_all_logits is True
    kept.eval([5, 6, 7])
    assert kept.scores[:3].any(axis=1).all()
    kept.close()


def test_the_handler_of_a_chat_format(llama):
    handler = llama._chat_handler_of("chatml")
    assert callable(handler) and handler is llama_cpp.llama_chat_format.get_chat_completion_handler("chatml")
    assert llama._chat_handler_of("chat_template.default") is llama._chat_handlers["chat_template.default"]


def test_a_context_that_is_lent_and_one_that_is_freed():
    llama = bridge.Llama(MODEL, **OPTIONS)
    context, model, batch = llama._ctx, llama._model, llama._batch
    with llama._lent_to_codec(), pytest.raises(ContextError, match="evaluating"):
        llama._ctx.decode(batch)
    assert llama._ctx is context
    llama._free()
    uses = [
        lambda: llama._context,
        lambda: C.llama_n_ctx(context.ctx),
        lambda: C.llama_vocab_n_tokens(model.vocab),
        lambda: batch.batch.token,
        lambda: llama.tokenizer_.encode("x"),
    ]
    for use in uses:
        with pytest.raises((ContextError, ctypes.ArgumentError), match="The model is closed"):
            use()
    llama._free()  # again


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("bridge._llama", "C quiet_log _backend"),
        ("bridge.answer", "Sampling stream_answer"),
        ("bridge.chat", "Chat"),
        ("bridge.model_file", "open_model"),
        ("bridge.settings", "Kv least_bits"),
        ("mixkvq.profile", "read_profile uniform_profile write_profile"),
        ("mixkvq.reference", "KeyFormat ValueFormat pack_keys pack_values unpack_keys unpack_values"),
    ],
)
def test_names_of_before_the_layers_stay(module, names):
    there = importlib.import_module(module)
    assert not [name for name in names.split() if not hasattr(there, name)]
