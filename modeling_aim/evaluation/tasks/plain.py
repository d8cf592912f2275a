"""Tasks over jsonl files of anybody's own: ready-made episodes, and questions about images with their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ...data.rows import existing
from ...data.tables import Row, Table, file_rows
from ..metrics import exact_match, vqa_accuracy
from ..task import Example, Prediction, Shot
from .data_task import DataTask
from .splits import SplitTask, common, texts

MATCHES = ("exact", "digits", "vqa")
DEMONSTRATION_WORDS = ("label", "text", "answer")


def matched(how: str, text: str, answers: Sequence[str]) -> float:
    """The score of a written answer: `"exact"` and `"digits"` after VL-ICL's cut, or `"vqa"`, VQA accuracy."""
    return vqa_accuracy(text, answers) if how == "vqa" else float(exact_match(text, answers, digits=how == "digits"))


def known_match(match: str) -> str:
    if match not in MATCHES:
        raise ValueError(f"match={match!r} is unknown; choose one of {MATCHES}.")
    return match


class Episodes(DataTask):
    """Ready-made episodes, in the file format that training takes: each query has its own demonstrations.

    Args:
        path: jsonl, a line `{"demos": [...], "queries": [{"image", "question", "answer"}, ...]}`. Demonstrations are
            those of a line in its order, the first ones of them where fewer are asked for. `answer` may be a list of
            right answers, `label` of a query its class.
        images: folder that paths of images are relative to; that of the file when `None`.
        match: `"exact"`, after VL-ICL's cut; `"digits"`, the first run of digits after it; `"vqa"`, VQA accuracy.
        max_new_tokens: most tokens of an answer.
        name: to show; that of the file when `None`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a setting is unknown; when it is read, a line is not as described.
    """

    fixed = True

    def __init__(
        self,
        path: str,
        *,
        images: str | None = None,
        match: str = "exact",
        max_new_tokens: int = 15,
        name: str | None = None,
    ) -> None:
        self.path = existing(path)
        super().__init__(name or self.path.name.split(".")[0])
        self.folder = self.path.parent if images is None else existing(images)
        self.match, self.max_new_tokens = known_match(match), max_new_tokens

    @cached_property
    def _read(self) -> tuple[list[Example], dict[int, list[Shot]]]:
        examples: list[Example] = []
        demos: dict[int, list[Shot]] = {}
        for number, row in enumerate(file_rows(self.path)):
            if not all(isinstance(row.get(part), list) and row[part] for part in ("demos", "queries")):
                raise ValueError(
                    f"{self.path}: episode {number} has {sorted(row)}; needed are lists demos and queries."
                )
            shots = [self._shot(number, place, demo) for place, demo in enumerate(row["demos"])]
            if None in shots:
                continue  # what its queries ask for may have been shown there
            demos[number] = [shot for shot in shots if shot is not None]
            examples_read = (self._example(number, place, query) for place, query in enumerate(row["queries"]))
            examples += [example for example in examples_read if example is not None]
        if not examples:
            raise ValueError(f"{self.path} has no episode that can be used. {' '.join(self.notes())}")
        return examples, demos

    def _shot(self, number: int, place: int, demo: Any) -> Shot | None:
        words = [key for key in DEMONSTRATION_WORDS if isinstance(demo, Mapping) and isinstance(demo.get(key), str)]
        if len(words) != 1:
            raise ValueError(
                f"{self.path}: demonstration {place} of episode {number} is {demo!r:.80}; expected an object with an "
                f"image and one of {DEMONSTRATION_WORDS}."
            )
        pair: dict[str, Any] = {key: value for key, value in demo.items() if "image" not in key}
        given = demo.get("images", demo.get("image"))
        if given:  # there are demonstrations without one
            images = self.found(self.folder, given, "episode with a demonstration")
            if images is None:
                return None
            pair["images"] = list(images)
        return Shot(f"{number}/{place}", pair, demo[words[0]])

    def _example(self, number: int, place: int, query: Any) -> Example | None:
        fields = query if isinstance(query, Mapping) else {}
        answers = texts(fields.get("answer"))
        if not isinstance(fields.get("question"), str) or not answers:
            raise ValueError(
                f"{self.path}: query {place} of episode {number} is {query!r:.80}; expected an object with image, "
                "question and answer."
            )
        image_paths = fields.get("images", fields.get("image"))
        images = self.found(self.folder, image_paths) if image_paths else ()
        if images is None:
            return None
        label = fields.get("label", answers[0])
        return Example(
            f"{number}.{place}", images, fields["question"].strip(), answers, label=str(label), facts={"line": number}
        )

    def examples(self, seed: int) -> Sequence[Example]:
        return self._read[0]

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        demos = self._read[1][example.facts["line"]]
        if count > len(demos):
            raise ValueError(
                f"{self.name}: example {example.id} has {len(demos)} demonstrations, but {count} are asked for. Ask "
                "for fewer, or write longer episodes."
            )
        return demos[:count]

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        return {"accuracy": matched(self.match, prediction.text, example.answers)}


class QuestionsFile(SplitTask):
    """Questions about images in one file, demonstrations from another one or from a share of the same.

    Args:
        path: jsonl (or json, csv, parquet): rows with image or images, question, and answer or answers; their `id` is
            kept.
        support: rows of the same form to draw demonstrations from. When `None` they are a share of `path`.
        share: of the images of `path` that become demonstrations; half of them when `None`.
        image, question, answer: names of columns; usual ones are found by themselves.
        ask: the question for rows that have none.
        match: `"exact"`, after VL-ICL's cut; `"digits"`, the first run of digits after it; `"vqa"`, VQA accuracy.
        max_new_tokens: most tokens of an answer.
        name: to show; that of the file when `None`.
        **settings: as for `SplitTask`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a setting is unknown; when it is read, a column does not fit.
    """

    def __init__(
        self,
        path: str,
        *,
        support: str | None = None,
        share: float | None = None,
        image: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        ask: str | None = None,
        match: str = "exact",
        split: str = "test",
        max_new_tokens: int = 15,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        share = 0.5 if share is None and support is None else share
        name = name or existing(path).name.split(".")[0]
        super().__init__(path, name=name, split=split, support=support, share=share, **settings)
        self.given = {"image": image, "question": question, "answer": answer}
        self.ask, self.match, self.max_new_tokens = ask, known_match(match), max_new_tokens

    def check(self, table: Table) -> None:
        self._column(table, "image", "images", "img")
        self._column(table, "answer", "answers", "label")
        if self.ask is None:
            self._column(table, "question")

    def example(self, table: Table, row: Row, name: str, what: str) -> Example | None:
        question = self.ask or row.get(self._column(table, "question"))
        answers = texts(row.get(self._column(table, "answer", "answers", "label")))
        if not isinstance(question, str) or not question.strip() or not answers:
            self.left_out[f"{what} without a question or an answer"] += 1
            return None
        images = self.found(table.folder, row.get(self._column(table, "image", "images", "img")), what)
        return None if images is None else Example(name, images, question.strip(), answers, label=common(answers))

    def _column(self, table: Table, part: str, *others: str) -> str:
        column = self.given[part]
        return table.first_of(*([column] if column else [*others, part]))

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        return {"accuracy": matched(self.match, prediction.text, example.answers)}
