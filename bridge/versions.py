"""Which llama-cpp-python, and which ggml in it, the backend was built and tested against.

ggml's backend interface is not stable between releases, so a version outside these is refused: a mismatch would crash instead of failing.
"""

LLAMA_CPP = "0.3.36"
"""What `pip install` is told."""
LLAMA_CPP_VERSIONS = ((0, 3, 36), (0, 3, 37))
"""From, below."""
GGML_VERSIONS = ((0, 25, 0), (0, 26, 0))
"""From, below."""
