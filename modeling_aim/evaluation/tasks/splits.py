"""Tasks over a dataset with splits: queries from one of them, demonstrations from the training split."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ...data.images import image_key
from ...data.tables import MissingSplit, Row, Table, open_table
from ..task import Example, Shot
from .data_task import DataTask

SAME = "demonstration that is a query, too"
NAME_THEM = "Name those to draw from (support=, support_split=), or keep back some of the queries' images (share=0.2)."


class SplitTask(DataTask):
    """Queries from one split and demonstrations from another; a subclass says what a row means.

    Args:
        path: as for `open_table`.
        name: to show.
        split: whose rows are asked.
        support: where demonstrations come from, as for `open_table`; the same dataset when `None`.
        support_split: their split; the first there is of the usual ones when `None`.
        share: of the images of `split` that become demonstrations instead, for datasets without a training split.
        split_seed: draws this share. It does not change with the seed of an evaluation, so queries stay the same.
        images: folder that paths of images are relative to; that of the files when `None`.
        support_images: the same for `support`.
        config: configuration of the dataset.

    Raises:
        ValueError: a setting cannot be; when it is read, a column or a row does not fit.
        FileNotFoundError: when it is read, there is no such dataset.
    """

    training: ClassVar[tuple[str, ...]] = ("train",)

    def __init__(
        self,
        path: str,
        *,
        name: str,
        split: str,
        support: str | None = None,
        support_split: str | None = None,
        share: float | None = None,
        split_seed: int = 0,
        images: str | None = None,
        support_images: str | None = None,
        config: str | None = None,
    ) -> None:
        super().__init__(name)
        if share is not None and not 0 < share < 1:
            raise ValueError(f"share={share}: expected the part of the images to demonstrate with, between 0 and 1.")
        if share is not None and support is not None:
            raise ValueError("Demonstrations come from support= or are a share= of the queries' split, not both.")
        if support in (None, path) and support_split == split:
            raise ValueError(f"support_split={support_split!r}: demonstrations cannot come from the queries' split.")
        self.path, self.split, self.config, self.images = path, split, config, images
        self.support, self.support_split, self.support_images = support, support_split, support_images
        self.share, self.split_seed = share, split_seed
        self.why_none = ""

    # --- what a subclass says

    def table(self, path: str, split: str, config: str | None, images: str | None) -> Table:
        """The rows of a split, by default those of `open_table`."""
        return open_table(path, split, config, images)

    @property
    def has_splits(self) -> bool:
        """Whether there may be other splits at `path`."""
        return not Path(self.path).is_file()

    def check(self, table: Table) -> None:
        """Raise `ValueError` unless the columns fit."""
        raise NotImplementedError

    def example(self, table: Table, row: Row, name: str, what: str) -> Example | None:
        """What a row asks; `None`, and counted in `left_out`, if nothing.

        Args:
            table: that it is of.
            row: its cells.
            name: the id.
            what: for counting: an example or a demonstration.

        Raises:
            ValueError: a cell has another type than its column.
        """
        raise NotImplementedError

    def name_of(self, row: Row) -> Any:
        """The id that a row brings along; `None` if none."""
        return row.get("question_id", row.get("id"))

    def shown(self, example: Example) -> Mapping[str, Any]:
        """The raw demonstration of an example that serves as one."""
        return as_pair(example)

    # --- results

    def examples(self, seed: int) -> Sequence[Example]:
        return self._sides[0]

    def pool(self) -> Sequence[Shot]:
        return self._sides[1] if self.share is not None else self._training

    @cached_property
    def _sides(self) -> tuple[list[Example], list[Shot]]:
        """What is asked, and the share of the same split that is shown instead."""
        queries = self._of(self.table(self.path, self.split, self.config, self.images), "example")
        if self.share is None:
            return queries, []
        keys = [tuple(map(image_key, example.images)) or (example.id,) for example in queries]
        groups = sorted(set(keys))  # all questions about an image go to one side
        count = round(self.share * len(groups))
        if not 0 < count < len(groups):
            raise ValueError(f"{self.name} has {len(groups)} images: too few to split off a share of {self.share}.")
        chosen = set(random.Random(f"split {self.split_seed}").sample(groups, count))
        shots = [self._shot(example, self.split) for example, key in zip(queries, keys, strict=True) if key in chosen]
        return [example for example, key in zip(queries, keys, strict=True) if key not in chosen], shots

    @cached_property
    def _training(self) -> list[Shot]:
        if self.support is None and not self.has_splits:
            self.why_none = f"{self.name} has no demonstrations: {self.path} is one file. {NAME_THEM}"
            return []
        own = self.support is None
        path, config = (self.path, self.config) if self.support is None else (self.support, None)
        for split in (self.support_split,) if self.support_split else self.training:
            if own and split == self.split:
                continue
            try:
                table = self.table(path, split, config, self.support_images or (self.images if own else None))
            except MissingSplit as error:
                self.why_none = f"{self.name} has no demonstrations: {error} {NAME_THEM}"
                continue
            self.why_none = ""
            examples = self._of(table, "demonstration")
            if not own:  # splits of one dataset are apart already
                queries = {_identity(example) for example in self._sides[0]}
                fresh = [example for example in examples if _identity(example) not in queries]
                self.left_out.update({SAME: len(examples) - len(fresh)} if len(fresh) < len(examples) else {})
                examples = fresh
            return [self._shot(example, split) for example in examples]
        return []

    def _of(self, table: Table, what: str) -> list[Example]:
        self.check(table)
        row_names = [self.name_of(row) for row in table.rows]
        unique = None not in row_names and len(set(map(str, row_names))) == len(row_names)
        names = map(str, row_names if unique else range(len(row_names)))
        examples = [self.example(table, row, name, what) for row, name in zip(table.rows, names, strict=True)]
        usable = [example for example in examples if example is not None]
        if not usable:
            raise ValueError(f"{table.where} has no row that can be used. {' '.join(self.notes())}")
        return usable

    def _shot(self, example: Example, split: str) -> Shot:
        return Shot(f"{split} {example.id}", self.shown(example), example.label)

    def notes(self) -> list[str]:
        notes_of_task = super().notes()
        if self.share is not None:
            notes_of_task.append(
                f"Demonstrations are a share of {self.share:g} of the images, which are not asked: figures are over "
                "the other images only."
            )
        return notes_of_task + ([self.why_none] if self.why_none else [])


def _identity(example: Example) -> tuple[str, ...]:
    """What makes an example the same as another one elsewhere."""
    return (*map(image_key, example.images), example.question)


def texts(value: object) -> tuple[str, ...]:
    """Answers as a row holds them: one, several, or objects with an `answer` each, as VQA has them; empty: none."""
    many = value if isinstance(value, (list, tuple)) else [value]
    answers = (answer.get("answer") if isinstance(answer, Mapping) else answer for answer in many)
    return tuple(
        str(answer).strip() for answer in answers if isinstance(answer, (str, int, float)) and str(answer).strip()
    )


def common(answers: Sequence[str]) -> str:
    """The most frequent answer, the first of those as frequent."""
    return Counter(answers).most_common(1)[0][0]


def as_pair(example: Example) -> dict[str, Any]:
    """What is shown of an example: its images, its question, and the answer that most gave."""
    return {"images": list(example.images), "question": example.question, "answer": common(example.answers)}
