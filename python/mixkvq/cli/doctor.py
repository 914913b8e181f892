"""`mixkvq doctor`: what a report of a bug needs, on one screen.

What could fail, or end a process, is looked up in another process: this command says what is wrong with an installation, so it needs none of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from bridge.devices import NO_GPU

from ..core.errors import BridgeError
from ..core.memory import CELLS, format_bytes
from .command import files, for_command
from .defaults import COMMANDS, Defaults, read_settings, settings_path
from .options import tool

SECONDS = 120  # a GPU's driver may take its time
CONTEXT = 8192  # tokens, where neither -c nor the model says
ENVIRONMENT = ("MIXKVQ_", "GGML_", "CUDA_VISIBLE_DEVICES", "OMP_")  # how the names of variables begin that matter here
_CHILD = "import sys; n = int(sys.argv[1]); sys.path[:] = sys.argv[2 : 2 + n]; from mixkvq.cli.doctor import probe; probe(sys.argv[2 + n :])"

Found = dict[str, Any]


class Unknown(Exception):
    """Why something could not be found out."""


# ---- what is looked up, each in its turn, in another process. The results are JSON.


def _version() -> str:
    return importlib.metadata.version("mixkvq")


def _commit() -> str:
    from ..study.record import commit

    found = commit()
    if " " in found:
        raise Unknown("the running files are in no repository")
    return found


def _numpy() -> str:
    import numpy

    return numpy.__version__


def _llama_cpp_python() -> Found:
    from bridge.installed import require_llama

    require_llama()
    from bridge.backend import llama_cpp_python

    return llama_cpp_python()


def _ggml() -> str:
    from bridge.installed import require_llama

    require_llama()
    from bridge.backend import ggml_version

    return ggml_version()


def _native() -> Found:
    from ..core.native import native

    module = native()
    return {"file": module.__file__, "version": module.__version__, "format": module.FORMAT_VERSION, "cuda": module.HAS_CUDA}


def _library() -> str:
    from bridge.library import library_path

    return str(library_path())


def _isas() -> list[str]:
    from ..core.native import native

    return list(native().isas())


def _isa() -> str:
    from ..core.native import native

    try:
        return str(native().isa())
    except RuntimeError as e:
        raise Unknown(f"{e}.") from None


def _backend() -> Found:
    from bridge.installed import require_llama

    require_llama()
    from bridge.backend import examine_backend

    return examine_backend()


def _machine() -> Found:
    from ..study.record import machine

    return machine()


def _memory() -> Found:
    import psutil

    from ..core.machine import free_memory

    free = free_memory()
    return {"free": free.bytes, "limit": free.limit, "total": psutil.virtual_memory().total}


def _threads() -> int:
    from ..core.machine import physical_cores

    return physical_cores()


def _settings() -> Found:
    from .main import command

    path = settings_path()
    tables = read_settings(path)
    for name in COMMANDS:
        if tables.get(name):
            list(Defaults(name, command.commands[name]).values())  # raises for what the command does not take
    return {"file": None if path is None else str(path), "exists": path is not None and path.is_file(), "tables": sorted(tables)}


def _model(path: str) -> Found:
    from ..core.model_file import open_model

    model = open_model(path)
    sizes = sorted({f"{k}/{v}" for k, v in zip(model.head_size_k, model.head_size_v) if k})
    return {
        "file": path,
        "name": model.name,
        "architecture": model.architecture,
        "layers": model.n_layers,
        "head_sizes": sizes,
        "context": model.n_ctx_train,
        "fingerprint": model.fingerprint,
    }


def _cache(path: str) -> Found:
    from ..core.model_file import check_geometry, open_model
    from ..core.profile import with_profile
    from ..core.settings import Kv

    model = open_model(path)
    check_geometry(model)
    kv = with_profile(Kv(), model)
    return {"preset": None if kv.profile else kv.describe(), "profile": kv.profile, "found": kv.found}


def _sizes(path: str, ctx: int) -> Found:
    from bridge.installed import require_llama

    from ..core.model_file import open_model
    from ..core.profile import with_profile
    from ..core.settings import Kv

    model = open_model(path)
    n_ctx = ctx or min(model.n_ctx_train or CONTEXT, CONTEXT)
    n_ctx = (n_ctx + CELLS - 1) // CELLS * CELLS
    require_llama()
    from bridge.dry_run import measure_context

    need = measure_context(model, with_profile(Kv(), model), n_ctx)
    plain = measure_context(model, None, n_ctx)
    if need is None:
        raise Unknown(f"llama.cpp creates no context of {n_ctx} tokens for this model")
    return {"context": n_ctx, "cache": need.cache, "all": need.all, "cache_f16": None if plain is None else plain.cache}


PROBES: dict[str, Callable[..., Any]] = {
    "mixkvq": _version,
    "commit": _commit,
    "numpy": _numpy,
    "machine": _machine,
    "memory": _memory,
    "threads": _threads,
    "settings": _settings,
    "native": _native,
    "library": _library,
    "instruction sets": _isas,
    "instruction set": _isa,
    "llama-cpp-python": _llama_cpp_python,
    "ggml": _ggml,
    "backend": _backend,
}
OF_MODEL: dict[str, Callable[..., Any]] = {"model": _model, "cache": _cache, "sizes": _sizes}
NEEDED = ("numpy", "native", "library", "instruction set", "llama-cpp-python", "ggml", "backend", *OF_MODEL)  # without these the cache cannot be used


def probe(words: Sequence[str]) -> None:
    """In the other process: look up what is named. A line of JSON on stdout for each: its name, what was found, and why not.

    words: JSON, [[name, arguments], ...].
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print there what they like
    for name, arguments in json.loads(words[0]):
        out.write(json.dumps([name, *_looked_up({**PROBES, **OF_MODEL}[name], arguments)]) + "\n")
        out.flush()


def _looked_up(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, str | None]:
    try:
        return function(*arguments), None
    except BridgeError as e:
        return None, for_command(e)
    except Unknown as e:
        return None, str(e)
    except Exception as e:  # noqa: BLE001 - whatever is wrong here is what was asked for
        return None, f"{type(e).__name__}: {' '.join(str(e).split())}"


# ---- here


def examine(model: str | None = None, ctx: int = 0) -> dict[str, Any]:
    """What is installed and what it finds.

    model: a GGUF file, of which sizes are estimated at ctx tokens (0: as many as `mixkvq run` takes).
    Returns usable (whether the cache can be used), problem (why not, or None), found and unknown: by name what was found, and why the rest was not.
    """
    found: Found = {"python": f"{platform.python_version()} ({sys.executable})", "os": _os(), "environment": _environment()}
    unknown: dict[str, str] = {}
    waiting: list[tuple[str, list[Any]]] = [(name, []) for name in PROBES]
    if model is not None:
        waiting += [("model", [model]), ("cache", [model]), ("sizes", [model, ctx])]
    asked = [name for name, _ in waiting]
    while waiting:
        lines, end = _ask(waiting)
        for name, value, reason in lines:
            if reason is None:
                found[name] = value
            else:
                unknown[name] = reason
        waiting = waiting[len(lines) :]
        if waiting:  # the process ended at the first of these
            unknown[waiting.pop(0)[0]] = end
    problem = next((unknown[name] for name in NEEDED if name in asked and name in unknown), None)
    return {"usable": problem is None, "problem": problem, "found": found, "unknown": unknown}


def _ask(waiting: Sequence[tuple[str, list[Any]]]) -> tuple[list[tuple[str, Any, str | None]], str]:
    """What another process found out before it ended, and how it ended."""
    command = [sys.executable, "-c", _CHILD, str(len(sys.path)), *sys.path, json.dumps(waiting)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
        out, end = done.stdout, _end(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as e:
        out, end = e.stdout or b"", f"the look-up did not come to an end in {SECONDS} s"
    except OSError as e:
        out, end = b"", f"{sys.executable} does not start: {e.strerror or e}"
    lines = [line for line in out.decode("utf-8", "replace").splitlines(keepends=True) if line.endswith("\n")]
    return [tuple(json.loads(line)) for line in lines], end


def _end(code: int, errors: bytes) -> str:
    last = errors.decode("utf-8", "replace").strip().splitlines()[-1:]
    try:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    except ValueError:
        how = f"by signal {-code}"
    return f"the look-up ended {how}" + (f": {last[0].strip()}" if last else "")


def _os() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    return ", ".join(filter(None, [name, platform.platform()]))


def _environment() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT)}


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of every line."""
    found, unknown = report["found"], report["unknown"]
    lines: list[tuple[str, str]] = []
    said: dict[str, str] = {}  # reason -> the line that has it

    def add(name: str, key: str, text: Callable[[Any], str] = str) -> None:
        if key in found:
            lines.append((name, text(found[key])))
        elif key in unknown:
            first = said.setdefault(unknown[key], name)
            lines.append((name, f"unknown: {unknown[key]}" if first == name else f"unknown, as {first}"))

    add("mixkvq", "mixkvq")
    add("commit", "commit")
    add("llama-cpp-python", "llama-cpp-python", lambda v: f"{v['version']} ({_short(v['folder'])})")
    add("ggml", "ggml")
    add("numpy", "numpy")
    add("Python", "python", _short)
    add("system", "os")
    add("native module", "native", _native_text)
    add("backend", "library", _short)
    add("interfaces", "backend", _interfaces)
    add("devices", "backend", _devices)
    add("processor", "machine", lambda v: f"{v['cpu']} ({v['arch']}), {v['cores']} cores for this process")
    add("instruction set", "instruction set", lambda v: f"{v}, of {', '.join(found.get('instruction sets', []))}")
    add("threads", "threads", lambda v: f"{v} by default")
    add("memory", "memory", _memory_text)
    lines += [(name, value) for name, value in found["environment"].items()]
    add("settings file", "settings", _settings_text)
    add("model", "model", _model_text)
    add("fingerprint", "model", lambda v: str(v["fingerprint"]))
    add("cache", "cache", lambda v: f"profile {_short(v['profile'])}, {v['found']}" if v["profile"] else f"preset {v['preset']}, no profile found")
    add("full context", "sizes", _sizes_text)
    return lines


def _short(path: str) -> str:
    return path.replace(str(Path.home()), "~") if str(Path.home()) != "/" else path


def _native_text(native: Found) -> str:
    return f"{native['version']}, page format {native['format']}, {'with' if native['cuda'] else 'without'} CUDA ({_short(native['file'])})"


def _interfaces(backend: Found) -> str:
    before = ", loaded by GGML_BACKEND_PATH" if backend["loaded_before"] else ""
    return f"version {backend['api_version']} of MixKVQ's, {backend['ggml_api_version']} of ggml's{before}"


def _devices(backend: Found) -> str:
    gpus = [f"{gpu['name']} ({format_bytes(gpu['free'])} free)" for gpu in backend["gpus"]]
    return "; ".join(filter(None, [", ".join(["CPU", *gpus]), backend["missing"] or ("" if gpus else f"no GPU: {NO_GPU}")]))


def _memory_text(memory: Found) -> str:
    limit = f", limited by a control group to {format_bytes(memory['limit'])}" if memory["limit"] is not None else ""
    return f"{format_bytes(memory['free'])} free of {format_bytes(memory['total'])}{limit}"


def _settings_text(settings: Found) -> str:
    if settings["file"] is None:
        return "none, as MIXKVQ_CONFIG says"
    what = f"tables {', '.join(settings['tables'])}" if settings["tables"] else "empty"
    return f"{_short(settings['file'])} ({what if settings['exists'] else 'not there'})"


def _model_text(model: Found) -> str:
    heads = f", head sizes {', '.join(model['head_sizes'])}" if model["head_sizes"] else ""
    return f"{model['name']} ({model['architecture']}), {model['layers']} layers{heads}, trained for {model['context']} tokens"


def _sizes_text(sizes: Found) -> str:
    gain = f" ({format_bytes(sizes['cache_f16'])} in F16)" if sizes["cache_f16"] else ""
    return f"{sizes['context']} tokens: cache {format_bytes(sizes['cache'])}{gain}, {format_bytes(sizes['all'])} with what is computed in"


@tool()
@click.argument("model", required=False, shell_complete=files)
@click.option("-c", "--ctx", type=click.IntRange(0, 1 << 30), default=0, help=f"Context in tokens.  [default: the model's own, at most {CONTEXT}]")
@click.option("--json", "as_json", is_flag=True, help="As JSON: usable, problem, found, unknown.")
def command(model: str | None, ctx: int, as_json: bool) -> int:
    """Say what is installed, what it finds on this machine, and with MODEL which cache that gets and what it takes: for a report of a bug.

    What cannot be found out is listed with the reason. Exit status: 0 if the cache can be used, else 1.
    """
    report = examine(model, ctx)
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        lines = rows(report)
        width = max(len(name) for name, _ in lines)
        for name, text in lines:
            click.echo(f"{name:<{width}}  {text}")
        click.echo("\nThe cache can be used." if report["usable"] else f"\nThe cache cannot be used: {report['problem']}")
    return 0 if report["usable"] else 1
