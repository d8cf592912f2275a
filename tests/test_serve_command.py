"""`aim serve` as it is started: under load, with bad requests among the good ones, until SIGTERM."""

from __future__ import annotations

import json
import math
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from modeling_aim.cli.serve import check_installed

try:
    check_installed()
except ImportError as missing:  # the oldest transformers that are supported have another server
    pytest.skip(str(missing), allow_module_level=True)

import openai
from backbones import plugin
from served import AIM_TINY, NAMES, QUESTION, SHOWN, Asked, chat, listening, loaded, metric, picture
from typer.testing import CliRunner

from modeling_aim import DemonstrationBank
from modeling_aim.cli import app

CLIENTS = 8
BAD: tuple[dict[str, Any], ...] = (
    {"messages": []}, {"messages": chat([])[:1] * 70}, {"model": "gpt"}, {"temperature": 7}, {"messages": chat()[:-1]},
    {"extra_body": {"demos": "nothing"}}, {"extra_body": {"demos": "shapes", "shots": 999}}, {"max_tokens": 0},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,AA"}}]}]},
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return loaded()


@pytest.fixture(scope="module")
def bank(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("banks") / "shapes"
    demos = [{"image": picture(f"{name}-{n}.png"), "label": name} for n in (1, 2) for name in NAMES]
    DemonstrationBank.build(model, demos, folder)
    return folder


def started(*arguments: str) -> AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    """A server process, and where it listens."""
    return listening([sys.executable, "-m", "modeling_aim", "serve", *arguments, "--port", "0"])


class Client(threading.Thread):
    """Asks until it is stopped; what was wrong is in `wrong`.

    Args:
        url: of the server.
        questions: fields of good requests, with their answers.
        seed: decides what is asked.
    """

    def __init__(self, url: str, questions: list[tuple[dict[str, Any], str]], seed: int) -> None:
        super().__init__(daemon=True)
        self.api = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)
        self.port = int(url.rpartition(":")[2])
        self.questions, self.random = questions, random.Random(seed)
        self.stopped_at, self.right, self.refused = math.inf, 0, 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while time.monotonic() < self.stopped_at:
            began = time.monotonic()
            try:
                self.random.choices((self.good, self.bad, self.hang_up), (8, 3, 1))[0]()
            except (openai.APIConnectionError, OSError) as error:
                if began < self.stopped_at - 0.1:  # it was at work when the server was told to stop
                    self.wrong.append(repr(error))
                return

    def good(self) -> None:
        fields, wanted = self.random.choice(self.questions)
        stream = self.random.random() < 0.3
        answer: Any = self.api.chat.completions.create(model="aim", stream=stream, **fields)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
        if text.strip() == wanted:
            self.right += 1
        else:
            self.wrong.append(f"{text!r} instead of {wanted!r}")

    def bad(self) -> None:
        fields = {**self.questions[0][0], **self.random.choice(BAD)}
        try:
            self.api.chat.completions.create(**{"model": "aim", **fields})
            self.wrong.append(f"{fields!s:.200} was answered")
        except openai.APIStatusError as error:
            self.refused += 1
            if not 400 <= error.status_code < 500 or error.status_code == 429:
                self.wrong.append(str(error))

    def hang_up(self) -> None:
        body = json.dumps({"model": "aim", "stream": self.random.random() < 0.5, **self.questions[0][0]}).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(self.random.random() / 20)


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_eight_clients_with_bad_requests_among_them(model: Any, bank: Path, seconds: int) -> None:
    """Every answer is right, memory does not grow, and SIGTERM under load lets what is at work end."""
    asked = Asked(model)
    questions: list[tuple[dict[str, Any], str]] = []
    for shown in (SHOWN, SHOWN[1:], SHOWN[::-1], []):
        questions.append(({"messages": chat(shown)}, asked(chat(shown, sent=False))))
    opened = DemonstrationBank.from_pretrained(bank, model)
    for fields in ({}, {"shots": 2, "select": "image"}):
        wanted = asked(chat([], sent=False), demos=opened, **fields)
        questions.append(({"messages": chat([]), "extra_body": {"demos": "shapes", **fields}}, wanted))
    with started(str(AIM_TINY), "--name", "aim", "--bank", str(bank)) as (process, url):
        clients = [Client(url, questions, seed) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(seconds / 2)
        before = resident(url)
        time.sleep(seconds / 2)
        after = resident(url)
        for client in clients:
            client.stopped_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    for client in clients:
        client.join(20)
    assert not [wrong for client in clients for wrong in client.wrong]
    assert sum(client.right for client in clients) > CLIENTS and sum(client.refused for client in clients)
    assert after - before < 40 * 2**20, f"{(after - before) / 2**20:.0f} MB"
    assert "Traceback" not in log and "never retrieved" not in log, log


def resident(url: str) -> float:
    """Bytes that the server has in memory."""
    with urlopen(url + "/metrics") as answer:
        return metric(answer.read().decode(), "process_resident_memory_bytes")


def refusal(*arguments: str) -> str:
    """The line in which a server that does not start says why."""
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 1, done.output
    return " ".join(done.output.split())


def test_a_server_that_cannot_start_says_why(model: Any, bank: Path, tmp_path: Path) -> None:
    tiny = str(AIM_TINY)
    assert "--queue 0: expected at least 1" in refusal(tiny, "--queue", "0")
    assert "image_sources='all'" in refusal(tiny, "--image-sources", "all")
    assert "each name once" in refusal(tiny, "--bank", str(bank), "--bank", f"shapes={bank}")
    assert "REPO must be given" in refusal()
    other = plugin("llava")
    read = other.model.read([{"image": picture("query.png"), "question": QUESTION, "answer": "a dax"}])
    DemonstrationBank(read).save_pretrained(tmp_path / "other")
    assert "were read by another model" in refusal(tiny, "--bank", str(tmp_path / "other"))
    other.model.save_pretrained(tmp_path / "repo", include_backbone=True)
    assert "were read by another model" in refusal(str(tmp_path / "repo"), "--bank", str(bank))
