"""`python -m mixkvq.inspect`: see `mixkvq.cli.inspect`."""

from __future__ import annotations

import sys

from .cli.inspect import main

if __name__ == "__main__":
    sys.exit(main())
