"""Make a profile for a model: which precision each layer, head and kind of cache gets, measured on the model itself.

The model reads a calibration text with an exact cache that shows its pages. Then it reads it again and again with one part of the cache
rounded, which tells how much that part matters, and bits go where they prevent most harm. The result is measured on text that was held out,
against the preset of its size; where it is worse on a kind of text, beyond a standard error, the profile holds the preset's formats
instead and says so.

    python -m mixkvq.calibrate model.gguf
    python -m mixkvq.calibrate model.gguf --bits 2.5 --text notes.txt -o small.gguf
    python -m mixkvq.calibrate model.gguf --budget-mib 512 --ctx 32768
    python -m mixkvq.calibrate model.gguf --max-kld 0.01
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bridge import Llama
from bridge.devices import DEVICE_HELP, check_device
from bridge.errors import ProfileError, SettingsError
from bridge.library import llama, native
from bridge.machine import physical_cores
from bridge.model_file import ModelFile, open_model

from . import command, tasks
from .allocate import Tables, allocate_by_kind, body_bits, thresholds
from .budget import FEWEST_TOKENS, Clock, Demand, Plan, Speed, least_tokens, make_plan
from .caches import SINKS, WINDOW, total_bits
from .compare import Passage, compare_caches, feed, standard_error, tokenize_text, work
from .outputs import check_output
from .profile import LayerProfile, Profile, side_car, uniform_profile, write_profile
from .reference import PAGE_CELLS
from .sensitivity import Collector, Reader, divergences, even_weights, measure_weights, parts_of
from .texts import default_text, read_utf8

LONGEST = 4096  # tokens of a passage
LEAST_TOKENS = 8 * PAGE_CELLS
TOKENS = 3584  # of each kind of text, if there is time
LEAST_BY_HEAD = 2 * PAGE_CELLS  # tokens of a kind with which a head's effect is told from another's
LONG_SAMPLE = 5 * PAGE_CELLS  # three times as many reach beyond the prompt of a long chain
KEY_GROUPS = (128, 64)  # tokens per scale that are tried
TRUSTS = (1.0, 0.75)  # in the weights that were measured
TILTS = (0.5, 2.0)  # weight of keys against that of values, tried beside 1
WINDOWS = (128, 256, 512)  # tried where a budget of memory can pay for them
LONG_IN_WINDOWS = 4  # a passage of so many windows shows what they are worth
PAPER_RANGE = (0.1, 2.0)  # of both thresholds in the paper's search
PAPER_TRIALS, PAPER_LEAST_TRIALS = 30, 8
MOST_SIZES, LEAST_SIZES = 7, 3  # that are tried for a divergence, and for how many there has to be time

Formats = list["LayerProfile | None"]


# ---- what is read --------------------------------------------------------------------------------------------------------------------


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
    """At most `plan.tokens` tokens of each kind for each purpose, of problems twice as many to calibrate; and some of the model's own words."""
    material = Material()
    longest = min(LONGEST, llm.n_ctx())
    for part, (encoded, bos), name in zip((material.calibration, material.held_out), texts, PURPOSES, strict=True):
        encoded = encoded[: plan.tokens]
        n = -(-len(encoded) // (longest - len(bos)))
        part["text"] = [Passage(bos + piece.tolist()) for piece in np.array_split(np.array(encoded), n)]
        if not plan.every_kind:
            continue
        # Only the solutions of problems count, about half.
        if found := _derivations(llm, plan.tokens if part is material.held_out else 2 * plan.tokens, longest, Random(f"{name} {seed}")):
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

    At least half are long chains of lookups: there a small error of the keys shows. Then all tasks take turns.
    """
    found, left = [], tokens
    for attempt in range(200):
        most = min(longest, left)
        if most < 4 * PAGE_CELLS:
            break
        task, level = tasks.TASKS[attempt % len(tasks.TASKS)], "hard" if attempt % 2 else "medium"
        if attempt < 50 and 2 * left > tokens:
            task, level = "chain", "hard"
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


# ---- sizes ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """A preset on a model: its formats, and the body bits that they take there."""

    name: str
    formats: Formats
    bits: float


def presets_of(model: ModelFile) -> list[Preset]:
    """The presets that an allocation is compared with, by rising bits: those with rotated values, as it has."""
    profiles = {str(p["name"]): uniform_profile(model, p["name"]) for p in native().presets() if p["value_group"] == 0}
    return sorted((Preset(name, p.layers, p.packed_bits(model.head_size_v)) for name, p in profiles.items()), key=lambda preset: preset.bits)


def preset_within(presets: Sequence[Preset], bits: float) -> Preset:
    """The largest of these presets that takes no more body bits, or the smallest one."""
    return ([p for p in presets if p.bits <= bits + 0.005] or presets[:1])[-1]


def nearest_preset(presets: Sequence[Preset], bits: float) -> Preset:
    """The one of the nearest size, larger or smaller: what a profile of so many bits is compared with."""
    return min(presets, key=lambda preset: abs(preset.bits - bits))


def default_bits(model: ModelFile) -> float:
    """Body bits of the default preset on this model."""
    return uniform_profile(model).packed_bits(model.head_size_v)


def bits_of_budget(model: ModelFile, mib: float, n_ctx: int, window: int, sinks: int) -> float:
    """Body bits with which a cache of n_ctx cells takes at most `mib` MiB: what is left when the F16 pages are paid.

    Raises SettingsError if that is less than the smallest formats take.
    """
    elements = model.cache_elements(n_ctx)
    tables = table_bytes(model, n_ctx)
    fixed, slope = total_bits(0, 0, n_ctx, window, sinks), total_bits(1, 1, n_ctx, window, sinks) - total_bits(0, 0, n_ctx, window, sinks)
    share = 0.998  # scratch
    bits = (8 * (mib * 2**20 * share - tables) / elements - fixed) / slope
    if bits < LEAST_BITS:
        least = ((fixed + LEAST_BITS * slope) * elements / 8 + tables) / share / 2**20
        raise SettingsError(f"A context of {n_ctx} tokens of {model.name} needs at least {math.ceil(least)} MiB; {mib:g} MiB are not enough.")
    return bits


def table_bytes(model: ModelFile, n_ctx: int) -> int:
    """What the cache keeps beside its pages: their books, and for each key channel its importance, two sums of the queries and one more of them as it
    was after 128, 512, 2048, ... tokens.
    """
    channels = sum(n * size for n, size in zip(model.n_head_kv, model.head_size_k))
    n_marks = sum(PAGE_CELLS * 4**i <= n_ctx for i in range(16))
    return 2 * model.served_layers() * (TENSOR_BYTES + TABLE_BYTES * -(-n_ctx // PAGE_CELLS)) + 4 * channels * (3 + n_marks)


def sizes_of_budget(model: ModelFile, mib: float, n_ctx: int, window: int | None, sinks: int | None) -> dict[int, float]:
    """Body bits by window, for the windows that a budget can pay for; only for `window` if one is given.

    Others than the default are a quarter of the context at most, and of what is read to calibrate. Raises SettingsError as `bits_of_budget`.
    """
    sinks = SINKS if sinks is None else sinks
    first = WINDOW if window is None else window
    sizes = {first: min(MOST_BITS, bits_of_budget(model, mib, n_ctx, first, sinks))}
    for larger in WINDOWS if window is None else ():
        if first < larger <= min(n_ctx, model.n_ctx_train or LONGEST, LONGEST) // LONG_IN_WINDOWS:
            with contextlib.suppress(SettingsError):
                sizes[larger] = min(MOST_BITS, bits_of_budget(model, mib, n_ctx, larger, sinks))
    return sizes


TENSOR_BYTES, TABLE_BYTES = 1280, 49  # the books of the keys or the values of a layer, and of each of their pages
TOLERANCE = 0.05
LEAST_BITS = 2.25
MOST_BITS = 8.0


# ---- search --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Calibration:
    """A reader with exact predictions, what was collected of every layer, and the divergence that the preset of the size has, by kind of text.

    best: the least objective so far, and the formats that have it.
    """

    reader: Reader
    tables: list[Tables | None]
    preset: dict[str, float]
    progress: Callable[[int], None]
    best: tuple[float, Formats] | None = None

    def objective(self, formats: Formats) -> float:
        """The divergence over the reference preset's, below 1 if it is less.

        The geometric mean over the kinds of text; but where a kind is worse than with the preset by more than such samples tell apart, that counts.
        """
        found = self.reader.divergence(formats, self.tables, self.progress)
        ratios = {kind: max(kld, 1e-9) / self.preset[kind] for kind, kld in found.items()}
        worst = max(ratios.values())
        value = worst if worst > 1 + TOLERANCE else math.exp(sum(share * math.log(ratios[kind]) for kind, share in self.shares.items()))
        if self.best is None or value < self.best[0]:
            self.best = value, formats
        return value

    @property
    def shares(self) -> dict[str, float]:
        """How much a kind of text counts: solved problems as much as all the rest."""
        others = [kind for kind in self.preset if kind != "retrieval"]
        half = len(others) < len(self.preset)
        return {kind: 0.5 if kind == "retrieval" else (0.5 if half else 1.0) / len(others) for kind in self.preset}


def best_formats(calibration: Calibration, bits: float, tries: int = 4, another: Callable[[], bool] = lambda: True) -> tuple[Formats, float | None]:
    """The allocation for a size that measures best, and its objective; with no tries the one that follows from the weights, and None.

    Tried are how far the measured weights are trusted against equal shares for all parts (they come from a sample), then the balance of keys
    and values. another: whether there is time for one more.
    """

    def allocated(trust: float, tilt: float) -> Formats:
        return allocate_by_kind([None if t is None else _moderated(t, trust, tilt) for t in calibration.tables], bits, calibration.shares)

    if not tries:
        return allocated(1.0, 1.0), None
    tried: dict[tuple[float, float], tuple[Formats, float]] = {}

    def attempt(trust: float, tilt: float) -> None:
        if len(tried) < tries and (not tried or another()):
            formats = allocated(trust, tilt)
            tried[trust, tilt] = formats, calibration.objective(formats)

    for trust in TRUSTS:
        attempt(trust, 1.0)
    best, _ = min(tried, key=lambda settings: tried[settings][1])
    for tilt in TILTS:
        attempt(best, tilt)
    return min(tried.values(), key=lambda entry: entry[1])


def best_window(calibration: Calibration, sizes: Mapping[int, float]) -> int:
    """Which window, with the body bits that it leaves of the budget, diverges least; the reader goes on with it.

    Only long passages count: most of a short one would lie in the window, as little of a long context does.
    """
    reader = calibration.reader
    sample = reader.passages_from(LONG_IN_WINDOWS * max(sizes))
    found = {}
    for window, bits in sizes.items():
        reader.change_window(window)
        formats = allocate_by_kind(calibration.tables, bits, calibration.shares)
        klds = reader.divergence(formats, calibration.tables, calibration.progress, sample).values()
        found[window] = float(np.mean([math.log(max(kld, 1e-9)) for kld in klds]))
    best = min(found, key=lambda window: found[window])
    reader.change_window(best)
    return best


def _moderated(tables: Tables, trust: float, tilt: float) -> Tables:
    """Tables whose weights are between the measured ones (trust 1) and those that give every part the same harm (trust 0)."""
    moderated = copy.copy(tables)
    moderated.key_kinds = {kind: tilt * w**trust * tables.key_even ** (1 - trust) for kind, w in tables.key_kinds.items()}
    moderated.value_kinds = {kind: w**trust * tables.value_even ** (1 - trust) for kind, w in tables.value_kinds.items()}
    return moderated


def load_optuna() -> Any:
    """Raises SettingsError if it is missing."""
    try:
        import optuna
    except ImportError:
        raise SettingsError("The paper's search needs Optuna: pip install 'mixkvq[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def best_thresholds(calibration: Calibration, bits: float, trials: int, seed: int, another: Callable[[], bool] = lambda: True) -> Formats:
    """The paper's search: Optuna's TPE over the two thresholds, for quality and few bits at once; the best that is small enough.

    Quality is our objective, not accuracy on GSM8K. The thresholds are in tens of the model's mean salience, because their scale does not carry
    over between models. another: whether there is time for one more trial. Raises SettingsError if Optuna is missing or no trial is small enough.
    """
    optuna = load_optuna()
    saliences = [t.salience for t in calibration.tables if t is not None and t.salience is not None]
    unit = float(np.mean([s.mean() for s in saliences]))
    tried: list[tuple[float, float, Formats]] = []

    def trial(t: Any) -> tuple[float, float]:
        t16, t4 = (unit * 10 * t.suggest_float(name, *PAPER_RANGE) for name in ("t16", "t4"))
        formats = thresholds(calibration.tables, t16, t4)
        tried.append((calibration.objective(formats), body_bits(calibration.tables, formats), formats))
        return tried[-1][:2]

    study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(trial, n_trials=trials, callbacks=[lambda study, _trial: None if another() else study.stop()])
    fitting = [entry for entry in tried if entry[1] <= bits]
    if not fitting:
        least = min(entry[1] for entry in tried)
        raise SettingsError(f"None of {len(tried)} trials of the paper's search takes at most {bits:.2f} bits; the smallest takes {least:.2f}.")
    return min(fitting, key=lambda entry: entry[0])[2]


# ---- measuring the model -------------------------------------------------------------------------------------------------------------


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


# ---- measuring the result ------------------------------------------------------------------------------------------------------------


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
        return self.difference > 2 * self.standard_error

    @property
    def better(self) -> bool:
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


# ---- command -------------------------------------------------------------------------------------------------------------------------


class Steps:
    """A progress bar per step, on stderr."""

    def __init__(self, quiet: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.quiet, console = quiet, Console(stderr=True)
        self.bar = Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)

    def say(self, sentence: str) -> None:
        if not self.quiet:
            self.bar.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        step = self.bar.add_task(name, total=total)
        try:
            yield lambda n: self.bar.advance(step, n)
        finally:
            self.bar.remove_task(step)


@dataclass
class Request:
    """What is asked for; see `calibrate`."""

    bits: float | None = None
    budget: tuple[float, int] | None = None
    max_kld: float | None = None
    texts: Sequence[Path] = ()
    tokens: int | None = None
    policy: str = "gain"
    t16_t4: tuple[float, float] | None = None
    window: int | None = None
    sinks: int | None = None
    minutes: float = 2
    seed: int = 1
    threads: int | None = None
    device: str = "auto"
    quiet: bool = True


def calibrate(model: str, **options: Any) -> tuple[Profile, dict[str, Any]]:
    """A profile for the model, and what was found on the way. The options are the fields of `Request`:

    bits: body bits to take at most; None: those of the default preset. budget: instead, MiB that the cache may take at so many tokens; then a
    window that is not given is chosen too. max_kld: instead, the fewest bits whose mean divergence on held-out text, of every kind, is at most
    that. tokens: of each kind of text, at most; None: TOKENS. minutes: how long all of it may take; what does not fit is left out, and
    `found["coarser"]` says what. policy: "gain" (least expected harm), "paper" (fixed thresholds t16 and t4) or "search" (the paper's search).
    window, sinks: tokens in F16. threads: None: physical cores. device: as for bridge.Llama. quiet: no progress.
    Ctrl-C once the model has been read gives the best that is known then; `found["interrupted"]` says what that is.
    Raises the errors of bridge.Llama, SettingsError also if the minutes are too few, and ProfileError if no formats keep max_kld.
    """
    request = Request(**options)
    if not 0 < request.minutes < math.inf:
        raise SettingsError(f"minutes is {request.minutes!r}; it must be a number above 0.")
    if request.policy == "search":
        load_optuna()
    steps = Steps(request.quiet)
    with tempfile.TemporaryDirectory() as folder, steps.bar:
        run = _Run(model, request, Clock(request.minutes), steps, Path(folder))
        try:
            return run.profile()
        except KeyboardInterrupt:
            kept = run.so_far()
            if kept is None:
                raise
            return kept
        finally:
            run.close()


class _Run:
    """A calibration on its way."""

    def __init__(self, model: str, request: Request, clock: Clock, steps: Steps, folder: Path) -> None:
        self.model, self.request, self.clock, self.steps, self.folder = model, request, clock, steps, folder
        self.file = open_model(model)
        self.presets = presets_of(self.file)
        self.threads = request.threads or physical_cores()
        self.windows = {} if request.budget is None else sizes_of_budget(self.file, *request.budget, request.window, request.sinks)
        bits = next(iter(self.windows.values()), request.bits)
        self.bits: float = preset_within(self.presets, default_bits(self.file)).bits if bits is None else bits
        self.window = WINDOW if request.window is None else request.window
        self.sinks = SINKS if request.sinks is None else request.sinks
        self.chosen = request.window  # of the profile
        self.reader: Reader | None = None
        self.calibration: Calibration | None = None
        self.kept: tuple[Profile, dict[str, Verdict]] | None = None  # of --max-kld: what keeps it
        self.speed = 1.0
        self.coarser: list[str] = []

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()

    # ---- the steps

    def profile(self) -> tuple[Profile, dict[str, Any]]:
        self.read()
        request = self.request
        if len(self.windows) > 1 and self.plan.windows:
            assert self.calibration is not None and self.reader is not None
            with self.steps("window", len(self.windows) * self.reader.n_tokens) as self.calibration.progress:
                self.chosen = best_window(self.calibration, self.windows)
            self.bits = self.windows[self.chosen]
        if request.max_kld is not None:
            profile, verdicts = self.fewest_bits(request.max_kld)
            return profile, self.found(profile, verdicts)
        formats, fell_back = self.formats(self.bits)
        profile = self.fallback() if fell_back else self.make(formats, self.chosen)
        verdicts = self.judge(profile, self.bits, None if fell_back else self.fallback())
        unproven = any(v.worse for v in verdicts.values()) or not any(v.better for v in verdicts.values())
        if request.policy == "gain" and not fell_back and unproven:
            fell_back, profile = True, self.fallback()
            for verdict in verdicts.values():
                _, (_, figures), *others = verdict.figures.items()
                verdict.figures = {PROFILE: figures, **dict(others)}
        return profile, self.found(profile, verdicts, fell_back)

    def read(self) -> None:
        """Open the model, read the texts, find out what there is time for, and measure the parts of the cache."""
        request, fit = self.request, preset_within(self.presets, self.bits)
        n_ctx = min(LONGEST, self.file.n_ctx_train or LONGEST)
        threads: dict[str, Any] = {"n_threads": self.threads, "n_threads_batch": self.threads}
        llm = Llama(self.model, stock="f16", n_ctx=n_ctx, n_batch=PAGE_CELLS, verbose=False, device=request.device, **threads)
        try:
            texts = encode_texts(llm, request.texts)
            self.plan = self.make_plan(llm, fit)
            material = gather(llm, texts, self.plan, request.seed)
        finally:
            llm.close()
        self.held_out = material.held_out
        options: dict[str, Any] = {"window": self.window, "sinks": self.sinks, "threads": self.threads, "device": request.device}
        self.reader = Reader(self.model, material.calibration, **options)
        self.calibration, self.speed = read_whole(self.reader, self.file.n_layers, fit.formats, self.steps, compared=self.plan.tries > 0)
        # Coarse formats, whatever the size: what finer ones do to a single head drowns in the rounding of everything else.
        probe = preset_within(self.presets, LEAST_BITS).formats
        if self.plan.parts:
            what = measure_parts(self.calibration, probe, self.steps, self.speed, 20 * request.minutes, self.clock.left() - self.later())
            if what not in ("layer", "head"):
                self.coarser.append(f"{what} were rounded at a time instead of one" if what else "no part of the cache was measured by itself")
        else:
            even_weights(self.calibration.tables, probe, parts_of(self.calibration.tables, probe, 1, by_head=False), list(self.reader.passages))

    def make_plan(self, llm: Llama, fit: Preset) -> Plan:
        request = self.request
        tries = {"gain": len(TRUSTS) + len(TILTS), "paper": 0, "search": PAPER_LEAST_TRIALS}[request.policy]
        demand = Demand(
            tokens=request.tokens or TOKENS,
            least=least_tokens(self.window, self.sinks),
            tries=tries,
            parts=request.policy == "gain",
            sizes=1 if request.max_kld is None else LEAST_SIZES,
            windows=len(self.windows) if len(self.windows) > 1 else 0,
            judged=3 if nearest_preset(self.presets, self.bits).name == fit.name else 4,
        )
        speed = measure_speed(llm)
        if demand.least / speed.read < 0.03 * 60 * request.minutes:
            options: dict[str, Any] = {"window": self.window, "sinks": self.sinks, "threads": self.threads, "device": request.device}
            speed = measure_speed_rounded(self.model, fit.formats, speed, **options)
        plan = make_plan(demand, speed, self.clock)
        parts = max(0.0, min(20 * request.minutes, self.clock.left() - plan.seconds)) if plan.parts else 0
        self.steps.say(
            f"{Path(self.model).name} is read with {speed.words()} tokens a second here: this takes about "
            f"{(self.clock.taken() + plan.seconds + parts) / 60:.1f} minutes."
        )
        if plan.tokens < demand.tokens:
            self.coarser.append(f"{plan.tokens} tokens of each kind of text were read instead of {demand.tokens}")
        if not plan.every_kind:
            self.coarser.append("no solved problems were read")
        if plan.tries < demand.tries:
            self.coarser.append(f"{plan.tries or 'no'} allocation was tried instead of {demand.tries}")
        if demand.parts and not plan.parts:
            self.coarser.append("no part of the cache was measured by itself")
        return plan

    def later(self) -> float:
        """Seconds for what is done after the parts were measured."""
        assert self.reader is not None
        sizes = 1 if self.request.max_kld is None else LEAST_SIZES
        passes = self.plan.tries * sizes + (len(self.windows) if len(self.windows) > 1 and self.plan.windows else 0)
        return passes * self.reader.n_tokens / self.speed + sizes * self.judging()

    def judging(self) -> float:
        """Seconds for one measurement on the held-out text."""
        return 3 * sum(len(p.tokens) for some in self.held_out.values() for p in some) / self.speed

    def another(self) -> bool:
        """Whether one more pass over the text leaves time for the held-out text."""
        assert self.reader is not None
        return self.clock.left() > self.reader.n_tokens / self.speed + self.judging()

    def formats(self, bits: float) -> tuple[Formats, bool]:
        """The allocation for a size, and whether the preset's formats are to be taken in its place."""
        calibration, request = self.calibration, self.request
        assert calibration is not None and self.reader is not None
        if request.policy == "paper":
            return thresholds(calibration.tables, *(request.t16_t4 or (1.85, 1.58))), False
        if request.policy == "search":
            with self.steps("the paper's search", PAPER_TRIALS * self.reader.n_tokens) as calibration.progress:
                return best_thresholds(calibration, bits, PAPER_TRIALS, request.seed, self.another), False
        with self.steps(f"formats of {bits:.2f} bits", self.plan.tries * self.reader.n_tokens) as calibration.progress:
            formats, objective = best_formats(calibration, bits, self.plan.tries, self.another)
        return formats, objective is not None and objective >= 1

    def make(self, formats: Formats, window: int | None) -> Profile:
        assert self.calibration is not None
        return make_profile(self.file, formats, self.calibration.tables, window, self.request.sinks)

    def fallback(self) -> Profile:
        """The formats of the preset of the size, with what was seen of queries and keys."""
        return self.make(preset_within(self.presets, self.bits).formats, self.request.window)

    def judge(self, profile: Profile, bits: float, fallback: Profile | None) -> dict[str, Verdict]:
        """The profile, what it may fall back to and the preset of the nearest size on held-out text."""
        fit, nearest = preset_within(self.presets, bits), nearest_preset(self.presets, profile.body_bits or bits)
        caches = {PROFILE: str(self.folder / "profile.gguf")}
        write_profile(caches[PROFILE], profile)
        if fallback is not None:
            called = f"formats of {fit.name}"
            caches[called] = str(self.folder / "fallback.gguf")
            write_profile(caches[called], fallback)
        if fallback is None or nearest.name != fit.name:
            caches[nearest.name] = nearest.name
        tokens = int(1.1 * max(0.0, self.clock.left()) * self.speed / (1 + len(caches)))
        passages = shortened(self.held_out, tokens, least_tokens(self.window, self.sinks))
        options = {"window": self.request.window, "sinks": self.request.sinks, "threads": self.threads, "device": self.request.device}
        return measure(self.model, caches, passages, self.steps, **options)

    def fewest_bits(self, limit: float) -> tuple[Profile, dict[str, Verdict]]:
        """Bisection over the bits: the divergence falls as they grow."""
        low, high, bits = LEAST_BITS, MOST_BITS, self.bits
        worst, last = math.inf, bits
        for attempt in range(MOST_SIZES):
            began = self.clock.taken()
            profile = self.make(self.formats(bits)[0], self.chosen)
            verdicts = self.judge(profile, bits, None)
            worst, last = max(verdict.profile["kld_mean"] for verdict in verdicts.values()), bits
            if worst <= limit:
                self.kept, high = (profile, verdicts), bits
            else:
                low = bits
            if high - low < 0.1:
                break
            if attempt + 1 < MOST_SIZES and self.clock.left() < self.clock.taken() - began:
                self.coarser.append(f"{attempt + 1} sizes were tried")
                break
            bits = math.sqrt(low * high)
        if self.kept is None:
            more = "" if high - low < 0.1 else " More --minutes would try larger ones."
            raise ProfileError(f"Even {last:.1f} bits have a mean divergence of {worst:.4f} on held-out text, more than {limit:g}.{more}")
        return self.kept

    # ---- what came of it

    def found(self, profile: Profile, verdicts: dict[str, Verdict], fell_back: bool = False, interrupted: str = "") -> dict[str, Any]:
        source = ", ".join(path.name for path in self.request.texts) or "the default text"
        profile.measured = [record_of(source if kind == "text" else kind, verdict.profile) for kind, verdict in verdicts.items()]
        return {
            "preset": preset_within(self.presets, self.bits).name,
            "nearest": nearest_preset(self.presets, profile.body_bits or self.bits),
            "fell_back": fell_back,
            "held_out": verdicts,
            "tokens": self.plan.tokens,
            "coarser": self.coarser,
            "seconds": self.clock.taken(),
            "interrupted": interrupted,
        }

    def so_far(self) -> tuple[Profile, dict[str, Any]] | None:
        """The best that is known before all is measured, or None if the model has not been read."""
        if self.calibration is None:
            return None
        if self.kept is not None:
            return self.kept[0], self.found(*self.kept, interrupted="the smallest size so far that keeps the divergence")
        best = self.calibration.best
        if self.request.policy == "gain" and self.request.max_kld is None and best is not None and best[0] < 1:
            profile = self.make(best[1], self.chosen)
            what = "an allocation that is better than the preset on what was read; it was not measured on other text"
            return profile, self.found(profile, {}, interrupted=what)
        profile = self.fallback()
        name = preset_within(self.presets, self.bits).name
        return profile, self.found(profile, {}, True, f"the formats of the preset {name}, with what was seen of queries and keys")


def shortened(passages: dict[str, list[Passage]], tokens: int, least: int) -> dict[str, list[Passage]]:
    """About so many tokens of the passages, the same share of each kind, but at least one of `least` tokens."""
    total = sum(len(p.tokens) for some in passages.values() for p in some)
    if total <= tokens:
        return passages
    found: dict[str, list[Passage]] = {}
    for kind, some in passages.items():
        left = sum(len(p.tokens) for p in some) * tokens // total
        left = max(left, least) if not found else left
        for passage in some:
            n = min(len(passage.tokens), left)
            if n >= min(least, len(passage.tokens)) and n > passage.first + PAGE_CELLS:
                found.setdefault(kind, []).append(Passage(passage.tokens[:n], passage.first))
                left -= n
    return found or {kind: some[:1] for kind, some in list(passages.items())[:1]}


def make_profile(model: ModelFile, formats: Formats, tables: Sequence[Tables | None], window: int | None, sinks: int | None) -> Profile:
    """The formats with what was seen of queries and keys."""
    layers: Formats = []
    for layer, seen in zip(formats, tables, strict=True):
        if layer is None or seen is None:
            layers.append(layer)
        else:
            layers.append(LayerProfile(layer.tiers, layer.values, seen.q_abs, seen.key_range))
    profile = Profile(model.fingerprint, layers, window, sinks)
    profile.body_bits = profile.packed_bits(model.head_size_v)
    profile.made_by = f"mixkvq.calibrate {importlib.metadata.version('mixkvq')}"
    return profile


def _two_numbers(_context: Any, _parameter: Any, text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        t16, t4 = (float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not two numbers: T16,T4") from None
    if not all(0 <= t < math.inf for t in (t16, t4)):
        raise click.BadParameter(f"{text!r} is not two numbers of 0 or more")
    return t16, t4


@command.tool(help=(__doc__ or "").split("\n\n")[0])
@click.argument("model", type=command.Model())
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text like what the model will read; may be repeated. The last third of each is held out.  [default: a text that comes with MixKVQ]",
)
@click.option(
    "--bits",
    type=command.Number(LEAST_BITS, MOST_BITS),
    help="Body bits per element to take at most.  [default: those of `balanced`]",
)
@click.option("--budget-mib", type=command.Number(0, 1e9, min_open=True), help="Instead: what the whole cache may take at --ctx tokens.")
@click.option("--ctx", type=click.IntRange(256, 1 << 30), help="Tokens of context that --budget-mib is for.")
@click.option(
    "--max-kld",
    type=command.Number(0, 1e3, min_open=True),
    help="Instead: as few bits as keep the mean divergence on held-out text at that, in nats.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The profile.  [default: MODEL.mixkvq.gguf beside the model, where it is found automatically]",
)
@command.force_option()
@click.option(
    "--policy",
    type=click.Choice(["gain", "paper", "search"]),
    default="gain",
    show_default=True,
    help="Least expected harm; the paper's thresholds; the paper's search for them (needs Optuna).",
)
@click.option("--thresholds", "t16_t4", callback=_two_numbers, help="T16,T4 of --policy paper.  [default: 1.85,1.58]")
@click.option("--window", type=command.F16_TOKENS, help="Recent tokens in F16.  [default: 128; with --budget-mib what diverges least]")
@click.option("--sinks", type=command.F16_TOKENS, help="First tokens in F16.  [default: 128]")
@click.option("--tokens", type=click.IntRange(FEWEST_TOKENS, 1 << 20), default=TOKENS, show_default=True,
              help="Of each kind of text, to calibrate and to measure, at most.")  # fmt: skip
@click.option("--minutes", type=command.Number(min=0.1, max=1e5), default=2, show_default=True, help="How long it may take; less is coarser.")
@click.option("--seed", type=command.SEED, default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help=f"Where the model is computed: {DEVICE_HELP}.")
@click.option("--threads", type=command.THREADS, help="Threads.  [default: physical cores]")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def cli(model, texts, bits, budget_mib, ctx, max_kld, out, force, policy, t16_t4, window, sinks, tokens, minutes, seed, device, threads, quiet):
    goal = {"bits": bits, "budget_mib": budget_mib, "ctx": ctx, "max_kld": max_kld}
    command.typed_first(goal, ("bits",), ("budget_mib", "ctx"), ("max_kld",))
    bits, budget_mib, ctx, max_kld = goal.values()
    if sum(option is not None for option in (bits, budget_mib, max_kld)) > 1:
        raise click.UsageError("--bits, --budget-mib and --max-kld say the same thing in three ways: give one of them.")
    if (budget_mib is None) != (ctx is None):
        raise click.UsageError("--budget-mib and --ctx go together: so many MiB for so many tokens.")
    if max_kld is not None and policy != "gain":
        raise click.UsageError("--max-kld goes with --policy gain.")
    if t16_t4 is not None and policy != "paper":
        raise click.UsageError("--thresholds goes with --policy paper.")
    out = Path(side_car(model)) if out is None else out
    check_output(out, "profile", force=force, inputs=[model, *texts])
    llama().quiet_log()
    with _stopped(out):
        profile, found = calibrate(
            model, bits=bits, budget=None if budget_mib is None else (budget_mib, ctx), max_kld=max_kld, texts=texts, tokens=tokens, policy=policy,
            t16_t4=t16_t4, window=window, sinks=sinks, minutes=minutes, seed=seed, threads=threads, device=check_device(device), quiet=quiet,
        )  # fmt: skip
    try:
        write_profile(out, profile, overwrite=force)  # it may have appeared meanwhile
    except (OSError, SettingsError) as e:
        instead = Path(tempfile.mkdtemp(prefix="mixkvq-")) / out.name
        write_profile(instead, profile)
        raise ProfileError(f"{out} cannot be written any more ({getattr(e, 'strerror', None) or e}); the profile is in {instead}.") from None
    finally:
        if not quiet and found["held_out"]:
            _print_table(Console(width=max(110, Console().width)), profile, found)
    if found["interrupted"]:
        return command.interrupted(f"{out} has {found['interrupted']}. " + _how_to_use(out, model))
    if not quiet:
        _print_words(profile, found, out, model)
    return 0


@contextlib.contextmanager
def _stopped(out: Path) -> Iterator[None]:
    """After Ctrl-C before anything is known."""
    try:
        yield
    except KeyboardInterrupt:
        command.interrupted(f"The model has not been read yet, so {out} is not written.")
        raise


def _print_words(profile: Profile, found: dict[str, Any], out: Path, model: str) -> None:
    if found["coarser"]:
        click.echo(f"The profile is coarser than with more --minutes: {'; '.join(found['coarser'])}.")
    if found["fell_back"]:
        click.echo(f"No allocation was better than the preset {found['preset']} on text of every kind, so the profile has the preset's formats.")
    nearest = found["nearest"]
    click.echo(f"The preset of the nearest size is {nearest.name}, of {nearest.bits:.2f} bits.")
    window = f", a window of {profile.window} tokens" if profile.window is not None else ""
    click.echo(f"{out} written in {found['seconds']:.0f} s: {profile.body_bits:.2f} body bits{window}. " + _how_to_use(out, model))


def _how_to_use(out: Path, model: str) -> str:
    found = Path(side_car(model)).resolve() == out.resolve()
    return "It is used with this model from now on." if found else f"Use it with --kv {out}."


def _print_table(console: Console, profile: Profile, found: dict[str, Any]) -> None:
    columns = ("held-out text", "cache", "body bits", "mean KLD", "+-", "median", "99.9 %", "same top", "perplexity ratio")
    table = Table(*columns, title="Against F16, decode-style")
    for kind, verdict in found["held_out"].items():
        for name, figures in verdict.figures.items():
            error = figures["kld_standard_error"]
            table.add_row(
                kind,
                name,
                f"{figures['body_bits']:.2f}",
                f"{figures['kld_mean']:.5f}",
                "" if error is None else f"{error:.5f}",
                f"{figures['kld_median']:.5f}",
                f"{figures['kld_99.9%']:.4f}",
                f"{figures['same_top']:.2%}",
                f"{figures['perplexity_ratio']:.4f}",
            )
        table.add_section()
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    return command.run(cli, "mixkvq.calibrate", arguments)


if __name__ == "__main__":
    sys.exit(main())
