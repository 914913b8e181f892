"""What is given to `bridge.Llama` and `bridge.attach`, checked before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from mixkvq.core.errors import ModelFileError, SettingsError
from mixkvq.core.memory import CELLS
from mixkvq.core.model_file import ModelFile
from mixkvq.core.settings import Kv, KvLike

from .log import log


def refuse_unknown(function: str, given: Iterable[str], known: set[str]) -> None:
    """llama_cpp.Llama takes any keyword and does nothing with it: a typing error would silently mean the default."""
    fields = {"preset", "profile", "window", "sinks"}
    for name in given:
        if name in known:
            continue
        nearest = difflib.get_close_matches(name, known | fields, n=1)
        hint = f"; the nearest is {nearest[0]!r}" if nearest else ""
        if nearest and nearest[0] in fields:
            hint += f", a field of kv: kv={{{nearest[0]!r}: ...}}"
        raise TypeError(f"{function} has no argument {name!r}{hint}.")


def check_threads(options: Mapping[str, Any]) -> None:
    """None and 0 are llama-cpp-python's defaults; of any other number that is no count llama.cpp makes what it likes. Raises SettingsError."""
    for name in ("n_threads", "n_threads_batch"):
        value = options.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31):
            raise SettingsError(f"{name} is {value!r}; it must be a number of threads, or None for llama-cpp-python's choice.")


def check_name(path: str) -> None:
    """llama-cpp-python passes the name of a file on as UTF-8."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise ModelFileError(f"The file name {path!r} is not UTF-8, so llama-cpp-python cannot open it; rename it, or make a link to it.") from None


def asks_for_something(kv: KvLike) -> bool:
    """Whether `kv` asks for something other than the default."""
    return kv is not None and kv != "balanced" and kv != Kv()


def checked_context(file: ModelFile, options: dict[str, Any]) -> int:
    """Tokens of the context that the keywords of llama_cpp.Llama ask for, in whole cells of llama.cpp. Raises SettingsError, ModelFileError."""
    n_ctx = options.get("n_ctx", 512)
    if not isinstance(n_ctx, int) or isinstance(n_ctx, bool) or not 0 <= n_ctx < 1 << 31:
        raise SettingsError(f"n_ctx is {n_ctx!r}; it must be a number of tokens, or 0 for the model's training context.")
    for name in ("n_batch", "n_ubatch"):
        value = options.get(name, 512)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise SettingsError(f"{name} is {value!r}; it must be a positive number of tokens.")
    if 0 < n_ctx < CELLS:
        log.say(f"mixkvq: {n_ctx} tokens of context were asked for; llama.cpp makes it {CELLS}, the smallest there is")
    n_ctx = n_ctx or file.n_ctx_train
    if not n_ctx:
        raise ModelFileError(f"{file.path} does not say its training context; give n_ctx.")
    # llama.cpp rounds up as well, but llama-cpp-python keeps arrays of the length asked for and would overrun them.
    n_ctx = (n_ctx + CELLS - 1) // CELLS * CELLS
    return n_ctx
