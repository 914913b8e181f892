"""Models with a profile inside: putting one in, taking it out, replacing it by one of the newest version.

Models are copied in blocks, checked, and renamed when they are whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from typing import BinaryIO

from .errors import ModelFileError, ProfileError
from .gguf_header import Header, padded
from .memory import format_bytes
from .model_file import read_header
from .outputs import check_output, writing
from .profile import PREFIX, Profile, check_model, read_profile, write_keys, write_profile

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes to do."""

_BLOCK = 1 << 22


def embed(
    model: str | os.PathLike[str], profile: Profile, out: str | os.PathLike[str], on_progress: OnProgress | None = None, *, overwrite: bool = True
) -> None:
    """Write a copy of a model with the profile in its keys, in place of one that is there; `out` may be the model.

    overwrite: whether a model that is there is replaced, here and in the functions below; if not, FileExistsError is raised.

    Everything else in the copy is the same, byte for byte. Of a model in several files give the first; only that one is written.

    Raises ProfileError if the profile is not for this model or the disk has too little room, ModelFileError for an unreadable model, SettingsError if
    `out` cannot be written or is no model, OSError.
    """
    check_model(profile, model)
    with tempfile.TemporaryDirectory() as folder:
        keys = os.path.join(folder, "keys.gguf")
        write_keys(keys, profile)
        pairs = [place for name, place in read_header(keys).places.items() if name.startswith(PREFIX)]
        with open(keys, "rb") as f:
            added = b"".join(_read(f, start, end) for start, end in pairs)
    _rewrite(os.fspath(model), os.fspath(out), added, len(pairs), on_progress, overwrite)


def extract(model: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = True) -> Profile:
    """Write the profile that is embedded in a model as a side-car.

    Raises ProfileError if there is none, SettingsError if `out` cannot be written or is no profile, OSError.
    """
    profile = _embedded(os.fspath(model))
    write_profile(out, profile, overwrite=overwrite)
    return profile


def remove(model: str | os.PathLike[str], out: str | os.PathLike[str], on_progress: OnProgress | None = None, *, overwrite: bool = True) -> None:
    """Write a copy of a model without its profile, whatever state that is in; `out` may be the model.

    Raises ProfileError if it has none or the disk has too little room, ModelFileError for an unreadable model, OSError.
    """
    header = read_header(model)
    if header.values.get("general.type") == "mixkvq-profile" or not any(key.startswith(PREFIX) for key in header.values):
        raise ProfileError(f"{os.fspath(model)} has no profile embedded.")
    _rewrite(os.fspath(model), os.fspath(out), b"", 0, on_progress, overwrite)


def _embedded(path: str) -> Profile:
    profile = read_profile(path)
    if not profile.embedded:
        raise ProfileError(f"{path} is a profile already, not a model with one embedded.")
    return profile


def _read(f: BinaryIO, start: int, end: int) -> bytes:
    f.seek(start)
    return f.read(end - start)


def _rewrite(model: str, out: str, added: bytes, n_added: int, on_progress: OnProgress | None, overwrite: bool) -> None:
    """Copy a model with other profile keys: everything else, and the order of it, stays as it is."""
    header = read_header(model)
    _check_name(model, out, header)
    check_output(out, "model", force=True)
    size = os.path.getsize(model)
    _check_room(out, size + len(added))
    report = on_progress or (lambda done, total: None)
    with open(model, "rb") as f, writing(out, overwrite=overwrite) as temporary:
        kept = [place for name, place in header.places.items() if not name.startswith(PREFIX)]
        total = 2 * max(1, size - header.data)  # written, then read again
        with open(temporary, "wb") as g:
            g.write(_read(f, 0, 16) + struct.pack("<Q", len(kept) + n_added))
            for start, end in kept:
                g.write(_read(f, start, end))
            g.write(added)
            g.write(_read(f, *header.directory))
            g.write(bytes(padded(g.tell(), header.alignment) - g.tell()))
            digest = _copy(f, header.data, g, lambda done: report(done, total))
            g.flush()
            os.fsync(g.fileno())
        copy = read_header(temporary)
        with open(temporary, "rb") as g:
            same = _copy(g, copy.data, None, lambda done: report(total // 2 + done, total)) == digest
        if not same or _places(copy) != _places(header) or _others(copy) != _others(header):
            raise ProfileError(f"The copy of {model} was not written correctly; {out} is left as it was.")


def _copy(f: BinaryIO, start: int, to: BinaryIO | None, report: Callable[[int], None]) -> bytes:
    """Copy from `start` to the end in blocks; returns a hash of what was read."""
    digest, done = hashlib.blake2b(), 0
    f.seek(start)
    while block := f.read(_BLOCK):
        digest.update(block)
        if to is not None:
            to.write(block)
        done += len(block)
        report(done)
    return digest.digest()


def _places(header: Header) -> dict[str, tuple[tuple[int, ...], int, int]]:
    return {name: (t.shape, t.type, t.offset - header.data) for name, t in header.tensors.items()}


def _others(header: Header) -> list[str]:
    return [key for key in header.values if not key.startswith(PREFIX)]


def _check_name(model: str, out: str, header: Header) -> None:
    count = header.values.get("split.count", 0)
    if isinstance(count, int) and count > 1 and not re.search(rf"-00001-of-{count:05d}\.gguf$", out):
        raise ModelFileError(f"{model} is the first of {count} files of a model, so the name of its copy must end in -00001-of-{count:05d}.gguf.")


def _check_room(out: str, size: int) -> None:
    folder = os.path.dirname(os.path.abspath(out))
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ProfileError(f"{out} takes {format_bytes(size)}, and {format_bytes(free)} are free in {folder}.")


def upgrade(path: str | os.PathLike[str], out: str | os.PathLike[str], on_progress: OnProgress | None = None, *, overwrite: bool = True) -> int:
    """Write a profile, or a model with one embedded, in the newest version of the format; `out` may be the same file. Returns the version it had."""
    profile = read_profile(path)
    if profile.embedded:
        embed(path, profile, out, on_progress, overwrite=overwrite)
    else:
        write_profile(out, profile, overwrite=overwrite)
    return profile.version
