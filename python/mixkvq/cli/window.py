"""`mixkvq chat`: a window with the chats of this machine, over a server of its own; or the chat on the terminal."""

from __future__ import annotations

import contextlib
import html
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import platformdirs
from click.core import ParameterSource
from rich.console import Console

from ..core.errors import SettingsError
from ..core.machine import free_memory
from ..core.memory import largest_that_fits
from ..core.model_file import ModelFile
from ..core.profile import with_profile
from ..core.settings import Kv
from . import run, serve, streams
from .options import tool

LARGEST = 1 << 20  # tokens; a longer context is not looked for
_SHARED = (
    *("model", "ctx", "parallel", "threads", "batch", "device", "gpu_layers", "kv", "profile", "window", "sinks", "stock", "lora"),
    *("temp", "top_k", "top_p", "min_p", "predict", "chat_template", "chat_template_file", "park_size", "verbose"),
)
_TERMINAL = {"predict": "max_tokens"}  # what `mixkvq run` calls otherwise
_NO_TERMINAL = ("parallel", "lora", "chat_template", "chat_template_file", "park_size")
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge", "brave-browser")
_PROFILE = Path(platformdirs.user_data_dir("mixkvq", appauthor=False)) / "window"
_VIEW = "import sys, webview; webview.create_window('MixKVQ', sys.argv[1], width=1200, height=850); webview.start()"


@tool()
@click.option("--terminal", is_flag=True, help="Chat on the terminal, without a window.")
@click.option("--private", is_flag=True, help="Keep nothing: chats are gone with the window.")
@click.option("--no-open", is_flag=True, help="Open no window; print the address for a browser.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="Port of the server on 127.0.0.1; 0: any that is free.")
def command(**given: Any) -> int:
    """Chat with MODEL, a GGUF file (default: the built-in model), in a window.

    Chats are kept in a file of yours and come back with the next window. Without a display, or with --terminal, it is the chat of `mixkvq run`.
    """
    own = {name: given.pop(name) for name in ("terminal", "private", "no_open", "port")}
    if not own["terminal"] and not own["no_open"] and not _has_display():
        streams.say("mixkvq: there is no display, so the chat is here in the terminal; --no-open gives an address for a browser")
        own["terminal"] = True
    if own["terminal"]:
        return _terminal(given, own["private"])
    missing = [name for name in serve.NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        needs, words = ", ".join(missing), " ".join(missing)
        raise SettingsError(f"The window needs {needs}; install them with: pip install {words}. --terminal needs none of them.")
    return _window(given, **own)


command.params = [p for name in _SHARED for p in serve.command.params if p.name == name] + command.params


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _terminal(given: dict[str, Any], private: bool) -> int:
    """The chat of `mixkvq run`, with what was said of it. Raises SettingsError for what only the window has."""
    context = click.get_current_context()
    said = [name for name in given if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    for name in _NO_TERMINAL:
        if name in said:
            raise SettingsError(f"--{name.replace('_', '-')} is an option of the window; the terminal has one chat at a time.")
    options: dict[str, Any] = run.command.make_context("run", []).params
    options.update({_TERMINAL.get(name, name): given[name] for name in said}, no_autosave=private)
    checked = run.check(options)
    from .chat import chat

    return chat(checked, Console(file=sys.stderr, highlight=False))


def _window(given: dict[str, Any], *, private: bool, no_open: bool, port: int, terminal: bool) -> int:
    from ..chats import Store, default_path
    from ..server.running import listening
    from ..server.running import serve as run_server
    from ..server.window import Window, opened

    folder = None if private else Path(platformdirs.user_cache_dir("mixkvq", appauthor=False)) / "states"
    options: dict[str, Any] = serve.command.make_context("serve", []).params
    options.update(given, park=None if folder is None else str(folder))
    file, kv, rules = serve._checked(options)
    with Store(None if private else default_path()) as store:
        where = listening("127.0.0.1", port)
        free = free_memory().bytes  # before anything is loaded
        service = serve._service(options, file, kv, Console(file=sys.stderr, highlight=False))
        service.timeout = None  # who asks sees what happens, and can stop it
        key, number = secrets.token_urlsafe(32), where.getsockname()[1]
        rules = replace(rules, keys=(key,), cookie=f"mixkvq-{number}")
        address = f"http://127.0.0.1:{number}/open?key={key}"
        try:
            with _entrance(address) as entrance:

                def ready() -> None:
                    streams.say(f"mixkvq: {service.name}, {service.facts['what']}; Ctrl-C ends it")
                    if no_open:
                        streams.say(f"mixkvq: {address}")
                    else:
                        _open(entrance.as_uri(), entrance.parent / "window" if private else _PROFILE)

                run_server(service, rules, where, ready, Window(service, store, folder, lambda: _fits(file, kv, free)).routes(opened(rules)))
            return 0
        finally:
            if service.engine is not None:
                service.engine.close()


def _fits(file: ModelFile, kv: Kv, free: int) -> dict[str, int | None]:
    """How many tokens fit into so many bytes, packed and in F16; LARGEST: that or more, None: no such context can be created."""
    from bridge.dry_run import measure_context

    def longest(settings: Kv | None) -> int | None:
        def measure(n_ctx: int) -> int | None:
            need = measure_context(file, settings, n_ctx)
            return None if need is None else need.all

        need = measure(LARGEST)
        return None if need is None else LARGEST if need <= free else largest_that_fits(LARGEST, need, free, 0, measure)

    return {"packed": longest(with_profile(kv, file)), "f16": longest(None), "trained": file.n_ctx_train, "free": free, "largest": LARGEST}


@contextlib.contextmanager
def _entrance(address: str) -> Iterator[Path]:
    """A file that leads to the address, which has the key: other users can see the arguments of programs, but not read the file."""
    with tempfile.TemporaryDirectory(prefix="mixkvq-") as folder:  # the user's alone
        path = Path(folder) / "chat.html"
        path.write_text(f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(address)}"><title>MixKVQ</title>\n', encoding="utf-8")
        yield path


def _open(entrance: str, profile: Path) -> None:
    """pywebview's window, else Chromium's, else the browser. When a window of its own is closed, the server ends.

    profile: Chromium's folder; without one of its own a browser that runs already would take the window over.
    """
    program = next((path for name in _CHROMIUM if (path := shutil.which(name))), None)
    if importlib.util.find_spec("webview") is not None:
        words = [sys.executable, "-c", _VIEW, entrance]
    elif program is not None:
        profile.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = [program, f"--app={entrance}", f"--user-data-dir={profile}", "--no-first-run", "--window-size=1200,850"]
    else:
        if not webbrowser.open(entrance):
            streams.say(f"mixkvq: no browser was found; open {entrance}")
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
