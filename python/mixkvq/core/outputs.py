"""What the tools write: profiles, models, pictures and figures as JSON.

The rule is that of `files`. The tools ask before they load or measure anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import SettingsError
from .files import PathLike, check_target, replacing


def check_output(path: PathLike, what: str, *, force: bool, inputs: Iterable[PathLike] = ()) -> None:
    """`files.check_target`, for what appears by a rename: a device or a pipe cannot be written that way. Raises SettingsError."""
    check_target(path, force=force, what=what, inputs=inputs)
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise SettingsError(f"{os.fspath(path)} cannot be written: it is not a regular file.")


def check_json(path: PathLike, what: str, fits: Callable[[Any], bool], *, force: bool, inputs: Iterable[PathLike] = ()) -> None:
    """`check_target` for JSON of one kind: `fits` tells whether something is that, `what` is how it is called. Raises SettingsError."""
    check_target(path, force=True, what="JSON", inputs=inputs)
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    if not fits(json.loads(Path(path).read_bytes())):
        raise SettingsError(f"{os.fspath(path)} is JSON, but not {what}, so it is not replaced; give another name.")
    check_target(path, force=force, what="JSON", inputs=inputs)


def check_different(first: PathLike | None, second: PathLike | None) -> None:
    """Raises SettingsError if two outputs are one file."""
    if first is not None and second is not None and os.path.realpath(first) == os.path.realpath(second):
        raise SettingsError(f"{os.fspath(first)} cannot be two files at once; give two names.")


@contextlib.contextmanager
def writing(path: PathLike, *, overwrite: bool = True) -> Iterator[str]:
    """`files.replacing`, whose errors name `path` also where the body fails to write, as on a full disk."""
    with replacing(path, overwrite=overwrite) as temporary:
        try:
            yield temporary
        except OSError as e:
            if e.errno is not None and e.filename in (None, temporary):
                raise OSError(e.errno, e.strerror, os.fspath(path)) from None
            raise
