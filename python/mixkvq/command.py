"""What the command lines of this package share: mistakes end in one sentence and an exit code, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from bridge.errors import BridgeError


def run(command: click.Command, module: str, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of `python -m module`. Returns 0, 2 for a mistake of the user, 1 for a failure, 130 after Ctrl-C."""
    try:
        code = command.main(args=None if arguments is None else list(arguments), prog_name=f"python -m {module}", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as e:
        return _complain(" ".join(e.format_message().split()), 2)
    except BridgeError as e:
        return _complain(str(e), e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader went away, as `head` does; Python must not try to flush again
        return 0
    except OSError as e:
        name = f"{e.filename2 or e.filename}: " if e.filename else ""
        return _complain(f"{name}{e.strerror or e}.", 1)
    except MemoryError:
        return _complain("There is not enough memory.", 1)


def _complain(sentence: str, code: int) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return code
