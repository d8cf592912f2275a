"""A task as one run asks it: its examples for each seed, and the demonstrations chosen for them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .choosing import Chosen, check_pool, own_shots
from .seeds import open_seeded
from .settings import EvalSettings
from .task import Example, Task


@dataclass
class TaskRun:
    """A task as one run asks it.

    Args:
        spec: what the task was opened from.
        task: the task.
        examples: those of each seed, in their order.
        chosen: demonstrations of every example.
    """

    spec: str
    task: Task
    examples: dict[int, list[Example]]
    chosen: Chosen

    def repeats(self, seed: int, count: int = 0) -> bool:
        """Whether a seed has the examples and demonstrations of the first one."""
        if seed == 0 or self.examples[seed] != self.examples[0]:
            return False
        names = [example.id for example in self.examples[0]] if count else []
        return all(self.chosen[seed, count, name] == self.chosen[0, count, name] for name in names)

    @property
    def digest(self) -> str:
        """Identity of the examples."""
        described = [
            [seed, e.id, e.question, list(e.answers)] for seed, examples in self.examples.items() for e in examples
        ]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def open_task_run(spec: str, settings: EvalSettings) -> TaskRun:
    """Open a task and check its demonstrations, before a model is loaded."""
    task = open_seeded(spec, settings.seeds)
    examples = {seed: _limited(task.examples(seed), settings.limit) for seed in range(settings.seeds)}
    for seed, of_seed in examples.items():
        if not of_seed:
            raise ValueError(f"{task.name} has no examples for seed {seed}.")
        if len({example.id for example in of_seed}) < len(of_seed):
            raise ValueError(f"{task.name} gives several examples the same id.")
    task_run = TaskRun(spec, task, examples, {})
    if task.fixed:
        task_run.chosen = own_shots(task, examples, settings.counts)
    else:
        check_pool(task, settings.counts, settings.choice)
    return task_run


def _limited(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """All, or as many of them, drawn with one seed, in their order."""
    if limit is None or len(examples) <= limit:
        return list(examples)
    return [examples[place] for place in sorted(random.Random("limit").sample(range(len(examples)), limit))]
