"""Lists the codecs with their bits: `python -m mixkvq.lab`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table

from ..core.model_file import HEAD_SIZE_STEP, MAX_HEAD_SIZE, MIN_HEAD_SIZE
from ..core.page import Page
from ..study.lab import CODECS, PageFunction, codec_function, get, sample_page
from .options import run, tool

ROUNDS = 20


def milliseconds(function: PageFunction, page: Page) -> float:
    """The quickest of a few calls."""
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        function(page)
        seconds.append(time.perf_counter() - begin)
    return 1e3 * min(seconds)


@tool()
@click.argument("names", nargs=-1)
@click.option("--head-size", type=click.IntRange(MIN_HEAD_SIZE, MAX_HEAD_SIZE), default=128, show_default=True, help="Channels of a head.")
@click.option("--time", "timed", is_flag=True, help="Also time a page of two heads.")
def command(names: tuple[str, ...], head_size: int, timed: bool) -> None:
    """List the codecs, or NAMES, with the bits per element that a page takes: scales, minima, orders, norms and means included."""
    if head_size % HEAD_SIZE_STEP:
        raise click.BadParameter(f"{head_size} is not a multiple of {HEAD_SIZE_STEP}.", param_hint="--head-size")
    table = Table(title=f"Bits per element of a page, head size {head_size}")
    for column in ("codec", "keys", "values", "mean", *(["ms for keys", "for values"] if timed else []), "what"):
        table.add_column(column, justify="left" if column in ("codec", "what") else "right")
    pages = sample_page(head_size), sample_page(head_size, is_value=True)
    for name in names or CODECS:
        codec = get(name)
        function = codec_function(codec)
        bits = [function(page)[1] / page.rows.size for page in pages]
        times = [f"{milliseconds(function, page):.2f}" for page in pages] if timed else []
        table.add_row(name, *(f"{b:.3f}" for b in (*bits, sum(bits) / 2)), *times, codec.description)
    console = Console()
    console.width = max(console.width, 150) if not sys.stdout.isatty() else console.width
    console.print(table)
    if not names:
        console.print("The salience of a made-up page decides the bits of `paper`; on a model they differ from page to page.", style="dim")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run(command, "mixkvq.lab", arguments)
