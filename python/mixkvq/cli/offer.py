"""Calibration that nobody has to think of: the first use of a model offers it, and does it only where it was told to."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from ..core.errors import BridgeError, ModelFileError
from ..core.files import write_atomically
from ..core.model_file import ModelFile, built_in_model, open_model
from ..core.profile import side_car, uniform_profile, with_profile

if TYPE_CHECKING:
    from .answer import Answer
    from .running import Options

WAYS = ("ask", "idle", "never", "now")
IDLE_SECONDS = 20.0  # without a key, until a chat counts as idle
ATTEMPTS = 3  # in the background, of one chat
PATIENCE = 10.0  # seconds until a calibration that should end is ended
_OFFERED = "offered"


def wanted(options: Options) -> bool:
    """Whether a profile could be made for the model of a command, it has none, and no other cache is asked for. The built-in model does without."""
    if options.stock is not None or options.kv.preset is not None or options.kv.profile is not None:
        return False
    file = open_model(options.model)
    try:
        uniform_profile(file)
        found = with_profile(options.kv, file).profile is not None
        with contextlib.suppress(ModelFileError):
            found = found or os.path.samefile(options.model, built_in_model())
    except BridgeError:
        return False
    return not found and os.access(os.path.dirname(os.path.abspath(options.model)), os.W_OK)


def command_for(model: str) -> list[str]:
    """What calibrates a model in a process of its own."""
    return [sys.executable, "-m", "mixkvq.calibrate", model]


def calibrate_now(options: Options) -> None:
    """Make the profile first. Raises KeyboardInterrupt after Ctrl-C; another failure is said by the command, and the cache is a preset then."""
    if wanted(options):
        threads = ["--threads", str(options.threads)] if options.threads else []
        done = subprocess.run([*command_for(options.model), "--device", options.device, *threads], stdout=subprocess.DEVNULL, check=False)
        if done.returncode == 130:
            raise KeyboardInterrupt


def first_time(file: ModelFile) -> bool:
    """Whether this model has not been offered a calibration before; from now on it has. False where that cannot be written down."""
    path = Path(platformdirs.user_data_dir("mixkvq", appauthor=False)) / _OFFERED
    mark = f"{file.fingerprint}-{file.norm}"
    try:
        known = path.read_text(encoding="utf-8").split() if path.exists() else []
        if mark in known:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "\n".join([*known, mark]) + "\n")
    except (OSError, ValueError):
        return False
    return True


def sentence(options: Options, answer: Answer) -> str:
    """What a calibration would take, judged by the prompt that has just been read, and how to have it."""
    from ..study.budget import default_seconds  # which changes how OpenMP waits: not before llama.cpp is loaded
    from ..study.steps import duration

    read = answer.speeds()["prompt_tokens_per_second"]
    about = f", about {duration(default_seconds(read))}, once" if read > 0 else ", once"
    return f"This model has no profile of its own yet: `mixkvq calibrate {shlex.quote(options.model)}` makes one{about}."


class Offer:
    """What a chat or a single answer does about a model without a profile.

    say: writes a line. ask: reads an answer from the terminal, or None where there is none. `answered` comes after each answer, `waits` before the
    user is waited for, `typed` at every key, and `returned` afterwards.
    """

    def __init__(self, options: Options, say: Callable[[str], None], ask: Callable[[str], str] | None = None) -> None:
        self.options, self.say, self.ask = options, say, ask
        self.way = options.calibrate if wanted(options) else "never"
        self._timer: threading.Timer | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._attempts = 0
        self._made = Path(side_car(options.model))
        self._part = self._made.with_name(f".{os.getpid()}-{self._made.name}")

    # ---- asking

    def answered(self, answer: Answer) -> None:
        """The first time that a model is used: say what it could have. At a terminal also: ask."""
        if self.way != "ask" or not answer.read_tokens:
            return
        self.way = "never"
        if not first_time(open_model(self.options.model)):
            return
        self.say(sentence(self.options, answer))
        if self.ask is None:
            return
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            if self.ask("Make it now? [y/N] ").strip().lower() in ("y", "yes"):
                calibrate_now(self.options)
                if self._made.exists():
                    self.say(f"{self._made.name} is used from the next start on.")

    # ---- in the background

    def waits(self) -> None:
        """The user is waited for."""
        if self.way == "idle" and self._attempts < ATTEMPTS and not self._made.exists():
            self._timer = threading.Timer(IDLE_SECONDS, self._begin)
            self._timer.daemon = True
            self._timer.start()

    def _begin(self) -> None:
        with self._lock:
            if self._process is None and self._timer is not None:
                self._attempts += 1
                command = [*command_for(self.options.model), "--quiet", "-o", str(self._part), "--device", self.options.device]
                null: Any = subprocess.DEVNULL
                self._process = subprocess.Popen(
                    ["nice", "-n", "19", *command] if os.name == "posix" else command, stdin=null, stdout=null, stderr=null
                )

    def typed(self) -> None:
        """A key: what has not been done yet is given up. It does not wait for that."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()  # as Ctrl-C

    def returned(self) -> None:
        """The user has said something, or goes: what was done meanwhile is taken."""
        self.typed()
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.returncode == 0 and self._part.exists() and not self._made.exists():
            os.replace(self._part, self._made)
            self.say(f"{self._made.name} was made meanwhile; it is used from the next start on.")
        self._part.unlink(missing_ok=True)
