"""A server of aim-tiny in this process, and chats for it and for the pipeline."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from PIL import Image
from transformers import pipeline

from modeling_aim import AimForConditionalGeneration
from modeling_aim.cli.serve import check_installed
from modeling_aim.serving.app import build_app
from modeling_aim.serving.requests import ServingLimits

ROOT = Path(__file__).resolve().parents[1]
AIM_TINY, IMAGES = ROOT / "hub_configs" / "aim-tiny", ROOT / "examples" / "images"
MODEL, QUESTION = "aim-tiny", "what is this ?"
NAMES = ("fibra", "gacre")
SHOWN = [(f"{name}-{number}.png", f"this is {name} .") for number in (1, 2) for name in NAMES]


@contextmanager
def listening(command: list[str], **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and where it listens; it is killed at the end."""
    env = {**os.environ, **environment}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            lines, found = [], None
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on (http://\S+)", line):
                    break
            assert found, "".join(lines)
            yield process, found[1]
        finally:
            process.kill()


def picture(name: str) -> Image.Image:
    """A picture of the examples, which draw made-up concepts."""
    return Image.open(IMAGES / name).convert("RGB")


def data_url(image: Image.Image) -> str:
    """An image as it is sent."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat(shown: Any = SHOWN, query: str = "query.png", question: str = QUESTION, sent: bool = True) -> list[Any]:
    """A few-shot chat: as it is sent, or with open images for the pipeline."""

    def user(name: str) -> dict[str, Any]:
        image: dict[str, Any] = {"type": "image", "image": picture(name)}
        if sent:
            image = {"type": "image_url", "image_url": {"url": data_url(picture(name))}}
        return {"role": "user", "content": [image, {"type": "text", "text": question}]}

    turns = []
    for name, answer in shown:
        turns += [user(name), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return [*turns, user(query)]


def loaded() -> Any:
    """aim-tiny, as the server loads it."""
    return AimForConditionalGeneration.from_pretrained(str(AIM_TINY))


class Asked:
    """The pipeline on a model, to compare with; it keeps the space between a prompt and its answer, which goes."""

    def __init__(self, model: Any) -> None:
        self.pipe = pipeline("image-text-to-text", model=model, processor=model.processor)

    def __call__(self, turns: list[Any], **generate: Any) -> str:
        answer = self.pipe(text=turns, return_full_text=False, generate_kwargs=generate)
        return str(answer[0]["generated_text"]).strip()


class Server:
    """A server in a thread of this process.

    Args:
        app: what `build_app` made.
    """

    def __init__(self, app: Any) -> None:
        self.app, self.thread = app, app.app.state.thread
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
        self.runner = threading.Thread(target=self.server.run, daemon=True)
        self.runner.start()
        while not self.server.started:
            self.runner.join(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    @cached_property
    def client(self) -> openai.OpenAI:
        """The official client, which does not try again."""
        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        """A counter of the server."""
        return metric(self.app.metrics.page().decode(), name)

    def stop(self) -> None:
        self.server.should_exit = True
        self.runner.join(20)
        assert not self.runner.is_alive()


def metric(page: str, name: str) -> float:
    """The value of a metric on a page of `/metrics`."""
    return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name + " "))


@contextmanager
def served(model: Any, banks: Any = None, **limits: Any) -> Iterator[Server]:
    """A running server of a model; the test is skipped where transformers has no server that it is built on."""
    try:
        check_installed()
    except ImportError as missing:
        pytest.skip(str(missing))
    server = Server(build_app(MODEL, model, banks, ServingLimits(**limits)))
    try:
        yield server
    finally:
        server.stop()
