"""ScienceQA (arXiv 2209.09513): questions of school science with options, half of them with an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.tables import Row, Table
from ..metrics import LETTERS, scienceqa_choice
from ..task import Example, Prediction
from .splits import SplitTask


class ScienceQA(SplitTask):
    """The test split: 4 241 questions, 2 017 of them with an image. Answers are parsed as in LLaVA's scorer.

    Args:
        path: the dataset of `lmms-lab` (parquet files in a folder for each configuration, or its Hub id). Columns
            `image` (or none), `question`, `choices`, `answer` (a number) and `hint`. Without a training split, the
            validation split is demonstrated from.
        config: `"ScienceQA-FULL"`, or `"ScienceQA-IMG"` for the questions with an image only.
        **settings: as for `SplitTask`.
    """

    training = ("train", "validation")

    def __init__(
        self,
        path: str = "lmms-lab-encoder/ScienceQA",
        *,
        split: str = "test",
        config: str | None = "ScienceQA-FULL",
        name: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(path, name=name or "ScienceQA", split=split, config=config, **settings)

    def table(self, path: str, split: str, config: str | None, images: str | None) -> Table:
        official = [
            folder
            for folder in (Path(path), Path(path) / "data" / "scienceqa")
            if (folder / "problems.json").is_file()
        ]
        if official:
            raise ValueError(
                f"{official[0]} is ScienceQA as its authors publish it (problems.json), which this task does not "
                "read. Give the same questions in parquet: scienceqa for the dataset on the Hub, or scienceqa:FOLDER "
                "with a copy of lmms-lab-encoder/ScienceQA."
            )
        return super().table(path, split, config, images)

    def check(self, table: Table) -> None:
        table.need("image", "question", "choices", "answer", "hint")

    def example(self, table: Table, row: Row, name: str, what: str) -> Example | None:
        choices, answer = row["choices"], row["answer"]
        fits = isinstance(choices, list) and 0 < len(choices) <= len(LETTERS) and isinstance(answer, int)
        if not fits or not 0 <= answer < len(choices):
            raise ValueError(
                f"{table.where}, row {name}: choices={choices!r:.60} and answer={answer!r}; expected up to "
                f"{len(LETTERS)} choices and the number of the right one."
            )
        image = row["image"]
        empty = image is None or (not isinstance(image, str) and not image.get("bytes") and not image.get("path"))
        images = () if empty else self.found(table.folder, image, what)
        if images is None:
            return None
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        context = (row["hint"] or "").strip() or "N/A"
        prompt = f"Question: {row['question'].strip()}\nContext: {context}\nOptions: {options}\nAnswer:"
        return Example(
            name, images, prompt, (LETTERS[answer],), label=LETTERS[answer], facts={"choices": len(choices)}
        )

    def shown(self, example: Example) -> dict[str, Any]:
        images = {"images": list(example.images)} if example.images else {}
        return {**images, "question": example.question, "answer": f"The answer is {example.answers[0]}."}

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        """Accuracy, and whether the answer could not be parsed, which is wrong."""
        chosen = scienceqa_choice(prediction.text.strip())
        return {"accuracy": float(chosen == example.answers[0]), "failed": float(chosen is None)}

    def summary(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The means, and accuracy over the questions with an image, where there are such."""
        seen = [(e, p) for e, p in zip(examples, predictions, strict=True) if e.images]
        right = [self.score(e, p)["accuracy"] for e, p in seen]
        with_image = {"image_accuracy": sum(right) / len(right)} if right else {}
        return {**super().summary(examples, predictions), **with_image}
