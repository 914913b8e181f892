"""Answers to several requests at once, by one context in one thread; no HTTP in it.

from bridge.engine import Engine, Request, Sampling, Streams

with Engine(Streams("model.gguf", n_seq=4, n_ctx=8192)) as engine:
    answer = engine.answer(Request(engine.llama.tokenize(b"Once"), Sampling(seed=1), max_tokens=40))
    print(answer.text, answer.reason)
"""

from .events import Answer, Chosen, Done, Event, Failed, Piece, Progress
from .requests import Job, Request
from .sampling import Sampling
from .scheduler import Engine
from .streams import Streams

__all__ = ["Answer", "Chosen", "Done", "Engine", "Event", "Failed", "Job", "Piece", "Progress", "Request", "Sampling", "Streams"]
