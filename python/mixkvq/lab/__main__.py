"""`python -m mixkvq.lab`: see `mixkvq.cli.lab`."""

from __future__ import annotations

import sys

from mixkvq.cli.lab import main

if __name__ == "__main__":
    sys.exit(main())
