"""Which llama-cpp-python can be used. Which ggml, the backend itself finds out when it is loaded, by what that exports."""

LLAMA_CPP_OLDEST = (0, 3, 17)
"""The first one with a backend interface that is served; before it nothing had been released for seven months."""
LLAMA_CPP = "llama-cpp-python>=" + ".".join(map(str, LLAMA_CPP_OLDEST))
"""What `pip install` is told, and `dependencies` in pyproject.toml."""
