"""`python -m bridge.path`: see `mixkvq.cli.path`."""

from __future__ import annotations

import sys

from mixkvq.cli.path import main

if __name__ == "__main__":
    sys.exit(main())
