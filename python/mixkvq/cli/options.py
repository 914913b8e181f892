"""What the command lines of this project's tools share: their options, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import click
from click.shell_completion import CompletionItem

from bridge.installed import require_llama

from . import command as funnel
from . import streams
from .command import INTERRUPTED, Number, files, typed_first

__all__ = [
    "COUNT",
    "COUNT_OR_ZERO",
    "F16_TOKENS",
    "SEED",
    "SETTINGS",
    "THREADS",
    "Model",
    "Number",
    "files",
    "force_option",
    "interrupted",
    "quiet_llama",
    "run",
    "tool",
    "typed_first",
]

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

version_option = click.version_option(package_name="mixkvq", message="%(package)s %(version)s")


def tool(**settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """The decorator of a tool's function: a command with -h, --help and --version."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        command: click.Command = click.command(context_settings=SETTINGS, **settings)(version_option(function))  # type: ignore[no-untyped-call]
        return command

    return decorate


def force_option(what: str = "the file of -o") -> Callable[[Any], Any]:
    """--force: replace an existing file of the kind that is written."""
    return click.option("--force", is_flag=True, help=f"Replace {what} if it exists and is of the same kind.")


def run(command: click.Command, module: str, arguments: Sequence[str] | None = None) -> int:
    """As `command.run`; but SIGTERM and a closed terminal end a tool as Ctrl-C does, so that what was measured is kept and nothing else."""
    with _like_ctrl_c():
        return funnel.run(command, module, arguments)


@contextlib.contextmanager
def _like_ctrl_c() -> Iterator[None]:
    """Handle the signals that would end the program on the spot as SIGINT is handled meanwhile; afterwards it ends by the one that came."""
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # a program in the background is deaf to Ctrl-C only
            raise KeyboardInterrupt
        handler(number, frame)

    names = [getattr(signal, name) for name in ("SIGHUP", "SIGTERM") if hasattr(signal, name)]
    caught = [s for s in names if threading.current_thread() is threading.main_thread() and signal.getsignal(s) is signal.SIG_DFL]
    for s in caught:
        signal.signal(s, end)
    try:
        yield
    finally:
        for s in caught:
            signal.signal(s, signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])


class Model(click.ParamType):  # type: ignore[type-arg]  # older versions of click have no argument there
    """The path of a model, as text. What is no file gets the sentence of `model_file`: advice where it is an address or a name on a hub."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as it was given. Raises ModelFileError if there is no file."""
        if not os.path.isfile(value):
            from ..core.model_file import read_header  # NumPy, which --help can do without

            read_header(value)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files."""
        return files(ctx, param, incomplete)


def quiet_llama() -> None:
    """llama.cpp's errors are not printed from now on: what matters is in ours. Raises VersionError if llama-cpp-python is not what it must be."""
    require_llama()
    from bridge.log import quiet_log

    quiet_log()


SEED = click.IntRange(0, (1 << 32) - 1)
THREADS = click.IntRange(1, 1024)
COUNT = click.IntRange(1, 1 << 30)
COUNT_OR_ZERO = click.IntRange(0, 1 << 30)
F16_TOKENS = click.IntRange(0, 1 << 20)
"""Of the options --window and --sinks."""


def interrupted(kept: str) -> int:
    """Says what is kept after Ctrl-C; returns the exit code."""
    streams.say(f"stopped: {kept}")
    return INTERRUPTED
