"""The settings file: what options are where the command line does not say.

    [all]                # what the commands share: device, sinks, threads, window
    threads = 8
    [run]                # one table per command, its long options without dashes
    ctx = 16384
    kv = "quality"
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from ..core.errors import SettingsError

CONFIG = "MIXKVQ_CONFIG"  # variable of the environment: the file to read, or nothing for none
COMMANDS = {
    "run": "bridge.run",
    "serve": "mixkvq.serve",
    "calibrate": "mixkvq.calibrate",
    "evaluate": "mixkvq.evaluate",
    "inspect": "mixkvq.inspect",
    "lab": "mixkvq.lab",
}
"""The commands with a table in the file, and the modules that start them alone."""
SHARED = ("device", "sinks", "threads", "window")  # options that mean the same in every command that has them
_NEVER = ("help", "version", "force")  # what is replaced is decided file by file


def settings_path() -> Path | None:
    """The settings file, which need not exist; None where the environment says that there is none."""
    given = os.environ.get(CONFIG)
    if given is not None:
        return Path(given) if given else None
    import platformdirs

    return Path(platformdirs.user_config_dir("mixkvq", appauthor=False)) / "config.toml"


def read_settings(path: Path | None) -> dict[str, dict[str, Any]]:
    """The tables of the file; none if there is no file. Raises SettingsError for what is not TOML, and for tables that no command has."""
    if path is None:
        return {}
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        tables = tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        if os.environ.get(CONFIG):
            raise SettingsError(f"The settings file {path}, which {CONFIG} names, does not exist.") from None
        return {}
    except OSError as e:
        raise SettingsError(f"The settings file {path} cannot be read: {e.strerror or e}.") from None
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError, TOMLDecodeError; a thousand brackets
        raise SettingsError(f"The settings file {path} is not TOML: {str(e).rstrip('.')}.") from None
    for name, table in tables.items():
        known = ["all", *COMMANDS]
        if name not in known:
            raise SettingsError(f"The settings file {path} has {_named(name, table)}, which no command reads; {_nearest(name, known, 'tables')}.")
        if not isinstance(table, dict):
            raise SettingsError(f"The settings file {path} has {name} = {table!r}; [{name}] is a table of options.")
    for key in tables.get("all", {}):
        if key not in SHARED:
            nearest = _nearest(key, SHARED, "options")
            raise SettingsError(f"The settings file {path} has {key!r} in [all], which is for what commands share; {nearest}.")
    return tables


def _named(name: str, value: Any) -> str:
    return f"a table [{name}]" if isinstance(value, dict) else f"{name!r} outside of a table"


def _nearest(name: str, known: Any, what: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"the nearest is {close[0]!r}" if close else f"its {what} are {', '.join(sorted(known))}"


class Defaults(Mapping[str, Any]):
    """One command's part of the settings file, by the names of its parameters: click's default_map.

    The file is read when click asks for the first value, so that --help and --version need none. `used` collects what was taken from it, by option.
    Asked for a value, it raises SettingsError for a file that cannot be read, keys that are no options and values that an option does not take.
    """

    def __init__(self, name: str, command: click.Command) -> None:
        self.name, self.command = name, command
        self.path: Path | None = None
        self.used: dict[str, Any] = {}
        self._values: dict[str, tuple[str, str, Any]] | None = None  # parameter -> table, key, value

    def __getitem__(self, parameter: str) -> Any:
        context = click.get_current_context(silent=True)
        if context is not None and context.resilient_parsing:
            raise KeyError(parameter)  # help and completion show what holds without the file
        table, key, value = self._read()[parameter]
        option = next(p for p in self.command.params if p.name == parameter)
        try:
            value = _checked(option, value)
        except click.ClickException as e:
            reason = " ".join(e.format_message().split()).partition(": ")[2] or e.message
            raise SettingsError(f"The settings file {self.path} has {key} = {value!r} in [{table}]: {reason.rstrip('.')}.") from None
        self.used[f"--{key}"] = value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> dict[str, tuple[str, str, Any]]:
        if self._values is None:
            self.path = settings_path()
            tables = read_settings(self.path)
            options = {
                name.lstrip("-"): str(p.name)
                for p in self.command.params
                if isinstance(p, click.Option) and p.name not in _NEVER
                for name in p.opts
                if name.startswith("--")
            }
            found = {options[key]: ("all", key, value) for key, value in tables.get("all", {}).items() if key in options}
            for key, value in tables.get(self.name, {}).items():
                if key not in options:
                    raise SettingsError(
                        f"The settings file {self.path} has {key!r} in [{self.name}], which is no option there; {_nearest(key, options, 'options')}."
                    )
                found[options[key]] = (self.name, key, value)
            self._values = found
        return self._values


def _checked(option: click.Parameter, value: Any) -> Any:
    """A value of the file as the option takes it on the command line. Raises click.BadParameter."""
    assert isinstance(option, click.Option)
    if option.is_flag != isinstance(value, bool):
        raise click.BadParameter("It must be true or false." if option.is_flag else "It must not be true or false.", param=option)
    if option.multiple != isinstance(value, list):
        raise click.BadParameter("It must be a list." if option.multiple else "It must be a single value.", param=option)
    if isinstance(value, bool):
        return value
    words = [part if isinstance(part, str) else str(part) for part in (value if option.multiple else [value])]
    converted = [option.type.convert(word, option, None) for word in words]  # as text: 3.5 is no number of tokens
    return converted if option.multiple else converted[0]


class Tables(Mapping[str, Defaults]):
    """The default_map of a group of commands: that of each, by its name."""

    def __init__(self, group: click.Group) -> None:
        self._group = group
        self.found: dict[str, Defaults] = {}

    def __getitem__(self, name: str) -> Defaults:
        if name not in COMMANDS or name not in self._group.commands:
            raise KeyError(name)
        return self.found.setdefault(name, Defaults(name, self._group.commands[name]))

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS and name in self._group.commands

    def __iter__(self) -> Iterator[str]:
        return (name for name in COMMANDS if name in self._group.commands)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def defaults_of(command: click.Command, module: str) -> Tables | Defaults | None:
    """What the settings file says for `python -m module`: for the command `mixkvq` and for those that are started alone."""
    if module == "mixkvq" and isinstance(command, click.Group):
        return Tables(command)
    name = next((name for name, alone in COMMANDS.items() if alone == module), None)
    return None if name is None else Defaults(name, command)


def taken(defaults: Tables | Defaults | None) -> list[tuple[str, Any, Path]]:
    """Option, value and file of all that was taken from the settings file."""
    parts = list(defaults.found.values()) if isinstance(defaults, Tables) else [] if defaults is None else [defaults]
    return [(option, value, part.path) for part in parts for option, value in part.used.items() if part.path is not None]
