"""The chat at the terminal: see `mixkvq.cli.chat`."""

from __future__ import annotations

from mixkvq.cli.chat import Chat

__all__ = ["Chat"]
