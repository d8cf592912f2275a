"""What `results.json` holds besides figures: model, versions, tasks and notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from .folder import RECORD
from .methods import method_of
from .results import PredictionRow
from .settings import EvalSettings
from .subject import Subject
from .task_run import TaskRun


def about(settings: EvalSettings, subject: Subject) -> dict[str, Any]:
    """Settings that results depend on, the model, and the versions of libraries."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"settings": RECORD.comparable(settings), "model": model_identity(settings, subject), "versions": versions}


def model_identity(settings: EvalSettings, subject: Subject) -> dict[str, str]:
    """Identity of what answers, with the depths of methods without training.

    Raises:
        ValueError: states cannot enter at a depth that is asked for.
    """
    identity = dict(subject.identity)
    for name in settings.methods:
        method = method_of(name)
        if method.projector == "untrained" and (method.depth is not None or not subject.refuses_states()):
            layers = subject.untrained(method.depth).read_layers
            identity[name] = f"states read after {', '.join(map(str, layers))} decoder layers and put back there"
    return identity


def task_summary(task_run: TaskRun, settings: EvalSettings) -> dict[str, Any]:
    """A task as it was run: its data, its metric and its notes."""
    task = task_run.task
    shots = {str(count): task.shots_note(count) for count in settings.counts}
    per_class = {str(count): task.per_class(count) for count in settings.counts}
    return {
        "task": task.name,
        "spec": task_run.spec,
        "metric": task.metric,
        "printed_times": task.printed_times,
        "parts": list(task.part_metrics),
        "examples": len(task_run.examples[0]),
        "demonstrations": "its own" if task.fixed else f"by {settings.select}, of {len(task.pool())}",
        "shots_notes": {count: note for count, note in shots.items() if note},
        "per_class": {count: each for count, each in per_class.items() if each is not None},
        "notes": [*task.notes(), *_same_seeds(task_run, settings)],
        "digest": task_run.digest,
    }


def _same_seeds(task_run: TaskRun, settings: EvalSettings) -> list[str]:
    """A note on seeds that change nothing, where there are some."""
    counts = settings.counts or [0]
    same = len(task_run.examples) > 1 and all(
        task_run.repeats(seed, count) for seed in task_run.examples for count in counts if seed
    )
    return ["All seeds have the same examples and demonstrations: answered once, but by methods that draw."] * same


def too_long(rows: Sequence[PredictionRow], settings: EvalSettings, longest: int | None) -> list[str]:
    """Which methods went beyond the `longest` positions that the backbone was made for."""
    notes = []
    for method in settings.methods:
        lengths = [row["prompt_tokens"] for row in rows if row["method"] == method]
        over = sum(longest is not None and length > longest for length in lengths)
        if over:
            notes.append(
                f"{method}: {over} of {len(lengths)} prompts have more than the backbone's {longest} positions."
            )
    return notes
