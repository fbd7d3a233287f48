"""The process around the application: its socket, its signals, and how it ends."""

import asyncio
import contextlib
import resource
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.serving.app import SECONDS_FOR_A_READER, Service

_CONNECTIONS_WAITING = 2048
_POLL_SECONDS = 0.05
_SECONDS_OF_A_TURN = 1e-4
# Longer than balancers keep connections (Google's: 600 s), so that none is closed that one is about to use.
_SECONDS_OF_IDLENESS = 620
# For the head of a request, and its size: nothing of it is known before it is whole. Then for the rest: the application
# answers before that, if it reads it at all.
_SECONDS_FOR_A_HEAD, _MOST_BYTES_OF_A_HEAD, _SECONDS_FOR_A_MESSAGE = 30, 64 * 2**10, 60
# For answers that are complete and not yet taken.
_SECONDS_FOR_THE_LAST_BYTES = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address, before anything is loaded: an address that is in use is said, and nobody can connect yet.

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


class _Connection(HttpToolsProtocol):
    """Closes connections whose next request does not come in time, or whose head does not end."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self._begin_head()

    def on_message_begin(self):
        super().on_message_begin()
        self._begin_head()

    def on_headers_complete(self):
        self._begin(_SECONDS_FOR_A_MESSAGE)
        self._size = None
        super().on_headers_complete()

    def on_message_complete(self):
        self._end()
        super().on_message_complete()

    def data_received(self, data):
        super().data_received(data)
        if self._size is not None:
            self._size += len(data)
            if self._size > _MOST_BYTES_OF_A_HEAD:
                self.transport.close()

    def connection_lost(self, exc):
        self._end()
        super().connection_lost(exc)

    _timer = _size = None  # what is left of the time; bytes of a head that is not whole

    def _begin_head(self):
        self._begin(_SECONDS_FOR_A_HEAD)
        self._size = 0

    def _begin(self, seconds):
        self._end()
        self._timer = self.loop.call_later(seconds, self.transport.close)

    def _end(self):
        self._size = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT; then it takes nothing new, and lets what has begun end.

    A second signal ends that with errors, a third one the process.
    """

    def __init__(self, app: FastAPI, drain_seconds: float, announce: Callable[[], None] = lambda: None):
        """`announce` is called when clients can connect."""
        super().__init__(
            uvicorn.Config(
                _without_closed_connections(app),
                log_level="error",
                access_log=False,  # whatever is in an address may be a secret
                server_header=False,
                backlog=_CONNECTIONS_WAITING,
                timeout_keep_alive=_SECONDS_OF_IDLENESS,
                http=_Connection,
                timeout_graceful_shutdown=_SECONDS_FOR_THE_LAST_BYTES,
            )
        )
        self._service: Service = app.state.service
        self._drain_seconds, self._announce = drain_seconds, announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's: that closes the door first, and a gateway hears of it by refused connections."""
        self._signals += 1
        if self._loop is None or self._signals > 2:
            self.should_exit = self.force_exit = True
        elif self._signals == 2:
            self._drain_seconds = 0
        else:
            self._service.is_draining = True
            self._service.scheduler.close()
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def fail(self) -> None:
        """Ends the process; any thread may call it."""
        self.should_exit = True

    def _begin_to_drain(self):
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self):
        now, scheduler = asyncio.get_running_loop().time, self._service.scheduler
        began = now()
        while (scheduler.waiting or scheduler.running) and now() < began + self._drain_seconds:
            await asyncio.sleep(_POLL_SECONDS)
        scheduler.drop("the server was shut down before this text ended")
        self.should_exit = True


def _without_closed_connections(app):
    """What is sent to a client that has gone between two requests is no error to be logged."""

    async def quiet(scope, receive, send):
        async def send_if_open(message):
            try:
                await send(message)
            except RuntimeError as error:  # of uvloop
                if "closed" not in str(error):
                    raise

        await app(scope, receive, send_if_open)

    return quiet


def serve(app: FastAPI, bound: socket.socket, drain_seconds: float, announce: Callable[[], None]) -> None:
    """Serves until a signal ends it, or the engine does; `announce` is called when clients can connect.

    Raises:
      RunError: it was the engine.
    """
    worker = app.state.service.worker
    server = Server(app, drain_seconds, announce)
    worker.on_failure = server.fail
    allow_many_files()
    # The engine's thread wants the interpreter a few times a step, and would wait up to 5 ms for each.
    sys.setswitchinterval(_SECONDS_OF_A_TURN)
    server.run(sockets=[bound])
    if worker.has_failed:
        raise RunError("the engine failed several times in a row; what is above says why")
    if worker.is_alive:
        raise RunError("a step of the engine did not end; the process is given up")


def allow_many_files() -> None:
    """As many as the system lets this process have: a connection is a file, and shells allow a thousand."""
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
