"""Chat templates: llama-cpp-python's renderer, which needs no model."""

from ._compat import ChatTemplate

__all__ = ["ChatTemplate"]
