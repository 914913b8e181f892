"""An HTTP server on the engine: OpenAI's interface and llama.cpp's own. `mixkvq serve` starts it; it needs the extra `mixkvq[server]`."""
