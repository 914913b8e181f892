"""What a calibration reads: texts, solved problems and words of the model's own; and what is held out to measure with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from bridge import Llama

from ..core.errors import SettingsError
from ..core.reference import PAGE_CELLS
from . import tasks
from .budget import Plan
from .compare import Passage, feed, tokenize_text
from .texts import default_text, read_utf8

LONGEST = 4096  # tokens of a passage
LEAST_TOKENS = 8 * PAGE_CELLS


@dataclass
class Material:
    """What is read to calibrate, and what was held out to measure with; by kind of text.

    "text": the given files, or the default text. "retrieval": solved problems whose answers copy exactly from far back. "own": what the model
    writes by itself, to calibrate only.
    """

    calibration: dict[str, list[Passage]] = field(default_factory=dict)
    held_out: dict[str, list[Passage]] = field(default_factory=dict)


PURPOSES = ("calibrate", "hold out")


def encode_texts(llm: Llama, texts: Sequence[Path]) -> list[tuple[list[int], list[int]]]:
    """For each purpose the tokens of the texts, and those that begin a passage. Raises SettingsError if they are too few."""
    found = [tokenize_text(llm, text.encode()) for text in _halves(texts)]
    for (encoded, _), name in zip(found, PURPOSES, strict=True):
        if len(encoded) < LEAST_TOKENS:
            raise SettingsError(
                f"The texts have {len(encoded)} tokens to {name}, and {LEAST_TOKENS} are needed: give about {4 * LEAST_TOKENS} tokens in all, "
                "for a third is held out."
            )
    return found


def gather(llm: Llama, texts: list[tuple[list[int], list[int]]], plan: Plan, seed: int) -> Material:
    """At most `plan.tokens` tokens of each kind for each purpose, of problems more to calibrate; and some of the model's own words."""
    material = Material()
    longest = min(LONGEST, llm.n_ctx())
    for part, (encoded, bos), name in zip((material.calibration, material.held_out), texts, PURPOSES, strict=True):
        encoded = encoded[: plan.tokens]
        n = -(-len(encoded) // (longest - len(bos)))
        part["text"] = [Passage(bos + piece.tolist()) for piece in np.array_split(np.array(encoded), n)]
        if not plan.every_kind:
            continue
        # Only the solutions of problems count, about half.
        if found := _derivations(llm, plan.tokens * (1 if part is material.held_out else plan.problems), longest, Random(f"{name} {seed}")):
            part["retrieval"] = found
    if plan.own >= 3 * PAGE_CELLS:
        material.calibration["own"] = [Passage(_own_words(llm, min(plan.own, longest), seed))]
    return material


def _halves(texts: Sequence[Path]) -> tuple[str, str]:
    """Text to calibrate with and text to hold out: of given files the last third of each."""
    if not texts:
        return default_text()
    parts = [read_utf8(path) for path in texts]
    cuts = [len(text) * 2 // 3 for text in parts]
    return "\n\n".join(t[:n] for t, n in zip(parts, cuts)), "\n\n".join(t[n:] for t, n in zip(parts, cuts))


def _derivations(llm: Llama, tokens: int, longest: int, rng: Random) -> list[Passage]:
    """Solved problems as chat. The problem is random, so only the solution's tokens count.

    At least half are long chains of lookups (shorter where those do not fit): there a small error of the keys shows. Then all tasks take turns.
    """
    found: list[Passage] = []
    left = tokens
    for attempt in range(200):
        most = min(longest, left)
        if most < 4 * PAGE_CELLS:
            break
        task, level = tasks.TASKS[attempt % len(tasks.TASKS)], "hard" if attempt % 2 else "medium"
        if attempt < 50 and 2 * left > tokens:
            task, level = "chain", "hard" if found or attempt < 10 else "medium"
        problem = tasks.make(task, rng, tasks.LEVELS.index(level))
        prompt = llm.tokenize(tasks.chat(problem.prompt).encode(), add_bos=True, special=True)
        if len(prompt) >= most:
            continue
        solution = tasks.completion(problem.reasoning, problem.answer) + tasks.END_OF_TURN
        answer = llm.tokenize(solution.encode(), add_bos=False, special=True)
        if 4 * PAGE_CELLS <= len(prompt) + len(answer) <= most:
            found.append(Passage(prompt + answer, len(prompt)))
            left -= len(prompt) + len(answer)
    return found


def _own_words(llm: Llama, n: int, seed: int) -> list[int]:
    """What the model writes after its beginning of text, at temperature 1."""
    written = llm.tokenize(b"", add_bos=True) or llm.tokenize(b"\n", add_bos=False)
    rng = np.random.default_rng(seed)
    llm.clear()
    part = list(written)
    while len(written) < n:
        logits = feed(llm, part, PAGE_CELLS, 1)[-1].astype(np.float64)
        p = np.exp(logits - logits.max())
        part = [int(rng.choice(len(p), p=p / p.sum()))]
        written += part
    return written
