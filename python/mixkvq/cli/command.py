"""What the command lines share: a mistake or a failure ends in one sentence on stderr and an exit code, without a traceback."""

from __future__ import annotations

import math
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ..core.errors import BridgeError, ContextError
from . import streams
from .defaults import Defaults, Tables, defaults_of, taken

_OPTIONS = {"n_ctx": "--ctx", "n_batch": "--batch", "n_gpu_layers": "--gpu-layers"}

INTERRUPTED = 130  # exit code after Ctrl-C
DEBUG = "MIXKVQ_DEBUG"  # variable of the environment
_ALONE = re.compile(r"python -m (?:bridge|mixkvq)\.(?=[a-z])")  # a command under its module's name


def for_command(e: BridgeError) -> str:
    """The text of an error as a command line says it: `--stock f16` for `stock='f16'`."""
    if e.command is not None:
        return e.command
    text = re.sub(r"\b(kv|stock|device|profile)='([^']*)'", r"--\1 \2", str(e))
    text = re.sub(r"^(kv|device|window|sinks) is ", r"--\1 is ", text)
    return re.sub(r"\b(n_ctx|n_batch|n_gpu_layers)\b", lambda m: _OPTIONS[m[1]], text)


def run(command: click.Command, module: str, arguments: Sequence[str] | None = None, *, program: str = "") -> int:
    """Run the command line of `python -m module`, or of a script if that is a path (arguments: sys.argv's).

    program: how it was called, if otherwise. Options that are not given come from the settings file (see `defaults`).
    Returns what the command returns, 2 for a mistake of the user, 1 for a failure, 130 after Ctrl-C. With --verbose or MIXKVQ_DEBUG=1 a failure shows
    where it came from.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = program or (f"python {module}" if module.endswith(".py") else f"python -m {module}")
    with streams.of_command():
        if sys.stdout is None:
            return complain("stdout is closed, so there is nowhere to write to.", 2)
        defaults = defaults_of(command, module)
        code, error = _guarded(command, given, program, defaults)
        if error is not None:
            if module == "mixkvq":
                error = _ALONE.sub(f"{program} ", error)
            return complain(error + _from_file(error, defaults), code)
        unwritten = streams.flush_stdout()
        if unwritten is not None and code == 0 and not isinstance(unwritten, BrokenPipeError):
            return complain(f"stdout: {unwritten.strerror}.", 1)
        return code


def _guarded(command: click.Command, given: list[str], program: str, defaults: Tables | Defaults | None) -> tuple[int, str | None]:
    """Exit code, and what went wrong in a sentence or two, if anything did."""
    debug = os.environ.get(DEBUG, "") not in ("", "0")
    verbose = debug or any(a in ("-v", "--verbose") for a in given)
    try:
        # command.main would exit by itself where a pipe breaks
        with command.make_context(program, list(given), obj=[*program.split(), *given], default_map=defaults) as context:
            code = command.invoke(context)
        return (code if isinstance(code, int) else 0), None
    except click.exceptions.Exit as e:
        return e.exit_code, None
    except click.UsageError as e:
        sentence = " ".join(e.format_message().split()).rstrip(".")
        return 2, f"{sentence}{'' if sentence.endswith('?') else '.'} See --help."
    except click.ClickException as e:
        return 2, " ".join(e.format_message().split())
    except BridgeError as e:
        if debug or (verbose and isinstance(e, ContextError)):
            traceback.print_exc()
        return e.exit_code, for_command(e)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED, None
    except BrokenPipeError:
        return 0, None  # the reader of our output went away, as `head` does
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):
            return 0, None  # rich's way to say so
        raise
    except MemoryError:
        return 1, "There is not enough memory."
    except Exception as e:  # noqa: BLE001 - a person at a terminal gets a sentence
        if verbose:
            traceback.print_exc()
        if isinstance(e, OSError):
            name = e.filename2 or e.filename
            return 1, f"{name}: {e.strerror}." if name else f"{e.strerror or e}."
        what = f"{type(e).__name__}: {' '.join(str(e).split())}".rstrip(".: ")
        return 1, f"{what}. That should not happen; {DEBUG}=1 in the environment shows where it did."


def _from_file(error: str, defaults: Tables | Defaults | None) -> str:
    """A sentence more for an error about options that nobody typed."""
    found = [f"{option} from {path}" for option, _, path in taken(defaults) if re.search(rf"{option}(?![\w-])", error)]
    return f" ({', '.join(found)}.)" if found else ""


def typed_first(given: dict[str, Any], *alternatives: Sequence[str]) -> None:
    """Of groups of parameters that exclude each other: what was typed of one takes back what the settings file says of the others.

    given: parameters of the command that is running.
    """
    context = click.get_current_context(silent=True)
    if context is None:
        return
    for group in alternatives:
        if any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in group):
            for name in (name for other in alternatives if other is not group for name in other):
                if context.get_parameter_source(name) is ParameterSource.DEFAULT_MAP:
                    given[name] = False if isinstance(given[name], bool) else None


class Number(click.FloatRange):
    """A finite number within bounds; click's own range lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Raises click.BadParameter."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell_complete of parameters that are paths."""
    return [CompletionItem(incomplete, type="file")]


def command_line() -> list[str]:
    """The words of the command line that is running, or none."""
    context = click.get_current_context(silent=True)
    words = context.find_root().obj if context is not None else None
    return list(words) if isinstance(words, list) else []


def complain(sentence: str, code: int) -> int:
    """An error on stderr; returns the exit code."""
    streams.say(f"error: {sentence}")
    return code
