"""The `aim eval` commands.

aim eval --repo hub_configs/aim-tiny --tasks episodes:episodes.jsonl --shots 0,2,4,8 --output build/eval
aim eval compare build/eval build/other
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from accelerate import PartialState
from rich.table import Table

from ..evaluation import EvalSettings
from ..evaluation import evaluate as run
from ..evaluation.card import put_on_card
from ..evaluation.compare import MCNEMAR, compare_runs
from ..evaluation.pareto import printed
from ..evaluation.report import cells_by_row, shots_label
from ..evaluation.tasks.registry import HEADS, task_rows
from .attention import attention
from .judge import answers, judge
from .options import command
from .science_qa import science_qa
from .terminal import errors, print_json, safe, wide_console

app = typer.Typer(
    help="Few-shot evaluation with demonstrations as fused tokens, in full, as text, and controls; and comparisons.",
    subcommand_metavar="[compare A B | card RUN REPO | attention | science-qa | judge | answers]",
    add_completion=False,
    pretty_exceptions_enable=False,
)
command(app, "aim eval attention")(attention)
command(app, "aim eval science-qa", positional=("answers",))(science_qa)
command(app, "aim eval judge")(judge)
command(app, "aim eval answers")(answers)


def list_tasks() -> None:
    """Print the tasks: format, where to get them, metric, paper."""
    table = Table(*HEADS)
    for row in task_rows():
        table.add_row(*row)
    wide_console().print(table)


@command(app, "aim eval", group=True, instead={"list": (list_tasks, "List the tasks and exit.")})
def evaluate(settings: EvalSettings) -> None:
    """Evaluate a model few-shot; rerun the same command to resume.

    Several processes: `torchrun --nproc_per_node 8 -m modeling_aim eval ...`, or `accelerate launch`.
    """
    separator = settings.separator.replace(r"\n", "\n").replace(r"\t", "\t")
    with _interruptible(settings.output):
        results = run(replace(settings, separator=separator))
    if PartialState().is_main_process:
        _show(results)
        wide_console().print(
            f"{safe(settings.output)}: results.md, results.json, predictions.jsonl and pictures.", soft_wrap=True
        )


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What `aim eval compare` takes.

    Args:
        first: output folder of a finished run.
        second: another one; by default the same.
        between: two methods, such as full,aim: the first of FIRST with the second of SECOND.
        as_json: print JSON instead of a table.
    """

    first: Path
    second: Path | None = None
    between: tuple[str, ...] = ()
    as_json: bool = False


@command(app, "aim eval compare", positional=("first", "second"))
def compare(settings: CompareSettings) -> None:
    """Compare two runs, or two methods, with paired tests on the examples that both answered."""
    comparison = compare_runs(settings.first, settings.second or settings.first, settings.between)
    if settings.as_json:
        print_json(comparison)
        return
    table = Table("task", "shots", "methods", "first", "second", "difference (95 %)", "p", "n")
    for row in comparison["rows"]:
        low, high = row["interval"]
        method_names = "\n".join(dict.fromkeys(row["methods"]))
        difference = f"{printed(row, row['difference'], '+')}\n({printed(row, low, '+')} {printed(row, high, '+')})"
        scores = printed(row, row["first"]), printed(row, row["second"])
        mark = "*" * (row["test"] == MCNEMAR)
        table.add_row(
            safe(row["task"]), str(row["shots"]), method_names, *scores, difference, f"{row['p']:.2g}{mark}",
            str(row["examples"]),
        )  # fmt: skip
    wide_console().print(table)
    wide_console().print(f"p: paired bootstrap over examples; *: {MCNEMAR}.")
    for note in comparison["notes"]:
        wide_console().print(safe(note), soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class CardSettings:
    """What `aim eval card` takes.

    Args:
        run: output folder of a finished run.
        repository: folder of the AIM repository that it evaluated.
    """

    run: Path
    repository: Path


@command(app, "aim eval card", positional=("run", "repository"))
def card(settings: CardSettings) -> None:
    """Put a run's table, pictures and figures on the model card of the repository that it evaluated."""
    wide_console().print(
        f"{safe(put_on_card(settings.run, settings.repository))}: has the evaluation now.", soft_wrap=True
    )


@contextmanager
def _interruptible(output: str) -> Iterator[None]:
    """Ctrl-C ends with a line that says how to resume, instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(
            f"Stopped. Rerun the same command to resume; what was answered is in {safe(output)}.", soft_wrap=True
        )
        raise typer.Exit(130) from None


def _show(results: dict[str, Any]) -> None:
    """The table of a run, on a terminal: the means alone."""
    methods, rows = cells_by_row(results)
    table = Table("task", "shots", *methods)
    for task, count, cells in rows:
        means = ["–" if cell is None or cell["mean"] is None else printed(cell) for cell in cells.values()]
        table.add_row(safe(task), shots_label(results, task, count), *means)
    wide_console().print(table)
    for note in results["notes"]:
        wide_console().print(safe(note), soft_wrap=True)
