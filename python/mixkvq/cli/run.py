"""`python -m bridge.run`: chat with a GGUF model, or get one answer, on a MixKVQ cache. The answer goes to stdout, all else to stderr."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.console import Console

from bridge.devices import DEVICE_HELP, check_device

from ..core.errors import SettingsError
from ..core.files import check_target
from ..core.model_file import built_in_model, check_geometry, open_model
from ..core.native import native
from ..core.profile import with_profile
from ..core.settings import STOCK_TYPES, Kv, resolve_kv
from . import streams
from .answer import LARGEST_SEED, Answer, Message, Sampling, stream_answer
from .command import INTERRUPTED, Number, files, run, typed_first
from .offer import WAYS, Offer, calibrate_now
from .prompt_cache import PromptCache
from .running import DEFAULT_CONTEXT, Options, at_limit, load, note_missing_template, print_report, why_it_ended, writer

CHAT_TEMPERATURE = 0.7
DEMO_PROBLEM = "Compute 48291 * 73."
CONTEXT_FULL = 3  # exit code


def exit_code(answer: Answer, max_tokens: int) -> int:
    """Of a single answer: 0 if it ended by itself or at the limit that the user set."""
    if answer.signal:
        signal.raise_signal(answer.signal)
    if answer.finish_reason == "interrupted":
        return INTERRUPTED
    full = answer.finish_reason == "length" and not at_limit(answer, max_tokens)
    return CONTEXT_FULL if full else 0


def answer_once(options: Options, console: Console) -> int:
    """One prompt, one answer. Returns the exit code."""
    assert options.prompt is not None
    llama = load(options, console)
    try:
        prompt: str | list[Message]
        if options.raw:
            prompt = options.prompt
        else:
            note_missing_template(llama, console)
            prompt = [{"role": "system", "content": options.system}] if options.system else []
            prompt.append({"role": "user", "content": options.prompt})
        write = writer()
        if options.prompt_cache is not None:
            options.prompt_cache.begin(llama)
        answer = stream_answer(llama, prompt, options.sampling, write, console, options.on_read(llama))
        if options.sampling.max_tokens != 0:
            write("\n")
        ended = why_it_ended(answer, options.sampling.max_tokens)
        if ended and options.report != "json":  # which says it as finish_reason
            console.print(ended, markup=False, highlight=False)
        print_report(llama, answer, options, console)
        if options.prompt_cache is not None:
            options.prompt_cache.end(llama)
        if options.report == "text":
            Offer(options, lambda line: console.print(line, markup=False, highlight=False)).answered(answer)
        return exit_code(answer, options.sampling.max_tokens)
    finally:
        llama.close()


def list_presets() -> None:
    """Print the presets to stdout."""
    for p in native().presets():
        name = p["name"] + (f" ({p['alias']})" if p["alias"] else "")
        click.echo(f"{name:<26} {p['body_bits']:5.2f} bits  {p['description']}")


def complete_kv(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The presets that begin so; else files."""
    names = [(name, p["description"]) for p in native().presets() for name in (p["alias"] or p["name"], p["name"])]
    found = [CompletionItem(name, help=what) for name, what in dict(names).items() if name.startswith(incomplete)]
    return found or files(context, parameter, incomplete)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("model", required=False, shell_complete=files)
@click.option("-p", "--prompt", help="Answer this and exit.")
@click.option("-f", "--file", "prompt_file", shell_complete=files, help="Answer the text of this file and exit; - is stdin.")
@click.option("--demo", is_flag=True, help="Solve one built-in problem and exit.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the model's chat template.")
@click.option("--system", help="System message.")
@click.option(
    "-c",
    "--ctx",
    type=click.IntRange(0, 1 << 30),
    help=f"Context in tokens, which llama.cpp rounds up to 256s; 0: the model's own.  [default: that, at most {DEFAULT_CONTEXT}]",
)
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="Threads.  [default: physical cores]")
@click.option("-b", "--batch", type=click.IntRange(1, 1 << 20), default=512, show_default=True, help="Prompt tokens evaluated at a time.")
@click.option("--device", default="auto", show_default=True, help=f"Where the model is computed: {DEVICE_HELP}.")
@click.option("-ngl", "--gpu-layers", type=click.IntRange(-1, 1 << 20), help="Layers for the GPU, -1: all.  [default: as many as fit]")
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(-1, 1 << 30),
    default=-1,
    help="Longest answer; 0: only read the prompt.  [default: -1, up to the end of the context]",
)
@click.option("--temp", type=Number(0, 100), help=f"Temperature; 0 is greedy.  [default: {CHAT_TEMPERATURE} in a chat, else 0]")
@click.option("--top-k", type=click.IntRange(0, 1 << 30), default=40, show_default=True, help="Sample from this many tokens; 0: all.")
@click.option("--top-p", type=Number(0, 1), default=0.95, show_default=True, help="Sample from this share of the probability.")
@click.option("--min-p", type=Number(0, 1), default=0.05, show_default=True, help="Least probability, relative to the likeliest token.")
@click.option("--seed", type=click.IntRange(0, LARGEST_SEED), help="Seed of the sampler.  [default: random]")
@click.option(
    "--kv",
    "--preset",
    "kv",
    shell_complete=complete_kv,
    help="The cache: a preset or a profile.  [default: a profile that lies with the model, else balanced]",
)
@click.option("--profile", shell_complete=files, help="Profile of the cache (a GGUF file made for this model).")
@click.option("--window", type=click.IntRange(0, 1 << 20), help="Recent tokens kept in F16.  [default: 128]")
@click.option("--sinks", type=click.IntRange(0, 1 << 20), help="First tokens kept in F16.  [default: 128]")
@click.option("--stock", type=click.Choice(list(STOCK_TYPES)), help="Use llama.cpp's own cache of this type instead, to compare.")
@click.option(
    "--calibrate",
    type=click.Choice(WAYS),
    default="ask",
    show_default=True,
    help="For a model without a profile: say once what one takes, and ask at a terminal; make it while a chat is idle; do nothing; make it first.",
)
@click.option("--report", type=click.Choice(["text", "json", "none"]), default="text", show_default=True, help="Report at the end, on stderr.")
@click.option("--report-file", shell_complete=files, help="Write the report as JSON to this file as well.")
@click.option("--force", is_flag=True, help="Replace the file of --report-file if there is one already.")
@click.option("--prompt-cache", shell_complete=files, help="Go on from this file, if it is there, and keep in it what has been read of the prompt.")
@click.option("--prompt-cache-all", is_flag=True, help="Keep the answers in it as well, at the end.")
@click.option("--prompt-cache-ro", is_flag=True, help="Use it and leave it as it is.")
@click.option("--no-autosave", is_flag=True, help="Do not keep this chat for /resume.")
@click.option("--list-presets", "presets", is_flag=True, help="List the presets and exit.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's own log.")
@click.version_option(package_name="mixkvq", message="%(package)s %(version)s")
def command(**given: Any) -> int:
    """Chat with MODEL, a GGUF file (default: the built-in model), on a quantised KV cache.

    Without a prompt on a terminal this is a chat. With --prompt, --file, --demo or piped input the answer goes to stdout and everything
    else to stderr.

    Exit status: 0 (also at the limit of -n, which is said), 3 if the context was full before the answer ended, 2 for a mistake in the command,
    1 for a failure, 130 after Ctrl-C.
    """
    if given["presets"]:
        list_presets()
        return 0
    console = Console(file=sys.stderr, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stderr, highlight=False, width=200)  # do not wrap what a program reads
    options = check(given)
    if options.calibrate == "now":
        calibrate_now(options)
    if options.prompt is not None:
        return answer_once(options, console)
    from .chat import chat

    return chat(options, console)


def check(given: dict[str, Any]) -> Options:
    """Turn the parsed command line into options. Raises SettingsError for what does not go together."""
    typed_first(given, ("prompt",), ("prompt_file",), ("demo",))
    typed_first(given, ("stock",), ("kv", "profile", "window", "sinks"))
    typed_first(given, ("kv",), ("profile",))
    typed_first(given, ("raw",), ("system",))
    sources = [name for name, key in (("--prompt", "prompt"), ("--file", "prompt_file"), ("--demo", "demo")) if given[key] not in (None, False)]
    if len(sources) > 1:
        raise SettingsError(f"{sources[0]} and {sources[1]} do not go together.")
    if given["stock"] is not None:
        for key in ("kv", "profile", "window", "sinks"):
            if given[key] is not None:
                raise SettingsError(f"--stock turns MixKVQ off, so it does not go together with --{key}.")
    if given["kv"] is not None and given["profile"] is not None:
        raise SettingsError("--profile takes the place of a preset; give one of the two.")
    if given["profile"] is not None:
        given["kv"] = Kv(profile=given["profile"])
    if given["raw"] and given["system"] is not None:
        raise SettingsError("--raw sends no system message, so it does not go together with --system.")
    # All that can be wrong with the command is said before a prompt is read from stdin.
    model = given["model"] if given["model"] is not None else str(built_in_model())
    file = open_model(model)
    kv = replace(resolve_kv(given["kv"]), window=given["window"], sinks=given["sinks"])
    if given["stock"] is None:
        check_geometry(file)
        with_profile(kv, file)
    check_device(given["device"])
    if given["report_file"] is not None:
        inputs = [path for path in (model, given["prompt_file"], kv.profile) if path is not None]
        check_target(given["report_file"], force=given["force"], what="JSON", inputs=inputs)
    prompt_cache = None
    if given["prompt_cache"] is not None:
        prompt_cache = PromptCache(given["prompt_cache"], given["prompt_cache_all"], given["prompt_cache_ro"])
        prompt_cache.check(model)
    elif given["prompt_cache_all"] or given["prompt_cache_ro"]:
        raise SettingsError("--prompt-cache-all and --prompt-cache-ro go together with --prompt-cache FILE.")
    system = None if given["system"] is None else from_command_line(given["system"], "--system")
    prompt = read_prompt(given)
    if prompt is None and given["raw"]:
        raise SettingsError("--raw needs a prompt: --prompt, --file or piped input.")
    temperature = given["temp"]
    if temperature is None:
        temperature = CHAT_TEMPERATURE if prompt is None else 0.0
    sampling = Sampling(temperature, given["top_k"], given["top_p"], given["min_p"], given["max_tokens"])
    if given["seed"] is not None:
        sampling.seed = given["seed"]
    return Options(
        model=model,
        prompt=prompt,
        raw=given["raw"],
        system=system,
        ctx=given["ctx"],
        threads=given["threads"],
        batch=given["batch"],
        device=given["device"],
        gpu_layers=given["gpu_layers"],
        sampling=sampling,
        kv=kv,
        stock=given["stock"],
        report=given["report"],
        report_file=given["report_file"],
        force=given["force"],
        autosave=not given["no_autosave"],
        verbose=given["verbose"],
        prompt_cache=prompt_cache,
        calibrate=given["calibrate"],
    )


def from_command_line(text: str, option: str) -> str:
    """An argument as text: in a locale without UTF-8 Python has not decoded it. Raises SettingsError if it is not UTF-8."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as e:
        raise SettingsError(f"The text of {option} is not UTF-8 (byte {e.start}).") from None


def read_prompt(given: dict[str, Any]) -> str | None:
    """The prompt, or None for a chat."""
    if given["demo"]:
        streams.say(f"Problem: {DEMO_PROBLEM}\n")
        return DEMO_PROBLEM
    if given["prompt"] is not None:
        text, source = from_command_line(given["prompt"], "--prompt"), "--prompt"
    elif given["prompt_file"] not in (None, "-"):
        source = given["prompt_file"]
        try:
            text = Path(source).read_bytes().decode("utf-8")
        except OSError as e:
            raise SettingsError(f"{source} cannot be read: {e.strerror or e}.") from None
        except UnicodeDecodeError as e:
            raise SettingsError(f"{source} is not UTF-8 text (byte {e.start}).") from None
    elif given["prompt_file"] is None and sys.stdin is not None and sys.stdin.isatty():
        if not sys.stdout.isatty():
            raise SettingsError("A chat needs a terminal; give --prompt, --file or piped input for a single answer.")
        return None
    else:
        source = "stdin"
        try:
            text = sys.stdin.buffer.read().decode("utf-8") if sys.stdin is not None else ""
        except UnicodeDecodeError as e:
            raise SettingsError(f"stdin is not UTF-8 text (byte {e.start}).") from None
    if not text.strip():
        raise SettingsError(f"The prompt from {source} is empty.")
    # A text file ends in a newline that is no part of the question; --raw means every byte.
    return text if given["raw"] else text.rstrip("\r\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; see `command`."""
    return run(command, "bridge.run", arguments)
