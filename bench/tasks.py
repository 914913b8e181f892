"""Greedy answers to fresh problems: how many are right, and whether they are those of the F16 cache.

Every problem is answered with every cache; `--first N` compares the first N greedy tokens with the baseline's.  The result file
is written after each problem and a run that was stopped goes on where it was: give the same `--out` again, also to add a cache.

    python bench/tasks.py models/cot-tiny-34m-q8_0.gguf --kv f16,q4_0,balanced --problems 210 --out results.json
    python bench/tasks.py models/cot-tiny-34m-q8_0.gguf --kv f16,high --first 200 --max-tokens 200 --out first.json
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from random import Random
from typing import Any

import click
from _common import (
    CACHE_HELP,
    available_cores,
    clear,
    describe_run,
    last_logits,
    open_model,
    round_up,
    save_json,
    split_names,
    wide_console,
    wilson,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bridge import Llama
from mixkvq import tasks

BATCH = 512


# ---- problems --------------------------------------------------------------------------------------------


def draw_problem(seed: int, index: int, task_names: list[str], levels: list[str]) -> dict[str, Any]:
    """Problem number `index`: tasks take turns, then levels."""
    task = task_names[index % len(task_names)]
    level = levels[index // len(task_names) % len(levels)]
    rng = Random(f"benchmark {seed} {index} {task} {level}")
    problem = tasks.make(task, rng, tasks.LEVELS.index(level))
    return {"index": index, "task": task, "level": level, **problem._asdict()}


def tokenize_all(llm: Llama, problems: list[dict[str, Any]]) -> None:
    """Add the prompt's tokens, and the length that the reference answer would take."""
    for problem in problems:
        text = tasks.chat(problem["prompt"])
        problem["tokens"] = llm.tokenize(text.encode(), add_bos=True, special=True)
        reference = tasks.completion(problem["reasoning"], problem["answer"])
        problem["reference_length"] = len(llm.tokenize(reference.encode(), add_bos=False)) + 1


def token_limit(problem: dict[str, Any], max_tokens: int) -> int:
    """A wrong derivation may be longer than the right one, but it need not go on for ever."""
    return max_tokens or problem["reference_length"] * 5 // 4 + 64


# ---- workers: each holds one context per cache -----------------------------------------------------------

_contexts: dict[str, Llama] = {}
_options: dict[str, Any] = {}


def start_worker(model: str, options: dict[str, Any]) -> None:
    _options.update(model=model, **options)


def answer_problem(job: tuple[dict[str, Any], list[str], int]) -> tuple[int, dict[str, dict[str, Any]]]:
    problem, caches, max_tokens = job
    return problem["index"], {cache: answer_with(cache, problem, max_tokens) for cache in caches}


def answer_with(cache: str, problem: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    if cache not in _contexts:
        _contexts[cache] = open_model(cache=cache, **_options)
    llm = _contexts[cache]
    begin = time.perf_counter()
    generated = generate_greedily(llm, problem["tokens"], token_limit(problem, max_tokens))
    seconds = time.perf_counter() - begin
    text = llm.detokenize(generated, special=True).decode("utf-8", errors="replace")
    return {
        "correct": tasks.check(problem["task"], text, problem["answer"]),
        "ended": generated[-1] == llm.token_eos(),
        "tokens": generated,
        "seconds": round(seconds, 3),
    }


def generate_greedily(llm: Llama, prompt: list[int], limit: int) -> list[int]:
    """The arg-max tokens that follow the prompt, up to and including the end of the turn."""
    clear(llm)
    llm.eval(prompt)
    generated: list[int] = []
    while True:
        generated.append(int(last_logits(llm).argmax()))
        if generated[-1] == llm.token_eos() or len(generated) >= limit:
            return generated
        llm.eval(generated[-1:])


# ---- figures ---------------------------------------------------------------------------------------------


def summarise(records: list[dict[str, Any]], caches: list[str], baseline: str, first: int) -> dict[str, Any]:
    """Figures per cache, over the problems that every cache has answered."""
    complete = [record["answers"] for record in records if all(cache in record["answers"] for cache in caches)]
    summary = {}
    for cache in caches:
        correct = sum(answers[cache]["correct"] for answers in complete)
        n_tokens = sum(len(answers[cache]["tokens"]) for answers in complete)
        figures = {
            "problems": len(complete),
            "correct": correct,
            "accuracy": correct / max(1, len(complete)),
            "accuracy_95%": wilson(correct, len(complete)),
            "tokens": n_tokens,
            "tokens_per_second": n_tokens / max(1e-9, sum(answers[cache]["seconds"] for answers in complete)),
        }
        if baseline in caches:
            same = sum(answers[cache]["tokens"][:first] == answers[baseline]["tokens"][:first] for answers in complete)
            differ = [a[cache]["correct"] - a[baseline]["correct"] for a in complete]
            figures |= {
                "same_first_tokens": same,
                "same_first_tokens_share": same / max(1, len(complete)),
                "same_first_tokens_95%": wilson(same, len(complete)),
                "right_where_baseline_wrong": differ.count(1),
                "wrong_where_baseline_right": differ.count(-1),
            }
        summary[cache] = figures
    return summary


def print_summary(console: Console, result: dict[str, Any]) -> None:
    settings, first = result["settings"], result["first"]
    title = (
        f"{result['model']['name']}, tasks {', '.join(settings['tasks'])}, levels {', '.join(settings['levels'])}, "
        f"seed {settings['seed']}, baseline {result['baseline']}"
    )
    cut = bool(settings["max_tokens"])  # answers cut short are not judged
    table = Table("cache", "problems", "right", "accuracy", "95 % interval", "lost / won", f"same first {first}", "tokens/s", title=title)
    for cache, figures in result["summary"].items():
        low, high = figures["accuracy_95%"]
        table.add_row(
            cache,
            str(figures["problems"]),
            "-" if cut else str(figures["correct"]),
            "-" if cut else f"{figures['accuracy']:.1%}",
            "-" if cut else f"{low:.1%} to {high:.1%}",
            "-" if cut else f"{figures.get('wrong_where_baseline_right', '')} / {figures.get('right_where_baseline_wrong', '')}",
            f"{figures['same_first_tokens_share']:.1%}" if "same_first_tokens_share" in figures else "-",
            f"{figures['tokens_per_second']:.0f}",
        )
    console.print(table)


# ---- command line ----------------------------------------------------------------------------------------


def load_or_start(out: Path | None, fresh: dict[str, Any], restart: bool) -> dict[str, Any]:
    """The result file of a stopped run, if there is one and it was made with the same settings."""
    if out is None or not out.exists() or restart:
        return fresh
    found = json.loads(out.read_text(encoding="utf-8"))
    for key in ("bench", "model", "settings"):
        if found.get(key) != fresh[key]:
            raise click.ClickException(f"{out} holds a run with another {key}: give --restart or another --out")
    return found | {key: fresh[key] for key in ("baseline", "first", "caches", "date", "commit", "machine", "versions")}


def measure(model: Path, jobs: list, n_ctx: int, workers: int, threads: int, on_done) -> None:
    options = {"n_ctx": n_ctx, "n_batch": BATCH, "n_threads": threads, "n_threads_batch": threads}
    if workers == 1:
        start_worker(str(model), options)
        for job in jobs:
            on_done(answer_problem(job))
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, start_worker, (str(model), options)) as pool:
        for done in pool.imap_unordered(answer_problem, jobs):
            on_done(done)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kv", default="f16,q8_0,q4_0,balanced", show_default=True, help=CACHE_HELP)
@click.option("--baseline", default="f16", show_default=True)
@click.option("--problems", default=210, show_default=True)
@click.option("--tasks", "task_names", default=",".join(tasks.TASKS), show_default=True)
@click.option("--levels", default="easy,medium,hard", show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--first", default=200, show_default=True, help="Compare that many greedy tokens with the baseline's.")
@click.option("--max-tokens", default=0, help="Cut every answer there (accuracy is not judged).  [default: 5/4 of the reference + 64]")
@click.option("--workers", type=int, default=available_cores, show_default="all cores", help="Processes.")
@click.option("--threads", default=1, show_default=True, help="Threads per process.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON result; a stopped run goes on from it.")
@click.option("--restart", is_flag=True, help="Do not go on from the result file.")
def main(model, kv, baseline, problems, task_names, levels, seed, first, max_tokens, workers, threads, out, restart):
    task_list, level_list, caches = split_names(task_names), split_names(levels), split_names(kv)
    for given, known in ((task_list, tasks.TASKS), (level_list, tasks.LEVELS)):
        if unknown := set(given) - set(known):
            raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    settings = {"tasks": task_list, "levels": level_list, "seed": seed, "max_tokens": max_tokens}
    fresh = describe_run("tasks", model, settings)
    fresh |= {"baseline": baseline, "first": first, "caches": caches, "summary": {}, "records": []}
    result = load_or_start(out, fresh, restart)
    records = {record["index"]: record for record in result["records"]}

    drawn = [draw_problem(seed, i, task_list, level_list) for i in range(problems)]
    tokenize_all(open_model(model, "f16", n_ctx=256, vocab_only=True), drawn)
    n_ctx = round_up(max(len(p["tokens"]) + token_limit(p, max_tokens) for p in drawn), 256)
    jobs = []
    for problem in drawn:
        record = records.setdefault(
            problem["index"],
            {key: problem[key] for key in ("index", "task", "level", "reference_length")}
            | {"prompt_length": len(problem["tokens"]), "answers": {}},
        )
        if missing := [cache for cache in caches if cache not in record["answers"]]:
            jobs.append((problem, missing, max_tokens))

    console = wide_console()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        step = bar.add_task("problems", total=len(jobs))

        def on_done(done: tuple[int, dict[str, dict[str, Any]]]) -> None:
            index, answers = done
            records[index]["answers"].update(answers)
            result["records"] = [records[i] for i in sorted(records) if records[i]["answers"]]
            result["summary"] = summarise(result["records"], caches, baseline, first)
            save_json(out, result)
            bar.advance(step)

        measure(model, jobs, n_ctx, min(workers, max(1, len(jobs))), threads, on_done)
    if not jobs:
        result["summary"] = summarise(result["records"], caches, baseline, first)
        save_json(out, result)
    print_summary(console, result)


if __name__ == "__main__":
    main()
