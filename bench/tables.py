"""The tables and figures of README.md and docs/, written from the results in bench/results.

In a document, a table stands between `<!-- table: NAME -->` and `<!-- end -->`, where NAME is one of TABLES below; a single figure stands before
`<!--= EXPRESSION -->`, of the functions under "figures" below, and keeps the decimals with which it is printed.

    python bench/tables.py             # write them anew
    python bench/tables.py --check     # say which are out of date, with exit code 1
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import plot

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)
FIGURE = re.compile(r"(?<![\w.,-])(\d+(?:\.\d+)?)( ?[%a-zA-Zµ]*)<!--= (.*?) -->")
STOCK = ("f16", "q8_0", "q4_0")
MIB = 1 << 20


class NotMeasured(Exception):
    """The name of the result that is missing."""


@cache
def result(name: str) -> dict[str, Any]:
    """Raises NotMeasured."""
    try:
        return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotMeasured(name) from None


# ---- figures ---------------------------------------------------------------------------------------------


def row(name: str, depth: int) -> dict[str, Any]:
    return next(r for r in result(name)["depths"] if r["depth"] == depth)["caches"]


def speed(name: str, depth: int, cache: str) -> float:
    """Decoded tokens per second."""
    return row(name, depth)[cache]["tokens_per_second"]


def over(name: str, depth: int, cache: str, other: str = "f16") -> float:
    """How many times as fast `cache` decodes as another one."""
    return speed(name, depth, cache) / speed(name, depth, other)


def attention(name: str, depth: int, cache: str) -> float:
    """Milliseconds of a token beyond its time at depth 0."""
    return 1e3 * row(name, depth)[cache]["attention_seconds_per_token"]


def prompt(name: str, depth: int, cache: str, ubatch: int | None = None) -> float:
    """Tokens per second of a prompt's batch on top of `depth` tokens."""
    found = next(r for r in result(name)["prefill"] if r["depth"] == depth and (ubatch is None or r["ubatch"] == ubatch))
    return found["caches"][cache]["tokens_per_second"]


def resident(cache: str, stage: str = "filled") -> float:
    """MiB of a process."""
    return memory(cache)["resident"][stage]["total"] / MIB


def cache_mib(cache: str) -> float:
    return memory(cache)["statistics"]["bytes"] / MIB


def memory(cache: str) -> dict[str, Any]:
    return next(entry for entry in result("memory")["caches"] if entry["cache"] == cache)


def section(name: str, text: str) -> dict[str, Any]:
    """Of a result of mixkvq.evaluate: `text` is the beginning of a text's name, or a number of derivations."""
    for found in result(name)["sections"]:
        if str(found.get("count", found.get("text", {}).get("name", ""))).startswith(text):
            return found["caches"]
    raise NotMeasured(name)


def kld(name: str, text: str, cache: str) -> float:
    """Mean divergence in nats."""
    return section(name, text)[cache]["kld_mean"]


def right(cache: str) -> int:
    """Problems solved."""
    return result("problems")["problems"]["summary"][cache]["correct"]


def problems() -> int:
    return result("problems")["problems"]["summary"]["f16"]["problems"]


def figure(expression: str) -> float:
    names = (speed, over, attention, prompt, resident, cache_mib, kld, right, problems)
    return float(eval(expression, {"__builtins__": {}}, {f.__name__: f for f in names}))  # noqa: S307 - of our own documents


# ---- tables ----------------------------------------------------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n" for cells in lines)


def source(*names: str) -> str:
    """What every table says of where it is from."""
    said = []
    for name in names:
        r = result(name)
        where = r["machine"].get("gpu", f"{r['machine']['cpu']}, {r['machine']['cores']} cores")
        said.append(f"[{name}.json](bench/results/{name}.json): {where}, {r['date'][:10]}, commit {r['commit'][:7]}")
    return f"\n*{'; '.join(said)}. Command: `{COMMANDS[names[0]]}`.*\n"


def label(cache: str) -> str:
    """A cache as the documents call it."""
    name = cache.removeprefix("lab:")
    name = name.removeprefix("packed:of=")
    if found := re.fullmatch(r"profile-([\d.]+)\.gguf", name):
        return f"profile of {found[1]} bits"
    ours = name != cache and "packed:of=" in cache or re.fullmatch(r"mix\d\.\d|balanced|paper", cache)
    return f"`{name}`" if ours else name


def number(x: float) -> str:
    """Three digits, or the whole number."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}"


def decoding(name: str) -> str:
    rows = []
    for depth in [r["depth"] for r in result(name)["depths"]]:
        rows.append([str(depth), *(number(speed(name, depth, cache)) for cache in (*STOCK, "balanced")), f"{over(name, depth, 'balanced'):.2f}"])
    return table(["depth", "f16", "q8_0", "q4_0", "`balanced`", "`balanced` over f16"], rows) + source(name)


def attention_alone(name: str) -> str:
    def cells(depth: int) -> list[str]:
        times = {cache: attention(name, depth, cache) for cache in (*STOCK, "balanced")}
        ratios = [f"{times[c] / times['balanced']:.1f}x" if min(times[c], times["balanced"]) > 0 else "" for c in STOCK]
        return [str(depth), *(f"{x:.2f}" for x in times.values()), *ratios]

    head = ["depth", "f16", "q8_0", "q4_0", "`balanced`", "over f16", "over q8_0", "over q4_0"]
    return table(head, (cells(r["depth"]) for r in result(name)["depths"] if r["depth"])) + source(name)


def prompts() -> str:
    rows = []
    for title, name in (("8B geometry, 2 layers", "speed-8b-2layers"), ("built-in", "speed-builtin")):
        for i, r in enumerate(result(name)["prefill"]):
            figures = [prompt(name, r["depth"], cache) for cache in (*STOCK, "balanced")]
            rows.append(["" if i else title, str(r["depth"]), *(f"{x:.0f}" for x in figures), f"{figures[-1] / figures[0]:.2f}"])
    return table(["model", "depth", "f16", "q8_0", "q4_0", "`balanced`", "`balanced` over f16"], rows) + source("speed-8b-2layers", "speed-builtin")


# Another program took a core then: at 32768 f16's attention takes 3.7 times as long as at 16384. docs/performance.md says so.
DISTURBED = (2048, 32768)


def speed_ratios() -> str:
    rows, depths = [], [r["depth"] for r in result("speed-builtin")["depths"] if r["depth"] not in DISTURBED]
    for title, name in (("two layers of an 8B model", "speed-8b-2layers"), ("built-in model", "speed-builtin")):
        rows.append([f"{title}, `balanced`", *(f"{over(name, d, 'balanced'):.2f}x" for d in depths)])
        rows.append([f"{title}, llama.cpp q8_0 / q4_0", *(f"{over(name, d, 'q8_0'):.2f}x / {over(name, d, 'q4_0'):.2f}x" for d in depths)])
    return table(["", f"depth {depths[0]}", *map(str, depths[1:])], rows) + source("speed-8b-2layers", "speed-builtin")


GPU, GPU_PROMPTS = "llama-bench-8b-32layers", "llama-bench-8b-8layers"


def gpu_short() -> str:
    caches = [*STOCK, "balanced"]
    rows = ([str(r["depth"]), *(f"{speed(GPU, r['depth'], c):.0f}" for c in caches)] for r in result(GPU)["depths"])
    return table(["depth", "f16", "q8_0", "q4_0", "`balanced`"], rows) + source(GPU)


def gpu_decoding() -> str:
    caches = [*STOCK, "balanced"]

    def cells(depth: int) -> list[str]:
        return [str(depth), *(f"{speed(GPU, depth, c):.1f}" for c in caches), *(f"{over(GPU, depth, 'balanced', c):.2f}" for c in ("f16", "q8_0"))]

    head = ["depth", "f16", "q8_0", "q4_0", "`balanced`", "`balanced` over f16", "over q8_0"]
    return table(head, (cells(r["depth"]) for r in result(GPU)["depths"])) + source(GPU)


def gpu_prompts() -> str:
    rows = []
    for r in result(GPU_PROMPTS)["prefill"]:
        f16, ours = (prompt(GPU_PROMPTS, r["depth"], cache, r["ubatch"]) for cache in ("f16", "balanced"))
        rows.append([str(r["ubatch"]), f"{f16:.0f}", f"{ours:.0f}", f"{ours / f16:.2f}"])
    return table(["ubatch", "f16", "`balanced`", "`balanced` over f16"], rows) + source(GPU_PROMPTS)


def memory_table() -> str:
    stages = ("before", "created", "filled")
    rows = ([label(c), *(f"{resident(c, stage):.1f}" for stage in stages), f"{cache_mib(c):.1f}"] for c in ("f16", "balanced"))
    return table(["cache", "before the context", "context created", "full", "the cache by our own count"], rows) + source("memory")


def turns_table() -> str:
    """A row for each cache on each machine that was measured."""
    names = ["turns", *sorted(path.stem for path in RESULTS.glob("turns-*.json"))]
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        device = result(name)["settings"]["device"]
        for r in result(name)["turns"]:
            found.setdefault((r["cache"], device), []).append(f"{r['same']} of {r['of']}")
    rows = [[f"`{cache}`", device, *cells] for (cache, device), cells in found.items()]
    return table(["cache", "device", "A, cache in RAM", "B, cache in RAM", "A, slot files", "B, slot files"], rows) + source(*names)


def states_table() -> str:
    rows = []
    for r in result("states")["states"]:
        times = [f"{r[f'{name}_seconds']:.3f}" for name in ("save", "disk", "load")]
        sizes = [f"{r['bytes'] / MIB:.1f}", f"{r['bytes'] / r['bytes_used']:.3f}"]
        rows.append([str(r["tokens"]), label(r["cache"]), *sizes, *times, f"{r['read_seconds']:.1f}"])
    head = ["tokens", "cache", "file, MiB", "over what is in use", "save, s", "the disk alone, s", "resume, s", "read anew, s"]
    return table(head, rows) + source("states")


def restores_table(name: str = "restores") -> str:
    """Sorted by the divergence without a restore."""
    found = sorted(result(name)["caches"], key=lambda r: (r["kld"][0], r["cache"], r["state"]))
    rows = ([label(r["cache"]), {"f16": "F16"}.get(r["state"], r["state"]), *(f"{x:.5f}" for x in r["kld"])] for r in found)
    return table(["cache", "states", *(f"{n} rounds" for n in found[0]["rounds"])], rows) + source(name)


def build_ratios(result: dict[str, Any]) -> list[tuple[str, list[tuple[float, float, float]]]]:
    """Rows: what, and for each build the ratio to the first, the least and the greatest ratio of what it is the mean of."""

    def row(name: str, figures: list[list[float]]) -> tuple[str, list[tuple[float, float, float]]]:
        builds = ([f[i] / f[0] for f in figures] for i in range(len(result["builds"])))
        return name, [(statistics.geometric_mean(ratios), min(ratios), max(ratios)) for ratios in builds]

    rows = [row(f"in a model: {name}", [figures]) for name, figures in result["model_ms"].items()]
    for name in ("packing", "1 token", "64 tokens"):
        rows.append(row(f"attention alone: {name}", [f for key, f in result["attention_ms"].items() if key.split(", ")[1].startswith(name)]))
    for name in dict.fromkeys(key.split(", ")[-2] for key in result["kernels_ns"]):
        rows.append(row(f"kernels: {name}", [f for key, f in result["kernels_ns"].items() if key.split(", ")[-2] == name]))
    return rows


def commits_table() -> str:
    """Processor time over that of the first commit: means, and extremes where there are several."""
    found = result("commits")
    rows = []
    for name, ratios in build_ratios(found):
        each = (f"{mean:.3f}" if low == high else f"{mean:.3f} ({low:.2f} to {high:.2f})" for mean, low, high in ratios[1:])
        rows.append([name, *each])
    return table(["processor time", *found["builds"][1:]], rows) + source("commits")


def timings_table() -> str:
    """A row for each model on each machine that was measured."""
    names = ["timings", *sorted(path.stem for path in RESULTS.glob("timings-*.json"))]
    rows = []
    for name in names:
        machine = result(name)["machine"]
        for r in result(name)["models"]:
            e, c = r["evaluate"], r["calibrate"]
            where = machine.get("gpu", f"{machine['cores']} cores")
            shares = [f"{100 * each['outside_llama']:.0f} %" for each in (e, c)]
            rows.append([r["name"], where, f"{e['seconds']:.1f}", shares[0], f"{c['seconds']:.0f}", f"{c['seconds_said']:.0f}", shares[1]])
            rows[-1].append(f"{r['answers']['seconds']:.0f}" if "answers" in r else "")
    head = ["model", "machine", "evaluate, s", "outside llama.cpp", "calibrate, s", "as said, s", "outside llama.cpp", "144 problems, s"]
    return table(head, rows) + source(*names)


# ---- quality ---------------------------------------------------------------------------------------------


def compatibility_table() -> str:
    """Of every build: what it is, its sizes, the mean divergence of every operation, and whether it passes."""
    found = result("compatibility")["builds"]
    rows = []
    for name, build in found.items():
        package = {"pypi": "PyPI", "npm": "npm"}[build["package"]]
        klds = [f"{figures['kld_mean']:.4f}" for figures in build.get("operations", {}).values()]
        sizes = f"{build['mib']:.1f} / {build['mib_f16']:.1f}" if klds else ""
        what = [name, package, build.get("ggml", ""), build.get("layout", ""), sizes]
        rows.append([*what, *(klds or [""] * 6), "; ".join(build["faults"]) or "passes"])
    head = ["build", "from", "ggml", "layout", "MiB / F16", "prompt", "64 tokens", "shift", "two streams", "state out", "state in", ""]
    return table(head, rows) + source("compatibility")


def by_bits(caches: dict[str, Any]) -> list[str]:
    """The noise floor, then by falling bits."""
    return sorted(caches, key=lambda name: -caches[name]["body_bits"])


def share(x: float) -> str:
    return f"{100 * x:.1f} %"


def two(figures: dict[str, Any] | None, digits: int = 4) -> str:
    """The mean and the 99.9 % quantile."""
    return "" if figures is None else f"{figures['kld_mean']:.{digits}f} / {figures['kld_99.9%']:.{max(2, digits - 1)}f}"


def quality_short() -> str:
    """README: what each cache costs and loses."""
    novel, wiki = section("caches", "novel"), section("caches", "wiki")
    measured = (RESULTS / "problems.json").exists()
    solved = result("problems")["problems"]["summary"] if measured else {}
    rows = []
    for name in by_bits(novel):
        if name in ("mix6.2", "mix3.8", "mix2.4", "paper"):
            continue
        figures, floor = novel[name], name == "noise floor"
        bits = "16" if floor else f"{figures['body_bits']:.2f}"
        total = " / ".join("16" if floor else f"{figures['total_bits'][n]:.2f}" for n in ("8192", "32768"))
        found = solved.get("f16" if floor else name)
        right = [str(found["correct"]) if found else ""] if measured else []
        title = "llama.cpp f16, in other batches (noise floor)" if floor else label(name)
        title = f"llama.cpp {name}" if name in ("q8_0", "q5_0", "q4_0") else title
        rows.append([title, bits, total, f"{figures['kld_mean']:.4f}", f"{wiki[name]['kld_mean']:.4f}", *right])
    head = ["cache", "body bits", "total bits at 8k / 32k", "novel", "wiki", *([f"of {problems()} problems right"] if measured else [])]
    return table(head, rows) + source("caches", *(["problems"] if measured else []))


def caches_table() -> str:
    novel, wiki = section("caches", "novel"), section("caches", "wiki")
    rows = []
    for name in by_bits(novel):
        floor = name == "noise floor"
        bits = ["", ""] if floor else [f"{novel[name]['body_bits']:.2f}", f"{novel[name]['total_bits']['32768']:.2f}"]
        columns = [cell for text in (novel, wiki) for cell in (two(text[name]), share(text[name]["same_top"]))]
        rows.append([label(name), *bits, *columns])
    return table(["cache", "body bits", "total bits at 32768", "novel", "same first choice", "wiki", "same first choice"], rows) + source("caches")


def exact_table() -> str:
    """The same caches with the weights as they are, from F16, and in F32, from F32: mean KLD, and what it is over the noise floor."""
    plain, exact = (section(name, "the default text") for name in ("plain", "exact"))

    def cells(figures: dict[str, Any] | None, floor: bool) -> list[str]:
        if figures is None:
            return ["", ""]
        return [number(1e6 * figures["kld_mean"]), "" if floor else number(1e6 * figures["kld_over_floor"])]

    rows = [[label(name), *(cell for each in (plain, exact) for cell in cells(each.get(name), name == "noise floor"))] for name in by_bits(exact)]
    return table(["cache", "weights as they are", "over the floor", "weights in F32", "over the floor"], rows) + source("plain", "exact")


def derivations_table() -> str:
    """Millionths of a nat."""
    some, chains = section("caches", "14"), section("caches", "12")
    rows = []
    for name in by_bits(some):
        bits = "" if name == "noise floor" else f"{some[name]['body_bits']:.2f}"
        columns = []
        for found in (some[name], chains[name]):
            columns += [f"{1e6 * found['kld_mean']:.1f} ± {1e6 * found['kld_standard_error']:.1f}", str(found["flips"])]
        rows.append([label(name), bits, *columns])
    return table(["cache", "body bits", "14 derivations", "differ", "12 hard chains", "differ"], rows) + source("caches")


def problems_table() -> str:
    part = result("problems")["problems"]
    rows = []
    for name, f in sorted(part["summary"].items(), key=lambda item: -part["sizes"][item[0]]["body_bits"]):
        low, high = f["accuracy_95%"]
        lost = "" if name == "f16" else f"{f['lost']} / {f['won']}"
        interval = f"{share(f['accuracy'])} ({100 * low:.1f} to {100 * high:.1f})"
        bits = part["sizes"][name]["body_bits"]  # 0: a codec that has packed nothing in the last problem
        rows.append([label(name), f"{bits:.2f}" if bits else "", str(f["correct"]), interval, lost])
    return table(["cache", "body bits", "right", "accuracy, 95 % interval", "right in F16 but not here / the reverse"], rows) + source("problems")


def codecs_table() -> str:
    novel, wiki, solved = section("codecs", "novel"), section("codecs", "wiki"), section("codecs", "14")
    rows = []
    for name in reversed(by_bits(novel)):
        title = f"**{label(name)}**" if "packed" in name else label(name)
        rows.append([title, f"{novel[name]['body_bits']:.2f}", two(novel[name]), two(wiki[name]), two(solved[name], 6)])
    return "![divergence over bits](docs/codecs.svg)\n\n" + table(["codec", "body bits", "novel", "wiki", "derivations"], rows) + source("codecs")


def published_table() -> str:
    novel, wiki = section("codecs-published", "novel"), section("codecs-published", "wiki")
    rows = ([label(name), f"{novel[name]['body_bits']:.2f}", two(novel[name]), two(wiki[name])] for name in reversed(by_bits(novel)))
    return table(["codec", "body bits", "novel", "wiki"], rows) + source("codecs-published")


def variations_table() -> str:
    novel, chains = section("variations", "novel"), section("variations", "4")
    rows = []
    for name in novel:
        options = name.removeprefix("lab:mixkvq").removeprefix(":")
        rows.append(
            [
                f"`{options}`" if options else "the default preset",
                f"{novel[name]['body_bits']:.2f}",
                two(novel[name]),
                f"{chains[name]['kld_mean']:.5f} ± {chains[name]['kld_standard_error']:.5f}",
            ]
        )
    return table(["what is changed", "body bits", "novel", "`chain`"], rows) + source("variations")


def calibration_table() -> str:
    rows = []
    for name, profile in result("calibration")["profiles"].items():
        klds = [f"{entry['kld_mean']:.{4 if i == 0 else 6}f}" for i, entry in enumerate(profile["measured"])]
        rows.append([label(name), f"{profile['body_bits']:.2f}", *klds, f"{profile['seconds']:.0f}"])
    head = ["profile", "body bits", *(entry["text"] for entry in profile["measured"]), "seconds"]
    return table(head, rows) + source("calibration")


def presets_table() -> str:
    """From the library itself."""
    from mixkvq.core.native import native

    rows = []
    for p in native().presets():
        tiers = [(n, bits) for n, bits in zip(p["key_tiers"], (16, 8, 4, 3, 2)) if n]
        channels = ", ".join(f"{n} at {bits}{'' if i else ' bits'}" for i, (n, bits) in enumerate(tiers))
        channels += "" if p["key_group"] == 128 else f", groups of {p['key_group']} tokens"
        stored = f"{p['value_bits']} bits" + (f" in groups of {p['value_group']}, not rotated" if p["value_group"] else "")
        rows.append([f"`{p['name']}`", f"`{p['alias']}`" if p["alias"] else "", f"{p['body_bits']:.2f}", channels, stored])
    return table(["preset", "alias", "body bits", "key channels (of 128)", "values"], rows)


def serving_table() -> str:
    """Of several answers at once."""
    found, rows = result("serving"), []
    for name, entry in found["caches"].items():
        speeds = [f"{entry['tokens_per_second'][str(n)]:.0f}" for n in (1, 4, 8)]
        rows.append([f"`{name}`", *speeds, *(f"{1e3 * entry['first_token_s'][key]:.0f}" for key in ("alone", "beside", "behind"))])
    depth = found["settings"]["depth"]
    head = ["cache", "1 answer, tokens/s", "4 at once", "8 at once", "first token, ms: alone", f"while {depth} tokens are read", "after them"]
    return table(head, rows) + source("serving")


def beside_table() -> str:
    """Of answers beside others."""
    rows = []
    for name, entry in result("serving")["caches"].items():
        for found in entry["beside_others"].values():
            same = f"{found['same']} of {found['answers']}"
            rows.append([f"`{name}`", str(found["prompt"]), same, str(found["tokens_compared"]), f"{found['largest_logprob_difference']:.4f}"])
    head = ["cache", "tokens of the prompt", "same answers", "tokens compared", "largest difference of a logprob, nats"]
    return table(head, rows) + source("serving")


TABLES: dict[str, Callable[[], str]] = {
    "decoding-8b": lambda: decoding("speed-8b-2layers"),
    "decoding-builtin": lambda: decoding("speed-builtin"),
    "prompts": prompts,
    "attention": lambda: attention_alone("speed-8b-2layers"),
    "speed": speed_ratios,
    "gpu": gpu_short,
    "gpu-decoding": gpu_decoding,
    "gpu-prompts": gpu_prompts,
    "gpu-attention": lambda: attention_alone(GPU),
    "memory": memory_table,
    "states": states_table,
    "turns": turns_table,
    "serving": serving_table,
    "beside": beside_table,
    "restores": restores_table,
    "restores-real": partial(restores_table, "restores-real"),
    "commits": commits_table,
    "timings": timings_table,
    "compatibility": compatibility_table,
    "quality": quality_short,
    "caches": caches_table,
    "exact": exact_table,
    "derivations": derivations_table,
    "problems": problems_table,
    "codecs": codecs_table,
    "codecs-published": published_table,
    "variations": variations_table,
    "calibration": calibration_table,
    "presets": presets_table,
}

MEASURED = ("calibration", "caches", "codecs", "codecs-published", "variations", "problems", "memory", "restores", "states", "turns", "commits")
COMMANDS = {name: f"make figures STEPS={name}" for name in MEASURED}
COMMANDS |= dict.fromkeys(("plain", "exact"), "make figures STEPS=exact")
COMMANDS["restores-real"] = "make figures STEPS=restores-real MODELS=..."
COMMANDS |= {name: "make figures STEPS=speed" for name in ("speed-builtin", "speed-8b-2layers")}
COMMANDS |= {name: "make figures STEPS=timings MODELS=..." for name in ("timings", *(path.stem for path in RESULTS.glob("timings-*.json")))}
COMMANDS |= {path.stem: "python bench/turns.py MODEL --device CUDA0 --kv ..." for path in RESULTS.glob("turns-*.json")}
COMMANDS["serving"] = "python bench/serving.py models/cot-tiny-34m-q8_0.gguf --rounds 1 --tokens 48 --out bench/results/serving.json"
COMMANDS[GPU] = "python bench/llama_bench.py LLAMA-BENCH MODEL --depths 0,32768,131072 --tokens 128 --prefill 0 --rounds 1 --repetitions 3"
COMMANDS[GPU_PROMPTS] = "python bench/llama_bench.py LLAMA-BENCH MODEL --kv f16,balanced --depths 0 --rounds 1 --repetitions 3"
COMMANDS["compatibility"] = "make compat"
"""By result: what measures it."""


# ---- documents -------------------------------------------------------------------------------------------


def render(text: str, folder: str = "") -> str:
    """The document with its tables and figures as the results have them. `folder`: the way from the document to the repository's root."""

    def written(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise click.ClickException(f"there is no table {found[1]!r}; the tables are {', '.join(TABLES)}")
        try:
            content = re.sub(r"\]\((?=bench/|docs/)", f"]({folder}", TABLES[found[1]]())
        except NotMeasured as e:
            content = f"*Not measured yet: `{COMMANDS[str(e)]}`.*\n"
        return f"<!-- table: {found[1]} -->\n{content}<!-- end -->"

    def counted(found: re.Match[str]) -> str:
        decimals = len(found[1].partition(".")[2])
        return f"{figure(found[3]):.{decimals}f}{found[2]}<!--= {found[3]} -->"

    return FIGURE.sub(counted, TABLE.sub(written, text))


def out_of_date(documents: Iterable[Path] = DOCUMENTS) -> dict[Path, str]:
    """Documents that are not what they should be, as they should be."""
    found = {}
    for path in documents:
        text = path.read_text(encoding="utf-8")
        new = render(text, "" if path.parent == ROOT else "../")
        if new != text:
            found[path] = new
    return found


def write_pictures() -> None:
    """docs/speed.svg and docs/codecs.svg."""
    from mixkvq.study.plots import draw_evaluation

    plot.draw([result(name) for name in ("speed-8b-2layers", "speed-builtin")], ROOT / "docs" / "speed.svg")
    if (RESULTS / "codecs.json").exists():
        draw_evaluation(result("codecs"), ROOT / "docs" / "codecs.svg")


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--check", is_flag=True, help="Write nothing.")
def main(check):
    changed = out_of_date()
    for path, text in changed.items():
        print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}", file=sys.stderr)
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and changed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
