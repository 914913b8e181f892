"""What needs neither llama.cpp nor a terminal: errors, GGUF headers, the geometry of models, settings, profiles, sizes, and the format in NumPy.

`bridge`, the studies and the commands stand on it; it imports none of them.
"""
