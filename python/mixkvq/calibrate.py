"""`python -m mixkvq.calibrate`: see `mixkvq.cli.calibrate`."""

from __future__ import annotations

import sys

from .cli.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
