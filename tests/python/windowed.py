"""The chat window for tests: its server with a real model, and Debian's Chromium."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import httpx
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
def started(folder):
    """A function that starts `mixkvq chat --no-open` with this folder of the user's; it returns it, a client, and the address that lets in."""
    processes, clients = [], []
    environment = {**os.environ, "XDG_DATA_HOME": str(folder / "data"), "XDG_CACHE_HOME": str(folder / "cache"), "MIXKVQ_CONFIG": ""}

    def start(*options):
        words = [sys.executable, "-m", "mixkvq", "chat", "--no-open", "-t", "1", "-np", "1", "-c", "2048", "--device", "cpu", *options]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        for line in process.stderr:
            if (found := re.search(r"http://(127\.0\.0\.1:\d+)/open\?key=\S+", line)) is not None:
                clients.append(httpx.Client(base_url=f"http://{found[1]}", timeout=120))
                return process, clients[-1], found[0]
        raise AssertionError(f"it ended with {process.wait()}")

    try:
        yield start
    finally:
        for client in clients:
            client.close()
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()


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
