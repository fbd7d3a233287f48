"""The process around the application: its socket, its signals, and how it ends."""

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from kforcing_jax.errors import ConfigError
from kforcing_jax.serving.app import SECONDS_FOR_A_READER, Service

_CONNECTIONS_WAITING = 2048
_POLL_SECONDS = 0.05
# For answers that are complete and not yet taken.
_SECONDS_FOR_THE_LAST_BYTES = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address, before anything is loaded: nobody can connect yet, and nobody else can take it.

    Raises:
      ConfigError: the address is not to be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux: for a client that takes nothing of what it is sent
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SECONDS_FOR_A_READER)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port}: {error.strerror or error}") from None
    return bound


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then it takes nothing new, and lets what has begun end.

    A second signal ends it at once.
    """

    def __init__(self, app: FastAPI, drain_seconds: float):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="error",
                access_log=False,  # whatever is in an address may be a secret
                server_header=False,
                backlog=_CONNECTIONS_WAITING,
                timeout_graceful_shutdown=_SECONDS_FOR_THE_LAST_BYTES,
            )
        )
        self._service: Service = app.state.service
        self._drain_seconds = drain_seconds
        self._loop = None

    async def startup(self, sockets=None):
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig, frame):
        """Not uvicorn's: that closes the door first, and a gateway hears of it by refused connections."""
        if self._service.is_draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._service.is_draining = True
        self._service.scheduler.close()
        self._loop.call_soon_threadsafe(lambda: setattr(self, "_draining", self._loop.create_task(self._drain())))

    def fail(self):
        """Ends the process; any thread may call it."""
        self.should_exit = True

    async def _drain(self):
        ends = self._loop.time() + self._drain_seconds
        scheduler = self._service.scheduler
        while (scheduler.waiting or scheduler.running) and self._loop.time() < ends:
            await asyncio.sleep(_POLL_SECONDS)
        scheduler.drop("the server was shut down before this text ended")
        self.should_exit = True


def serve(app: FastAPI, bound: socket.socket, drain_seconds: float) -> bool:
    """Serves until a signal ends it, or the engine does: whether it was a signal."""
    server = Server(app, drain_seconds)
    app.state.service.worker.on_failure = server.fail
    server.run(sockets=[bound])
    return not app.state.service.worker.has_failed
