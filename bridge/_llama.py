"""Names of before the layers, for scripts that use them: see `bridge.backend`, `bridge.log`, `bridge._compat`."""

from __future__ import annotations

from ._compat import C
from .backend import backend as _backend
from .log import quiet_log

__all__ = ["C", "_backend", "quiet_log"]
