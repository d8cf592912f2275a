"""What to train with: short runs of `aim train` on aim-tiny's backbone that differ from a base run in one setting.

    python examples/aim_tiny/sweep.py                                  # all, then the table; rerun to resume
    python examples/aim_tiny/sweep.py --only base,form-residual
    python examples/aim_tiny/sweep.py --table                          # of what is there

Every run is scored on episodes of the validation split: concepts and made-up words that no run has seen. What the
backbone reads is kept on disk, so that runs which read the same layer read once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluate import Bench, load_plugin, tasks_of, verdicts
from projector import MIX
from support import BUILD, OUT, ROOT, write
from tasks import Episode, few_or_many, training_episodes, write_episodes

sys.path.insert(0, str(ROOT))
from modeling_aim.training import ShotLaw, TrainSettings, train

CELLS = ("2-way 8", "5-way 10", "8-way 16", "operator 8", "counting 8", "attribute 8", "captions 8")
BASE: dict[str, Any] = {
    "tasks": MIX,
    "law": "few or many",
    "ending": " .",
    "steps": 150,
    "batch_size": 16,
    "shots": 16,
    "prompts": "mixed",
    "projector_form": "residual_mlp",
    "projector_size": 1024,
    "read_layers": (3,),
    "optimizer": "muon",
    "learning_rate": 1e-2,
    "arguments": {"weight_decay": 0.05, "disable_tqdm": True},
}
ADAMW = {"optimizer": "adamw", "learning_rate": 3e-3}
VARIATIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "size-256": {"projector_size": 256},
    "size-2048": {"projector_size": 2048},
    "form-residual": {"projector_form": "residual", "projector_size": None},
    "form-mlp": {"projector_form": "mlp"},
    "form-mlp-3e-2": {"projector_form": "mlp", "learning_rate": 3e-2},
    "form-linear": {"projector_form": "linear", "projector_size": None},
    "form-linear-norm": {"projector_form": "linear_norm", "projector_size": None},
    "read-1": {"read_layers": (1,)},
    "read-2": {"read_layers": (2,)},
    "read-4": {"read_layers": (4,)},
    "read-last": {"read_layers": (-1,)},
    "read-1-and-3": {"read_layers": (1, 3)},
    "read-3-and-last": {"read_layers": (3, -1)},
    "paper": {"read_layers": (-1,), "projector_form": "linear_norm", "projector_size": None, **ADAMW},
    "span-answer": {"read_span": "answer"},
    "rate-3e-3": {"learning_rate": 3e-3},
    "rate-2e-2": {"learning_rate": 2e-2},
    "rate-3e-2": {"learning_rate": 3e-2},
    "adamw-3e-3": ADAMW,
    "adamw-1e-2": {**ADAMW, "learning_rate": 1e-2},
    "data-names": {"tasks": {"link_context": 1.0}},
    "data-captions": {"tasks": {"captions": 1.0}},
    "data-names-captions": {"tasks": {"link_context": 1.0, "captions": 1.0}},
    "law-uniform": {"law": "uniform"},
    "law-exponential": {"law": "exponential"},
    "law-fixed": {"law": "fixed"},
    "ending-none": {"ending": ""},
    "ending-comma": {"ending": " ,"},
    "distilled-full": {"teacher": "full"},
    "distilled-text": {"teacher": "text"},
}
EPISODES = {"link_context": 2400, "operator": 500, "counting": 300, "attribute": 600, "captions": 2400}
HELD_OUT = 200


def data(folder: Path, task: str, law: str, ending: str, most: int) -> Path:
    """Training episodes of one kind as a file, written where they are not there yet; all files share their images."""
    name = f"{task} {law} {ending.strip() or 'nothing'}".replace(" ", "-").replace(".", "stop").replace(",", "comma")
    path = folder / "episodes" / f"{name}.jsonl"
    if not path.exists():
        shots = few_or_many(most) if law == "few or many" else ShotLaw(most, law).draw
        made = (ending_with(one, ending) for one in training_episodes(task, EPISODES[task], shots))
        write_episodes(path.with_suffix(".part"), made).rename(path)
    return path


def ending_with(episode: Episode, ending: str) -> Episode:
    """The episode with other ends of its demonstrations' wordings; what is asked for stays."""
    demos = tuple(replace(shot, answer=shot.answer.removesuffix(" .") + ending) for shot in episode.demos)
    return replace(episode, demos=demos)


def run(name: str, folder: Path, backbone: str, bench: Callable[[], Bench]) -> dict[str, Any]:
    """Train and score one variation; what is done is kept."""
    place = folder / "runs" / name
    values = {**BASE, **VARIATIONS[name]}
    if not (place / "result.json").exists():
        if not (place / "trained.json").exists():
            keep(place / "trained.json", trained(name, values, folder, backbone))
        result = json.loads((place / "trained.json").read_text(encoding="utf-8"))
        keep(place / "result.json", result | score(bench(), place / "repository", values.get("read_span", "text")))
    return json.loads((place / "result.json").read_text(encoding="utf-8"))


def keep(path: Path, values: dict[str, Any]) -> None:
    write(path, lambda p: p.write_text(json.dumps(values, indent=1), encoding="utf-8"))


def trained(name: str, values: dict[str, Any], folder: Path, backbone: str) -> dict[str, Any]:
    """Train one variation: its name, its steps, minutes, and the loss of the last thirty of them."""
    values = {**values}
    weights, law, ending = values.pop("tasks"), values.pop("law"), values.pop("ending")
    files = {task: data(folder, task, law, ending, values["shots"]) for task in weights}
    settings = TrainSettings(
        backbone=backbone,
        data=tuple(f"episodes:{path},weight={weights[task]}" for task, path in files.items()),
        output=str(folder / "runs" / name / "repository"),
        keep_states=str(folder / "states"),
        **values,
    )
    start = time.time()
    history = train(settings).state.log_history
    last = [row["loss"] for row in history if "loss" in row][-3:]
    minutes = round((time.time() - start) / 60, 1)
    return {"name": name, "steps": settings.steps, "minutes": minutes, "loss": sum(last) / len(last)}


def score(bench: Bench, repo: Path, span: str) -> dict[str, float]:
    """Accuracy by cell; demonstrations are read as the repository's projector was trained."""
    bench.plugins["aim"] = load_plugin("aim", bench.backbone, repo)
    bench.kept, bench.prefixes = (None, None), []  # of other layers
    results_by_cell = {}
    for cell in CELLS:
        tasks = tasks_of(cell, bench.split, "qa", 0, HELD_OUT, span)
        right = verdicts(bench, ["aim"], tasks)["aim"]
        results_by_cell[cell] = sum(right) / len(right)
    return results_by_cell


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["run", "steps", "minutes", "training loss", *CELLS]
    rows = [heads, ["---"] * len(heads)]
    for one in results:
        figures = [f"{one['loss']:.3f}", *(f"{one[cell]:.2f}" for cell in CELLS)]
        rows.append([one["name"], str(one["steps"]), f"{one['minutes']:.1f}", *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(VARIATIONS)}")
    parser.add_argument("--folder", type=Path, default=BUILD / "sweep")
    parser.add_argument("--backbone", default=str(OUT / "backbone"))
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    args = parser.parse_args()
    names = list(VARIATIONS) if args.only is None else args.only.split(",")
    made: list[Bench] = []

    def bench() -> Bench:
        if not made:
            made.append(Bench("validation", methods=("aim",)))
        return made[0]

    if args.table:
        names = [name for name in names if (args.folder / "runs" / name / "result.json").exists()]
    print(table([run(name, args.folder, args.backbone, bench) for name in names]))


if __name__ == "__main__":
    main()
