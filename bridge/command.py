"""What the command lines share: a mistake or a failure ends in one sentence on stderr and an exit code, without a traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from . import streams
from .errors import BridgeError, ContextError, for_command

INTERRUPTED = 130  # exit code after Ctrl-C
DEBUG = "MIXKVQ_DEBUG"  # variable of the environment


def run(command: click.Command, module: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of `python -m module`, or of a script if that is a path (arguments: sys.argv's).

    Returns what it returns, 2 for a mistake of the user, 1 for a failure, 130 after Ctrl-C. With --verbose or MIXKVQ_DEBUG=1 a failure shows where it
    came from.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with streams.of_command():
        if sys.stdout is None:
            return complain("stdout is closed, so there is nowhere to write to.", 2)
        code = _guarded(command, module, given)
        unwritten = streams.flush_stdout()
        if unwritten is not None and code == 0 and not isinstance(unwritten, BrokenPipeError):
            return complain(f"stdout: {unwritten.strerror}.", 1)
        return code


def _guarded(command: click.Command, module: str, given: list[str]) -> int:
    debug = os.environ.get(DEBUG, "") not in ("", "0")
    verbose = debug or any(a in ("-v", "--verbose") for a in given)
    name = f"python {module}" if module.endswith(".py") else f"python -m {module}"
    try:
        # command.main would exit by itself where a pipe breaks
        with command.make_context(name, list(given), obj=[*name.split(), *given]) as context:
            code = command.invoke(context)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.UsageError as e:
        return complain(f"{' '.join(e.format_message().split()).rstrip('.')}. See --help.", 2)
    except click.ClickException as e:
        return complain(" ".join(e.format_message().split()), 2)
    except BridgeError as e:
        if debug or (verbose and isinstance(e, ContextError)):
            traceback.print_exc()
        return complain(for_command(e), e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return 0  # the reader of our output went away, as `head` does
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):
            return 0  # rich's way to say so
        raise
    except MemoryError:
        return complain("There is not enough memory.", 1)
    except Exception as e:  # noqa: BLE001 - a person at a terminal gets a sentence
        if verbose:
            traceback.print_exc()
        if isinstance(e, OSError):
            name = e.filename2 or e.filename
            return complain(f"{name}: {e.strerror}." if name else f"{e.strerror or e}.", 1)
        what = f"{type(e).__name__}: {' '.join(str(e).split())}".rstrip(".: ")
        return complain(f"{what}. That should not happen; {DEBUG}=1 in the environment shows where it did.", 1)


def command_line() -> list[str]:
    """The words of the command line that is running, or none."""
    context = click.get_current_context(silent=True)
    words = context.find_root().obj if context is not None else None
    return list(words) if isinstance(words, list) else []


def complain(sentence: str, code: int) -> int:
    streams.say(f"error: {sentence}")
    return code
