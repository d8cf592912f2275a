"""Captions, boxes, prompts and options that instruction data is made from, good and bad ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from endpoints import rows_in
from typer.testing import CliRunner, Result

from modeling_aim.cli import app
from modeling_aim.llava.captioned import read_captioned
from modeling_aim.llava.instructions import InstructSettings, make_instructions
from modeling_aim.llava.parsing import description, questions_and_answers
from modeling_aim.llava.prompts import OWN, read_prompts


def instruct(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", "instruct", *map(str, arguments)], env={"COLUMNS": "300"})


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    def dog(*box: float) -> list[dict[str, Any]]:
        return [{"category": "dog", "bbox": list(box)}]

    rows: list[Any] = [
        {"id": 1, "image": "a.png", "captions": ["a  dog\nruns"], "instances": dog(-0.004, 0, 1, 1)},
        {"id": 1, "image": "a.png", "captions": ["a dog runs"], "instances": dog(0, 0, 1, 1)},
        {"id": 2, "image": "b.png", "captions": ["b"], "instances": dog(0, 0, 1.2, 1)},
        {"id": 3, "image": "c.png", "captions": ["c"], "instances": [{"bbox": [0, 0, 1, 1]}, {"category": "x"}]},
        {"id": 4, "image": "d.png", "captions": [" "]}, {"id": 5, "captions": ["e"]}, 7,
        {"id": 6, "image": "f.png", "captions": "f", "instances": dog(0.1, 0.1234, 0.5, 0.5)},
        {"id": 7, "image": "g.png", "captions": "g", "instances": dog(0.6, 0, 0.5, 0.5)},
    ]  # fmt: skip
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    left_out: Counter[str] = Counter()
    read = read_captioned(path, None, None, left_out)
    assert [row.image for row in read] == ["a.png", "b.png", "c.png", "f.png", "g.png"]
    assert read[0].with_boxes == "a dog runs\n\ndog: [0.0, 0.0, 1.0, 1.0]"
    assert read[3].with_boxes == "f\n\ndog: [0.1, 0.123, 0.5, 0.5]" and read[1].with_boxes == "b"
    assert left_out == {
        "the same row again": 1, "row without captions": 1, "row without an image": 2, "box outside the image": 2,
        "box without a category or four numbers": 2,
    }  # fmt: skip
    path.write_text(json.dumps({**rows[0], "instances": [{"category": "dog", "bbox": [10, 20, 300, 200]}]}))
    with pytest.raises(ValueError, match="in pixels"):
        read_captioned(path, None, None, Counter())


def test_coco_has_boxes_in_pixels(tmp_path: Path) -> None:
    images = [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg", "width": 640, "height": 480}]
    captions = [{"image_id": 9, "caption": f"caption {n}."} for n in range(5)]
    boxes = [{"image_id": 9, "category_id": 3, "bbox": [64, 48, 320.5, 240]}]
    for name, rows in (("captions", captions), ("instances", boxes)):
        categories = [{"id": 3, "name": "hot dog"}]
        content = {"images": images, "annotations": rows, "categories": categories}
        (tmp_path / f"{name}_val2014.json").write_text(json.dumps(content))
    paths = [tmp_path / f"{name}_val2014.json" for name in ("captions", "instances")]
    (row,) = read_captioned(*paths, None, Counter())
    assert row.id == "9" and len(row.captions) == 5
    assert row.with_boxes.endswith("caption 4.\n\nhot dog: [0.1, 0.1, 0.601, 0.6]")
    with pytest.raises(ValueError, match="a bbox each"):
        read_captioned(paths[0], paths[0], None, Counter())


def test_images_without_boxes_are_skipped_or_asked_from_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"id": 1, "image": "a.png", "captions": ["a dog"]}) + "\n")
    common = {"source": path, "output": tmp_path / "o", "kinds": ("detail", "conversation"), "dry_run": True}
    for ask_without_boxes, count in ((False, 1), (True, 2)):
        assert make_instructions(InstructSettings(**common, ask_without_boxes=ask_without_boxes)) is None
        said = capsys.readouterr().out
        assert f"{count} requests" in said and ("without boxes, for detail" in said) == (not ask_without_boxes)


def test_published_prompts_are_read_as_they_are(tmp_path: Path) -> None:
    inner = tmp_path / "detail_description"
    inner.mkdir()
    with pytest.raises(FileNotFoundError, match=r"system_message\.txt"):
        read_prompts(tmp_path, "detail")
    for name, text in (
        ("system_message", "You are\n"),
        ("001_caps", "b "),
        ("001_conv", " c"),
        ("000_caps", "d"),
        ("000_conv", "e"),
    ):
        (inner / f"{name}.txt").write_text(text)
    prompts = read_prompts(tmp_path, "detail")
    contents = [message["content"] for message in prompts.messages("words")]
    assert contents == ["You are\n", "d", "e", "b ", " c", "words"]
    (inner / "002_caps.txt").write_text("f")
    with pytest.raises(ValueError, match="002"):
        read_prompts(tmp_path, "detail")


@pytest.mark.parametrize("kind", OWN)
def test_own_prompts_answer_in_the_form_that_is_parsed(kind: str) -> None:
    for shown, written in OWN[kind].examples:
        assert bool(re.search(r": \[0\.\d", shown)) == (kind != "conversation")
        if kind == "detail":
            assert description(written) == written
        else:
            assert len(questions_and_answers(written)) == (1 if kind == "complex" else 4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--kinds", "poem"], "--kinds"),
        (["--concurrency", "0"], "--concurrency 0"),
        (["--temperature", "3"], "--temperature"),
        (["--source", "nowhere.jsonl"], "nowhere.jsonl was not found"),
        (["--instances", "{source}"], "--instances goes with"),
        (["--output", "{folder}"], "holds s.jsonl"),
        (["--output", "{source}"], "is a file; give a folder"),
        ([], "--model must be given"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path: Path, more: list[str], words: str) -> None:
    source = rows_in(tmp_path / "s.jsonl", 2)
    given = [part.format(source=source, folder=tmp_path) for part in more]
    done = instruct("--source", source, "--output", tmp_path / "o", *given)
    assert done.exit_code == 1 and words in done.stderr.splitlines()[-1], done.stderr
