"""What can go wrong, as exceptions whose text is one sentence for a person.

Every error is a `BridgeError` and also the built-in error that fits, so that `except ValueError` around `llama_cpp.Llama` keeps
working. `exit_code` is what the command line returns: 2 where the request is at fault, 1 where llama.cpp or the machine is.
"""

from __future__ import annotations


class BridgeError(Exception):
    """Base of all errors of this package.

    command: the sentence for a command line, where it is another one.
    """

    exit_code = 2

    def __init__(self, *args: object, command: str | None = None) -> None:
        super().__init__(*args)
        self.command = command


class SettingsError(BridgeError, ValueError):
    """A preset, a cache type or an option that does not exist or does not go together with another."""


class ModelFileError(BridgeError, ValueError):
    """The model file is missing, not GGUF, truncated, or not a model that llama.cpp can load."""


class ProfileError(BridgeError, ValueError):
    """The profile is unreadable, of a newer format version, or made for another model."""


class StateError(BridgeError, ValueError):
    """A saved state is unreadable, damaged, of another version, or does not fit the context."""


class GeometryError(BridgeError, ValueError):
    """No layer of the model has a key/value cache of a shape that MixKVQ can pack."""


class ContextTooLargeError(BridgeError, MemoryError):
    """The cache for the requested context does not fit the memory that is free."""


class VersionError(BridgeError, RuntimeError):
    """llama-cpp-python, its ggml or our native part is missing or of a version that is not supported."""


class ContextError(BridgeError, RuntimeError):
    """llama.cpp could not create the context, or failed while it evaluated tokens."""

    exit_code = 1


class BusyError(BridgeError, RuntimeError):
    """The engine has as many requests waiting as it takes."""

    exit_code = 1


class StoreError(BridgeError, RuntimeError):
    """The store of chats cannot be read or written: a full disk, a newer version, a file that is none."""

    exit_code = 1


class TimeLimitError(BridgeError, TimeoutError):
    """A request took longer than it may."""

    exit_code = 1


class CacheNotUsedError(BridgeError, RuntimeError):
    """The model was loaded but its cache is not a MixKVQ cache."""

    exit_code = 1


def check_text(text: str, what: str) -> None:
    """Raises SettingsError if a string is not Unicode text: it holds half of a surrogate pair, or bytes that were not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise SettingsError(f"{what} is not Unicode text: character {e.start + 1} is {text[e.start]!r}.") from None
