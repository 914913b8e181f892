"""Pictures: how matplotlib is set up for all of them, and those of what `mixkvq.evaluate` measured. They need: pip install 'mixkvq[plot]'."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

from ..core.errors import SettingsError
from ..core.files import PathLike
from ..core.outputs import check_output, writing
from .compare import NOISE_FLOOR

FORMATS = (".png", ".svg")
_TINY = 1e-7  # a divergence of 0 has no place on a logarithmic axis


def load() -> Any:
    """matplotlib.pyplot, drawing to files. Raises SettingsError if matplotlib is not installed."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        raise SettingsError("Plots need matplotlib; install it with: pip install 'mixkvq[plot]'.") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mixkvq"  # the same figures give the same file
    return importlib.import_module("matplotlib.pyplot")


def check_path(path: PathLike, *, force: bool, inputs: Iterable[PathLike] = ()) -> None:
    """Raises SettingsError unless a picture can be drawn and written there, so that nothing is measured in vain."""
    _ending(path)
    check_output(path, "plot", force=force, inputs=inputs)
    load()


def save(figure: Any, path: PathLike, *, overwrite: bool = True, **options: Any) -> None:
    """Write the figure, whole or not at all, and free it. options: matplotlib's.

    overwrite: whether a picture that is there is replaced; if not, FileExistsError is raised. Raises SettingsError for another ending, OSError.
    """
    ending = _ending(path)
    check_output(path, "plot", force=True)
    with writing(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, format=ending[1:], metadata={"Date": None} if ending == ".svg" else None, **options)
    load().close(figure)


def _ending(path: PathLike) -> str:
    ending = os.path.splitext(path)[1].lower()
    if ending not in FORMATS:
        raise SettingsError(f"{os.fspath(path)} cannot be drawn: the name of a picture ends in {' or '.join(FORMATS)}.")
    return ending


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bits, divergence) that no other one beats in both, by rising bits."""
    best: list[tuple[float, float]] = []
    for bits, kld in sorted(points):
        if not best or kld < best[-1][1]:
            best.append((bits, kld))
    return best


def draw_evaluation(result: dict[str, Any], path: PathLike, *, overwrite: bool = True) -> None:
    """Divergence over body bits and over total bits at the measured context, a row of panels per section; and the share of problems that are right.

    result: what `python -m mixkvq.evaluate --out` writes. The frontier is the line; the noise floor is dashed.
    """
    pyplot = load()
    problems = result.get("problems")
    sections = [section for section in result["sections"] if section["caches"]]
    n_rows = len(sections) + bool(problems)
    figure, panels = pyplot.subplots(n_rows, 2, figsize=(12, 4.4 * n_rows), squeeze=False, layout="constrained")
    figure.suptitle(f"{result['model']['name']}: distance from {result['settings']['baseline']}")
    for row, section in zip(panels, sections):
        caches = {name: figures for name, figures in section["caches"].items() if name != NOISE_FLOOR}
        floor = section["caches"].get(NOISE_FLOOR)
        for panel, (xs, label) in zip(row, _bits(caches)):
            points = {name: (xs[name], max(_TINY, figures["kld_mean"])) for name, figures in caches.items()}
            best = frontier(list(points.values()))
            panel.set_yscale("log")
            panel.step(*zip(*best), where="post", color="C0", alpha=0.5, zorder=1, label="frontier")
            for name, (x, y) in points.items():
                error = caches[name]["kld_standard_error"] or 0.0
                panel.errorbar(x, y, yerr=min(error, 0.9 * y), fmt="o", color="C0" if (x, y) in best else "C7")
            if floor:
                panel.axhline(max(_TINY, floor["kld_mean"]), linestyle="--", color="grey", label=NOISE_FLOOR)
            _finish(panel, points, title(section), label, "mean KLD, nats")
            panel.legend()
    if problems:
        caches = {name: {**figures, **problems["sizes"][name]} for name, figures in problems["summary"].items()}
        for panel, (xs, label) in zip(panels[-1], _bits(caches)):
            points = {name: (xs[name], figures["accuracy"]) for name, figures in caches.items()}
            for name, (x, y) in points.items():
                low, high = caches[name]["accuracy_95%"]
                panel.errorbar(x, y, yerr=[[y - low], [high - y]], fmt="o", color="C0")
            _finish(panel, points, title(problems), label, "right answers, 95 % interval")
    save(figure, path, overwrite=overwrite)


def title(section: dict[str, Any]) -> str:
    """What a section of the result was measured on, in a few words."""
    if section["kind"] == "problems":
        return f"{section['count']} problems, {section['source']}"
    if section["kind"] == "derivations":
        return f"{section['count']} derivations, {section['style']}"
    return f"{section['text']['name']}, {section['style']}"


def _bits(caches: dict[str, dict[str, Any]]) -> list[tuple[dict[str, float], str]]:
    """Body bits and total bits at the context by cache, each with the label of its axis."""
    length = next((next(iter(figures["total_bits"])) for figures in caches.values()), "")
    return [
        ({name: figures["body_bits"] for name, figures in caches.items()}, "body bits per element"),
        ({name: next(iter(figures["total_bits"].values())) for name, figures in caches.items()}, f"total bits per element at {length} tokens"),
    ]


def _finish(panel: Any, points: dict[str, tuple[float, float]], title: str, x: str, y: str) -> None:
    for name, point in points.items():
        panel.annotate(name, point, xytext=(5, 5), textcoords="offset points", fontsize="small")
    panel.set_title(title, fontsize="medium")
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.margins(x=0.15, y=0.15)
    panel.grid(alpha=0.3)
