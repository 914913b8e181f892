"""Lists the tools: `python -m mixkvq`."""

from __future__ import annotations

import sys

import click

from .command import run, tool

TOOLS = {
    "bridge.run": "chat with a model, or get one answer, on a quantised cache",
    "mixkvq.calibrate": "make a profile for a model: measured precision for every layer and head",
    "mixkvq.evaluate": "measure what caches do to a model's predictions, and what they take",
    "mixkvq.inspect": "show what a profile says",
    "mixkvq.convert": "put a profile into a model, take it out, to JSON and back",
    "mixkvq.lab": "list the cache codecs to compare with",
    "bridge.path": "where the backend lies that other programs load",
}


@tool()
def command() -> None:
    """Say which tools there are. Each has -h."""
    for name, what in TOOLS.items():
        click.echo(f"python -m {name:<17} {what}")


if __name__ == "__main__":
    sys.exit(run(command, "mixkvq"))
