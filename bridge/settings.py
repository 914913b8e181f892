"""Cache settings: see `mixkvq.core.settings`."""

from __future__ import annotations

from mixkvq.core.settings import Kv, least_bits

__all__ = ["Kv", "least_bits"]
