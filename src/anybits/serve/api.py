"""The HTTP front: OpenAI's routes over the worker. No tensors here, and the only file that knows the web framework."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from anybits.config import Single
from anybits.serve import metrics, schema
from anybits.serve.gate import Gate
from anybits.serve.jobs import Prompts, RequestError, Served, make_jobs, unknown_model
from anybits.serve.openapi import describe
from anybits.serve.responses import Choice, Shape, error, explain
from anybits.serve.worker import Delta, Job, QueueFullError, Worker

logger = logging.getLogger(__name__)

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.ErrorAnswer, "description": text}
    for status, text in {
        400: "A field is wrong: the message names it and what is allowed.",
        401: "The API key is missing or wrong.",
        404: "No such model.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        429: "The queue is full: Retry-After says when to come back.",
        500: "Internal error.",
        503: "The server is stopping.",
        504: "The request took longer than the server allows.",
    }.items()
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMED: dict[str, Any] = {"content": {"text/event-stream": {"schema": EVENT}}}


@dataclass(frozen=True)
class Front:
    """What the routes share."""

    served: Served
    prompts: Prompts
    worker: Worker
    created: int
    mailbox: Mailbox


class Mailbox:
    """Carries deltas from the worker's thread to the event loop, which is woken once a step, not once a token."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._letters: list[tuple[asyncio.Queue[tuple[int, Delta]], int, Delta]] = []

    def open(self) -> None:
        """Deliver to the loop that runs now."""
        self._loop = asyncio.get_running_loop()

    def put(self, to: asyncio.Queue[tuple[int, Delta]], index: int, delta: Delta) -> None:
        """Keep a delta until the step is over."""
        self._letters.append((to, index, delta))

    def send(self) -> None:
        """Hand over what was put; a loop that has closed has no more readers."""
        letters, self._letters = self._letters, []
        if letters and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, letters)

    @staticmethod
    def _deliver(letters: list[tuple[asyncio.Queue[tuple[int, Delta]], int, Delta]]) -> None:
        for to, index, delta in letters:
            to.put_nowait((index, delta))


class Conversation:
    """The jobs of one HTTP request, and the queue through which their deltas come from the worker's thread."""

    def __init__(self, front: Front, body: schema.GenerationRequest) -> None:
        self._front = front
        self._queue: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self.jobs: list[Job] = []
        self.choices: list[Choice] = []
        self._body = body

    async def start(self) -> None:
        """Make the jobs and queue them; raise RequestError or QueueFullError."""
        self.jobs = await asyncio.to_thread(
            make_jobs, self._body, self._front.prompts, self._front.served, self._deliver
        )
        self.choices = [Choice(index) for index in range(len(self.jobs))]
        self._front.worker.submit(self.jobs)

    def _deliver(self, index: int, delta: Delta) -> None:
        self._front.mailbox.put(self._queue, index, delta)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (choice, delta) until every choice has finished; raise RequestError when one could not."""
        open_choices = len(self.jobs)
        while open_choices:
            index, delta = await self._queue.get()
            self.choices[index].add(delta)
            if delta.finish == "timeout":
                raise RequestError(504, None, "the request took longer than the server allows")
            if delta.finish == "error":
                raise RequestError(500, None, "internal error; the server's log has it")
            open_choices -= delta.finish is not None
            yield index, delta

    async def collect(self) -> None:
        """Wait until every choice has finished."""
        async for _ in self.deltas():
            pass

    def close(self) -> None:
        """Free slots and KV of jobs that still run."""
        for job, choice in zip(self.jobs, self.choices, strict=True):
            if choice.finish is None:
                self._front.worker.cancel(job)


class EventStream(StreamingResponse):
    """Server-sent events that close their conversation however they end."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client goes."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def answer(front: Front, body: schema.GenerationRequest, request: Request) -> Response:
    """Serve one generation request, streamed or whole."""
    chat = isinstance(body, schema.ChatRequest)
    identifier = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
    shape = Shape(chat, identifier, body.model or front.served.name, front.prompts.piece)
    conversation = Conversation(front, body)
    await conversation.start()
    logger.info("%s is %s", request.scope["anybits.request_id"], identifier)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(conversation, shape, usage), conversation.close)
    collected = asyncio.ensure_future(conversation.collect())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({collected, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not collected.done():
            return Response(status_code=499)  # nobody reads it: the client has gone
        await collected
    finally:
        collected.cancel()
        gone.cancel()
        conversation.close()
    return JSONResponse(shape.whole(conversation.choices, conversation.jobs))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(conversation: Conversation, shape: Shape, with_usage: bool) -> AsyncIterator[str]:
    begun: set[int] = set()
    try:
        async for index, delta in conversation.deltas():
            chunk = shape.chunk(index, delta, first=index not in begun)
            begun.add(index)
            yield _event(chunk)
    except RequestError as problem:
        yield _event(error(str(problem), problem.status))
    else:
        if with_usage:
            yield _event(shape.usage_chunk(conversation.choices, conversation.jobs))
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def create_app(front: Front, api_key: str | None = None, max_body_bytes: int = 4_000_000) -> FastAPI:
    """Return the application; it starts the worker with itself and closes it at the end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        front.mailbox.open()
        front.worker.after_step = front.mailbox.send
        front.worker.start()
        yield
        await asyncio.to_thread(front.worker.close)

    app = FastAPI(title="anybits", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    _add_generation(app, front)
    _add_information(app, front)
    _add_errors(app, front)
    describe(app, front.served, api_key is not None)
    app.add_middleware(Gate, api_key=api_key, max_body_bytes=max_body_bytes)
    return app


def _add_generation(app: FastAPI, front: Front) -> None:
    @app.post(
        "/v1/chat/completions",
        responses={200: {"model": schema.ChatCompletion} | STREAMED} | ERRORS,  # type: ignore[operator]
    )
    async def chat(body: schema.ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await answer(front, body, request)

    @app.post(
        "/v1/completions",
        responses={200: {"model": schema.Completion} | STREAMED} | ERRORS,  # type: ignore[operator]
    )
    async def completion(body: schema.CompletionRequest, request: Request) -> Response:
        """Continue a prompt."""
        return await answer(front, body, request)


def _add_information(app: FastAPI, front: Front) -> None:
    served = front.served
    page = files("anybits.serve").joinpath("static/index.html").read_text(encoding="utf-8")

    def entry(name: str, precision: Single | None) -> schema.ModelEntry:
        return schema.ModelEntry(
            id=name,
            object="model",
            created=front.created,
            owned_by="anybits",
            precision=precision,
            precisions=list(served.precisions),
            profiles=list(served.profiles),
            max_model_len=served.max_model_len,
        )

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> schema.ModelList:
        """List the model and its aliases NAME:3bit."""
        return schema.ModelList(object="list", data=[entry(n, p) for n, p in served.aliases().items()])

    @app.get("/v1/models/{name:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(name: str) -> schema.ModelEntry:
        """Describe one name."""
        if name not in served.aliases():
            raise unknown_model(name, served)
        return entry(name, served.aliases()[name])

    @app.get("/health", responses={503: {"model": schema.ErrorAnswer, "description": "The engine has stopped."}})
    async def health() -> schema.Health:
        """Say whether the engine serves."""
        if not front.worker.alive:
            raise RequestError(503, None, "the engine has stopped")
        return schema.Health(status="ok", inside=front.worker.inside)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {metrics.CONTENT_TYPE: {"schema": {"type": "string"}}}}, 401: ERRORS[401]},
    )
    async def prometheus() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(front.worker.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE})

    @app.get("/", response_class=HTMLResponse)
    async def chat_page() -> HTMLResponse:
        """Return the chat page."""
        return HTMLResponse(page)


def _add_errors(app: FastAPI, front: Front) -> None:
    def refuse(
        status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> JSONResponse:
        front.worker.metrics.refused(status)
        shown = {name.replace("_", "-"): value for name, value in headers.items()}
        return JSONResponse(error(message, status, param, code), status, shown)

    @app.exception_handler(RequestError)
    async def wrong_request(_: Request, problem: RequestError) -> JSONResponse:
        return refuse(problem.status, str(problem), problem.param, problem.code)

    @app.exception_handler(QueueFullError)
    async def full(_: Request, problem: QueueFullError) -> JSONResponse:
        return refuse(429, str(problem), code="queue_full", retry_after=str(problem.retry_after))

    @app.exception_handler(RequestValidationError)
    async def wrong_body(_: Request, problem: RequestValidationError) -> JSONResponse:
        return refuse(400, *explain(problem.errors()))

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, problem: HTTPException) -> Response:
        answer = refuse(problem.status_code, str(problem.detail))
        answer.headers.update(problem.headers or {})
        return answer


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, so that a port in use is found before the model is loaded; port 0 picks one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def serve(app: FastAPI, listener: socket.socket, drain_s: float) -> None:
    """Serve until SIGTERM or SIGINT; then take no more connections and finish those that are open within drain_s."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=max(1, round(drain_s)), lifespan="on"
    )
    uvicorn.Server(config).run(sockets=[listener])


def make_front(worker: Worker, prompts: Prompts, served: Served) -> Front:
    """Return what `create_app` needs."""
    return Front(served, prompts, worker, int(time.time()), Mailbox())
