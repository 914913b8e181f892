"""How files of the user's are written: whole or not at all, and nothing is replaced that was not meant to be.

One rule for every command: what exists is replaced only if the user says so (`--force`), what is read is never written over, and a file of
another kind than the one that is written stays, whatever the user says. `check_target` finds out before anything is computed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from typing import Union

from .errors import ModelFileError, SettingsError
from .model_file import read_header

PathLike = Union[str, "os.PathLike[str]"]

# What is written, and how it is called in a sentence.
KINDS = {"profile": "a profile", "model": "a model", "JSON": "JSON", "plot": "a picture", "text": "text", "state": "a saved state"}

_PICTURES = (b"\x89PNG", b"%PDF", b"%!PS", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"RIFF", b"\x1f\x8b")  # of matplotlib; the last is svgz
_LARGEST_JSON = 256 << 20


def kind_of(path: PathLike) -> str:
    """What an existing file is, in a few words: one of `KINDS`' values, "empty", or something else. Raises OSError if it cannot be read."""
    with open(path, "rb") as f:
        start = f.read(4096)
        if not start:
            return "empty"
        if start[:8] == b"MIXKVQSF":
            return KINDS["state"]
        if start[:4] == b"GGUF":
            return _kind_of_gguf(path)
        if start.startswith(_PICTURES) or b"<svg" in start:
            return KINDS["plot"]
        if start.lstrip()[:1] in (b"{", b"[") and os.fstat(f.fileno()).st_size <= _LARGEST_JSON:
            with contextlib.suppress(ValueError, RecursionError):
                json.loads(start + f.read())
                return KINDS["JSON"]
    if b"\0" in start:
        return "a binary file"
    return KINDS["text"]


def _kind_of_gguf(path: PathLike) -> str:
    try:
        kind = read_header(path).values.get("general.type", "model")
    except ModelFileError:
        return "a damaged GGUF file"
    if kind == "mixkvq-profile":
        return KINDS["profile"]
    return KINDS["model"] if kind == "model" else f"a GGUF file of type {kind}"


def check_target(path: PathLike, *, force: bool, what: str, inputs: Iterable[PathLike] = ()) -> None:
    """Raises SettingsError, naming `path`, unless a file can be written there and nothing is lost by it.

    force: whether an existing file may be replaced. what: what will be written, a key of `KINDS`. inputs: files that are read, so must stay.
    Devices and pipes are written to as they are; nothing in them can be lost.
    """
    text = os.fspath(path)
    real = _real(text)
    if os.path.isdir(real) or not os.path.basename(text):
        raise SettingsError(f"{text} cannot be written: it is a folder.")
    try:
        status = os.stat(real)
    except FileNotFoundError:
        status = None
    except OSError as e:
        raise SettingsError(f"{text} cannot be written: {_reason(e)}.") from None
    if status is not None and not stat.S_ISREG(status.st_mode):
        if not os.access(real, os.W_OK):
            raise SettingsError(f"{text} cannot be written: it is write-protected.")
        return
    if status is not None:
        _check_replaced(text, real, force, what, inputs)
    try:
        handle, temporary = tempfile.mkstemp(prefix=".mixkvq-", dir=os.path.dirname(real))
        os.close(handle)
        os.unlink(temporary)
    except FileNotFoundError:
        raise SettingsError(f"{text} cannot be written: its folder does not exist.") from None
    except OSError as e:
        raise SettingsError(f"{text} cannot be written: {_reason(e)}.") from None


def _check_replaced(text: str, real: str, force: bool, what: str, inputs: Iterable[PathLike]) -> None:
    for each in inputs:
        with contextlib.suppress(OSError):
            if os.path.samefile(real, each):
                raise SettingsError(f"{text} is the file that is read, so it is not written over; give another name.")
    try:
        kind = kind_of(real)
    except OSError as e:
        raise SettingsError(f"{text} exists and cannot be read ({_reason(e)}), so it is not replaced; give another name.") from None
    if kind not in (KINDS[what], "empty"):
        raise SettingsError(f"{text} is {kind}, so it is not replaced by {KINDS[what]}; give another name.")
    if not force:
        raise SettingsError(f"{text} exists; give another name, or --force to replace it.")
    if not os.access(real, os.W_OK):
        raise SettingsError(f"{text} cannot be replaced: it is write-protected.")


def _real(path: str) -> str:
    """Where the file lies: a link stays a link to what is written."""
    try:
        return os.path.realpath(path)
    except ValueError as e:
        raise SettingsError(f"{path!r} cannot be written: {e}.") from None
    except OSError as e:  # of the working directory: it is gone
        raise SettingsError(f"{path} cannot be written: {_reason(e)}.") from None


def _reason(e: OSError) -> str:
    return (e.strerror or str(e)).rstrip(".")


@contextlib.contextmanager
def replacing(path: PathLike, *, overwrite: bool = True, private: bool = False) -> Iterator[str]:
    """The path of an empty temporary file, which takes the place of `path` if the body succeeds and is deleted if it does not.

    A file that is replaced keeps its permissions; a new one gets those of the user's other files, or with `private` the user's alone.
    Raises OSError that names `path`, FileExistsError if it must not be replaced.
    """
    text = os.fspath(path)
    real = os.path.realpath(text)
    try:
        handle, temporary = tempfile.mkstemp(prefix=".mixkvq-", dir=os.path.dirname(real))
    except OSError as e:
        raise _named(e, text) from None
    os.close(handle)
    try:
        yield temporary
        try:
            os.chmod(temporary, _mode(real, private))
            _move(temporary, real, overwrite)
        except OSError as e:
            raise _named(e, text) from None
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _mode(real: str, private: bool) -> int:
    """The permissions of a file that is written."""
    if private:
        return 0o600
    with contextlib.suppress(OSError):
        return stat.S_IMODE(os.stat(real).st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _move(temporary: str, real: str, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, real)
        return
    try:
        os.link(temporary, real)  # unlike a rename, fails if the name is taken
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.exists(real):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), real) from None
        os.replace(temporary, real)
        return
    os.unlink(temporary)


def _named(e: OSError, path: str) -> OSError:
    """The error with the user's path in place of a temporary file's."""
    return OSError(e.errno, e.strerror, path) if e.errno is not None else e


def write_atomically(path: PathLike, content: str | bytes, *, overwrite: bool = True, private: bool = False) -> None:
    """Write a file (text as UTF-8) so that it appears whole or not at all; a device or a pipe is written to.

    overwrite: whether a file that exists is replaced; check_target has asked before. private: readable by the user only.
    Raises OSError that names `path`, FileExistsError if it must not be replaced.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    if _is_device(path):
        try:
            with open(path, "wb") as f:
                f.write(data)
        except OSError as e:
            raise _named(e, os.fspath(path)) from None
        return
    with replacing(path, overwrite=overwrite, private=private) as temporary:
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise _named(e, os.fspath(path)) from None


def _is_device(path: PathLike) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
