"""`aim backbone`: a vision-language backbone from a vision tower and a language model."""

from __future__ import annotations

import typer

from ..llava import BackboneSettings, build_backbone
from .options import command
from .terminal import safe, wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@command(app, "aim backbone")
def backbone(settings: BackboneSettings) -> None:
    """Make a stock LLaVA from a vision tower and a causal language model; rerun the same command to resume.

    Stage 1 trains the connector on captions, stage 2 connector and language model on conversations; the vision tower
    is never trained.
    """
    output = build_backbone(settings)
    wide_console().print(f"{safe(str(output))}: a backbone; its README.md says how it was made.")
