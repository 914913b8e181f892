"""Profiles from one form into another: side-car, embedded in a model, JSON, older versions of the format.

    python -m mixkvq.convert embed model.gguf model.mixkvq.gguf -o with-profile.gguf
    python -m mixkvq.convert extract with-profile.gguf -o model.mixkvq.gguf
    python -m mixkvq.convert remove with-profile.gguf -o model.gguf
    python -m mixkvq.convert to-json model.mixkvq.gguf -o model.json
    python -m mixkvq.convert from-json model.json -o model.mixkvq.gguf
    python -m mixkvq.convert upgrade old.mixkvq.gguf

OUT is a file of its own, and what is there already is replaced with --force only, never by a file of another kind. Models are copied in blocks,
checked, and renamed when they are whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click
from gguf import GGUFValueType
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from bridge.errors import ModelFileError, ProfileError
from bridge.files import write_atomically
from bridge.memory import format_bytes
from bridge.model_file import Header, read_header

from .command import SETTINGS, files, force_option, run, version_option
from .outputs import check_json, check_output, writing
from .profile import (
    PREFIX,
    PROFILE_VERSION,
    Profile,
    check_model,
    from_json,
    read_profile,
    to_json,
    write_keys,
    write_profile,
)

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes to do."""

_BLOCK = 1 << 22
_ALIGNMENT = 32  # where general.alignment says nothing
_WIDTHS = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


# ---- models with a profile inside ----------------------------------------------------------------------------------------------------


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
        with open(keys, "rb") as f:
            pairs = [(start, end) for name, start, end in _Layout(f).pairs if name.startswith(PREFIX)]
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


class _Layout:
    """Where the sections of a GGUF file lie. The file must be one that ggml's parser has accepted.

    pairs: name, start and end of every key-value pair.
    infos: start and end of the tensor directory.
    """

    def __init__(self, f: BinaryIO) -> None:
        self.f = f
        f.seek(8)
        n_tensors, n_pairs = self.numbers("<QQ")
        self.pairs = []
        for _ in range(n_pairs):
            start = f.tell()
            name = f.read(*self.numbers("<Q")).decode("utf-8", errors="replace")
            self.skip(*self.numbers("<I"))
            self.pairs.append((name, start, f.tell()))
        start = f.tell()
        for _ in range(n_tensors):
            self.skip(GGUFValueType.STRING)
            (n_dimensions,) = self.numbers("<I")
            f.seek(8 * n_dimensions + 4 + 8, os.SEEK_CUR)  # shape, type, offset
        self.infos = start, f.tell()

    def numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.f.read(struct.calcsize(layout)))

    def skip(self, kind: int) -> None:
        if kind == GGUFValueType.STRING:
            self.f.seek(self.numbers("<Q")[0], os.SEEK_CUR)
        elif kind == GGUFValueType.ARRAY:
            element, n = self.numbers("<IQ")
            if element == GGUFValueType.STRING:
                for _ in range(n):
                    self.skip(element)
            else:
                self.f.seek(n * _WIDTHS[GGUFValueType(element)], os.SEEK_CUR)
        else:
            self.f.seek(_WIDTHS[GGUFValueType(kind)], os.SEEK_CUR)


def _read(f: BinaryIO, start: int, end: int) -> bytes:
    f.seek(start)
    return f.read(end - start)


def _data_start(infos_end: int, header: Header) -> int:
    step = header.values.get("general.alignment", _ALIGNMENT)
    return -(-infos_end // step) * step


def _rewrite(model: str, out: str, added: bytes, n_added: int, on_progress: OnProgress | None, overwrite: bool) -> None:
    """Copy a model with other profile keys: everything else, and the order of it, stays as it is."""
    header = read_header(model)
    _check_name(model, out, header)
    check_output(out, "model", force=True)
    size = os.path.getsize(model)
    _check_room(out, size + len(added))
    report = on_progress or (lambda done, total: None)
    with open(model, "rb") as f, writing(out, overwrite=overwrite) as temporary:
        layout = _Layout(f)
        kept = [(start, end) for name, start, end in layout.pairs if not name.startswith(PREFIX)]
        data = _data_start(layout.infos[1], header)
        total = 2 * max(1, size - data)  # written, then read again
        with open(temporary, "wb") as g:
            g.write(_read(f, 0, 16) + struct.pack("<Q", len(kept) + n_added))
            for start, end in kept:
                g.write(_read(f, start, end))
            g.write(added)
            g.write(_read(f, *layout.infos))
            g.write(bytes(_data_start(g.tell(), header) - g.tell()))
            digest = _copy(f, data, g, lambda done: report(done, total))
            g.flush()
            os.fsync(g.fileno())
        copy = read_header(temporary)
        with open(temporary, "rb") as g:
            again = _data_start(_Layout(g).infos[1], copy)
            same = _copy(g, again, None, lambda done: report(total // 2 + done, total)) == digest
        if not same or _places(copy, again) != _places(header, data) or _others(copy) != _others(header):
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


def _places(header: Header, data: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    return {name: (t.shape, t.type, t.offset - data) for name, t in header.tensors.items()}


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


# ---- files of either kind --------------------------------------------------------------------------------------------------------------


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """A profile in any form: a side-car, a model with one embedded, or JSON (by its ending). Raises ProfileError."""
    path = os.fspath(path)
    return read_json(path) if path.endswith(".json") else read_profile(path)


def read_json(path: str | os.PathLike[str]) -> Profile:
    """A profile from a file that `to_json` made. Raises ProfileError."""
    path = os.fspath(path)
    try:
        return from_json(Path(path).read_bytes().decode("utf-8"), path)
    except UnicodeDecodeError as e:
        raise ProfileError(f"The profile {path} is not UTF-8 text (byte {e.start}).") from None
    except OSError as e:
        raise ProfileError(f"The profile {path} cannot be read: {e.strerror or e}.") from None


def upgrade(path: str | os.PathLike[str], out: str | os.PathLike[str], on_progress: OnProgress | None = None, *, overwrite: bool = True) -> int:
    """Write a profile, or a model with one embedded, in the newest version of the format; `out` may be the same file. Returns the version it had."""
    profile = read_profile(path)
    if profile.embedded:
        embed(path, profile, out, on_progress, overwrite=overwrite)
    else:
        write_profile(out, profile, overwrite=overwrite)
    return profile.version


# ---- the command line --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(what: str) -> Iterator[OnProgress]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _say(text: str) -> None:
    click.echo(text, err=True)


_OUT = click.option("-o", "--out", required=True, shell_complete=files, help="The file to write.")
_FORCE = force_option()


@click.group(no_args_is_help=False, context_settings=SETTINGS)
@version_option
def command() -> None:
    """Embed a profile in a model, take it out, convert it to JSON and back, upgrade it."""


@command.command("embed")
@version_option
@click.argument("model", shell_complete=files)
@click.argument("profile", shell_complete=files)
@_OUT
@_FORCE
def embed_command(model: str, profile: str, out: str, force: bool) -> None:
    """Write a copy of MODEL that has PROFILE (a side-car, or JSON) inside."""
    check_output(out, "model", force=force, inputs=[model, profile])
    with _bar("Copying the model") as on_progress:
        embed(model, load_profile(profile), out, on_progress, overwrite=force)
    _say(f"{out} has the profile {profile} inside; its tensors are those of {model}, byte for byte.")


@command.command("extract")
@version_option
@click.argument("model", shell_complete=files)
@_OUT
@_FORCE
def extract_command(model: str, out: str, force: bool) -> None:
    """Write the profile that is inside MODEL as a side-car."""
    check_output(out, "profile", force=force, inputs=[model])
    extract(model, out, overwrite=force)
    _say(f"{out} is the profile that {model} has inside.")


@command.command("remove")
@version_option
@click.argument("model", shell_complete=files)
@_OUT
@_FORCE
def remove_command(model: str, out: str, force: bool) -> None:
    """Write a copy of MODEL without the profile inside."""
    check_output(out, "model", force=force, inputs=[model])
    with _bar("Copying the model") as on_progress:
        remove(model, out, on_progress, overwrite=force)
    _say(f"{out} has no profile inside; its tensors are those of {model}, byte for byte.")


@command.command("to-json")
@version_option
@click.argument("profile", shell_complete=files)
@click.option("-o", "--out", shell_complete=files, help="The file to write.  [default: stdout]")
@_FORCE
def to_json_command(profile: str, out: str | None, force: bool) -> None:
    """Write PROFILE, a side-car or a model with one inside, as JSON."""
    if out is not None:
        check_json(out, "that of a profile", _is_profile, force=force, inputs=[profile])
    text = to_json(read_profile(profile))
    if out is None:
        click.echo(text.encode(), nl=False)  # UTF-8 whatever the terminal's encoding is
        return
    write_atomically(out, text, overwrite=force)
    _say(f"{out} is the profile {profile} as JSON.")


def _is_profile(found: Any) -> bool:
    return isinstance(found, dict) and {"fingerprint", "layers"} <= set(found)


@command.command("from-json")
@version_option
@click.argument("json_file", metavar="JSON", shell_complete=files)
@_OUT
@_FORCE
def from_json_command(json_file: str, out: str, force: bool) -> None:
    """Write the profile in the file JSON as a side-car."""
    check_output(out, "profile", force=force, inputs=[json_file])
    write_profile(out, read_json(json_file), overwrite=force)
    _say(f"{out} is the profile {json_file} as a side-car.")


@command.command("upgrade")
@version_option
@click.argument("profile", shell_complete=files)
@click.option("-o", "--out", shell_complete=files, help="The file to write.  [default: PROFILE itself]")
@_FORCE
def upgrade_command(profile: str, out: str | None, force: bool) -> None:
    """Write PROFILE, a side-car or a model with one inside, in the newest version of the format."""
    if out is not None:
        check_output(out, "model" if read_profile(profile).embedded else "profile", force=force, inputs=[profile])
    with _bar("Copying the model") as on_progress:
        version = upgrade(profile, out or profile, on_progress, overwrite=force or out is None)
    _say(f"{out or profile} is of version {PROFILE_VERSION}; {profile} was of version {version}.")


if __name__ == "__main__":
    sys.exit(run(command, "mixkvq.convert"))
