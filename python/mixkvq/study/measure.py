"""Measuring for a calibration: the speed of a model, what each part of its cache matters, and the result on held-out text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge import Llama

from ..core.errors import SettingsError
from ..core.reference import PAGE_CELLS
from .budget import Clock, Speed, least_tokens
from .compare import Passage, compare_caches, feed, standard_error, work
from .search import Calibration
from .sensitivity import Collector, Reader, divergences, even_weights, measure_weights, parts_of
from .sizes import Formats
from .steps import Steps

LEAST_BY_HEAD = 2 * PAGE_CELLS  # tokens of a kind with which a head's effect is told from another's
LONG_SAMPLE = 5 * PAGE_CELLS  # three times as many reach beyond the prompt of a long chain
KEY_GROUPS = (128, 64)  # tokens per scale that are tried


def measure_speed(llm: Llama) -> Speed:
    """Of a model with llama.cpp's own cache."""
    page = [i % llm.n_vocab() for i in range(min(PAGE_CELLS, llm.n_ctx() // 2))]
    llm.clear()
    feed(llm, page[:1], PAGE_CELLS, 1)  # the first time memory is set up, and the weights come from the disk
    begin = time.perf_counter()
    feed(llm, page[:1], PAGE_CELLS, 1)
    write = time.perf_counter() - begin
    begin = time.perf_counter()
    rows = feed(llm, page, PAGE_CELLS, len(page))
    divergences(rows, rows, llm.n_threads)
    read = len(page) / max(1e-9, time.perf_counter() - begin)
    llm.clear()
    return Speed(read, write)


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
        return Speed(min(speed.read, reader.n_tokens / max(1e-9, time.perf_counter() - begin)), speed.write)
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
            begin = time.perf_counter()
            whole = reader.divergence(preset, tables, progress)
    speed = reader.n_tokens / max(1e-9, time.perf_counter() - begin)
    return Calibration(reader, tables, {kind: max(kld, 1e-9) for kind, kld in whole.items()}, lambda n: None), speed


def measure_parts(calibration: Calibration, probe: Formats, steps: Steps, speed: float, seconds: float, most: float) -> str:
    """A sample is read with each part of the cache rounded by itself to the formats of `probe`; the weights follow. Returns what a part was.

    A part is a head's keys or values if some pages of every kind can be read with each of them in `seconds`, else a layer's; the sample is as long
    as `seconds` allow. Where even a short one would take more than `most`, neighbouring layers are one part; with no time at all parts weigh alike.
    """
    reader, tables = calibration.reader, calibration.tables
    seen = [t for t, p in zip(tables, probe, strict=True) if t is not None and p is not None]
    n_heads = 2 * sum(t.n_heads for t in seen)
    n_shares = len(reader.passages) + 2 * ("retrieval" in reader.passages)  # three times as many tokens of problems as of another kind
    affordable = seconds * speed / n_shares
    by_head = affordable / (n_heads + len(seen)) >= LEAST_BY_HEAD
    n_tokens = int(affordable / ((n_heads if by_head else 2 * len(seen)) + len(seen)))
    clock = Clock(most / 60)
    group, samples = 1, [reader.sample(max(n_tokens, LONG_SAMPLE) if n_tokens >= PAGE_CELLS else n_tokens), reader.sample(0)]
    while True:
        groups = parts_of(tables, probe, group, by_head=by_head)
        n_passes = len(groups) + sum(map(len, groups))
        for sample in samples:
            work = n_passes * sum(n - 1 for some in sample.values() for _, n in some)
            if work <= most * speed:
                what = "head" if by_head else "layer" if group == 1 else f"{group} layers" if group < len(seen) else "all layers"
                with steps(f"{n_passes - len(groups)} parts, one {what} at a time" if group == 1 else f"parts of {what}", work) as progress:
                    done = measure_weights(reader, tables, probe, groups, sample=sample, progress=progress, enough=lambda: clock.taken() > 1.2 * most)
                return what if done else ""
        if by_head:
            by_head = False
        elif group >= len(seen):
            even_weights(tables, probe, parts_of(tables, probe, 1, by_head=False), list(reader.passages))
            return ""
        else:
            group *= 2


@dataclass
class Verdict:
    """A kind of held-out text: the figures of caches by name, and the mean paired difference of divergence.

    difference: profile less what it could fall back to.
    """

    figures: dict[str, dict[str, Any]]
    difference: float = 0.0
    standard_error: float = 0.0

    @property
    def profile(self) -> dict[str, Any]:
        """The figures of the profile."""
        return next(iter(self.figures.values()))

    @property
    def worse(self) -> bool:
        """Whether the profile diverges more, by more than chance explains."""
        return self.difference > 2 * self.standard_error

    @property
    def better(self) -> bool:
        """Whether it diverges less, by more than chance explains."""
        return self.difference < -2 * self.standard_error


PROFILE = "this profile"


def measure(model: str, caches: Mapping[str, str], passages: dict[str, list[Passage]], steps: Steps, **options: Any) -> dict[str, Verdict]:
    """Caches on held-out text, by kind of text.

    caches: what each is called, and its name for `open_cache`; the profile first, behind it what it could fall back to. options: `compare_caches`'s.
    """
    found = {}
    n = len(caches)
    with steps("measuring on text that was held out", work(n, [p for some in passages.values() for p in some], n)) as progress:
        for kind, some in passages.items():
            (group,) = compare_caches(model, list(caches.values()), some, progress=progress, at_once=n, lengths=[], **options)
            measured = [group[name] for name in caches.values()]
            found[kind] = Verdict({called: each.summary() for called, each in zip(caches, measured)})
            if n > 1:
                differences = [np.subtract(a.kld, b.kld) for a, b in zip(measured[0].passages, measured[1].passages, strict=True)]
                mean = float(np.concatenate(differences).mean())
                found[kind].difference, found[kind].standard_error = mean, standard_error(differences) or abs(mean) / 2
    return found


def record_of(kind: str, figures: dict[str, Any]) -> dict[str, Any]:
    """What a profile keeps of a measurement."""
    return {
        "text": kind,
        "tokens": figures["tokens"],
        "style": "decode",
        "against": "f16",
        "kld_mean": figures["kld_mean"],
        "kld_median": figures["kld_median"],
        "kld_p999": figures["kld_99.9%"],
        "perplexity_ratio": figures["perplexity_ratio"],
        "same_top": figures["same_top"],
    }
