"""Two runs, or two methods, compared with paired tests on the examples that both answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.jsonl import read_json
from .results import COSTLY_RESAMPLES, PREDICTIONS, RESULTS, PredictionRow, prediction_of, read_rows, resamples
from .seeds import open_seeded
from .task import Task

RESAMPLES = 10_000
MCNEMAR = "McNemar's exact test"
PredictionPairs = list[tuple[PredictionRow, PredictionRow]]


def compare_runs(first: Path, second: Path, between: Sequence[str] = ()) -> dict[str, Any]:
    """Compare the answers of two finished runs, cell by cell.

    Args:
        first, second: their output folders; may be the same one.
        between: two methods, the first one of `first` with the second one of `second`; when empty each method that
            both runs have is compared with itself.

    Returns:
        `rows`: for each task and number of demonstrations both scores, the difference (second less first) with its
        95 % interval, `printed_times` (what these are multiplied with where they are shown: 100 of CIDEr), `p`, and
        the test; `notes`: what the runs do not share.

    Raises:
        ValueError: a folder holds no finished run, or there is nothing to compare.
    """
    if len(between) not in (0, 2):
        raise ValueError(f"between={','.join(between)!r}: expected two methods, as in full,aim.")
    if not between and first.resolve() == second.resolve():
        raise ValueError(
            "A run differs from itself in its methods alone: say which to compare, as in --between full,aim."
        )
    runs = [_open(folder) for folder in (first, second)]
    tasks = _Tasks(runs)
    notes = _differences(runs)
    rows = []
    for task, shots, methods in _cells(runs, between):
        sides = [_answers(run["rows"], task, shots, method) for run, method in zip(runs, methods, strict=True)]
        shared = [key for key in sides[0] if key in sides[1]]
        where = f"{task}, {shots} demonstrations, {' and '.join(dict.fromkeys(methods))}"
        alone = [len(side) - len(shared) for side in sides]
        if any(alone):
            notes.append(
                f"{where}: the runs do not share all examples; {len(shared)} answers are compared, {alone[0]} of the "
                f"first and {alone[1]} of the second are not."
            )
        if not shared:
            continue
        pairs = [(sides[0][key], sides[1][key]) for key in shared]
        other = sum(a["demonstrations"] != b["demonstrations"] for a, b in pairs)
        if other and all(a["demonstrations"] and b["demonstrations"] for a, b in pairs):
            notes.append(f"{where}: {other} of {len(pairs)} answers were given from other demonstrations.")
        tested = _tested(pairs, tasks.get(task))
        if tested is None:
            notes.append(f"{where}: not compared, the task cannot be opened to score the answers together.")
        else:
            named = {"task": task, "shots": shots, "methods": list(methods)}
            rows.append({**named, "printed_times": _printed_times(runs, task), **tested})
    if not rows and not notes:
        raise ValueError(f"{first} and {second} have no task, method and number of demonstrations in common.")
    if len(rows) > 1:
        notes.append(f"{len(rows)} comparisons were made; their p values are not corrected for that.")
    return {"first": str(first), "second": str(second), "rows": rows, "notes": notes}


def _open(folder: Path) -> dict[str, Any]:
    for name in (RESULTS, PREDICTIONS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no finished run of `aim eval`: there is no {name}.")
    results = read_json(folder / RESULTS)
    if not (isinstance(results, dict) and {"tasks", "cells", "settings"} <= set(results)):
        raise ValueError(f"{folder / RESULTS} is not a result of `aim eval`; run it again with --overwrite.")
    return {"results": results, "rows": read_rows(folder / PREDICTIONS)}


def _differences(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What two runs were asked differently."""
    notes = []
    tasks = [{task["task"]: task for task in run["results"]["tasks"]} for run in runs]
    for name in [name for name in tasks[0] if name in tasks[1]]:
        if tasks[0][name]["digest"] != tasks[1][name]["digest"]:
            notes.append(f"{name}: the runs did not ask the same examples; those with the same id are compared.")
        if tasks[0][name]["metric"] != tasks[1][name]["metric"]:
            raise ValueError(f"{name} was scored by {tasks[0][name]['metric']} and by {tasks[1][name]['metric']}.")
    settings = [run["results"]["settings"] for run in runs]
    for name in ("prompts", "separator", "select", "balanced", "drop_duplicates", "dtype", "load_in_4bit"):
        first, second = (setting.get(name) for setting in settings)
        if first != second:
            notes.append(f"The runs differ in {name}: {first!r} and {second!r}.")
    return notes


def _printed_times(runs: Sequence[Mapping[str, Any]], name: str) -> int:
    """What the scores of a task are multiplied with where they are shown; runs of an earlier version do not say it."""
    tasks = [task for run in runs for task in run["results"]["tasks"] if task["task"] == name]
    return max(task.get("printed_times", 100 if task["metric"] == "cider" else 1) for task in tasks)


def _cells(runs: Sequence[Mapping[str, Any]], between: Sequence[str]) -> list[tuple[str, int, tuple[str, str]]]:
    """Task, number of demonstrations and both methods of every comparison."""
    have = [dict.fromkeys((c["task"], c["shots"], c["method"]) for c in run["results"]["cells"]) for run in runs]
    if not between:
        return [(task, shots, (method, method)) for task, shots, method in have[0] if (task, shots, method) in have[1]]
    cells = []
    for task, shots in dict.fromkeys((t, s) for side in have for t, s, _ in side):
        sides = [_named(side, task, shots, method) for side, method in zip(have, between, strict=True)]
        if all(sides) and shots:
            cells.append((task, shots, (between[0], between[1])))
    return cells


def _named(have: Mapping[tuple[str, int, str], None], task: str, shots: int, method: str) -> bool:
    return (task, shots, method) in have or (method == "zero" and (task, 0, method) in have)


def _answers(
    rows: Sequence[PredictionRow], task: str, shots: int, method: str
) -> dict[tuple[int, str], PredictionRow]:
    """Answers of a cell by seed and example; without demonstrations those of the first seed stand for all."""
    by_example = {
        (row["seed"], row["example"]): row
        for row in rows
        if (row["task"], row["method"]) == (task, method) and row["shots"] == (0 if method == "zero" else shots)
    }
    if method == "zero" and {seed for seed, _ in by_example} == {0}:
        seeds = {row["seed"] for row in rows if row["task"] == task}
        by_example = {(seed, name): row for seed in sorted(seeds) for (_, name), row in by_example.items()}
    return by_example


class _Tasks:
    """Tasks of two runs, opened when answers have to be scored together; `None` where their data is gone."""

    def __init__(self, runs: Sequence[Mapping[str, Any]]) -> None:
        self.specs = {task["task"]: task["spec"] for run in runs for task in run["results"]["tasks"]}
        self.seeds = max(run["results"]["settings"]["seeds"] for run in runs)
        self.opened: dict[str, Task | None] = {}

    def get(self, name: str) -> Any:
        """A function that opens the task."""

        def opened() -> Task | None:
            if name not in self.opened:
                try:
                    self.opened[name] = open_seeded(self.specs[name], self.seeds)
                except (ValueError, OSError, ImportError):
                    self.opened[name] = None
            return self.opened[name]

        return opened


def _tested(pairs: PredictionPairs, task: Any) -> dict[str, Any] | None:
    """Both scores of some pairs of answers, their difference, and whether it is more than chance.

    Scores of 0 and 1, each example once: McNemar's exact test. Otherwise a paired bootstrap over examples, with the
    answers to one example under several seeds drawn together: they are not independent.
    """
    names = sorted({a["example"] for a, _ in pairs})
    if any(row["score"] is None for pair in pairs for row in pair):
        opened = task()
        if opened is None:
            return None
        scored = _scored(pairs, opened)
        if scored is None:
            return _together(pairs, names, opened)
        pairs = scored
    number = {name: place for place, name in enumerate(names)}
    sums, counts = np.zeros((2, len(names))), np.zeros(len(names))
    for pair in pairs:
        for side, row in enumerate(pair):
            sums[side, number[row["example"]]] += row["score"]
        counts[number[pair[0]["example"]]] += 1
    first, second = (float(side.sum() / counts.sum()) for side in sums)
    draws = (sums[:, draw].sum(axis=1) / counts[draw].sum() for draw in resamples(len(names), RESAMPLES))
    differences = np.array([second_score - first_score for first_score, second_score in draws])
    figures = _figures(first, second, differences, len(names), len(pairs))
    scores = {row["score"] for pair in pairs for row in pair}
    if scores <= {0, 1} and len(names) == len(pairs):
        figures |= {
            "p": mcnemar([a["score"] > b["score"] for a, b in pairs], [a["score"] < b["score"] for a, b in pairs])
        }
        figures |= {"test": MCNEMAR}
    return figures


def _scored(pairs: PredictionPairs, task: Task) -> PredictionPairs | None:
    """The same pairs with what the metric is the mean of as scores (CIDEr's); `None` where it is no such mean."""
    by_side: list[dict[tuple[int, str], float]] = [{}, {}]
    for seed in sorted({row["seed"] for pair in pairs for row in pair}):
        known = {example.id: example for example in task.examples(seed)}
        for side, scores in enumerate(by_side):
            by_name = {pair[side]["example"]: pair[side] for pair in pairs if pair[side]["seed"] == seed}
            rows = list(by_name.values())  # of `zero`, one row stands for several seeds
            terms = task.terms([known[row["example"]] for row in rows], [prediction_of(row) for row in rows])
            if terms is None:
                return None
            scores.update(zip(((seed, row["example"]) for row in rows), terms, strict=True))

    def scored(row: PredictionRow, side: int) -> PredictionRow:
        return {**row, "score": by_side[side][row["seed"], row["example"]]}

    return [(scored(first, 0), scored(second, 1)) for first, second in pairs]


def _figures(first: float, second: float, differences: np.ndarray, examples: int, answers: int) -> dict[str, Any]:
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    tail = min(float(np.mean(differences <= 0)), float(np.mean(differences >= 0)))
    return {
        "first": first,
        "second": second,
        "difference": second - first,
        "interval": [float(low), float(high)],
        "p": min(1.0, 2 * max(tail, 1 / len(differences))) if first != second else 1.0,
        "test": "paired bootstrap",
        "examples": examples,
        "answers": answers,
    }


def mcnemar(only_first: Sequence[bool], only_second: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test: a fair coin for each example that one side alone got right."""
    first_wins, second_wins = sum(only_first), sum(only_second)
    count = first_wins + second_wins
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(min(first_wins, second_wins) + 1)) / 2**count)


def _together(pairs: PredictionPairs, names: Sequence[str], task: Task) -> dict[str, Any]:
    """As `_tested`, for a metric that is defined over all answers."""
    seeds = sorted({row["seed"] for pair in pairs for row in pair})
    known = {seed: {example.id: example for example in task.examples(seed)} for seed in seeds}
    by_name: dict[str, PredictionPairs] = {}
    for pair in pairs:
        by_name.setdefault(pair[0]["example"], []).append(pair)

    def metric(taken: PredictionPairs, side: int) -> float:
        means = []
        for seed in seeds:
            rows = [pair[side] for pair in taken if pair[1]["seed"] == seed]
            if rows:
                examples = [known[seed][row["example"]] for row in rows]
                means.append(task.summary(examples, [prediction_of(row) for row in rows])[task.metric])
        return float(np.mean(means))

    differences = []
    for draw in resamples(len(names), COSTLY_RESAMPLES):
        taken = [pair for place in draw.tolist() for pair in by_name[names[place]]]
        differences.append(metric(taken, 1) - metric(taken, 0))
    first, second = metric(pairs, 0), metric(pairs, 1)
    return _figures(first, second, np.array(differences), len(names), len(pairs))
