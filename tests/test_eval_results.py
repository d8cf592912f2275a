"""Figures of `aim eval`: means, spreads, intervals, summaries, comparisons, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_tasks import Naming, Pictures, predictions, settings
from typer.testing import CliRunner

from modeling_aim.cli import app
from modeling_aim.evaluation import Example, Prediction, Task, evaluate
from modeling_aim.evaluation.compare import MCNEMAR, compare_runs, mcnemar
from modeling_aim.evaluation.report import eval_results
from modeling_aim.evaluation.results import cell_figures
from modeling_aim.evaluation.tasks.registry import TASKS

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "naming", Naming)
    monkeypatch.setitem(TASKS, "pictures", Pictures)


class Written(Task):
    """Answers that are scored alone, or all together."""

    name = "written"

    def __init__(self, together: bool = False) -> None:
        self.together = together

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        return {} if self.together else {"accuracy": float(prediction.text)}

    def summary(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        return {"accuracy": sum(float(p.text) for p in predictions) / len(predictions)}


def _rows(scores: Sequence[float], seed: int, together: bool = False) -> list[dict[str, Any]]:
    cost = {"prompt_tokens": 10, "fused_tokens": 2, "milliseconds": 1.0, "reading_milliseconds": 0.0}
    return [
        {"example": f"e{i}", "seed": seed, "prediction": str(score), "log_probabilities": [],
         "score": None if together else score, **cost}
        for i, score in enumerate(scores)
    ]  # fmt: skip


@pytest.mark.parametrize("together", [False, True])
def test_mean_spread_and_interval(together: bool) -> None:
    rng = np.random.default_rng(1)
    scores = {seed: (rng.random(200) < 0.7).astype(float).tolist() for seed in range(3)}
    examples = {seed: [Example(f"e{i}", (), "", ()) for i in range(200)] for seed in scores}
    rows = {seed: _rows(found, seed, together) for seed, found in scores.items()}
    told = cell_figures(Written(together), examples, rows)
    means = [np.mean(found) for found in scores.values()]
    assert told["mean"] == pytest.approx(np.mean(means)) and told["spread"] == pytest.approx(np.std(means, ddof=1))
    by_example = np.mean(list(scores.values()), axis=0)  # seeds of an example are not independent draws
    error = by_example.std() / 200**0.5
    low, high = told["interval"]
    assert low == pytest.approx(told["mean"] - 1.96 * error, abs=0.4 * error)
    assert high == pytest.approx(told["mean"] + 1.96 * error, abs=0.4 * error)
    assert (told["examples"], told["answers"], told["prompt_tokens"]) == (200, 600, 10)


@pytest.mark.parametrize(("one", "two", "p"), [(0, 0, 1.0), (1, 9, 0.021484375), (5, 5, 1.0), (0, 6, 0.03125)])
def test_mcnemar_is_a_fair_coin_over_discordant_pairs(one: int, two: int, p: float) -> None:
    """By hand: 2 * sum(C(10, k), k <= 1) / 2 ** 10 = 22 / 1024, 2 / 2 ** 6."""
    first = [True] * one + [False] * (two + 7)
    second = [False] * one + [True] * two + [False] * 7
    assert mcnemar(first, second) == pytest.approx(p)


def test_runs_and_methods_are_compared_on_what_they_share(tmp_path: Path) -> None:
    options: dict[str, Any] = {"shots": (0, 4), "seeds": 1, "tasks": ("naming:,count=12",)}
    evaluate(settings(tmp_path, **options))
    evaluate(settings(tmp_path / "less", **options, methods=("zero", "aim"), limit=9))
    run, less = tmp_path / "run", tmp_path / "less/run"
    found = compare_runs(run, run, ("text", "aim"))
    (row,) = found["rows"]
    scores = {m: {r["example"]: r["score"] for r in predictions(run) if r["method"] == m} for m in ("text", "aim")}
    better = [scores["aim"][name] - scores["text"][name] for name in scores["aim"]]
    assert row["difference"] == pytest.approx(np.mean(better)) and row["test"] == MCNEMAR
    assert row["p"] == mcnemar([b < 0 for b in better], [b > 0 for b in better]) and row["examples"] == 12
    found = compare_runs(run, less)
    assert {row["methods"][0] for row in found["rows"]} == {"zero", "aim"}
    assert all(row["difference"] == 0 and row["examples"] == 9 and row["p"] == 1 for row in found["rows"])
    assert any("do not share all examples; 9 answers" in note for note in found["notes"])
    shown = CliRunner().invoke(app, ["eval", "compare", str(run), "--between", "full,aim"])
    assert shown.exit_code == 0 and "naming" in shown.output
    with pytest.raises(ValueError, match="holds no finished run"):
        compare_runs(run, tmp_path)


def test_other_demonstrations_are_said(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tasks": ("pictures:,count=4,pool=20",), "methods": ("aim",), "shots": (2,)}
    evaluate(settings(tmp_path, **options, seeds=2))
    evaluate(settings(tmp_path / "turns", **options, seeds=2, balanced=True))
    found = compare_runs(tmp_path / "run", tmp_path / "turns/run")
    assert any("answers were given from other demonstrations" in note for note in found["notes"])
    assert any("differ in balanced: False and True" in note for note in found["notes"])
    (row,) = found["rows"]
    assert row["test"] == "paired bootstrap" and (row["examples"], row["answers"]) == (4, 8)


class Together(Pictures):
    """A metric that is defined over all answers; of one answer alone there is none."""

    metric = "variety"

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        return {}

    def summary(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        told = [prediction.text for prediction in predictions]
        return {"variety": len(set(told)) / len(told) if len(told) > 1 else float("nan")}


def test_metrics_over_all_answers_are_compared_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "pictures", Together)
    options: dict[str, Any] = {"tasks": ("pictures:,count=5",), "methods": ("text", "aim"), "shots": (2,), "seeds": 2}
    results = evaluate(settings(tmp_path, **options))
    assert results["curves"] == [] and all(not cell["is_mean"] for cell in results["cells"])
    (row,) = compare_runs(tmp_path / "run", tmp_path / "run", ("text", "aim"))["rows"]
    by_method = {cell["method"]: cell["mean"] for cell in results["cells"]}
    assert (row["first"], row["second"]) == pytest.approx((by_method["text"], by_method["aim"]))
    assert row["interval"][0] <= row["difference"] <= row["interval"][1] and row["test"] == "paired bootstrap"
    monkeypatch.delitem(TASKS, "pictures")
    gone = compare_runs(tmp_path / "run", tmp_path / "run", ("text", "aim"))
    assert gone["rows"] == [] and "the task cannot be opened" in gone["notes"][0]


def test_a_metric_without_a_value_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "pictures", Together)
    evaluate(settings(tmp_path, tasks=("pictures:,count=1",), methods=("zero", "aim"), shots=(2,), seeds=1))
    text = (tmp_path / "run/results.json").read_text()
    assert "NaN" not in text and '"mean": null' in text
    assert "| pictures | 2 | – | – |" in (tmp_path / "run/results.md").read_text()


def test_results_are_metadata_of_a_model_card(tmp_path: Path) -> None:
    results = evaluate(settings(tmp_path, shots=(0, 2), seeds=1, methods=("zero", "aim")))
    (curve,) = results["curves"]
    zero, aim = (cell["mean"] for cell in results["cells"])
    assert (curve["zero_shot"], curve["peak"]) == (zero, max(zero, aim))
    assert curve["icl_efficiency"] == pytest.approx((aim - zero) / 2)  # a straight line over the whole width
    (one,) = eval_results(results)
    assert (one.dataset_name, one.metric_type, one.dataset_args) == ("naming", "accuracy", {"shots": 2})
    table = (tmp_path / "run/results.md").read_text()
    assert "| naming | 2 | 0.000 " in table and "| `aim` |" in table
