"""The application of `aim serve`: the routes of `transformers serve` that are kept, with bounds around them."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.cli.serving.server import build_server

from .chat import AimChatHandler, OneModel, OneThread, OneThreadState
from .demonstrations import PromptBuilder
from .metrics import Metrics
from .requests import Refused, ServingLimits

if TYPE_CHECKING:
    from fastapi import Request

    from .. import AimForConditionalGeneration
    from ..bank import DemonstrationBank

ROUTES = {"/v1/chat/completions", "/v1/models", "/load_model", "/health"}  # the others load models or use no images
BODY_SECONDS = 30.0  # for a client to send its request


def build_app(
    name: str,
    model: AimForConditionalGeneration,
    banks: Mapping[str, DemonstrationBank] | None = None,
    limits: ServingLimits | None = None,
) -> ASGIApp:
    """An ASGI application that answers chat completions with one model.

    Args:
        name: what clients call the model.
        model: the plug-in, with its processor, whose image rules are set to those of the limits.
        banks: banks by the names under which requests ask for them.
        limits: what is taken from clients.

    Raises:
        ValueError: a limit is out of its range, or the backbone has no chat template.
    """
    limits = limits or ServingLimits()
    processor = model.processor
    if processor.chat_template is None:
        raise ValueError(f"The backbone of {name} has no chat template, so it cannot answer chats.")
    processor.max_image_pixels, processor.image_sources = limits.max_image_pixels, limits.image_sources
    _ = processor.image_rules  # raises for settings that are out of range
    manager, metrics = OneThread(), Metrics()
    models, state = OneModel(name, model, manager.wait), OneThreadState(manager)
    builder = PromptBuilder(model, banks or {})
    chat = AimChatHandler(builder, limits, metrics, model_manager=models, generation_state=state)
    unused: Any = None
    app = build_server(models, chat, unused, unused, unused, unused, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    app.state.thread = manager
    _add_errors(app)

    @app.get("/metrics")
    def show_metrics() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return Admission(app, limits, metrics)


def serve(app: ASGIApp, host: str, port: int, stop_seconds: int) -> None:
    """Serve until SIGTERM or SIGINT; requests at work get `stop_seconds` to end, and the process exits with 0.

    Args:
        app: what `build_app` made.
        host: address to listen on.
        port: its port; 0 takes a free one, and the log says which.
        stop_seconds: for requests in progress when the server is stopped.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again after it has stopped
    uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=stop_seconds)


def error_response(message: str, status: int) -> JSONResponse:
    """An error as OpenAI writes it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {"retry-after": "1"} if status in (429, 503) else None
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status_code=status, headers=headers)


def _add_errors(app: FastAPI) -> None:
    """Turn what the handlers raise into one sentence and a status."""

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> JSONResponse:
        return error_response(" ".join(str(error).split()), error.status if isinstance(error, Refused) else 400)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(str(error.detail).rstrip(".") + ".", error.status_code)

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        reason = error.errors()[0]
        about = reason.get("ctx", {}).get("error", reason["msg"])
        return error_response(f"The body is not a JSON object ({about}).", 400)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return error_response(f"The server failed on this request ({type(error).__name__}); its log has more.", 500)


class Admission:
    """ASGI middleware: bounds on bodies and on requests at work; a client that hangs up ends its request.

    Args:
        app: what it lets requests through to.
        limits: the bounds.
        metrics: counts requests.
    """

    def __init__(self, app: ASGIApp, limits: ServingLimits, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics
        self.most, self.max_bytes = limits.queue, limits.max_body_mb * 10**6
        self.count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        full = self.count >= self.most
        self.count += not full
        self.metrics.at_work.set(self.count)
        try:
            await self._admitted(scope, receive, noted, full)
        finally:
            self.count -= not full
            self.metrics.at_work.set(self.count)
            if status:
                self.metrics.requests.labels(str(status)).inc()
                self.metrics.seconds.observe(time.monotonic() - start)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send, full: bool) -> None:
        """Read the body of a request of any size, and answer it or return the reason for a refusal."""
        try:
            body = await asyncio.wait_for(self._body(receive, 0 if full else self.max_bytes), BODY_SECONDS)
        except asyncio.TimeoutError:
            await error_response(f"The request took longer than {BODY_SECONDS:g} s to arrive.", 408)(
                scope, receive, send
            )
            return
        if body is None:
            self.metrics.hung_up.inc()
        elif full:
            message = f"{self.most} requests are at work or waiting, which is the most; try again in a moment."
            await error_response(message, 429)(scope, receive, send)
        elif len(body) > self.max_bytes:
            message = f"The request has more than {self.max_bytes // 10**6} MB, which is the most."
            await error_response(message, 413)(scope, receive, send)
        else:
            await self._watched(scope, receive, send, bytes(body))

    @staticmethod
    async def _body(receive: Receive, most: int) -> bytearray | None:
        """The body, up to a byte more than `most`: the rest is thrown away. `None` where the client hung up."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")[: most + 1 - len(body)]
            if not message.get("more_body", False):
                return body

    async def _watched(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Run the application until it has answered or the client hangs up."""
        parts = [{"type": "http.request", "body": body, "more_body": False}]
        gone, whole = asyncio.Event(), False

        async def replayed() -> Message:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def sent(message: Message) -> None:
            nonlocal whole
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def answered() -> None:
            await self.app(scope, replayed, sent)

        async def hung_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answer, watch = asyncio.create_task(answered()), asyncio.create_task(hung_up())
        try:
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not whole:  # a server says "disconnect" behind the last byte of an answer, too
                self.metrics.hung_up.inc()
                gone.set()
                answer.cancel()
                await asyncio.wait({answer})
                _ = answer.cancelled() or answer.exception()
            else:
                await answer
        finally:
            watch.cancel()
            answer.cancel()
