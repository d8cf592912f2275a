"""The server: the answers of the pipeline, demonstrations that are read once, and one clear sentence for the rest."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from backbones import plugin

from modeling_aim.cli.serve import check_installed

try:
    check_installed()
except ImportError as missing:  # the oldest transformers that are supported have another server
    pytest.skip(str(missing), allow_module_level=True)

import openai
from PIL import Image
from served import (
    IMAGES,
    MODEL,
    NAMES,
    QUESTION,
    SHOWN,
    Asked,
    Server,
    chat,
    data_url,
    loaded,
    metric,
    picture,
    served,
)

from modeling_aim import DemonstrationBank
from modeling_aim.serving.app import build_app
from modeling_aim.serving.demonstrations import PromptBuilder
from modeling_aim.serving.requests import Refused, ServingLimits, checked_request


@pytest.fixture(scope="module")
def model() -> Any:
    return loaded()


@pytest.fixture(scope="module")
def banks(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A bank of eight demonstrations, and one that no prompt can hold."""
    demos = [
        {"image": picture(f"{name}-{number}.png").rotate(angle), "question": QUESTION, "answer": f"this is {name} ."}
        for angle in (0, 90) for number in (1, 2) for name in NAMES
    ]  # fmt: skip
    bank = DemonstrationBank.build(model, demos, tmp_path_factory.mktemp("bank"))
    return {"shapes": bank, "long": DemonstrationBank(bank[list(range(8)) * 80])}


@pytest.fixture(scope="module")
def server(model: Any, banks: dict[str, Any]) -> Iterator[Server]:
    with served(model, banks, max_body_mb=2) as running:
        yield running


@pytest.fixture(scope="module")
def asked(model: Any) -> Asked:
    return Asked(model)


def ask(server: Server, messages: Any = None, **fields: Any) -> Any:
    messages = chat() if messages is None else messages
    return server.client.chat.completions.create(model=MODEL, messages=messages, **fields)


def said(server: Server, messages: Any = None, **fields: Any) -> str:
    return str(ask(server, messages, **fields).choices[0].message.content)


def streamed(server: Server, messages: Any = None, **fields: Any) -> tuple[str, Any]:
    """The text of a streamed answer, and its usage."""
    chunks = list(ask(server, messages, stream=True, **fields))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].usage


# --- answers


def test_answers_are_those_of_the_pipeline(server: Server, asked: Asked) -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "this is small ."}]}
    for shown in (SHOWN, SHOWN[:2], SHOWN[::-1], []):
        wanted = asked(chat(shown, sent=False))
        assert said(server, chat(shown)) == wanted
        assert streamed(server, chat(shown))[0].strip() == wanted
    assert said(server, [system, *chat()]) == asked([system, *chat(sent=False)])
    words = [{"role": "user", "content": "what is this ?"}]
    assert said(server, words) == asked([{"role": "user", "content": [{"type": "text", "text": "what is this ?"}]}])
    assert said(server) == "this is gacre ."


def test_a_chat_about_an_earlier_image_is_an_ordinary_chat(server: Server, asked: Asked) -> None:
    more = [{"role": "user", "content": [{"type": "text", "text": "what is its colour ?"}]}]
    answer = ask(server, chat(SHOWN[:1])[:2] + more)
    assert answer.choices[0].message.content == asked(chat(SHOWN[:1], sent=False)[:2] + more)
    assert answer.usage.aim["demonstrations"] == 0


def test_banks_answer_as_in_the_pipeline(server: Server, asked: Asked, banks: dict[str, Any]) -> None:
    bank, alone = banks["shapes"], chat([], sent=False)
    for fields in (
        {}, {"shots": 3}, {"shots": 4, "select": "image"}, {"select": {"by": "text", "balanced": False}, "shots": 2},
        {"shots": 2, "select": [5, 1]},
    ):  # fmt: skip
        wanted = asked(alone, demos=bank, **fields)
        assert said(server, chat([]), extra_body={"demos": "shapes", **fields}) == wanted
    both = ask(server, chat(SHOWN[:1]), extra_body={"demos": "shapes", "shots": 2, "select": [0, 1]})
    assert both.choices[0].message.content == asked(chat(SHOWN[:1], sent=False), demos=bank, shots=2, select=[0, 1])
    assert both.usage.aim["demonstrations"] == 3


def test_generation_settings(server: Server, asked: Asked) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(server, **{name: 2})
        assert answer.choices[0].message.content == asked(chat(sent=False), max_new_tokens=2)
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 2)
    assert said(server, stop=["gacre"]).endswith("gacre")
    assert said(server, temperature=0) == said(server, extra_body={"n": 1, "user": "me", "presence_penalty": 0})
    drawn = {seed: said(server, temperature=2, max_tokens=8, seed=seed) for seed in range(4)}
    assert len(set(drawn.values())) > 1
    assert all(said(server, temperature=2.0, max_tokens=8, seed=seed) == text for seed, text in drawn.items())
    config = json.dumps({"max_new_tokens": 2, "do_sample": False, "eos_token_id": [1]})  # of `transformers chat`
    assert said(server, extra_body={"generation_config": config}) == asked(chat(sent=False), max_new_tokens=2)


# --- read once


def test_the_second_call_reads_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the vision tower and where images are opened."""
    builder, passes, opened = PromptBuilder(model, {}), [], []
    tower = next(part for name, part in model.backbone.named_modules() if name.endswith("vision_tower"))
    hook = tower.register_forward_pre_hook(lambda *_: passes.append(1))
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: (opened.append(image.filename), load(image))[1])
    monkeypatch.setattr(Image.Image, "filename", "", raising=False)
    request = checked_request({"messages": chat()}, ServingLimits())
    first = builder.build(request)
    assert (first.demonstrations, first.read, first.cached) == (4, 4, 0) and passes
    images = len(opened)
    passes.clear(), opened.clear()
    again = builder.build(request)
    hook.remove()
    assert (again.read, again.cached, len(passes)) == (0, again.fused, 0)
    assert 0 < len(opened) <= images / 4  # the query's alone
    assert torch.equal(first.inputs["demos"].vectors, again.inputs["demos"].vectors)


def test_an_equal_turn_is_read_once_and_order_counts(model: Any) -> None:
    builder = PromptBuilder(model, {})
    twice = builder.build(checked_request({"messages": chat([*SHOWN, *SHOWN])}, ServingLimits()))
    assert (twice.demonstrations, twice.read) == (8, 4)
    turned = builder.build(checked_request({"messages": chat(SHOWN[::-1])}, ServingLimits()))
    assert turned.read == 0
    assert torch.equal(turned.inputs["demos"].vectors, twice.inputs["demos"][[3, 2, 1, 0]].vectors)
    other = builder.build(checked_request({"messages": chat(SHOWN, question="what is that ?")}, ServingLimits()))
    assert other.read == 4


def test_usage_counts_fused_tokens_and_what_they_save(model: Any) -> None:
    with served(model) as server:
        first, second = ask(server).usage, ask(server).usage
        stream = streamed(server)[1]
        assert server.metric("aim_demonstrations_read_total") == 4
        assert server.metric("aim_demonstrations_total") == 12
    fused = model.read([{"image": picture(name), "question": QUESTION, "answer": text} for name, text in SHOWN])
    full = model.processor.apply_chat_template(
        chat(sent=False), few_shot_chats=False, tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True,
    )["input_ids"]  # fmt: skip
    alone = model.processor.apply_chat_template(
        chat([], sent=False), tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )["input_ids"]
    image = model.config.backbone_config.image_token_id
    saved = int((full == image).sum() - (alone == image).sum())
    assert first.aim == {"demonstrations": 4, "read": 4, "fused_tokens": fused.num_tokens, "saved_tokens": saved}
    assert second.aim == {**first.aim, "read": 0} == stream.aim
    for usage, cached in ((first, 0), (second, fused.num_tokens), (stream, fused.num_tokens)):
        assert usage.prompt_tokens == alone.shape[1] + fused.num_tokens
        assert usage.prompt_tokens_details.cached_tokens == cached
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


# --- bad input

IMAGE = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (2, 2)))}}
LARGE = {"type": "image_url", "image_url": {"url": data_url(Image.new("L", (5000, 4000)))}}


def image_at(url: Any) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def spoken(content: Any, role: Any = "user") -> list[Any]:
    return [{"role": role, "content": content}]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"messages": image_at("")}, "has no image"),
    "an empty image": ({"messages": image_at("data:image/png;base64,")}, "has no image"),
    "no URL": ({"messages": image_at(None)}, "has no image"),
    "no picture": ({"messages": image_at("data:image/png;base64,AAAA")}, "is not an image file, or it is damaged"),
    "a URL": ({"messages": image_at("http://127.0.0.1:1/a.png")}, "no URL is fetched"),
    "a file": ({"messages": image_at(str(Path(__file__).parents[1] / "docs" / "demo.png"))}, "no file"),
    "a file's URL": ({"messages": image_at("file:///etc/passwd")}, "no file"),
    "a large image": ({"messages": spoken([LARGE])}, "5000 x 4000 pixels, more than"),
    "ten thousand images": ({"messages": spoken([IMAGE] * 10_000)}, "has 10000 images; this server takes 64"),
    "images of a turn": ({"messages": spoken([IMAGE] * 30)}, "has 30 images; this server takes 16"),
    "images of a long chat": ({"messages": spoken([IMAGE] * 9) * 2}, "18 images are in the prompt; this server"),
    "a bad demonstration": ({"messages": [*image_at("data:,AAAA"), *spoken("dax", "assistant"), *chat([])]}, "is no"),
    "no messages": ({"messages": []}, "at least one message"),
    "messages of another type": ({"messages": {"role": "user"}}, "must be a list"),
    "no message": ({"messages": [7]}, r"messages\[0\] must be an object"),
    "another role": ({"messages": spoken("a", "tool")}, "has the role 'tool'"),
    "no content": ({"messages": spoken(None)}, r"messages\[0\] has no content"),
    "no part": ({"messages": spoken([None])}, "must be an object with type"),
    "audio": ({"messages": spoken([{"type": "input_audio"}])}, "takes text and image_url"),
    "a lone surrogate": ({"messages": spoken("\ud800")}, "lone surrogate"),
    "no question": ({"messages": [*chat()[:2]]}, "role assistant; expected user"),
    "another model": ({"model": "gpt"}, "'gpt' is not served here; this server has 'aim-tiny'"),
    "no model's name": ({"model": 5}, "5 is not served here"),
    "no such bank": ({"demos": "dogs"}, "names no bank of this server; it has shapes, long"),
    "no bank's name": ({"demos": ["shapes"]}, "names no bank"),
    "a bank that does not fit": ({"demos": "long"}, "fused tokens, but the backbone has 4096 positions"),
    "too many shots": ({"demos": "long", "shots": 600}, "but the model has 4096 positions"),
    "absurd shots": ({"demos": "long", "shots": 10**6}, "each demonstration needs some"),
    "more shots than there are": ({"demos": "shapes", "shots": 9}, "bank that has 8"),
    "no shots": ({"demos": "shapes", "shots": 0}, "shots=0: expected a whole number from 1"),
    "shots of nothing": ({"shots": 2}, "give its name as demos"),
    "another strategy": ({"demos": "shapes", "select": "best"}, "best"),
    "an odd strategy": ({"demos": "shapes", "select": {"by": {"a": 1}}}, "select="),
    "a number out of the bank": ({"demos": "shapes", "shots": 1, "select": [99]}, "99"),
    "too hot": ({"temperature": 3}, "temperature=3: expected a number from 0 to 2"),
    "a temperature in words": ({"temperature": "hot"}, "temperature='hot'"),
    "too long an answer": ({"max_tokens": 10**9}, "from 1 to 1024"),
    "a fraction of a token": ({"max_tokens": 1.5}, "expected a whole number"),
    "several answers": ({"n": 3}, "n=3 is not supported"),
    "log-probabilities": ({"logprobs": True}, "logprobs=True is not supported"),
    "a template": ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs="),
    "settings of another kind": ({"generation_config": "[1]"}, "expected a JSON object as text"),
    "many stops": ({"stop": ["a"] * 5}, "expected at most 4 texts"),
    "another stream": ({"stream": "yes"}, "stream='yes'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_one_sentence(server: Server, name: str) -> None:
    fields, wanted = BAD[name]
    body = {"model": MODEL, "messages": chat([]), **fields}
    status, message = post(server, json.dumps(body).encode())
    assert 400 <= status < 500, message
    assert re.search(wanted, message), message
    assert "\n" not in message and len(message) < 300 and message.rstrip().endswith(".")
    assert "Traceback" not in message and "base64,A" not in message


def post(server: Server, body: bytes, path: str = "/v1/chat/completions") -> tuple[int, str]:
    """Status and message of an answer, by a bare connection."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode())
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    head, _, content = answer.decode().partition("\r\n\r\n")
    return int(head.split()[1]), json.loads(content)["error"]["message"]


@pytest.mark.parametrize("body", [b"{bad", b"", b"[]", b"7", b"[" * 100_000, b'{"messages": "\xff"}', b"NaN"])
def test_a_body_that_is_no_json_object(server: Server, body: bytes) -> None:
    status, message = post(server, body)
    assert status == 400
    assert message.startswith(("The body is not a JSON object", "There was an error parsing the body.")), message


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_a_body_of_200_mb_is_not_kept(server: Server, declared: bool) -> None:
    part, before, most = b"x" * 2**20, resident(), 0
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        length = f"Content-Length: {200 * len(part)}" if declared else "Transfer-Encoding: chunked"
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n{length}\r\n\r\n".encode())
        for _ in range(200):
            connection.sendall(part if declared else b"100000\r\n" + part + b"\r\n")
            most = max(most, resident())
        connection.sendall(b"" if declared else b"0\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 413")
    assert most - before < 50 * 2**20
    assert said(server) == "this is gacre ."


def test_other_routes_do_not_exist(server: Server) -> None:
    for path in ("/v1/completions", "/v1/responses", "/reset", "/v1/audio/transcriptions", "/docs"):
        assert post(server, b"{}", path)[0] == 404


def test_health_models_and_metrics(server: Server) -> None:
    with urlopen(server.url + "/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    assert [one.id for one in server.client.models.list()] == [MODEL]
    said(server)
    with urlopen(server.url + "/metrics") as answer:
        page = answer.read().decode()
    assert metric(page, "aim_requests_at_work") == 0 and metric(page, "process_resident_memory_bytes") > 0
    assert metric(page, 'aim_requests_total{status="200"}') > 0


# --- several clients


@contextmanager
def held(server: Server) -> Iterator[None]:
    """The thread of the model is busy, so that requests wait."""
    free = threading.Event()
    server.thread.submit(free.wait, 30)
    try:
        yield
    finally:
        free.set()


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_more_clients_than_slots(model: Any) -> None:
    """Those who find a slot get their answer, the others 429, and one who comes later an answer again."""
    with served(model, queue=3) as server, ThreadPoolExecutor(8) as clients:
        with held(server):
            waiting = [clients.submit(said, server) for _ in range(3)]
            until(lambda: server.metric("aim_requests_at_work") == 3)
            with pytest.raises(openai.RateLimitError, match="3 requests are at work or waiting") as refused:
                said(server)
            assert refused.value.response.headers["retry-after"] == "1"
            assert server.client.models.list()  # answers at once
        assert [answer.result() for answer in waiting] == ["this is gacre ."] * 3
        assert said(server) == "this is gacre ."
        until(lambda: server.metric("aim_requests_at_work") == 0)  # a slot is given back behind the answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_leaves_its_slot(model: Any, stream: bool) -> None:
    """Before its turn it costs no work; in the middle of an answer, generation stops."""
    body = json.dumps({"messages": chat([]), "stream": stream}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    steps: list[int] = []
    with served(model, queue=2) as server:
        with held(server):
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", server.port)) as connection:
                    connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    until(lambda: server.metric("aim_requests_at_work") == 1)
                until(lambda: server.metric("aim_requests_at_work") == 0)
        assert server.metric("aim_clients_hung_up_total") == 5

        def slowly(*_: Any) -> None:
            steps.append(1)
            time.sleep(0.02)

        hook = model.backbone.lm_head.register_forward_pre_hook(slowly)
        long = json.dumps({"messages": chat([]), "stream": stream, "max_tokens": 400, "temperature": 2}).encode()
        model.generation_config.eos_token_id, eos = None, model.generation_config.eos_token_id
        try:
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head.encode() + f"Content-Length: {len(long)}\r\n\r\n".encode() + long)
                until(lambda: len(steps) > 3)
            until(lambda: server.metric("aim_requests_at_work") == 0)
            server.thread.wait()
        finally:
            hook.remove()
            model.generation_config.eos_token_id = eos
        assert 3 < len(steps) < 100
        assert server.metric("aim_clients_hung_up_total") == 6
        assert said(server) == "this is gacre ."


def test_a_client_that_sends_slowly(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_aim.serving.app.BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 408")


def test_many_demonstrations_are_opened_a_few_at_a_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = PromptBuilder(model, {})
    together: list[int] = []
    read = builder._read

    def counted(raw: Any) -> Any:
        together.append(sum(len(demo["images"]) for demo in raw))
        return read(raw)

    monkeypatch.setattr(builder, "_read", counted)
    turns: list[Any] = []
    for number in range(20):
        image = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (8, 8), (number, 0, 0)))}}
        turns += [*spoken([image] * (1 + number % 3)), *spoken(f"number {number}", "assistant")]
    prompt = builder.build(checked_request({"messages": turns + chat([])}, ServingLimits()))
    assert prompt.demonstrations == prompt.read == 20 and sum(together) == 39 and max(together) <= 16


def test_half_a_request_is_dropped(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf")
        until(lambda: server.metric("aim_requests_at_work") == 1)
    until(lambda: server.metric("aim_requests_at_work") == 0)
    assert said(server) == "this is gacre ."


# --- starting


def test_images_from_elsewhere_are_opened_where_it_is_allowed(model: Any) -> None:
    path = str(IMAGES / "query.png")
    with served(model, image_sources="any") as server:
        assert said(server, [*chat()[:-1], *image_at(path)]) and PromptBuilder(model, {})
    request = checked_request(
        {"messages": [*image_at(path), *spoken("dax", "assistant"), *image_at(path)]}, ServingLimits()
    )
    model.processor.image_sources = "any"
    builder = PromptBuilder(model, {})
    try:
        assert [builder.build(request).read for _ in range(2)] == [1, 1]  # what is behind a path may have changed
    finally:
        model.processor.image_sources = "given"


def test_limits_are_checked_before_the_start(model: Any) -> None:
    with pytest.raises(ValueError, match="image_sources='all'"):
        build_app(MODEL, model, limits=ServingLimits(image_sources="all"))
    with pytest.raises(Refused, match="takes 2 at most"):
        checked_request({"messages": chat(SHOWN)}, ServingLimits(max_images=2))
    idefics = plugin("idefics").model
    with pytest.raises(ValueError, match="no chat template"):
        build_app("idefics", idefics)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_other_families_are_served(family: str) -> None:
    made = plugin(family)
    wanted = Asked(made.model)(chat(sent=False), max_new_tokens=6, do_sample=False)
    with served(made.model) as server:
        answer = ask(server, max_tokens=6, temperature=0)
    assert answer.choices[0].message.content.strip() == wanted
    assert answer.usage.aim["saved_tokens"] > 0
