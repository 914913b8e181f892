"""The report of a cache: the figures that the backend counts, and how they are written."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from mixkvq.core.memory import format_bytes
from mixkvq.core.settings import STOCK_TYPES, Kv


def mixkvq_stats(kv: Kv, stats: dict[str, Any], layers: Sequence[dict[str, Any]], codec: Any = None) -> dict[str, Any]:
    """The backend's statistics with what a reader wants to know beside them.

    Added: cache ("mixkvq", or "codec" and codec, its name), preset or profile, found (where a profile lies that nobody asked for),
    times_smaller (F16 bytes over bytes; with a codec by the bits that it counts), plain_layers (a list of name and reason), bytes_filled (`bytes`
    by its full name).
    """
    result: dict[str, Any] = {"cache": "mixkvq", "preset": None if kv.profile else kv.describe(), "profile": kv.profile, "found": kv.found}
    result.update(stats, bytes_filled=stats["bytes"])
    result["times_smaller"] = stats["bytes_f16"] / stats["bytes"] if stats["bytes"] else 0.0
    if codec is not None:
        name = getattr(codec, "name", None) or getattr(codec, "__qualname__", None) or type(codec).__name__
        result.update(cache="codec", codec=str(name), preset=None)
        result["times_smaller"] = 16 / stats["total_bits"] if stats["total_bits"] else 0.0
    result["plain_layers"] = [{"name": layer["name"], "reason": layer["reason"]} for layer in layers if layer["kind"] == "plain"]
    return result


_SIZE = re.compile(r"\(\s*(\d+) cells,\s*(\d+) layers,.*K \(\w+\):\s*([\d.]+) MiB, V \(\w+\):\s*([\d.]+) MiB")


_RECURRENT = re.compile(r"llama_memory_recurrent: size =\s*([\d.]+) MiB")


def stock_stats(stock: str, log: Sequence[str], n_tokens: int) -> dict[str, Any]:
    """The same figures for llama.cpp's own cache, from what it said about itself when it was created."""
    bits = STOCK_TYPES[stock][1]
    n_bytes, n_cells, n_layers, n_recurrent = 0, 0, 0, 0
    for line in log:
        match = _SIZE.search(line)
        if match:
            n_cells = max(n_cells, int(match[1]))
            n_layers += int(match[2])
            n_bytes += round((float(match[3]) + float(match[4])) * (1 << 20))
        if match := _RECURRENT.search(line):
            n_recurrent += round(float(match[1]) * (1 << 20))
    elements = round(n_bytes * 8 / bits)
    return {
        "cache": "stock",
        "type": stock,
        "bytes": n_bytes,
        "bytes_filled": n_bytes,
        "bytes_reserved": n_bytes,
        "bytes_f16": elements * 2,
        "bytes_recurrent": n_recurrent,
        "bytes_used": round(n_bytes * min(1.0, n_tokens / n_cells)) if n_cells else 0,
        "elements": elements,
        "body_bits": bits,
        "total_bits": bits,
        "n_cells": n_cells,
        "n_layers": n_layers,
        "n_plain_layers": 0,
        "times_smaller": 16.0 / bits,
        "plain_layers": [],
    }


def title(stats: dict[str, Any]) -> str:
    """What kind of cache it is, in a few words."""
    if stats["cache"] == "stock":
        return f"llama.cpp {stats['type']}"
    if stats["cache"] == "codec":
        return f"codec {stats['codec']}, its pages kept in F16"
    if not stats["profile"]:
        return f"MixKVQ {stats['preset']}"
    return f"MixKVQ profile {os.path.basename(stats['profile'])}" + (f" (found {stats['found']})" if stats["found"] else "")


def rows(stats: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of every line of the report."""
    lines = [
        ("cache", title(stats)),
        ("filled", f"{format_bytes(stats['bytes'])} for {stats['n_cells']} cells in {stats['n_layers']} layers"),
        ("in use", f"{format_bytes(stats['bytes_used'])} now"),
        ("bits per element", (f"{stats['body_bits']:.2f} body, " if stats["body_bits"] else "") + f"{stats['total_bits']:.2f} total"),
        ("against F16", f"{_gain(stats)} ({format_bytes(stats['bytes_f16'])})"),
    ]
    if stats.get("device"):
        lines.append(("computed on", str(stats["device"]) + (f" ({stats['isa']})" if stats.get("isa") and stats["device"] == "CPU" else "")))
    elif stats.get("isa"):
        lines.append(("instructions", str(stats["isa"])))
    for reason, names in plain_by_reason(stats).items():
        lines.append(("kept plainly", f"{', '.join(names)}: {reason}"))
    return lines


def _gain(stats: dict[str, Any]) -> str:
    if stats["times_smaller"] > 1 or stats["cache"] != "mixkvq":
        return f"{stats['times_smaller']:.2f} times smaller"
    least = stats["n_cells_gain"]
    return f"not smaller: nothing is gained below {least} tokens" if least else "not smaller"


def plain_by_reason(stats: dict[str, Any], most: int | None = 6) -> dict[str, list[str]]:
    """Layers that are not packed, by reason; long lists of names are cut."""
    found: dict[str, list[str]] = {}
    for layer in stats["plain_layers"]:
        found.setdefault(layer["reason"] or "no reason given", []).append(layer["name"])
    for names in found.values():
        if most is not None and len(names) > most:
            names[most:] = [f"and {len(names) - most} more"]
    return found


def format_report(stats: dict[str, Any]) -> str:
    """The report as aligned lines of text, without a newline at the end."""
    lines = rows(stats)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
