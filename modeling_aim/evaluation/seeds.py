"""Tasks with other data for each seed: their spec has `{seed}` where the file's name has the number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .task import Example, Prediction, Shot, Task
from .tasks.registry import open_task

MARK = "{seed}"


def open_seeded(spec: str, seeds: int) -> Task:
    """A task, or one task for each seed under one name, as in `episodes:data/test-{seed}.jsonl,name=naming`.

    Args:
        spec: see `open_task`.
        seeds: how many.

    Raises:
        ValueError: as `open_task`; or a task with a pool has other data for each seed.
    """
    if MARK not in spec:
        return open_task(spec)
    parts = {seed: open_task(spec.replace(MARK, str(seed))) for seed in range(seeds)}
    if not all(part.fixed for part in parts.values()):
        raise ValueError(f"{spec!r}: {MARK} is for tasks whose examples bring their own demonstrations.")
    return Seeded(parts)


class Seeded(Task):
    """Several tasks of one kind as the seeds of one; ids begin with the seed.

    Args:
        parts: the task of each seed.
    """

    fixed = True

    def __init__(self, parts: dict[int, Task]) -> None:
        self.parts, first = parts, parts[0]
        self.name = first.name if len({part.name for part in parts.values()}) == 1 else f"{first.name} and on"
        self.max_new_tokens, self.metric = first.max_new_tokens, first.metric  # type: ignore[misc]

    def examples(self, seed: int) -> Sequence[Example]:
        return [replace(example, id=f"{seed}.{example.id}") for example in self.parts[seed].examples(seed)]

    def _own(self, example: Example) -> tuple[Task, Example]:
        """The part that an example comes from, and the example as that part knows it."""
        seed, _, name = example.id.partition(".")
        return self.parts[int(seed)], replace(example, id=name)

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        part, own = self._own(example)
        return [replace(shot, id=f"{seed}.{shot.id}") for shot in part.shots(own, count, seed)]

    def shots_note(self, count: int) -> str:
        return self.parts[0].shots_note(count)

    def per_class(self, count: int) -> int | None:
        return self.parts[0].per_class(count)

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        part, own = self._own(example)
        return part.score(own, prediction)

    def summary(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        own = [self._own(example)[1] for example in examples]
        return self.parts[0].summary(own, predictions)

    def notes(self) -> list[str]:
        return list(dict.fromkeys(note for part in self.parts.values() for note in part.notes()))
