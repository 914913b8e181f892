"""Which allocation measures best: of several by expected harm, by windows, and by the paper's search for its two thresholds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import SettingsError
from .allocate import Tables, allocate_by_kind, body_bits, thresholds
from .sensitivity import Reader
from .sizes import LONG_IN_WINDOWS, Formats

TRUSTS = (1.0, 0.75)  # in the weights that were measured
DOUBTS = (0.5, 0.25)  # if nothing was better than the preset with more trust
TILTS = (0.5, 2.0)  # weight of keys against that of values, tried beside 1
PAPER_RANGE = (0.1, 2.0)  # of both thresholds in the paper's search
PAPER_TRIALS, PAPER_LEAST_TRIALS = 30, 8
TOLERANCE = 0.05
NEGLIGIBLE = 1e-5  # nats a token: what is smaller is no difference between caches


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
        ratios = {kind: (kld + NEGLIGIBLE) / (self.preset[kind] + NEGLIGIBLE) for kind, kld in found.items()}
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
    for trust in DOUBTS:
        if min(objective for _, objective in tried.values()) >= 1:
            tries += 1
            attempt(trust, 1.0)
    return min(tried.values(), key=lambda entry: entry[1])


def more_than(calibration: Calibration, least: Formats, bits: float) -> Formats | None:
    """Formats of which no head gets less than `least` gives it, with the bits that are left where they prevent most harm; None if there are none."""
    try:
        return allocate_by_kind(calibration.tables, bits, calibration.shares, least)
    except ValueError:
        return None


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
