"""Who imports whom in `bridge` and `mixkvq`, at an earlier commit and now: a picture, and the longest files and functions.

    python bench/imports.py cf45fbe --out docs/images/imports.svg

Modules lie in bands, those of a package or of one of its parts, and in a band above what they import of it. So a grey line leads down; a red one
leads up to another band, or is part of a circle.
"""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from mixkvq.cli.options import force_option, run, tool
from mixkvq.study import plots

ROOT = Path(__file__).resolve().parents[1]
# A process of its own, without the finder of an editable install: that would find today's modules in every tree.
GRAPH = """
import grimp, json
graph = grimp.build_graph("mixkvq", "bridge", cache_dir=None, exclude_type_checking_imports=True)
print(json.dumps([sorted(graph.modules), [[a, b] for a in sorted(graph.modules) for b in sorted(graph.find_modules_directly_imported_by(a))]]))
"""
WIDE = 16  # modules in a row
UP, DOWN = "#d62728", "#9aa5b1"


@dataclass
class Tree:
    """The modules of one commit, in bands from the top, and (importer, imported)."""

    name: str
    bands: dict[str, list[str]]
    edges: list[tuple[str, str]]
    folder: Path

    def files(self) -> Iterator[Path]:
        """The source files of both packages."""
        yield from sorted((self.folder / "bridge").rglob("*.py"))
        yield from sorted((self.folder / "python" / "mixkvq").rglob("*.py"))


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True).stdout


def read(folder: Path, name: str) -> Tree:
    """Of the source tree in a folder."""
    paths = [str(folder / "python"), str(folder), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-S", "-c", GRAPH], env=environment, cwd=folder, capture_output=True, text=True, check=True)
    modules, edges = json.loads(done.stdout)
    return Tree(name, bands(modules), [(a, b) for a, b in edges if a != b], folder)


def bands(modules: Iterable[str]) -> dict[str, list[str]]:
    """The modules by the part that they belong to, from the top: what starts commands, then the layers as pyproject.toml has them."""
    layers = {"mixkvq.cli": "commands", "mixkvq.server": "server", "mixkvq.study": "studies", "bridge": "bridge: run time"}
    layers |= {"mixkvq.chats": "chats", "mixkvq.core": "core"}
    starts = {"bridge.run", "bridge.path", "bridge.__main__", "bridge.answer", "bridge.chat"}
    modules = list(modules)
    layered = any(m.startswith("mixkvq.core") for m in modules)
    found: dict[str, list[str]] = {name: [] for name in (["python -m", *layers.values()] if layered else ["mixkvq", "bridge"])}
    for module in modules:
        if not layered:
            found["bridge" if module.startswith("bridge") else "mixkvq"].append(module)
            continue
        part = next((title for name, title in layers.items() if module == name or module.startswith(name + ".")), "python -m")
        found["python -m" if module in starts else part].append(module)
    return found


def circles(edges: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Sets of modules that all import each other, over others: Tarjan's strongly connected components of more than one."""
    follow: dict[str, list[str]] = defaultdict(list)
    for a, b in edges:
        follow[a].append(b)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in follow[node]:
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(set(stack[at:]))
            del stack[at:]

    for node in list(follow):
        if node not in order:
            visit(node)
    return found


def depths(modules: list[str], edges: list[tuple[str, str]]) -> dict[str, int]:
    """How far above the lowest of its band each module lies; what is in a circle lies together."""
    inside = set(modules)
    of = {m: m for m in modules}
    for circle in circles(edges):
        of.update(dict.fromkeys(circle & inside, min(circle)))
    follow: dict[str, set[str]] = defaultdict(set)
    for a, b in edges:
        if a in inside and b in inside and of[a] != of[b]:
            follow[of[a]].add(of[b])
    known: dict[str, int] = {}

    def depth(node: str) -> int:
        if node not in known:
            known[node] = max((depth(other) + 1 for other in follow[node]), default=0)
        return known[node]

    return {m: depth(of[m]) for m in modules}


def place(tree: Tree) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """x and y of the modules, and the lower and upper end of each band."""
    at: dict[str, tuple[float, float]] = {}
    ends: dict[str, tuple[float, float]] = {}
    y = 0.0
    for band, modules in reversed(tree.bands.items()):
        if not modules:
            continue
        begin, height = y, depths(modules, tree.edges)
        for level in range(max(height.values()) + 1):
            row = [m for m in modules if height[m] == level]
            lowest = {m: [at[b][0] for a, b in tree.edges if a == m and b in at] for m in row}
            row.sort(key=lambda m: (sum(lowest[m]) / len(lowest[m]) if lowest[m] else 0.5, m))
            for start in range(0, len(row), WIDE):
                part = row[start : start + WIDE]
                aside = 0.35 * (level % 3 - 1) / len(part)  # lines between rows of one module would lie behind each other
                at.update({m: ((i + 0.5 + aside) / len(part), y + 0.25 * (i % 2)) for i, m in enumerate(part)})
                y += 1
        ends[band] = begin - 0.45, y - 0.3
        y += 0.5
    return at, ends


def is_up(tree: Tree, edge: tuple[str, str], rings: list[set[str]]) -> bool:
    """Whether an import leads up to another band, or is part of a circle."""
    of = {m: i for i, modules in enumerate(tree.bands.values()) for m in modules}
    return of[edge[1]] < of[edge[0]] or any(set(edge) <= ring for ring in rings)


def draw(trees: list[Tree], path: Path) -> None:
    """One panel for each tree."""
    pyplot = plots.load()
    pyplot.rcParams["svg.fonttype"] = "none"  # text stays text
    figure, panels = pyplot.subplots(1, len(trees), figsize=(11 * len(trees), 11), layout="constrained", squeeze=False)
    for panel, tree in zip(panels[0], trees, strict=True):
        at, ends = place(tree)
        rings = circles(tree.edges)
        for band, (low, high) in ends.items():
            panel.axhspan(low, high, color="#eef2f7", zorder=0)
            panel.text(-0.13, (low + high) / 2, band.replace(": ", ":\n"), ha="left", va="center", fontsize="large", fontweight="bold")
        for a, b in tree.edges:
            (x0, y0), (x1, y1) = at[a], at[b]
            if is_up(tree, (a, b), rings):
                panel.annotate("", (x1, y1), (x0, y0), zorder=2, arrowprops={"arrowstyle": "-|>", "color": UP, "lw": 1.2, "shrinkB": 4})
            else:
                panel.plot([x0, x1], [y0, y1], color=DOWN, linewidth=0.35, zorder=1)
        for module, (x, y) in at.items():
            short = module.removeprefix("mixkvq.").removeprefix("bridge.").removeprefix("core.").removeprefix("study.").removeprefix("cli.")
            panel.text(x, y, short, ha="center", va="center", fontsize=6.5, zorder=3, bbox={"boxstyle": "round,pad=0.15", "fc": "white", "lw": 0.4})
        upward = sum(is_up(tree, edge, rings) for edge in tree.edges)
        panel.set_title(f"{tree.name}: {len(at)} modules, {len(tree.edges)} imports, {upward} upwards or in a circle")
        panel.set_xlim(-0.14, 1.03)
        panel.axis("off")
    plots.save(figure, path)


def longest(tree: Tree) -> list[tuple[str, int, str, int]]:
    """The longest file and the longest function: names and lines."""
    files, functions = [], []
    for path in tree.files():
        text = path.read_text(encoding="utf-8")
        files.append((len(text.splitlines()), path.name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                functions.append((node.end_lineno - node.lineno + 1, f"{node.name} in {path.name}"))
    return [(*reversed(max(files)), *reversed(max(functions)))]  # type: ignore[list-item]


@tool()
@click.argument("commit")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The picture, .svg or .png.")
@force_option("the picture")
def main(commit: str, out: Path, force: bool) -> None:
    """Draw the imports at COMMIT and now, and print the longest file and function of both."""
    plots.check_path(out, force=force)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "bridge", "python"))) as archive:
            archive.extractall(folder)
        trees = [read(Path(folder), commit), read(ROOT, "after")]
        draw(trees, out)
        click.echo("| | longest file | lines | longest function | lines |\n|---|---|---|---|---|")
        for tree in trees:
            for file, n_file, function, n_function in longest(tree):
                click.echo(f"| {tree.name} | `{file}` | {n_file} | `{function}` | {n_function} |")


if __name__ == "__main__":
    sys.exit(run(main, "bench/imports.py"))
