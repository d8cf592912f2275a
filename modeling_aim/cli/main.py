"""The `aim` command: its subcommands are imported when they are run, so that `aim --help` is immediate."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__

# Module of each command, and its line in `aim --help`.
COMMANDS = {
    "answer": ("answer", "Answer a question about an image from demonstrations of your own."),
    "init": ("init", "Make an AIM repository for a backbone: without weights, or with a projector to train."),
    "tune": ("tune", "Find the depth at which states answer best, on your own demonstrations."),
    "check": ("check", "Try what AIM promises on a backbone, before any training."),
    "backbone": ("backbone", "Make a backbone from a vision tower and a language model: LLaVA's two stages."),
    "train": ("train", "Train a projector for a frozen backbone."),
    "eval": ("eval", "Evaluate a model few-shot; compare runs; measure attention."),
    "data": ("data", "Make instruction data from captions and boxes by a text model."),
    "bank": ("bank", "Demonstrations read once: build, inspect and choose."),
    "publish": ("publish", "Publish a repository on the Hub, after loading it as others will."),
    "bench": ("bench", "Count and measure what few-shot answers cost on a backbone."),
    "serve": ("serve", "Serve OpenAI chat completions that take demonstrations."),
    "export-chat": ("export_chat", "Write demonstrations and a chat template, for vLLM."),
    "export-prompt-embeds": ("export", "Write the assembled prompt as embeddings, for vLLM."),
}


class LazyGroup(TyperGroup):
    """A group that knows the names of its commands and imports the one that is run."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, summary) in COMMANDS.items():
            self.add_command(TyperCommand(name=name, help=summary))

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:
        name, subcommand, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            subcommand = typer.main.get_command(import_module(f"..{COMMANDS[name][0]}", __name__).app)
        return name, subcommand, rest


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_versions(wanted: bool) -> None:
    """Print what a report of a problem needs, and stop."""
    if not wanted:
        return
    typer.echo(f"modeling-aim {__version__}")
    for name in ("transformers", "torch", "bitsandbytes"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    raise typer.Exit


@app.callback()
def main(
    versions: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print versions and exit."),
    ] = False,
) -> None:
    """Few-shot demonstrations for any vision-language model, at a few tokens each."""
