"""Heat maps of a profile, by layer, head and channel: tiers, salience, ranges of keys, sizes of queries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.profile import LayerProfile, Profile
from ..core.reference import KEY_BITS
from . import plots


@dataclass
class Maps:
    """Arrays by row (a head of a layer) and channel, NaN where a head has fewer channels or the profile says nothing; None if it says it nowhere.

    rows: layer and head of each row.
    tiers: bits of the channel in a page whose salience is the expected one.
    by_rank: True where a row's profile has no statistics; its tiers are then by falling salience, not by channel.
    salience: query_prior * key_range, or the one of them that there is. key_range, query_prior: as in the profile.
    """

    rows: list[tuple[int, int]]
    tiers: npt.NDArray[np.float64]
    by_rank: npt.NDArray[np.bool_]
    salience: npt.NDArray[np.float64] | None
    key_range: npt.NDArray[np.float64] | None
    query_prior: npt.NDArray[np.float64] | None


def salience(layer: LayerProfile) -> npt.NDArray[np.float64] | None:
    """The expected salience A_d = I_d * range (paper, section 3.2), float64 [n_head_kv, D], or the one of the two that the profile has, or None."""
    known = [np.asarray(a, np.float64) for a in (layer.query_prior, layer.key_range) if a is not None]
    return np.prod(known, axis=0) if known else None


def likely_tiers(layer: LayerProfile) -> npt.NDArray[np.int32]:
    """The bits of each channel in a page of the expected salience, int32 [n_head_kv, D]; by falling salience if nothing is known about it."""
    expected = salience(layer)
    bits = np.empty((layer.n_heads, layer.head_size), np.int32)
    for head, counts in enumerate(layer.tiers[:, :5]):
        order = np.arange(layer.head_size) if expected is None else np.argsort(-expected[head], kind="stable")
        bits[head, order] = np.repeat(KEY_BITS, counts)
    return bits


def maps(profile: Profile) -> Maps:
    """What `draw_profile` draws."""
    layers = [(i, layer) for i, layer in enumerate(profile.layers) if layer is not None]
    width = max(layer.head_size for _, layer in layers)

    def stack(arrays: Sequence[npt.NDArray[Any] | None]) -> npt.NDArray[np.float64] | None:
        if all(a is None for a in arrays):
            return None
        result = np.full((sum(layer.n_heads for _, layer in layers), width), np.nan)
        at = 0
        for (_, layer), array in zip(layers, arrays, strict=True):
            if array is not None:
                result[at : at + layer.n_heads, : layer.head_size] = array
            at += layer.n_heads
        return result

    tiers = stack([likely_tiers(layer) for _, layer in layers])
    assert tiers is not None
    return Maps(
        rows=[(i, head) for i, layer in layers for head in range(layer.n_heads)],
        tiers=tiers,
        by_rank=np.concatenate([np.full(layer.n_heads, salience(layer) is None) for _, layer in layers]),
        salience=stack([salience(layer) for _, layer in layers]),
        key_range=stack([layer.key_range for _, layer in layers]),
        query_prior=stack([layer.query_prior for _, layer in layers]),
    )


def figure(profile: Profile) -> Any:
    """A matplotlib figure: tiers, and salience, key ranges and |q| where the profile has them. Raises SettingsError without matplotlib."""
    pyplot = plots.load()
    from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm

    m = maps(profile)
    panels: list[tuple[str, npt.NDArray[np.float64]]] = [("tier of a key channel, bits", m.tiers)]
    others = (("expected salience, |q| x range", m.salience), ("range of keys in a page", m.key_range), ("mean |q|", m.query_prior))
    panels += [(name, values) for name, values in others if values is not None]
    n_rows, width = m.tiers.shape
    drawn = pyplot.figure(figsize=(1.2 + 4.6 * len(panels), min(40.0, 1.6 + max(2.4, 0.07 * n_rows))), layout="constrained")
    drawn.suptitle(os.path.basename(profile.path) or "profile")
    starts = [i for i, (_, head) in enumerate(m.rows) if head == 0]
    every = max(1, -(-len(starts) // 40))
    bits = sorted(KEY_BITS)
    for i, (title, values) in enumerate(panels):
        axes = drawn.add_subplot(1, len(panels), i + 1)
        positive = values[np.isfinite(values) & (values > 0)]
        if i == 0:
            edges = [bits[0] - 0.5, *((a + b) / 2 for a, b in zip(bits, bits[1:])), bits[-1] + 0.5]
            colours = ListedColormap(["#edf3fa", "#b7d3ea", "#6aaed6", "#2070b4", "#08306b"])
            options: dict[str, Any] = {"cmap": colours, "norm": BoundaryNorm(edges, len(bits))}
        elif positive.size:
            low, high = float(positive.min()), float(positive.max())
            options = {"cmap": "viridis", "norm": LogNorm(max(low, high * 1e-4), high if high > low else low * 1.01, clip=True)}
        else:
            options = {"cmap": "viridis"}
        image = axes.imshow(values, aspect="auto", interpolation="nearest", extent=(0, width, n_rows, 0), **options)
        bar = drawn.colorbar(image, ax=axes, location="bottom", shrink=0.8)
        if i == 0:
            bar.set_ticks([(a + b) / 2 for a, b in zip(edges, edges[1:])], labels=[str(b) for b in bits])
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("channel" if i or not m.by_rank.any() else "channel, by falling salience where the profile has no statistics")
        axes.set_yticks(starts[::every], labels=[str(m.rows[at][0]) for at in starts[::every]])
        for at in starts[1:]:
            axes.axhline(at, color="white", linewidth=0.4)
    drawn.axes[0].set_ylabel("layer, its heads below each other")
    return drawn


def draw_profile(profile: Profile, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Draw the heat maps into a .png or .svg file.

    overwrite: whether a picture that is there is replaced. Raises SettingsError for another ending or without matplotlib, OSError.
    """
    plots.save(figure(profile), path, overwrite=overwrite, dpi=150)
