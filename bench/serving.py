"""What serving several chats at once costs and gains: the engine's figures, without HTTP.

    python bench/serving.py models/cot-tiny-34m-q8_0.gguf --depth 2048

Tokens per second of 1, 4 and 8 answers that run at once, behind prompts of `--depth` tokens; time to the first token of a short prompt while a long
one is read; and what changes in an answer when others run beside it. Times are the processor's (of one thread, so other programs do not count)
unless --wall says that the machine does nothing else.
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from bridge.engine import Done, Engine, Failed, Piece, Request, Sampling, Streams
from mixkvq.cli.command import command_line
from mixkvq.cli.options import run, tool
from mixkvq.study.record import check_result, describe_run, save_json

GREEDY = Sampling(temperature=0)


def finish(events: queue.SimpleQueue[Any], n: int) -> list[Done]:
    """The ends of n requests."""
    found: list[Done] = []
    while len(found) < n:
        event = events.get()
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Done):
            found.append(event)
    return found


def text(llama: Streams, seed: int, n: int) -> list[int]:
    """Tokens at random: how long they take does not hang on what they say."""
    return np.random.default_rng(seed).integers(3, llama.n_vocab() - 200, n).tolist()


def throughput(engine: Engine, n: int, depth: int, tokens: int, clock: Callable[[], float]) -> float:
    """Tokens per second of n answers at once. Prompts are read before the time begins."""
    prompts = [text(engine.llama, seed, depth) for seed in range(n)]
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for prompt in prompts:
        engine.submit(Request(prompt, GREEDY, 1), events.put)
    finish(events, n)
    began = clock()
    for prompt in prompts:
        engine.submit(Request(prompt, GREEDY, tokens, ignore_end=True), events.put)
    done = finish(events, n)
    assert all(d.cached == depth - 1 for d in done)
    return sum(d.generated for d in done) / (clock() - began)


def first_token(engine: Engine, long: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds to the first token of a prompt of 64 tokens: alone, while one of `long` tokens is read, and behind it, if it had to wait for that."""

    def seconds(n: int, seed: int) -> float:
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        began = clock()
        engine.submit(Request(text(engine.llama, seed, n), GREEDY, 1, ignore_end=True, reuse=False), events.put)
        finish(events, 1)
        return clock() - began

    seconds(64, 100)
    alone = seconds(64, 101)
    behind = seconds(long, 102) + alone
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    job = engine.submit(Request(text(engine.llama, 103, long), GREEDY, 1, progress=True, reuse=False), events.put)
    events.get()
    beside = seconds(64, 104)
    job.cancel()
    finish(events, 1)
    return {"alone": alone, "beside": beside, "behind": behind}


def chat(llama: Streams, n: int, seed: int, longest: int) -> list[int]:
    """A problem, behind n others in the same message, in at most so many tokens."""
    rng = np.random.default_rng(seed)
    while True:
        problems = " ".join(f"Compute {a} * {b}." for a, b in rng.integers(10, 99999, (n + 1, 2)))
        tokens: list[int] = llama.tokenize(f"<|im_start|>user\n{problems}<|im_end|>\n<|im_start|>assistant\n".encode(), special=True)
        if len(tokens) <= longest:
            return tokens
        n = n * longest // len(tokens) - 1


def differences(engine: Engine, read: list[list[int]], tokens: int) -> dict[str, Any]:
    """Answers to prompts alone, and to all of them at once: how many are the same, and how far logprobs differ before answers part, at most."""

    def asked(tokens_: list[int]) -> Request:
        return Request(tokens_, GREEDY, tokens, logprobs=0, reuse=False, ignore_end=True)

    alone = [engine.answer(asked(r)) for r in read]
    chosen: list[list[Any]] = [[] for _ in read]
    left = len(read)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for i, r in enumerate(read):
        engine.submit(asked(r), lambda event, i=i: events.put((i, event)))
    while left:
        i, event = events.get()
        if isinstance(event, Piece):
            chosen[i] += event.tokens
        left -= isinstance(event, (Done, Failed))
    same, largest, compared = 0, 0.0, 0
    for one, beside in zip(alone, chosen):
        same += [c.token for c in one.tokens] == [c.token for c in beside]
        for a, b in zip(one.tokens, beside):
            if a.token != b.token:
                break
            largest, compared = max(largest, abs(a.logprob - b.logprob)), compared + 1
    return {"prompt": len(read[0]), "answers": len(read), "same": same, "tokens_compared": compared, "largest_logprob_difference": largest}


@tool()
@click.argument("model")
@click.option("--depth", default=2048, show_default=True, help="Tokens of the prompts.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of the answers.")
@click.option("--kv", default="f16,balanced", show_default=True, help="Caches, with commas; f16 is llama.cpp's own.")
@click.option("--streams", default="1,4,8", show_default=True, help="How many at once, with commas.")
@click.option("--rounds", default=3, show_default=True, help="How often; the best counts.")
@click.option("--threads", default=1, show_default=True, help="Threads.")
@click.option("--wall", is_flag=True, help="Measure real time.")
@click.option("--out", help="Write the result to this file, JSON.")
@click.option("--force", is_flag=True, help="Replace it.")
def main(model: str, depth: int, tokens: int, kv: str, streams: str, rounds: int, threads: int, wall: bool, out: str | None, force: bool) -> int:
    """Measure MODEL."""
    clock = time.perf_counter if wall else time.process_time
    counts = [int(n) for n in streams.split(",")]
    settings = {"depth": depth, "tokens": tokens, "threads": threads, "rounds": rounds, "clock": "wall" if wall else "processor"}
    if out is not None:
        check_result(out, "serving", force=force, inputs=[model])
    result = {**describe_run("serving", Path(model), settings, hashed=out is not None, words=command_line()), "caches": {}}
    for name in kv.split(","):
        cache: dict[str, Any] = {"stock": name} if name in ("f16", "q8_0", "q4_0") else {"kv": name}
        threads_ = {"n_threads": threads, "n_threads_batch": threads}
        llama = Streams(model, n_seq=max(counts), n_ctx=depth + tokens + 256, n_batch=512, verbose=False, **threads_, **cache)
        with Engine(llama) as engine:
            found = {str(n): max(throughput(engine, n, depth, tokens, clock) for _ in range(rounds)) for n in counts}
            first = [first_token(engine, depth, clock) for _ in range(rounds)]
            entry: dict[str, Any] = {"tokens_per_second": found, "first_token_s": {key: min(f[key] for f in first) for key in first[0]}}
            lengths = {"short": 0, "long": depth // 16}
            beside = {
                length: differences(engine, [chat(llama, n, seed, depth) for seed in range(max(counts))], tokens) for length, n in lengths.items()
            }
            entry["beside_others"] = beside
        result["caches"][name] = entry
        click.echo(f"{name}: {json.dumps(entry)}")
    save_json(out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main, "bench/serving.py"))
