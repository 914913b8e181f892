"""One published build of llama.cpp in a process of its own: what it does with its F16 cache and with ours. Prints JSON.

    python bench/build_probe.py '{"folder": "...", "library": "...", "model": "...", "device": "MIXKVQ-CPU", "loads_backends": false, ...}'

No binding of one version fits all: parameters are structs that grow, of which only the members at the start are used. They are passed and returned
with room to spare, which is the same call.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VOID, INT, UINT, SIZE, TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_char_p
BATCH = 256
LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, TEXT, VOID)


@dataclass(frozen=True)
class Lengths:
    """Tokens: of a prompt, single ones after it, those after a shift or a state; of a prompt in each of two streams, and single ones there."""

    prompt: int = 1024
    tokens: int = 64
    more: int = 8
    stream: int = 384
    stream_tokens: int = 16

    @property
    def end(self) -> int:
        """Of the prompt and the single tokens."""
        return self.prompt + self.tokens


class Params(ctypes.Structure):
    """llama_model_params or llama_context_params of whatever version."""

    _fields_ = [("bytes", ctypes.c_char * 2048)]


class Batch(ctypes.Structure):
    """llama_batch: the same for as long as there are backends."""

    _fields_ = [
        ("n_tokens", INT),
        ("token", ctypes.POINTER(INT)),
        ("embd", VOID),
        ("pos", ctypes.POINTER(INT)),
        ("n_seq_id", ctypes.POINTER(INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class Program:
    """llama.cpp, loaded from a folder."""

    def __init__(self, folder: Path, loads_backends: bool) -> None:
        self.base = self._open(folder, "libggml-base.so.0", "libggml-base.so")
        self.ggml = self._open(folder, "libggml.so.0", "libggml.so", "libggml.[bv]*.so")
        self.llama = self._open(folder, "libllama.so.0", "libllama.so", "libllama.[bv]*.so")
        self.log: list[str] = []
        self._log = LOG(lambda level, text, user: self.log.append(text.decode("utf-8", "replace")))
        self.base.ggml_log_set(self._log, None)
        self.llama.llama_log_set(self._log, None)
        if loads_backends:
            self.ggml.ggml_backend_load_all_from_path(str(folder).encode())
        self.llama.llama_backend_init()

    @staticmethod
    def _open(folder: Path, *patterns: str) -> ctypes.CDLL:
        path = next(path for pattern in patterns for path in sorted(folder.glob(pattern)))
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """A function of llama.cpp or ggml. arguments: pairs of type and value."""
        library = next(library for library in (self.llama, self.ggml, self.base) if hasattr(library, name))
        function = getattr(library, name)
        function.restype, function.argtypes = result, [kind for kind, _ in arguments]
        return function(*(value for _, value in arguments))

    def model(self, path: str, device: int | None) -> int:
        """A model whose layers are all on the device; None: on the CPU, whatever devices there are."""
        params = self.call("llama_model_default_params", Params)
        at = ctypes.addressof(params)
        self.devices = (VOID * 2)(device, None)
        ctypes.cast(at, ctypes.POINTER(VOID))[0] = ctypes.addressof(self.devices)
        ctypes.cast(at + 16, ctypes.POINTER(INT))[0] = 99 if device else 0  # n_gpu_layers
        return self._made(self.call("llama_model_load_from_file", VOID, (TEXT, path.encode()), (Params, params)))

    def context(self, model: int, streams: int = 1) -> int:
        params = self.call("llama_context_default_params", Params)
        sizes = ctypes.cast(ctypes.addressof(params), ctypes.POINTER(UINT))
        sizes[0], sizes[1], sizes[2], sizes[3] = 2048, 512, 512, streams
        context = self._made(self.call("llama_init_from_model", VOID, (VOID, model), (Params, params)))
        self.call("llama_set_n_threads", None, (VOID, context), (INT, 1), (INT, 1))
        return context

    def _made(self, handle: int | None) -> int:
        if not handle:
            raise SystemExit("".join(self.log)[-600:])
        return handle


class Run:
    """A context with a cache on one device, and the logits that it gives."""

    def __init__(self, program: Program, model: int, streams: int = 1) -> None:
        self.program = program
        begin = len(program.log)
        self.context = program.context(model, streams)
        sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", "".join(program.log[begin:]))
        self.mib = sum(map(float, sizes))
        vocabulary = program.call("llama_model_get_vocab", VOID, (VOID, model))
        self.n_vocab = program.call("llama_vocab_n_tokens", INT, (VOID, vocabulary))
        self.memory = program.call("llama_get_memory", VOID, (VOID, self.context))

    def decode(self, cells: list[tuple[int, int, int]]) -> np.ndarray:
        """(sequence, position, token)...: the logits of the last token of each sequence, in order of sequences, float64."""
        batch = self.program.call("llama_batch_init", Batch, (INT, len(cells)), (INT, 0), (INT, 1))
        batch.n_tokens = len(cells)
        last = {sequence: i for i, (sequence, _, _) in enumerate(cells)}
        for i, (sequence, position, token) in enumerate(cells):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = last[sequence] == i
        status = self.program.call("llama_decode", INT, (VOID, self.context), (Batch, batch))
        if status:
            raise SystemExit(f"llama_decode returned {status}: {''.join(self.program.log)[-300:]}")
        rows = np.array([self.logits(last[sequence]) for sequence in sorted(last)], np.float64)
        self.program.call("llama_batch_free", None, (Batch, batch))
        return rows

    def logits(self, i: int) -> np.ndarray:
        """Those of a token of the last batch: the context's own."""
        at = self.program.call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), (VOID, self.context), (INT, i))
        return np.ctypeslib.as_array(at, (self.n_vocab,))

    def feed(self, tokens: list[int], position: int, step: int = 1) -> np.ndarray:
        """Tokens of sequence 0 from a position on, in batches of `step`."""
        cells = [(0, position + i, token) for i, token in enumerate(tokens)]
        return np.concatenate([self.decode(cells[i : i + step]) for i in range(0, len(cells), step)])

    def save(self) -> ctypes.Array:
        size = self.program.call("llama_state_get_size", SIZE, (VOID, self.context))
        state = (ctypes.c_uint8 * size)()
        if self.program.call("llama_state_get_data", SIZE, (VOID, self.context), (VOID, ctypes.addressof(state)), (SIZE, size)) == 0:
            raise SystemExit("the state was not saved")
        return state

    def load(self, state: ctypes.Array) -> None:
        if self.program.call("llama_state_set_data", SIZE, (VOID, self.context), (VOID, ctypes.addressof(state)), (SIZE, len(state))) == 0:
            raise SystemExit("the state was not loaded")

    def shift(self, n: int) -> None:
        """Forget n tokens near the start, as a context that is full does."""
        self.program.call("llama_memory_seq_rm", ctypes.c_bool, (VOID, self.memory), (INT, 0), (INT, n), (INT, 2 * n))
        self.program.call("llama_memory_seq_add", None, (VOID, self.memory), (INT, 0), (INT, 2 * n), (INT, -1), (INT, -n))

    def close(self) -> None:
        self.program.call("llama_free", None, (VOID, self.context))


def tokenize(program: Program, model: int) -> list[int]:
    text = "".join(f"Compute {3 * i + 7} + {5 * i + 11}. First add the ones: {i % 10}. " for i in range(200)).encode()
    tokens = (INT * 8192)()
    vocabulary = program.call("llama_model_get_vocab", VOID, (VOID, model))
    arguments = ((VOID, vocabulary), (TEXT, text), (INT, len(text)), (VOID, ctypes.addressof(tokens)), (INT, 8192))
    n = program.call("llama_tokenize", INT, *arguments, (ctypes.c_bool, True), (ctypes.c_bool, False))
    return list(tokens[:n])


def scenario(program: Program, model: int, tokens: list[int], n: Lengths) -> dict[str, Any]:
    """Everything that is compared, of one device."""
    run = Run(program, model)
    found: dict[str, Any] = {"mib": run.mib, "prompt": run.feed(tokens[: n.prompt], 0, BATCH)}
    found["tokens"] = run.feed(tokens[n.prompt : n.end], n.prompt)
    found["state"] = run.save()
    last = n.end + n.more
    found["after"] = run.feed(tokens[n.end : last], n.end)
    run.shift(n.prompt // 4)
    found["shift"] = run.feed(tokens[last : last + n.more], last - n.prompt // 4)
    run.close()
    run = Run(program, model, streams=2)
    found["streams_mib"] = run.mib
    first, second = tokens[: n.stream], tokens[n.stream : 2 * n.stream]
    rows = []
    for i in range(0, n.stream, 128):
        rows.append(run.decode([(s, i + j, text[i + j]) for s, text in enumerate((first, second)) for j in range(128)]))
    for i in range(n.stream_tokens):
        rows.append(run.decode([(0, n.stream + i, second[i]), (1, n.stream + i, first[i])]))
    found["streams"] = np.concatenate(rows)
    run.close()
    return found


def loaded(program: Program, model: int, state: ctypes.Array, tokens: list[int], n: Lengths) -> np.ndarray:
    """What a fresh context says after a state of another."""
    run = Run(program, model)
    run.load(state)
    rows = run.feed(tokens[n.end : n.end + n.more], n.end)
    run.close()
    return rows


def compare(truth: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Divergence of predictions: mean and largest, and how many have the same most likely token."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(truth), log_softmax(other)
    kld = (np.exp(p) * (p - q)).sum(-1)
    same = (truth.argmax(-1) == other.argmax(-1)).mean()
    return {"kld_mean": float(kld.mean()), "kld_max": float(kld.max()), "same_top": float(same), "predictions": len(kld)}


def main(job: dict[str, Any]) -> dict[str, Any]:
    program = Program(Path(job["folder"]), job["loads_backends"])
    exported = [letter for letter, function in job["since"].items() if hasattr(program.base, function)]
    found: dict[str, Any] = {"ggml": program.call("ggml_version", TEXT).decode(), "layout": max(exported, default="")}
    if job.get("emulated"):
        cpu = program.call("ggml_backend_dev_by_name", VOID, (TEXT, b"CPU"))
        devices = getattr(ctypes.CDLL(job["library"]), f"emulated_cuda_glue_{found['layout']}")
        devices.restype, devices.argtypes = VOID, [VOID]
        program.call("ggml_backend_register", None, (VOID, devices(cpu)))
    model = program.model(job["model"], None)
    tokens = tokenize(program, model)
    n = Lengths(**job.get("lengths", {}))
    stock = scenario(program, model, tokens, n) if job.get("runs", True) else {}
    if not program.call("ggml_backend_load", VOID, (TEXT, job["library"].encode())):
        return {**found, "refused": True}
    device = program.call("ggml_backend_dev_by_name", VOID, (TEXT, job["device"].encode()))
    if not device:
        raise SystemExit(f"the library offers no device {job['device']}")
    ours_model = program.model(job["model"], device)
    ours = scenario(program, ours_model, tokens, n)
    found["mib"], found["mib_f16"] = ours["mib"], stock["mib"]
    found["streams_mib"], found["streams_mib_f16"] = ours["streams_mib"], stock["streams_mib"]
    found["operations"] = {name: compare(stock[name], ours[name]) for name in ("prompt", "tokens", "shift", "streams")}
    found["operations"]["state out"] = compare(ours["after"], loaded(program, model, ours["state"], tokens, n))
    found["operations"]["state in"] = compare(stock["after"], loaded(program, ours_model, stock["state"], tokens, n))
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
