"""Answers that are streamed to a terminal: see `mixkvq.cli.answer`."""

from __future__ import annotations

from mixkvq.cli.answer import Sampling, stream_answer

__all__ = ["Sampling", "stream_answer"]
