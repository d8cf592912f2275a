"""AIM projectors on the frozen backbone of aim-tiny: their data is written, then `aim train` is run.

    python examples/aim_tiny/projector.py aim      # also: aim_at_depth, aim_paper, aim_generic; rerun it to resume

`aim` is the shipped one, a projector for the input, trained on the five tasks of tasks.py. `aim_at_depth` begins at
the untrained states at depth; docs/LOG.md compares the two. `aim_paper` has the paper's form (last layer, linear and
LayerNorm), which on so narrow a decoder has room for names alone. `aim_generic` sees captioned documents only, no
names and no rules.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import BUILD, ROOT
from tasks import few_or_many, training_episodes, write_episodes
from tqdm import tqdm

EPISODES = {  # how many are written, with at most how many demonstrations
    "link_context": (30_000, 32),
    "operator": (6000, 16),
    "counting": (3000, 16),
    "attribute": (6000, 16),
    "captions": (5000, 16),
}
QUERIES = 3
MIX = {"link_context": 4.0, "operator": 0.8, "counting": 0.4, "attribute": 1.0, "captions": 0.7}
AT_DEPTH = {"projector_size": 1024, "read_layers": "0,2", "optimizer": "adamw", "learning_rate": 3e-3}
AT_INPUT = {
    "form": "residual_mlp", "projector_size": 1024, "read_layers": 3, "entry_layers": 0,
    "optimizer": "muon", "learning_rate": 1.5e-2,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "aim": {**AT_INPUT, "steps": 5000},
    "aim_at_depth": {**AT_DEPTH, "steps": 2500, "save_every": 250},
    "aim_paper": {"preset": "paper", "optimizer": "adamw", "learning_rate": 8e-3, "steps": 2000},
    "aim_generic": {**AT_INPUT, "steps": 1000},
}
SOURCES = {"aim": MIX, "aim_at_depth": MIX, "aim_paper": {"link_context": 1.0}, "aim_generic": {"captions": 1.0}}


def data(folder: Path, task: str, weight: float) -> str:
    """The training episodes of a task below `folder`, written where they are not there yet, as `--data` takes them."""
    path = folder / f"{task}.jsonl"  # all share their images
    if not path.exists():
        count, most = EPISODES[task]
        made = training_episodes(task, count, few_or_many(most), QUERIES)
        unfinished = write_episodes(path.with_suffix(".part"), tqdm(made, task, total=count, mininterval=10))
        unfinished.rename(path)
    return f"episodes:{path},weight={weight}"


def command(kind: str, backbone: str, folder: Path) -> list[str]:
    """The arguments of `aim train`.

    Args:
        kind: a key of `OPTIONS`.
        backbone: folder of the frozen backbone.
        folder: where data and result go.
    """
    options = {
        "backbone": backbone,
        "output": folder / kind,
        "batch_size": 16,
        "shots": 32,
        "prompts": "mixed",
        "log_every": 25,
        **OPTIONS[kind],
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for task, weight in SOURCES[kind].items():
        words += ["--data", data(folder / "episodes", task, weight)]
    return ["train", *words, "--set", "weight_decay=0.05", "--set", "disable_tqdm=true"]


def make(kind: str) -> None:
    """Train a projector, as far as that is not done."""
    if (BUILD / kind / "README.md").exists():  # it is written last
        return
    words = command(kind, str(BUILD / "llava"), BUILD)
    print(f"aim {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "modeling_aim", *words], check=True, cwd=ROOT)


if __name__ == "__main__":
    make(sys.argv[1])
