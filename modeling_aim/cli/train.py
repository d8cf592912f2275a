"""`aim train`: a projector for a backbone, from data to a Hub repository."""

from __future__ import annotations

import typer

from ..speed.estimate import announce
from ..training import TrainSettings
from ..training import train as run
from .options import command
from .terminal import safe, wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command(app, "aim train")
def train(settings: TrainSettings) -> None:
    """Train a projector for a frozen backbone; rerun the same command to resume.

    Several processes: `torchrun --nproc_per_node 8 -m modeling_aim train ...`, or `accelerate launch` with a
    configuration of DDP, FSDP or DeepSpeed.
    """
    trainer = run(settings, announce)
    if settings.dry_run:
        wide_console().print("Nothing was written (--dry-run).")
    elif trainer.args.should_save:
        wide_console().print(
            f"{safe(settings.output)}: trained for {trainer.state.global_step} steps; its README.md says how it went."
        )
