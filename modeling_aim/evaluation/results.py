"""The predictions of a run on disk, and the figures computed from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.jsonl import append_lines, cut_torn_line, json_lines, numbered_json
from ..files_aim import write_whole
from .metrics import vl_icl_summary
from .task import Example, Prediction, Task

PREDICTIONS = "predictions.jsonl"
RESULTS = "results.json"
LEFT_OUT = "left_out"  # in a row that is kept: why there is no answer
RESAMPLES = 2000  # of examples, where a metric is a mean over them
COSTLY_RESAMPLES = 500  # where it is recomputed for each sample
COSTS = (
    "prompt_tokens",
    "fused_tokens",
    "milliseconds",
    "reading_milliseconds",
    "first_token_milliseconds",
    "kv_bytes",
)
Key = tuple[str, str, int, int, str]  # task, method, shots, seed, example
PredictionRow = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One setting of a run: a task, a method, a number of demonstrations and a seed."""

    task: str
    method: str
    shots: int
    seed: int


def row_key(row: PredictionRow) -> Key:
    """Identity of a prediction in a run."""
    return row["task"], row["method"], row["shots"], row["seed"], row["example"]


class Kept:
    """Predictions of a run in progress: every process appends to its own file; all files are read.

    Args:
        folder: of these files.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / f"process-{rank}.jsonl"

    def repair(self) -> None:
        """Cut off lines that a kill left unfinished, in all files. No other process may be writing."""
        for path in self.folder.glob("*.jsonl"):
            cut_torn_line(path)

    def rows(self) -> dict[Key, PredictionRow]:
        """All that was kept."""
        by_key: dict[Key, PredictionRow] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open(encoding="utf-8") as file:
                for row in map(json.loads, file):
                    by_key.setdefault(row_key(row), row)
        return by_key

    def add(self, rows: Iterable[PredictionRow]) -> None:
        """Append predictions; they are safe when this returns."""
        append_lines(self.path, rows)

    def remove(self) -> None:
        """Forget all, after it was written elsewhere."""
        for path in self.folder.glob("*.jsonl"):
            path.unlink()
        self.folder.rmdir()


def write_rows(path: Path, rows: Iterable[PredictionRow]) -> None:
    """Write predictions to one file."""
    write_whole(path, json_lines(rows))


def read_rows(path: Path) -> list[PredictionRow]:
    """Predictions of a finished run.

    Raises:
        ValueError: a line is not JSON; the message names file and line.
    """
    return [row for _, row in numbered_json(path)]


def prediction_of(row: PredictionRow) -> Prediction:
    """What the model answered, as the task takes it."""
    return Prediction(row["prediction"], tuple(row["log_probabilities"]))


# --- figures


def cell_figures(
    task: Task, examples: Mapping[int, Sequence[Example]], rows: Mapping[int, Sequence[PredictionRow]]
) -> dict[str, Any]:
    """The figures of one task, method and number of demonstrations over its seeds.

    Args:
        task: scores.
        examples: those answered, by seed.
        rows: their predictions, by seed, in the same order.

    Returns:
        The mean of every metric over seeds; of the main one also its spread over seeds (sample standard deviation,
        `None` of one seed) and a 95 % bootstrap interval over examples (percentiles; answers to one example under
        several seeds are drawn together, since they are not independent); and what prompts cost, as means.
    """
    by_seed = {
        seed: task.summary(examples[seed], [prediction_of(row) for row in answered]) for seed, answered in rows.items()
    }
    names = list(next(iter(by_seed.values())))
    values = [summary[task.metric] for summary in by_seed.values()]
    is_mean = _is_mean(by_seed, task.metric, rows)
    everything = [row for answered in rows.values() for row in answered]
    return {
        "metric": task.metric,
        "printed_times": task.printed_times,
        "mean": _known(np.mean(values)),
        "is_mean": is_mean,
        "spread": _known(np.std(values, ddof=1)) if len(values) > 1 else None,
        "interval": interval(task, examples, rows),
        "by_seed": {str(seed): _known(summary[task.metric]) for seed, summary in by_seed.items()},
        "metrics": {name: _known(np.mean([summary[name] for summary in by_seed.values()])) for name in names},
        "examples": len({row["example"] for row in everything}),
        "answers": len(everything),
        "seeds": len(rows),
        **{  # rows of an earlier version lack some
            name: round(float(np.mean([row[name] for row in everything])), 2)
            for name in COSTS
            if all(name in row for row in everything)
        },
    }


def _known(value: Any) -> float | None:
    """Convert NaN to `None`, since JSON has no NaN; ROC-AUC over a single class is NaN, for example."""
    return None if np.isnan(value) else float(value)


def curves(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """VL-ICL's summary of every method over numbers of demonstrations: zero-shot, peak, ICL efficiency.

    Only of metrics that are means of scores in 0..1, and where the zero-shot answers are there.
    """
    rows = []
    for task, method in dict.fromkeys((cell["task"], cell["method"]) for cell in cells if cell["shots"]):
        start = [cell for cell in cells if (cell["task"], cell["shots"]) == (task, 0)]
        own = [cell for cell in cells if (cell["task"], cell["method"]) == (task, method)]
        if start and all(cell["is_mean"] and 0 <= cell["mean"] <= 1 for cell in start + own):
            by_shots = {cell["shots"]: cell["mean"] for cell in start + own}
            rows.append({"task": task, "method": method, **vl_icl_summary(by_shots)})
    return rows


def interval(
    task: Task, examples: Mapping[int, Sequence[Example]], rows: Mapping[int, Sequence[PredictionRow]]
) -> list[float] | None:
    """95 % bootstrap interval of the main metric's mean over seeds; `None` where the metric is not defined.

    Args:
        task, examples, rows: as for `cell_figures`. Where the metric is the mean of `task.terms`, these are drawn
            (CIDEr's with the word weights of all references); else it is recomputed for each sample.
    """
    names = sorted({row["example"] for answered in rows.values() for row in answered})
    number = {name: place for place, name in enumerate(names)}
    predictions = {seed: [prediction_of(row) for row in answered] for seed, answered in rows.items()}
    terms = {seed: task.terms(examples[seed], answers) for seed, answers in predictions.items()}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for seed, terms_of_seed in terms.items():
        if terms_of_seed is None:
            break
        places = [number[row["example"]] for row in rows[seed]]
        np.add.at(sums, places, terms_of_seed)
        np.add.at(counts, places, 1)
    else:
        draws = resamples(len(names), RESAMPLES)
        return _percentiles(np.array([sums[draw].sum() / counts[draw].sum() for draw in draws]))
    by_seed = {
        seed: [(number[row["example"]], example, prediction)
               for row, example, prediction in zip(answered, examples[seed], predictions[seed], strict=True)]
        for seed, answered in rows.items()
    }  # fmt: skip
    return _percentiles(np.array(list(_drawn_means(task, by_seed, len(names)))))


def _drawn_means(task: Task, answered: Mapping[int, Sequence[tuple[int, Example, Prediction]]], count: int) -> Any:
    """The main metric's mean over seeds for each sample of examples."""
    by_seed = {seed: {place: (e, p) for place, e, p in triples} for seed, triples in answered.items()}
    for draw in resamples(count, COSTLY_RESAMPLES):
        means = []
        for pairs in by_seed.values():
            taken = [pairs[place] for place in draw.tolist() if place in pairs]
            if taken:
                means.append(task.summary([e for e, _ in taken], [p for _, p in taken])[task.metric])
        yield float(np.mean(means)) if means else float("nan")


def resamples(count: int, times: int) -> Iterable[np.ndarray]:
    """Samples with replacement of `count` places, the same at each call."""
    generator = np.random.default_rng(0)
    return (generator.integers(0, count, count) for _ in range(times))


def _percentiles(values: np.ndarray) -> list[float] | None:
    if np.isnan(values).all():
        return None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def _is_mean(
    by_seed: Mapping[int, Mapping[str, float]], metric: str, rows: Mapping[int, Sequence[PredictionRow]]
) -> bool:
    """Whether the main metric is the mean of its scores of single answers."""
    for seed, answered in rows.items():
        scores = [row["score"] for row in answered]
        if None in scores or abs(by_seed[seed][metric] - float(np.mean(scores))) > 1e-9:
            return False
    return True
