"""Published builds of llama.cpp with our cache: which of them work, operation by operation, against each build's own F16 cache.

    .venv/bin/python bench/compatibility.py models/cot-tiny-34m-q8_0.gguf --out build/compat/compatibility.json

Every build runs in a process of its own (build_probe.py): a prompt, single tokens, a shift, two streams, and states that go from its F16 cache
to ours and back. `balanced` passes where the cache takes fewer MiB and the divergence from F16 is there and within its bound: one that is 0 would be
that of a cache that is not packed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import builds
import click
from _common import Model, check_result, describe, force_option, run, save_json, split_names, tool, wide_console
from rich.table import Table

from bridge.library import library_path

PROBE = Path(__file__).with_name("build_probe.py")
BOUND = 0.03
"""Of the mean divergence of an operation, in nats. The largest that a build had when this was written was 0.012, after a context shift."""
LEAST = 1e-5
"""Less is the rounding of sums: nothing has been packed."""


def since() -> dict[str, str]:
    """For each layout the function that tells it from those before."""
    text = (builds.ROOT / "cpp" / "ggml" / "layouts.h").read_text(encoding="utf-8")
    return dict(re.findall(r'^    X\((\w), \d, \d, "(\w+)"', text, re.MULTILINE))


def probe(build: builds.Build, model: Path, library: Path, device: str = "MIXKVQ-CPU", **more: Any) -> tuple[dict[str, Any], str]:
    """What build_probe.py finds ("error" instead, where it fails), and what the library said on stderr. Raises builds.NotFetchedError."""
    folder = builds.fetch(build)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MIXKVQ_", "GGML_"))}
    environment |= {"LD_LIBRARY_PATH": str(folder), "LD_PRELOAD": builds.preload(), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environment |= {name: value for name, value in more.pop("variables", {}).items()}
    job = {"folder": str(folder), "library": str(library), "model": str(model), "device": device, "since": since(), **more}
    job["loads_backends"] = build.loads_backends
    command = [sys.executable, str(PROBE), json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    said = "\n".join(line for line in done.stderr.splitlines() if line.startswith("mixkvq: "))
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no reason").splitlines()[-1]
        return {"error": f"exit code {done.returncode}: {reason}"}, said
    return json.loads(done.stdout.splitlines()[-1]), said


def faults(build: builds.Build, found: dict[str, Any]) -> list[str]:
    """What is wrong with a build's results, in words; nothing: it passes."""
    if "error" in found or found.get("refused"):
        return [found.get("error", "the library refuses it")]
    wrong = [] if found["layout"] == build.layout else [f"it has layout {found['layout']}"]
    for name in ("mib", "streams_mib"):
        if not found[name] < found[f"{name}_f16"]:
            wrong.append(f"{name} is {found[name]}, in F16 {found[f'{name}_f16']}")
    for name, figures in found["operations"].items():
        if not LEAST < figures["kld_mean"] < BOUND:
            wrong.append(f"{name}: mean divergence {figures['kld_mean']:.2g}")
    return wrong


@tool()
@click.argument("model", type=Model())
@click.option("--builds", "names", default="", metavar="NAMES", help="Only these, separated by commas: b8683,v0.5.0.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@force_option()
def main(model: str, names: str, out: Path | None, force: bool) -> None:
    if out is not None:
        check_result(out, "compatibility", force=force, inputs=(model,))
    chosen = [b for b in builds.BUILDS if not names or b.name in split_names(names)]
    if not chosen:
        raise click.BadParameter(f"none of {names} is a build of bench/builds.py")
    result = describe("compatibility", Path(model), {"preset": "balanced", "bound": BOUND, "least": LEAST}, out)
    result |= {"builds": {}}
    head = Table("build", "ggml", "layout", "MiB", "of F16", *("prompt", "tokens", "shift", "streams", "state out", "state in"), "result")
    failed = []
    for build in chosen:
        try:
            found, said = probe(build, Path(model), library_path())
        except builds.NotFetchedError as e:
            raise click.ClickException(str(e)) from None
        wrong = faults(build, found)
        failed += [build.name] if wrong else []
        result["builds"][build.name] = {"package": build.package, "version": build.version, **found, "said": said, "faults": wrong}
        figures = [f"{f['kld_mean']:.4f}" for f in found.get("operations", {}).values()] or [""] * 6
        sizes = [f"{found[name]:.2f}" if name in found else "" for name in ("mib", "mib_f16")]
        head.add_row(build.name, found.get("ggml", ""), found.get("layout", ""), *sizes, *figures, "; ".join(wrong) or "pass")
        click.echo(f"{build.name}: {'; '.join(wrong) or 'pass'}", err=True)
        save_json(out, result)
    wide_console().print(head)
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(chosen)} builds fail: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(run(main, "bench/compatibility.py"))
