"""Cache codecs in NumPy: ours, its variations and its rivals, all of which a real model can run on.

    from mixkvq import lab

    llm = bridge.Llama("model.gguf", codec=lab.codec_function(lab.get("kivi-2")))

A codec gets the keys or values of a whole page and says what they read back as and how many bits they take: all bits, with scales, minima,
orders, norms and means. One module per method; docs/codec-laboratory.md tells how to add one. Everything here is our own re-implementation.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...core.errors import SettingsError
from ..user_code import load_module, said
from . import kitty, kivi, kvarn, mixed, packed, paper, plain, stock, turbo
from ._base import Codec, Maker, Options, PageFunction, Rows, codec_function, fixed, sample_page

__all__ = ["CODECS", "Codec", "Maker", "Options", "PageFunction", "Rows", "codec_function", "fixed", "get", "sample_page"]

CODECS: dict[str, Maker] = {}
"""Every codec by the name before its options."""
for _module in (plain, stock, kivi, kitty, kvarn, turbo, paper, mixed, packed):
    CODECS |= _module.MAKERS

_BETWEEN = re.compile(f"/(?=(?:{'|'.join(map(re.escape, CODECS))})(?:[:/]|$))")  # a slash that a codec follows: options may hold paths


def get(name: str) -> Codec:
    """A new codec, without anything remembered from another text.

    name: one of CODECS, with options behind a colon (`mixkvq:K=8@8+120@3,V=3`); `A/B` for the keys of A and the values of B; or
        `path/to/file.py:NAME` for a `Codec`, or a function without arguments that makes one, in a file of the user's.
    Raises SettingsError if there is no such codec or option.
    """
    path, found, rest = name.partition(".py:")
    if found:
        return _from_file(path + ".py", rest)
    halves = _BETWEEN.split(name, maxsplit=1)
    if len(halves) == 2:
        k, v = get(halves[0]), get(halves[1])
        return Codec(name, f"keys: {k.description}; values: {v.description}", k.keys, v.values, *_shared_defaults(k, v))
    head, _, text = name.partition(":")
    if head not in CODECS:
        raise SettingsError(f"There is no codec {head!r}; the codecs are {', '.join(CODECS)}, and path/to/file.py:NAME.")
    options = Options(name, text)
    codec = CODECS[head](name, options)
    options.finish()
    return codec


def _shared_defaults(k: Codec, v: Codec) -> tuple[int | None, int | None]:
    """Window and sinks of a mixture: what both say, else nothing."""
    return (k.window if k.window == v.window else None, k.sinks if k.sinks == v.sinks else None)


def _from_file(path: str, name: str) -> Codec:
    found = getattr(load_module(Path(path)), name, None)
    try:
        codec = found() if callable(found) and not isinstance(found, Codec) else found
    except Exception as e:  # noqa: BLE001 - anything may happen there
        raise SettingsError(f"{name}() of {path} failed: {said(e)}.") from e
    if not isinstance(codec, Codec):
        raise SettingsError(f"{path} has no codec {name!r}; it must be a mixkvq.lab.Codec or a function that makes one.")
    return codec
