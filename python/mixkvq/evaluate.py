"""`python -m mixkvq.evaluate`: see `mixkvq.cli.evaluate`."""

from __future__ import annotations

import sys

from .cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
