"""`aim init BACKBONE --output my-repository`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from .loading import LoadingSettings
from .options import command
from .terminal import safe, wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class InitSettings(LoadingSettings):
    """What `aim init` takes.

    Args:
        backbone: Hub id or folder of the backbone.
        output: folder of the new repository.
        preset: untrained (states return where they were read, no weights), trained (with a projector to train there)
            or paper (a projector for the input, to train).
        read_layers: layers whose states are read, such as 12,24; by default two fifths of
            the layers.
        entry_layers: layers that the states enter, 0 for the input; by default where they were read.
        projector_form: form of the projector: identity, residual or residual_mlp, and for the input also linear,
            linear_norm or mlp; by default the preset's.
        max_fused_tokens: most fused tokens of a demonstration; by default one for each text token.
        include_backbone: copy the backbone too, for a repository that needs no other.
    """

    backbone: str
    output: Path
    preset: str = "untrained"
    read_layers: tuple[int, ...] | None = None
    entry_layers: tuple[int, ...] | None = None
    projector_form: str | None = None
    max_fused_tokens: int | None = None
    include_backbone: bool = False


@command(app, "aim init", positional=("backbone",))
def init(settings: InitSettings) -> None:
    """Make an AIM repository for a backbone: without weights, or with a projector to train."""
    if settings.output.exists() and any(settings.output.iterdir()):
        raise ValueError(f"{settings.output} is not empty; give a new folder with --output.")
    from .. import AimForConditionalGeneration
    from ..image_settings import tokens_line

    model = AimForConditionalGeneration.from_backbone(
        settings.backbone,
        preset=settings.preset,
        read_layers=settings.read_layers,
        entry_layers=settings.entry_layers,
        projector_form=settings.projector_form,
        max_fused_tokens=settings.max_fused_tokens,
        **settings.options(),
    )
    settings.with_images(model)
    model.save_pretrained(settings.output, include_backbone=settings.include_backbone)
    parameters = sum(p.numel() for p in model.projector.parameters())
    weights = f"an untrained projector of {parameters:,} parameters" if parameters else "no weights are needed"
    read = safe(model.config.read_layers)
    wide_console().print(
        f"{safe(settings.output)}: AIM for {safe(settings.backbone)}, read at {read}; {weights}. "
        f"{tokens_line(model.processor)}",
        soft_wrap=True,
    )
