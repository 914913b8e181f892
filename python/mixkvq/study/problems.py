"""Problems that a model answers by itself, greedily, with every cache: how many are right, and which ones a cache loses or wins.

Three sources:
    built in       mixkvq.tasks, which the built-in model was trained on
    a file         JSON lines with "question" and "answer", the answer ending in "#### number" (the format of GSM8K)
    a module       problems(rng, n) -> iterable of {"prompt": ..., "answer": ..., anything else that JSON can hold}
                   check(problem, text) -> bool

Several are answered at once, as sequences of one context. None of them sees anything of the others. What all prompts begin with is read once.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from random import Random
from statistics import NormalDist
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from ..core.errors import BridgeError, ContextTooLargeError, SettingsError
from ..core.memory import SEQUENCES
from ..core.reference import PAGE_CELLS
from . import tasks
from .caches import open_cache, sizes
from .compare import CELLS, Passage
from .texts import read_utf8
from .user_code import load_module, said

if TYPE_CHECKING:
    from bridge import Llama
    from bridge.sequences import Sequences

BATCH = 512
AT_ONCE, AT_ONCE_GPU = 8, 32  # problems, where nobody says how many
MAX_TOKENS = 1024  # of an answer whose length nobody knows
INSTRUCTION = "Reason step by step and end with the answer as a number after ####."

Problem = dict[str, Any]  # "prompt" and "answer", and what its source needs to check an answer


# ---- sources ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltIn:
    """mixkvq.tasks: tasks take turns, then levels."""

    names: tuple[str, ...] = tasks.TASKS
    levels: tuple[str, ...] = ("easy", "medium")
    purpose: str = "benchmark"  # other problems for another purpose

    def __post_init__(self) -> None:
        for given, known in ((self.names, tasks.TASKS), (self.levels, tasks.LEVELS)):
            if unknown := [name for name in given if name not in known]:
                raise SettingsError(f"There is no task or level {unknown[0]!r}; there are {', '.join(known)}.")
            if not given:
                raise SettingsError(f"No task or no level is named; there are {', '.join(known)}.")

    def draw(self, seed: int, n: int) -> list[Problem]:
        """So many problems, the same for a seed; more problems begin with the same ones. Raises SettingsError."""
        drawn: list[Problem] = []
        for i in range(n):
            task = self.names[i % len(self.names)]
            level = self.levels[i // len(self.names) % len(self.levels)]
            rng = Random(f"{self.purpose} {seed} {i} {task} {level}")
            drawn.append({"task": task, "level": level, **tasks.make(task, rng, tasks.LEVELS.index(level))._asdict()})
        return drawn

    def check(self, problem: Problem, text: str) -> bool:
        """Whether the text ends in the right answer."""
        return tasks.check(problem["task"], text, problem["answer"])


@dataclass(frozen=True)
class NumberFile:
    """A file in the format of GSM8K, in an order drawn by the seed. shots: so many of its problems stand before each question, with their answers."""

    path: Path
    instruction: str = INSTRUCTION
    shots: int = 0

    def draw(self, seed: int, n: int | None) -> list[Problem]:
        """So many of the file's problems, or all but the examples. Raises SettingsError for a line that is none, and for too few."""
        found = self._read()
        if len(found) < self.shots + (n or 1):
            wanted = f"{n or 1} and {self.shots} examples" if self.shots else str(n)
            raise SettingsError(f"{self.path} holds {len(found)} problems, fewer than {wanted}.")
        drawn = Random(seed).sample(found, len(found))  # more problems begin with the same ones
        examples = "".join(f"Question: {e['question']}\nAnswer: {e['solution']}\n\n" for e in drawn[len(drawn) - self.shots :])
        asked = "Question: " if self.shots else ""
        return [
            {"prompt": f"{examples}{asked}{problem['question']}\n\n{self.instruction}".rstrip(), "answer": problem["answer"]}
            for problem in drawn[: len(drawn) - self.shots][:n]
        ]

    def _read(self) -> list[dict[str, str]]:
        """Question, solution and answer of every line."""
        lines = read_utf8(self.path).split("\n")
        found: list[dict[str, str]] = []
        for i, line in enumerate(lines, 1):
            if not line.strip():
                continue
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                entry = json.loads(line)
                answer = entry["answer"].rpartition(tasks.ANSWER_MARK)[2].strip()
                if isinstance(entry["question"], str) and number(answer) is not None:
                    found.append({"question": entry["question"], "solution": _CALCULATION.sub("", entry["answer"]), "answer": answer})
                    continue
            raise SettingsError(f'{self.path}, line {i}, is not {{"question": ..., "answer": "... #### number"}}.')
        if not found:
            raise SettingsError(f"{self.path} holds no problems.")
        return found

    def check(self, problem: Problem, text: str) -> bool:
        """Whether the text ends in the right answer."""
        given = last_number(text)
        return given is not None and given == number(problem["answer"])


@dataclass(frozen=True)
class Module:
    """A user's module with problems(rng, n) and check(problem, text)."""

    path: Path

    def load(self) -> ModuleType:
        """The module, loaded once in a process."""
        if self.path not in _modules:
            module = load_module(self.path)
            for name in ("problems", "check"):
                if not callable(getattr(module, name, None)):
                    raise SettingsError(f"{self.path} has no function {name}(); it needs problems(rng, n) and check(problem, text).")
            _modules[self.path] = module
        return _modules[self.path]

    def draw(self, seed: int, n: int) -> list[Problem]:
        """So many problems, the same for a seed; more problems begin with the same ones. Raises SettingsError."""
        module = self.load()
        try:
            drawn = [dict(problem) for problem in module.problems(Random(seed), n)]
            json.dumps(drawn)
        except Exception as e:  # noqa: BLE001
            raise SettingsError(f"problems() of {self.path} failed: {said(e)}.") from e
        if len(drawn) != n or any(not isinstance(p.get("prompt"), str) or "answer" not in p for p in drawn):
            raise SettingsError(f"problems(rng, {n}) of {self.path} must give {n} dictionaries with a text 'prompt' and an 'answer'.")
        return drawn

    def check(self, problem: Problem, text: str) -> bool:
        """Whether the text ends in the right answer."""
        try:
            return bool(self.load().check(problem, text))
        except BridgeError:
            raise
        except Exception as e:  # noqa: BLE001
            raise SettingsError(f"check() of {self.path} failed: {said(e)}.") from e


Source = BuiltIn | NumberFile | Module
_modules: dict[Path, ModuleType] = {}

_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator
_NUMBER = re.compile(r"(?:(?<![\d)])[-+])?\$?(?:\d[\d,]*)?\.?\d+(?:/\d+)?")  # the minus of 16-7 is no sign


def number(text: str) -> Fraction | None:
    """A number as people write it (1,234.50, $12, 3/4), or None."""
    plain = text.strip().replace(",", "").replace("$", "").rstrip(".%")
    try:
        return Fraction(Decimal(plain)) if "/" not in plain else Fraction(plain)
    except (InvalidOperation, ValueError, OverflowError, ZeroDivisionError):
        return None


def last_number(text: str) -> Fraction | None:
    """The first number after the last ####, or else the last number of the text."""
    _, mark, tail = text.rpartition(tasks.ANSWER_MARK)
    if mark and (found := _NUMBER.findall(tail)):
        return number(found[0])
    found = _NUMBER.findall(text)
    return number(found[-1]) if found else None


# ---- prompts ---------------------------------------------------------------------------------------------


def prompt_tokens(llm: Llama, problem: Problem) -> list[int]:
    """The prompt in the model's chat template, up to where the answer begins."""
    return llm.chat_tokens([{"role": "user", "content": problem["prompt"]}])


def reference_tokens(llm: Llama, problem: Problem) -> list[int]:
    """The derivation that a built-in problem comes with, and the end of the turn."""
    text = tasks.completion(problem["reasoning"], problem["answer"])
    return llm.tokenize(text.encode(), add_bos=False, special=True) + [llm.token_eos()]


def derivations(llm: Llama, problems: Iterable[Problem]) -> list[Passage]:
    """Built-in problems teacher-forced: the prompt, then the reference, whose tokens are what counts."""
    passages = []
    for problem in problems:
        prompt = prompt_tokens(llm, problem)
        passages.append(Passage(prompt + reference_tokens(llm, problem), first=len(prompt)))
    return passages


def default_at_once(device: str) -> int:
    """How many problems are answered at once, if as many fit: a GPU writes dozens of answers in little more time than one."""
    from bridge.backend import stock_gpus

    return AT_ONCE_GPU if device != "cpu" and stock_gpus() else AT_ONCE


def add_tokens(llm: Llama, problems: Iterable[Problem], max_tokens: int | None) -> int:
    """Give every problem its prompt's tokens and the most tokens of an answer; returns the context that all of them need.

    A wrong derivation may be longer than the right one, but it need not go on for ever.
    """
    longest = 0
    for problem in problems:
        problem["tokens"] = prompt_tokens(llm, problem)
        known = len(reference_tokens(llm, problem)) * 5 // 4 + 64 if "reasoning" in problem else MAX_TOKENS
        problem["limit"] = max_tokens or known
        longest = max(longest, len(problem["tokens"]) + problem["limit"])
    return -(-longest // CELLS) * CELLS


# ---- answers ---------------------------------------------------------------------------------------------


Job = tuple[int, Problem, list[str]]  # the problem's index, the problem, and the caches to answer it with


@dataclass
class Solver:
    """Answers problems, `at_once` of them in one context, each in a sequence of its own with its own cells.

    What is answered before or beside a problem does not matter, but for the rounding of llama.cpp's larger batches: a sequence begins anew with each,
    what the cache has learnt of the queries included.
    """

    model: str
    source: Source
    n_ctx: int
    threads: int
    window: int | None = None
    sinks: int | None = None
    device: str = "auto"
    shared: int = 0  # see shared_tokens
    fewer: bool = False  # rather than that `at_once` of them do not fit into memory

    def answers(self, problem: Problem, caches: Sequence[str]) -> dict[str, dict[str, Any]]:
        """One problem, by itself."""
        return {cache: answer for _, found in self.solve([(0, problem, list(caches))], 1) for cache, answer in found.items()}

    def solve(self, jobs: Sequence[Job], at_once: int) -> Iterator[tuple[int, dict[str, dict[str, Any]]]]:
        """Index and answers by cache, as they are done: one cache after the other."""
        for cache in dict.fromkeys(cache for _, _, caches in jobs for cache in caches):
            wanted = [(index, problem) for index, problem, caches in jobs if cache in caches]
            yield from ((index, {cache: answer}) for index, answer in self._answer(cache, wanted, min(at_once, len(wanted))))

    def _open(self, cache: str, n_seq: int) -> Sequences:
        """A context for so many problems at once, or fewer."""
        from bridge.sequences import Sequences

        threads = {"n_threads": self.threads, "n_threads_batch": self.threads}
        options: Any = {"window": self.window, "sinks": self.sinks, "device": self.device, "n_ctx": self.n_ctx, "n_batch": BATCH, **threads}
        while True:
            try:
                return cast("Sequences", open_cache(self.model, cache, Sequences, n_seq=n_seq + (self.shared > 0), **options))
            except ContextTooLargeError as e:
                if n_seq == 1:
                    raise
                if not self.fewer:
                    raise ContextTooLargeError(f"{e} It is for {n_seq} problems at once; fewer --workers take less.") from None
                n_seq //= 2

    def _answer(self, cache: str, wanted: Sequence[tuple[int, Problem]], n_seq: int) -> Iterator[tuple[int, dict[str, Any]]]:
        llm = self._open(cache, min(n_seq, SEQUENCES - (self.shared > 0)))
        with contextlib.closing(llm):
            for index, problem, tokens, ended, seconds in generate_greedily(llm, wanted, self.shared):
                text = llm.detokenize(tokens, special=True).decode("utf-8", errors="replace")
                correct = self.source.check(problem, text)
                taken = sizes(llm, cache, window=self.window, sinks=self.sinks)
                yield index, {"correct": correct, "ended": ended, "tokens": tokens, "seconds": round(seconds, 3), "sizes": taken}


@dataclass
class _Writing:
    index: int
    problem: Problem
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0  # its share of what all took


def shared_tokens(drawn: Sequence[Problem]) -> int:
    """How many tokens all prompts begin with, such as examples; 0 if reading them once saves nothing to speak of."""
    if len(drawn) < 2:
        return 0
    first, last = min(problem["tokens"] for problem in drawn), max(problem["tokens"] for problem in drawn)
    most = min(len(problem["tokens"]) for problem in drawn) - 1  # the last is read by each, for its logits
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), most)
    return min(same, most) if min(same, most) >= PAGE_CELLS else 0


def generate_greedily(
    llm: Sequences, wanted: Iterable[tuple[int, Problem]], shared: int = 0
) -> Iterator[tuple[int, Problem, list[int], bool, float]]:
    """The arg-max tokens that follow each prompt, up to and including the end of the turn, whether that was reached, and seconds; as they are done.

    Prompts are read one at a time, as if they were alone; then all answers grow by a token at a time, and where one ends the next prompt begins.
    Their first `shared` tokens are the same: sequence 0 holds them, and each of the others begins as a copy of it.
    """
    left = iter(wanted)
    free = list(range(llm.n_seq - 1, 0 if shared else -1, -1))  # from the first on: those that follow one another are computed together
    writing: dict[int, _Writing] = {}  # by sequence
    unread = shared

    def begin_prompt(sequence: int, tokens: list[int]) -> Any:
        """Logits behind a prompt."""
        nonlocal unread
        if unread:
            llm.read(0, tokens[:unread])
            unread = 0
        if shared:
            llm.copy(0, sequence)
        return llm.read(sequence, tokens[shared:], copy=False)

    def grow(sequence: int, logits: Any) -> bool:
        """Append the next token; whether the answer is done."""
        answer = writing[sequence]
        answer.tokens.append(int(logits.argmax()))
        return llm.ends(answer.tokens[-1]) or len(answer.tokens) >= answer.problem["limit"]

    while True:
        done = []
        begin = time.perf_counter()
        if free and (job := next(left, None)) is not None:
            sequence = free.pop()
            writing[sequence] = _Writing(*job)
            if grow(sequence, begin_prompt(sequence, job[1]["tokens"])):
                done.append(sequence)
            writing[sequence].seconds += time.perf_counter() - begin
        elif writing:
            sequences = sorted(writing)
            rows = llm.step([(sequence, writing[sequence].tokens[-1]) for sequence in sequences], copy=False)
            done = [sequence for sequence, logits in zip(sequences, rows) if grow(sequence, logits)]
            share = (time.perf_counter() - begin) / len(sequences)
            for sequence in sequences:
                writing[sequence].seconds += share
        else:
            return
        for sequence in done:
            answer = writing.pop(sequence)
            yield answer.index, answer.problem, answer.tokens, llm.ends(answer.tokens[-1]), answer.seconds
            free.append(sequence)
            if writing or shared:
                llm.forget(sequence)
            else:
                llm.clear()


# ---- figures ---------------------------------------------------------------------------------------------


def summarise(records: Sequence[dict[str, Any]], caches: Sequence[str], baseline: str, first: int) -> dict[str, Any]:
    """Figures per cache, over the problems that every cache has answered. lost: right with the baseline only; won: the reverse.

    A cache that has answered none yet is left out: in a run that was stopped the others are compared.
    """
    caches = [cache for cache in caches if any(cache in record["answers"] for record in records)]
    complete = [record["answers"] for record in records if all(cache in record["answers"] for cache in caches)]
    n = len(complete)
    summary = {}
    for cache in caches:
        own = [answers[cache] for answers in complete]
        correct = sum(answer["correct"] for answer in own)
        n_tokens = sum(len(answer["tokens"]) for answer in own)
        figures = {
            "problems": n,
            "correct": correct,
            "accuracy": correct / max(1, n),
            "accuracy_95%": wilson(correct, n),
            "cut": sum(not answer["ended"] for answer in own),
            "tokens": n_tokens,
            "tokens_per_second": n_tokens / max(1e-9, sum(answer["seconds"] for answer in own)),
        }
        if baseline in caches:
            pairs = [(answers[cache], answers[baseline]) for answers in complete]
            same = sum(a["tokens"][:first] == b["tokens"][:first] for a, b in pairs)
            lost = sum(b["correct"] and not a["correct"] for a, b in pairs)
            won = sum(a["correct"] and not b["correct"] for a, b in pairs)
            figures |= {
                "lost": lost,
                "won": won,
                "sign_test_p": sign_test(lost, won),
                "same_first_tokens": same,
                "same_first_tokens_share": same / max(1, n),
                "same_first_tokens_95%": wilson(same, n),
            }
        summary[cache] = figures
    return summary


# What scipy.stats.binomtest says of the same numbers (test_evaluate.py compares them). These few lines are not worth its hundred megabytes to whoever
# evaluates a cache.


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    if trials == 0:
        return 0.0, 1.0
    p, z = successes / trials, NormalDist().inv_cdf((1 + confidence) / 2)
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def sign_test(lost: int, won: int) -> float:
    """Exact two-sided p of as uneven a split of the problems that differ, if losing and winning were equally likely."""
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))
