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
from bridge.library import native
from bridge.machine import physical_cores
from bridge.model_file import ModelFile, open_model

from . import command, tasks
from .allocate import Tables, allocate_by_kind, body_bits, thresholds
from .caches import SINKS, WINDOW, total_bits
from .compare import Passage, compare_caches, feed, standard_error, tokenize_text, work
from .profile import LayerProfile, Profile, check_target, side_car, uniform_profile, write_profile
from .reference import PAGE_CELLS
from .sensitivity import Collector, Reader, measure_weights

DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")
PIECE, HELD_OUT = "%%%%", "%%%% held out"
LONGEST = 4096  # tokens of a passage
LEAST_TOKENS = 8 * PAGE_CELLS
TOKENS, FEWEST_TOKENS = 3584, 1024  # of each kind of text
PASSES = 25  # over them in all: of problems there are twice as many, the preset and four allocations are tried, three caches are measured
LEAST_BY_HEAD = 2 * PAGE_CELLS  # tokens of a kind with which a head's effect is told from another's
LONG_SAMPLE = 5 * PAGE_CELLS  # three times as many reach beyond the prompt of a long chain
KEY_GROUPS = (128, 64)  # tokens per scale that are tried
TRUSTS = (1.0, 0.75)  # in the weights that were measured
TILTS = (0.5, 2.0)  # weight of keys against that of values, tried beside 1
WINDOWS = (128, 256, 512)  # tried where a budget of memory can pay for them
LONG_IN_WINDOWS = 4  # a passage of so many windows shows what they are worth
PAPER_RANGE = (0.1, 2.0)  # of both thresholds in the paper's search
PAPER_TRIALS = 30

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


def gather(llm: Llama, texts: Sequence[Path], tokens: int, own: int, seed: int) -> Material:
    """At most `tokens` tokens of each kind for each of the two purposes (of problems twice as many to calibrate), and `own` of the model's own words.

    Raises SettingsError if a text is too short to calibrate with.
    """
    material = Material()
    longest = min(LONGEST, llm.n_ctx())
    for part, text, name in zip((material.calibration, material.held_out), _halves(texts), ("calibrate", "hold out"), strict=True):
        encoded, bos = tokenize_text(llm, text.encode())
        if len(encoded) < LEAST_TOKENS:
            raise SettingsError(
                f"The texts have {len(encoded)} tokens to {name}, and {LEAST_TOKENS} are needed: give about {4 * LEAST_TOKENS} tokens in all, "
                "for a third is held out."
            )
        encoded = encoded[:tokens]
        n = -(-len(encoded) // (longest - len(bos)))
        part["text"] = [Passage(bos + piece.tolist()) for piece in np.array_split(np.array(encoded), n)]
        # Only the solutions of problems count, about half.
        if found := _derivations(llm, tokens if part is material.held_out else 2 * tokens, longest, Random(f"{name} {seed}")):
            part["retrieval"] = found
    if own >= 3 * PAGE_CELLS:
        material.calibration["own"] = [Passage(_own_words(llm, min(own, longest), seed))]
    return material


def affordable_tokens(llm: Llama, minutes: float) -> int:
    """TOKENS, but fewer on a machine that reads the model so slowly that calibration would take more than thrice as long as it may."""
    some = [i % llm.n_vocab() for i in range(min(PAGE_CELLS, llm.n_ctx()))]
    for _ in range(2):  # the first time memory is set up
        llm.reset()
        begin = time.perf_counter()
        llm.eval(some)
        speed = len(some) / (time.perf_counter() - begin)
    llm.reset()
    seconds = PASSES * TOKENS / speed
    return TOKENS if seconds <= 180 * minutes else max(FEWEST_TOKENS, int(TOKENS * 60 * minutes / seconds))


def _halves(texts: Sequence[Path]) -> tuple[str, str]:
    """Text to calibrate with and text to hold out: of given files the last third of each."""
    if not texts:
        first, _, second = DEFAULT_TEXT.read_text(encoding="utf-8").partition(f"\n{HELD_OUT}\n")
        return _joined(first), _joined(second)
    parts = [path.read_text(encoding="utf-8", errors="replace") for path in texts]
    cuts = [len(text) * 2 // 3 for text in parts]
    return "\n\n".join(t[:n] for t, n in zip(parts, cuts)), "\n\n".join(t[n:] for t, n in zip(parts, cuts))


def _joined(text: str) -> str:
    return "\n\n".join(piece.strip() for piece in text.split(f"\n{PIECE}\n"))


def _derivations(llm: Llama, tokens: int, longest: int, rng: Random) -> list[Passage]:
    """Solved problems as chat. The problem is random, so only the solution's tokens count.

    At least half are long chains of lookups: there a small error of the keys shows. Then all tasks take turns.
    """
    found, left = [], tokens
    for attempt in range(200):
        task, level = tasks.TASKS[attempt % len(tasks.TASKS)], "hard" if attempt % 2 else "medium"
        if attempt < 50 and 2 * left > tokens:
            task, level = "chain", "hard"
        problem = tasks.make(task, rng, tasks.LEVELS.index(level))
        prompt = llm.tokenize(tasks.chat(problem.prompt).encode(), add_bos=True, special=True)
        solution = tasks.completion(problem.reasoning, problem.answer) + tasks.END_OF_TURN
        answer = llm.tokenize(solution.encode(), add_bos=False, special=True)
        if 4 * PAGE_CELLS <= len(prompt) + len(answer) <= min(longest, left):
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


def preset_of_size(model: str, bits: float) -> tuple[str, Formats, float]:
    """The largest preset that takes no more body bits on this model, or the smallest one: its name, formats and bits."""
    sizes = open_model(model).head_size_v
    found = []
    for preset in native().presets():
        if preset["value_group"] == 0:  # the allocation has rotated values only
            profile = uniform_profile(model, preset["name"])
            found.append((profile.packed_bits(sizes), str(preset["name"]), profile.layers))
    found.sort(key=lambda entry: entry[0])
    fitting = [entry for entry in found if entry[0] <= bits + 0.005] or found[:1]
    body, name, layers = fitting[-1]
    return name, layers, body


def bits_of_budget(model: ModelFile, mib: float, n_ctx: int, window: int, sinks: int) -> float:
    """Body bits with which a cache of n_ctx cells takes at most `mib` MiB: what is left when the F16 pages are paid.

    Raises SettingsError if that is less than the smallest formats take.
    """
    elements = model.cache_elements(n_ctx)
    fixed, slope = total_bits(0, 0, n_ctx, window, sinks), total_bits(1, 1, n_ctx, window, sinks) - total_bits(0, 0, n_ctx, window, sinks)
    share = 0.995  # tables and scratch
    bits = (8 * mib * 2**20 * share / elements - fixed) / slope
    if bits < LEAST_BITS:
        least = (fixed + LEAST_BITS * slope) * elements / 8 / share / 2**20
        raise SettingsError(f"A context of {n_ctx} tokens of {model.name} needs at least {math.ceil(least)} MiB; {mib:g} MiB are not enough.")
    return bits


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


TOLERANCE = 0.05
LEAST_BITS = 2.25
MOST_BITS = 8.0


# ---- search --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Calibration:
    """A reader with exact predictions, what was collected of every layer, and the divergence that the preset of the size has, by kind of text."""

    reader: Reader
    tables: list[Tables | None]
    preset: dict[str, float]
    progress: Callable[[int], None]

    def objective(self, formats: Formats) -> float:
        """The divergence over the reference preset's, below 1 if it is less.

        The geometric mean over the kinds of text; but where a kind is worse than with the preset by more than such samples tell apart, that counts.
        """
        found = self.reader.divergence(formats, self.tables, self.progress)
        ratios = {kind: max(kld, 1e-9) / self.preset[kind] for kind, kld in found.items()}
        worst = max(ratios.values())
        return worst if worst > 1 + TOLERANCE else math.exp(sum(share * math.log(ratios[kind]) for kind, share in self.shares.items()))

    @property
    def shares(self) -> dict[str, float]:
        """How much a kind of text counts: solved problems as much as all the rest."""
        others = [kind for kind in self.preset if kind != "retrieval"]
        half = len(others) < len(self.preset)
        return {kind: 0.5 if kind == "retrieval" else (0.5 if half else 1.0) / len(others) for kind in self.preset}


def best_formats(calibration: Calibration, bits: float) -> tuple[Formats, float]:
    """The allocation for a size that measures best, and its objective.

    Tried are how far the measured weights are trusted against equal shares for all parts (they come from a sample), then the balance of keys
    and values.
    """
    tried: dict[tuple[float, float], tuple[Formats, float]] = {}

    def attempt(trust: float, tilt: float) -> float:
        formats = allocate_by_kind([None if t is None else _moderated(t, trust, tilt) for t in calibration.tables], bits, calibration.shares)
        tried[trust, tilt] = formats, calibration.objective(formats)
        return tried[trust, tilt][1]

    trust = min(TRUSTS, key=lambda trust: attempt(trust, 1.0))
    for tilt in TILTS:
        attempt(trust, tilt)
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


def best_thresholds(calibration: Calibration, bits: float, trials: int, seed: int) -> Formats:
    """The paper's search: Optuna's TPE over the two thresholds, for quality and few bits at once; the best that is small enough.

    Quality is our objective, not accuracy on GSM8K. The thresholds are in tens of the model's mean salience, because their scale does not carry
    over between models. Raises SettingsError if Optuna is missing or no trial is small enough.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise SettingsError("The paper's search needs Optuna: pip install 'mixkvq[search]'.") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    saliences = [t.salience for t in calibration.tables if t is not None and t.salience is not None]
    unit = float(np.mean([s.mean() for s in saliences]))
    tried: list[tuple[float, float, Formats]] = []

    def trial(t: Any) -> tuple[float, float]:
        t16, t4 = (unit * 10 * t.suggest_float(name, *PAPER_RANGE) for name in ("t16", "t4"))
        formats = thresholds(calibration.tables, t16, t4)
        tried.append((calibration.objective(formats), body_bits(calibration.tables, formats), formats))
        return tried[-1][:2]

    study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(trial, n_trials=trials)
    fitting = [entry for entry in tried if entry[1] <= bits]
    if not fitting:
        least = min(entry[1] for entry in tried)
        raise SettingsError(f"None of {trials} trials of the paper's search takes at most {bits:.2f} bits; the smallest takes {least:.2f}.")
    return min(fitting, key=lambda entry: entry[0])[2]


def prepare(reader: Reader, n_layers: int, preset: Formats, probe: Formats, steps: Steps, *, seconds: float) -> Calibration:
    """Read everything exactly and with the formats of `preset`, then a sample with each part of the cache rounded by itself to those of `probe`.

    A part is a head's keys or values if some pages of every kind can be read with each of them in `seconds`, else a layer's; the sample is as long
    as `seconds` allow.
    """
    collector = Collector(KEY_GROUPS)
    with steps("reading the text with an exact cache", reader.n_tokens) as progress:
        reader.read_exact(collector, progress)
    tables = collector.tables(n_layers)
    seen = [t for t in tables if t is not None]
    if not seen:
        raise SettingsError("The texts are too short for the cache to pack a single page.")
    with steps("the preset of this size", reader.n_tokens) as progress:
        begin = time.perf_counter()
        whole = reader.divergence(preset, tables, progress)
        tokens_per_second = reader.n_tokens / (time.perf_counter() - begin)
    n_layers, n_heads = 2 * len(seen), 2 * sum(t.n_heads for t in seen)
    n_shares = len(reader.passages) + 2 * ("retrieval" in reader.passages)  # three times as many tokens of problems as of another kind
    affordable = seconds * tokens_per_second / n_shares
    n_floors = len(seen)
    by_head = affordable / (n_heads + n_floors) >= LEAST_BY_HEAD
    n_parts = n_heads if by_head else n_layers
    n_tokens = int(affordable / (n_parts + n_floors))
    sample = reader.sample(max(n_tokens, LONG_SAMPLE) if n_tokens >= PAGE_CELLS else n_tokens)
    n_tokens = sum(n - 1 for some in sample.values() for _, n in some)
    with steps(f"{n_parts} parts, one {'head' if by_head else 'layer'} at a time", (n_parts + n_floors) * n_tokens) as progress:
        measure_weights(reader, tables, probe, by_head=by_head, sample=sample, progress=progress)
    return Calibration(reader, tables, {kind: max(kld, 1e-9) for kind, kld in whole.items()}, lambda n: None)


# ---- measuring the result ------------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """A kind of held-out text: the figures of both caches, and the mean paired difference of divergence, profile less preset."""

    profile: dict[str, Any]
    preset: dict[str, Any]
    difference: float
    standard_error: float

    @property
    def worse(self) -> bool:
        return self.difference > 2 * self.standard_error

    @property
    def better(self) -> bool:
        return self.difference < -2 * self.standard_error


def measure(
    model: str,
    profile: Path,
    preset: str,
    passages: dict[str, list[Passage]],
    window: int | None,
    sinks: int | None,
    threads: int,
    device: str,
    steps: Steps,
) -> dict[str, Verdict]:
    """Profile and preset on held-out text, by kind of text. window: of both; None: the profile's own, and the default."""
    found = {}
    with steps("measuring on text that was held out", work(2, [p for some in passages.values() for p in some], 2)) as progress:
        for kind, some in passages.items():
            options: dict[str, Any] = {"at_once": 2, "window": window, "sinks": sinks, "threads": threads, "device": device, "lengths": []}
            (group,) = compare_caches(model, [str(profile), preset], some, progress=progress, **options)
            ours, other = group[str(profile)], group[preset]
            differences = [np.subtract(a.kld, b.kld) for a, b in zip(ours.passages, other.passages, strict=True)]
            mean = float(np.concatenate(differences).mean())
            found[kind] = Verdict(ours.summary(), other.summary(), mean, standard_error(differences) or abs(mean) / 2)
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
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet)

    @contextlib.contextmanager
    def __call__(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        step = self.bar.add_task(name, total=total)
        try:
            yield lambda n: self.bar.advance(step, n)
        finally:
            self.bar.remove_task(step)


def calibrate(
    model: str,
    *,
    bits: float | None = None,
    budget: tuple[float, int] | None = None,
    max_kld: float | None = None,
    texts: Sequence[Path] = (),
    tokens: int | None = None,
    own: int = 384,
    policy: str = "gain",
    t16_t4: tuple[float, float] | None = None,
    window: int | None = None,
    sinks: int | None = None,
    minutes: float = 2,
    seed: int = 1,
    threads: int | None = None,
    device: str = "auto",
    quiet: bool = True,
) -> tuple[Profile, dict[str, Any]]:
    """A profile for the model, and what was found on the way.

    bits: body bits to take at most; None: those of the default preset. budget: instead, MiB that the cache may take at so many tokens; then a
    window that is not given is chosen too. max_kld: instead, the fewest bits whose mean divergence on held-out text, of every kind, is at most
    that. tokens: of each kind of text; None: TOKENS, or fewer if this machine would take more than thrice `minutes` for them; `found["tokens"]` says
    how many. policy: "gain" (least expected harm), "paper" (fixed thresholds t16 and t4) or "search" (the paper's search). device: as for
    bridge.Llama.
    Raises the errors of bridge.Llama, SettingsError, and ProfileError if no formats keep max_kld.
    """
    file = open_model(model)
    threads = threads or physical_cores()
    windows: dict[int, float] = {}
    if budget is not None:
        windows = sizes_of_budget(file, *budget, window, sinks)
        bits = next(iter(windows.values()))
    began = time.perf_counter()
    steps = Steps(quiet)
    fell_back = False
    with tempfile.TemporaryDirectory() as folder, steps.bar:
        n_ctx = min(LONGEST, file.n_ctx_train or LONGEST)
        llm = Llama(model, stock="f16", n_ctx=n_ctx, n_batch=PAGE_CELLS, n_threads=threads, n_threads_batch=threads, verbose=False, device=device)
        try:
            tokens = tokens or affordable_tokens(llm, minutes)
            material = gather(llm, texts, tokens, own, seed)
        finally:
            llm.close()
        if bits is None:
            bits = preset_of_size(model, uniform_profile(model).packed_bits(file.head_size_v))[2]
        name, preset, _ = preset_of_size(model, bits)
        own_window, own_sinks = WINDOW if window is None else window, SINKS if sinks is None else sinks
        reader = Reader(model, material.calibration, window=own_window, sinks=own_sinks, threads=threads, device=device)
        try:
            # Coarse formats, whatever the size: what finer ones do to a single head drowns in the rounding of everything else.
            calibration = prepare(reader, file.n_layers, preset, preset_of_size(model, LEAST_BITS)[1], steps, seconds=60 * minutes / 3)
            chosen = window
            if len(windows) > 1:
                with steps("window", len(windows) * reader.n_tokens) as calibration.progress:
                    chosen = best_window(calibration, windows)
                bits = windows[chosen]

            def find(bits: float) -> Profile:
                nonlocal fell_back
                fell_back = False
                if policy == "paper":
                    formats = thresholds(calibration.tables, *(t16_t4 or (1.85, 1.58)))
                elif policy == "search":
                    with steps("the paper's search", PAPER_TRIALS * reader.n_tokens) as calibration.progress:
                        formats = best_thresholds(calibration, bits, PAPER_TRIALS, seed)
                else:
                    with steps(f"formats of {bits:.2f} bits", (len(TRUSTS) + len(TILTS)) * reader.n_tokens) as calibration.progress:
                        formats, objective = best_formats(calibration, bits)
                    if objective >= 1 and max_kld is None:
                        fell_back, formats = True, preset
                return make_profile(file, formats, calibration.tables, window if fell_back else chosen, sinks)

            def judge(profile: Profile, preset: str) -> dict[str, Verdict]:
                path = Path(folder) / "candidate.gguf"
                write_profile(path, profile)
                return measure(model, path, preset, material.held_out, window, sinks, threads, device, steps)

            profile = find(bits)
            found = judge(profile, name)
            if max_kld is not None:
                profile, found, name = _fewest_bits(find, judge, model, max_kld, profile, found, name)
            elif policy == "gain" and not fell_back and (any(v.worse for v in found.values()) or not any(v.better for v in found.values())):
                fell_back = True
                profile = make_profile(file, preset, calibration.tables, window, sinks)
                found = judge(profile, name)
        finally:
            reader.close()
    source = ", ".join(path.name for path in texts) or "the default text"
    profile.measured = [record_of(source if kind == "text" else kind, verdict.profile) for kind, verdict in found.items()]
    return profile, {"preset": name, "fell_back": fell_back, "held_out": found, "tokens": tokens, "seconds": time.perf_counter() - began}


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


def _fewest_bits(
    find: Callable[[float], Profile], judge: Callable[[Profile, str], Any], model: str, limit: float, profile: Profile, found: Any, name: str
) -> tuple[Profile, Any, str]:
    """Bisection over the bits: the divergence falls as they grow."""

    def worst(found: dict[str, Verdict]) -> float:
        return max(verdict.profile["kld_mean"] for verdict in found.values())

    low, high = LEAST_BITS, MOST_BITS
    best: tuple[Profile, Any, str] | None = None
    bits = profile.body_bits or 3.2
    for attempt in range(7):
        if attempt:
            profile = find(bits)
            name = preset_of_size(model, bits)[0]
            found = judge(profile, name)
        if worst(found) <= limit:
            best, high = (profile, found, name), bits
        else:
            low = bits
        if high - low < 0.1:
            break
        bits = math.sqrt(low * high)
    if best is None:
        raise ProfileError(f"Even {high:.1f} bits have a mean divergence of {worst(found):.4f} on held-out text, more than {limit:g}.")
    return best


def _check_range(name: str, low: float, high: float) -> Callable[[Any, Any, float | None], float | None]:
    def check(_context: Any, _parameter: Any, value: float | None) -> float | None:
        if value is not None and not low <= value <= high:
            raise click.BadParameter(f"{value:g} {name}; give {low:g} to {high:g}.")
        return value

    return check


def _two_numbers(_context: Any, _parameter: Any, text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        t16, t4 = (float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not two numbers: T16,T4") from None
    return t16, t4


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.argument("model", type=click.Path(dir_okay=False))
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text like what the model will read; may be repeated. The last third of each is held out.  [default: a text that comes with MixKVQ]",
)
@click.option(
    "--bits",
    type=float,
    callback=_check_range("bits per element", LEAST_BITS, MOST_BITS),
    help="Body bits per element to take at most.  [default: those of `balanced`]",
)
@click.option("--budget-mib", type=click.FloatRange(min=0, min_open=True), help="Instead: what the whole cache may take at --ctx tokens.")
@click.option("--ctx", type=click.IntRange(min=256), help="Tokens of context that --budget-mib is for.")
@click.option(
    "--max-kld",
    type=click.FloatRange(min=0, min_open=True),
    help="Instead: as few bits as keep the mean divergence on held-out text at that, in nats.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The profile.  [default: MODEL.mixkvq.gguf beside the model, where it is found automatically]",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option(
    "--policy",
    type=click.Choice(["gain", "paper", "search"]),
    default="gain",
    show_default=True,
    help="Least expected harm; the paper's thresholds; the paper's search for them (needs Optuna).",
)
@click.option("--thresholds", "t16_t4", callback=_two_numbers, help="T16,T4 of --policy paper.  [default: 1.85,1.58]")
@click.option("--window", type=click.IntRange(0, 1 << 20), help="Recent tokens in F16.  [default: 128; with --budget-mib what diverges least]")
@click.option("--sinks", type=click.IntRange(0, 1 << 20), help="First tokens in F16.  [default: 128]")
@click.option("--tokens", type=click.IntRange(min=FEWEST_TOKENS), show_default=f"{TOKENS}, fewer if that takes far longer than --minutes",
              help="Of each kind of text, to calibrate and to measure.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(min=0.1), default=2, show_default=True, help="About how long it may take; less is coarser.")
@click.option("--seed", default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help=f"Where the model is computed: {DEVICE_HELP}.")
@click.option("--threads", type=click.IntRange(min=1), default=physical_cores, show_default="physical cores")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def cli(model, texts, bits, budget_mib, ctx, max_kld, out, force, policy, t16_t4, window, sinks, tokens, minutes, seed, device, threads, quiet):
    if sum(option is not None for option in (bits, budget_mib, max_kld)) > 1:
        raise click.UsageError("--bits, --budget-mib and --max-kld say the same thing in three ways: give one of them.")
    if (budget_mib is None) != (ctx is None):
        raise click.UsageError("--budget-mib and --ctx go together: so many MiB for so many tokens.")
    if max_kld is not None and policy != "gain":
        raise click.UsageError("--max-kld goes with --policy gain.")
    if t16_t4 is not None and policy != "paper":
        raise click.UsageError("--thresholds goes with --policy paper.")
    if budget_mib is not None:
        sizes_of_budget(open_model(model), budget_mib, ctx, window, sinks)
    out = Path(side_car(model)) if out is None else out
    check_target(out)
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists; give --force to replace it, or another file with -o.")
    profile, found = calibrate(
        model, bits=bits, budget=None if budget_mib is None else (budget_mib, ctx), max_kld=max_kld, texts=texts, tokens=tokens, policy=policy,
        t16_t4=t16_t4, window=window, sinks=sinks, minutes=minutes, seed=seed, threads=threads, device=check_device(device), quiet=quiet,
    )  # fmt: skip
    write_profile(out, profile)
    if not quiet:
        if tokens is None and found["tokens"] < TOKENS:
            click.echo(
                f"This machine reads the model slowly: {found['tokens']} tokens of each kind of text were used, not {TOKENS}. More minutes or "
                "--tokens make the profile better."
            )
        _print_table(Console(width=max(110, Console().width)), profile, found)
        if found["fell_back"]:
            click.echo(f"No allocation was better than the preset {found['preset']} on text of every kind, so the profile has the preset's formats.")
        window = f", a window of {profile.window} tokens" if profile.window is not None else ""
        click.echo(f"{out} written in {found['seconds']:.0f} s: {profile.body_bits:.2f} body bits{window}. " + _how_to_use(out, model))


def _how_to_use(out: Path, model: str) -> str:
    found = Path(side_car(model)).resolve() == out.resolve()
    return "It is used with this model from now on." if found else f"Use it with --kv {out}."


def _print_table(console: Console, profile: Profile, found: dict[str, Any]) -> None:
    columns = ("held-out text", "cache", "body bits", "mean KLD", "+-", "median", "99.9 %", "same top", "perplexity ratio")
    table = Table(*columns, title="Against F16, decode-style")
    for kind, verdict in found["held_out"].items():
        for name, figures in (("this profile", verdict.profile), (found["preset"], verdict.preset)):
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
