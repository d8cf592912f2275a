"""Evaluation like the originals: OpenFlamingo's scorer, VL-ICL's instructions, what LCL asks, CIDEr times 100."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backbones import build
from eval_data import MAKERS
from PIL import Image
from typer.testing import CliRunner

from modeling_aim import AimProcessor
from modeling_aim.cli import app
from modeling_aim.cli.options import parsed
from modeling_aim.evaluation.compare import compare_runs
from modeling_aim.evaluation.lmms_chats import bare, parts_of, pictures
from modeling_aim.evaluation.methods import PromptBuilder, ShownShot
from modeling_aim.evaluation.metrics import lcl_published, named, vqa_normalized
from modeling_aim.evaluation.report import eval_results, report, shots_label
from modeling_aim.evaluation.results import cell_figures
from modeling_aim.evaluation.task import Example, Prediction
from modeling_aim.evaluation.tasks.registry import ENTRIES, TASKS, open_task, task_table
from modeling_aim.evaluation.tasks.vqa import VizWiz


def test_answers_as_openflamingo_cuts_and_scores_them(tmp_path: Path) -> None:
    task = open_task(MAKERS["okvqa"](tmp_path))
    six = Example("x", (), "q", ("cat",) * 6 + ("dog",) * 4)
    for text, score in (("cat, dog", 1), ("catAnswer: dog", 1), ("dog", 1), ("a bird", 0)):
        assert task.score(six, Prediction(text))["accuracy_openflamingo"] == score
    assert task.score(six, Prediction("cat, dog"))["accuracy"] == 0  # "cat dog"
    blind = VizWiz("x")  # nothing is read
    answers = [{"answer": "cat", "answer_confidence": "yes"}] * 5 + [{"answer": "cat", "answer_confidence": "maybe"}]
    answers += [{"answer": "dog", "answer_confidence": "yes"}] * 4
    marks = blind.marks(answers)
    assert marks == ["yes"] * 5 + ["maybe"] + ["yes"] * 4
    example = Example("x", (), "q", ("cat",) * 6 + ("dog",) * 4, facts={"marks": marks})
    found = blind.score(example, Prediction("cat"))
    # 5 see one cat that is not like theirs, 1 sees five, 4 see all six
    assert found["accuracy"] == 1 and found["accuracy_openflamingo"] == pytest.approx((5 / 3 + 1 + 4) / 10)


def test_what_vl_icl_says_stands_in_front_of_everything(tmp_path: Path) -> None:
    MAKERS["clevr"](tmp_path)
    builder = PromptBuilder(AimProcessor(build("llava").processor))
    beginnings = {"nothing": "<image>", "concise": "Find objects", "detailed": "The image contains"}
    for instruction, begins in beginnings.items():
        task = open_task(f"clevr:{tmp_path},instruction={instruction}")
        example, shot = task.examples(0)[0], task.pool()[0]
        prompts = [builder.prompt(example), builder.prompt(example, [ShownShot(shot, shot)])]
        assert [prompt.count(begins) for prompt in prompts] == ([1, 2] if instruction == "nothing" else [1, 1])
        assert all(prompt.startswith(begins) for prompt in prompts)
        parts = builder.parts(example, [ShownShot(shot, shot)])
        assert "".join(part.text for part in parts) == prompts[1]
        assert parts[0].text[parts[0].answer_start :] == f"{shot.pair['answer']}\n"
    chat = PromptBuilder(AimProcessor(build("qwen2_vl").processor), "chat")
    assert "Find all" not in chat.prompt(example) and chat.prompt(example).index("The image contains") < 120
    with pytest.raises(ValueError, match="instruction='long' is unknown"):
        open_task(f"clevr:{tmp_path},instruction=long")


def test_lcl_asks_the_first_of_each_class(tmp_path: Path) -> None:
    spec = MAKERS["lcl"](tmp_path)
    names = [example.id for example in open_task(spec).examples(0)]
    assert names == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]  # three a class in this file, fewer than 50
    assert [e.id for e in open_task(f"{spec},queries=2").examples(0)] == ["0 0", "0 1", "1 0", "1 1"]
    assert len(open_task(f"{spec},queries=0").examples(0)) == 6
    with pytest.raises(ValueError, match="queries=-1"):
        open_task(f"{spec},queries=-1")


def test_isekai_says_where_a_query_was_among_its_demonstrations(tmp_path: Path) -> None:
    task = open_task(MAKERS["isekai-10"](tmp_path))
    row = task.rows[0]
    before = task.notes()
    row["positive_list"] = [row["image_name"], *row["positive_list"]]
    shots = task.shots(task.examples(0)[0], 2, 0)
    assert all(row["image_name"] not in shot.id for shot in shots)
    assert task.notes() != before and "1 examples list their own image" in task.notes()[-1]


def test_cider_is_printed_times_100(tmp_path: Path) -> None:
    task = open_task(MAKERS["captions"](tmp_path))
    examples = task.examples(0)
    rows = [
        {"example": e.id, "prediction": e.answers[0], "log_probabilities": [], "score": None, "prompt_tokens": 9}
        for e in examples
    ]
    cell = {"task": "c", "method": "full", "shots": 0, **cell_figures(task, {0: examples}, {0: rows})}
    entry = {"task": "c", "metric": "cider", "printed_times": 100, "examples": 4, "demonstrations": "", "notes": []}
    results = {"cells": [cell], "tasks": [{**entry, "shots_notes": {}}], "settings": {}, "curves": [], "notes": []}
    text = report({**results, "model": {}})
    assert f"| {100 * cell['mean']:.1f} [" in text and "cider times 100" in text
    assert eval_results(results, "full")[0].metric_value == pytest.approx(100 * cell["mean"], abs=1e-4)
    assert 0 < cell["mean"] < 11


def caption_run(folder: Path, spec: str, answers: dict[str, str]) -> Path:
    """A finished run of `aim eval` of one method, as its folder is read."""
    folder.mkdir()
    rows = [
        {"task": "caps", "method": "aim", "shots": 2, "seed": 0, "example": name, "demonstrations": [],
         "prediction": text, "log_probabilities": [], "score": None}
        for name, text in answers.items()
    ]  # fmt: skip
    task = {"task": "caps", "spec": spec, "metric": "cider", "digest": "", "printed_times": 100}
    results = {"tasks": [task], "cells": [{"task": "caps", "method": "aim", "shots": 2}], "settings": {"seeds": 1}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_captions_as_openflamingo_cuts_them(tmp_path: Path) -> None:
    task = open_task(MAKERS["captions"](tmp_path))
    examples = task.examples(0)
    right = [example.answers[0] for example in examples]
    whole = task.summary(examples, [Prediction(text) for text in right])
    cut = task.summary(examples, [Prediction(f'"{text}"Output a cat') for text in right])
    assert cut["cider_openflamingo"] == whole["cider_openflamingo"] == whole["cider"] > cut["cider"]
    lines = task.summary(examples, [Prediction(f"{text}\nand on") for text in right])
    assert lines["cider"] == whole["cider"] > lines["cider_openflamingo"]


def test_cider_is_compared_times_100(tmp_path: Path) -> None:
    spec = MAKERS["captions"](tmp_path / "data")
    examples = open_task(spec).examples(0)
    right = {example.id: example.answers[0] for example in examples}
    wrong = {**right, examples[0].id: "nothing of the kind"}
    runs = [caption_run(tmp_path / name, spec, run) for name, run in (("a", wrong), ("b", right))]
    (row,) = compare_runs(*runs)["rows"]
    assert row["printed_times"] == 100 and 0 < row["first"] < row["second"] < 11  # as it is in JSON
    summaries = [
        open_task(spec).summary(examples, [Prediction(run[example.id]) for example in examples])
        for run in (wrong, right)
    ]
    assert (row["first"], row["second"]) == pytest.approx([summary["cider"] for summary in summaries])
    assert row["interval"][0] >= 0 and row["test"] == "paired bootstrap"
    shown = CliRunner().invoke(app, ["eval", "compare", *map(str, runs)])
    for figure in (f"{100 * row['first']:.1f}", f"{100 * row['second']:.1f}", f"{100 * row['difference']:+.1f}"):
        assert f" {figure} " in shown.output, shown.output


@pytest.mark.parametrize("spelled", ["youd've", "you'dve", "YOU'DVE"])
def test_contractions_are_those_of_the_official_list(spelled: str) -> None:
    assert vqa_normalized(f"the {spelled} seen") == "you'd've seen"


def test_published_scorer_of_lcl_takes_punctuation_out_of_the_right_name_alone() -> None:
    for name, plain in (("St. Bernard", "st bernard"), ("jack-o'-lantern", "jack-o-lantern"), ('a "dax"', "a dax")):
        assert lcl_published(f"there is {plain} in the image", name, "fox")
        assert not lcl_published(f"there is {name.lower()} in the image", name, "fox")
        assert named(f"there is {name} in the image", name, ["fox"])
    assert not lcl_published("a dax and st. bernard", "dax", "St. Bernard")


def test_chats_of_lmms_eval_may_be_plain_strings_and_name_files(tmp_path: Path) -> None:
    red = Image.new("RGB", (3, 2), (255, 0, 0))
    red.save(tmp_path / "red.png")
    assert parts_of({"role": "user", "content": "What is this?"}) == [{"type": "text", "text": "What is this?"}]
    path = str(tmp_path / "red.png")
    content = ["look: ", {"type": "image", "url": path}, {"type": "image", "image": red}]
    parts = parts_of({"role": "user", "content": content})
    assert [bare(part) for part in parts] == [{"type": "text", "text": "look: "}] + [{"type": "image"}] * 2
    opened = pictures([part["image"] for part in parts if part["type"] == "image"])
    assert [image.tobytes() for image in opened] == [red.tobytes()] * 2
    assert [image.tobytes() for image in (*pictures(path), *pictures(red))] == [red.tobytes()] * 2
    assert pictures(None) == ()
    for content in ([{"type": "video", "url": "film.mp4"}], [{"type": "image"}], [3]):
        with pytest.raises(ValueError, match=r"this task has (video|image|int)"):
            parts_of({"role": "user", "content": content})
    with pytest.raises(ValueError, match=r"paths of image files. This task shows 'gone.png' \(str\)"):
        pictures(["gone.png"])


def test_the_list_of_tasks_is_that_of_the_docs() -> None:
    ours = {kind for kind, make in TASKS.items() if make.__module__.startswith("modeling_aim.")}
    assert ours == set(ENTRIES), f"add to ENTRIES of evaluation/tasks/registry.py: {sorted(ours - set(ENTRIES))}"
    page = (Path(__file__).parents[1] / "docs" / "EVALUATION.md").read_text(encoding="utf-8")
    table = page.partition("gives it as markdown:\n\n")[2].partition("\n\n")[0].split("\n")
    head, line, *rows = task_table().split("\n")
    assert table == [
        head,
        line,
        *(row for row in rows if row.split("`")[1] in ours),
    ], "paste what task_table() of evaluation/tasks/registry.py gives"  # other tests add kinds of theirs
    asked = page.partition("What each one asks, and what it shows:\n\n")[2].partition("\n\n")[0].split("\n")[2:]
    kinds = [kind for row in asked for kind in row.split("|")[1].replace("`", "").replace(",", " ").split()]
    assert sorted(kinds) == sorted(ours), 'add it to the table "What each one asks" of docs/EVALUATION.md'
    shown = CliRunner().invoke(app, ["eval", "--list", "--shots", "nonsense"], env={"COLUMNS": "250"})
    assert shown.exit_code == 0
    for kind in ours:
        assert f" {kind} " in shown.output


def test_tables_have_shots_in_all_and_a_class(tmp_path: Path) -> None:
    counts = {
        kind: open_task(MAKERS[kind](tmp_path / kind)).per_class(8) for kind in ("isekai-10", "open_mi", "clevr")
    }
    assert counts == {"isekai-10": 4, "open_mi": 4, "clevr": None}
    results = {"tasks": [{"task": "a", "per_class": {"8": 4}}, {"task": "b"}]}
    assert [shots_label(results, name, 8) for name in "ab"] == ["8 (4 a class)", "8"]


def test_methods_with_settings_stand_in_one_list() -> None:
    text = "zero,aim-untrained:depth=12,snapkv:ratio=.5:window=8"
    assert parsed([text], tuple[str, ...], "--methods") == tuple(text.split(","))
    for spec in ("episodes:data/test.jsonl,match=vqa", "okvqa:/data/a,b"):
        assert parsed([spec], tuple[str, ...], "--tasks") == (spec,)
