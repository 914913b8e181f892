"""The native module: page format, kernels and the handle of the loaded backend.

Arrays are NumPy arrays of exactly the named type; a wrong type, shape or number is a ValueError that says which.
A page has 128 cells; D and Dv are the key and value head sizes.
"""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypedDict, final, type_check_only

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

__version__: str
PAGE_CELLS: int
FORMAT_VERSION: int
STATE_SEQUENCE: int  # a state is of one sequence, not of the whole context
STATE_SHARED: int  # other sequences have cells in its stream
HAS_CUDA: bool  # whether the backend was built with kernels for NVIDIA GPUs

@final
class KeyFormat:
    """How the channels of a key head are split over the tiers (16, 8, 4, 3, 2 bits); group is the tokens per scale."""

    def __init__(self, head_size: int, tiers: Sequence[int], group: int = 128) -> None: ...
    @property
    def head_size(self) -> int: ...
    @property
    def tiers(self) -> tuple[int, int, int, int, int]: ...
    @property
    def group(self) -> int: ...
    @property
    def record_bytes(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class ValueFormat:
    """Bits of a value code; group 0 is rotated with one scale per token, else the dimensions per scale and minimum."""

    def __init__(self, head_size: int, bits: int, group: int = 0) -> None: ...
    @property
    def head_size(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def record_bytes(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@type_check_only
class PresetInfo(TypedDict):
    name: str
    alias: str
    description: str
    default: bool
    body_bits: float  # at head size 128, as key_tiers
    key_tiers: list[int]
    key_group: int
    value_bits: int
    value_group: int

def checksum(data: Buffer) -> int:
    """XXH64 of contiguous bytes, seed 0."""

def body_bits(key_format: KeyFormat, value_format: ValueFormat) -> float:
    """Bits per element of a head's records, scales and order included."""

def presets() -> list[PresetInfo]: ...
def preset(name: str, head_size: int) -> tuple[KeyFormat, ValueFormat]:
    """The formats of a preset, by name or alias, at a head size."""

def isa() -> str:
    """The instruction set in use: the best here, or what MIXKVQ_ISA names (RuntimeError if that cannot be had)."""

def isas() -> list[str]:
    """Every instruction set that is built in and that this CPU has."""

def select_tiers(
    key_format: KeyFormat,
    rows: NDArray[np.float16],
    importance: NDArray[np.float32],
    valid: NDArray[np.bool_] | None = None,
    *,
    isa: str | None = None,
) -> NDArray[np.uint8]:
    """The channels of a page [128, D] by falling salience: the order of its record, uint8 [D]."""

def pack_keys(
    key_format: KeyFormat,
    rows: NDArray[np.float16],
    importance: NDArray[np.float32],
    valid: NDArray[np.bool_] | None = None,
    *,
    isa: str | None = None,
) -> NDArray[np.uint8]:
    """The record of rows [128, D] as uint8 [record_bytes]; importance [D] is the mean |q| per channel."""

def unpack_keys(key_format: KeyFormat, record: NDArray[np.uint8], *, isa: str | None = None) -> NDArray[np.float16]: ...
def pack_values(
    value_format: ValueFormat,
    rows: NDArray[np.float16],
    valid: NDArray[np.bool_] | None = None,
    *,
    isa: str | None = None,
) -> NDArray[np.uint8]: ...
def unpack_values(value_format: ValueFormat, record: NDArray[np.uint8], *, isa: str | None = None) -> NDArray[np.float16]: ...
def read_back(
    rows: NDArray[np.float32],
    formats: Sequence[KeyFormat | ValueFormat | None],
    importance: NDArray[np.float32] | None = None,
    valid: NDArray[np.bool_] | None = None,
    *,
    threads: int = 1,
    isa: str | None = None,
) -> tuple[NDArray[np.float32], int]:
    """What the rows of a page [n_heads, 128, D] read back as when every head is packed in its format, and the bytes of the records.

    A format of None: the head stays as it is. importance [n_heads, D] is needed for keys.
    """

def attend(
    key_format: KeyFormat,
    value_format: ValueFormat,
    key_records: NDArray[np.uint8],
    value_records: NDArray[np.uint8],
    q: NDArray[np.float32],
    mask: NDArray[np.float32] | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    sink: NDArray[np.float32] | None = None,
    *,
    isa: str | None = None,
) -> NDArray[np.float32]:
    """Attention of q [n, D] over P records of one head [P, record_bytes]: float32 [n, Dv].

    mask [n, 128 P] is added to the scores, -inf hides a cell; sink [n] are logits without a value. A query that sees nothing gets zeros.
    """

def compare_predictions(
    baseline: NDArray[np.float32],
    caches: Sequence[NDArray[np.float32]],
    targets: NDArray[np.int64] | None = None,
    *,
    threads: int = 1,
    isa: str | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Compare the logits of n caches with those of a baseline, each [rows, vocabulary], row by row in float64.

    Returns the divergence of each cache from the baseline in nats [n, rows]; then, of the baseline and of each cache [1 + n, rows], -log p of the
    target (NaN without targets) and the first choice.
    ValueError for rows that are no predictions: NaN, +inf, or nothing but -inf.
    """

@final
class State:
    """A packed state on its way out or in; all of it, and llama.cpp's part, in one thread. RuntimeError once it is closed."""

    def data(self) -> tuple[int, int]:
        """Address and size of llama.cpp's part: where it writes it, or what it is to read."""

    def n_bytes(self, n: int) -> int:
        """Of the state, n of which llama.cpp has written in its part; this and the next two raise RuntimeError if that is none."""

    def to_bytes(self, n: int) -> bytes: ...
    def write(self, n: int, descriptor: int) -> int:
        """To an open file; how many bytes. Raises OSError as well."""

    def finish(self, n: int) -> int:
        """llama.cpp has read n bytes of its part: what it stands for takes effect. RuntimeError if it does not.

        The position from which on cells hold nothing and are to be removed from llama.cpp's memory, -1 if there are none.
        """

    def close(self) -> None: ...

@final
class Session:
    """The caches of the contexts that are created between begin and end; also a context manager that ends itself.

    Figures may be asked for while another thread decodes.
    """

    def end(self) -> None: ...
    def stats(self) -> dict[str, Any]:
        """The fields of mixkvq_stats; RuntimeError if no cache was created."""

    def layers(self) -> list[dict[str, Any]]:
        """The fields of mixkvq_layer_stats, one dict per cache tensor."""

    def error(self) -> str:
        """What a failed allocation or codec said, "" if nothing failed."""

    def codec_failure(self) -> BaseException | None:
        """What the last call of the codec raised, or what is wrong with its result; None if it went well or there is no codec."""

    def query_statistics(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Mean |q_d| and mean q_d^2, each [n_heads, D], of the queries that read cache tensor `index` (as in layers()).

        None if it is not the keys of a packed layer, or no query has read it yet. IndexError if there is no such tensor.
        """

    def save_state(self, size: int, flags: int = 0) -> State:
        """A state whose part of llama.cpp's takes `size` bytes. flags: STATE_SEQUENCE, STATE_SHARED. ValueError if there is no memory."""

    def load_state(self, data: Buffer, flags: int = 0) -> State:
        """A state that was saved. ValueError if it is damaged or does not fit, with the reason; nothing has changed then."""

    def __enter__(self) -> Session: ...
    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        value: BaseException | None = None,
        trace: TracebackType | None = None,
        /,
    ) -> None: ...

@final
class Backend:
    """The loaded ggml backend, by the address that its registry gives for "mixkvq_backend_api"."""

    def __init__(self, address: int) -> None: ...
    def begin(
        self,
        preset: str | None = None,
        profile: str | None = None,
        window: int = -1,
        sinks: int = -1,
        head_sizes: Sequence[tuple[int, int]] | None = None,
        codec: Callable[..., tuple[Any, float]] | None = None,
        all_threads: bool = False,
    ) -> Session:
        """Makes these the settings of the contexts that this thread creates until end(); ValueError with the backend's reason.

        all_threads: and those that threads without a session of their own create meanwhile.

        codec: takes the place of packing (see mixkvq_codec), called in the thread that decodes with layer, is_value, stream, first_cell,
        rows float32 [n_heads, 128, D], valid bool [128], q_abs and q_sqr (float32 [n_heads, D], None for values); returns (rows, bits).
        Forgotten when the Session goes.
        """

    def why_unused(self, device: str) -> str:
        """Why one of ggml's GPUs ("CUDA0") has no device of ours, "" if it has one."""
