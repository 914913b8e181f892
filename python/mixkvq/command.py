"""What the command lines of this project's tools share: their options, and that a mistake ends in one sentence and an exit code."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import click

from bridge.errors import BridgeError

DEBUG = "MIXKVQ_DEBUG"
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

version_option = click.version_option(package_name="mixkvq", message="%(package)s %(version)s")


def tool(**settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """The decorator of a tool's function: a command with -h, --help and --version."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        return click.command(context_settings=SETTINGS, **settings)(version_option(function))

    return decorate


def force_option(what: str = "the file of -o") -> Callable[[Any], Any]:
    """--force: replace an existing file of the kind that is written."""
    return click.option("--force", is_flag=True, help=f"Replace {what} if it exists and is of the same kind.")


class Number(click.FloatRange):
    """A finite number within bounds; click's own range lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


SEED = click.IntRange(0, (1 << 32) - 1)
THREADS = click.IntRange(1, 1024)
COUNT = click.IntRange(1, 1 << 30)
COUNT_OR_ZERO = click.IntRange(0, 1 << 30)
F16_TOKENS = click.IntRange(0, 1 << 20)
"""Of the options --window and --sinks."""


def open_stderr() -> TextIO:
    """Another way to stderr, for progress: llama-cpp-python points file descriptor 2 at /dev/null while it loads."""
    try:
        return os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace", buffering=1)
    except OSError:  # stderr is closed
        return open(os.devnull, "w")


# ---- running a command line ------------------------------------------------------------------------------


def run(command: click.Command, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of `python -m program`, or of a script if that is a path.

    Returns 0, 2 for a mistake of the user, 1 for a failure, 130 after Ctrl-C. The environment's MIXKVQ_DEBUG=1 shows the traceback of every error.
    """
    _check_streams()
    name = f"python {program}" if program.endswith(".py") else f"python -m {program}"
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command.main(args=list(arguments), prog_name=name, standalone_mode=False, obj=[*name.split(), *arguments])
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        _forget_stdout()  # the reader went away, as `head` does
        return 0
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # rich's way to say so
            return 0
        raise
    except Exception as e:  # noqa: BLE001 - a person at a terminal gets a sentence
        if os.environ.get(DEBUG, "") not in ("", "0"):
            traceback.print_exc()
        return _complain(*_sentence(e))


def command_line() -> list[str]:
    """The command line that is running, or nothing where there is none."""
    context = click.get_current_context(silent=True)
    words = context.find_root().obj if context is not None else None
    return list(words) if isinstance(words, list) else []


def interrupted(kept: str) -> int:
    """Says what is kept after Ctrl-C; returns the exit code."""
    return _complain(kept, 130, "stopped")


def _sentence(e: Exception) -> tuple[str, int]:
    """What a person is told about an error, and the exit code."""
    if isinstance(e, click.UsageError):
        sentence = " ".join(e.format_message().split())
        path = e.ctx.command_path if e.ctx is not None else ""
        return f"{sentence} ({path} --help lists what there is.)" if path else sentence, 2
    if isinstance(e, click.ClickException):
        return " ".join(e.format_message().split()), 2
    if isinstance(e, BridgeError):
        return str(e), e.exit_code
    if isinstance(e, OSError):
        if not e.filename:
            _forget_stdout()  # it may be what cannot be written, and would fail again when Python ends
        name = f"{e.filename2 or e.filename}: " if e.filename else ""
        return f"{name}{e.strerror or e}.", 1
    if isinstance(e, MemoryError):
        return "There is not enough memory.", 1
    return f"{type(e).__name__}: {' '.join(str(e).split()).rstrip('.')}. That should not happen; {DEBUG}=1 in the environment shows where it did.", 1


def _complain(sentence: str, code: int, kind: str = "error") -> int:
    with contextlib.suppress(OSError):
        print(f"{kind}: {sentence}", file=sys.stderr, flush=True)
    return code


def _check_streams() -> None:
    """A stream that was closed is nowhere; what a stream cannot encode becomes a question mark instead of an error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as the process
        elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _forget_stdout() -> None:
    """Python must not try to flush again what could not be written."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
