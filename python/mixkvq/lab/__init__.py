"""The laboratory, under the name that users' files import: see `mixkvq.study.lab`."""

from __future__ import annotations

from mixkvq.study.lab import CODECS, Codec, Maker, Options, PageFunction, Rows, codec_function, fixed, get, sample_page

__all__ = ["CODECS", "Codec", "Maker", "Options", "PageFunction", "Rows", "codec_function", "fixed", "get", "sample_page"]
