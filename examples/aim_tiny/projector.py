"""AIM projectors on the frozen backbone of aim-tiny: data is written, `aim train`'s own function is called.

    python examples/aim_tiny/projector.py aim            # also: aim_paper, aim_generic; goes on where it stopped

`aim` is the shipped one, trained on the five tasks of tasks.py in four runs; `aim_paper` has the paper's form (last
layer, linear and LayerNorm) and the same data; `aim_generic` sees captioned documents only, no names and no rules.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from support import BUILD, ROOT
from tasks import few_or_many, training_episodes, write_episodes
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from modeling_aim.training import TrainSettings, train

EPISODES = {  # how many are written for a run, with at most how many demonstrations
    "link_context": (2500, 32),
    "operator": (1200, 16),
    "counting": (600, 16),
    "attribute": (1500, 16),
    "captions": (1000, 16),
}
QUERIES = 3
MIX = {"link_context": 2.0, "operator": 0.8, "counting": 0.4, "attribute": 1.0, "captions": 0.7}
INNER = {"projector_form": "mlp", "projector_size": 512, "read_layers": (3,)}
NAMES = {**MIX, "link_context": 5.0}
SETTINGS: dict[str, dict[str, Any]] = {
    # four runs, each further than the one before; the last two on new episodes, with more names
    "aim_1": {
        **INNER,
        "steps": 1000,
        "warmup": 0.06,
        "arguments": {"lr_scheduler_kwargs": {"num_cycles": 0.2423}},  # the first half of a cosine over 2 000 steps
    },
    "aim_2": {"backbone": "aim_1", "steps": 400, "learning_rate": 2.5e-3, "seed": 1, "drawn": 0},
    "aim_3": {"backbone": "aim_2", "steps": 800, "learning_rate": 4e-3, "seed": 2, "mix": NAMES},
    "aim": {
        "backbone": "aim_3",
        "steps": 600,
        "learning_rate": 3e-3,
        "seed": 3,
        "mix": {**NAMES, "link_context": 6.0},
    },
    "aim_paper": {"steps": 2000, "optimizer": "adamw", "learning_rate": 8e-3},
    "aim_generic": {**INNER, "steps": 600, "mix": {"captions": 1.0}},
}


def data(folder: Path, task: str, weight: float, seed: int) -> str:
    """The training episodes of a task below `folder`, written where they are not there yet, as `--data` takes them."""
    path = folder / f"{task}-{seed}" / "episodes.jsonl"
    if not path.exists():
        count, most = EPISODES[task]
        made = training_episodes(task, count, few_or_many(most), QUERIES, seed)
        unfinished = write_episodes(path.with_suffix(".part"), tqdm(made, task, total=count, mininterval=10))
        unfinished.rename(path)
    return f"episodes:{path},weight={weight}"


def settings(kind: str, backbone: str, folder: Path, **other: Any) -> TrainSettings:
    """The settings of a projector.

    Args:
        kind: a key of `SETTINGS`.
        backbone: folder of the frozen backbone.
        folder: where data and result go.
        **other: settings that differ.
    """
    values: dict[str, Any] = {
        "output": str(folder / kind),
        "batch_size": 16,
        "shots": 32,
        "prompts": "mixed",
        "optimizer": "muon",
        "learning_rate": 6e-3,
        "save_every": 100,
        "log_every": 25,
        **SETTINGS[kind],
    }
    mix, drawn = values.pop("mix", MIX), values.pop("drawn", values.get("seed", 0))
    values["data"] = tuple(data(folder / "episodes", task, weight, drawn) for task, weight in mix.items())
    earlier = values.get("backbone")
    values["backbone"] = backbone if earlier is None else str(folder / earlier)
    shown = {"weight_decay": 0.05, "disable_tqdm": not sys.stderr.isatty()}
    values["arguments"] = {**shown, **values.get("arguments", {})}
    return TrainSettings(**{**values, **other})


def backbone(folder: Path) -> str:
    """The frozen backbone as a folder that `aim train` takes, with its processor."""
    from backbone import load
    from words import processor

    path = folder / "backbone"
    if not (path / "config.json").exists():
        load("llava").save_pretrained(path)
        processor().save_pretrained(path)
    return str(path)


def runs(kind: str) -> list[str]:
    """The run of a projector and, before it, those that it goes on from."""
    earlier = SETTINGS[kind].get("backbone")
    return [*(runs(earlier) if earlier else []), kind]


def make(kind: str) -> None:
    """Train a projector, as far as that is not done."""
    for one in runs(kind):
        if not (BUILD / one / "README.md").exists():  # it is written last
            train(settings(one, backbone(BUILD), BUILD))


if __name__ == "__main__":
    make(sys.argv[1])
