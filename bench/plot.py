"""Draw tokens per second over depth from the JSON of bench/speed.py, a panel per file.

    python bench/plot.py bench/results/speed-*.json --out speed.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from _common import force_option, run, tool

from mixkvq.study import plots


def heading(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return f"{result['model']['name']} on " + machine.get("gpu", f"{machine['cpu']}, threads: {result['settings']['threads']}")


def draw(results: list[dict[str, Any]], path: Path, *, overwrite: bool = True) -> None:
    pyplot = plots.load()
    figure, panels = pyplot.subplots(1, len(results), figsize=(6.4 * len(results), 4.2), squeeze=False, layout="constrained")
    for panel, result in zip(panels[0], results):
        depths = [row["depth"] for row in result["depths"]]
        for cache in result["settings"]["caches"]:
            speeds = [row["caches"][cache]["tokens_per_second"] for row in result["depths"]]
            panel.plot(depths, speeds, marker="o", label=cache)
        # Every doubling takes the same room, and so does the way from 0 to the first depth.
        panel.set_xscale("symlog", base=2, linthresh=min(filter(None, depths), default=1), linscale=0.5)
        panel.set_xticks(depths, [str(depth) for depth in depths])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.set_xlabel("tokens in the context")
        panel.set_ylabel("decoded tokens/s")
        panel.set_title(heading(result), fontsize="medium")
        panel.grid(alpha=0.3)
        panel.legend()
    plots.save(figure, path, overwrite=overwrite)


def read_result(path: Path) -> dict[str, Any]:
    """Raises click.ClickException for a file that bench/speed.py has not written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("bench") != "speed":
        raise click.ClickException(f"{path} is not a result of bench/speed.py.")
    return found


@tool(help=__doc__.split("\n\n")[0])
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The picture: .svg or .png.")
@force_option("the picture")
def main(results: tuple[Path, ...], out: Path, force: bool) -> None:
    plots.check_path(out, force=force, inputs=results)
    draw([read_result(path) for path in results], out, overwrite=force)


if __name__ == "__main__":
    sys.exit(run(main, "bench/plot.py"))
