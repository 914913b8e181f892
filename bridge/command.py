"""What the command lines share: a mistake or a failure ends in one sentence on stderr and an exit code, without a traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import click

from . import streams
from .errors import BridgeError, ContextError, for_command

INTERRUPTED = 130  # exit code after Ctrl-C


def run(command: click.Command, module: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of `python -m module` (arguments: sys.argv's).

    Returns what it returns, 2 for a mistake of the user, 1 for a failure, 130 after Ctrl-C. With --verbose a failure shows where it came from.
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
    verbose = any(a in ("-v", "--verbose") for a in given)
    try:
        with command.make_context(f"python -m {module}", given) as context:  # command.main would exit by itself where a pipe breaks
            code = command.invoke(context)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.UsageError as e:
        return complain(f"{' '.join(e.format_message().split()).rstrip('.')}. See --help.", 2)
    except click.ClickException as e:
        return complain(" ".join(e.format_message().split()), 2)
    except BridgeError as e:
        if verbose and isinstance(e, ContextError):
            traceback.print_exc()
        return complain(for_command(e), e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return 0  # the reader of our output went away, as `head` does
    except MemoryError:
        return complain("There is not enough memory.", 1)
    except Exception as e:  # noqa: BLE001 - a person at a terminal gets a sentence
        if verbose:
            traceback.print_exc()
        if isinstance(e, OSError):
            name = e.filename2 or e.filename
            return complain(f"{name}: {e.strerror}." if name else f"{e.strerror or e}.", 1)
        return complain(f"{type(e).__name__}: {' '.join(str(e).split())}", 1)


def complain(sentence: str, code: int) -> int:
    streams.say(f"error: {sentence}")
    return code
