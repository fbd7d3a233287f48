"""The HTTP side: routes, who may use them, and what a client gets that misbehaves.

`create_app` needs no model and no JAX program: only something that plans and a scheduler that steps.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import secrets
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kforcing_jax.serving import protocol
from kforcing_jax.serving.choices import Choice, Delta
from kforcing_jax.serving.errors import ApiError
from kforcing_jax.serving.metrics import CONTENT_TYPE, Metrics
from kforcing_jax.serving.plan import Served, plan_chat, plan_completion
from kforcing_jax.serving.responses import LAST_EVENT, Answer, Chats, Completions, event_of
from kforcing_jax.serving.scheduler import Scheduler
from kforcing_jax.serving.session import Mailbox, Session
from kforcing_jax.serving.worker import Worker

# Of a body. A prompt that fits a context is far smaller.
MOST_BYTES = 8 * 2**20
# Bodies from here on are read and tokenised beside the event loop, so that streams go on.
_LARGE = 64 * 2**10
# For the rest of a body, and for a client to take some of its stream.
_SECONDS_FOR_A_BODY, SECONDS_FOR_A_READER = 30, 60
_BEARER = {"WWW-Authenticate": "Bearer"}
# Said to nobody, but counted: as nginx does.
_HUNG_UP = 499


@dataclasses.dataclass
class Service:
    """What the routes work with.

    Attributes:
      served: what is offered.
      seconds: that a request may take.
      api_key: what clients of /v1 have to have; None lets everyone in.
      is_draining: no new requests are taken.
    """

    served: Served
    scheduler: Scheduler
    worker: Worker
    metrics: Metrics
    seconds: float
    api_key: str | None = None
    is_draining: bool = False

    @property
    def status(self) -> str:
        """ready, draining, stalled or failed."""
        broken = "failed" if self.worker.has_failed else "stalled" if self.worker.is_stalled else None
        return broken or ("draining" if self.is_draining else "ready")


def create_app(service: Service) -> FastAPI:
    """The application. Its life is the worker's: it starts with it, and ends with it."""

    @contextlib.asynccontextmanager
    async def life(app):
        app.state.mailbox = Mailbox()
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.stop)

    app = FastAPI(
        title="kforcing_jax", lifespan=life, redirect_slashes=False, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.service, app.state.created = service, int(time.time())
    # Starlette calls a handler with its own kind of error alone; its types ask for one of all kinds.
    app.add_exception_handler(ApiError, _refusal)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _not_here)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _accident)
    app.add_route("/v1/completions", _completions, methods=["POST"])
    app.add_route("/v1/chat/completions", _chats, methods=["POST"])
    app.add_route("/v1/models", _models, methods=["GET", "HEAD"])
    app.add_route("/v1/models/{name:path}", _model, methods=["GET", "HEAD"])
    app.add_route("/health", _health, methods=["GET", "HEAD"])
    app.add_route("/metrics", _metrics, methods=["GET", "HEAD"])
    app.add_route("/", _page, methods=["GET", "HEAD"])
    return app


# Routes.


async def _completions(request: Request) -> Response:
    return await _answer(request, protocol.CompletionRequest, plan_completion, Completions())


async def _chats(request: Request) -> Response:
    return await _answer(request, protocol.ChatRequest, plan_chat, Chats())


async def _models(request: Request) -> Response:
    _check_caller(request)
    return JSONResponse({"object": "list", "data": [_described(request.app, name) for name in _served(request).ids]})


async def _model(request: Request) -> Response:
    _check_caller(request)
    name = request.path_params["name"]
    if name not in _served(request).ids:
        raise ApiError(404, f"there is no model {name[:100]!r} here", "model", "model_not_found")
    return JSONResponse(_described(request.app, name))


async def _health(request: Request) -> Response:
    status = request.app.state.service.status
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE)


async def _page(_: Request) -> Response:
    return HTMLResponse(resources.files("kforcing_jax.serving").joinpath("page.html").read_bytes())


def _served(request: Request) -> Served:
    return request.app.state.service.served


def _described(app, name) -> dict:
    served = app.state.service.served
    mode = served.ids[name]
    return {
        "id": name,
        "object": "model",
        "created": app.state.created,
        "owned_by": "kforcing_jax",
        "max_model_len": served.engine.max_length,
        "k": served.engine.models.k,
        "mode": mode,
        "confidence": served.confidence if mode == "student" else 0.0,
        "modes": list(served.engine.modes),
        "tau": list(served.tau_range) if served.tau_range else None,
        "temperature": served.usual_tau,
        "top_p": served.top_p if "student" in served.engine.modes else None,
    }


# One request.


async def _answer(request: Request, kind: type, plan: Callable, form: Completions) -> Response:
    _check_caller(request)
    service: Service = request.app.state.service
    body = await _body(request)

    def understood():
        wanted = protocol.parse(kind, _decoded(body))
        return wanted, plan(wanted, service.served)

    def begun():
        return [Choice(index, text, service.served.tokenizer) for index, text in enumerate(texts)]

    wanted, texts = await asyncio.to_thread(understood) if len(body) > _LARGE else understood()
    is_large = sum(len(text.request.prompt) for text in texts) > _LARGE // 16
    choices = await asyncio.to_thread(begun) if is_large else begun()
    mailbox = request.app.state.mailbox
    session = Session(choices, service.scheduler, service.metrics, mailbox, service.seconds)
    answer = Answer(form, secrets.token_hex(12), wanted.model or service.served.name, choices)
    session.submit()
    if wanted.stream:
        return _EventStream(_events(session, answer, wanted), session.end, service.metrics.failed)
    return JSONResponse(await _unless_gone(request, _whole(session, answer), session.end))


async def _whole(session, answer) -> dict:
    parts: list[list[Delta]] = [[] for _ in session.choices]
    async for told in session.deltas():
        for choice, delta in told:
            parts[choice.index].append(delta)
    return answer.whole(parts)


async def _events(session, answer, wanted) -> AsyncIterator[bytes]:
    """What is sent, as it comes."""
    before = answer.first_events()
    async for told in session.deltas():
        yield before + b"".join(answer.event(choice, delta, wanted.wants_running_usage) for choice, delta in told)
        before = b""
    yield (answer.usage_event() if wanted.wants_usage else b"") + LAST_EVENT


async def _unless_gone(request, work, end):
    """The result of `work`. A client that hangs up meanwhile ends it."""
    work, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(_HUNG_UP, "the client hung up")
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        end()


async def _hung_up(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


class _EventStream(Response):
    """Server-sent events, until they end, the client hangs up, or it takes nothing for a while.

    What goes wrong before the first event is an error of HTTP; afterwards it is the last event.
    """

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None], failed: Callable[[int], None]):
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events, self._end, self._failed = events, end, failed
        self._since: float | None = None  # of a part that is being sent

    async def __call__(self, scope, receive, send):
        sending, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_hung_up(receive))
        try:
            done: set[asyncio.Future] = set()
            while not done and not self._is_stuck():  # where it is, the system drops the connection, see `server.bind`
                done, _ = await asyncio.wait(
                    {sending, gone}, timeout=SECONDS_FOR_A_READER, return_when=asyncio.FIRST_COMPLETED
                )
            if sending.done():
                sending.result()
            else:
                self._failed(_HUNG_UP)
        finally:
            for task in (sending, gone):
                task.cancel()
            self._end()

    async def _send(self, send):
        first = await anext(self._events)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._send_part(send, first)
            async for part in self._events:
                await self._send_part(send, part)
        except ApiError as error:
            self._failed(error.status)
            await self._send_part(send, event_of(error.body()) + LAST_EVENT)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_part(self, send, part):
        self._since = time.monotonic()
        await send({"type": "http.response.body", "body": part, "more_body": True})
        self._since = None

    def _is_stuck(self):
        """Whether the client has taken nothing for long."""
        return self._since is not None and time.monotonic() - self._since > SECONDS_FOR_A_READER / 2


# What comes in.


def _check_caller(request: Request):
    """Raises ApiError 401 without the key; what was given is told nowhere.

    Without a key, a page of another site in a browser of this machine could set it to work: 403.
    """
    key = request.app.state.service.api_key
    if key is None:
        origin = request.headers.get("origin")
        hosts = (request.headers.get("host"), request.headers.get("x-forwarded-host"))
        if origin is not None and urllib.parse.urlsplit(origin).netloc not in hosts:
            raise ApiError(403, "pages of other sites may not ask")
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if not given:
        raise ApiError(401, "the API key is missing: Authorization: Bearer KEY", None, "missing_api_key", _BEARER)
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise ApiError(401, "the API key is wrong", None, "invalid_api_key", _BEARER)


async def _body(request: Request) -> bytes:
    """The whole body.

    Raises:
      ApiError: 413 where it is too large, 408 where the rest does not come.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MOST_BYTES:
        raise _too_large()
    parts, size = [], 0
    try:
        async with asyncio.timeout(_SECONDS_FOR_A_BODY):
            async for part in request.stream():
                size += len(part)
                if size > MOST_BYTES:
                    raise _too_large()
                parts.append(part)
    except ClientDisconnect:
        raise ApiError(_HUNG_UP, "the client hung up") from None
    except TimeoutError:
        said = f"the rest of the body did not come within {_SECONDS_FOR_A_BODY} s"
        raise ApiError(408, said, headers={"Connection": "close"}) from None
    return b"".join(parts)


def _too_large():
    return ApiError(413, f"the body is larger than {MOST_BYTES:,} bytes", headers={"Connection": "close"})


def _decoded(body: bytes):
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON ({error})") from None
    except (ValueError, RecursionError):  # no UTF-8, numbers of thousands of digits, thousands of brackets
        raise ApiError(400, "the body is not JSON that can be read") from None


# What goes wrong.


def _refusal(request: Request, error: ApiError) -> Response:
    request.app.state.service.metrics.failed(error.status)
    return JSONResponse(error.body(), error.status, error.headers)


def _not_here(request: Request, error: HTTPException) -> Response:
    words = {404: f"there is nothing at {request.url.path[:100]}", 405: f"{request.method} is not possible here"}
    said = ApiError(
        error.status_code, words.get(error.status_code, str(error.detail)), headers=dict(error.headers or {})
    )
    return _refusal(request, said)


def _accident(request: Request, error: Exception) -> Response:
    return _refusal(request, ApiError(500, "something went wrong; the server's log says what"))
