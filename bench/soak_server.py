"""A server under load: many clients at once, some of which give up, vanish, or send what is no request.

    python bench/soak_server.py --minutes 10                 # against the built-in model
    python bench/soak_server.py --minutes 0.1 --clients 16

Every answer is checked: a grammar makes the model write the client's own word, so that a piece of another chat's text shows; and the likeliest
answers to some prompts are those that the server gave at the beginning, when it had nothing else to do. At the end nothing may run, no stream may be
stuck, and memory, threads and open files must not have grown since a third of the time.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import Any

import click
import httpx
import psutil

from mixkvq.cli.options import run, tool
from mixkvq.core.model_file import built_in_model

PROBLEMS = [f"Compute {a} + {b}." for a, b in ((48291, 730), (12, 30), (777, 888), (91, 1009))]
AGREE = 0.9  # share of likeliest answers that must be as at the beginning; a batch of others rounds differently
GROWTH = 1.3  # of memory


class Server:
    """`mixkvq serve` in a process of its own."""

    def __init__(self, model: str, *options: str) -> None:
        command = [sys.executable, "-m", "mixkvq", "serve", model, "--port", "0", "--no-log", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"http://\S+", line):
                self.address = found[0]
                break
        else:
            raise SystemExit("".join(self.said))
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.about = psutil.Process(self.process.pid)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said += self.process.stderr

    def takes(self) -> dict[str, int]:
        """What the process takes: memory in bytes, threads, open files."""
        return {"memory": self.about.memory_info().rss, "threads": self.about.num_threads(), "files": self.about.num_fds()}

    def stop(self) -> int:
        """End it; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self._listener.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status


class Client:
    """One of many: asks until the time is over."""

    def __init__(self, number: int, seed: int, http: httpx.AsyncClient, expected: dict[str, str], until: float) -> None:
        self.number, self.http, self.expected, self.until = number, http, expected, until
        self.rng = random.Random(seed * 1000 + number)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    async def run(self) -> None:
        """Until the time is over, and the last request has its answer."""
        ways = [self.own_word, self.own_word_streamed, self.likeliest, self.gives_up, self.vanishes, self.mistake, self.n_answers]
        while time.monotonic() < self.until:
            way = self.rng.choice(ways)
            try:
                await way()
                self.counts[way.__name__] += 1
            except httpx.HTTPError as e:
                self.faults.append(f"{way.__name__}: {type(e).__name__} {e}")

    def _word(self) -> str:
        return f"client {self.number} says {self.rng.randrange(1 << 40)}"

    def _asks(self, word: str, **more: Any) -> dict[str, Any]:
        chat = [{"role": "user", "content": f"{self.rng.choice(PROBLEMS)} {'Again. ' * self.rng.randrange(40)}"}]
        return {"messages": chat, "grammar": f"root ::= {json.dumps(word)}", "max_tokens": 64, **more}

    def _expect(self, what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            self.faults.append(f"{what}: {found!r} instead of {wanted!r}")

    async def own_word(self) -> None:
        """The grammar allows one answer."""
        word = self._word()
        answer = await self.http.post("/v1/chat/completions", json=self._asks(word))
        if self._busy(answer):
            return
        self._expect("answer", answer.json()["choices"][0]["message"]["content"], word)

    def _busy(self, answer: httpx.Response) -> bool:
        if answer.status_code == 503:
            self.counts["503"] += 1
            return True
        self._expect("status", answer.status_code, 200)
        return answer.status_code != 200

    async def own_word_streamed(self) -> None:
        """The same, as it comes."""
        word, text = self._word(), ""
        async with self.http.stream("POST", "/v1/chat/completions", json=self._asks(word, stream=True)) as answer:
            if answer.status_code == 503:
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        self._expect("stream", text, word)

    async def n_answers(self) -> None:
        """Several answers to one prompt."""
        word = self._word()
        answer = await self.http.post("/v1/chat/completions", json=self._asks(word, n=3))
        if not self._busy(answer):
            self._expect("answers", [c["message"]["content"] for c in answer.json()["choices"]], [word] * 3)

    async def likeliest(self) -> None:
        """What the model says without chance."""
        problem = self.rng.choice(PROBLEMS)
        answer = await self.http.post("/v1/chat/completions", json=greedy(problem))
        if answer.status_code == 200:
            same = answer.json()["choices"][0]["message"]["content"] == self.expected[problem]
            self.counts["as alone" if same else "not as alone"] += 1

    async def gives_up(self) -> None:
        """A client that has no patience."""
        body = {"prompt": "word " * self.rng.randrange(1, 1500), "n_predict": 2000, "ignore_eos": True}
        try:
            await self.http.post("/completion", json=body, timeout=self.rng.uniform(0.01, 0.5))
        except httpx.TimeoutException:
            return

    async def vanishes(self) -> None:
        """A client that goes away in the middle of a stream."""
        body = {**self._asks(""), "grammar": None, "stream": True, "max_tokens": 500, "ignore_eos": True}
        async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = 0
            async for _ in answer.aiter_lines():
                lines += 1
                if lines > self.rng.randrange(20):
                    return

    async def mistake(self) -> None:
        """What is no request, or one that cannot be answered."""
        way = self.rng.randrange(5)
        if way == 0:
            content: Any = self.rng.choice([b"", b"{", b"[]", b"\xff\xfe", b'{"messages": 1}', b'{"messages": []}', b"[" * 5000])
        elif way == 1:
            content = json.dumps({"messages": [{"role": "user", "content": "x"}], "grammar": "root ::= ("}).encode()
        elif way == 2:
            content = json.dumps({"messages": [{"role": "user", "content": "word " * 5000}]}).encode()
        elif way == 3:
            content = json.dumps({"messages": [{"role": "user", "content": "x"}], "temperature": "hot", "n": -1}).encode()
        else:
            content = json.dumps({"messages": [{"role": "nobody", "content": {"a": 1}}]}).encode()
        answer = await self.http.post("/v1/chat/completions", content=content)
        self._expect("mistake", (answer.status_code, "error" in answer.json()), (400, True))


def greedy(problem: str) -> dict[str, Any]:
    """A request whose answer hangs on nothing but the prompt."""
    return {"messages": [{"role": "user", "content": problem}], "temperature": 0, "max_tokens": 24}


async def soak(server: Server, seconds: float, n_clients: int, seed: int) -> list[str]:
    """What was wrong, in sentences."""
    limits = httpx.Limits(max_connections=n_clients * 2)
    async with httpx.AsyncClient(base_url=server.address, timeout=300, limits=limits) as http:
        expected = {}
        for problem in PROBLEMS:
            answer = await http.post("/v1/chat/completions", json=greedy(problem))
            expected[problem] = answer.json()["choices"][0]["message"]["content"]
        clients = [Client(i, seed, http, expected, time.monotonic() + seconds) for i in range(n_clients)]
        tasks = [asyncio.create_task(client.run()) for client in clients]
        await asyncio.sleep(seconds / 3)
        before = server.takes()
        await asyncio.gather(*tasks)
        wrong = [fault for client in clients for fault in client.faults]
        counts = sum((client.counts for client in clients), Counter())
        until = time.monotonic() + 30
        while (busy := [slot for slot in (await http.get("/slots")).json() if slot["is_processing"]]) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        wrong += [f"stream {slot['id']} is stuck" for slot in busy]
        answer = await http.post("/v1/chat/completions", json=greedy(PROBLEMS[0]))
        if answer.status_code != 200:
            wrong.append(f"the server does not answer: {answer.text}")
    after = server.takes()
    agree = counts["as alone"] / max(1, counts["as alone"] + counts["not as alone"])
    click.echo(f"{dict(sorted(counts.items()))}; {agree:.1%} of likeliest answers as alone; before {before}, after {after}")
    if agree < AGREE:
        wrong.append(f"only {agree:.1%} of the likeliest answers are as alone")
    if after["memory"] > GROWTH * before["memory"] or after["threads"] > before["threads"] + 4 or after["files"] > before["files"] + n_clients:
        wrong.append(f"what the server takes has grown from {before} to {after}")
    return wrong


@tool()
@click.argument("model", default=str(built_in_model()))
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=10.0, show_default=True, help="How long.")
@click.option("--clients", type=click.IntRange(1, 1000), default=64, show_default=True, help="How many at once.")
@click.option("--seed", default=1, show_default=True, help="Of what clients do.")
@click.option("--threads", default=1, show_default=True, help="Threads of the server.")
def main(model: str, minutes: float, clients: int, seed: int, threads: int) -> int:
    """Let clients ask MODEL's server, and see that it answers right and takes no more in the end."""
    server = Server(model, "-np", "4", "-c", "8192", "-t", str(threads))
    try:
        wrong = asyncio.run(soak(server, minutes * 60, clients, seed))
    finally:
        status = server.stop()
    if status != 0:
        wrong.append(f"the server ended with {status}: {''.join(server.said[1:])[-2000:]}")
    for fault in wrong[:20]:
        click.echo(f"wrong: {fault}")
    click.echo(f"{len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(main, "bench/soak_server.py"))
