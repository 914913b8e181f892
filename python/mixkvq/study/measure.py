"""Measuring for a calibration: the speed of a model, what each part of its cache matters, and the result on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bridge import Llama

from ..core.errors import SettingsError
from ..core.reference import PAGE_CELLS
from .budget import Clock, Speed, least_tokens
from .compare import Passage, compare_caches, feed, standard_error, work
from .search import NEGLIGIBLE, Calibration
from .sensitivity import Collector, Reader, Sample, all_passes, divergences, measure_weights
from .sizes import Formats
from .steps import Steps

LONG_SAMPLE = 5 * PAGE_CELLS  # three times as many reach beyond the prompt of a long chain
KEY_GROUPS = (128, 64)  # tokens per scale that are tried
SPEED_SECONDS, SPEED_TOKENS = 2.0, 8 * PAGE_CELLS  # how long the speed is measured


def measure_speed(llm: Llama, load: float) -> Speed:
    """Of a model with llama.cpp's own cache. load: seconds that it took to open it."""
    page = [i % llm.n_vocab() for i in range(min(PAGE_CELLS, llm.n_ctx() // 2))]
    llm.clear()
    feed(llm, page[:1], PAGE_CELLS, 1)  # the first time memory is set up, and the weights come from the disk
    begin = time.perf_counter()
    feed(llm, page[:1], PAGE_CELLS, 1)
    write = time.perf_counter() - begin
    llm.clear()
    begin, n, taken = time.perf_counter(), 0, 0.0
    while not n or taken < SPEED_SECONDS and n + len(page) <= min(llm.n_ctx(), SPEED_TOKENS):
        rows = feed(llm, page, PAGE_CELLS, len(page))
        divergences(rows, rows, llm.n_threads)
        n, taken = n + len(page), time.perf_counter() - begin
    llm.clear()
    return Speed(n / max(1e-9, taken), write, load)


def measure_speed_rounded(model: str, formats: Formats, speed: Speed, **options: Any) -> Speed:
    """The speed with which a small model is read through the codec: rounding its pages takes longer than computing it."""
    passage = Passage([1] * least_tokens(options["window"], options["sinks"]))
    reader = Reader(model, {"text": [passage]}, **options)
    try:
        collector = Collector(KEY_GROUPS)
        reader.read_exact(collector, lambda n: None)
        tables = collector.tables(len(formats))
        begin = time.perf_counter()
        reader.divergence(formats, tables, lambda n: None)
        return replace(speed, read=min(speed.read, reader.n_tokens / max(1e-9, time.perf_counter() - begin)), load=min(speed.load, reader.load))
    finally:
        reader.close()


def read_whole(reader: Reader, n_layers: int, preset: Formats, steps: Steps, *, compared: bool) -> tuple[Calibration, float]:
    """Read everything exactly, then, if allocations are to be compared with it, with the formats of `preset`. Also: tokens a second."""
    collector = Collector(KEY_GROUPS)
    begin = time.perf_counter()
    with steps("reading the text with an exact cache", reader.n_tokens) as progress:
        reader.read_exact(collector, progress)
    tables = collector.tables(n_layers)
    if not any(tables):
        raise SettingsError("The texts are too short for the cache to pack a single page.")
    whole = dict.fromkeys(reader.passages, 1.0)
    if compared:
        with steps("the preset of this size", reader.n_tokens) as progress:
            whole = reader.divergence(preset, tables, progress)
    speed = (1 + compared) * reader.n_tokens / max(1e-9, time.perf_counter() - begin)
    return Calibration(reader, tables, {kind: max(kld, 1e-9) for kind, kld in whole.items()}, lambda n: None), speed


def passes_of_parts(formats: Formats, exact: bool) -> int:
    """Passes over a sample in which the keys and values of every head are measured by themselves."""
    return all_passes([layer.n_heads for layer in formats if layer is not None], exact)


def shares_of_sample(kinds: Collection[str]) -> int:
    """Of a sample of n tokens, how many times n are read: three times as many of problems as of another kind."""
    return len(kinds) + 2 * ("retrieval" in kinds)


def measure_parts(calibration: Calibration, probe: Formats, steps: Steps, speed: float, seconds: float, *, exact: bool) -> tuple[str, float]:
    """A sample is read with each part of the cache rounded by itself to the formats of `probe`, for so many seconds; the weights follow.

    See `measure_weights`. The sample is as long as lets every head be measured, within limits. Returns what was not done, and tokens a second.
    """
    reader, tables = calibration.reader, calibration.tables
    seen = [p if t is not None else None for t, p in zip(tables, probe, strict=True)]
    n_layers, n_all = sum(p is not None for p in seen), passes_of_parts(seen, exact)
    tokens = speed * max(0.0, seconds)
    n = int(tokens / n_all / shares_of_sample(reader.passages))
    sample = reader.sample(max(n, LONG_SAMPLE))
    if tokens < 3 * n_layers * length(sample):
        sample = reader.sample(0)
    n_passes = max(2, min(n_all, int(tokens / length(sample))))
    clock, done = Clock(seconds), 0

    def enough(n: int) -> bool:
        """Whether the next pass would end too late."""
        nonlocal done
        done = n
        taken = clock.taken()
        return taken * (1 + 1 / n) > seconds if n else seconds <= 0

    with steps(f"parts of the cache, up to {n_passes} passes", n_passes * length(sample)) as progress:
        groups = max(1, min(n_passes // 6, n_layers))
        options: dict[str, Any] = {"sample": sample, "shares": calibration.shares, "progress": progress, "exact": exact, "enough": enough}
        n_parts = measure_weights(reader, tables, seen, groups, **options)
    taken, n_heads = clock.taken(), 2 * sum(p.n_heads for p in seen if p is not None)
    speed = done * length(sample) / taken if done and taken > 0 else speed
    if not n_parts:
        return "no part of the cache was measured by itself", speed
    return f"{n_parts} parts of the cache were measured instead of {n_heads}" if n_parts < n_heads else "", speed


def length(sample: Sample) -> int:
    """Tokens that a pass over it reads."""
    return sum(n - 1 for some in sample.values() for _, n in some)


@dataclass
class Verdict:
    """A kind of held-out text: the figures of caches by name, and by how much they diverge more than `against`, the last of them.

    difference: mean and standard error of the paired difference, by name.
    """

    figures: dict[str, dict[str, Any]]
    against: str
    difference: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def profile(self) -> dict[str, Any]:
        """The figures of the profile."""
        return next(iter(self.figures.values()))


PROFILE = "this profile"


def is_better(verdicts: Mapping[str, Verdict], name: str, shares: Mapping[str, float]) -> bool:
    """Whether a cache diverges less than what it is compared with, in the mean over the kinds of text, and on none more, by a standard error."""
    gain = 0.0
    for kind, verdict in verdicts.items():
        mean, error = verdict.difference[name]
        if mean > max(error, NEGLIGIBLE):
            return False
        own, other = (verdict.figures[each]["kld_mean"] + NEGLIGIBLE for each in (name, verdict.against))
        gain += shares.get(kind, 0.0) * math.log(own / other)
    return gain < 0


def measure(
    model: str, caches: Mapping[str, str], against: str, passages: dict[str, list[Passage]], steps: Steps, **options: Any
) -> dict[str, Verdict]:
    """Caches on held-out text, by kind of text.

    caches: what each is called, and its name for `open_cache`. against: which of them the others are compared with. options: `compare_caches`'s.
    """
    found = {}
    n = len(caches)
    with steps("measuring on text that was held out", work(n, [p for some in passages.values() for p in some], n)) as progress:
        for kind, some in passages.items():
            (group,) = compare_caches(model, list(caches.values()), some, progress=progress, at_once=n, lengths=[], **options)
            measured = {called: group[name] for called, name in caches.items()}
            verdict = found[kind] = Verdict({called: each.summary() for called, each in measured.items()}, against)
            for called, each in measured.items():
                differences = [np.subtract(a.kld, b.kld) for a, b in zip(each.passages, measured[against].passages, strict=True)]
                mean = float(np.concatenate(differences).mean())
                error = standard_error(differences)
                verdict.difference[called] = mean, abs(mean) / 2 if error is None else error
    return found


def record_of(kind: str, figures: dict[str, Any], baseline: str) -> dict[str, Any]:
    """What a profile keeps of a measurement."""
    return {
        "text": kind,
        "tokens": figures["tokens"],
        "style": "decode",
        "against": baseline,
        "kld_mean": figures["kld_mean"],
        "kld_median": figures["kld_median"],
        "kld_p999": figures["kld_99.9%"],
        "perplexity_ratio": figures["perplexity_ratio"],
        "same_top": figures["same_top"],
    }
