"""What is said of tasks of evaluation that cannot be: settings, columns, files, libraries."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from eval_data import MAKERS, everything, isekai, lcl, lines, okvqa, save, written

from modeling_aim.evaluation.tasks.registry import open_task


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("coco", ValueError, r"'coco' is not a task. Expected KIND.*'captions', 'clevr', 'episodes'"),
        ("okvqa,splt=val", ValueError, r"okvqa has no setting 'splt'; it has \[.*'share', 'split', .*'support"),
        ("okvqa,share=much", ValueError, "share=much: expected a number"),
        ("okvqa,share=1", ValueError, r"share=1.0: expected the part"),
        ("okvqa,share=0.5,support=x", ValueError, "not both"),
        ("okvqa,support_split=val2014", ValueError, "cannot come from the queries' split"),
        ("episodes", ValueError, "no published dataset to read; give a path, episodes:PATH"),
        ("episodes:{root}/no.jsonl", FileNotFoundError, "no.jsonl was not found"),
        ("jsonl:{root}/rows.jsonl,match=fuzzy", ValueError, r"match='fuzzy' is unknown; choose one of \('exact'"),
        ("captions:{root}/rows.jsonl,tokenizer=nltk", ValueError, "tokenizer='nltk' is unknown"),
        ("isekai-10:{root},wording=loud", ValueError, "wording='loud' is unknown"),
        ("folder:{root}", ValueError, "has no folders of images"),
        ("flickr30k:{root},karpathy={root}/no.csv", FileNotFoundError, "no.csv was not found"),
    ],
)
def test_what_is_wrong_with_a_task_is_said(tmp_path: Path, spec: str, error: type[Exception], match: str) -> None:
    lines(tmp_path / "rows.jsonl", [{"image": "a.png", "question": "Q", "answer": "A"}])
    with pytest.raises(error, match=match):
        open_task(spec.format(root=tmp_path))


QUESTION = {"image": "a.png", "question": "Q"}
BAD: list[tuple[str, Any, str]] = [
    ("jsonl:{root}/rows.jsonl", [QUESTION], r"columns \['image', 'question'\]; needed is one of"),
    ("jsonl:{root}/rows.jsonl", [{"image": "a.png", "answer": "A"}], r"needed is one of \['question'\]"),
    ("jsonl:{root}/rows.jsonl", ["text"], r"rows.jsonl, line 1: expected a JSON object"),
    ("jsonl:{root}/rows.jsonl", [QUESTION | {"answer": []}], r"no row that can be used\. Left out"),
    (
        "jsonl:{root}/rows.jsonl",
        [QUESTION | {"answer": "A"}],
        r"rows has 1 images: too few to split off a share of 0\.5",
    ),
    ("okvqa:{root}/rows.jsonl", [QUESTION], r"but not \['answers'\]; needed are \['image'"),
    ("hateful_memes:{root}/rows.jsonl", [{"img": "a.png", "text": "T"}], r"but not \['label'\]"),
    ("scienceqa:{root}/rows.jsonl", [QUESTION | {"choices": ["a"], "answer": 1, "hint": ""}], "row 0: choices"),
    ("captions:{root}/rows.jsonl", [{"image": "a.png"}], r"needed is one of \['captions', 'caption'"),
    ("flickr30k:{root}/rows.json", {"images": [{"filename": "a.png"}]}, "not a file of Karpathy's"),
    ("flickr30k:{root}/rows.json", [], "not a file of Karpathy's"),
    ("episodes:{root}/rows.jsonl", [{"demos": [], "queries": []}], "episode 0 .* needed are lists demos and queries"),
    ("episodes:{root}/rows.jsonl", [{"demos": [QUESTION], "queries": [1]}], "demonstration 0 of episode 0"),
    ("episodes:{root}/rows.jsonl", [{"demos": [{"text": "t"}], "queries": [QUESTION]}], "query 0 of episode 0"),
    ("isekai-10:{root},annotations={root}/rows.jsonl", [QUESTION], "not a list .* with the keys"),
    ("isekai-10:{root}", [QUESTION], "no JSON file of objects with the keys"),
    ("lcl:{root}/rows.jsonl", [{"class_id": "1"}], "missing"),
    ("clevr:{root}", [QUESTION], r"has no query\.json"),
]


@pytest.mark.parametrize(("spec", "rows", "match"), BAD)
def test_what_is_wrong_with_data_is_said(tmp_path: Path, spec: str, rows: Any, match: str) -> None:
    save(tmp_path, "a.png")
    lines(tmp_path / "rows.jsonl", rows if isinstance(rows, list) else [])
    written(tmp_path / "rows.json", rows)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        open_task(spec.format(root=tmp_path)).examples(0)


ENTRY = {"image": "a.png", "question": "Q", "answer": 1}


@pytest.mark.parametrize(
    ("kind", "file", "entry", "match"),
    [
        ("clevr", "query.json", {"image": []}, r"entry 0 has \['image'\], but not \['question', 'answer'\]"),
        ("clevr", "support.json", {}, r"support\.json, entry 0 has"),
        ("operator_induction", "query.json", ENTRY | {"operator": "/"}, "operator '/'"),
        ("operator_induction", "support.json", ENTRY, "expected one for each"),
        ("open_mi", "query.json", ENTRY | {"classes": ["a"], "support": {}}, "classes are"),
        ("matching_mi", "support.json", {"same": {}, "diff": {}}, "entry 0: expected"),
    ],
)
def test_what_is_wrong_with_vl_icl_is_said(tmp_path: Path, kind: str, file: str, entry: Any, match: str) -> None:
    MAKERS[kind](tmp_path)
    path = tmp_path / kind / file
    save(tmp_path, "a.png")
    written(path, [entry])
    with pytest.raises(ValueError, match=match):
        everything(open_task(f"{kind}:{tmp_path}"))
    path.write_text("[{")
    with pytest.raises(ValueError, match="is not JSON"):
        everything(open_task(f"{kind}:{tmp_path}"))


def test_labels_and_images_of_isekai_must_fit(tmp_path: Path) -> None:
    isekai(tmp_path / "a", save, label_name="vacuum")
    with pytest.raises(ValueError, match=r"label_name 'vacuum' is not one of \['Octopus Vacuum', 'octopus'\]"):
        open_task(f"isekai-10:{tmp_path / 'a'}").examples(0)
    isekai(tmp_path / "own", save, positive_list=[f"positive/{n}.png" for n in range(3)])
    task = open_task(f"isekai-10:{tmp_path / 'own'}")
    shots = task.shots(task.examples(0)[0], 4, 0)
    assert task.examples(0)[0].images[0].endswith("positive/0.png")
    assert not any(shot.pair["image"].endswith("positive/0.png") for shot in shots)  # its own image is in its list
    isekai(tmp_path / "b", save)
    (tmp_path / "b" / "positive" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"no image 'positive/0\.png'.*images="):
        open_task(f"isekai-10:{tmp_path / 'b'}").examples(0)


def test_context_of_a_pair_that_is_asked_is_not_shown(tmp_path: Path) -> None:
    spec = lcl(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "test100_pairs.jsonl").read_text().splitlines()]
    rows[0]["context_samples"][0] = rows[0]["test_samples"][0]
    lines(tmp_path / "test100_pairs.jsonl", rows)
    task = open_task(spec)
    shown = {shot.id for example in task.examples(0) for shot in task.shots(example, 8, 0)}
    assert len(shown) == 8 and not any("test_samples" in name for name in shown)
    with pytest.raises(ValueError, match=r"5 demonstrations of each class, but there are {'kit fox': 4}"):
        task.shots(task.examples(0)[0], 10, 0)


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    okvqa(tmp_path)
    for name in ("datasets", "sklearn.metrics", "pycocoevalcap"):
        monkeypatch.setitem(sys.modules, name, None)
    for spec in (f"okvqa:{tmp_path}", "hateful_memes", "flickr30k"):
        with pytest.raises(ImportError, match=r"pip install modeling-aim\[eval\]"):
            open_task(spec).examples(0)
