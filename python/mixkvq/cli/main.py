"""The command `mixkvq`, also `python -m mixkvq`: every tool of this project under one name. What a tool needs is imported when it runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import click
from click.shell_completion import get_completion_class, shell_complete

from .command import run
from .options import SETTINGS, tool, version_option

COMMANDS = {
    "run": "Chat with a model, or get one answer, on a quantised cache.",
    "chat": "Chat with a model in a window, with chats that are kept.",
    "serve": "Serve a model over HTTP, as OpenAI's clients and llama.cpp's expect it.",
    "calibrate": "Make a profile for a model: measured precision for every layer and head.",
    "evaluate": "Measure what caches do to a model's predictions, and what they take.",
    "inspect": "Show what a profile says.",
    "convert": "Put a profile into a model, take it out, to JSON and back.",
    "lab": "List the cache codecs to compare with.",
    "path": "Print where the backend lies that other programs load.",
    "doctor": "Say what is installed and whether the cache can be used.",
    "completion": "Print what makes a shell complete this command.",
}
"""What each does, in the order of the help. Each is `command` in the module of its name, or of MODULES, but for `completion`."""
MODULES = {"chat": "window"}
COMPLETION = "_MIXKVQ_COMPLETE"  # variable of the environment by which a shell asks
SHELLS = ("bash", "zsh", "fish")


class _Lazy(MutableMapping[str, click.Command]):
    """The commands by name, each imported when it is asked for."""

    def __init__(self) -> None:
        self._names = list(COMMANDS)

    def __getitem__(self, name: str) -> click.Command:
        if name not in COMMANDS:
            raise KeyError(name)
        found: click.Command = completion if name == "completion" else importlib.import_module(f"mixkvq.cli.{MODULES.get(name, name)}").command
        return found

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
            formatter.write_dl(list(COMMANDS.items()))


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
    """Print the lines that make SHELL complete the command `mixkvq`.

    eval "$(mixkvq completion bash)" in ~/.bashrc, the same with zsh in ~/.zshrc, mixkvq completion fish | source in ~/.config/fish/config.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(command, {}, "mixkvq", COMPLETION).source())


def main(arguments: Sequence[str] | None = None, *, program: str = "mixkvq") -> int:
    """Run the command line and return the exit code; see `command`. program: how it was called."""
    if asked := os.environ.get(COMPLETION):
        return shell_complete(command, {}, "mixkvq", COMPLETION, asked)
    return run(command, "mixkvq", arguments, program=program)
