"""What a profile says: a table of formats and measurements, and heat maps by layer, head and channel.

python -m mixkvq.inspect model.mixkvq.gguf
python -m mixkvq.inspect model.gguf --plot profile.svg     # the profile beside the model, or the one inside it
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from ..core.errors import SettingsError
from ..core.model_file import open_model, read_header
from ..core.profile import PREFIX, LayerProfile, Profile, check_model, load_profile, side_car
from ..core.reference import KEY_BITS, PAGE_CELLS
from ..study import plots
from ..study.profile_plots import draw_profile
from .options import files, force_option, run, tool

_SHARE = "{:.2f}"


# ---- the table -------------------------------------------------------------------------------------------------------------------------


def find(path: str) -> Profile:
    """The profile in `path`: a side-car, JSON, a model with one inside or one with one beside it. The first found as `bridge` would find it."""
    if path.endswith(".json"):
        return load_profile(path)
    header = read_header(path)
    if header.values.get("general.type") != "mixkvq-profile":
        if os.path.isfile(side_car(path)):
            return load_profile(side_car(path))
        if PREFIX + "version" not in header.values:
            raise SettingsError(f"{path} has no profile inside, and there is no {os.path.basename(side_car(path))} beside it.")
    return load_profile(path)


def summary(profile: Profile, head_sizes_v: Sequence[int] | None = None) -> list[tuple[str, str]]:
    """Name and value of everything that concerns the whole profile. head_sizes_v: value head size per layer; None: as the keys'."""
    packed = profile.packed_bits(head_sizes_v)
    lines = [
        ("profile", profile.path + (" (embedded)" if profile.embedded else "")),
        ("format version", str(profile.version)),
        ("made by", profile.made_by or "not said"),
        ("model", f"fingerprint {profile.fingerprint}, {len(profile.layers)} layers"),
        ("recent tokens in F16", "default" if profile.window is None else str(profile.window)),
        ("first tokens in F16", "default" if profile.sinks is None else str(profile.sinks)),
        ("body bits", f"{packed:.3f}" + ("" if head_sizes_v is not None else " (for values of the keys' head size)")),
    ]
    if profile.body_bits is not None and abs(profile.body_bits - packed) > 5e-4:
        lines[-1] = ("body bits", f"{profile.body_bits:.3f} as written; {lines[-1][1]} by the layers")
    return lines


def tiers_text(tiers: Sequence[int]) -> str:
    """`(0, 0, 32, 64, 32, 128)` -> "32@4+64@3+32@2": channels at bits."""
    return "+".join(f"{n}@{bits}" for n, bits in zip(tiers, KEY_BITS) if n)


def layer_rows(profile: Profile, head_sizes_v: Sequence[int] | None = None) -> list[tuple[str, ...]]:
    """A row for every format in every layer: layer, heads, key tiers, tokens per scale, values, and the layer's bits of keys, values and both."""
    rows: list[tuple[str, ...]] = []
    for i, layer in enumerate(profile.layers):
        if layer is None:
            rows.append((str(i), "", "no packed cache", "", "", "", "", ""))
            continue
        size_v = layer.head_size if head_sizes_v is None else head_sizes_v[i]
        keys, values = layer.packed_bytes(size_v)
        n_k, n_v = PAGE_CELLS * layer.n_heads * layer.head_size, PAGE_CELLS * layer.n_heads * size_v
        bits = tuple(_SHARE.format(8 * n_bytes / n) for n_bytes, n in ((keys, n_k), (values, n_v), (keys + values, n_k + n_v)))
        for heads in _same(layer):
            tiers, (value_bits, group) = layer.tiers[heads[0]].tolist(), layer.values[heads[0]].tolist()
            value = f"{value_bits} bits, rotated" if group == 0 else f"{value_bits} bits, groups of {group}"
            first = heads == _same(layer)[0]
            rows.append((str(i) if first else "", _ranges(heads), tiers_text(tiers[:5]), str(tiers[5]), value, *(bits if first else ("", "", ""))))
    return rows


def _same(layer: LayerProfile) -> list[list[int]]:
    """Heads that have the same formats, together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for head, row in enumerate(np.hstack([layer.tiers, layer.values]).tolist()):
        found.setdefault(tuple(row), []).append(head)
    return list(found.values())


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` -> "0-2, 5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


MEASURED = {
    "text": "text",
    "tokens": "tokens",
    "style": "style",
    "against": "against",
    "kld_mean": "KLD mean",
    "kld_median": "median",
    "kld_p999": "99.9 %",
    "perplexity_ratio": "perplexity ratio",
    "same_top": "same top token",
}
"""Columns of what was measured, and their headings."""


def measured_rows(profile: Profile) -> list[tuple[str, ...]]:
    """What calibration measured, in the order of `MEASURED` and then whatever else there is."""
    names = measured_columns(profile)
    return [tuple(_figure(entry.get(name)) for name in names) for entry in profile.measured]


def measured_columns(profile: Profile) -> list[str]:
    """The names of what was measured: those of `MEASURED` that are there, then others."""
    there = list(dict.fromkeys(name for entry in profile.measured for name in entry))
    return [name for name in MEASURED if name in there] + [name for name in there if name not in MEASURED]


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def print_tables(profile: Profile, console: Console, head_sizes_v: Sequence[int] | None = None) -> None:
    """Everything about a profile, as text."""
    whole = Table(show_header=False, box=None, pad_edge=False)
    for name, value in summary(profile, head_sizes_v):
        whole.add_row(name, value)
    layers = Table(title="Layers", title_justify="left")
    for i, heading in enumerate(("layer", "heads", "keys: channels@bits", "tokens per scale", "values", "bits K", "bits V", "body bits")):
        layers.add_column(heading, justify="right" if i in (0, 3, 5, 6, 7) else "left")
    for row in layer_rows(profile, head_sizes_v):
        layers.add_row(*row)
    tables = [whole, layers]
    if profile.measured:
        tables.append(Table(*(MEASURED.get(name, name) for name in measured_columns(profile)), title="Measured", title_justify="left"))
        for row in measured_rows(profile):
            tables[-1].add_row(*row)
    for table in tables:
        console.print(table, markup=False, highlight=False)


# ---- the command line --------------------------------------------------------------------------------------------------------------------


@tool()
@click.argument("file", shell_complete=files)
@click.option("--model", shell_complete=files, help="The model, to check that the profile is for it and to count bits with its value heads.")
@click.option("--plot", "picture", shell_complete=files, help="Draw heat maps of tiers, salience, ranges and |q| into this file, .png or .svg.")
@force_option("the picture")
def command(file: str, model: str | None, picture: str | None, force: bool) -> None:
    """Show the profile FILE: a side-car, JSON, or a model that has one beside or inside it."""
    if picture is not None:
        plots.check_path(picture, force=force, inputs=[file, *([model] if model else [])])
    profile = find(file)
    model = model or (file if profile.embedded or profile.path != file else None)
    sizes = None
    if model is not None:
        check_model(profile, model)
        opened = open_model(model)
        sizes = opened.head_size_v if opened.exact else None
    width = None if sys.stdout.isatty() else 160  # do not wrap what a program reads
    print_tables(profile, Console(width=width, highlight=False), sizes)
    if picture is not None:
        draw_profile(profile, picture, overwrite=force)
        click.echo(f"{picture} has the heat maps.", err=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run(command, "mixkvq.inspect", arguments)
