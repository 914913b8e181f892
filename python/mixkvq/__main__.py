"""`python -m mixkvq` is the command `mixkvq`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(program="python -m mixkvq"))
