"""How far a quantised cache moves the model's predictions: KL divergence to the F16 cache.

Decode-style (the default) feeds every token by itself, so that each prediction reads the cache as a running
chat does.  Prefill-style feeds batches, in which a prompt still sees itself unquantised.  All caches of a run
walk through the text in lock-step, so no logits are stored.

llama.cpp rounds a little differently with the size of a batch and, for single tokens, with the number of threads.  The row "noise
floor" is the baseline's own cache fed in batches of another size: divergences near it say nothing about the cache.

    python bench/quality.py models/cot-tiny-34m-q8_0.gguf --text novel.txt --kv q8_0,q4_0,balanced
    python bench/quality.py models/cot-tiny-34m-q8_0.gguf --derivations 14 --kv q8_0,q4_0,balanced
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from _common import (
    CACHE_HELP,
    all_logits,
    available_cores,
    cache_statistics,
    clear,
    describe_file,
    describe_run,
    log_softmax,
    open_model,
    round_up,
    save_json,
    split_names,
    wide_console,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bridge import Llama
from mixkvq import tasks

PREFILL_BATCH = 512
NOISE_FLOOR = "noise floor"


@dataclass
class Comparison:
    """Per predicted token: divergence, and both caches' likelihood and first choice."""

    kld: list[float] = field(default_factory=list)
    same_top: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    nll_baseline: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    right_baseline: list[bool] = field(default_factory=list)

    def add(self, baseline: np.ndarray, candidate: np.ndarray, target: int) -> None:
        """One token: log-probabilities of both caches, and the token that really follows."""
        # Rounding can make the sum of an (almost) equal pair a tiny negative number.
        self.kld.append(max(0.0, float(np.sum(np.exp(baseline) * (baseline - candidate)))))
        top_baseline, top = int(baseline.argmax()), int(candidate.argmax())
        self.same_top.append(top == top_baseline)
        self.nll.append(-float(candidate[target]))
        self.nll_baseline.append(-float(baseline[target]))
        self.right.append(top == target)
        self.right_baseline.append(top_baseline == target)

    def extend(self, other: Comparison) -> None:
        for name, values in vars(self).items():
            values.extend(getattr(other, name))

    def summary(self) -> dict[str, Any]:
        kld = np.array(self.kld)
        return {
            "tokens": len(kld),
            "kld_mean": float(kld.mean()),
            "kld_standard_error": _standard_error(kld),
            "kld_median": float(np.median(kld)),
            "kld_99.9%": float(np.quantile(kld, 0.999)),
            "kld_max": float(kld.max()),
            "same_top": float(np.mean(self.same_top)),
            "perplexity": math.exp(np.mean(self.nll)),
            "perplexity_baseline": math.exp(np.mean(self.nll_baseline)),
        }


def _standard_error(values: np.ndarray, block: int = 128) -> float | None:
    """Of the mean, from means of blocks: neighbouring tokens are not independent."""
    n_blocks = len(values) // block
    if n_blocks < 4:
        return None
    means = values[: n_blocks * block].reshape(n_blocks, block).mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(n_blocks))


def walk(
    caches: Sequence[Llama], batches: Sequence[int], tokens: Sequence[int], first: int
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Feed `tokens` to every cache and yield (position of the target, log-probabilities of each cache).

    Targets start at position `first` (at least 1).  What lies before its predictor is fed in large batches if `first` > 1;
    from there on each cache takes its own number of tokens at a time.
    """
    for llm in caches:
        clear(llm)
        if first > 1:
            llm.eval(tokens[: first - 1])
    stride = max(batches)
    for start in range(first - 1, len(tokens) - 1, stride):
        part = tokens[start : min(start + stride, len(tokens) - 1)]
        rows = [feed(llm, part, batch) for llm, batch in zip(caches, batches, strict=True)]
        for i in range(len(part)):
            yield start + i + 1, [log_softmax(row[i]) for row in rows]


def feed(llm: Llama, tokens: Sequence[int], batch: int) -> np.ndarray:
    """Evaluate `tokens`, `batch` at a time, and return a row of logits per token."""
    return np.concatenate([all_logits(llm, tokens[i : i + batch]).copy() for i in range(0, len(tokens), batch)])


@dataclass
class Caches:
    """The baseline, and the candidates by name, each with the number of tokens it is fed at a time."""

    baseline: Llama
    candidates: dict[str, Llama]
    batch: int
    floor: str | None = None  # the name of the candidate that is the baseline's cache in other batches

    def compare(
        self,
        tokens: Sequence[int],
        *,
        first: int = 1,
        skip: int = 0,
        progress: Callable[[int], None] = lambda n: None,
    ) -> dict[str, Comparison]:
        """Compare every candidate with the baseline on one sequence, from target `first` + `skip` on."""
        found = {name: Comparison() for name in self.candidates}
        caches = [self.baseline, *self.candidates.values()]
        batches = [self.batch] + [_other_batch(self.batch) if name == self.floor else self.batch for name in self.candidates]
        for target, (reference, *others) in walk(caches, batches, tokens, first):
            if target >= first + skip:
                for name, other in zip(self.candidates, others, strict=True):
                    found[name].add(reference, other, tokens[target])
            progress(1)
        return found


def _other_batch(batch: int) -> int:
    """A size at which the CPU backend takes another path through attention: one query at a time, or a tile of 64."""
    return 64 if batch == 1 else 8


def draw_windows(n_tokens: int, size: int, count: int, seed: int) -> list[int]:
    """Offsets of `count` different windows of `size` tokens, in order."""
    n_windows = n_tokens // size
    if n_windows < 1:
        raise click.ClickException(f"the text has {n_tokens} tokens: fewer than a window of {size}")
    return sorted(size * i for i in Random(seed).sample(range(n_windows), min(count, n_windows)))


def draw_problems(count: int, levels: list[str], seed: int) -> list[tuple[str, str, tasks.Problem]]:
    """`count` fresh problems: tasks take turns, then levels."""
    drawn = []
    for i in range(count):
        task = tasks.TASKS[i % len(tasks.TASKS)]
        level = levels[i // len(tasks.TASKS) % len(levels)]
        rng = Random(f"derivation {seed} {i} {task} {level}")
        drawn.append((task, level, tasks.make(task, rng, tasks.LEVELS.index(level))))
    return drawn


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kv", default="q8_0,q4_0,balanced", show_default=True, help=CACHE_HELP)
@click.option("--baseline", default="f16", show_default=True)
@click.option("--text", "texts", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--ctx", default=4096, show_default=True, help="Tokens per window of a text.")
@click.option("--windows", default=1, show_default=True, help="Windows per text, drawn by the seed.")
@click.option("--skip", default=0, show_default=True, help="Predictions left out at the start of each window.")
@click.option("--mode", type=click.Choice(["decode", "prefill"]), default="decode", show_default=True)
@click.option("--floor/--no-floor", default=True, show_default=True, help="Measure the noise floor as well.")
@click.option("--derivations", default=0, show_default=True, help="Task problems, teacher-forced.")
@click.option("--levels", default="easy,medium", show_default=True, help="Levels of the problems.")
@click.option("--seed", default=1, show_default=True)
@click.option("--threads", type=int, default=available_cores, show_default="all cores")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
def main(model, kv, baseline, texts, ctx, windows, skip, mode, floor, derivations, levels, seed, threads, out):
    if not texts and not derivations:
        raise click.UsageError("nothing to measure: give --text FILE or --derivations N")
    level_names = split_names(levels)
    if unknown := set(level_names) - set(tasks.LEVELS):
        raise click.BadParameter(f"unknown levels: {', '.join(sorted(unknown))}")
    if ctx < 2 or not 0 <= skip < ctx - 1:
        raise click.BadParameter(f"--skip {skip} leaves nothing of a window of --ctx {ctx} tokens")
    names = [name for name in split_names(kv) if name != baseline]
    batch = 1 if mode == "decode" else PREFILL_BATCH

    def open_all(n_ctx: int) -> Caches:
        options = {"n_ctx": round_up(n_ctx, 256), "n_batch": PREFILL_BATCH, "n_threads": threads}
        candidates = {NOISE_FLOOR: open_model(model, baseline, **options)} if floor else {}
        candidates |= {name: open_model(model, name, **options) for name in names}
        return Caches(open_model(model, baseline, **options), candidates, batch, NOISE_FLOOR if floor else None)

    settings = {"ctx": ctx, "windows": windows, "skip": skip, "mode": mode, "seed": seed, "threads": threads,
                "baseline": baseline, "caches": names}  # fmt: skip
    if derivations:
        settings |= {"derivations": derivations, "levels": level_names}
    result = describe_run("quality", model, settings) | {"texts": [], "derivations": []}

    with Progress(console=Console(stderr=True), transient=True) as bar:
        if texts:
            caches = open_all(ctx)
            for text in texts:
                result["texts"].append(_measure_text(caches, text, ctx, windows, skip, seed, bar))
                save_json(out, result)
            del caches
        if derivations:
            result["derivations"] = _measure_derivations(open_all, derivations, level_names, seed, bar)
            save_json(out, result)

    console = wide_console()
    for text in result["texts"]:
        console.print(_text_table(text, result))
    if result["derivations"]:
        console.print(_derivation_table(result))


def _measure_text(caches, text, ctx, windows, skip, seed, bar) -> dict[str, Any]:
    reference, candidates = caches.baseline, caches.candidates
    tokens = reference.tokenize(text.read_bytes(), add_bos=False)
    bos = reference.tokenize(b"", add_bos=True)  # empty if the model does not use one
    offsets = draw_windows(len(tokens), ctx - len(bos), windows, seed)
    step = bar.add_task(text.name, total=len(offsets) * (ctx - 1))
    total = {name: Comparison() for name in candidates}
    quarters = {name: [Comparison() for _ in range(4)] for name in candidates}
    for offset in offsets:
        window = bos + tokens[offset : offset + ctx - len(bos)]
        found = caches.compare(window, skip=skip, progress=lambda n: bar.advance(step, n))
        for name, comparison in found.items():
            total[name].extend(comparison)
            for quarter, part in zip(quarters[name], np.array_split(comparison.kld, 4)):
                quarter.kld.extend(part)
    bar.remove_task(step)
    return {
        "text": describe_file(text),
        "offsets": offsets,
        "caches": {
            name: comparison.summary()
            | {"kld_by_quarter": [float(np.mean(quarter.kld)) for quarter in quarters[name]]}
            | {"cache": cache_statistics(candidates[name])}
            for name, comparison in total.items()
        },
    }


def _measure_derivations(open_all, count, levels, seed, bar) -> dict[str, Any]:
    """The reference derivation is fed token by token after a prompt that was read in batches."""
    problems = draw_problems(count, levels, seed)
    reference = open_all(256).baseline  # only to count tokens
    encoded = []
    for _, _, problem in problems:
        prompt = reference.tokenize(tasks.chat(problem.prompt).encode(), add_bos=True, special=True)
        answer = tasks.completion(problem.reasoning, problem.answer) + tasks.END_OF_TURN
        encoded.append((prompt, reference.tokenize(answer.encode(), add_bos=False, special=True)))
    longest = max(len(prompt) + len(answer) for prompt, answer in encoded)
    caches = open_all(longest)

    step = bar.add_task("derivations", total=sum(len(answer) for _, answer in encoded))
    total = {name: Comparison() for name in caches.candidates}
    records = []
    for (task, level, _), (prompt, answer) in zip(problems, encoded):
        found = caches.compare(prompt + answer, first=len(prompt), progress=lambda n: bar.advance(step, n))
        record = {"task": task, "level": level, "prompt_tokens": len(prompt), "tokens": len(answer), "caches": {}}
        for name, comparison in found.items():
            total[name].extend(comparison)
            record["baseline_exact"] = all(comparison.right_baseline)
            record["caches"][name] = {
                "kld_mean": float(np.mean(comparison.kld)),
                "flips": comparison.same_top.count(False),
                "wrong": comparison.right.count(False),
                "exact": all(comparison.right),
            }
        records.append(record)
    bar.remove_task(step)
    summaries = {}
    for name, comparison in total.items():
        own = [record["caches"][name] for record in records]
        flips = comparison.same_top.count(False)
        summaries[name] = comparison.summary() | {
            "flips": flips,
            "flip_share": flips / len(comparison.kld),
            "exact": sum(entry["exact"] for entry in own),
            "baseline_exact": sum(record["baseline_exact"] for record in records),
            "problems": len(records),
        }
    return {"caches": summaries, "problems": records}


def _text_table(text: dict[str, Any], result: dict[str, Any]) -> Table:
    settings = result["settings"]
    title = (
        f"{text['text']['name']}, {result['model']['name']}, {settings['mode']}-style, "
        f"{len(text['offsets'])} x {settings['ctx']} tokens, baseline {settings['baseline']}, seed {settings['seed']}"
    )
    table = Table("cache", "mean KLD", "+-", "median", "99.9 %", "same top", "perplexity", "baseline's", title=title)
    for name, figures in text["caches"].items():
        error = figures["kld_standard_error"]
        table.add_row(
            name,
            f"{figures['kld_mean']:.5f}",
            "" if error is None else f"{error:.5f}",
            f"{figures['kld_median']:.5f}",
            f"{figures['kld_99.9%']:.4f}",
            f"{figures['same_top']:.2%}",
            f"{figures['perplexity']:.3f}",
            f"{figures['perplexity_baseline']:.3f}",
        )
    return table


def _derivation_table(result: dict[str, Any]) -> Table:
    settings = result["settings"]
    title = (
        f"{settings['derivations']} derivations ({', '.join(settings['levels'])}), {result['model']['name']}, "
        f"teacher-forced, baseline {settings['baseline']}, seed {settings['seed']}"
    )
    table = Table("cache", "tokens", "mean KLD", "99.9 %", "flips", "exact", "baseline exact", title=title)
    for name, figures in result["derivations"]["caches"].items():
        table.add_row(
            name,
            str(figures["tokens"]),
            f"{figures['kld_mean']:.6f}",
            f"{figures['kld_99.9%']:.4f}",
            f"{figures['flips']} ({figures['flip_share']:.4%})",
            f"{figures['exact']}/{figures['problems']}",
            f"{figures['baseline_exact']}/{figures['problems']}",
        )
    return table


if __name__ == "__main__":
    main()
