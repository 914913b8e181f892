"""docs/commands.md, written from the help of every command.

    python bench/commands.py             # write it anew
    python bench/commands.py --check     # say whether it is out of date, with exit code 1
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from mixkvq.cli.defaults import COMMANDS, SHARED
from mixkvq.cli.main import command as mixkvq
from mixkvq.cli.options import run, tool

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
WIDTH = 110
HEAD = f"""# Commands

Written by `python bench/commands.py` from the help of each command. `python -m mixkvq` is the same as `mixkvq`, and `run`, `path` and the others also
start alone: `python -m bridge.run`, `python -m bridge.path`, `python -m mixkvq.calibrate`, ...

## Settings file

Options that are not given come from a settings file, if there is one: `config.toml` in the user's folder for settings (`~/.config/mixkvq/` on Linux;
`mixkvq doctor` says where), or the file that `MIXKVQ_CONFIG` names; where that is empty, none is read. It has tables
{", ".join(f"`[{name}]`" for name in COMMANDS)}, with the long options of these commands without dashes, and `[all]` for
{", ".join(f"`{name}`" for name in SHARED)} of every command that has them. The command line goes before a command's table, and that before
`[all]`. What is no option is an error.

```toml
[all]
threads = 8

[run]
ctx = 16384
kv = "quality"
no-autosave = true

[evaluate]
kv = ["q8_0", "balanced"]
```

## Completion

`eval "$(mixkvq completion bash)"` in `~/.bashrc`, the same with `zsh` in `~/.zshrc`; `mixkvq completion fish | source` in fish's `config.fish`.

## Exit status

0, or 2 for a mistake in the command, 1 for a failure, 130 after Ctrl-C. What went wrong is one sentence on stderr; `MIXKVQ_DEBUG=1` in the
environment shows where an error came from.
"""


def helps(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """A command's name and help, then those of its own commands."""
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH, help_option_names=["-h", "--help"])
    yield context.command_path, command.get_help(context)
    for inner, found in getattr(command, "commands", {}).items():
        yield from helps(found, inner, context)


def text() -> str:
    sections = [f"## {name}\n\n```\n{what.rstrip()}\n```\n" for name, what in helps(mixkvq, "mixkvq")]
    return "\n".join([HEAD, *sections])


@tool()
@click.option("--check", is_flag=True, help="Only say whether the document is out of date.")
def main(check: bool) -> int:
    """Write docs/commands.md."""
    new = text()
    if DOCUMENT.is_file() and DOCUMENT.read_text(encoding="utf-8") == new:
        return 0
    if check:
        click.echo(f"docs/{DOCUMENT.name} is out of date: python bench/commands.py")
        return 1
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, "bench/commands.py"))
