"""`python -m mixkvq.convert`: see `mixkvq.cli.convert`."""

from __future__ import annotations

import sys

from .cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
