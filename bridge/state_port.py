"""llama.cpp's own functions for states, of a whole context or of one of its sequences."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

from mixkvq.core.native import native

from ._compat import C

# Before a sequence's state, with a number behind it, in newer versions. A context's begins with the length and name of its architecture.
_SEQUENCE_MAGIC = 0xAF143CD8


class StatePort:
    """llama.cpp's own functions for the state of a context, or of one sequence. Sizes are in bytes, 0 where it fails."""

    def __init__(self, context: Any, sequence: int | None = None) -> None:
        self._context, self._sequence = context, sequence
        self.flags = 0 if sequence is None else native().STATE_SEQUENCE

    def size(self) -> int:
        """Bytes of the state, with rows in F16."""
        if self._sequence is None:
            return int(C.llama_state_get_size(self._context))
        return int(C.llama_state_seq_get_size(self._context, self._sequence))

    def get(self, address: int, size: int) -> int:
        """Write the state to memory of so many bytes; how many it has taken."""
        data = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        if self._sequence is None:
            return int(C.llama_state_get_data(self._context, data, size))
        return int(C.llama_state_seq_get_data(self._context, data, size, self._sequence))

    def set(self, address: int, size: int, *, may_write: bool = False) -> int:
        """Read the state from memory; how many bytes it has read.

        may_write: whether the bytes may be changed on the way. Then a context of one sequence goes on in the cell where it would have.

        That matters where tokens leave a sliding window: after the state of a whole context llama.cpp looks for free cells from the first one on,
        after that of a sequence from its last one on, and the two differ in their first bytes.
        """
        before = self._before_cells(address, size) if may_write and self._sequence is None else 0
        sequence = self._sequence
        if before:
            C.llama_memory_clear(C.llama_get_memory(self._context), True)
            head = self._head_of_sequence()
            skipped = max(0, before - len(head))
            address, size, sequence = address + skipped, size - skipped, 0
            ctypes.memmove(address, head, len(head))
        data = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        if sequence is None:
            return int(C.llama_state_set_data(self._context, data, size))
        return int(C.llama_state_seq_set_data(self._context, data, size, sequence))

    def cut(self, position: int) -> None:
        """Remove the cells from a position on, which only kept others in their places; -1: none."""
        whole = range(C.llama_n_seq_max(self._context))
        for sequence in (whole if self._sequence is None else [self._sequence]) if position >= 0 else ():
            C.llama_memory_seq_rm(C.llama_get_memory(self._context), sequence, position, -1)

    def _before_cells(self, address: int, size: int) -> int:
        """How many bytes of a context's state come before what that of its only sequence begins with; 0 if it has several, or recurrent states."""
        model = C.llama_get_model(self._context)
        if C.llama_n_seq_max(self._context) != 1 or C.llama_model_is_recurrent(model) or C.llama_model_is_hybrid(model) or size < 4:
            return 0
        return 4 + ctypes.c_uint32.from_address(address).value

    def _head_of_sequence(self) -> bytes:
        """What stands before the cells of sequence 0; the context is empty."""
        data = (ctypes.c_uint8 * max(8, int(C.llama_state_seq_get_size(self._context, 0))))()
        C.llama_state_seq_get_data(self._context, data, len(data), 0)
        head = struct.pack("<Ii", _SEQUENCE_MAGIC, 0)
        return head if bytes(data[:8]) == head else b""
