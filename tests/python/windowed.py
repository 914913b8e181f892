"""The chat window for tests: its server with a real model, and Debian's Chromium."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import threading

import uvicorn

from bridge.engine import Engine, Streams
from mixkvq.chats import Store
from mixkvq.core.model_file import built_in_model
from mixkvq.server.app import create_app
from mixkvq.server.loading import service as service_of
from mixkvq.server.window import Window

SPARE = {"n_threads": 1, "n_threads_batch": 1, "device": "cpu", "verbose": False, "n_batch": 256, "n_ubatch": 256}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NO_CHROMIUM = "there is no Chromium on this machine; Debian's package is chromium"


@contextlib.contextmanager
def window_served(path, states=None, *, n_seq=2, n_ctx=2048, parking=None, **options):
    """A window, and its address. path: of the store, None: private."""
    engine = Engine(Streams(str(built_in_model()), n_seq=n_seq, n_ctx=n_ctx, **{**SPARE, **options}), parking=parking)
    store = Store(path)
    try:
        service = service_of(engine, "cot-tiny")
        window = Window(service, store, states)
        server = uvicorn.Server(uvicorn.Config(create_app(service, None, window.routes()), log_config=None, access_log=False, lifespan="off"))
        where = socket.create_server(("127.0.0.1", 0))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[where])))
        thread.start()
        try:
            yield window, f"http://127.0.0.1:{where.getsockname()[1]}"
        finally:
            engine.cancel_all()
            server.force_exit = server.should_exit = True
            thread.join()
            where.close()
    finally:
        engine.close()
        store.close()


@contextlib.contextmanager
def browser():
    """Chromium, without a display."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()
