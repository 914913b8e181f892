"""`mixkvq serve`: a model behind HTTP, as OpenAI's clients and llama.cpp's expect it."""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from bridge import report
from bridge.devices import DEVICE_HELP, check_device

from ..core.errors import SettingsError
from ..core.machine import physical_cores
from ..core.model_file import ModelFile, built_in_model, check_geometry, open_model, read_header
from ..core.profile import with_profile
from ..core.settings import STOCK_TYPES, Kv, resolve_kv
from . import streams
from .command import Number, files, run, typed_first
from .options import F16_TOKENS, THREADS, quiet_llama, tool
from .run import complete_kv
from .running import DEFAULT_CONTEXT, with_bar

if TYPE_CHECKING:
    from ..server.guards import Rules
    from ..server.service import Service

NEEDED = ("starlette", "uvicorn", "prometheus_client")
_REFUSED = {
    "mmproj": "--mmproj: this server reads text only; llama-cpp-python's own server has models that see.",
    "model_draft": "--model-draft: this server evaluates several requests at once, and drafts none; leave the draft model out.",
}


@tool()
@click.argument("model", required=False, shell_complete=files)
@click.option("-m", "--model", "model_option", shell_complete=files, help="The same as MODEL.")
@click.option("-a", "--alias", help="Name of the model in answers.  [default: the file's name]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port to listen on; 0: any that is free.")
@click.option("--api-key", multiple=True, envvar="LLAMA_API_KEY", help="Key that requests must bring; several with commas, or given again.")
@click.option("--api-key-file", shell_complete=files, help="File of such keys, one a line.")
@click.option("--allow-host", multiple=True, help="Further name by which the server is called, for the Host of a request.")
@click.option("--allow-origin", multiple=True, help="Pages that may ask from a browser, as https://example.org.")
@click.option(
    *("-c", "--ctx", "--ctx-size", "ctx"),
    type=click.IntRange(0, 1 << 30),
    help=f"Context in tokens, of all streams together; 0: the model's own for each.  [default: that, at most {DEFAULT_CONTEXT}, for each]",
)
@click.option("-np", "--parallel", type=click.IntRange(1, 64), default=4, show_default=True, help="Streams: chats at once, each with its part of -c.")
@click.option(
    "-n", "--predict", "--n-predict", "predict", type=click.IntRange(-1, 1 << 30), default=-1, help="Longest answer, where a request names none."
)
@click.option("-t", "--threads", type=THREADS, help="Threads.  [default: physical cores]")
@click.option(
    "-b", "--batch", "--batch-size", "batch", type=click.IntRange(64, 1 << 16), default=512, show_default=True, help="Tokens evaluated at a time."
)
@click.option(
    "--pause",
    type=Number(0, 60),
    default=0.3,
    show_default=True,
    help="Seconds that a batch should take at most, while requests run beside each other.",
)
@click.option("--device", default="auto", show_default=True, help=f"Where the model is computed: {DEVICE_HELP}.")
@click.option(
    "-ngl",
    "--gpu-layers",
    "--n-gpu-layers",
    "gpu_layers",
    type=click.IntRange(-1, 1 << 20),
    help="Layers for the GPU, -1: all.  [default: as many as fit]",
)
@click.option(
    "--kv",
    "--preset",
    "kv",
    shell_complete=complete_kv,
    help="The cache: a preset or a profile.  [default: a profile beside the model, else balanced]",
)
@click.option("--profile", shell_complete=files, help="Profile of the cache.")
@click.option("--window", type=F16_TOKENS, help="Recent tokens kept in F16.  [default: 128]")
@click.option("--sinks", type=F16_TOKENS, help="First tokens kept in F16.  [default: 128]")
@click.option("--stock", type=click.Choice(list(STOCK_TYPES)), help="Use llama.cpp's own cache of this type instead, to compare.")
@click.option("--lora", shell_complete=files, help="LoRA adapter, a GGUF file.")
@click.option("--embeddings", "--embedding", "embeddings", is_flag=True, help="Serve the model's embeddings, and nothing else.")
@click.option("--chat-template", help="Chat template (Jinja) in place of the model's.")
@click.option("--chat-template-file", shell_complete=files, help="The same, from a file.")
@click.option(
    "--reasoning-format",
    type=click.Choice(["auto", "deepseek", "none"]),
    default="auto",
    show_default=True,
    help="Thinking apart from the answer, or left in it.",
)
@click.option("--temp", type=Number(0, 100), default=0.8, show_default=True, help="Temperature, where a request names none; the same below.")
@click.option("--top-k", type=click.IntRange(0, 1 << 30), default=40, show_default=True, help="Sample from this many tokens; 0: all.")
@click.option("--top-p", type=Number(0, 1), default=0.95, show_default=True, help="Sample from this share of the probability.")
@click.option("--min-p", type=Number(0, 1), default=0.05, show_default=True, help="Least probability, relative to the likeliest token.")
@click.option("--slot-save-path", shell_complete=files, help="Folder for POST /slots; without it they are not saved.")
@click.option("--no-slots", is_flag=True, help="Do not answer GET /slots.")
@click.option("--metrics", is_flag=True, help="Answer GET /metrics, for Prometheus.")
@click.option("--park", shell_complete=files, help="Folder for chats that no stream has room for; they come back from there. It holds what was said.")
@click.option("--park-size", type=Number(0, 1 << 20), default=8.0, show_default=True, help="Gibibytes of that folder.")
@click.option("--queue", type=click.IntRange(0, 1 << 16), default=256, show_default=True, help="Requests that may wait; further ones get 503.")
@click.option("--max-seconds", type=Number(1, 1e6), default=3600.0, show_default=True, help="Seconds that a request may take, waiting included.")
@click.option("--max-body", type=Number(0.001, 1 << 20), default=32.0, show_default=True, help="Mebibytes of a request's body.")
@click.option("--no-log", is_flag=True, help="Do not write a line for each request to stderr.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's own log.")
@click.option("--mmproj", hidden=True)
@click.option("-md", "--model-draft", hidden=True)
def command(**given: Any) -> int:
    """Serve MODEL, a GGUF file (default: the built-in model), over HTTP: OpenAI's interface and llama.cpp's, on a quantised KV cache.

    Options that llama-server has too mean the same here. Ctrl-C ends it, with exit status 0.
    """
    for name, sentence in _REFUSED.items():
        if given[name] is not None:
            raise SettingsError(sentence)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(f"The server needs {', '.join(missing)}; install them with: pip install {' '.join(missing)}.")
    from ..server.running import listening, serve

    console = Console(file=sys.stderr, highlight=False)
    file, kv, rules = _checked(given)
    where = listening(given["host"], given["port"])
    host, port = where.getsockname()[:2]
    service = _service(given, file, kv, console)
    try:
        if not given["no_log"]:
            _log()
        if not rules.keys and host not in ("127.0.0.1", "::1"):
            streams.say("mixkvq: whoever reaches this machine can use the model; --api-key asks for a key")
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        serve(service, rules, where, lambda: streams.say(f"mixkvq: {service.name} at {address} ({service.facts['what']})"))
        return 0
    finally:
        for part in (service.engine, service.embedder):
            if part is not None:
                part.close()


def _checked(given: dict[str, Any]) -> tuple[ModelFile, Kv, Rules]:
    """All that can be wrong with the command, before anything is loaded. Raises BridgeError."""
    from ..server.guards import Rules

    typed_first(given, ("stock",), ("kv", "profile", "window", "sinks"))
    typed_first(given, ("kv",), ("profile",))
    if given["model"] is not None and given["model_option"] is not None:
        raise SettingsError("MODEL and --model are the same; give one of the two.")
    if given["stock"] is not None or given["embeddings"]:
        for key in ("kv", "profile", "window", "sinks"):
            if given[key] is not None:
                reason = "--stock turns MixKVQ off" if given["stock"] is not None else "--embeddings keeps no cache"
                raise SettingsError(f"{reason}, so it does not go together with --{key}.")
    if given["kv"] is not None and given["profile"] is not None:
        raise SettingsError("--profile takes the place of a preset; give one of the two.")
    if given["chat_template"] is not None and given["chat_template_file"] is not None:
        raise SettingsError("--chat-template and --chat-template-file do not go together.")
    for name in ("slot_save_path", "park"):
        if given[name] is not None and Path(given[name]).exists() and not Path(given[name]).is_dir():
            raise SettingsError(f"{given[name]} is no folder.")
    file = open_model(given["model"] or given["model_option"] or str(built_in_model()))
    kv = replace(resolve_kv(Kv(profile=given["profile"]) if given["profile"] else given["kv"]), window=given["window"], sinks=given["sinks"])
    if given["stock"] is None and not given["embeddings"]:
        check_geometry(file)
        with_profile(kv, file)
    check_device(given["device"])
    keys = [key.strip() for part in given["api_key"] for key in part.split(",")]
    if given["api_key_file"] is not None:
        keys += [line.strip() for line in _read(given["api_key_file"]).splitlines()]
        if not any(keys):
            raise SettingsError(f"{given['api_key_file']} has no key.")
    if given["api_key"] and not any(keys):
        raise SettingsError("--api-key is empty: the server would ask for no key.")
    if given["lora"] is not None and read_header(given["lora"]).values.get("general.type") != "adapter":
        raise SettingsError(f"{given['lora']} is no LoRA adapter.")
    origins = tuple(origin.rstrip("/") for origin in given["allow_origin"])
    if "*" in origins:
        raise SettingsError("--allow-origin names pages; any page at all may not ask.")
    largest = int(given["max_body"] * (1 << 20))
    return file, kv, Rules(given["host"], tuple(key for key in keys if key), tuple(given["allow_host"]), origins, largest)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise SettingsError(f"{path} cannot be read: {e.strerror or e}.") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path} is not UTF-8 text.") from None


def _service(given: dict[str, Any], file: ModelFile, kv: Kv, console: Console) -> Service:
    """Load the model."""
    from bridge.engine import Engine, Sampling, Streams
    from bridge.engine.parking import Parking
    from bridge.llama import Llama

    from ..server import loading

    if not given["verbose"]:
        quiet_llama()
    threads = given["threads"] or physical_cores()
    arguments: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "device": given["device"], "n_gpu_layers": given["gpu_layers"]}
    arguments.update(verbose=given["verbose"], lora_path=given["lora"])
    template = given["chat_template"] if given["chat_template_file"] is None else _read(given["chat_template_file"])
    name = given["alias"] or Path(file.path).name.removesuffix(".gguf")
    if given["embeddings"]:
        ctx = given["ctx"] or min(file.n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        arguments.update(n_ctx=ctx, n_batch=ctx, n_ubatch=ctx, stock="f16", embedding=True)
        return loading.embedding_service(with_bar(console, file.path, given["verbose"], lambda on: Llama(file.path, on_load=on, **arguments)), name)
    ctx = given["ctx"] // given["parallel"] if given["ctx"] else given["ctx"]
    if ctx is None:
        ctx = min(file.n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    arguments.update(n_ctx=ctx, n_batch=given["batch"], n_ubatch=given["batch"], n_seq=given["parallel"])
    arguments.update({"stock": given["stock"]} if given["stock"] is not None else {"kv": kv})
    parking = Parking(given["park"], int(given["park_size"] * (1 << 30))) if given["park"] is not None else None
    llama = with_bar(console, file.path, given["verbose"], lambda on: Streams(file.path, on_load=on, **arguments))
    engine = Engine(llama, parking=parking, longest_queue=given["queue"], pause=given["pause"])
    try:
        service = loading.service(engine, name, template)
    except BaseException:
        engine.close()
        raise
    service.sampling = Sampling(temperature=given["temp"], top_k=given["top_k"], top_p=given["top_p"], min_p=given["min_p"])
    service.max_tokens, service.timeout = given["predict"], given["max_seconds"]
    service.shows_slots, service.shows_metrics = not given["no_slots"], given["metrics"]
    service.thinking = given["reasoning_format"] != "none"
    if given["slot_save_path"] is not None:
        service.slots = Path(given["slot_save_path"])
        service.slots.mkdir(mode=0o700, parents=True, exist_ok=True)
    stats = llama.kv_stats()
    service.facts["what"] = (
        f"{llama.n_seq} streams of {engine.n_ctx} tokens, {report.title(stats)}, {stats['total_bits']:.2f} bits, on {stats['device']}"
    )
    return service


def _log() -> None:
    """A line on stderr for each request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("mixkvq.server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a stderr that nobody reads any more costs no answer


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; see `command`."""
    return run(command, "mixkvq.serve", arguments)
