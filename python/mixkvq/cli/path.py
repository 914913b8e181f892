"""`python -m bridge.path`: print the path of the ggml backend, for GGML_BACKEND_PATH of a stock llama.cpp program."""

from __future__ import annotations

import os

import click

from bridge.library import library_path

from .command import run


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mixkvq", message="%(package)s %(version)s")
def command() -> None:
    """Print the path of the ggml backend, for the variable GGML_BACKEND_PATH of a llama.cpp program."""
    click.echo(os.fsencode(library_path()))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 for a mistake of the user."""
    return run(command, "bridge.path", arguments)
