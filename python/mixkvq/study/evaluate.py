"""Measure key/value caches on a model: divergence from the F16 cache on text and on derivations, right answers, and what each cache takes.

What is in the JSON file of an earlier run is not measured again: it goes on, also with more caches, texts or styles.
`python -m mixkvq.evaluate` is the command.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.computing import Share
from bridge.devices import check_device

from ..core.errors import SettingsError
from ..core.machine import physical_cores
from ..core.model_file import open_model
from ..core.native import native
from . import exact, plots, problems, tasks, tokens
from .caches import check_name, file_of, is_stock, open_cache, split_names
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
from .record import describe_file, describe_run, load_or_start, save_json
from .steps import Steps
from .texts import DEFAULT_TEXT, default_text, read_utf8

if TYPE_CHECKING:
    from bridge import Llama

DEFAULT_CACHES = "q8_0,q4_0,balanced"
DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Request:
    """What is asked for. Names of caches are those of `caches`.

    kv: lists of caches; none: DEFAULT_CACHES. texts: none: the default text, if nothing else is asked for. style: how tokens are fed, a list.
    ctx: tokens per window of a text. windows: per text. skip: predictions left out at the start of each. window, sinks: tokens in F16.
    floor: whether the baseline is measured in other batches as well; None: unless there is a limit. limit: the mean divergence of a guarantee.
    derivations: so many built-in problems are teacher-forced. count: so many problems are answered: built-in ones of task_names and levels, of a
    problems_file, or of a checker. shots: so many problems of the file stand before each question, with their answers. first: greedy tokens that are
    compared with the baseline's. workers: problems answered at once. at_once: caches in memory. out: the JSON file that is gone on with, unless
    restart. baseline: None: F16, or F32 if exact. exact: weights and the baseline's cache in F32, so that llama.cpp rounds nothing. token_file: where
    the figures of every single prediction go, as .npz.
    """

    model: Path
    kv: Sequence[str] = ()
    baseline: str | None = None
    texts: Sequence[Path] = ()
    style: str = "decode"
    ctx: int | None = None
    windows: int = 1
    skip: int = 0
    window: int | None = None
    sinks: int | None = None
    floor: bool | None = None
    limit: float | None = None
    derivations: int | None = None
    count: int | None = None
    problems_file: Path | None = None
    checker: Path | None = None
    task_names: str = ",".join(tasks.TASKS)
    levels: str = "easy,medium"
    instruction: str = problems.INSTRUCTION
    shots: int = 0
    max_tokens: int | None = None
    first: int = 200
    workers: int | None = None
    at_once: int = 4
    seed: int = 1
    device: str = "auto"
    threads: int | None = None
    out: Path | None = None
    restart: bool = False
    exact: bool = False
    token_file: Path | None = None


# ---- measuring -------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """A run: what is fixed, and the result as it grows. Every method that measures leaves out what the result holds already."""

    model: Path
    result: dict[str, Any]
    out: Path | None
    steps: Steps
    windows: set[int]
    at_once: int
    threads: int
    cache_options: dict[str, Any]  # window, sinks and device: what compare_caches and Solver know, too
    token_file: Path | None = None

    def section(self, description: dict[str, Any]) -> dict[str, Any]:
        """The part of the result with this description, new if there is none."""
        sections: list[dict[str, Any]] = self.result["sections"]
        for known in sections:
            if all(known.get(key) == value for key, value in description.items()):
                return known
        sections.append({**description, "caches": {}})
        return sections[-1]

    def measure(
        self, section: dict[str, Any], passages: Sequence[Passage], names: Sequence[str], note: Callable[[str, Measured], dict[str, Any]]
    ) -> None:
        """Compare the named caches with the baseline on the passages; `note` gives further figures of a cache."""
        missing = [name for name in names if name not in section["caches"]]
        if not missing:
            return
        with self.steps(plots.title(section), work(len(missing), passages, self.at_once)) as progress:
            groups = compare_caches(
                str(self.model),
                missing,
                passages,
                baseline=self.result["settings"]["baseline"],
                style=section["style"],
                at_once=self.at_once,
                windows=self.windows,
                threads=self.threads,
                progress=progress,
                **self.cache_options,
            )
            for group in groups:
                # First what is not asked for again once the result has the caches.
                tokens.add(self.token_file, section, passages, {name: measured.passages for name, measured in group.items()}, self.result)
                for name, measured in group.items():
                    section["caches"][name] = measured.summary() | note(name, measured)
                add_excess(section["caches"])
                order = dict.fromkeys([*names, *section["caches"]])
                section["caches"] = {name: section["caches"][name] for name in order if name in section["caches"]}
                save_json(self.out, self.result)


def add_excess(caches: dict[str, dict[str, Any]]) -> None:
    """What a cache diverges more than the noise floor, where that was measured."""
    if NOISE_FLOOR in caches:
        for figures in caches.values():
            figures["kld_over_floor"] = figures["kld_mean"] - caches[NOISE_FLOOR]["kld_mean"]


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
    fewer: bool = False,
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

    shared = problems.shared_tokens(drawn)
    solver = problems.Solver(str(evaluation.model), source, n_ctx, threads, **evaluation.cache_options, shared=shared, fewer=fewer)
    with evaluation.steps(plots.title(part), sum(len(missing) for _, _, missing in jobs)) as progress:
        try:
            for index, answers in solver.solve(jobs, workers):
                part["sizes"] |= {cache: answer.pop("sizes") for cache, answer in answers.items()}
                records[index]["answers"].update(answers)
                unsaved = True
                if time.perf_counter() - saved >= 20 * cost:  # a long result takes its time to write: a twentieth of all, and so much may be lost
                    update()
                progress(len(answers))
        except BaseException:  # Ctrl-C as well
            if unsaved:
                update()
            raise
        update()


def describe_source(source: problems.Source) -> dict[str, Any]:
    """The problems' source as the result names it; what differs here has other problems or judges them otherwise."""
    if isinstance(source, problems.BuiltIn):
        return {"source": "built in", "tasks": list(source.names), "levels": list(source.levels)}
    described = {"source": source.path.name, "file": describe_file(source.path)}
    return described | (_asked_how(source) if isinstance(source, problems.NumberFile) else {})


def _asked_how(source: problems.NumberFile) -> dict[str, Any]:
    return {"instruction": source.instruction} | ({"shots": source.shots} if source.shots else {})


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


# ---- all of it -------------------------------------------------------------------------------------------


def evaluate(request: Request, result: dict[str, Any], texts: list[Text], steps: Steps, words: Sequence[str] = ()) -> None:
    """Check what is asked for and measure it.

    result, texts: empty; they get what is measured, as it comes, and the texts that were read. words: the command line, for the record.
    Raises BridgeError.
    """
    request = replace(request, baseline=request.baseline or (exact.BASELINE if request.exact else "f16"))
    asked = _checked(request)
    with contextlib.ExitStack() as stack:
        evaluation = _begin(request, asked, result, steps, words)
        share = Share()
        stack.callback(lambda: result["run"].update(share.taken()))
        if request.exact:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixkvq-")))
            evaluation.model = Path(exact.f32_copy(request.model, folder, evaluation.threads))
        _measure_all(request, asked, evaluation, texts)
    save_json(request.out, result)


def _measure_all(request: Request, asked: _Asked, evaluation: Evaluation, texts: list[Text]) -> None:
    result = evaluation.result
    vocabulary = open_cache(request.model, "f16", n_ctx=256, vocab_only=True)
    if asked.reads_text:
        texts += [read_text(vocabulary, path, asked.ctx, request.windows, request.skip, request.seed) for path in request.texts or (None,)]
    drawn: list[problems.Problem] = []
    if request.derivations:
        drawn = problems.BuiltIn(*_built_in(request), purpose="derivation").draw(request.seed, request.derivations)
    forced = problems.derivations(vocabulary, drawn)
    floor = [NOISE_FLOOR] if request.floor or (request.floor is None and request.limit is None) else []
    if request.limit is not None:
        guarantee(evaluation, texts, _by_size(evaluation, asked.candidates) if request.kv else asked.candidates, request.limit)
    else:
        for text in texts:
            for style in asked.styles:
                measure_text(evaluation, text, style, floor + asked.names)
    for style in asked.styles if forced else []:
        measure_derivations(evaluation, drawn, forced, style, floor + asked.names)
    if asked.source:
        options: dict[str, Any] = {"max_tokens": request.max_tokens, "first": request.first, "threads": evaluation.threads}
        options |= {"workers": result["run"]["workers"], "fewer": request.workers is None}
        answer_problems(evaluation, vocabulary, asked.source, request.count, asked.names, **options)
    vocabulary.close()


@dataclass(frozen=True)
class _Asked:
    """A request, checked.

    names: caches beside the baseline. candidates: for a guarantee. measured: both of them, as far as they are read.
    """

    names: list[str]
    candidates: list[str]
    measured: list[str]
    styles: list[str]
    source: problems.Source | None
    reads_text: bool
    ctx: int


def _checked(request: Request) -> _Asked:
    """Raises BridgeError for what does not exist or does not go together."""
    source = _source(request)
    reads_text = bool(request.texts) or request.limit is not None or not (request.derivations or source)
    styles = split_names(request.style)
    if unknown := [style for style in styles if style not in STYLES] or (not styles and [""]):
        raise SettingsError(f"There is no style {unknown[0]!r}; the styles are {', '.join(STYLES)}.")
    check_device(request.device)
    file = open_model(request.model)  # says what is wrong with it before anything else is read
    assert request.baseline is not None
    names = [name for name in split_names(request.kv or DEFAULT_CACHES) if name != request.baseline]
    candidates = (names if request.kv else presets_by_size()) if request.limit is not None else []
    if not names:
        raise SettingsError(f"--kv names no cache beside the baseline {request.baseline}.")
    if unfit := next((name for name in candidates if is_stock(name) or name.startswith("lab:")), None):
        raise SettingsError(f"--guarantee chooses among presets and profiles, and {unfit} is neither.")
    measured = candidates if request.limit is not None and not (request.derivations or source) else list(dict.fromkeys(names + candidates))
    for name in [request.baseline, *measured]:
        check_name(name)
    ctx = request.ctx or min(DEFAULT_CONTEXT, file.n_ctx_train or DEFAULT_CONTEXT)
    if request.skip > ctx - 2:
        raise SettingsError(f"--skip {request.skip} leaves nothing of a window of {ctx} tokens.")
    return _Asked(names, candidates, measured, styles, source, reads_text, ctx)


def _begin(request: Request, asked: _Asked, result: dict[str, Any], steps: Steps, words: Sequence[str]) -> Evaluation:
    """A new result, or that of an earlier run with the same settings. Raises SettingsError if it had others."""
    assert request.baseline is not None
    caches = [request.baseline, *asked.measured]
    windows = windows_of(caches, request.window)
    settings = {key: getattr(request, key) for key in ("baseline", "windows", "skip", "window", "sinks", "seed")}
    settings |= {"ctx": asked.ctx, "cuts": sorted(windows)}
    settings |= {"device": request.device} if request.device != "auto" else {}
    settings |= {"exact": True} if request.exact else {}
    fresh = _described(request, settings, steps, words)
    fresh.update(files=_files(caches), sections=[], problems=None)
    result.update(load_or_start(request.out, fresh, request.restart))
    tokens.check(request.token_file, result, restart=request.restart)
    threads = request.threads or physical_cores()
    result["run"] = {"threads": threads, "workers": request.workers or problems.default_at_once(request.device), "at_once": request.at_once}
    options = {"window": request.window, "sinks": request.sinks, "device": request.device}
    return Evaluation(request.model, result, request.out, steps, windows, request.at_once, threads, options, request.token_file)


def _described(request: Request, settings: dict[str, Any], steps: Steps, words: Sequence[str]) -> dict[str, Any]:
    """The head of a result. Hashing the model, which names it in a file, takes a while."""
    if request.out is None:
        return describe_run("evaluate", request.model, settings, hashed=False, words=words)
    with steps(f"SHA-256 of {request.model.name}", request.model.stat().st_size) as progress:
        return describe_run("evaluate", request.model, settings, hashed=True, words=words, progress=progress)


def _source(request: Request) -> problems.Source | None:
    """Where the problems to answer come from, if any are asked for. Raises SettingsError for what does not go together."""
    if request.shots and not request.problems_file:
        raise SettingsError("--shots needs --problems-file: the examples are problems of that file.")
    if request.problems_file and request.checker:
        raise SettingsError("--problems-file and --checker do not go together.")
    if request.problems_file:
        return problems.NumberFile(request.problems_file, request.instruction, request.shots)
    if request.checker:
        if request.count is None:
            raise SettingsError("--checker needs --problems N: how many problems it is asked for.")
        return problems.Module(request.checker)
    return problems.BuiltIn(*_built_in(request)) if request.count else None


def _built_in(request: Request) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(split_names(request.task_names)), tuple(split_names(request.levels))


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
