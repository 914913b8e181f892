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
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from ..core.embedding import OnProgress, embed, extract, remove, upgrade
from ..core.files import write_atomically
from ..core.outputs import check_json, check_output
from ..core.profile import PROFILE_VERSION, load_profile, read_json, read_profile, to_json, write_profile
from .options import SETTINGS, files, force_option, run, version_option


@contextlib.contextmanager
def _bar(what: str) -> Iterator[OnProgress]:
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run(command, "mixkvq.convert", arguments)
