"""The server's own loop: it listens, answers until it is told to stop, and ends what runs."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.routing import BaseRoute

from ..core.errors import SettingsError
from .app import create_app
from .guards import Rules
from .service import Service

_AT_THE_END = 5  # seconds that answers have to be sent
_CONNECTIONS = 1024


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free. Raises SettingsError that names both."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as e:
        raise SettingsError(f"The server cannot listen on {host}, port {port}: {e.strerror or e}.") from None


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to `serve`: it would raise them again and end the program before the model is closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield


def serve(
    service: Service, rules: Rules, where: socket.socket, ready: Callable[[], None] = lambda: None, more: Sequence[BaseRoute] = ()
) -> None:
    """Answer until SIGINT or SIGTERM; a second one does not wait for answers. ready: called when the first request can come."""
    config = uvicorn.Config(
        create_app(service, rules, more),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_AT_THE_END,
    )
    server = _Server(config)

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        if service.engine is not None:
            service.engine.cancel_all()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # not the main thread
                loop.add_signal_handler(number, stop)
        ready()
        await server.serve(sockets=[where])

    with where:
        asyncio.run(run())
