"""Make a profile for a model: which precision each layer, head and kind of cache gets, measured on the model itself.

The model reads a calibration text with an exact cache that shows its pages. Then it reads it again and again with one part of the cache
rounded, which tells how much that part matters, and bits go where they prevent most harm. The result is measured on text that was held out,
against the largest preset that takes no more bits. Unless it is better there, the profile holds the preset's formats, with the bits that are left
where they help if that is better, and says so.

`python -m mixkvq.calibrate` is the command.
"""

from __future__ import annotations

import importlib.metadata
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge import Llama
from bridge.computing import Share

from ..core.errors import ProfileError, SettingsError
from ..core.machine import physical_cores
from ..core.model_file import ModelFile, open_model
from ..core.profile import LayerProfile, Profile, write_profile
from ..core.reference import PAGE_CELLS
from . import exact
from .allocate import Tables, thresholds
from .budget import SPARE, Clock, Demand, Plan, default_seconds, least_tokens, make_plan
from .caches import SINKS, WINDOW
from .compare import Passage
from .material import LONGEST, encode_texts, gather
from .measure import (
    LONG_SAMPLE,
    PROFILE,
    Verdict,
    is_better,
    measure,
    measure_parts,
    measure_speed,
    measure_speed_rounded,
    passes_of_parts,
    read_whole,
    record_of,
    shares_of_sample,
)
from .search import (
    PAPER_LEAST_TRIALS,
    PAPER_TRIALS,
    TILTS,
    TRUSTS,
    Calibration,
    best_formats,
    best_thresholds,
    best_window,
    load_optuna,
    more_than,
)
from .sensitivity import Reader, even_weights
from .sizes import LEAST_BITS, MOST_BITS, Formats, Preset, default_bits, nearest_preset, preset_within, presets_of, sizes_of_budget
from .steps import Steps, duration

TOKENS = 3584  # of each kind of text, if there is time
MOST_SIZES, LEAST_SIZES = 7, 3  # that are tried for a divergence, and for how many there has to be time
LEAST_FOR_PARTS = 0.4  # of the time that is left when the text has been read
TO_SPEND = 0.1  # bits beyond the preset's with which something can be bought


@dataclass
class Request:
    """What is asked for.

    bits: body bits to take at most; None: those of the default preset. budget: instead, MiB that the cache may take at so many tokens; then a
    window that is not given is chosen too. max_kld: instead, the fewest bits whose mean divergence on held-out text, of every kind, is at most
    that. tokens: of each kind of text, at most; None: TOKENS. minutes: how long all of it may take; None: `budget.default_seconds`. What does not
    fit is left out, and `found["coarser"]` says what. policy: "gain" (least expected harm), "paper" (fixed thresholds t16 and t4) or "search" (the
    paper's search). exact: whether a copy of the model in F32 is measured, see `exact`; None: where there is room for one.
    window, sinks: tokens in F16. threads: None: physical cores. device: as for bridge.Llama.
    """

    bits: float | None = None
    budget: tuple[float, int] | None = None
    max_kld: float | None = None
    texts: Sequence[Path] = ()
    tokens: int | None = None
    policy: str = "gain"
    t16_t4: tuple[float, float] | None = None
    window: int | None = None
    sinks: int | None = None
    minutes: float | None = None
    seed: int = 1
    threads: int | None = None
    device: str = "auto"
    exact: bool | None = None


def calibrate(model: str, request: Request, steps: Steps | None = None) -> tuple[Profile, dict[str, Any]]:
    """A profile for the model at a path, and what was found on the way.

    Ctrl-C once the model has been read gives the best that is known then; `found["interrupted"]` says what that is.
    Raises the errors of bridge.Llama, and ProfileError if no formats keep max_kld.
    """
    minutes = request.minutes
    if minutes is not None and not 0 < minutes < math.inf:
        raise SettingsError(f"minutes is {request.minutes!r}; it must be a number above 0.")
    if request.policy == "search":
        load_optuna()
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(model, request, Clock(None if minutes is None else 60 * minutes), steps or Steps(), Path(folder))
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
        self.weights, self.exact, self.share = model, False, Share()
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

    @property
    def baseline(self) -> str:
        """The exact cache on held-out text."""
        return exact.BASELINE if self.exact else "f16"

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()

    # ---- the steps

    def profile(self) -> tuple[Profile, dict[str, Any]]:
        if not self.read():
            if self.request.max_kld is not None or self.request.policy != "gain":
                raise SettingsError(f"{self.coarser[0][:1].upper()}{self.coarser[0][1:]}; give more --minutes.")
            profile = self.make(preset_within(self.presets, self.bits).formats, self.request.window)
            return profile, self.found(profile, {}, preset_within(self.presets, self.bits).name)
        request = self.request
        if len(self.windows) > 1 and self.plan.windows:
            assert self.calibration is not None and self.reader is not None
            with self.steps("window", len(self.windows) * self.reader.n_tokens) as self.calibration.progress:
                self.chosen = best_window(self.calibration, self.windows)
            self.bits = self.windows[self.chosen]
        if request.max_kld is not None:
            profile, verdicts = self.fewest_bits(request.max_kld)
            return profile, self.found(profile, verdicts)
        return self.decide(self.formats(self.bits))

    def decide(self, formats: Formats | None) -> tuple[Profile, dict[str, Any]]:
        """Of an allocation (None: none was better on what was read), the preset with what is left of the bits, and the preset: the best, measured."""
        assert self.calibration is not None
        fit, candidates = preset_within(self.presets, self.bits), {}
        if formats is not None:
            candidates[PROFILE] = self.make(formats, self.chosen)
        if self.request.policy == "gain" and self.bits - fit.bits >= TO_SPEND and (more := more_than(self.calibration, fit.formats, self.bits)):
            candidates[f"{fit.name} and more"] = self.make(more, self.request.window)
        verdicts = self.judge(candidates, self.bits)
        chosen = next((name for name in candidates if is_better(verdicts, name, self.calibration.shares)), None)
        if self.request.policy != "gain":
            chosen = PROFILE
        for verdict in verdicts.values():
            others = {name: f for name, f in verdict.figures.items() if name not in candidates}
            verdict.figures = {PROFILE: verdict.figures[chosen or fit.name], **others}
        profile = self.exactly(fit) if chosen is None else candidates[chosen]
        return profile, self.found(profile, verdicts, "" if chosen == PROFILE else chosen or fit.name)

    def read(self) -> bool:
        """Open the model, read the texts, find out what there is time for, measure the parts of the cache. False if there is no time at all."""
        request, fit = self.request, preset_within(self.presets, self.bits)
        n_ctx = min(LONGEST, self.file.n_ctx_train or LONGEST)
        threads: dict[str, Any] = {"n_threads": self.threads, "n_threads_batch": self.threads}
        self.exact = exact.fits(self.model, self.folder, request.device, self.clock.seconds) if request.exact is None else request.exact
        if self.exact:
            self.weights = exact.f32_copy(self.model, self.folder, self.threads)
        opening = self.clock.taken()
        llm = Llama(self.weights, stock="f16", n_ctx=n_ctx, n_batch=PAGE_CELLS, verbose=False, device=request.device, **threads)
        try:
            texts = encode_texts(llm, request.texts)
            self.plan = self.make_plan(llm, fit, self.clock.taken() - opening)
            if not self.plan.tokens:
                return False
            material = gather(llm, texts, self.plan, request.seed)
        finally:
            llm.close()
        self.held_out = material.held_out
        options: dict[str, Any] = {"window": self.window, "sinks": self.sinks, "threads": self.threads, "device": request.device}
        self.reader = Reader(self.weights, material.calibration, **options)
        self.calibration, self.speed = read_whole(self.reader, self.file.n_layers, fit.formats, self.steps, compared=self.plan.tries > 0)
        # Coarse formats, whatever the size: what finer ones do to a single head drowns in the rounding of everything else.
        probe = preset_within(self.presets, LEAST_BITS).formats
        if self.plan.parts:
            # A machine that was busy just now may be quicker again: then there is time for more tries and text than it seems.
            seconds = max(self.clock.left() - self.later(), LEAST_FOR_PARTS * self.clock.left())
            left_out, self.speed = measure_parts(self.calibration, probe, self.steps, self.speed, seconds, exact=self.exact)
            self.coarser += [left_out] if left_out else []
        else:
            even_weights(self.calibration.tables, probe, list(self.reader.passages))
        return True

    def make_plan(self, llm: Llama, fit: Preset, load: float) -> Plan:
        request = self.request
        tries = {"gain": len(TRUSTS), "paper": 0, "search": PAPER_LEAST_TRIALS}[request.policy]
        demand = Demand(
            tokens=request.tokens or TOKENS,
            least=least_tokens(self.window, self.sinks),
            tries=tries,
            parts=request.policy == "gain",
            sizes=1 if request.max_kld is None else LEAST_SIZES,
            windows=len(self.windows) if len(self.windows) > 1 else 0,
            judged=4 if self.bits - fit.bits >= TO_SPEND and request.policy == "gain" and request.max_kld is None else 3,
            nearest=nearest_preset(self.presets, self.bits).name != fit.name,
        )
        speed = measure_speed(llm, load)
        asked = self.clock.seconds or default_seconds(speed.read)
        if load + 2 * demand.least / speed.read < 0.05 * asked:
            options: dict[str, Any] = {"window": self.window, "sinks": self.sinks, "threads": self.threads, "device": request.device}
            speed = measure_speed_rounded(self.weights, fit.formats, speed, **options)
        self.clock.seconds = self.clock.seconds or self.clock.taken() + default_seconds(speed.read)
        plan = make_plan(demand, speed, self.clock)
        if not plan.tokens:
            self.coarser.append(
                f"this machine reads about {speed.words()} tokens a second of this model, so that nothing could be measured in {duration(asked)}"
            )
            return plan
        sample = LONG_SAMPLE * shares_of_sample(["text"] + ["retrieval"] * plan.every_kind + ["own"] * (plan.own > 0))
        parts = min(passes_of_parts(fit.formats, self.exact) * sample / speed.read, self.clock.left() - plan.seconds) if plan.parts else 0.0
        # What is said is kept: it is the time from now on.
        self.clock.seconds = (self.clock.taken() + plan.seconds + max(0.0, parts)) / (1 - SPARE)
        self.steps.say(f"{Path(self.model).name} is read with {speed.words()} tokens a second here: this takes about {duration(self.clock.seconds)}.")
        if plan.tokens < demand.tokens:
            self.coarser.append(f"{plan.tokens} tokens of each kind of text were read instead of {demand.tokens}")
        if not plan.every_kind:
            self.coarser.append("no solved problems were read")
        if plan.tries < demand.tries:
            tried = f"{plan.tries} allocation{'s were' if plan.tries > 1 else ' was'}" if plan.tries else "no allocation was"
            self.coarser.append(f"{tried} tried instead of {demand.tries}")
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
        assert self.reader is not None
        fit = preset_within(self.presets, self.bits)
        n = 3 + (self.bits - fit.bits >= TO_SPEND) + (self.plan.nearest and nearest_preset(self.presets, self.bits).name != fit.name)
        return n * (self.reader.load + sum(len(p.tokens) for some in self.held_out.values() for p in some) / self.speed)

    def another(self) -> bool:
        """Whether one more pass over the text leaves time for the held-out text."""
        assert self.reader is not None
        return self.clock.left() > self.reader.n_tokens / self.speed + self.judging()

    def formats(self, bits: float) -> Formats | None:
        """The allocation for a size; None if none was better than the preset where it was tried."""
        calibration, request = self.calibration, self.request
        assert calibration is not None and self.reader is not None
        if request.policy == "paper":
            return thresholds(calibration.tables, *(request.t16_t4 or (1.85, 1.58)))
        if request.policy == "search":
            with self.steps("the paper's search", PAPER_TRIALS * self.reader.n_tokens) as calibration.progress:
                return best_thresholds(calibration, bits, PAPER_TRIALS, request.seed, self.another)
        tries = self.plan.tries + (len(TILTS) if self.plan.tries == len(TRUSTS) else 0)  # if the parts have left time for it
        with self.steps(f"formats of {bits:.2f} bits", tries * self.reader.n_tokens) as calibration.progress:
            formats, objective = best_formats(calibration, bits, tries, self.another)
        return None if request.max_kld is None and objective is not None and objective >= 1 else formats

    def make(self, formats: Formats, window: int | None) -> Profile:
        tables = [None] * len(formats) if self.calibration is None else self.calibration.tables
        return make_profile(self.file, formats, tables, window, self.request.sinks)

    def exactly(self, preset: Preset) -> Profile:
        """The preset as a profile: what was seen of keys is in it, but nothing that changes a page."""
        profile = self.make(preset.formats, self.request.window)
        for layer in profile.layers:
            if layer is not None:
                layer.query_prior = None
        return profile

    def judge(self, profiles: dict[str, Profile], bits: float) -> dict[str, Verdict]:
        """Profiles by what they are called, the preset of the size and, if there is time, the one of the nearest size, on held-out text."""
        assert self.reader is not None
        fit, nearest = preset_within(self.presets, bits), nearest_preset(self.presets, bits)
        caches = {}
        for i, (called, profile) in enumerate(profiles.items()):
            caches[called] = str(self.folder / f"profile{i}.gguf")
            write_profile(caches[called], profile)
        caches[fit.name] = fit.name
        if self.plan.nearest:
            caches[nearest.name] = nearest.name
        n = 1 + len(caches)
        tokens = int(1.1 * max(0.0, self.clock.left() - n * self.reader.load) * self.speed / n)
        passages = shortened(self.held_out, tokens, least_tokens(self.window, self.sinks))
        options: dict[str, Any] = {"window": self.request.window, "sinks": self.request.sinks, "threads": self.threads, "device": self.request.device}
        options["baseline"] = self.baseline
        return measure(self.weights, caches, fit.name, passages, self.steps, **options)

    def fewest_bits(self, limit: float) -> tuple[Profile, dict[str, Verdict]]:
        """Bisection over the bits: the divergence falls as they grow."""
        low, high, bits = LEAST_BITS, MOST_BITS, self.bits
        worst, last = math.inf, bits
        for attempt in range(MOST_SIZES):
            began = self.clock.taken()
            formats = self.formats(bits)
            assert formats is not None
            profile = self.make(formats, self.chosen)
            verdicts = self.judge({PROFILE: profile}, bits)
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

    def found(self, profile: Profile, verdicts: dict[str, Verdict], instead: str = "", interrupted: str = "") -> dict[str, Any]:
        source = ", ".join(path.name for path in self.request.texts) or "the default text"
        said = round(self.clock.seconds or 0.0, 1)
        taken = {"seconds": round(self.clock.taken(), 1), "seconds_said": said, "outside_llama": self.share.taken()["outside_llama"]}
        profile.measured = [
            record_of(source if kind == "text" else kind, verdict.profile, self.baseline) | taken for kind, verdict in verdicts.items()
        ]
        return {
            "preset": preset_within(self.presets, self.bits).name,
            "nearest": nearest_preset(self.presets, profile.body_bits or self.bits),
            "instead": instead,
            "held_out": verdicts,
            "tokens": self.plan.tokens,
            "coarser": self.coarser,
            "against": self.baseline.upper(),
            **taken,
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
        fit = preset_within(self.presets, self.bits)
        profile, name = self.make(fit.formats, self.request.window), fit.name
        return profile, self.found(profile, {}, name, f"the formats of the preset {name}, with what was seen of queries and keys")


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
