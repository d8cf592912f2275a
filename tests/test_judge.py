"""The judge of LLaVA-Bench: scores and summary as published, honest ones beside them, both orders, resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from endpoints import NAME, chat, listening_endpoint
from PIL import Image
from served import AIM_TINY, IMAGES
from typer.testing import CliRunner, Result

from modeling_aim.cli import app
from modeling_aim.llava.judge import JudgeSettings, read_comparisons
from modeling_aim.llava.rules import OWN_RULES, SYSTEM, read_rules
from modeling_aim.llava.scores import FAILED, honest_scores, honest_summary, published_scores, published_summary
from modeling_aim.llava.text_model import LocalModel

GOLDEN = Path(__file__).with_name("golden_reviews.json")
SHAPES = json.loads(GOLDEN.read_text(encoding="utf-8"))


pytestmark = pytest.mark.usefixtures("loopback")


# --- scores


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: ascii(shape["review"])[:40])
def test_reviews_of_every_shape(shape: dict[str, Any]) -> None:
    """What the published code reads of it, and what an honest reader does."""
    assert published_scores(shape["review"]) == shape["published"]
    honest = honest_scores(shape["review"])
    assert (None if honest is None else list(honest)) == shape["honest"]


def test_scores_that_are_no_number_pass_as_published() -> None:
    """`float` takes them, so the published code does too; an honest reader does not."""
    assert math.isnan(published_scores("nan 8")[0]) and published_scores("inf 8") == [math.inf, 8.0]
    assert honest_scores("nan 8") is None and honest_scores("inf 8") is None


def test_the_published_summary_by_hand() -> None:
    """conv: (8, 6), (9, 9), failed: means 16/3 = 5.333 and 14/3 = 4.667. detail: (7, 5). all: 23/4 and 19/4."""
    pairs = [("conv", [8.0, 6.0]), ("conv", [9.0, 9.0]), ("conv", FAILED), ("detail", [7.0, 5.0])]
    reviews = [{"category": name, "tuple": pair} for name, pair in pairs]
    assert published_summary(reviews) == {
        "all": {"relative": 82.6, "reference": 57.5, "candidate": 47.5},
        "conv": {"relative": 87.5, "reference": 53.3, "candidate": 46.7},
        "detail": {"relative": 71.4, "reference": 70.0, "candidate": 50.0},
    }
    scored = [(name, None if pair == FAILED else (pair[0], pair[1])) for name, pair in pairs]
    honest = honest_summary(scored)
    assert honest["conv"] == {"relative": 88.2, "reference": 85.0, "candidate": 75.0, "reviews": 3, "failures": 1}
    assert honest["all"] == {"relative": 83.3, "reference": 80.0, "candidate": 66.7, "reviews": 4, "failures": 1}
    failed = honest_summary([("conv", None)])["conv"]
    assert failed == {"relative": None, "reference": None, "candidate": None, "reviews": 1, "failures": 1}


def test_the_published_summary_rounds_twice() -> None:
    """Means are rounded to three digits first: 2.8333 / 8.6667 is 32.69 %, 2.833 / 8.667 prints the same digit."""
    reviews = [{"tuple": pair} for pair in ([9, 2], [9, 3], [8, 3.5])]
    assert published_summary(reviews) == {"all": {"relative": 32.7, "reference": 86.7, "candidate": 28.3}}
    nothing = published_summary([{"tuple": [1, 3]}, {"tuple": FAILED}])["all"]
    assert math.isnan(nothing["relative"]) and nothing["candidate"] == 10.0


# --- what the judge reads


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bench(folder: Path, count: int = 4) -> dict[str, Path]:
    """Files of LLaVA-Bench (in the wild) in the published form, about the small world."""
    asked = [
        {"question_id": n, "image": "query.png", "text": "what is the colour ?", "category": "conv"}
        for n in range(count)
    ]
    answers = [
        [{"question_id": n, "text": text, "answer_id": f"{text}{n}", "model_id": text} for n in reversed(range(count))]
        for text in ("red .", "blue .")
    ]
    return {
        "questions": lines(folder / "q.jsonl", asked),
        "context": lines(folder / "c.jsonl", [{"id": 1, "image": "query.png", "caption": "one red ring"}]),
        "reference": lines(folder / "r.jsonl", answers[0]),
        "candidate": lines(folder / "a.jsonl", answers[1]),
    }


def test_the_judge_reads_the_published_layout(tmp_path: Path) -> None:
    files = bench(tmp_path)
    settings = JudgeSettings(**files, output=tmp_path / "o", rules=chat.rules(tmp_path / "rule.json"))
    first = read_comparisons(settings)[2]
    assert first.content(False) == (
        "[Context]\none red ring\n\n[Question]\nwhat is the colour ?\n\n[Assistant 1]\nred .\n\n[End of Assistant "
        "1]\n\n"
        f"[Assistant 2]\nblue .\n\n[End of Assistant 2]\n\n[System]\n{chat.RULE}\n\n"
    )
    turned = first.content(False).replace("red .", "BLUE").replace("blue .", "red .").replace("BLUE", "blue .")
    assert turned == first.content(True)
    review = first.review("8 9\nfine", swapped=False)
    assert review == {
        "id": 3, "question_id": 2, "answer1_id": "red .2", "answer2_id": "blue .2", "category": "llava_bench_conv",
        "content": "8 9\nfine", "tuple": [8.0, 9.0],
    }  # fmt: skip
    by_character = JudgeSettings(**files, output=tmp_path / "o", caption_by_character=True)
    assert read_comparisons(by_character)[0].content(False).startswith("[Context]\no\nn\ne\n \nr\ne\nd")
    coco = [
        {"image": "query.png", "captions": ["a", "b"], "instances": [{"category": "cat", "bbox": [0.1, 0.25, 1, 1]}]}
    ]
    lines(files["context"], coco)
    (first, *_) = read_comparisons(JudgeSettings(**files, output=tmp_path / "o"))
    assert first.content(False).startswith("[Context]\na\nb\n\ncat: [0.1, 0.25, 1, 1]\n\n[Question]")
    assert first.category == "conv" and first.rule == OWN_RULES["conv"]


def test_own_rules_cover_both_benches() -> None:
    assert set(OWN_RULES) == {
        f"{prefix}{name}" for prefix in ("", "llava_bench_") for name in ("conv", "detail", "complex")
    }
    assert all(rule.role == "Assistant" and "first line" in rule.prompt for rule in OWN_RULES.values())


# --- the command


def judge(files: dict[str, Path], output: Path, *more: Any) -> Result:
    given = [part for name, path in files.items() for part in (f"--{name}", path)]
    words = ["eval", "judge", *given, "--output", output, "--answer-tokens", 24, "--temperature", 0, *more]
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "300"})


def test_a_judge_that_is_served(chat_model: LocalModel, tmp_path: Path) -> None:
    files = {**bench(tmp_path), "rules": chat.rules(tmp_path / "rule.json")}
    with listening_endpoint(chat_model, ["500", "", "429, retry after 0 seconds"]) as endpoint:
        common = ["--endpoint", endpoint.url, "--model", NAME]
        dry = judge(files, tmp_path / "o", *common, "--dry-run", "--swap")
        assert dry.exit_code == 0 and "2 requests" in dry.output and not endpoint.requests  # equal ones count once
        stopped = judge(files, tmp_path / "o", *common, "--swap", "--max-requests", 2, "--concurrency", 1)
        assert stopped.exit_code == 1 and "--max-requests" in stopped.stderr and endpoint.requests == 2
        done = judge(files, tmp_path / "o", *common, "--swap")
        assert done.exit_code == 0, done.output
        assert set(endpoint.answered.values()) == {1} and len(endpoint.answered) == 2
        asked = endpoint.requests
        assert judge(files, tmp_path / "o", *common, "--swap").exit_code == 0 and endpoint.requests == asked
    rows = [json.loads(line) for line in (tmp_path / "o" / "reviews.jsonl").read_text().splitlines()]
    swapped = [json.loads(line) for line in (tmp_path / "o" / "reviews_swapped.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [0, 1, 2, 3] == [row["question_id"] for row in swapped]
    assert rows[0]["answer1_id"] == "red .0" == swapped[0]["answer2_id"]
    assert all(row["tuple"] == published_scores(row["content"]) for row in rows)
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert summary["published"]["first"] == published_summary(rows)
    assert summary["published"]["swapped"] == published_summary(
        {**row, "tuple": row["tuple"][::-1]} for row in swapped
    )
    assert summary["honest"]["first"]["all"]["reviews"] == 4 and summary["both_orders"]["all"]["reviews"] == 4


def test_a_local_judge(chat_model: LocalModel, tmp_path: Path) -> None:
    files = {**bench(tmp_path, 1), "rules": chat.rules(tmp_path / "rule.json")}
    done = judge(files, tmp_path / "o", "--model", chat_model.name)
    assert done.exit_code == 0 and "llava_bench_conv" in done.output, done.output


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("candidate", [{"question_id": 0, "text": "a"}], "no answer to 3 of 4"),
        ("candidate", [{"question_id": 0, "text": "a"}] * 2, "twice"),
        ("candidate", [{"text": "a"}], "line 1 lacks question_id"),
        ("context", [{"image": "other.png", "caption": "a"}], "nothing about the image"),
        ("context", [{"image": "query.png"}], "expected caption"),
        ("questions", [{"question_id": 0, "image": "query.png", "text": "a", "category": "riddle"}], "riddle"),
        ("questions", [], "is empty"),
        ("rules", [{"conv": 3}], "has no rules"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, name: str, rows: list[Any], words: str) -> None:
    files = bench(tmp_path)
    files[name] = lines(tmp_path / "bad.jsonl", rows)
    done = judge(files, tmp_path / "o", "--model", "x", "--endpoint", "http://127.0.0.1:9")
    assert done.exit_code == 1 and words in done.stderr.splitlines()[-1], done.stderr
    assert not (tmp_path / "o").exists()


def test_published_rules_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "rule.json").write_text(json.dumps({"conv": {"role": "Helper", "prompt": " as\nit is "}}))
    assert read_rules(tmp_path / "rule.json")["conv"].prompt == " as\nit is " and "helpful and precise" in SYSTEM


def test_answers_of_a_repository_for_the_judge(tmp_path: Path) -> None:
    files = bench(tmp_path, 3)
    Image.open(IMAGES / "query.png").save(tmp_path / "query.png")
    demos = lines(
        tmp_path / "d.jsonl", [{"image": str(IMAGES / f"{n}-1.png"), "label": n} for n in ("fibra", "gacre")]
    )
    words = ["eval", "answers", "--repo", AIM_TINY, "--questions", files["questions"], "--images", tmp_path]
    words += ["--output", tmp_path / "mine.jsonl", "--demos", demos, "--max-new-tokens", 3]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    whole = (tmp_path / "mine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in whole]
    assert [row["question_id"] for row in rows] == [0, 1, 2] and rows[0]["text"] == rows[2]["text"] != ""
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    (tmp_path / "mine.jsonl").write_text(whole[0] + "\n" + whole[1][:20])  # a kill
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    assert (tmp_path / "mine.jsonl").read_text().splitlines() == whole
