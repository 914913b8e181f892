"""The command `mixkvq`, also `python -m mixkvq`: every tool of this project under one name. What a tool needs is imported when it runs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import click
from click.shell_completion import get_completion_class, shell_complete

from bridge.command import run

from .command import SETTINGS, tool, version_option

COMMANDS = {
    "run": ("bridge.run", "command", "Chat with a model, or get one answer, on a quantised cache."),
    "calibrate": ("mixkvq.calibrate", "cli", "Make a profile for a model: measured precision for every layer and head."),
    "evaluate": ("mixkvq.evaluate", "command", "Measure what caches do to a model's predictions, and what they take."),
    "inspect": ("mixkvq.inspect", "command", "Show what a profile says."),
    "convert": ("mixkvq.convert", "command", "Put a profile into a model, take it out, to JSON and back."),
    "lab": ("mixkvq.lab.__main__", "main", "List the cache codecs to compare with."),
    "path": ("bridge.path", "command", "Print where the backend lies that other programs load."),
    "doctor": ("mixkvq.doctor", "command", "Say what is installed and whether the cache can be used."),
    "completion": ("mixkvq.cli", "completion", "Print what makes a shell complete this command."),
}
"""Module, name in it, and what the command does, in the order of the help."""
COMPLETION = "_MIXKVQ_COMPLETE"  # variable of the environment by which a shell asks
SHELLS = ("bash", "zsh", "fish")


class _Lazy(MutableMapping[str, click.Command]):
    """The commands by name, each imported when it is asked for."""

    def __init__(self) -> None:
        self._names = list(COMMANDS)

    def __getitem__(self, name: str) -> click.Command:
        module, attribute, _ = COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __setitem__(self, name: str, command: click.Command) -> None:
        raise TypeError("commands are listed in COMMANDS")

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands are listed in COMMANDS")


class _Group(click.Group):
    """A group that lists its commands without importing them."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.commands = _Lazy()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, _, what) in COMMANDS.items()])


@click.command(cls=_Group, invoke_without_command=True, subcommand_metavar="COMMAND [ARGS]...", context_settings=SETTINGS)
@version_option
@click.pass_context
def command(context: click.Context) -> None:
    """A quantised KV cache for llama.cpp: run models on it, measure it, fit it to a model.

    Each command has -h. Defaults of options can be kept in a settings file; `mixkvq doctor` says where it is.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@tool()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the lines that make SHELL complete the command `mixkvq`: eval "$(mixkvq completion bash)" in ~/.bashrc, the same with zsh in ~/.zshrc,
    mixkvq completion fish | source in ~/.config/fish/config.fish."""
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(command, {}, "mixkvq", COMPLETION).source())


def main(arguments: Sequence[str] | None = None, *, program: str = "mixkvq") -> int:
    """Run the command line and return the exit code; see `command`. program: how it was called."""
    if asked := os.environ.get(COMPLETION):
        return shell_complete(command, {}, "mixkvq", COMPLETION, asked)
    return run(command, "mixkvq", arguments, program=program)


if __name__ == "__main__":
    sys.exit(main())
