"""Visual question answering with several annotators (OK-VQA, VizWiz), and memes that are hateful or not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.jsonl import read_json
from ...data.tables import MissingSplit, Row, Table, open_table
from ..metrics import openflamingo_accuracy, openflamingo_answer, roc_auc, vqa_accuracy
from ..task import Example, Prediction
from .splits import SplitTask, common, texts

PROMPT = "Question:{question} Short answer:"  # OpenFlamingo's, as the one below
OPENFLAMINGO = (
    "accuracy_openflamingo: answers cut at ', ' too, and scored as OpenFlamingo's code does; on VizWiz that leaves "
    "out all annotators who gave one answer with one confidence, so it is far lower."
)
MEME_PROMPT = "is an image with: '{text}' written on it. Is it hateful? Answer:"


class VisualQuestions(SplitTask):
    """Questions about images, each with the answers of several people: columns `image`, `question` and `answers`."""

    max_new_tokens = 5

    def check(self, table: Table) -> None:
        table.need("image", "question", "answers")

    def example(self, table: Table, row: Row, name: str, what: str) -> Example | None:
        answers, question = texts(row["answers"]), row["question"]
        if not answers or not isinstance(question, str):
            self.left_out[f"{what} without answers"] += 1  # as in test splits whose answers are secret
            return None
        images = self.found(table.folder, row["image"], what)
        prompt = PROMPT.format(question=question.strip())
        facts = {"marks": self.marks(row["answers"])}
        return None if images is None else Example(name, images, prompt, answers, label=common(answers), facts=facts)

    def marks(self, answers: object) -> list[Any]:
        """What tells annotations with equal answers apart, for OpenFlamingo's scorer: here an id of each."""
        return list(range(len(texts(answers))))

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        short = short_answer(prediction.text)
        return {
            "accuracy": vqa_accuracy(short, example.answers, always=False),
            "accuracy_normalized": vqa_accuracy(short, example.answers),
            "accuracy_openflamingo": openflamingo_accuracy(
                openflamingo_answer(prediction.text),
                example.answers,
                example.facts.get("marks", range(len(example.answers))),
            ),
        }

    def notes(self) -> list[str]:
        return [*super().notes(), OPENFLAMINGO]


def short_answer(text: str) -> str:
    """An answer, cut where the model begins a question of its own: at a new line, or at a word of the prompt."""
    return re.split(r"\s(?:Question|Answer|Short)\b", text.strip().split("\n")[0], maxsplit=1)[0].strip()


class OkVqa(VisualQuestions):
    """OK-VQA (arXiv 1906.00067): questions that need knowledge, 5 046 in the validation split, ten answers each.

    Args:
        path: the dataset of `lmms-lab` (parquet files, Hub id), which has no training split; or the folder of the
            published questions and annotations (`OpenEnded_mscoco_val2014_questions.json`,
            `mscoco_val2014_annotations.json`, and those of `train2014`).
        images: of the published files, the folder that has COCO's `val2014` and `train2014`.
        **settings: as for `SplitTask`.
    """

    training = ("train2014",)

    def __init__(
        self,
        path: str = "lmms-lab-encoder/OK-VQA",
        *,
        split: str = "val2014",
        name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, name=name or "OK-VQA", split=split, **settings)

    def table(self, path: str, split: str, config: str | None, images: str | None) -> Table:
        place = Path(path).expanduser()
        if not list(place.glob("*mscoco_*_questions.json")):
            return super().table(path, split, config, images)
        return coco_table(place, split, Path(images) if images else place)


def coco_table(folder: Path, split: str, images: Path) -> Table:
    """Questions joined with their annotations, as the VQA datasets over COCO publish them.

    Raises:
        MissingSplit: there are no such files.
        ValueError: they do not belong together.
    """
    files = [next(iter(folder.glob(f"*mscoco_{split}_{part}.json")), None) for part in ("questions", "annotations")]
    if None in files:
        raise MissingSplit(f"{folder} has no *mscoco_{split}_questions.json and *mscoco_{split}_annotations.json.")
    questions, annotations = (
        _listed(file, part) for file, part in zip(files, ("questions", "annotations"), strict=True) if file is not None
    )
    answers = {row["question_id"]: row["answers"] for row in annotations}
    missing = [row["question_id"] for row in questions if row["question_id"] not in answers]
    if missing:
        raise ValueError(f"{files[1]} has no answers for {len(missing)} questions, for example {missing[:3]}.")
    rows = [
        {
            "question_id": row["question_id"],
            "image": f"{split}/COCO_{split}_{row['image_id']:012d}.jpg",
            "question": row["question"],
            "answers": answers[row["question_id"]],
        }
        for row in questions
    ]
    return Table(str(files[0]), images, ("question_id", "image", "question", "answers"), rows)


def _listed(path: Path, part: str) -> list[dict[str, Any]]:
    read = read_json(path)
    if not isinstance(read, dict) or not isinstance(read.get(part), list):
        raise ValueError(f"{path} has no list {part!r}; expected the published file of the dataset.")
    return read[part]


class VizWiz(VisualQuestions):
    """VizWiz (arXiv 1802.08218): questions of blind people about their photographs, 4 319 in the validation split.

    "unanswerable" is an answer like others.

    Args:
        path: the dataset of `lmms-lab` (parquet files, Hub id), which has no training split; or the folder of the
            published `train.json` and `val.json` (or its `Annotations`), with folders `train` and `val` of images.
        images: folder that has `train` and `val`, instead.
        **settings: as for `SplitTask`.
    """

    def __init__(
        self,
        path: str = "lmms-lab-encoder/VizWiz-VQA",
        *,
        split: str = "val",
        name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, name=name or "VizWiz", split=split, **settings)

    def table(self, path: str, split: str, config: str | None, images: str | None) -> Table:
        place = Path(path).expanduser()
        inner = next((folder for folder in (place / "Annotations", place / "annotations") if folder.is_dir()), place)
        if not (inner / f"{split}.json").is_file():
            if list(inner.glob("*.json")):
                raise MissingSplit(f"{inner} has no {split}.json.")
            return super().table(path, split, config, images)
        root = Path(images).expanduser() if images else place
        return open_table(str(inner), split, images=str(root / split if (root / split).is_dir() else root))

    def name_of(self, row: Row) -> Any:
        return row.get("question_id", row.get("image"))

    def marks(self, answers: object) -> list[Any]:
        """Published annotations have no id, but a confidence, which OpenFlamingo's scorer compares in its place."""
        many = answers if isinstance(answers, (list, tuple)) else [answers]
        return [
            answer.get("answer_confidence", "") if isinstance(answer, Mapping) else ""
            for answer in many
            if texts([answer])
        ]


class HatefulMemes(SplitTask):
    """Hateful Memes (arXiv 2005.04790): is a picture with its text hateful? ROC-AUC by the likelihood of yes and no.

    Args:
        path: the dataset (parquet files, Hub id), or the folder of the published `train.jsonl` and `dev_seen.jsonl`
            (then `split=dev_seen`). Columns `image` or `img`, `text`, and `label`: 1 or `hateful`, else it is not.
        **settings: as for `SplitTask`.
    """

    metric = "roc_auc"
    max_new_tokens = 5

    def __init__(
        self,
        path: str = "Ahren09/MMSoc_HatefulMemes",
        *,
        split: str = "test",
        name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, name=name or "Hateful Memes", split=split, **settings)
        roc_auc([], [])  # so that a missing library is known now, not after hours

    def table(self, path: str, split: str, config: str | None, images: str | None) -> Table:
        place = Path(path).expanduser()
        published = sorted(file.stem for file in place.glob("*.jsonl"))
        if published and split not in published:
            raise MissingSplit(
                f"{place} holds the splits {', '.join(published)}, but not {split!r}. Say which is asked: "
                f"hateful_memes:{path},split={'dev_seen' if 'dev_seen' in published else published[0]}"
            )
        return super().table(path, split, config, images)

    def check(self, table: Table) -> None:
        table.need("text", "label")
        table.first_of("image", "img")

    def example(self, table: Table, row: Row, name: str, what: str) -> Example | None:
        label = {"1": "yes", "hateful": "yes", "0": "no", "not-hateful": "no"}.get(str(row["label"]).lower())
        if label is None:  # test splits whose labels are secret have -1
            self.left_out[f"{what} without a label"] += 1
            return None
        images = self.found(table.folder, row[table.first_of("image", "img")], what)
        prompt = MEME_PROMPT.format(text=str(row["text"] or "").strip())
        return None if images is None else Example(name, images, prompt, (label,), options=("yes", "no"), label=label)

    def shown(self, example: Example) -> Mapping[str, Any]:
        return {"images": list(example.images), "question": example.question, "answer": example.answers[0]}

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        return {"accuracy": float(prediction.text.strip().lower() == example.answers[0])}

    def summary(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        """ROC-AUC of P(yes) over yes and no, each by the mean over its tokens; and accuracy."""
        pairs = []
        for example, prediction in zip(examples, predictions, strict=True):
            if len(prediction.log_probabilities) != 2:
                raise ValueError(f"{self.name}, example {example.id}: ROC-AUC needs log-probabilities of yes and no.")
            pairs.append((prediction.log_probabilities[0], prediction.log_probabilities[1]))
        right = [example.answers[0] == "yes" for example in examples]
        return {"roc_auc": roc_auc(pairs, right), **super().summary(examples, predictions)}
