"""`aim check BACKBONE`."""

from __future__ import annotations

from dataclasses import dataclass

import typer
from rich.table import Table

from ..progress import tracked
from .options import command
from .terminal import errors, safe, wide_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What `aim check` takes.

    Args:
        backbone: Hub id or folder of a backbone or of an AIM repository.
        from_config: build it from its config with random weights and two layers; no weights are needed.
        revision: revision of the repository.
        load_in_4bit: load the backbone in 4-bit.
        device_map: where the backbone goes, such as "auto" or "cuda".
    """

    backbone: str
    from_config: bool = False
    revision: str | None = None
    load_in_4bit: bool = False
    device_map: str | None = None


@command(app, "aim check", positional=("backbone",))
def check(settings: CheckSettings) -> None:
    """Try what AIM promises on a backbone, before any training, and print what holds."""
    from ..checks import PROPERTIES, check_model, try_properties

    failed = 0
    model = check_model(
        settings.backbone, settings.revision, settings.from_config, settings.load_in_4bit, settings.device_map
    )
    table = Table("", "property", "", title=f"{safe(settings.backbone)} ({model.backbone.config.model_type})")
    for outcome in tracked(try_properties(model), "check", "properties", len(PROPERTIES)):
        failed += outcome.problem is not None
        mark = "[red]no[/]" if outcome.problem else "[dim]n/a[/]" if outcome.beside else "[green]yes[/]"
        table.add_row(mark, outcome.sentence, safe(outcome.problem or outcome.beside or ""))
    wide_console().print(table)
    if failed:
        errors.print(f"{failed} properties do not hold on {safe(settings.backbone)}.")
        raise typer.Exit(1)
