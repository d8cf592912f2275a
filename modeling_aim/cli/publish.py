"""`aim publish OUTPUT REPO_ID`: what a run wrote, as a repository of the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from .loading import LoadingSettings
from .options import command
from .terminal import safe

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, kw_only=True)
class PublishSettings(LoadingSettings):
    """What `aim publish` takes.

    Args:
        output: folder of an AIM repository, such as --output of aim train.
        repo_id: repository of the Hub, owner/name; made where there is none.
        backbone: Hub id of the backbone, where it was loaded from a local folder.
        include_backbone: publish the backbone too, for a repository that needs no other.
        private: make a new repository private.
        check: load it first as remote code from an empty cache, which downloads the backbone again.
        revision: branch to publish to, made where there is none.
        dtype: precision in which that check loads the backbone; by default its own.
        load_in_4bit: load it in 4-bit for the check.
        device_map: where the check puts the backbone, such as "auto" or "cuda".
    """

    output: Path
    repo_id: str
    backbone: str | None = None
    include_backbone: bool = False
    private: bool = False
    check: bool = True


@command(app, "aim publish", positional=("output", "repo_id"))
def publish(settings: PublishSettings) -> None:
    """Publish a repository: weights, code, card and processor; no checkpoints, no pickles, no local paths."""
    from .. import publishing

    settings.options()  # which checks them
    load = {"dtype": settings.dtype, "device_map": settings.device_map}
    done = publishing.publish(
        settings.output,
        settings.repo_id,
        backbone=settings.backbone,
        include_backbone=settings.include_backbone,
        private=settings.private or None,
        revision=settings.revision,
        check=settings.check,
        load={**{name: value for name, value in load.items() if value}, "load_in_4bit": settings.load_in_4bit},
    )
    console = Console()
    console.print(f"{safe(done.url)}: {len(done.files)} files, commit {safe(done.commit)}.", soft_wrap=True)
    if done.left_out:
        console.print(f"Left out: {safe(', '.join(done.left_out))}.", soft_wrap=True)
    loaded = "It was loaded as remote code first" if settings.check else "It was not loaded first (--no-check)"
    console.print(
        f'{loaded}; others load it with from_pretrained("{safe(settings.repo_id)}", trust_remote_code=True).',
        soft_wrap=True,
    )
