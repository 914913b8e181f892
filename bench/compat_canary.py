"""CompatCanary, an npm package that asks a server what OpenAI's clients ask, against `mixkvq serve`.

    python bench/compat_canary.py                 # the built-in model
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import click
from soak_server import Server

from mixkvq.cli.options import run, tool
from mixkvq.core.errors import SettingsError
from mixkvq.core.model_file import built_in_model

PACKAGE = "compatcanary@0.2.2"


@tool()
@click.argument("model", default=str(built_in_model()))
def main(model: str) -> int:
    """Ask MODEL's server; the exit status is CompatCanary's."""
    npx = shutil.which("npx")
    if npx is None:
        raise SettingsError("npx is missing; it comes with Node 20 or newer.")
    server = Server(model, "--alias", "canary")
    try:
        return subprocess.run([npx, "--yes", PACKAGE, "scan", "--base-url", f"{server.address}/v1", "--model", "canary"], check=False).returncode
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(run(main, "bench/compat_canary.py"))
