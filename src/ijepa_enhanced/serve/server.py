"""Listens on a port, runs the application, and finishes what was accepted when it is told to end."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ijepa_enhanced.errors import RequestError
from ijepa_enhanced.serve.app import Service

logger = logging.getLogger(__name__)

CONNECTIONS = 1024
"""Most open connections. Further ones get status 503."""
KEEP_ALIVE = 5
"""Seconds after which a connection without requests is closed."""
LAST_CALL = 0.2
"""Seconds in which requests on connections that were accepted last are read before idle connections are closed."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address, for `serve`.

    Raises:
        RequestError: the port is in use, or the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise RequestError(f"Port {port} is in use. Choose another one with --port.") from error
        reason = error.strerror or error
        raise RequestError(f"Cannot listen on --host {host}, --port {port}: {reason}.") from error


class Server(uvicorn.Server):
    """A server that tells its service when it is to end.

    Args:
        config: of uvicorn.
        service: what it serves.
        ready: called when requests are accepted.
    """

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service = service
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, and answer what has come over those that there are."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_CALL)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM."""
        self.service.draining = True
        super().handle_exit(sig, frame)


def serve(app: ASGIApp, service: Service, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish what was accepted.

    Args:
        app: from `make_app`.
        service: what it serves.
        listening: from `listen`.
        ready: called when requests are accepted.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(service.engine.limits.timeout) + 1,
    )
    server = Server(config, service, ready)
    # uvicorn raises the signal again once it has ended. Then it is to have no effect: ending is what was asked for.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(server.serve([listening]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        service.engine.close()
    logger.info("Stopped after %d requests.", service.metrics.total())
