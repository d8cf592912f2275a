"""Instruction data by a text model: each request is asked once whatever happens, and what comes out trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from endpoints import FAULTS, NAME, REFUSALS, ROOT, SLOW, Endpoint, chat, listening_endpoint, rows_in
from PIL import Image
from served import MODEL, loaded, served
from typer.testing import CliRunner, Result

from modeling_aim.cli import app
from modeling_aim.llava.asking import Asking, AskingSettings, Ledger, Outcome
from modeling_aim.llava.captioned import read_captioned
from modeling_aim.llava.instructions import InstructSettings, make_instructions
from modeling_aim.llava.parsing import Unparsable, description, questions_and_answers
from modeling_aim.llava.text_model import EndpointModel, Failed, LocalModel, Request, checked_url
from modeling_aim.training import open_source

KEY = "sk-a-key-that-is-written-nowhere"


pytestmark = pytest.mark.usefixtures("loopback")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIM_ENDPOINT_KEY", KEY)


def some_requests(count: int) -> dict[str, Request]:
    return {
        f"r{n}": Request(
            ({"role": "system", "content": "describe it"}, {"role": "user", "content": f"one {n}"}), NAME, 0.0, 8
        )
        for n in range(count)
    }


def ask(endpoint: Endpoint | str, path: Path, requests: dict[str, Request], **settings: Any) -> Outcome:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    given = AskingSettings(**{"model": NAME, "endpoint": url, "timeout": SLOW / 2, "concurrency": 2, **settings})
    return Asking(given.opened(), Ledger(path), given).run(requests, "asked")


# --- faults


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_loses_nothing(chat_model: LocalModel, tmp_path: Path, fault: str) -> None:
    requests = some_requests(4)
    with listening_endpoint(chat_model, [fault, "", fault, fault]) as endpoint:
        outcome = ask(endpoint, tmp_path / "a.jsonl", requests, timeout=SLOW / 2 if fault == "slow" else 30)
        assert set(outcome.answers) == set(requests) and not outcome.unanswered and outcome.stopped is None
        assert endpoint.requests == 7 and set(endpoint.answered.values()) == {1}
        again = ask(endpoint, tmp_path / "a.jsonl", requests)
        assert again.answers == outcome.answers and endpoint.requests == 7  # nothing is asked twice
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(lines) == 7 and sum("failure" in line for line in lines) == 3


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_fault_that_stays_says_what_to_do(chat_model: LocalModel, tmp_path: Path, fault: str) -> None:
    requests = some_requests(3)
    with listening_endpoint(chat_model, ["", fault]) as endpoint:
        outcome = ask(endpoint, tmp_path / "a.jsonl", requests, concurrency=1)
        if fault == "400":  # of one request alone: the others go on
            assert outcome.stopped is None and len(outcome.answers) == 2 and endpoint.requests == 3
            assert "maximum context" in next(iter(outcome.unanswered.values()))
        else:
            assert outcome.stopped and len(outcome.answers) == 1 and endpoint.requests == 2
            expected = {"401": "AIM_ENDPOINT_KEY", "404": "--model"}.get(fault, fault[:3])
            assert expected in outcome.stopped and "1 answers are kept" in outcome.stopped
            assert KEY not in outcome.stopped
        done = ask(endpoint, tmp_path / "a.jsonl", requests)
        assert set(done.answers) == set(requests) and set(endpoint.answered.values()) == {1}
    assert KEY not in (tmp_path / "a.jsonl").read_text()


def test_an_endpoint_that_is_down_ends_the_run_and_comes_back(chat_model: LocalModel, tmp_path: Path) -> None:
    with listening_endpoint(chat_model) as endpoint:
        nowhere = endpoint.url
    outcome = ask(nowhere, tmp_path / "a.jsonl", some_requests(3), retries=2)
    assert (
        not outcome.answers
        and outcome.stopped
        and "3 times in a row" in outcome.stopped
        and nowhere in outcome.stopped
    )
    with listening_endpoint(chat_model, ["500"] * 30) as endpoint:
        assert "500" in str(ask(endpoint, tmp_path / "a.jsonl", some_requests(3), retries=1, concurrency=1).stopped)
        assert endpoint.requests == 4 or endpoint.requests == 2
    with listening_endpoint(chat_model) as endpoint:
        assert len(ask(endpoint, tmp_path / "a.jsonl", some_requests(3)).answers) == 3


def test_the_budget_stops_before_it_is_passed(chat_model: LocalModel, tmp_path: Path) -> None:
    requests = some_requests(6)
    with listening_endpoint(chat_model, ["500"]) as endpoint:
        outcome = ask(endpoint, tmp_path / "a.jsonl", requests, max_requests=4)
        assert endpoint.requests == 4 and len(outcome.answers) == 3  # the failure counts
        assert "--max-requests 4" in str(outcome.stopped) and outcome.reasons()["not asked"] == 3
        assert ask(endpoint, tmp_path / "a.jsonl", requests, max_requests=4).stopped  # earlier starts count
        assert endpoint.requests == 4
        used = Ledger(tmp_path / "a.jsonl").tokens
        limit = used + 2 * (requests["r0"].estimated_tokens + 8)
        outcome = ask(endpoint, tmp_path / "a.jsonl", requests, max_total_tokens=limit)
        assert "--max-total-tokens" in str(outcome.stopped) and 4 <= len(outcome.answers) < 6
        assert not ask(endpoint, tmp_path / "a.jsonl", requests).stopped
        assert set(endpoint.answered.values()) == {1}


def test_a_kill_in_the_middle_asks_nothing_twice(chat_model: LocalModel, tmp_path: Path) -> None:
    """SIGKILL at the seventh request: what was answered before it is not asked again, also behind a torn line."""
    code = """
import sys
from modeling_aim.llava.asking import Asking, AskingSettings, Ledger
from modeling_aim.llava.text_model import Request
from pathlib import Path
settings = AskingSettings(model="tiny-chat", endpoint=sys.argv[1], concurrency=2)
turns = lambda n: ({"role": "system", "content": "describe it"}, {"role": "user", "content": f"one {n}"})
requests = {f"r{n}": Request(turns(n), "tiny-chat", 0.0, 8) for n in range(10)}
Asking(settings.opened(), Ledger(Path(sys.argv[2])), settings).run(requests, "asked")
"""
    path, process = tmp_path / "a.jsonl", []

    def kill(number: int) -> None:
        if number == 7:
            process[0].kill()
            process[0].wait()

    with listening_endpoint(chat_model, before=kill) as endpoint:
        command = [sys.executable, "-c", code, endpoint.url, str(path)]
        env = {**os.environ, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
        process.append(subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL))
        assert process[0].wait(60) == -9
        kept = Ledger(path).answers
        assert 4 <= len(kept) <= 6
        with path.open("ab") as file:
            file.write(b'{"request": "cut off by the k')
        before = Counter(endpoint.asked)
        outcome = ask(endpoint, path, some_requests(10))
        assert len(outcome.answers) == 10
        asked_again = endpoint.asked - before
        assert sum(asked_again.values()) == 10 - len(kept)  # those alone that have no answer
        assert all(Ledger(path).answers[digest] == answer for digest, answer in kept.items())


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    for content in ('{"request": "x"}\nnot json\n', '{"request": "x", "answer": {"text": 3}}\n', "[]\n"):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"a\.jsonl, line \d"):
            Ledger(tmp_path / "a.jsonl")


def test_equal_requests_are_asked_once_and_concurrency_is_bounded(chat_model: LocalModel, tmp_path: Path) -> None:
    requests = some_requests(9) | {"again": some_requests(1)["r0"]}
    with listening_endpoint(chat_model) as endpoint:
        outcome = ask(endpoint, tmp_path / "a.jsonl", requests, concurrency=3, timeout=30)
    assert endpoint.requests == 9 and 1 < endpoint.most_under_way <= 3
    assert outcome.answers["again"] == outcome.answers["r0"] and len(outcome.answers) == 10


# --- the key and the address


def test_the_key_of_the_hub_goes_nowhere(
    chat_model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIM_ENDPOINT_KEY")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with listening_endpoint(chat_model) as endpoint:
        ask(endpoint, tmp_path / "a.jsonl", some_requests(1))
        assert endpoint.keys == {"Bearer none"}
        monkeypatch.setenv("OTHER_KEY", "another")
        ask(endpoint, tmp_path / "b.jsonl", some_requests(1), key_from="OTHER_KEY")
        assert endpoint.keys == {"Bearer none", "Bearer another"}


@pytest.mark.parametrize("given", ["NOT_SET", KEY, "hf_secret"])
def test_a_key_that_is_missing_or_typed_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"--key-from") as refused:
        EndpointModel(NAME, "http://127.0.0.1:1", key_from=given)
    assert given == "NOT_SET" or given not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["localhost:80", "ftp://host", "http://", "http://user:pw@host", "http://h/v1?key=pw", "x"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="--endpoint") as refused:
        checked_url(url)
    assert "pw" not in str(refused.value)


def test_offline_is_said(chat_model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with listening_endpoint(chat_model) as endpoint:
        assert "HF_HUB_OFFLINE" in str(ask(endpoint, tmp_path / "a.jsonl", some_requests(1)).stopped)


def test_a_served_transformers_model_is_an_endpoint(tmp_path: Path) -> None:
    """`aim serve` of aim-tiny: the real protocol."""
    with served(loaded()) as server:
        given = AskingSettings(model=MODEL, endpoint=server.url)
        request = Request(({"role": "user", "content": "what is this ?"},), MODEL, 0.0, 6)
        answer = given.opened().answer(request)
        assert answer.text and answer.prompt_tokens > 3 and answer.model == MODEL
        wrong = AskingSettings(model="other", endpoint=server.url + "/v1").opened()
        with pytest.raises(Failed, match="other"):
            wrong.answer(Request(request.messages, "other", 0.0, 6))


def test_local_models_that_cannot_be_asked_are_refused(chat_model: LocalModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--dtype 'int3'"):
        LocalModel(chat_model.name, dtype="int3")
    chat_model.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        LocalModel(str(tmp_path / "base"))
    with pytest.raises(Failed, match=r"--answer-tokens"):
        chat_model.answer(Request(({"role": "user", "content": "one"},), NAME, 0.0, 5000))


# --- what is written


def instruct(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", "instruct", *map(str, arguments)], env={"COLUMNS": "300"})


def test_what_is_made_trains(chat_model: LocalModel, tmp_path: Path) -> None:
    source, images, output = rows_in(tmp_path / "s.jsonl", 24), tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for number in range(23):  # one is missing
        Image.new("RGB", (8, 8), (number * 9, 0, 0)).save(images / f"{number}.png")
    prompts = chat.prompts(tmp_path / "prompts")
    common = [
        "--source",
        source,
        "--images",
        images,
        "--prompts",
        prompts,
        "--kinds",
        "conversation,detail,complex,episodes",
    ]
    common += ["--answer-tokens", 48, "--episodes", 5, "--shots", 2, "--temperature", 0, "--output", output]
    with listening_endpoint(chat_model) as endpoint:
        common += ["--endpoint", endpoint.url, "--model", NAME]
        dry = instruct(*common, "--dry-run")
        assert dry.exit_code == 0 and not endpoint.requests and "92 requests" in dry.output, dry.output
        done = instruct(*common)
        assert done.exit_code == 0 and endpoint.requests == 92, done.output
        again = instruct(*common)
        assert again.exit_code == 0 and endpoint.requests == 92 and "92 of them answered before" in again.output
    assert "image that is not in" in done.output and KEY not in done.output
    records = json.loads((output / "instructions.json").read_text())
    assert records and all(record["conversations"][0]["value"].count("<image>") == 1 for record in records)
    kinds = [len(json.loads((output / f"{kind}.json").read_text())) for kind in ("conversation", "detail", "complex")]
    unparsable = (output / "unparsable.jsonl").read_text().splitlines()
    assert sum(kinds) == len(records) and min(kinds) > 0
    assert len(records) + sum(not json.loads(line)["for"].startswith("style") for line in unparsable) == 69
    source_of_pairs, _ = open_source(f"llava:{output / 'instructions.json'},images={images}")
    pairs = [document[0] for document in source_of_pairs.documents(0)]
    report = json.loads((output / "report.json").read_text())
    assert len(pairs) == report["pairs"] and not source_of_pairs.skipped
    assert all(Path(pair["image"]).is_file() for pair in pairs)
    for path in output.iterdir():
        assert KEY.encode() not in path.read_bytes()


def test_episodes_hold_what_they_hide(chat_model: LocalModel, tmp_path: Path) -> None:
    rows = rows_in(tmp_path / "s.jsonl", 40)
    settings = InstructSettings(
        source=rows, output=tmp_path / "out", kinds=("episodes",), episode_kinds=("naming", "rule"), episodes=20
    )
    made = make_instructions(settings)
    assert made is not None and made.counts["naming episodes"] == made.counts["rule episodes"] == 20
    by_image = {row.image: row for row in read_captioned(rows, None, None, Counter())}
    for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines():
        episode = json.loads(line)
        pairs = [*episode["demos"], *episode["queries"]]
        assert (
            len(pairs) == 5
            and len({pair["image"] for pair in pairs}) == 5
            and len({p["question"] for p in pairs}) == 1
        )
        answers = [pair["answer"] for pair in pairs]
        assert answers[-1] in answers[:-1] and len(set(answers)) > 1
        if episode["kind"] == "naming":
            names = {name: category for category, name in episode["hidden"]["names"].items()}
            for pair in pairs:
                categories = {box.category for box in by_image[pair["image"]].boxes}
                assert categories & set(names.values()) == {names[pair["answer"]]}
    assert next(open_source(f"episodes:{tmp_path / 'out' / 'episodes.jsonl'}")[0].documents(0))
    first = (tmp_path / "out" / "episodes.jsonl").read_bytes()
    make_instructions(settings)
    assert (tmp_path / "out" / "episodes.jsonl").read_bytes() == first


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("Question:\na ?\n===\nAnswer:\nb", [("a ?", "b")]),
        ("question: a ?\n====\n  Answer:  b\nc\n===\n", [("a ?", "b\nc")]),
        (
            "**Question:**\na ?\n===\n**Answer:**\nb\n===\nQuestion:\nc\n===\nAnswer:\nd = e",
            [("a ?", "b"), ("c", "d = e")],
        ),
        ("Question:\na\nAnswer:\nb", None),
        ("Question:\na\n===\nQuestion:\nb", None),
        ("Answer:\na", None),
        ("Here you are.\n===\nQuestion:\na\n===\nAnswer:\nb", None),
        ("Question:\na\n===\nAnswer:\n", None),
        ("Question:\na\n===\nAnswer:\nb\n===\nQuestion:\nc", None),
    ],
)
def test_answers_parse_or_are_listed(text: str, pairs: Any) -> None:
    if pairs is None:
        with pytest.raises(Unparsable):
            questions_and_answers(text)
    else:
        assert questions_and_answers(text) == pairs


def test_what_was_cut_off_is_left_out() -> None:
    text = "Question:\na\n===\nAnswer:\nb\n===\nQuestion:\nc\n===\nAnswer:\nhal"
    assert questions_and_answers(text, is_cut=True) == [("a", "b")]
    for cut in ("Question:\na\n===\nAnswer:\nhal", "Question:"):
        with pytest.raises(Unparsable, match="cut off"):
            questions_and_answers(cut, is_cut=True)
    with pytest.raises(Unparsable, match="cut off"):
        description("A long", is_cut=True)
    with pytest.raises(Unparsable, match="description"):
        description("Question:\na\n===\nAnswer:\nb")
