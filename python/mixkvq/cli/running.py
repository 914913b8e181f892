"""What one answer and a chat have in common: the options, loading the model, writing what it says, and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from bridge import report as reports

from ..core.files import write_atomically
from ..core.machine import physical_cores
from ..core.model_file import open_model
from ..core.settings import Kv
from .answer import Answer, Sampling
from .options import quiet_llama
from .prompt_cache import PromptCache

if TYPE_CHECKING:
    from bridge.llama import Llama


DEFAULT_CONTEXT = 8192
T = TypeVar("T")


@dataclass
class Options:
    """The command line, checked."""

    model: str
    prompt: str | None  # None: chat
    raw: bool
    system: str | None
    ctx: int | None
    threads: int | None
    batch: int
    device: str
    gpu_layers: int | None
    sampling: Sampling
    kv: Kv
    stock: str | None
    report: str
    report_file: str | None
    force: bool
    autosave: bool
    verbose: bool
    prompt_cache: PromptCache | None = None
    calibrate: str = "never"

    def on_read(self, llama: Llama) -> Callable[[], None] | None:
        """What to do once a prompt has been read."""
        cache = self.prompt_cache
        return None if cache is None else lambda: cache.has_read(llama)


def load(options: Options, console: Console) -> Llama:
    """Load the model with a progress bar. Raises BridgeError."""
    file = open_model(options.model)
    ctx = options.ctx
    if ctx is None:
        ctx = min(file.n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    from bridge import Llama

    if not options.verbose:
        quiet_llama()
    threads = options.threads or physical_cores()
    arguments: dict[str, Any] = {
        "n_ctx": ctx,
        "n_batch": options.batch,
        "n_ubatch": options.batch,
        "n_threads": threads,
        "n_threads_batch": threads,
        "device": options.device,
        "n_gpu_layers": options.gpu_layers,
        "verbose": options.verbose,
    }
    arguments.update({"stock": options.stock} if options.stock is not None else {"kv": options.kv})
    return with_bar(console, options.model, options.verbose, lambda on_load: Llama(options.model, on_load=on_load, **arguments))


def with_bar(console: Console, path: str, verbose: bool, make: Callable[[Callable[[float], None] | None], T]) -> T:
    """Load a model with a progress bar, where somebody sees it. make: gets what is to be told of the share that is loaded."""
    if verbose or not console.is_terminal:
        return make(None)
    with Progress(
        TextColumn("Loading {task.fields[name]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ) as progress:
        task = progress.add_task("", total=1.0, name=Path(path).name)

        def on_load(share: float) -> None:
            progress.update(task, completed=share)
            if share >= 1:
                progress.stop()  # what is said while the context is created has a line of its own

        return make(on_load)


def print_report(llama: Llama, answer: Answer, options: Options, console: Console) -> None:
    """The figures of the last answer and of the cache, as the options ask; the file comes last."""
    stats = llama.kv_stats()
    line = json.dumps({"model": options.model, "context": llama.n_ctx(), "threads": llama.n_threads, **answer.speeds(), "cache": stats}) + "\n"
    if options.report == "json":
        console.file.write(line)
        console.file.flush()
    elif options.report == "text":
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in [*speed_rows(answer), *reports.rows(stats)]:
            table.add_row(name, value)
        console.print()
        console.print(table, markup=False, highlight=False)
    if options.report_file is not None:
        write_atomically(options.report_file, line, overwrite=options.force)


def speed_rows(answer: Answer) -> list[tuple[str, str]]:
    """Name and value of the report's lines about the prompt and the answer."""
    speeds = answer.speeds()
    unread = answer.prompt_tokens - answer.cached_tokens - answer.read_tokens
    notes = [f"{n} {what}" for n, what in ((answer.cached_tokens, "were in the cache"), (unread, "were not read")) if n]
    read = f"{answer.prompt_tokens} tokens" + (f" ({', '.join(notes)})" if notes else "")
    return [
        ("prompt", f"{read}, {speeds['prompt_tokens_per_second']:.1f} tokens/s"),
        ("answer", f"{answer.answer_tokens} tokens, {speeds['answer_tokens_per_second']:.1f} tokens/s"),
    ]


def at_limit(answer: Answer, max_tokens: int) -> bool:
    """Whether an answer of finish_reason "length" ended at the user's limit; llama-cpp-python goes past it to complete a character."""
    return 0 <= max_tokens <= answer.answer_tokens


def why_it_ended(answer: Answer, max_tokens: int) -> str:
    """What to say about an answer that did not end by itself, or ""."""
    if answer.finish_reason == "interrupted":
        return "(stopped)"
    if answer.finish_reason != "length" or max_tokens == 0:
        return ""
    if at_limit(answer, max_tokens):
        return f"(cut off: the limit of {max_tokens} tokens is reached, -n)"
    return "(cut off: the context is full, -c)"


def writer() -> Callable[[str], None]:
    """A function that writes pieces of an answer to stdout at once; control characters do not reach a terminal."""
    terminal = sys.stdout.isatty()

    def write(piece: str) -> None:
        if terminal:
            piece = "".join(c for c in piece if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))
        try:
            sys.stdout.write(piece)
            sys.stdout.flush()
        except OSError as e:
            raise OSError(e.errno, e.strerror, "stdout") from None

    return write


def note_missing_template(llama: Llama, console: Console) -> None:
    """A base model answers a chat badly; say so instead of leaving the user to wonder."""
    if "tokenizer.chat_template" not in llama.metadata:
        console.print("This model has no chat template, so a generic one is used; --raw sends the text as it is.", markup=False)
