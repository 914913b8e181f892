"""Where the time of a layer goes when a model decodes on a GPU, from a trace by cuda_trace.cpp.

A kernel counts for what it adds: from the end of what came before it to its own end, so that kernels that start early are not counted twice.
Medians over all layers of all tokens, the first few left out.

    python bench/cuda_trace.py trace.tsv
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import click
from _common import wide_console
from rich.table import Table

SKIPPED = 3  # layers at the beginning


def read_trace(path: Path) -> list[tuple[int, int, str]]:
    """Start, end (nanoseconds) and name of every kernel, by start. Raises click.ClickException for a file that is no trace."""
    kernels = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split("\t", 3)
        if len(fields) != 4 or not all(field.isdigit() for field in fields[:3]):
            raise click.ClickException(f"{path}, line {number}: no kernel of a trace by cuda_trace.cpp")
        kernels.append((int(fields[0]), int(fields[1]), fields[3]))
    return sorted(kernels)


def short_name(name: str) -> str:
    """The function's own name, without namespaces, template arguments and parameters."""
    match = re.search(r"(\w+)\s*[<(]", name.replace("(anonymous namespace)::", ""))
    return match.group(1) if match else name


def layers_of(kernels: list[tuple[int, int, str]], attention: str) -> list[dict[str, tuple[int, int]]]:
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


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--attention", default="decode_kernel|flash_attn_ext", show_default=True, help="The kernel that is there once a layer.")
def main(trace: Path, attention: str) -> None:
    layers = layers_of(read_trace(trace), attention)
    table = Table("kernel", "times", "us", title=f"A layer, medians of {len(layers)}")
    times = {name: median(layer[name][1] for layer in layers) / 1e3 for name in layers[0]}
    for name in sorted(times, key=times.__getitem__, reverse=True):
        table.add_row(name, str(layers[0][name][0]), f"{times[name]:.1f}")
    table.add_row("all", "", f"{median(sum(time for _, time in layer.values()) for layer in layers) / 1e3:.1f}")
    wide_console().print(table)


if __name__ == "__main__":
    main()
