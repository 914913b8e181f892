"""`python -m bridge` is `python -m bridge.run`."""

import sys

from .run import main

sys.exit(main())
