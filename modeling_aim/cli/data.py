"""The `aim data` commands.

aim data instruct --source captions_and_boxes.jsonl --kinds conversation,detail --model MODEL --output data
"""

from __future__ import annotations

import typer
from rich.table import Table

from ..llava.asking import Stopped
from ..llava.instructions import ALL, EPISODES, REPORT, UNPARSABLE, InstructSettings, make_instructions
from .options import command
from .terminal import errors, safe, wide_console

SHOWN = 10  # reasons why something was left out

app = typer.Typer(
    help="Make data to train on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def data() -> None:
    """Make data to train on."""


@command(app, "aim data instruct")
def instruct(settings: InstructSettings) -> None:
    """Make instruction data from captions and boxes by a text model; rerun the same command to resume.

    It shows what will be asked and what it costs before it starts; --dry-run stops there.
    """
    made = make_instructions(settings, lambda line: errors.print(safe(line), soft_wrap=True))
    if made is None:
        return
    table = Table("written", "how many")
    for name, count in made.counts.items():
        table.add_row(safe(name), f"{count:,}")
    table.add_row("questions with answers", f"{made.pairs:,}")
    console = wide_console()
    console.print(table)
    for reason, count in made.left_out.most_common(SHOWN):
        console.print(f"Left out: {count:,} × {safe(reason)}", soft_wrap=True)
    if len(made.left_out) > SHOWN:
        console.print(f"... and {len(made.left_out) - SHOWN:,} more reasons: {safe(settings.output / REPORT)}.")
    if made.unparsable:
        console.print(f"{len(made.unparsable):,} answers did not parse: {safe(settings.output / UNPARSABLE)}.")
    folder = f",images={settings.images}" if settings.images else ",images=FOLDER"
    for kind, name in (("llava", ALL), ("episodes", EPISODES)):
        if made.counts.get(name):
            console.print(f"aim train ... --data {safe(f'{kind}:{settings.output / name}{folder}')}", soft_wrap=True)
    if made.stopped:
        raise Stopped(made.stopped)
