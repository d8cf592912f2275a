"""`transformers serve` and `chat`, and the any-to-any pipeline, take a repository as it is, without this package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from backbones import run_without_package
from forked import run_python

from modeling_aim.cli.serve import check_installed

try:
    check_installed()
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)

import openai
from served import AIM_TINY, IMAGES, MODEL, SHOWN, chat, listening, loaded, served

WITHOUT = "import sys; sys.modules['modeling_aim'] = None; from transformers.cli.transformers import main; main()"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where `transformers serve` listens."""
    command = [sys.executable, "-c", WITHOUT, "serve", str(AIM_TINY), "--trust-remote-code", "--port", "0"]
    with listening(command, HF_HUB_OFFLINE="1") as (_, address):
        yield address


def test_earlier_turns_are_demonstrations(url: str) -> None:
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model=str(AIM_TINY), messages=chat(SHOWN))
    assert answer.choices[0].message.content == "this is gacre ."
    assert answer.usage is not None and answer.usage.prompt_tokens == 71  # fused tokens are not counted there
    stream = client.chat.completions.create(model=str(AIM_TINY), messages=chat(SHOWN), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream).strip() == "this is gacre ."


@pytest.mark.parametrize("own", [False, True], ids=["transformers serve", "aim serve"])
def test_chat_talks_to_both_servers(request: pytest.FixtureRequest, own: bool) -> None:
    with served(loaded()) if own else nullcontext() as server:
        name, place = (MODEL, server.url) if server else (str(AIM_TINY), request.getfixturevalue("url"))
        command = ["-c", WITHOUT, "chat", name, place, "do_sample=False", "max_new_tokens=3"]
        online = {**os.environ, "HF_HUB_OFFLINE": "0"}  # offline, it does not even ask this host
        words = "what is this ?\nn\n!exit\n"  # n: it asks whether to go on behind the last token
        done = run_python(command, online, words=words)
    assert done.returncode == 0, done.stderr
    assert "this is" in done.stdout.split("Assistant")[-1].split(name)[-1], done.stdout


def test_the_any_to_any_pipeline() -> None:
    code = """
from transformers import AutoModelForMultimodalLM, pipeline
place = given["repository"]
model = AutoModelForMultimodalLM.from_pretrained(place, trust_remote_code=True)
answers = [type(model).__name__]
for task in ("any-to-any", "image-text-to-text"):
    pipe = pipeline(task, model=place, trust_remote_code=True)
    call = {"images": given["query"], "text": pipe.processor.prompt("what is this ?"), "return_full_text": False}
    for demos in ({}, {"generate_kwargs": {"demos": [tuple(demo) for demo in given["demos"]]}}):
        answers.append(pipe(**call, **demos)[0]["generated_text"])
print(json.dumps(answers))
"""
    demos = [(str(IMAGES / name), "what is this ?", text) for name, text in SHOWN]
    given = {"repository": str(AIM_TINY), "query": str(IMAGES / "query.png"), "demos": demos}
    kind, *answers = run_without_package(code, given)
    assert kind == "AimForConditionalGeneration"
    assert answers[:2] == answers[2:] and answers[1].strip() == "this is gacre ." and answers[0] != answers[1]
