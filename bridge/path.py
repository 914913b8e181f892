"""`python -m bridge.path`: print the path of the ggml backend, for GGML_BACKEND_PATH of a stock llama.cpp program."""

from __future__ import annotations

import sys

from .errors import BridgeError
from .library import library_path


def main() -> int:
    try:
        print(library_path())
    except BridgeError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
