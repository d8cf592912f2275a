"""An OpenAI-compatible endpoint on loopback: a real tiny chat model answers, after the faults that a test asks for."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from modeling_aim.llava.text_model import Answer, LocalModel, Request

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "aim_tiny"))
import chat  # noqa: E402
import world  # noqa: E402

NAME = "tiny-chat"
SLOW = 0.6  # seconds; a test's client waits half as long
HTML = b"<html><h1>Bad gateway</h1></html>"


@functools.cache
def tiny_chat() -> LocalModel:
    """A chat model that writes questions and answers of the small world, and scores: their form, not their facts."""
    folder = Path(tempfile.mkdtemp(prefix="aim-chat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    chat.train(folder, functools.partial(chat.lesson, judgements=0.15), steps=100, layers=2, rows=12)
    return LocalModel(str(folder))


def rows_in(path: Path, count: int) -> Path:
    """Captions and boxes of `count` scenes of the small world."""
    rng, concepts = random.Random(0), world.concepts("train")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        number = len(rows)
        scene = world.random_scene(rng, concepts[number % 7])
        boxes = [[0.1, 0.2, 0.1 + 0.1 * (number % 5 + 1), 0.6]] * (number % 3 + 1)
        rows.setdefault(world.caption(scene), chat.row(f"{number}", scene, boxes))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    return path


class Endpoint:
    """A server; the first requests meet the faults, in order, and the others get an answer.

    Args:
        model: answers.
        faults: of `FAULTS` or `REFUSALS`, or "" for none.
        before: called with the number of a request before it is answered.
    """

    def __init__(
        self, model: LocalModel, faults: Sequence[str] = (), before: Callable[[int], None] | None = None
    ) -> None:
        self.model, self.faults, self.before = model, list(faults), before
        self.asked: Counter[str] = Counter()  # last messages that came
        self.answered: Counter[str] = Counter()  # those that were answered whole
        self.keys: set[str | None] = set()
        self.under_way = self.most_under_way = self.requests = 0
        self.lock, self.answering = threading.Lock(), threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.serve(self, body)

            def log_message(self, *_: Any) -> None:
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        content = body["messages"][-1]["content"]
        with self.lock:
            self.requests += 1
            number, fault = self.requests, self.faults.pop(0) if self.faults else ""
            self.asked[content] += 1
            self.keys.add(handler.headers.get("Authorization"))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            if fault:
                {**FAULTS, **REFUSALS}[fault](handler)
            elif body["model"] != NAME:
                send(
                    handler,
                    404,
                    json.dumps({"error": {"message": f"The model {body['model']} does not exist"}}).encode(),
                )
            else:
                if self.before is not None:
                    self.before(number)
                send(handler, 200, self.completion(body))
                with self.lock:
                    self.answered[content] += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.lock:
                self.under_way -= 1

    def completion(self, body: dict[str, Any]) -> bytes:
        with self.answering:
            answer = self.model.answer(Request(tuple(body["messages"]), NAME, 0.0, body["max_tokens"]))
        return json.dumps(completed(answer)).encode()


def completed(answer: Answer) -> dict[str, Any]:
    """An answer as OpenAI's chat completions have it."""
    usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.answer_tokens}
    usage["total_tokens"] = sum(usage.values())
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": NAME, "choices": [choice], "usage": usage}


@contextmanager
def listening_endpoint(model: LocalModel, faults: Sequence[str] = (), **more: Any) -> Iterator[Endpoint]:
    endpoint = Endpoint(model, faults, **more)
    thread = threading.Thread(target=endpoint.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()


def send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes = b"{}", length: int | None = None, **headers: str
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = length is not None


def slowly(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(SLOW)
    send(handler, 200)


def closed(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


def with_content(content: object) -> bytes:
    return json.dumps(
        {"model": NAME, "choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
    ).encode()


Fault = Callable[[BaseHTTPRequestHandler], None]
FAULTS: dict[str, Fault] = {  # that pass
    "closed without a response": closed,
    "429": lambda h: send(h, 429, error("slow down")),
    "429, retry after 0 seconds": lambda h: send(h, 429, error("slow down"), Retry_After="0.05"),
    "429, retry after a date": lambda h: send(h, 429, Retry_After=formatdate(time.time() + 0.1, usegmt=True)),
    "429, retry after nonsense": lambda h: send(h, 429, Retry_After="soon"),
    "500": lambda h: send(h, 500, error("internal")),
    "502 in HTML": lambda h: send(h, 502, HTML),
    "503, retry after": lambda h: send(h, 503, error("loading"), Retry_After="0"),
    "504": lambda h: send(h, 504, b""),
    "529": lambda h: send(h, 529, error("overloaded")),
    "408": lambda h: send(h, 408, b""),
    "slow": slowly,
    "half an answer": lambda h: send(h, 200, with_content("half")[:30], length=500),
    "headers alone": lambda h: send(h, 200, b"", length=500),
    "an empty body": lambda h: send(h, 200, b""),
    "malformed JSON": lambda h: send(h, 200, b'{"choices": ['),
    "a JSON list": lambda h: send(h, 200, b"[]"),
    "a JSON number": lambda h: send(h, 200, b"3"),
    "an error with status 200": lambda h: send(h, 200, error("no capacity")),
    "no choice": lambda h: send(h, 200, b'{"choices": []}'),
    "choices that are text": lambda h: send(h, 200, b'{"choices": "none"}'),
    "a message that is null": lambda h: send(h, 200, b'{"choices": [{"message": null}]}'),
    "content that is null": lambda h: send(h, 200, with_content(None)),
    "content that is a list": lambda h: send(h, 200, with_content([1])),
    "an empty answer": lambda h: send(h, 200, with_content(" \n")),
    "bytes that are no text": lambda h: send(h, 200, b"\xff\xfe\x00\x81"),
}
REFUSALS: dict[str, Fault] = {  # that do not pass
    "401": lambda h: send(
        h, 401, error(f"Incorrect API key provided: {(h.headers['Authorization'] or '').split()[-1]}")
    ),
    "403": lambda h: send(h, 403, error("forbidden")),
    "402": lambda h: send(h, 402, error("no credit")),
    "404": lambda h: send(h, 404, error("no such model")),
    "400": lambda h: send(h, 400, error("maximum context length exceeded")),
    "429, retry tomorrow": lambda h: send(h, 429, error("quota"), Retry_After="86400"),
}
