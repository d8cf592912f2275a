"""Tasks of evaluation on small files in the format that each dataset is published in."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from eval_data import (
    MAKERS,
    clevr,
    episodes,
    everything,
    folder,
    lines,
    okvqa,
    operator_induction,
    pack,
    parquet,
    picture,
    save,
    scienceqa,
    shots_of,
    written,
)

from modeling_aim.data.mining import ClassFeatures
from modeling_aim.data.pairs import opened
from modeling_aim.evaluation.task import Example, Prediction, Shot, Task
from modeling_aim.evaluation.tasks.registry import ENTRIES, TASKS, open_task

EXAMPLES = {"flickr30k": 3, "okvqa": 4, "vizwiz": 4, "hateful_memes": 4, "scienceqa": 4, "isekai-10": 2}
EXAMPLES |= {"isekai-pair": 2, "lcl": 6, "operator_induction": 3, "operator_induction_interleaved": 3, "folder": 6}
EXAMPLES |= {"captions": 4, "jsonl": 4, "episodes": 4}  # of the others 2


@pytest.fixture(scope="module", params=list(MAKERS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A kind of task, and one line of text that opens it."""
    return request.param, MAKERS[request.param](tmp_path_factory.mktemp("data"))


@pytest.fixture
def task(made: tuple[str, str]) -> Task:
    return open_task(made[1])


def colours(pair: Mapping[str, Any]) -> tuple[Any, ...]:
    """Pictures of a raw demonstration, by which they are told apart."""
    skipped: Counter[str] = Counter()
    (demo,) = opened([pair], skipped)
    assert not skipped
    return tuple(image.getpixel((0, 0)) for image in demo.images)


def asked(examples: Sequence[Example]) -> list[tuple[Any, ...]]:
    return [(e.id, e.question, e.answers, e.options, e.label, json.dumps(dict(e.facts))) for e in examples]


def answered(example: Example, text: str) -> Prediction:
    """A prediction that says `text`; of options it is the likelier one."""
    return Prediction(text, tuple(-1.0 if option == text else -2.0 for option in example.options))


# --- the matrix


def test_every_task_is_here() -> None:
    assert set(MAKERS) == set(TASKS), f"add to MAKERS in tests/eval_data.py: {sorted(set(TASKS) - set(MAKERS))}"


def test_examples(made: tuple[str, str], task: Task) -> None:
    examples = task.examples(0)
    assert len(examples) == EXAMPLES.get(made[0], 2), (
        f"its tiny dataset has {len(examples)} examples; if that is right, add {made[0]!r} to EXAMPLES of this file"
    )
    assert len({example.id for example in examples}) == len(examples)
    assert task.examples(0) == examples and asked(open_task(made[1]).examples(0)) == asked(examples)
    assert (asked(task.examples(1)) == asked(examples)) is (made[0] != "folder")
    for example in examples:
        assert example.question == example.question.strip() and "<image>" not in example.question
        assert all(answer == answer.strip() and answer for answer in example.answers) and example.answers
        assert example.images or made[0] == "scienceqa"
        assert len(colours({"images": list(example.images), "text": "x"})) == len(example.images)


def test_demonstrations_are_never_queries(made: tuple[str, str], task: Task) -> None:
    queries = {colour for e in task.examples(0) for colour in colours({"images": list(e.images), "text": "x"})}
    shots = list(shots_of(task))
    shown = {colour for shot in shots for colour in colours(shot.pair)}
    assert queries and shown and not queries & shown
    by_id = {shot.id: shot for shot in shots}
    assert all(by_id[shot.id].pair == shot.pair and by_id[shot.id].label == shot.label for shot in shots)
    assert bool(task.pool()) is not task.fixed
    assert len(set(map(colours, (shot.pair for shot in task.pool() if shot.pair.get("images"))))) == sum(
        bool(shot.pair.get("images")) for shot in task.pool()
    )


def test_demonstrations_follow_from_the_seed(made: tuple[str, str], task: Task) -> None:
    again = open_task(made[1])
    assert [shot.id for shot in shots_of(again)] == [shot.id for shot in shots_of(task)]
    if task.fixed:
        for seed in range(2):
            for example in task.examples(seed):
                four = [shot.id for shot in task.shots(example, 4, seed)]
                two = [shot.id for shot in task.shots(example, 2, seed)]
                assert len(four) == 4 and len(two) == 2 and set(two) < set(four)
                assert task.shots(example, 0, seed) == []
    different = [[shot.id for shot in shots_of(task, seed)] for seed in range(4)]
    assert any(one != different[0] for one in different) is (task.fixed and made[0] != "episodes")


def test_too_many_demonstrations_are_refused(task: Task) -> None:
    if task.fixed:
        with pytest.raises(ValueError, match=r"demonstrations|of each class"):
            task.shots(task.examples(0)[0], 100, 0)


def test_scores_of_right_wrong_and_empty_answers(made: tuple[str, str], task: Task) -> None:
    examples = task.examples(0)
    keys = {tuple(task.score(e, answered(e, text))) for e in examples for text in (*e.answers, "zebra", "")}
    assert len(keys) == 1, f"every score of a task has the same names, in the same order; here they are {keys}"
    for example in examples:
        right, wrong, empty = (
            task.score(example, answered(example, text)) for text in (example.answers[0], "zebra", "")
        )
        assert all(0 <= value <= 1 for one in (right, wrong, empty) for value in one.values())
        if task.metric in right:
            nothing = float(made[0] == "matching_mi" and example.answers[0] == "no")  # as VL-ICL has it
            assert (right[task.metric], wrong[task.metric], empty[task.metric]) == (1, nothing, nothing), (
                f"{task.metric} of the first reference, of 'zebra' and of '' must be 1, 0 and 0 (docstring of Task)"
            )


def test_summaries(made: tuple[str, str], task: Task) -> None:
    examples = task.examples(0)
    right = task.summary(examples, [answered(e, e.answers[0]) for e in examples])
    half = task.summary(examples, [answered(e, e.answers[0] if n % 2 else "") for n, e in enumerate(examples)])
    wrong = task.summary(
        examples, [answered(e, "zebra" if not e.options else e.options[e.answers[0] == "yes"]) for e in examples]
    )
    assert right[task.metric] >= half[task.metric] >= wrong[task.metric] >= 0 and right != wrong
    terms = task.terms(examples, [answered(e, e.answers[0]) for e in examples])
    assert (terms is None) is (made[0] == "hateful_memes")
    assert terms is None or sum(terms) / len(examples) == pytest.approx(right[task.metric])
    assert set(right) == set(wrong) and all(isinstance(value, float) for value in right.values())
    assert wrong[task.metric] == pytest.approx(0.5 if made[0] == "matching_mi" else 0), (
        f"the summary's {task.metric} must be 0 where every answer is 'zebra' (docstring of Task)"
    )
    assert task.summary([], []) == {} or math.isnan(task.summary([], [])[task.metric])
    assert all(isinstance(note, str) for note in task.notes()) and not any("Left out" in note for note in task.notes())


def test_tasks_have_names(made: tuple[str, str], task: Task) -> None:
    assert task.name and task.max_new_tokens >= 5, "a task has a name, and answers of at least 5 tokens"
    assert open_task(made[1] + ",name=Mine (2)").name == "Mine (2)", "every task has a setting `name`"


# --- what each task asks and shows


def opened_task(tmp_path: Path, kind: str, settings: str = "") -> Task:
    return open_task(MAKERS[kind](tmp_path) + settings)


def first(task: Task) -> tuple[str, tuple[str, ...]]:
    example = task.examples(0)[0]
    return example.question, example.answers


def words(shot: Shot) -> dict[str, Any]:
    return {key: value for key, value in shot.pair.items() if "image" not in key}


def test_prompts_are_the_published_ones(tmp_path: Path) -> None:
    def of(kind: str) -> tuple[Task, str]:
        task = opened_task(tmp_path / kind, kind)
        return task, task.examples(0)[0].question

    task, question = of("flickr30k")
    assert question == "Output:" and task.max_new_tokens == 20 and len(task.examples(0)[0].answers) == 2
    assert words(task.pool()[0]) == {"question": "Output:", "answer": "a 0.jpg one"}
    task, question = of("okvqa")
    assert question == "Question:What is 0? Short answer:" and task.max_new_tokens == 5
    assert words(task.pool()[0]) == {"question": question, "answer": "cat"} and task.pool()[0].label == "cat"
    task, question = of("vizwiz")
    assert task.pool()[0].pair["answer"] == "unanswerable" and task.metric == "accuracy"
    task, question = of("hateful_memes")
    assert question == "is an image with: 'meme 0' written on it. Is it hateful? Answer:"
    assert [e.answers + e.options for e in task.examples(0)][:2] == [("no", "yes", "no"), ("yes", "yes", "no")]
    task, question = of("scienceqa")
    letter = "Answer with the option's letter from the given choices directly."
    assert question == f"Context: A.\nQuestion: Which 0?\nOptions: (A) iron (B) oak (C) salt\n{letter}"
    assert task.examples(0)[1].question.split("\n")[0] == "Context: N/A" and not task.examples(0)[1].images
    assert words(task.pool()[1]) == {"question": task.examples(0)[1].question, "answer": "B"}
    assert task.max_new_tokens == 1024
    assert "images" not in task.pool()[1].pair
    task, question = of("isekai-10")
    assert question == "Based on the previous examples, what is in the image?"
    shot = task.shots(task.examples(0)[0], 2, 0)[0]
    assert words(shot) == {"question": "What is in the image?", "answer": f'there is "{shot.label}" in the image.'}
    task, question = of("open_mi")
    assert question == "This is a\nAnswer:" and task.max_new_tokens == 15
    assert {shot.pair["question"] for shot in task.shots(task.examples(0)[0], 2, 0)} == {question}


def test_links_are_shown_for_both_classes_and_counted_both_ways(tmp_path: Path) -> None:
    for kind, names in (("lcl", {"kit fox", "fox"}), ("isekai-10", {"Octopus Vacuum", "octopus"})):
        task = opened_task(tmp_path / kind, kind)
        orders = set()
        for seed, example in itertools.product(range(8), task.examples(0)):
            shots = task.shots(example, 4, seed)
            assert Counter(shot.label for shot in shots) == dict.fromkeys(names, 2)
            assert {example.label, *example.facts["others"]} == names
            orders.add(tuple(shot.label for shot in shots))
        assert len(orders) == 6  # all there are
        assert task.shots_note(4) == "2 of each of 2 classes: 4-shot in LCL's paper, 2-shot in its code"
        assert task.shots_note(0) == ""
        with pytest.raises(ValueError, match="each of 2 classes, so 3 in all cannot be; ask for multiples of 2"):
            task.shots(task.examples(0)[0], 3, 0)
    scores = [task.score(task.examples(0)[0], Prediction(text)) for text in ("an octopus vacuum.", "Octopus Vacuum")]
    assert scores == [{"accuracy": 1, "accuracy_published": 1}, {"accuracy": 1, "accuracy_published": 0}]


def test_two_ways_of_many_with_the_querys_class(tmp_path: Path) -> None:
    task = opened_task(tmp_path, "open_mi")
    beside = Counter()
    for seed, example in itertools.product(range(20), task.examples(0)):
        labels = [shot.label for shot in task.shots(example, 4, seed)]
        assert labels[:2] == labels[2:] and len(set(labels)) == 2 and example.label in labels
        (other,) = set(labels) - {example.label}
        beside[labels[0] == example.label, other] += 1
    assert len(beside) == 6  # either first; dax beside perpo or slation, perpo beside dax or slation
    assert task.shots_note(4) == "2 of each of 2 classes, VL-ICL's 2-shot"
    with pytest.raises(ValueError, match="so 1 in all cannot be; ask for even numbers"):
        task.shots(task.examples(0)[0], 1, 0)


def test_demonstrations_of_the_querys_operator(tmp_path: Path) -> None:
    for kind, images in (("operator_induction", 1), ("operator_induction_interleaved", 2)):
        task = opened_task(tmp_path / kind, kind)
        for place, example in enumerate(task.examples(0)):
            for shot in task.shots(example, 6, 0):
                number = int(shot.id.split()[1])
                assert shot.id == f"support {number} {'+-x'[place]}"
                assert shot.pair["answer"] == str(number + 1 + place) and len(shot.pair["images"]) == images
            assert len(example.images) == images
            assert task.score(example, Prediction(f"It is {place + 10} or 99")) == {"accuracy": 1}


def test_either_kind_of_match_is_shown(tmp_path: Path) -> None:
    task = opened_task(tmp_path, "matching_mi")
    shots = task.shots(task.examples(0)[0], 6, 0)
    assert [shot.label for shot in shots] == ["yes", "no"] * 3
    assert all(len(shot.pair["images"]) == 2 for shot in shots)
    assert task.score(task.examples(0)[1], Prediction("perhaps")) == {"accuracy": 1, "accuracy_said": 0}


def test_support_that_is_asked_is_left_out(tmp_path: Path) -> None:
    for kind in ("textocr", "operator_induction_interleaved", "matching_mi"):
        MAKERS[kind](tmp_path)
        files = [tmp_path / kind / f"{part}.json" for part in ("query", "support")]
        queries, support = (json.loads(file.read_text()) for file in files)
        before = len(everything(open_task(f"{kind}:{tmp_path}")))
        own = queries[1]["image"]
        support[0].get("same", support[0])["image"] = own
        written(files[1], support)
        task = open_task(f"{kind}:{tmp_path}")
        after = everything(task)
        assert task.notes()[0] == "Left out: demonstration that is a query, too: 1." and len(after) <= before
        assert task.examples(0)[1].images not in [tuple(shot.pair["images"]) for shot in after]


def test_counts_are_read_from_digits(tmp_path: Path) -> None:
    task = opened_task(tmp_path, "clevr")
    scores = [task.score(task.examples(0)[0], Prediction(text)) for text in ("3", "3 cubes", "three")]
    assert [tuple(score.values()) for score in scores] == [(1, 1), (1, 0), (0, 0)]


def test_captions_end_before_the_next(tmp_path: Path) -> None:
    task = opened_task(tmp_path, "captions")
    examples = task.examples(0)
    alone, ran_on = (
        task.summary(examples, [Prediction(e.answers[0] + more) for e in examples]) for more in ("", " Output: a dog")
    )
    assert alone == ran_on and alone["cider"] > 0
    assert task.summary(examples, [Prediction(f"{e.answers[0]}\nA dog.") for e in examples])["cider"] == alone["cider"]


def test_a_folder_of_classes_under_made_up_names(tmp_path: Path) -> None:
    task = opened_task(tmp_path, "folder", ",ways=3,wording=paper")
    seen, real = set(), {"cat", "dog", "owl"}
    for seed in range(5):
        for example in task.examples(seed):
            names = {example.label, *example.facts["others"]}
            assert len(names) == 3 and not names & real and all(len(name) >= 4 for name in names if name)
            shots = task.shots(example, 6, seed)
            assert Counter(shot.label for shot in shots) == dict.fromkeys(names, 2)
            own = example.id.split()[0]
            assert {shot.label for shot in shots if shot.id.startswith(own)} == {example.label}
            assert task.score(example, Prediction(f"There is {example.label}."))["accuracy"] == 1
            assert task.score(example, Prediction(f"There is {own}."))["accuracy"] == 0
            seen |= names
        images = [e.images for e in task.examples(seed)]
        assert images == [e.images for e in task.examples(0)]  # the same queries with every seed
    assert len(seen) == 5 * 6 * 3


def test_alike_classes_stand_beside(tmp_path: Path) -> None:
    spec = folder(tmp_path / "classes")
    angles = torch.tensor([0.0, 0.2, 0.9])
    line = torch.stack([angles.cos(), angles.sin()], dim=1)
    ClassFeatures(("cat", "dog", "owl"), line, line).save(tmp_path / "features.safetensors")
    task = open_task(f"{spec},features={tmp_path / 'features.safetensors'}")
    beside = {e.id.split()[0]: e.facts["classes"] for seed in range(3) for e in task.examples(seed)}
    assert beside == {"cat": [0, 1], "dog": [1, 0], "owl": [2, 1]}


def test_vqa_answers_are_cut_and_scored_in_both_forms(tmp_path: Path) -> None:
    example, task = (task := opened_task(tmp_path, "okvqa")).examples(0)[0], task
    for text, accuracy in (("Cat.", 1), ("dog\nQuestion: what", 1), ("a cat Short", 1), ("catfish", 0)):
        found = task.score(example, Prediction(text))
        assert (found["accuracy"], found["accuracy_normalized"]) == (accuracy, accuracy)
    shorts = Example("x", (), "q", ("shorts",) * 10)
    assert task.score(shorts, Prediction("Shorts"))["accuracy_normalized"] == 1
    alone = Example("x", (), "q", ("2",) * 10)
    found = task.score(alone, Prediction("two"))
    assert (found["accuracy"], found["accuracy_normalized"]) == (0, 1)


def test_scienceqa_counts_what_cannot_be_parsed(tmp_path: Path) -> None:
    task = opened_task(tmp_path, "scienceqa")
    examples = task.examples(0)  # the answers are A, B, C, A; the first and third have an image
    found = task.summary(examples, [Prediction(text) for text in ("A\n", "oak", "B. oak", "iron")])
    parts = {"accuracy_TXT": 1, "accuracy_IMG": 0.5, "accuracy_NO": 0}  # the first has a hint; no subjects, no grades
    assert found == {"accuracy": 0.25, "failed": 0.5, **parts}


def test_memes_are_scored_by_likelihood(tmp_path: Path) -> None:
    task = opened_task(tmp_path, "hateful_memes")
    examples = task.examples(0)  # no, yes, no, yes
    likelihoods = [(-1.0, -2.0), (-1.0, -1.5), (-3.0, -1.0), (-1.0, -3.0)]
    found = task.summary(examples, [Prediction("yes", pair) for pair in likelihoods])
    assert found == {"roc_auc": 0.75, "accuracy": 0.5}
    with pytest.raises(ValueError, match="needs log-probabilities of yes and no"):
        task.summary(examples, [Prediction("yes")] * 4)


# --- where data comes from


def test_other_forms_of_the_published_data(tmp_path: Path) -> None:
    """Karpathy's own file, the official questions of OK-VQA, Facebook's memes, and what `save_to_disk` wrote."""
    save(tmp_path / "k", *(f"{n}.jpg" for n in range(4)))
    images = [
        {"filename": f"{n}.jpg", "split": split, "imgid": n, "sentences": [{"raw": f"A {n}.", "tokens": ["a"]}]}
        for n, split in enumerate(("train", "test", "val", "restval"))
    ]
    path = written(tmp_path / "k" / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    task = open_task(f"flickr30k:{path},tokenizer=plain")
    assert [(e.id, e.answers) for e in task.examples(0)] == [("1.jpg", ("A 1.",))]
    assert [shot.id for shot in task.pool()] == ["train 0.jpg", "train 3.jpg"]
    assert [e.id for e in open_task(f"flickr30k:{path},split=val").examples(0)] == ["2.jpg"]

    for split in ("train2014", "val2014"):
        names = [f"{split}/COCO_{split}_{number:012d}.jpg" for number in (7, 8)]
        save(tmp_path / "coco", *names)
        questions = [{"image_id": 7 + n, "question": "What?", "question_id": 70 + n} for n in range(2)]
        answers = [{"answer": "cats", "raw_answer": "a cat", "answer_id": k} for k in range(10)]
        notes = [{"question_id": 71 - n, "image_id": 8 - n, "answers": answers} for n in range(2)]
        written(tmp_path / "ok" / f"OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
        written(tmp_path / "ok" / f"mscoco_{split}_annotations.json", {"annotations": notes})
    task = open_task(f"okvqa:{tmp_path / 'ok'},images={tmp_path / 'coco'}")
    assert [(e.id, e.answers[0], len(e.answers)) for e in task.examples(0)] == [("70", "cats", 10), ("71", "cats", 10)]
    assert [shot.id for shot in task.pool()] == ["train2014 70", "train2014 71"]

    save(tmp_path / "m", "img/1.png", "img/2.png", "img/3.png")
    for split, number, label in (("train", 1, 1), ("dev_seen", 2, 0), ("test_seen", 3, -1)):
        row = {"id": number, "img": f"img/{number}.png", "label": label, "text": "so it goes"}
        lines(tmp_path / "m" / f"{split}.jsonl", [row])
    task = open_task(f"hateful_memes:{tmp_path / 'm'},split=dev_seen")
    assert [(e.id, e.answers) for e in task.examples(0)] == [("2", ("no",))] and task.pool()[0].label == "yes"
    kind = datasets.ClassLabel(names=["not-hateful", "hateful"])
    rows = [{"id": n, "text": "T", "label": n} for n in range(2)]
    path = parquet(tmp_path / "m" / "named.parquet", rows, label=kind)
    assert [e.answers for e in open_task(f"hateful_memes:{path}").examples(0)] == [("no",), ("yes",)]
    with pytest.raises(ValueError, match=r"no row that can be used. Left out: example without a label: 1"):
        open_task(f"hateful_memes:{tmp_path / 'm'},split=test_seen").examples(0)

    rows = {
        "img_id": ["5"],
        "caption": [["one", "two"]],
        "split": ["test"],
        "image": [{"bytes": picture(), "path": None}],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    assert open_task(f"flickr30k:{tmp_path / 'saved'}").examples(0)[0].answers == ("one", "two")
    splits = datasets.DatasetDict(test=data.remove_columns("split"), train=data.remove_columns("split"))
    splits.save_to_disk(tmp_path / "splits")
    assert [shot.id for shot in open_task(f"flickr30k:{tmp_path / 'splits'}").pool()] == ["train 5"]


def test_a_validation_split_where_there_is_no_training_split(tmp_path: Path) -> None:
    root = tmp_path / "validation"
    task = open_task(scienceqa(root, ("validation", "test")))
    assert {shot.id.split()[0] for shot in task.pool()} == {"validation"}
    only = open_task(f"scienceqa:{root},split=validation")
    assert only.examples(0) and only.pool() == []  # not from the queries' split
    assert "no demonstrations" in " ".join(only.notes())


def test_demonstrations_where_the_data_set_has_none(tmp_path: Path) -> None:
    okvqa(tmp_path)
    task = open_task(f"okvqa:{tmp_path / 'data'}")
    assert len(task.examples(0)) == 4 and task.pool() == []
    assert "has the splits ['validation'], but not 'train2014'" in task.notes()[0] and "support=" in task.notes()[0]
    task = open_task(f"okvqa:{tmp_path / 'data'},share=0.5")
    assert len(task.examples(0)) == len(task.pool()) == 2
    assert not {e.question for e in task.examples(0)} & {shot.pair["question"] for shot in task.pool()}
    assert "the other images only" in task.notes()[0]
    other = open_task(f"okvqa:{tmp_path / 'data'},share=0.5,split_seed=3")
    assert [e.id for e in other.examples(0)] != [e.id for e in task.examples(0)]


def test_questions_about_one_image_are_not_parted(tmp_path: Path) -> None:
    save(tmp_path, *(f"{n}.png" for n in range(5)))
    rows = [{"image": f"{n // 3}.png", "question": f"Q{n}", "answers": ["a", "b", "b"]} for n in range(15)]
    path = lines(tmp_path / "rows.jsonl", rows)
    for seed in range(4):
        task = open_task(f"jsonl:{path},share=0.4,split_seed={seed},match=vqa")
        sides = [{e.images[0] for e in task.examples(0)}, {shot.pair["images"][0] for shot in task.pool()}]
        assert [len(side) for side in sides] == [3, 2] and not sides[0] & sides[1]
        assert {shot.pair["answer"] for shot in task.pool()} == {"b"}
    support = lines(tmp_path / "more.jsonl", [*rows[:2], {**rows[0], "question": "New?"}])
    task = open_task(f"jsonl:{path},support={support}")
    assert len(task.examples(0)) == 15 and [shot.pair["question"] for shot in task.pool()] == ["New?"]
    assert task.notes() == ["Left out: demonstration that is a query, too: 2."]
    assert open_task(f"jsonl:{path},ask=What is it?,question=none").examples(0)[0].question == "What is it?"


def test_images_that_cannot_be_opened_are_left_out_and_counted(tmp_path: Path) -> None:
    for kind in ("captions", "jsonl"):
        spec = MAKERS[kind](tmp_path / kind)
        count = len(open_task(spec).examples(0)) + len(open_task(spec).pool())
        images = sorted((tmp_path / kind / "p").iterdir())
        images[1].write_text("<html>404</html>")
        images[8 if kind == "jsonl" else 2].unlink()
        damaged = open_task(spec)
        assert len(damaged.examples(0)) + len(damaged.pool()) == count - 2
        assert "Left out: example with an image that is missing or cannot be opened: 2." in damaged.notes()
    root = tmp_path / "clevr"
    clevr(root)
    (root / "clevr" / "query" / "0.png").write_bytes(b"")
    task = open_task(f"clevr:{root}")
    assert [e.id for e in task.examples(0)] == ["1"] and "opened: 1" in task.notes()[0]
    rows = [
        {"question_id": str(n), "question": "Q", "answers": ["a"], "image": {"bytes": b"no", "path": None}}
        for n in range(2)
    ]
    parquet(tmp_path / "ok.parquet", [*rows, {"question_id": "2", "question": "Q", "answers": ["a"]}])
    task = open_task(f"okvqa:{tmp_path / 'ok.parquet'}")
    assert [e.id for e in task.examples(0)] == ["2"] and "opened: 2" in task.notes()[0]
    (tmp_path / "episodes").mkdir()
    episodes(tmp_path / "episodes")
    (tmp_path / "episodes" / "0.png").unlink()
    (tmp_path / "episodes" / "10.png").unlink()
    task = open_task(f"episodes:{tmp_path / 'episodes' / 'binding.jsonl'}")
    assert [e.id for e in task.examples(0)] == ["1.1"]
    assert "episode with a demonstration with an image" in task.notes()[0]


def test_archives_count_only_where_files_are_missing(tmp_path: Path) -> None:
    root = tmp_path / "operator_induction"
    operator_induction(tmp_path)
    whole = open_task(f"operator_induction:{tmp_path}")
    before = [colours({"images": list(e.images), "text": "x"}) for e in whole.examples(0)]
    with zipfile.ZipFile(root / "query.zip") as archive:
        archive.extract("0_0.png", root / "query")
    partly = open_task(f"operator_induction:{tmp_path}")
    assert [isinstance(e.images[0], str) for e in partly.examples(0)] == [True, False, False]
    assert [colours({"images": list(e.images), "text": "x"}) for e in partly.examples(0)] == before
    (root / "query.zip").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 images are missing, for example 'operator_induction/query/1_0"
    ):
        open_task(f"operator_induction:{tmp_path}").examples(0)
    pack(root / "query.zip", "1_0.png", "a/query/1_0.png", "2_0.png")
    with pytest.raises(ValueError, match=r"'operator_induction/query/1_0.png' may be any of .*a/query/1_0.png in"):
        open_task(f"operator_induction:{tmp_path}").examples(0)
    (root / "query.zip").write_bytes((root / "support.zip").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"query.zip is damaged .* Fetch it again"):
        open_task(f"operator_induction:{tmp_path}").examples(0)


def test_tasks_of_the_hub_without_a_network() -> None:
    parameters = {kind: inspect.signature(make).parameters for kind, make in TASKS.items()}
    hub = [kind for kind in TASKS if parameters[kind]["path"].default is not inspect.Parameter.empty]
    own = {kind for kind, entry in ENTRIES.items() if not entry.source} | {"lcl"}  # its images are ImageNet's
    assert set(TASKS) - set(hub) == own, "a task needs a path if its entry in ENTRIES has no source, and only then"
    for kind in hub:
        with pytest.raises(FileNotFoundError, match=r"(from|on) the Hub"):
            open_task(kind).examples(0)


def test_settings_with_colons_and_commas(tmp_path: Path) -> None:
    assert open_task("hateful_memes,support=C:/a,b,split=dev").support == "C:/a,b"
    save(tmp_path / "a,b:c", "cat/0.png", "cat/1.png", "dog/0.png")
    assert open_task(f"folder:{tmp_path / 'a,b:c'},queries=1,name=x:y").name == "x:y"
