"""`aim eval` with methods of others: one run, one set of demonstrations, one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backbones
import pytest
from eval_tasks import Naming, Pictures, figures, predictions, settings

from modeling_aim.evaluation import evaluate
from modeling_aim.evaluation.pareto import front
from modeling_aim.evaluation.tasks.registry import TASKS

pytestmark = pytest.mark.usefixtures("without_pictures")

METHODS = ("zero", "full", "aim", "prefix-kv", "text-kv", "parallel-icl:chunks=1", "fastv:ratio=.9", "snapkv:ratio=0")


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "naming", Naming)
    monkeypatch.setitem(TASKS, "pictures", Pictures)


@pytest.mark.slow
@pytest.mark.draws
def test_exact_methods_answer_as_full_does(tmp_path: Path) -> None:
    """Of one run: the same examples with the same demonstrations, written and chosen; KV is what the cache holds."""
    tasks = ("naming:,count=4", "pictures:,count=2,options=cat|a dog|bird")
    results = evaluate(settings(tmp_path, tasks=tasks, shots=(0, 2), seeds=1, methods=METHODS))
    rows = predictions(tmp_path / "run")
    by = {(row["method"], row["example"]): row for row in rows}
    names = {row["example"] for row in rows}
    for method in ("prefix-kv", "parallel-icl:chunks=1", "snapkv:ratio=0"):
        for name in names:
            own, full = by[method, name], by["full", name]
            assert own["demonstrations"] == full["demonstrations"] and own["prediction"] == full["prediction"]
            assert own["log_probabilities"] == pytest.approx(full["log_probabilities"], abs=1e-4)
            assert (own["prompt_tokens"], own["kv_bytes"]) == (full["prompt_tokens"], full["kv_bytes"])
    for name in names:
        full, text, aim, fast = (by[m, name] for m in ("full", "text-kv", "aim", "fastv:ratio=.9"))
        assert text["kv_bytes"] < fast["kv_bytes"] < full["kv_bytes"]
        assert full["kv_bytes"] * aim["prompt_tokens"] == aim["kv_bytes"] * full["prompt_tokens"]
    assert {"by_cost.png", "results.md"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert "Pareto front" in (tmp_path / "run" / "results.md").read_text()
    assert any("one prompt at a time" in note for note in results["notes"])
    cells = figures(results)
    assert all(cells[method, 2]["first_token_milliseconds"] > 0 for method in METHODS[1:])


def test_a_chat_is_refused_with_a_note(tmp_path: Path) -> None:
    tiny = backbones.build("llava")
    tiny.model.save_pretrained(tmp_path / "tiny")
    tiny.processor.save_pretrained(tmp_path / "tiny")
    options: dict[str, Any] = {"repo": None, "backbone": str(tmp_path / "tiny"), "prompts": "chat", "shots": (2,)}
    results = evaluate(
        settings(tmp_path, tasks=("pictures:,count=2",), seeds=1, methods=("zero", "full", "text-kv"), **options)
    )
    assert [cell["method"] for cell in results["cells"]] == ["zero", "full"]
    assert any("use prompts='plain'" in note for note in results["notes"])


def cell(method: str, mean: float, tokens: float) -> dict[str, Any]:
    return {"method": method, "shots": 2, "mean": mean, "prompt_tokens": tokens}


def test_the_front_has_what_no_other_beats() -> None:
    cells = [cell("zero", 0.1, 10), cell("aim", 0.9, 30), cell("text", 0.1, 20), cell("full", 0.9, 90)]
    cells += [cell("aim-shuffled", 1.0, 5), cell("text-kv", 0.9, 30), cell("fastv", 0.95, 80)]
    found = [one["method"] for one in front(cells, "prompt_tokens")]
    assert found == ["zero", "aim", "text-kv", "fastv"]
