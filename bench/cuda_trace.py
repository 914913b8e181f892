"""Where the time of a layer and of a token goes when a model decodes on a GPU, from a trace by cuda_trace.cpp.

A kernel counts for what it adds: from the end of what came before it to its own end, so that kernels that start early are not counted twice.
A token reaches from one copy of results to the host to the next. Before its first input is copied the host works alone, on the attention mask above
all; that the kernels start late afterwards is mostly the tracing's doing. Medians over all layers of all tokens, the first few left out.

    python bench/cuda_trace.py trace.tsv
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import click
from _common import run, tool, wide_console
from rich.table import Table

SKIPPED = 3  # layers, or tokens, at the beginning
TO_GPU, TO_HOST = "[to GPU]", "[to host]"  # what copies are called

Event = tuple[int, int, str]


def read_trace(path: Path) -> list[Event]:
    """Start, end (nanoseconds) and name of every kernel and copy, by start. Raises click.ClickException for a file that is no trace."""
    events = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split("\t", 3)
        if len(fields) != 4 or not all(field.isdigit() for field in fields[:3]):
            raise click.ClickException(f"{path}, line {number}: no kernel of a trace by cuda_trace.cpp")
        events.append((int(fields[0]), int(fields[1]), fields[3]))
    return sorted(events)


def kernels_of(events: list[Event]) -> list[Event]:
    return [event for event in events if event[2] not in (TO_GPU, TO_HOST)]


def short_name(name: str) -> str:
    """The function's own name, without namespaces, template arguments and parameters."""
    match = re.search(r"(\w+)\s*[<(]", name.replace("(anonymous namespace)::", ""))
    return match.group(1) if match else name


def layers_of(kernels: list[Event], attention: str) -> list[dict[str, tuple[int, int]]]:
    """Of every layer, by kernel: how many, and nanoseconds that they add. A layer reaches from the end of one attention to that of the next."""
    ends = [i for i, (_, _, name) in enumerate(kernels) if re.search(attention, name)]
    spans = [(a + 1, b + 1) for a, b in zip(ends, ends[1:], strict=False)]
    if not spans:
        raise click.ClickException(f"no two kernels are called {attention!r}: --attention says which one ends a layer")
    usual = Counter(b - a for a, b in spans).most_common(1)[0][0]
    layers = []
    for a, b in [span for span in spans if span[1] - span[0] == usual][SKIPPED:]:
        added: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        end = kernels[a - 1][1]
        for _, stop, name in kernels[a:b]:
            count, time = added[short_name(name)]
            added[short_name(name)] = count + 1, time + max(0, stop - end)
            end = max(end, stop)
        layers.append(added)
    if not layers:
        raise click.ClickException("the trace has too few layers that are alike")
    return layers


def tokens_of(events: list[Event]) -> list[dict[str, int]]:
    """Of every token: nanoseconds by what they went to. Empty if the trace has no copies."""
    results = [i for i, (_, _, name) in enumerate(events) if name == TO_HOST]
    spans = [events[a : b + 1] for a, b in zip(results, results[1:], strict=False)]
    counts = [len(kernels_of(span)) for span in spans]
    usual = Counter(count for count in counts if count > 1).most_common(1)
    tokens = []
    for span, count in zip(spans, counts, strict=True):
        inputs = [start for start, _, name in span if name == TO_GPU]
        if not usual or count != usual[0][0] or not inputs:
            continue
        kernels = kernels_of(span)
        begin, end, first, last = span[0][1], span[-1][1], kernels[0][0], max(stop for _, stop, _ in kernels)
        tokens.append(
            {
                "until the first input is copied": inputs[0] - begin,
                "from there to the first kernel": first - inputs[0],
                "kernels": last - first,
                "until the result is on the host": end - last,
                "all": end - begin,
            }
        )
    return tokens[SKIPPED:]


@tool(help=__doc__.split("\n\n")[0])
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--attention", default="decode_kernel|flash_attn_ext", show_default=True, help="The kernel that is there once a layer.")
def main(trace: Path, attention: str) -> None:
    events = read_trace(trace)
    layers = layers_of(kernels_of(events), attention)
    table = Table("kernel", "times", "us", title=f"A layer, medians of {len(layers)}")
    times = {name: median(layer[name][1] for layer in layers) / 1e3 for name in layers[0]}
    for name in sorted(times, key=times.__getitem__, reverse=True):
        table.add_row(name, str(layers[0][name][0]), f"{times[name]:.1f}")
    table.add_row("all", "", f"{median(sum(time for _, time in layer.values()) for layer in layers) / 1e3:.1f}")
    wide_console().print(table)
    if tokens := tokens_of(events):
        table = Table("part", "us", title=f"A token, medians of {len(tokens)}")
        for part in tokens[0]:
            table.add_row(part, f"{median(token[part] for token in tokens) / 1e3:.1f}")
        wide_console().print(table)


if __name__ == "__main__":
    sys.exit(run(main, "bench/cuda_trace.py"))
