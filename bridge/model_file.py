"""What a GGUF file says of its model: see `mixkvq.core.model_file`."""

from __future__ import annotations

from mixkvq.core.model_file import ModelFile, open_model

__all__ = ["ModelFile", "open_model"]
