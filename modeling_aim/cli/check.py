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
    from ..checks import PROPERTIES, check_model, run_checks

    failed = 0
    model = check_model(
        settings.backbone, settings.revision, settings.from_config, settings.load_in_4bit, settings.device_map
    )
    table = Table("", "property", "", title=f"{safe(settings.backbone)} ({model.backbone.config.model_type})")
    for statement, problem in tracked(run_checks(model), "check", "properties", len(PROPERTIES)):
        failed += problem is not None
        table.add_row("[red]no[/]" if problem else "[green]yes[/]", statement, safe(problem or ""))
    wide_console().print(table)
    if failed:
        errors.print(f"{failed} properties do not hold on {safe(settings.backbone)}.")
        raise typer.Exit(1)
