"""A task: examples to answer, demonstrations to draw from, and what counts as right. It never sees a model.

The runner asks a task for `examples`, chooses demonstrations from its `pool` (or takes those that the task fixes), has
a model answer, and gives the answers back to `score` and `summary`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.pairs import Pair


@dataclass(frozen=True)
class Shot:
    """A demonstration that may be shown.

    Args:
        id: its name in the task's data; saved with the predictions.
        pair: the raw demonstration, images unopened.
        label: its class, where it has one, for choosing in balance.
    """

    id: str
    pair: Pair
    label: str | None = None


@dataclass(frozen=True)
class Example:
    """One query and its reference answers.

    Args:
        id: its name in the task's data, unique within the task.
        images: its images, unopened: paths, PIL images, or what `datasets` holds undecoded. May be empty.
        question: what is asked, in the task's own words, without placeholders for images.
        answers: right answers (references of a caption, the answers of all annotators).
        options: where the answer is chosen by likelihood, all that it can be; empty where it is written.
        label: its class, where the metric counts by class.
        facts: what else `score` and `summary` need; plain JSON.
        instruction: what is said once at the beginning of a prompt, before all demonstrations.
    """

    id: str
    images: tuple[Any, ...]
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    label: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    instruction: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one example.

    Args:
        text: the answer as written, uncut; of options, the likeliest one.
        log_probabilities: of each option, the mean over its tokens (length-normalised); empty where it was written.
    """

    text: str
    log_probabilities: tuple[float, ...] = ()


class Task:
    """One evaluation. Subclasses are named in `TASKS`, take a path and keyword settings, and read it when first asked.

    Attributes:
        name: in tables, files and messages.
        max_new_tokens: most tokens of a written answer.
        metric: the main one, a key of what `summary` returns; higher is better.
        printed_times: what the main metric is multiplied with where it is shown, as papers show it.
        fixed: each example brings its own demonstrations (`shots`), so ways of choosing do not apply.
        part_metrics: keys of what `summary` returns that are the main metric over a part of the examples; they have a
            table of their own.

    The tests expect of every task a setting `name`, `max_new_tokens` of 5 or more, the same keys of `score` for every
    answer, and a main metric of 1 for the first reference and exactly 0 for "zebra" and for an empty answer.
    """

    name: str = ""
    max_new_tokens: int = 15
    metric: str = "accuracy"
    printed_times: int = 1
    fixed: bool = False
    part_metrics: tuple[str, ...] = ()

    def examples(self, seed: int) -> Sequence[Example]:
        """The queries, in an order of their own; those of a fixed dataset do not depend on `seed`."""
        raise NotImplementedError

    def pool(self) -> Sequence[Shot]:
        """What demonstrations are drawn from: the training split, never a query. Empty where `fixed`."""
        return ()

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        """The demonstrations of an example whose task fixes them, in the order they are shown.

        Args:
            example: one of `examples(seed)`.
            count: how many in all; a task that counts by class says so in `shots_note`.
            seed: decides what the task leaves open.

        Raises:
            ValueError: the task has not as many.
        """
        raise NotImplementedError

    def shots_note(self, count: int) -> str:
        """How the literature counts `count` demonstrations, where it differs ("1 a class"); else empty."""
        return ""

    def per_class(self, count: int) -> int | None:
        """How many of `count` demonstrations are of each class, where a task shows as many of each; else `None`."""
        return None

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        """Scores of one answer, each in 0..1, where the metric is a mean over examples; all keys for every example."""
        raise NotImplementedError

    def summary(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The metrics over all examples: by default the means of `score`; CIDEr and ROC-AUC override it."""
        scores = [self.score(e, p) for e, p in zip(examples, predictions, strict=True)]
        return {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]} if scores else {}

    def terms(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[float] | None:
        """What the main metric is the mean of, for each example; `None` where it is no such mean (ROC-AUC).

        By default the scores; CIDEr's depend on the references of all examples.
        """
        scores = [self.score(e, p) for e, p in zip(examples, predictions, strict=True)]
        return [score[self.metric] for score in scores] if all(self.metric in score for score in scores) else None

    def notes(self) -> list[str]:
        """What a reader of the table must know: tokenizer used, both ways of counting, what was left out and why."""
        return []
