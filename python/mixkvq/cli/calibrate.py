"""Make a profile for a model: which precision each layer, head and kind of cache gets, measured on the model itself.

    python -m mixkvq.calibrate model.gguf
    python -m mixkvq.calibrate model.gguf --bits 2.5 --text notes.txt -o small.gguf
    python -m mixkvq.calibrate model.gguf --budget-mib 512 --ctx 32768
    python -m mixkvq.calibrate model.gguf --max-kld 0.01
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bridge.devices import DEVICE_HELP, check_device

from ..core.errors import ProfileError, SettingsError
from ..core.outputs import check_output
from ..core.profile import Profile, side_car, write_profile
from ..study.budget import FEWEST_TOKENS
from ..study.calibrate import TOKENS, Request, calibrate
from ..study.sizes import LEAST_BITS, MOST_BITS
from .options import F16_TOKENS, SEED, THREADS, Model, Number, force_option, interrupted, quiet_llama, run, tool, typed_first
from .progress import Bars


def _two_numbers(_context: Any, _parameter: Any, text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        t16, t4 = (float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not two numbers: T16,T4") from None
    if not all(0 <= t < math.inf for t in (t16, t4)):
        raise click.BadParameter(f"{text!r} is not two numbers of 0 or more")
    return t16, t4


@tool()
@click.argument("model", type=Model())
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Text like what the model will read; may be repeated. The last third of each is held out.  [default: a text that comes with MixKVQ]",
)
@click.option(
    "--bits",
    type=Number(LEAST_BITS, MOST_BITS),
    help="Body bits per element to take at most.  [default: those of `balanced`]",
)
@click.option("--budget-mib", type=Number(0, 1e9, min_open=True), help="Instead: what the whole cache may take at --ctx tokens.")
@click.option("--ctx", type=click.IntRange(256, 1 << 30), help="Tokens of context that --budget-mib is for.")
@click.option(
    "--max-kld",
    type=Number(0, 1e3, min_open=True),
    help="Instead: as few bits as keep the mean divergence on held-out text at that, in nats.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The profile.  [default: MODEL.mixkvq.gguf beside the model, where it is found automatically]",
)
@force_option()
@click.option(
    "--policy",
    type=click.Choice(["gain", "paper", "search"]),
    default="gain",
    show_default=True,
    help="Least expected harm; the paper's thresholds; the paper's search for them (needs Optuna).",
)
@click.option("--thresholds", "t16_t4", callback=_two_numbers, help="T16,T4 of --policy paper.  [default: 1.85,1.58]")
@click.option("--window", type=F16_TOKENS, help="Recent tokens in F16.  [default: 128; with --budget-mib what diverges least]")
@click.option("--sinks", type=F16_TOKENS, help="First tokens in F16.  [default: 128]")
@click.option("--tokens", type=click.IntRange(FEWEST_TOKENS, 1 << 20), default=TOKENS, show_default=True,
              help="Of each kind of text, to calibrate and to measure, at most.")  # fmt: skip
@click.option(
    "--minutes",
    type=Number(min=0.1, max=1e5),
    help="How long it may take; less is coarser.  [default: up to 2, up to 8 where a model is read slowly; it is said]",
)
@click.option(
    "--exact/--no-exact",
    default=None,
    help="Measure a copy with weights in F32, without llama.cpp's own noise.  [default: on the CPU, where it takes less than 2/5 of the free memory]",
)
@click.option("--seed", type=SEED, default=1, show_default=True)
@click.option("--device", default="auto", show_default=True, help=f"Where the model is computed: {DEVICE_HELP}.")
@click.option("--threads", type=THREADS, help="Threads.  [default: physical cores]")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def command(**given: Any) -> int:
    """Make a profile for a model: which precision each layer, head and kind of cache gets, measured on the model itself."""
    typed_first(given, ("bits",), ("budget_mib", "ctx"), ("max_kld",))
    goals = [given[key] for key in ("bits", "budget_mib", "max_kld")]
    if sum(goal is not None for goal in goals) > 1:
        raise click.UsageError("--bits, --budget-mib and --max-kld say the same thing in three ways: give one of them.")
    if (given["budget_mib"] is None) != (given["ctx"] is None):
        raise click.UsageError("--budget-mib and --ctx go together: so many MiB for so many tokens.")
    if given["max_kld"] is not None and given["policy"] != "gain":
        raise click.UsageError("--max-kld goes with --policy gain.")
    if given["t16_t4"] is not None and given["policy"] != "paper":
        raise click.UsageError("--thresholds goes with --policy paper.")
    model: str = given["model"]
    out = Path(side_car(model)) if given["out"] is None else given["out"]
    check_output(out, "profile", force=given["force"], inputs=[model, *given["texts"]])
    quiet_llama()
    check_device(given["device"])
    budget = None if given["budget_mib"] is None else (given["budget_mib"], given["ctx"])
    request = Request(budget=budget, **{field.name: given[field.name] for field in fields(Request) if field.name != "budget"})
    with _stopped(out), Bars(quiet=given["quiet"]) as bars:
        profile, found = calibrate(model, request, bars)
    _write(profile, found, out, given)
    if found["interrupted"]:
        return interrupted(f"{out} has {found['interrupted']}. " + _how_to_use(out, model))
    if not given["quiet"]:
        _print_words(profile, found, out, model)
    return 0


def _write(profile: Profile, found: dict[str, Any], out: Path, given: dict[str, Any]) -> None:
    """The profile, and the table in any case. Where it cannot be written any more it goes to a folder of its own, and a ProfileError says so."""
    try:
        write_profile(out, profile, overwrite=given["force"])  # it may have appeared meanwhile
    except (OSError, SettingsError) as e:
        instead = Path(tempfile.mkdtemp(prefix="mixkvq-")) / out.name
        write_profile(instead, profile)
        raise ProfileError(f"{out} cannot be written any more ({getattr(e, 'strerror', None) or e}); the profile is in {instead}.") from None
    finally:
        if not given["quiet"] and found["held_out"]:
            _print_table(Console(width=max(110, Console().width)), profile, found)


@contextlib.contextmanager
def _stopped(out: Path) -> Iterator[None]:
    """After Ctrl-C before anything is known."""
    try:
        yield
    except KeyboardInterrupt:
        interrupted(f"The model has not been read yet, so {out} is not written.")
        raise


def _print_words(profile: Profile, found: dict[str, Any], out: Path, model: str) -> None:
    if found["coarser"]:
        click.echo(f"The profile is coarser than with more --minutes: {'; '.join(found['coarser'])}.")
    if found["instead"] == found["preset"] and found["held_out"]:
        click.echo(f"No allocation was better than the preset {found['preset']} on text that was held out, so the profile has the preset's formats.")
    elif found["instead"]:
        more = ", and more where the bits that are left help most" if found["held_out"] else ""
        click.echo(f"The profile has the formats of the preset {found['preset']}{more}.")
    nearest = found["nearest"]
    click.echo(f"The preset of the nearest size is {nearest.name}, of {nearest.bits:.2f} bits.")
    window = f", a window of {profile.window} tokens" if profile.window is not None else ""
    click.echo(f"{out} written in {found['seconds']:.0f} s: {profile.body_bits:.2f} body bits{window}. " + _how_to_use(out, model))


def _how_to_use(out: Path, model: str) -> str:
    found = Path(side_car(model)).resolve() == out.resolve()
    return "It is used with this model from now on." if found else f"Use it with --kv {out}."


def _print_table(console: Console, profile: Profile, found: dict[str, Any]) -> None:
    columns = ("held-out text", "cache", "body bits", "mean KLD", "+-", "median", "99.9 %", "same top", "perplexity ratio")
    table = Table(*columns, title=f"Against {found['against']}, decode-style")
    for kind, verdict in found["held_out"].items():
        for name, figures in verdict.figures.items():
            error = figures["kld_standard_error"]
            table.add_row(
                kind,
                name,
                f"{figures['body_bits']:.2f}",
                f"{figures['kld_mean']:.5f}",
                "" if error is None else f"{error:.5f}",
                f"{figures['kld_median']:.5f}",
                f"{figures['kld_99.9%']:.4f}",
                f"{figures['same_top']:.2%}",
                f"{figures['perplexity_ratio']:.4f}",
            )
        table.add_section()
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; see `command`."""
    return run(command, "mixkvq.calibrate", arguments)
