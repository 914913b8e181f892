"""Conversations that take turns on one slot of a stock llama-server: do they go on as they would alone?

    LLAMA_CPP_BIN=... .venv/bin/python bench/turns.py models/cot-tiny-34m-q8_0.gguf --out build/bench/turns.json

Each conversation begins with a long text, the two have no first token in common, and every turn adds a question and the greedy answer to it. Alone,
it has the server to itself from beginning to end. In turns, the server has one slot, and what a conversation held comes back either from its prompt
cache in RAM, which llama-server uses by itself, or from a file by /slots. Tokens are given as numbers, so that nothing is tokenised twice.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from _common import (
    CACHE_HELP,
    COUNT,
    THREADS,
    Model,
    available_cores,
    check_result,
    describe,
    force_option,
    run,
    save_json,
    split_names,
    tool,
    wide_console,
)
from rich.table import Table

from bridge.library import library_path
from mixkvq.core.settings import STOCK_TYPES

TEXT = Path(__file__).parents[1] / "python" / "mixkvq" / "study" / "calibration.txt"
QUESTION = "<|im_end|>\n<|im_start|>user\nCompute {} * {}.<|im_end|>\n<|im_start|>assistant\n"
WAYS = ("ram", "file")


class Server:
    """A running llama-server."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise click.ClickException(f"llama-server: {path} is answered with {error.code}: {error.read().decode(errors='replace')[:300]}") from None

    def tokens(self, text: str) -> list[int]:
        return self.ask("/tokenize", {"content": text, "parse_special": True})["tokens"]

    def answer(self, prompt: list[int], n: int) -> tuple[list[int], int]:
        """The tokens of a greedy answer, and how many of the prompt were read for it."""
        options = {"n_predict": n, "temperature": 0.0, "return_tokens": True, "cache_prompt": True, "ignore_eos": True, "id_slot": 0}
        reply = self.ask("/completion", {"prompt": prompt, **options})
        return reply["tokens"], reply["timings"]["prompt_n"]


@contextmanager
def serving(program: Path, model: Path, cache: str, device: str, n_ctx: int, threads: int, folder: Path, ram: int) -> Iterator[Server]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [program, "-m", model, "-c", n_ctx, "-np", 1, "-t", threads, "-fa", "on", "--host", "127.0.0.1", "--port", port]
    command += ["--slot-save-path", folder, "--cache-ram", ram]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MIXKVQ_", "GGML_BACKEND_PATH"))}
    if cache in STOCK_TYPES:
        command += ["-ctk", cache, "-ctv", cache, *(["-ngl", 99] if device != "CPU" else ["-dev", "none"])]
    else:
        environment |= {"GGML_BACKEND_PATH": str(library_path()), "MIXKVQ_PROFILE" if Path(cache).is_file() else "MIXKVQ_PRESET": cache}
        command += ["-dev", f"MIXKVQ-{device}", "-ngl", 99]
    log = folder / "llama-server.log"
    with open(log, "w") as out:
        process = subprocess.Popen([str(word) for word in command], env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        server = Server(port)
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                if process.poll() is not None:
                    raise click.ClickException(f"llama-server ended with status {process.returncode}: {log.read_text()[-600:]}") from None
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait()


class Conversation:
    """What one holds, and what was answered, turn by turn."""

    def __init__(self, server: Server, number: int, n_text: int) -> None:
        text = TEXT.read_text(encoding="utf-8")
        begin = number * len(text) // 2
        self.number, self.answers, self.read = number, [], []
        # With a beginning in common, the rest would be read in other batches than alone, which changes the last bits of any cache.
        self.held = server.tokens(text[begin:] + text[:begin])[:n_text]

    def turn(self, server: Server, n: int) -> None:
        turn = len(self.answers)
        prompt = self.held + server.tokens(QUESTION.format(4829 + 37 * turn, 61 + 11 * turn + self.number))
        answer, n_read = server.answer(prompt, n)
        self.answers.append(answer)
        self.read.append(n_read)
        self.held = prompt + answer


def alike(answers: list[list[int]], others: list[list[int]]) -> tuple[int, int]:
    """How many tokens are the same from the beginning on, and of how many."""
    pairs = [pair for a, b in zip(answers, others, strict=True) for pair in zip(a, b, strict=True)]
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)), len(pairs)


@tool()
@click.argument("model", type=Model())
@click.option("--kv", default="balanced,f16,q8_0", show_default=True, help=CACHE_HELP)
@click.option("--device", default="CPU", show_default=True, help="CPU, or a GPU by llama.cpp's name, such as CUDA0.")
@click.option("--turns", default=10, show_default=True, type=COUNT, help="Turns of each conversation.")
@click.option("--text", "n_text", default=1500, show_default=True, type=COUNT, help="Tokens with which a conversation begins.")
@click.option("--tokens", default=40, show_default=True, type=COUNT, help="Tokens of an answer.")
@click.option("--bin", "folder", envvar="LLAMA_CPP_BIN", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--threads", type=THREADS, default=available_cores, show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@force_option()
def main(model, kv, device, turns, n_text, tokens, folder, threads, out, force):
    if out is not None:
        check_result(out, "turns", force=force, inputs=(model,))
    program = folder / "llama-server"
    if not program.is_file():
        raise click.ClickException(f"There is no llama-server in {folder}; --bin or LLAMA_CPP_BIN names the folder with llama.cpp's programs.")
    n_ctx = -(-(n_text + turns * (tokens + 40)) // 256) * 256
    settings = {"device": device, "turns": turns, "text_tokens": n_text, "answer_tokens": tokens, "n_ctx": n_ctx, "threads": threads}
    result = describe("turns", Path(model), settings, out) | {"turns": []}
    table = Table("cache", "kept in", "conversation", "the same tokens", "tokens read a turn", title=f"Turns on one slot, {device}")
    for cache in split_names(kv):
        with tempfile.TemporaryDirectory(prefix="mixkvq-") as temporary:
            given = (program, Path(model), cache, device, n_ctx, threads, Path(temporary))
            measure(result, table, cache, turns, n_text, tokens, given)
        save_json(out, result)
    wide_console().print(table)


def measure(result: dict, table: Table, cache: str, turns: int, n_text: int, tokens: int, given: tuple) -> None:
    alone = []
    for number in range(2):
        with serving(*given, ram=0) as server:
            alone.append(Conversation(server, number, n_text))
            for _ in range(turns):
                alone[-1].turn(server, tokens)
    for way in WAYS:
        with serving(*given, ram=8192 if way == "ram" else 0) as server:
            both = [Conversation(server, number, n_text) for number in range(2)]
            if both[0].held[0] == both[1].held[0]:
                raise click.ClickException("The two conversations begin with the same token.")
            for turn in range(turns):
                for one in both:
                    if way == "file" and turn > 0:
                        server.ask("/slots/0?action=restore", {"filename": f"{one.number}.bin"})
                    one.turn(server, tokens)
                    if way == "file":
                        server.ask("/slots/0?action=save", {"filename": f"{one.number}.bin"})
        for one in both:
            same, of = alike(one.answers, alone[one.number].answers)
            found = {"cache": cache, "way": way, "conversation": one.number, "same": same, "of": of}
            result["turns"].append({**found, "read": one.read, "alone_read": alone[one.number].read})
            table.add_row(cache, way, "AB"[one.number], f"{same} of {of}", str(round(sum(one.read[1:]) / max(1, turns - 1))))


if __name__ == "__main__":
    sys.exit(run(main, "bench/turns.py"))
