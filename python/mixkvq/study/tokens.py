"""The figures of single predictions, a row for each position, as NumPy's .npz.

    rows = dict(np.load("tokens.npz"))
    rows["kld"][(rows["cache"] == "balanced") & (rows["position"] >= 1024)].mean()
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import SettingsError
from ..core.files import write_atomically
from . import plots
from .compare import Comparison, Passage

COLUMNS = ("text", "passage", "position", "token", "seed", "cache", "kld", "same_top", "nll", "nll_baseline")
"""What was measured on (as tables call it), which window or problem of it, where in it, the token that really stands there, the seed of the run, the
cache; divergence in nats, whether the first choice is the baseline's, and -log p of the token with the cache and with the baseline."""

Rows = dict[str, NDArray[Any]]


def check(path: Path | None, result: Mapping[str, Any], *, restart: bool) -> None:
    """Raises SettingsError if rows cannot be written there without a loss, or the result has figures whose rows are not there.

    A run that was stopped goes on with its own file; restart: it begins with none.
    """
    if path is None:
        return
    if path.suffix != ".npz":
        raise SettingsError(f"{path} must end in .npz: rows are written as NumPy's arrays.")
    if path.exists():
        if _read(path)[1] != _run(result):
            raise SettingsError(f"{path} holds rows of another run; give another name, or delete it.")
        if restart:
            path.unlink()
    elif any(section["caches"] for section in result["sections"]):
        raise SettingsError(f"{path} does not exist, and the --out file holds figures already; give --restart to measure them anew.")


def add(
    path: Path | None, section: dict[str, Any], passages: Sequence[Passage], caches: Mapping[str, Sequence[Comparison]], result: Mapping[str, Any]
) -> None:
    """Put the rows of some caches on some passages into the file, in place of those that are there."""
    if path is None:
        return
    title = plots.title(section)
    parts = [_rows(title, passages, name, found, result["settings"]["seed"]) for name, found in caches.items()]
    if path.exists():
        old = _read(path)[0]
        keep = ~((old["text"] == title) & np.isin(old["cache"], list(caches)))
        parts.insert(0, {name: column[keep] for name, column in old.items()})
    data = io.BytesIO()
    columns: Any = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    np.savez_compressed(data, run=np.array(_run(result)), **columns)
    write_atomically(path, data.getvalue())


def _read(path: Path) -> tuple[Rows, str]:
    """All rows, and which run they are of. Raises SettingsError if the file holds none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in COLUMNS}, str(file["run"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise SettingsError(f"{path} holds no figures of single predictions ({type(e).__name__}); give another name.") from None


def _run(result: Mapping[str, Any]) -> str:
    """Model and settings in a few letters."""
    said = {"model": {key: result["model"][key] for key in ("name", "bytes")}, "settings": result["settings"]}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _rows(title: str, passages: Sequence[Passage], cache: str, found: Sequence[Comparison], seed: int) -> Rows:
    lengths = [len(comparison.kld) for comparison in found]
    n = sum(lengths)
    positions = [np.arange(passage.first, passage.first + length) for passage, length in zip(passages, lengths, strict=True)]
    return {
        "text": np.full(n, title),
        "passage": np.repeat(np.arange(len(passages)), lengths),
        "position": np.concatenate(positions),
        "token": np.concatenate([passage.tokens[passage.first : passage.first + length] for passage, length in zip(passages, lengths, strict=True)]),
        "seed": np.full(n, seed),
        "cache": np.full(n, cache),
        **{name: np.concatenate([getattr(c, name) for c in found]) for name in ("kld", "same_top", "nll", "nll_baseline")},
    }
