"""The `aim eval` commands.

aim eval --repo hub_configs/aim-tiny --tasks episodes:episodes.jsonl --shots 0,2,4,8 --output build/eval
aim eval compare build/eval build/other
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .terminal import errors, reported

eval_app = typer.Typer(
    help="Few-shot evaluation with demonstrations as fused tokens, in full, as text, and controls; and comparisons.",
    invoke_without_command=True,
    subcommand_metavar="[compare A B | card RUN REPO | attention]",
)


@eval_app.callback()
def evaluate(
    context: typer.Context,
    repo: Annotated[str | None, typer.Option(help="AIM repository: a folder or a Hub id.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Instead of it: any model, without a projector.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="KIND[:PATH][,name=value...], several times; plain names may be a list with commas."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for predictions, results, table and pictures.")] = None,
    shots: Annotated[str, typer.Option(help="Numbers of demonstrations.")] = "0,2,4,8,16",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Of zero, text, full, aim, aim-shuffled, aim-random, aim-untrained[:depth=K], "
            "aim-untrained-shuffled[:depth=K]; by default all it can."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many draws of demonstrations.")] = 3,
    select: Annotated[
        str, typer.Option(help="How demonstrations are chosen: random, image, text, fused, mmices, or fixed:FILE.")
    ] = "random",
    balanced: Annotated[bool, typer.Option("--balanced", help="Take labels in turn.")] = False,
    drop_duplicates: Annotated[
        bool,
        typer.Option("--drop-duplicates", help="Leave out pictures nearly the query's, or one another's."),
    ] = False,
    prompts: Annotated[str, typer.Option(help="plain, or chat: through the backbone's chat template.")] = "plain",
    separator: Annotated[str, typer.Option(help="Between demonstrations of a plain prompt.")] = r"\n",
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task; drawn once.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the repository or backbone.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Backbone's precision: bfloat16, float16 or float32; by default its own.")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="4-bit backbone, for a laptop.")] = False,
    device_map: Annotated[str | None, typer.Option(help='Where the backbone goes, e.g. "auto" or "cuda".')] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 8,
    images_at_once: Annotated[int, typer.Option(min=1, help="Most images in such a batch.")] = 64,
    memory: Annotated[float, typer.Option(min=0, help="GiB of demonstrations' hidden states that are kept.")] = 2.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in the output folder.")] = False,
) -> None:
    """Evaluate a model few-shot; the same command again goes on where it was interrupted.

    Several processes: `torchrun --nproc_per_node 8 -m modeling_aim eval ...`, or `accelerate launch`.
    """
    if context.invoked_subcommand is not None:
        return
    with reported("aim eval"), _interruptible(output):
        if output is None or not tasks:
            raise ValueError("Give --tasks and --output; aim eval --help says what they take.")
        from ..evaluation import EvalSettings
        from ..evaluation import evaluate as run

        settings = EvalSettings(
            repo=repo,
            backbone=backbone,
            tasks=tuple(_specs(tasks)),
            output=str(output),
            shots=_numbers(shots),
            methods=tuple(one.strip() for one in methods.split(",")) if methods else (),
            seeds=seeds,
            select=select,
            balanced=balanced,
            drop_duplicates=drop_duplicates,
            prompts=prompts,
            separator=separator.replace(r"\n", "\n").replace(r"\t", "\t"),
            limit=limit,
            revision=revision,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            device_map=device_map,
            batch_size=batch_size,
            images_at_once=images_at_once,
            memory=memory,
            overwrite=overwrite,
        )
        results = run(settings)
    from accelerate import PartialState

    if PartialState().is_main_process:
        _show(results)
        Console().print(f"{output}: results.md, results.json, predictions.jsonl and pictures.", soft_wrap=True)


@eval_app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    second: Annotated[Path | None, typer.Argument(help="Another one; the same by default.")] = None,
    between: Annotated[
        str | None, typer.Option(help="Two methods, as in full,aim: the first of FIRST with the second of SECOND.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare two runs, or two methods, with paired tests on the examples that both answered."""
    import json

    with reported("aim eval compare"):
        from ..evaluation.compare import MCNEMAR, compare_runs

        methods = tuple(one.strip() for one in between.split(",")) if between else ()
        found = compare_runs(first, first if second is None else second, methods)
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    table = Table("task", "shots", "methods", "first", "second", "difference (95 %)", "p", "n")
    for row in found["rows"]:
        low, high = row["interval"]
        shown = "\n".join(dict.fromkeys(row["methods"]))
        difference = f"{row['difference']:+.3f}\n({low:+.3f} {high:+.3f})"
        scores = f"{row['first']:.3f}", f"{row['second']:.3f}"
        mark = "*" * (row["test"] == MCNEMAR)
        table.add_row(
            escape(row["task"]), str(row["shots"]), shown, *scores, difference, f"{row['p']:.2g}{mark}",
            str(row["examples"]),
        )  # fmt: skip
    Console().print(table)
    Console().print(f"p: paired bootstrap over examples; *: {MCNEMAR}.")
    for note in found["notes"]:
        Console().print(escape(note), soft_wrap=True)


@eval_app.command()
def card(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    repository: Annotated[Path, typer.Argument(help="Folder of the AIM repository that it evaluated.")],
) -> None:
    """Put a run's table, pictures and figures on the model card of the repository that it evaluated."""
    with reported("aim eval card"):
        from ..evaluation.card import put_on_card

        Console().print(f"{put_on_card(run, repository)}: has the evaluation now.", soft_wrap=True)


@contextmanager
def _interruptible(output: Path | None) -> Iterator[None]:
    """Ctrl-C ends with a word on how to go on instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"Stopped. The same command goes on; what was answered is in {output}.", soft_wrap=True)
        raise typer.Exit(130) from None


def _specs(given: Sequence[str]) -> list[str]:
    """Specs of tasks: a list with commas where all are plain names, else one each."""
    found: list[str] = []
    for one in given:
        plain = ":" not in one and "=" not in one
        found += [name.strip() for name in one.split(",") if name.strip()] if plain else [one]
    return found


def _numbers(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in given.split(","))
    except ValueError:
        raise ValueError(f"--shots {given!r}: expected whole numbers, as in 0,2,4,8.") from None


def _show(results: dict[str, Any]) -> None:
    """The table of a run, on a terminal: the means alone."""
    from ..evaluation.report import cells_by_row

    methods, rows = cells_by_row(results)
    table = Table("task", "shots", *methods)
    for task, count, cells in rows:
        means = [None if cell is None else cell["mean"] for cell in cells.values()]
        table.add_row(escape(task), str(count), *("–" if mean is None else f"{mean:.3f}" for mean in means))
    Console().print(table)
    for note in results["notes"]:
        Console().print(escape(note), soft_wrap=True)
