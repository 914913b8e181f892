"""Caches by name: opening a model with one, and what it costs in bits.

A name is one of
    f16, q8_0, q4_0, ...     llama.cpp's own types; q4_0-norot switches its built-in rotation off
    balanced, mix2.5, ...    a preset of MixKVQ
    path/to/profile.gguf     a profile
    lab:kivi-2               a codec of mixkvq.lab
    lab:path/to/file.py:X    the codec X of your own module
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bridge

from ..core.errors import SettingsError
from ..core.reference import PAGE_CELLS
from ..core.settings import STOCK_TYPES, Kv, preset_names, resolve_kv

if TYPE_CHECKING:
    from bridge import Llama

WINDOW = SINKS = 128  # tokens in F16, unless a cache says otherwise
LENGTHS = (8192, 32768)  # contexts at which total bits are always given
NO_ROTATION = "-norot"
ROTATION_SWITCH = "LLAMA_ATTN_ROT_DISABLE"
LAB = "lab:"

CACHE_HELP = (
    "caches, comma-separated: llama.cpp's own types (f16, q8_0, q4_0, ...; q4_0-norot switches its built-in rotation off), "
    "presets of MixKVQ, paths of profiles, codecs of the laboratory (lab:kivi-2, lab:my_codecs.py:NAME)"
)


def split_names(texts: str | Iterable[str]) -> list[str]:
    """The names in one or more comma-separated lists, in order, each once. Parameters of a codec (lab:mixkvq:V=3,score=S) stay with it."""
    names: list[str] = []
    for text in [texts] if isinstance(texts, str) else texts:
        own: list[str] = []
        for part in (part.strip() for part in text.split(",")):
            if own and own[-1].startswith(LAB) and re.match(r"\w+=", part):
                own[-1] += "," + part
            elif part:
                own.append(part)
        names += own
    return list(dict.fromkeys(names))


def is_stock(name: str) -> bool:
    """Whether llama.cpp itself has this cache."""
    return name.removesuffix(NO_ROTATION) in STOCK_TYPES


def check_name(name: str) -> None:
    """Raises SettingsError (or ProfileError) with one sentence unless `name` is a cache."""
    if is_stock(name):
        return
    if name.startswith(LAB):
        _codec(name)
        return
    try:
        resolve_kv(name)
    except SettingsError:
        raise SettingsError(
            f"There is no cache {name!r}; give one of llama.cpp's types ({', '.join(STOCK_TYPES)}), a preset ({', '.join(preset_names())}), "
            "the path of a profile, or lab:CODEC."
        ) from None


def open_cache(
    model: str | os.PathLike[str],
    name: str,
    kind: type[Llama] | None = None,
    *,
    window: int | None = None,
    sinks: int | None = None,
    **options: Any,
) -> Llama:
    """Load `model` with the named cache.

    kind: bridge.Llama or a class derived from it. window, sinks: tokens kept in F16, of our caches and of codecs; None: what the profile or the
    codec says, or 128. options: those of llama_cpp.Llama.
    Raises the errors of bridge.Llama; SettingsError for an unknown name.
    """
    check_name(name)
    kind = bridge.Llama if kind is None else kind
    options = {"verbose": False, **options}
    if is_stock(name):
        with _rotation_disabled(name.endswith(NO_ROTATION)):
            return kind(str(model), stock=name.removesuffix(NO_ROTATION), **options)
    if name.startswith(LAB):
        from .lab import codec_function

        codec = _codec(name)
        window, sinks = f16_tokens(name, window, sinks)
        return kind(str(model), kv=Kv(window=window, sinks=sinks), codec=codec_function(codec), **options)
    kv = resolve_kv(name)
    return kind(str(model), kv=Kv(kv.preset, kv.profile, window, sinks), **options)


def f16_tokens(name: str, window: int | None = None, sinks: int | None = None) -> tuple[int, int]:
    """The recent and the first tokens that the named cache keeps in F16, given what the user says of them."""
    if not is_stock(name) and (window is None or sinks is None):
        said: Any = None
        if name.startswith(LAB):
            said = _codec(name)
        elif profile := resolve_kv(name).profile:
            from ..core.profile import read_profile

            said = read_profile(profile)
        own_window, own_sinks = getattr(said, "window", None), getattr(said, "sinks", None)
        window = own_window if window is None else window
        sinks = own_sinks if sinks is None else sinks
    return WINDOW if window is None else window, SINKS if sinks is None else sinks


def file_of(name: str) -> Path | None:
    """The file that a name stands for, if its content says what the cache is: a profile, or the module of a codec."""
    if name.startswith(LAB):
        found = re.match(r"(.*\.py):", name.removeprefix(LAB))
        return Path(found[1]) if found else None
    profile = None if is_stock(name) else resolve_kv(name).profile
    return Path(profile) if profile else None


def total_bits(body_k: float, body_v: float, n_ctx: int, window: int = WINDOW, sinks: int = SINKS, *, key_share: float = 0.5) -> float:
    """Bits per element that a context of `n_ctx` cells takes, from the body bits of its packed keys and values.

    As a full cache has them: F16 pages for the sinks, for the window and for the page being filled, and a record for every page that is packed then.
    Page tables and query statistics are left out. key_share: of the elements, where keys and values differ in size.
    """
    n_pages = _pages(n_ctx)
    sink_pages = min(_pages(sinks), n_pages)
    f16_pages = min(sink_pages + _pages(window) + 1, n_pages)
    record_pages = max(0, n_pages - sink_pages - max(1, _pages(window)))
    body = key_share * body_k + (1 - key_share) * body_v
    return PAGE_CELLS * (16 * f16_pages + body * record_pages) / n_ctx


def sizes(llm: Llama, name: str, lengths: Iterable[int] = LENGTHS, *, window: int | None = None, sinks: int | None = None) -> dict[str, Any]:
    """What an opened cache takes, once tokens were evaluated.

    body_bits, body_bits_k, body_bits_v: per element of packed pages. total_bits: by length (as text), with the context's own first; every byte
    that is allocated counts. bytes: at the context's own length. window, sinks: None for llama.cpp's caches. For a codec everything is what its
    format would take.
    """
    stats = llm.kv_stats()
    own = int(stats["n_cells"])
    lengths = list(dict.fromkeys([own, *lengths]))
    if is_stock(name):
        body = float(stats["body_bits"])
        bits = {str(n): body for n in lengths}
        return {
            "body_bits": body,
            "body_bits_k": body,
            "body_bits_v": body,
            "total_bits": bits,
            "bytes": stats["bytes"],
            "window": None,
            "sinks": None,
        }
    window, sinks = f16_tokens(name, window, sinks)
    layers = llm.kv_layers()

    def body_of(is_value: bool) -> float:
        packed = [(layer["n_heads"] * layer["head_size"], layer["body_bits"]) for layer in layers if _packs(layer) and layer["is_value"] == is_value]
        return sum(row * bits for row, bits in packed) / sum(row for row, _ in packed) if packed else 0.0

    def total_at(n: int) -> float:
        """A sliding window's cache does not grow with the context."""
        n_bits, elements = 0.0, 0.0
        for layer in layers:
            cells = n if layer["n_cells"] == own else min(n, layer["n_cells"])
            row = max(1, layer["n_heads"] * layer["head_size"])
            bits = total_bits(layer["body_bits"], layer["body_bits"], cells, window, sinks) if _packs(layer) else 16.0
            n_bits += bits * row * cells
            elements += row * cells
        return n_bits / elements

    # Of its own length a cache knows the true figure, with every table; a codec's is that of F16.
    coded = name.startswith(LAB)
    bits = {str(n): float(stats["total_bits"]) if n == own and not coded else total_at(n) for n in lengths}
    return {
        "body_bits": float(stats["body_bits"]),
        "body_bits_k": body_of(False),
        "body_bits_v": body_of(True),
        "total_bits": bits,
        "bytes": round(bits[str(own)] * stats["elements"] / 8) if coded else int(stats["bytes"]),
        "window": window,
        "sinks": sinks,
    }


def _packs(layer: dict[str, Any]) -> bool:
    return layer["kind"] not in ("plain", "unused")


def _pages(n_cells: int) -> int:
    return -(-n_cells // PAGE_CELLS)


def _codec(name: str) -> Any:
    from . import lab

    return lab.get(name.removeprefix(LAB))


@contextlib.contextmanager
def _rotation_disabled(disabled: bool) -> Iterator[None]:
    """llama.cpp reads the switch when a context is made."""
    before = os.environ.pop(ROTATION_SWITCH, None)
    if disabled:
        os.environ[ROTATION_SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(ROTATION_SWITCH, None)
        if before is not None:
            os.environ[ROTATION_SWITCH] = before
