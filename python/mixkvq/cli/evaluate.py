"""Measure key/value caches on a model: divergence from the F16 cache on text and on derivations, right answers, and what each cache takes.

    python -m mixkvq.evaluate model.gguf --text novel.txt --kv q8_0,q4_0,balanced,profile.gguf,lab:kivi-2 --plot kld.svg --out kld.json
    python -m mixkvq.evaluate model.gguf --guarantee 0.01
    python -m mixkvq.evaluate model.gguf --derivations 14 --kv q4_0,balanced
    python -m mixkvq.evaluate model.gguf --problems-file gsm8k.jsonl --problems 100 --kv q4_0,balanced --out answers.json

What is in the JSON file is not measured again: a run that was stopped goes on with the same --out, also with more caches, texts or styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bridge.devices import DEVICE_HELP

from ..core.errors import BridgeError, SettingsError
from ..core.memory import SEQUENCES
from ..core.outputs import check_different
from ..study import plots, problems, tasks
from ..study.caches import CACHE_HELP
from ..study.compare import NOISE_FLOOR
from ..study.evaluate import DEFAULT_CACHES, DEFAULT_CONTEXT, Request, Text, evaluate, guarantee_sentence
from ..study.record import check_result
from .command import command_line
from .options import COUNT, COUNT_OR_ZERO, F16_TOKENS, SEED, THREADS, Model, Number, force_option, interrupted, quiet_llama, run, tool
from .progress import Bars

MIB = 1 << 20


# ---- tables ----------------------------------------------------------------------------------------------


def print_figures(console: Console, result: dict[str, Any]) -> None:
    """One table of all divergences, a block per section; and one of the answers."""
    baseline = result["settings"]["baseline"]
    sections = [section for section in result["sections"] if section["caches"]]
    if sections:
        table = Table(title=f"{_model(result)} against {baseline}, seed {result['settings']['seed']}")
        for heading in ("measured on", "cache"):
            table.add_column(heading)
        lengths = _common_lengths(sections)
        for heading in (
            "body bits", "total here", *(f"at {int(n) // 1024}k" for n in lengths), "MiB", "perplexity", "ratio",
            "mean KLD", "over floor", "+-", "median", "99 %", "99.9 %", "max", "same top",
        ):  # fmt: skip
            table.add_column(heading, justify="right")
        for section in sections:
            for i, (name, figures) in enumerate(section["caches"].items()):
                if i == 0:
                    given = ["", "", *("" for _ in lengths), "", f"{figures['perplexity_baseline']:.3f}"]
                    table.add_row(plots.title(section), f"{baseline} (baseline)", *given)
                table.add_row(_what(section) if i == 0 else "", name, *_row(name, figures, lengths))
            table.add_section()
        console.print(table)
        if any(NOISE_FLOOR in section["caches"] for section in sections):
            console.print(f"{NOISE_FLOOR}: the cache {baseline} against itself in batches of another size, which llama.cpp rounds otherwise.")
    if any(section["kind"] == "derivations" for section in sections):
        table = Table("measured on", "cache", "tokens", "flips", "wrong", "exact", f"exact with {baseline}", title="Derivations, token by token")
        for section in sections:
            if section["kind"] == "derivations":
                for name, f in section["caches"].items():
                    exact, own = (f"{f[key]} of {section['count']}" for key in ("exact", "baseline_exact"))
                    table.add_row(
                        plots.title(section), name, str(f["tokens"]), f"{f['flips']} ({f['flips'] / f['tokens']:.4%})", str(f["wrong"]), exact, own
                    )
        console.print(table)
    if result.get("problems"):
        print_answers(console, result)


def _model(result: dict[str, Any]) -> str:
    return f"{result['model']['name']}{' in F32' if result['settings'].get('exact') else ''}"


def print_answers(console: Console, result: dict[str, Any]) -> None:
    """The table of the problems that were answered freely."""
    part, baseline = result["problems"], result["settings"]["baseline"]
    table = Table(title=f"{plots.title(part)}, {result['model']['name']}, greedy, seed {result['settings']['seed']}, baseline {baseline}")
    for heading in (
        "cache", "body bits", "problems", "right", "accuracy", "95 % interval", "lost / won", "sign test p", "cut off",
        f"same first {part['first']}", "tokens/s",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for name, f in part["summary"].items():
        low, high = f["accuracy_95%"]
        table.add_row(
            name,
            f"{part['sizes'][name]['body_bits']:.2f}" if name in part["sizes"] else "",
            str(f["problems"]),
            str(f["correct"]),
            f"{f['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{f['lost']} / {f['won']}",
            f"{f['sign_test_p']:.3g}",
            str(f["cut"]),
            f"{f['same_first_tokens_share']:.1%}",
            f"{f['tokens_per_second']:.0f}",
        )
    console.print(table)


def _common_lengths(sections: Sequence[dict[str, Any]]) -> list[str]:
    """The lengths beside the context's own, of which every section has the total bits."""
    each = [list(figures["total_bits"])[1:] for section in sections for figures in section["caches"].values()]
    return [n for n in max(each, key=len) if all(n in figures["total_bits"] for s in sections for figures in s["caches"].values())]


def _what(section: dict[str, Any]) -> str:
    if section["kind"] == "derivations":
        return f"{sum(p['tokens'] for p in section['problems'])} tokens"
    return f"{len(section['offsets'])} x {section['ctx']} tokens"


def _row(name: str, figures: dict[str, Any], lengths: Sequence[str]) -> list[str]:
    bits = [figures["body_bits"], next(iter(figures["total_bits"].values())), *(figures["total_bits"][n] for n in lengths)]
    taken = [f"{x:.2f}" for x in bits] + [f"{figures['bytes'] / MIB:.1f}"]
    error = figures["kld_standard_error"]
    return [
        *(taken if name != NOISE_FLOOR else [""] * len(taken)),
        f"{figures['perplexity']:.3f}",
        f"{figures['perplexity_ratio']:.4f}",
        _nats(figures["kld_mean"]),
        _nats(figures["kld_over_floor"]) if name != NOISE_FLOOR and "kld_over_floor" in figures else "",
        "" if error is None else _nats(error),
        *(_nats(figures[key]) for key in ("kld_median", "kld_99%", "kld_99.9%", "kld_max")),
        f"{figures['same_top']:.2%}",
    ]


def _nats(x: float) -> str:
    return f"{x:.5f}" if abs(x) >= 0.001 or x == 0 else f"{x:.1e}"


# ---- command line ----------------------------------------------------------------------------------------

FILE = click.Path(dir_okay=False, path_type=Path)
GIVEN_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


_AT_ONCE = f"{problems.AT_ONCE}, on GPUs {problems.AT_ONCE_GPU}, if they fit"


@tool()
@click.argument("model", type=Model(), callback=lambda _context, _parameter, path: Path(path))
@click.option("--kv", multiple=True, help=f"The {CACHE_HELP}; may be repeated.  [default: {DEFAULT_CACHES}]")
@click.option("--baseline", help="What all caches are compared with.  [default: f16; with --exact f32]")
@click.option(
    "--exact", is_flag=True,
    help="Weights in F32 (a copy that is removed at the end) and the baseline in F32: without llama.cpp's own noise, for what drowns in it.",
)  # fmt: skip
@click.option("--text", "texts", multiple=True, type=GIVEN_FILE, help="Text to read; may be repeated.  [default: a text that comes with MixKVQ]")
@click.option("--style", default="decode", show_default=True, help="How tokens are fed: decode, prefill or token; several, comma-separated.")
@click.option("--ctx", type=click.IntRange(2, 1 << 30), help=f"Tokens per window of a text.  [default: {DEFAULT_CONTEXT}, or the model's context]")
@click.option("--windows", default=1, show_default=True, type=COUNT, help="Windows per text, drawn by the seed.")
@click.option("--skip", default=0, show_default=True, type=COUNT_OR_ZERO, help="Predictions left out at the start of each window.")
@click.option("--window", type=F16_TOKENS, help="Recent tokens in F16, for every cache but llama.cpp's.  [default: its own, or 128]")
@click.option("--sinks", type=F16_TOKENS, help="First tokens in F16, for every cache but llama.cpp's.  [default: its own, or 128]")
@click.option("--floor/--no-floor", default=None, help="Measure the baseline in other batches as well.  [default: unless --guarantee]")
@click.option(
    "--guarantee",
    "limit",
    type=Number(0, 1e3, min_open=True),
    help="Find the smallest preset (or cache of --kv) whose mean KLD stays below this.",
)
@click.option("--derivations", type=COUNT, help="Teacher-force the derivations of so many built-in problems.")
@click.option("--problems", "count", type=COUNT, help="Let the model answer so many problems, with every cache.")
@click.option("--problems-file", type=GIVEN_FILE, help='Problems as JSON lines with "question" and "answer" ("... #### number"), as GSM8K.')
@click.option("--checker", type=GIVEN_FILE, help="Python module with problems(rng, n) and check(problem, text).")
@click.option("--tasks", "task_names", default=",".join(tasks.TASKS), show_default=True, help="Kinds of built-in problems.")
@click.option("--levels", default="easy,medium", show_default=True, help=f"Levels of built-in problems: {', '.join(tasks.LEVELS)}.")
@click.option("--instruction", default=problems.INSTRUCTION, show_default=True, help="What follows each question of --problems-file.")
@click.option("--shots", default=0, show_default=True, type=COUNT_OR_ZERO, help="Problems of --problems-file shown, answered, before each question.")
@click.option("--max-tokens", type=COUNT, help=f"Longest answer.  [default: 5/4 of a built-in problem's derivation + 64; else {problems.MAX_TOKENS}]")
@click.option("--first", default=200, show_default=True, type=COUNT, help="Compare that many greedy tokens with the baseline's.")
@click.option("--workers", type=click.IntRange(1, SEQUENCES), help=f"Problems answered at once.  [default: {_AT_ONCE}]")
@click.option("--at-once", default=4, show_default=True, type=COUNT, help="Caches that are in memory beside the baseline.")
@click.option("--seed", default=1, show_default=True, type=SEED)
@click.option("--device", default="auto", show_default=True, help=f"Where the model is computed: {DEVICE_HELP}.")
@click.option("--threads", type=THREADS, help="Threads.  [default: physical cores]")
@click.option("--out", type=FILE, help="Write the figures as JSON; what is there already is not measured again.")
@click.option("--tokens", "token_file", type=FILE, help="Write the figures of every prediction, a row for each position, as NumPy's .npz.")
@click.option("--restart", is_flag=True, help="Measure everything anew, and replace the figures in the file of --out.")
@click.option("--plot", type=FILE, help="Draw divergence over bits, .png or .svg.")
@force_option("the picture of --plot")
@click.option("-q", "--quiet", is_flag=True, help="No tables and no progress; of --guarantee only the cache's name.")
def command(**given: Any) -> int:
    """Measure key/value caches on MODEL (a GGUF file): how far each moves the model's predictions from those of the F16 cache, and what it takes.

    Without --derivations or problems a text is read. Divergence is the mean Kullback-Leibler divergence of the next-token distributions (KLD,
    in nats) with its standard error. Body bits count packed pages with all their scales and tables; total bits every byte that a context
    allocates.
    """
    result: dict[str, Any] = {}
    texts: list[Text] = []
    try:
        with Bars(quiet=given["quiet"], share=True) as bars:
            check_outputs(given)
            quiet_llama()
            request = Request(**{field.name: given[field.name] for field in fields(Request)})
            evaluate(request, result, texts, bars, command_line())
    except KeyboardInterrupt:
        _show_some(result, given)
        return interrupted(_kept(result, given))
    except (BridgeError, OSError, MemoryError) as e:
        if not isinstance(e, SettingsError):  # else what the file of --out holds is not what was asked for
            _show_some(result, given)
        raise
    show(result, texts, given)
    return 1 if given["limit"] is not None and result["guarantee"]["cache"] is None else 0


def _show_some(result: dict[str, Any], given: dict[str, Any]) -> None:
    """The tables of what was measured before a run ended early."""
    if not given["quiet"] and _measured(result):
        print_figures(_wide_console(), result)


def _measured(result: dict[str, Any]) -> int:
    """How many figures there are: caches on texts, and answers."""
    records = (result.get("problems") or {}).get("records", [])
    return sum(len(section["caches"]) for section in result.get("sections", [])) + sum(len(record["answers"]) for record in records)


def _kept(result: dict[str, Any], given: dict[str, Any]) -> str:
    if not _measured(result):
        return "Nothing was measured yet, and nothing is written."
    if given["out"] is None:
        return "What was measured is not in a file, for --out was not given."
    return f"What was measured is in {given['out']}; the same command goes on from there."


def _wide_console() -> Console:
    return Console(width=max(205, Console().width), highlight=False)


def show(result: dict[str, Any], texts: Sequence[Text], given: dict[str, Any]) -> None:
    """Print the tables and the sentence of the guarantee, then draw the plot: if it cannot be written the tables are there."""
    if not given["quiet"]:
        console = _wide_console()
        if texts and not given["texts"]:
            console.print("No --text was given: the text that comes with MixKVQ was read, the part that calibration does not see.")
        print_figures(console, result)
    if given["limit"] is not None:
        sentence, found = guarantee_sentence(result, texts), result["guarantee"]["cache"]
        if not given["quiet"]:
            click.echo(sentence)
        elif found is not None:
            click.echo(found)
        else:
            click.echo(sentence, err=True)
    if given["plot"]:
        plots.draw_evaluation(result, given["plot"], overwrite=given["force"])  # one may have appeared meanwhile


def check_outputs(given: dict[str, Any]) -> None:
    """Raises SettingsError if --out or --plot cannot be written, or something would be lost by it."""
    inputs = [given["model"], *given["texts"], *(given[key] for key in ("problems_file", "checker") if given[key])]
    check_different(given["out"], given["plot"])
    check_different(given["out"], given["token_file"])
    check_different(given["plot"], given["token_file"])
    if given["out"]:
        check_result(given["out"], "evaluate", force=True, inputs=inputs)  # a result is gone on with, or replaced if --restart says so
    if given["plot"]:
        plots.check_path(given["plot"], force=given["force"], inputs=inputs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0; 1 if no cache keeps the guarantee or something failed; 2 for a mistake of the user."""
    return run(command, "mixkvq.evaluate", arguments)
