"""Every example runs as its first lines say, on smaller numbers; `make demo` runs examples/demo.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from forked import run_python

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {  # script: (arguments, what it prints)
    "bank_ask_many.py": ("--bank {folder}/bank", "right"),
    "bank_retrieval.py": ("--concepts 4 --queries 1", "random"),
    "bank_on_the_hub.py": ("", "read by another model: projector"),
    "export_to_vllm.py": ("--output {folder}/prompt.safetensors", "same logits"),
    "stock_class.py": ("", "of 5 right"),
    "evaluate.py": (
        "--output {folder}/eval --tasks link_context,captions --shots 0,2 --seeds 1 --episodes 3",
        "results.md",
    ),
    "llava_pipeline.py": (
        "--output {folder}/pipeline --images 8 --asked 4 --chat-steps 60 --steps 2 2 --judged 1",
        "AIM from 4 demonstrations, without training",
    ),
    "train_projector.py": (
        "--episodes 40 --steps 2 --batch-size 2 --asked 2 --output {folder}/out",
        "right on held-out",
    ),
}
SHARED = {"demo.py", "lesson.py"}  # run by make demo; imported by the others


LONG = {"llava_pipeline.py", "train_projector.py", "evaluate.py"}  # CI runs them by name: .ci/run


@pytest.mark.parametrize("script", [pytest.param(s, marks=pytest.mark.slow) if s in LONG else s for s in EXAMPLES])
def test_an_example_runs(script: str, tmp_path: Path) -> None:
    arguments, printed = EXAMPLES[script]
    command = [str(ROOT / "examples" / script), *arguments.format(folder=tmp_path).split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_python(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert printed in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_llava_pipeline_learns(tmp_path: Path) -> None:
    """At its own settings; how much of each stage is right is what the script writes."""
    command = [str(ROOT / "examples" / "llava_pipeline.py"), "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = run_python(command, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads((tmp_path / "report.json").read_text())
    shares = {stage: right / count for stage, (right, count) in figures.items()}
    assert shares["instruction data"] > 0.9, shares
    assert shares["chat model, judgement"] > 0.85, shares  # both scores, on unseen concepts; by chance a quarter
    judgements = [share for stage, share in shares.items() if stage.startswith("judge")]
    assert len(judgements) == 4 and min(judgements) > 0.88, shares  # both orders of mostly right and of wrong answers
    assert shares["backbone"] > 0.6, shares  # by chance a fifth
    assert shares["AIM"] > 0.6 > shares["without demonstrations"], shares  # by chance half


def test_no_example_is_left_out() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES) | SHARED
