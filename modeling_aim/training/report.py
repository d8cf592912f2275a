"""The report of a training run: a picture of its curves, and the training section of the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.rows import is_hub_id
from ..data.specs import split_spec
from ..publishing import base_names

if TYPE_CHECKING:
    from .trainer import AimTrainer

SHOWN = (
    "data", "steps", "batch_size", "accumulation", "optimizer", "learning_rate", "warmup", "shots", "shot_law",
    "dtype", "load_in_4bit", "prompts", "teacher", "distillation", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class LossLine:
    """A logged loss over steps.

    Args:
        label: what it is.
        points: steps and losses.
        marked: each point is marked.
    """

    label: str
    points: Sequence[tuple[int, float]]
    marked: bool


def logged(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """Steps and values of what `trainer.state.log_history` has under a name."""
    return [(row["step"], row[name]) for row in history if name in row]


def draw_lines(
    panels: Sequence[Sequence[LossLine]], ylabel: str, width: float, path: Path, titled: bool = False
) -> Path | None:
    """Draw losses in panels side by side.

    Args:
        panels: lines of each; those without points are left out.
        ylabel: of all panels.
        width: of a panel, in inches.
        path: of the PNG file.
        titled: the label of a panel's line is its title; otherwise a legend has the labels.

    Returns:
        `path`, or `None` where nothing was logged or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    drawn = [lines for lines in ([line for line in panel if line.points] for panel in panels) if lines]
    if not drawn:
        return None
    figure = Figure(figsize=(width * len(drawn), 3.2), layout="constrained")
    for axes, lines in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for line in lines:
            steps, values = zip(*line.points, strict=True)
            axes.plot(steps, values, label=line.label, marker="o" if line.marked else None, markersize=3)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
        if titled:
            axes.set_title(lines[0].label, fontsize=10)
        else:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path


def curves(history: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Draw loss and held-out loss over steps, of `trainer.state.log_history`; see `draw_lines`."""
    lines = [
        LossLine("training", logged(history, "loss"), False),
        LossLine("held-out episodes", logged(history, "eval_loss"), True),
    ]
    return draw_lines([lines], "loss a target token (nats)", 6, path)


def hub_datasets(specs: Sequence[str]) -> list[str]:
    """Hub ids among the sources of a run (`KIND:PATH[,name=value...]`), for the metadata of a model card."""
    paths = [split_spec(spec, {}, {})[1] for spec in specs]
    return list(dict.fromkeys(path for path in paths if is_hub_id(path) and not Path(path).exists()))


def training_section(settings: Mapping[str, Any], trainer: AimTrainer, picture: Path | None) -> str:
    """Markdown: data, settings, what was skipped, losses, curves.

    Args:
        settings: of the run.
        trainer: after training.
        picture: of the curves, beside the card.
    """
    state = trainer.state
    rows = [(name.replace("_", " "), settings[name]) for name in SHOWN if settings[name] is not None]
    rows += [(name, value) for name, value in sorted(settings["arguments"].items())]
    rows += [(f"image: {name}", value) for name, value in sorted((settings.get("image_settings") or {}).items())]
    if not settings["teacher"]:
        rows = [row for row in rows if row[0] != "distillation"]
    table = "\n".join(f"| {name} | {_worded(value)} |" for name, value in rows)
    trained = [row["loss"] for row in state.log_history if "loss" in row]
    right = {row["step"]: row["eval_accuracy"] for row in state.log_history if "eval_accuracy" in row}
    losses = f"Loss a target token: {trained[-1]:.4f} at the last report" if trained else "No loss was reported"
    losses += f". {trainer.verdict}\n"
    if right:
        answered = ", ".join(f"{share:.3f} (step {step})" for step, share in sorted(right.items()))
        losses += f"\nHeld-out targets answered token for token: {answered}.\n"
    skipped = ", ".join(f"{reason}: {count}" for reason, count in sorted(trainer.skipped.items())) or "nothing"
    image = f"\n![Loss over steps]({picture.name})\n" if picture else ""
    return f"""
## Training

The backbone is frozen; only the projector was trained, by `aim train`.

| | |
|---|---|
{table}

{losses}
Left out of the data on the main process: {skipped}.
{image}"""


def _worded(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "<br>".join(f"`{base_names(str(item))}`" for item in value)
    return f"`{value}`" if isinstance(value, str) else json.dumps(value, default=str)
