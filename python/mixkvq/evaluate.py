"""Measure key/value caches on a model: divergence from the F16 cache on text and on derivations, right answers, and what each cache takes.

    python -m mixkvq.evaluate model.gguf --text novel.txt --kv q8_0,q4_0,balanced,profile.gguf,lab:kivi-2 --plot kld.svg --out kld.json
    python -m mixkvq.evaluate model.gguf --guarantee 0.01
    python -m mixkvq.evaluate model.gguf --derivations 14 --kv q4_0,balanced
    python -m mixkvq.evaluate model.gguf --problems-file gsm8k.jsonl --problems 100 --kv q4_0,balanced --out answers.json

What is in the JSON file is not measured again: a run that was stopped goes on with the same --out, also with more caches, texts or styles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bridge.devices import DEVICE_HELP, check_device
from bridge.errors import BridgeError, SettingsError
from bridge.library import llama, native
from bridge.machine import physical_cores
from bridge.memory import SEQUENCES
from bridge.model_file import open_model

from . import plots, problems, tasks
from .caches import CACHE_HELP, check_name, file_of, is_stock, open_cache, split_names
from .command import COUNT, COUNT_OR_ZERO, F16_TOKENS, SEED, THREADS, Model, Number, force_option, interrupted, run, tool
from .compare import (
    LEAST_BLOCKS,
    NOISE_FLOOR,
    STYLES,
    Measured,
    Passage,
    compare_caches,
    draw_windows,
    n_blocks,
    tokenize_text,
    windows_of,
    work,
)
from .outputs import check_different
from .record import check_result, describe_file, describe_run, save_json
from .texts import DEFAULT_TEXT, default_text, read_utf8

if TYPE_CHECKING:
    from bridge import Llama

DEFAULT_CACHES = "q8_0,q4_0,balanced"
DEFAULT_CONTEXT = 4096
MIB = 1 << 20


# ---- measuring -------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """A run: what is fixed, and the result as it grows. Every method that measures leaves out what the result holds already."""

    model: Path
    result: dict[str, Any]
    out: Path | None
    bar: Progress
    windows: set[int]
    at_once: int
    threads: int
    cache_options: dict[str, Any]  # window, sinks and device: what compare_caches and Solver know, too

    def section(self, description: dict[str, Any]) -> dict[str, Any]:
        """The part of the result with this description, new if there is none."""
        for known in self.result["sections"]:
            if all(known.get(key) == value for key, value in description.items()):
                return known
        self.result["sections"].append({**description, "caches": {}})
        return self.result["sections"][-1]

    def measure(
        self, section: dict[str, Any], passages: Sequence[Passage], names: Sequence[str], note: Callable[[str, Measured], dict[str, Any]]
    ) -> None:
        """Compare the named caches with the baseline on the passages; `note` gives further figures of a cache."""
        missing = [name for name in names if name not in section["caches"]]
        if not missing:
            return
        step = self.bar.add_task(plots.title(section), total=work(len(missing), passages, self.at_once))
        groups = compare_caches(
            str(self.model),
            missing,
            passages,
            baseline=self.result["settings"]["baseline"],
            style=section["style"],
            at_once=self.at_once,
            windows=self.windows,
            threads=self.threads,
            progress=lambda n: self.bar.advance(step, n),
            **self.cache_options,
        )
        for group in groups:
            for name, measured in group.items():
                section["caches"][name] = measured.summary() | note(name, measured)
            section["caches"] = {name: section["caches"][name] for name in dict.fromkeys([*names, *section["caches"]]) if name in section["caches"]}
            save_json(self.out, self.result)
        self.bar.remove_task(step)


def load_or_start(out: Path | None, fresh: dict[str, Any], restart: bool) -> dict[str, Any]:
    """The result file of an earlier run, if there is one and it was made with the same model and settings.

    Raises SettingsError if it was made with others.
    """
    if out is None or restart or not out.exists():
        return fresh
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
        other = next((key for key in ("bench", "model", "settings") if found.get(key) != fresh[key]), None)
    except (ValueError, AttributeError, OSError):
        raise SettingsError(f"{out} is not a result of this program; give another --out, or --restart to replace it.") from None
    if other is None:
        known = found["files"]
        changed = [name for name in fresh["files"] if name in known and known[name] != fresh["files"][name]]
        if not changed:
            newer = {key: fresh[key] for key in ("date", "command", "commit", "machine", "versions")}
            return {**found, **newer, "files": {**known, **fresh["files"]}}
        other = f"content of {changed[0]}"
    raise SettingsError(f"{out} holds a run with another {other}; give another --out, or --restart to replace it.")


@dataclass
class Text:
    """A text by its description in the result, and its windows."""

    description: dict[str, Any]
    offsets: list[int]
    passages: list[Passage]


def read_text(vocabulary: Llama, path: Path | None, ctx: int, n_windows: int, skip: int, seed: int) -> Text:
    """The windows of a text file, or of the default text. Raises SettingsError if it is shorter than a window."""
    if path is None:
        text, description = default_text()[1].encode(), describe_file(DEFAULT_TEXT) | {"name": "the default text"}
    else:
        text, description = read_utf8(path).encode(), describe_file(path)
    tokens, begin = tokenize_text(vocabulary, text)
    size = ctx - len(begin)
    offsets = draw_windows(len(tokens), size, n_windows, seed)
    if len(offsets) < n_windows:
        raise SettingsError(
            f"{path or 'The default text'} has {len(tokens)} tokens, which is less than {n_windows} window{'s' if n_windows > 1 else ''} of {size}; "
            "give a smaller --ctx" + (", fewer --windows" if n_windows > 1 else "") + " or a longer --text."
        )
    return Text(description, offsets, [Passage(begin + tokens[at : at + size], first=1 + skip) for at in offsets])


def measure_text(evaluation: Evaluation, text: Text, style: str, names: Sequence[str]) -> dict[str, Any]:
    """The section of a text in one style, with all named caches in it."""
    settings = evaluation.result["settings"]
    keys = {key: settings[key] for key in ("ctx", "windows", "skip")}
    section = evaluation.section({"kind": "text", "style": style, "text": text.description, **keys, "offsets": text.offsets})
    evaluation.measure(section, text.passages, names, lambda name, measured: {})
    return section


def measure_derivations(evaluation: Evaluation, drawn: list[problems.Problem], passages: list[Passage], style: str, names: Sequence[str]) -> None:
    """Built-in problems with their reference derivations, teacher-forced: only the derivation's tokens count."""
    described = [
        {"task": problem["task"], "level": problem["level"], "prompt_tokens": passage.first, "tokens": len(passage.tokens) - passage.first}
        for problem, passage in zip(drawn, passages)
    ]
    section = evaluation.section({"kind": "derivations", "style": style, "count": len(drawn), "problems": described})

    def note(name: str, measured: Measured) -> dict[str, Any]:
        parts = measured.passages
        return {
            "exact": sum(all(part.right) for part in parts),
            "baseline_exact": sum(all(part.right_baseline) for part in parts),
            "wrong": sum(part.right.count(False) for part in parts),
            "by_problem": [
                {"kld_mean": sum(part.kld) / len(part.kld), "flips": part.same_top.count(False), "wrong": part.right.count(False)} for part in parts
            ],
        }

    evaluation.measure(section, passages, names, note)


def answer_problems(
    evaluation: Evaluation,
    vocabulary: Llama,
    source: problems.Source,
    count: int | None,
    names: Sequence[str],
    *,
    max_tokens: int | None,
    first: int,
    workers: int,
    threads: int,
) -> None:
    """Free greedy answers with the baseline and every named cache, one record per problem; saved as they come."""
    settings = evaluation.result["settings"]
    baseline = settings["baseline"]
    caches = list(dict.fromkeys([baseline, *names]))
    drawn = source.draw(settings["seed"], count)  # type: ignore[arg-type]  # a count may be None for a file only
    n_ctx = problems.add_tokens(vocabulary, drawn, max_tokens)
    description = {"kind": "problems", "count": len(drawn), "max_tokens": max_tokens, **describe_source(source)}
    part = evaluation.result.get("problems")
    if part is None:
        part = {**description, "first": first, "sizes": {}, "summary": {}, "records": []}
    elif any(part.get(key) != value for key, value in description.items() if key != "count"):
        raise SettingsError("The --out file holds answers to other problems; give another --out, or --restart to replace it.")
    part.update(first=first, count=len(drawn))
    evaluation.result["problems"] = part
    records = {record["index"]: record for record in part["records"]}
    jobs = []
    for i, problem in enumerate(drawn):
        shown = {"index": i, "prompt": hashlib.sha256(problem["prompt"].encode()).hexdigest()[:16], "prompt_tokens": len(problem["tokens"])}
        shown |= {key: problem[key] for key in ("task", "level") if key in problem}
        record = records.setdefault(i, {**shown, "answers": {}})
        if record["prompt"] != shown["prompt"]:
            raise SettingsError(f"Problem {i} is another one than in the --out file; give another --out, or --restart to replace it.")
        if missing := [cache for cache in caches if cache not in record["answers"]]:
            jobs.append((i, problem, missing))

    saved, cost, unsaved = 0.0, 0.0, False

    def update() -> None:
        nonlocal saved, cost, unsaved
        begin = time.perf_counter()
        part["records"] = [records[i] for i in sorted(records) if records[i]["answers"]]
        part["summary"] = problems.summarise([r for r in part["records"] if r["index"] < len(drawn)], caches, baseline, first)
        save_json(evaluation.out, evaluation.result)
        saved = time.perf_counter()
        cost, unsaved = saved - begin, False

    solver = problems.Solver(str(evaluation.model), source, n_ctx, threads, **evaluation.cache_options)
    step = evaluation.bar.add_task(plots.title(part), total=sum(len(missing) for _, _, missing in jobs))
    try:
        for index, answers in solver.solve(jobs, workers):
            part["sizes"] |= {cache: answer.pop("sizes") for cache, answer in answers.items()}
            records[index]["answers"].update(answers)
            unsaved = True
            if time.perf_counter() - saved >= 20 * cost:  # a long result takes its time to write: a twentieth of all, and so much may be lost
                update()
            evaluation.bar.advance(step, len(answers))
    except BaseException:  # Ctrl-C as well
        if unsaved:
            update()
        raise
    update()
    evaluation.bar.remove_task(step)


def describe_source(source: problems.Source) -> dict[str, Any]:
    """The problems' source as the result names it; what differs here has other problems or judges them otherwise."""
    if isinstance(source, problems.BuiltIn):
        return {"source": "built in", "tasks": list(source.names), "levels": list(source.levels)}
    described = {"source": source.path.name, "file": describe_file(source.path)}
    return described | ({"instruction": source.instruction} if isinstance(source, problems.NumberFile) else {})


# ---- the guarantee ---------------------------------------------------------------------------------------


def guarantee(evaluation: Evaluation, texts: Sequence[Text], names: Sequence[str], limit: float) -> str | None:
    """The smallest of the named caches, given by rising body bits, whose mean KLD plus its standard error is at most `limit` on every text.

    Measured in decode style, `at_once` caches at a time, and no more caches than it takes. The result gets "guarantee".
    """
    if any(n_blocks([len(p.tokens) - p.first for p in text.passages]) < LEAST_BLOCKS for text in texts):
        raise SettingsError("A guarantee needs at least 512 predictions per text; give a larger --ctx or more --windows.")
    tried = []
    best = None
    for i in range(0, len(names), evaluation.at_once):
        group = names[i : i + evaluation.at_once]
        sections = [measure_text(evaluation, text, "decode", group) for text in texts]
        for name in group:
            figures = [section["caches"][name] for section in sections]
            worst = max(figures, key=lambda f: f["kld_mean"] + f["kld_standard_error"])
            holds = worst["kld_mean"] + worst["kld_standard_error"] <= limit
            tried.append({"cache": name, "holds": holds, **{key: worst[key] for key in ("body_bits", "kld_mean", "kld_standard_error")}})
            if holds and best is None:
                best = name
        if best is not None:
            break
    evaluation.result["guarantee"] = {"limit": limit, "cache": best, "tried": tried}
    save_json(evaluation.out, evaluation.result)
    return best


def presets_by_size() -> list[str]:
    """The presets by rising body bits, each by its alias if it has one."""
    return [p["alias"] or p["name"] for p in sorted(native().presets(), key=lambda p: float(p["body_bits"]))]


def guarantee_sentence(result: dict[str, Any], texts: Sequence[Text]) -> str:
    """What was found, in one sentence."""
    found = result["guarantee"]
    n = sum(len(passage.tokens) - passage.first for text in texts for passage in text.passages)
    on = f"on {' and '.join(text.description['name'] for text in texts)} ({n} predictions, decode style)"
    entries = {entry["cache"]: entry for entry in found["tried"]}
    if found["cache"] is None:
        entry = min(found["tried"], key=lambda e: e["kld_mean"] + e["kld_standard_error"])
        return (
            f"measured on your model: no cache that was tried keeps mean KLD plus its standard error at or below {found['limit']:g} {on}; "
            f"the closest is {entry['cache']} ({entry['body_bits']:.2f} body bits) with {entry['kld_mean']:.4f} +- {entry['kld_standard_error']:.4f}."
        )
    entry = entries[found["cache"]]
    return (
        f"measured on your model: {entry['cache']} ({entry['body_bits']:.2f} body bits) keeps mean KLD at {entry['kld_mean']:.4f} "
        f"+- {entry['kld_standard_error']:.4f} <= {found['limit']:g} {on}; use --kv {entry['cache']}"
    )


# ---- tables ----------------------------------------------------------------------------------------------


def print_figures(console: Console, result: dict[str, Any]) -> None:
    """One table of all divergences, a block per section; and one of the answers."""
    baseline = result["settings"]["baseline"]
    sections = [section for section in result["sections"] if section["caches"]]
    if sections:
        table = Table(title=f"{result['model']['name']} against {baseline}, seed {result['settings']['seed']}")
        for heading in ("measured on", "cache"):
            table.add_column(heading)
        lengths = _common_lengths(sections)
        for heading in (
            "body bits", "total here", *(f"at {int(n) // 1024}k" for n in lengths), "MiB", "perplexity", "ratio",
            "mean KLD", "+-", "median", "99 %", "99.9 %", "max", "same top",
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
        "" if error is None else _nats(error),
        *(_nats(figures[key]) for key in ("kld_median", "kld_99%", "kld_99.9%", "kld_max")),
        f"{figures['same_top']:.2%}",
    ]


def _nats(x: float) -> str:
    return f"{x:.5f}" if x >= 0.001 or x == 0 else f"{x:.1e}"


# ---- command line ----------------------------------------------------------------------------------------

FILE = click.Path(dir_okay=False, path_type=Path)
GIVEN_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@tool()
@click.argument("model", type=Model(), callback=lambda _context, _parameter, path: Path(path))
@click.option("--kv", multiple=True, help=f"The {CACHE_HELP}; may be repeated.  [default: {DEFAULT_CACHES}]")
@click.option("--baseline", default="f16", show_default=True, help="What all caches are compared with.")
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
@click.option("--max-tokens", type=COUNT, help=f"Longest answer.  [default: 5/4 of a built-in problem's derivation + 64; else {problems.MAX_TOKENS}]")
@click.option("--first", default=200, show_default=True, type=COUNT, help="Compare that many greedy tokens with the baseline's.")
@click.option("--workers", type=click.IntRange(1, SEQUENCES), help=f"Problems that are answered at once.  [default: {problems.AT_ONCE}]")
@click.option("--at-once", default=4, show_default=True, type=COUNT, help="Caches that are in memory beside the baseline.")
@click.option("--seed", default=1, show_default=True, type=SEED)
@click.option("--device", default="auto", show_default=True, help=f"Where the model is computed: {DEVICE_HELP}.")
@click.option("--threads", type=THREADS, help="Threads.  [default: physical cores]")
@click.option("--out", type=FILE, help="Write the figures as JSON; what is there already is not measured again.")
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
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=given["quiet"] or not console.is_terminal) as bar:
            evaluate(given, bar, result, texts)
    except KeyboardInterrupt:
        _show_some(result, given)
        return interrupted(_kept(result, given))
    except (BridgeError, OSError, MemoryError):
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
    return Console(width=max(190, Console().width), highlight=False)


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
    if given["out"]:
        check_result(given["out"], "evaluate", force=True, inputs=inputs)  # a result is gone on with, or replaced if --restart says so
    if given["plot"]:
        plots.check_path(given["plot"], force=given["force"], inputs=inputs)


def evaluate(given: dict[str, Any], bar: Progress, result: dict[str, Any], texts: list[Text]) -> None:
    """Check the command line and measure. Raises BridgeError.

    result, texts: empty; they get what is measured, as it comes, and the texts that were read.
    """
    check_outputs(given)
    source = _source(given)
    reads_text = bool(given["texts"]) or given["limit"] is not None or not (given["derivations"] or source)
    styles = split_names(given["style"])
    if unknown := [style for style in styles if style not in STYLES] or (not styles and [""]):
        raise SettingsError(f"There is no style {unknown[0]!r}; the styles are {', '.join(STYLES)}.")
    device = check_device(given["device"])
    file = open_model(given["model"])  # says what is wrong with it before anything else is read
    baseline = given["baseline"]
    names = [name for name in split_names(given["kv"] or DEFAULT_CACHES) if name != baseline]
    candidates = (names if given["kv"] else presets_by_size()) if given["limit"] is not None else []
    if not names:
        raise SettingsError(f"--kv names no cache beside the baseline {baseline}.")
    if unfit := next((name for name in candidates if is_stock(name) or name.startswith("lab:")), None):
        raise SettingsError(f"--guarantee chooses among presets and profiles, and {unfit} is neither.")
    measured = candidates if given["limit"] is not None and not (given["derivations"] or source) else list(dict.fromkeys(names + candidates))
    for name in [baseline, *measured]:
        check_name(name)
    ctx = given["ctx"] or min(DEFAULT_CONTEXT, file.n_ctx_train or DEFAULT_CONTEXT)
    if given["skip"] > ctx - 2:
        raise SettingsError(f"--skip {given['skip']} leaves nothing of a window of {ctx} tokens.")

    llama().quiet_log()
    windows = windows_of([baseline, *measured], given["window"])
    settings = {key: given[key] for key in ("baseline", "windows", "skip", "window", "sinks", "seed")} | {"ctx": ctx, "cuts": sorted(windows)}
    settings |= {"device": device} if device != "auto" else {}
    with hashing(bar, given["model"], given["out"] is not None) as progress:
        fresh = describe_run("evaluate", given["model"], settings, hashed=given["out"] is not None, progress=progress)
    fresh.update(files=_files([baseline, *measured]), sections=[], problems=None)
    result.update(load_or_start(given["out"], fresh, given["restart"]))
    threads = given["threads"] or physical_cores()
    result["run"] = {"threads": threads, "workers": given["workers"] or problems.AT_ONCE, "at_once": given["at_once"]}

    vocabulary = open_cache(given["model"], "f16", n_ctx=256, vocab_only=True)
    cache_options = {"window": given["window"], "sinks": given["sinks"], "device": device}
    evaluation = Evaluation(given["model"], result, given["out"], bar, windows, given["at_once"], threads, cache_options)
    if reads_text:
        texts += [read_text(vocabulary, path, ctx, given["windows"], given["skip"], given["seed"]) for path in given["texts"] or (None,)]
    drawn: list[problems.Problem] = []
    if given["derivations"]:
        tasks_of = problems.BuiltIn(*_built_in(given), purpose="derivation")
        drawn = tasks_of.draw(given["seed"], given["derivations"])
    forced = problems.derivations(vocabulary, drawn)
    floor = [NOISE_FLOOR] if given["floor"] or (given["floor"] is None and given["limit"] is None) else []
    if given["limit"] is not None:
        candidates = _by_size(evaluation, candidates) if given["kv"] else candidates
        guarantee(evaluation, texts, candidates, given["limit"])
    else:
        for text in texts:
            for style in styles:
                measure_text(evaluation, text, style, floor + names)
    for style in styles if forced else []:
        measure_derivations(evaluation, drawn, forced, style, floor + names)
    if source:
        answer_problems(
            evaluation,
            vocabulary,
            source,
            given["count"],
            names,
            max_tokens=given["max_tokens"],
            first=given["first"],
            workers=result["run"]["workers"],
            threads=threads,
        )
    vocabulary.close()
    save_json(given["out"], result)


@contextlib.contextmanager
def hashing(bar: Progress, model: Path, hashed: bool) -> Iterator[Callable[[int], None]]:
    """A progress line for the hash of the model, which names it in the result."""
    step = bar.add_task(f"SHA-256 of {model.name}", total=model.stat().st_size, visible=hashed)
    yield lambda n: bar.advance(step, n)
    bar.remove_task(step)


def _source(given: dict[str, Any]) -> problems.Source | None:
    """Where the problems to answer come from, if any are asked for. Raises SettingsError for what does not go together."""
    if given["problems_file"] and given["checker"]:
        raise SettingsError("--problems-file and --checker do not go together.")
    if given["problems_file"]:
        return problems.NumberFile(given["problems_file"], given["instruction"])
    if given["checker"]:
        if given["count"] is None:
            raise SettingsError("--checker needs --problems N: how many problems it is asked for.")
        return problems.Module(given["checker"])
    return problems.BuiltIn(*_built_in(given)) if given["count"] else None


def _built_in(given: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(split_names(given["task_names"])), tuple(split_names(given["levels"]))


def _files(names: Sequence[str]) -> dict[str, str]:
    """The hash of what a name stands for where it is a file: another profile of the same name is another cache."""
    return {name: describe_file(path)["sha256"] for name in names if (path := file_of(name)) is not None}


def _by_size(evaluation: Evaluation, names: Sequence[str]) -> list[str]:
    """The caches by rising body bits, which a profile's context knows once it has read a token."""
    bits = {}
    for name in names:
        llm = open_cache(evaluation.model, name, n_ctx=256, device=evaluation.cache_options["device"])
        llm.eval([0])
        bits[name] = float(llm.kv_stats()["body_bits"])
        llm.close()
    return sorted(names, key=lambda name: bits[name])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0; 1 if no cache keeps the guarantee or something failed; 2 for a mistake of the user."""
    return run(command, "mixkvq.evaluate", arguments)


if __name__ == "__main__":
    sys.exit(main())
