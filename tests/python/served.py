"""A server in a thread of the tests, on a real port, with a real model."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import uvicorn

from bridge.engine import Engine, Streams
from mixkvq.server.app import create_app
from mixkvq.server.loading import service as service_of

SPARE = {"n_threads": 1, "n_threads_batch": 1, "device": "cpu", "verbose": False, "n_batch": 256, "n_ubatch": 256}


@contextlib.contextmanager
def serving(service, rules=None):
    """The address of a service."""
    server = uvicorn.Server(uvicorn.Config(create_app(service, rules), log_config=None, access_log=False, lifespan="off"))
    where = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[where])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{where.getsockname()[1]}"
    finally:
        server.should_exit = True
        if service.engine is not None:
            service.engine.cancel_all()
        thread.join()
        where.close()


@contextlib.contextmanager
def model_served(path, *, n_seq=3, n_ctx=1024, rules=None, template=None, settings=None, **options):
    """Service and address of a model. settings: of the engine."""
    engine = Engine(Streams(str(path), n_seq=n_seq, n_ctx=n_ctx, **{**SPARE, **options}), **(settings or {}))
    try:
        service = service_of(engine, "tiny", template)
        with serving(service, rules) as address:
            yield service, address
    finally:
        engine.close()


def until_idle(http: httpx.Client, seconds=30.0):
    """Wait until no stream works; whether that came to be."""
    until = time.monotonic() + seconds
    while any(slot["is_processing"] for slot in http.get("/slots").json()):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
