"""`python -m bridge.run`: see `mixkvq.cli.run`."""

from __future__ import annotations

import sys

from mixkvq.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
