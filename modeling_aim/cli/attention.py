"""`aim eval attention`: where a backbone looks when it starts to answer from demonstrations.

aim eval attention --repo hub_configs/aim-tiny --task episodes:data/episodes.jsonl --shots 8 --output build/attention
aim eval attention --repo hub_configs/aim-tiny --demos demos.jsonl --image q.png --question "What is this?" --output o
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..data.jsonl import read_demonstrations
from .terminal import errors, reported

if TYPE_CHECKING:
    from ..evaluation.methods import Shown
    from ..evaluation.task import Example

    Asked = tuple[Example, list[Shown]]


def attention(
    output: Annotated[Path, typer.Option(help="Folder for attention.json and attention.png.")],
    repo: Annotated[str | None, typer.Option(help="AIM repository, whose backbone is studied.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Instead of it: a backbone, a folder or a Hub id.")] = None,
    task: Annotated[str | None, typer.Option(help="KIND:PATH[,name=value...], as for aim eval.")] = None,
    demos: Annotated[
        Path | None, typer.Option(help="Instead of --task: one demonstration a line, as for aim answer.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="With --demos: what is asked of the query.")] = None,
    image: Annotated[str | None, typer.Option(help="With --demos: the query's image, a file or a URL.")] = None,
    shots: Annotated[int, typer.Option(min=1, help="Demonstrations in a prompt (with --task).")] = 8,
    limit: Annotated[int, typer.Option(min=1, help="Most prompts (with --task).")] = 100,
    seed: Annotated[int, typer.Option(help="Decides examples and demonstrations.")] = 0,
    prompts: Annotated[str, typer.Option(help="How prompts are put: plain or chat.")] = "plain",
    revision: Annotated[str | None, typer.Option(help="Revision of the repository or backbone.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Backbone's precision: bfloat16, float16 or float32.")] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="4-bit backbone, for a laptop.")] = False,
    device_map: Annotated[str | None, typer.Option(help='Where the backbone goes, e.g. "auto" or "cuda".')] = None,
) -> None:
    """Measure how much attention the first new token pays to images and text of demonstrations, layer by layer.

    The backbone reads all demonstrations with their images in one prompt; a projector has no part in it.
    """
    with reported("aim eval attention"):
        _check(repo, backbone, task, demos, question)
        from ..evaluation.attention import picture, study
        from ..evaluation.subject import load_subject

        asked = _of_task(task, shots, limit, seed) if task else [_of_file(demos, image, question or "")]
        subject = load_subject(
            repo, backbone, revision=revision, dtype=dtype, load_in_4bit=load_in_4bit, device_map=device_map,
            prompts=prompts,
        )  # fmt: skip
        about = {
            **subject.identity,
            "of": repo or backbone,
            "task": task or str(demos),
            "demonstrations": len(asked[0][1]),
            "seed": seed,
            "prompts_put": prompts,
        }
        found = study(subject, track(asked, "prompts", transient=True, console=errors), about)
        output.mkdir(parents=True, exist_ok=True)
        summary = found.summary()
        (output / "attention.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        drawn = picture(found, output / "attention.png")
    Console().print(_table(summary))
    beside = "no picture: matplotlib is not installed" if drawn is None else drawn
    Console().print(f"{output / 'attention.json'}, {beside}", soft_wrap=True, highlight=False)


def _check(repo: Any, backbone: Any, task: Any, demos: Any, question: Any) -> None:
    """Raise `ValueError` for options that do not go together."""
    if (repo is None) == (backbone is None):
        raise ValueError("Give --repo or --backbone, one of them.")
    if (task is None) == (demos is None):
        raise ValueError("Give --task SPEC, or --demos FILE with --question, one of them.")
    if demos is not None and question is None:
        raise ValueError("--demos needs a query: --question, and --image where it has one.")


def _of_task(spec: str, count: int, limit: int, seed: int) -> list[Asked]:
    """Examples of a task with the demonstrations that `aim eval` chooses for them at random."""
    from ..evaluation.choosing import Choice, check_pool, choose_all, own_shots, read_chosen
    from ..evaluation.methods import Shown
    from ..evaluation.seeds import MARK
    from ..evaluation.tasks.registry import open_task

    def no_bank(demos: Iterator[Any]) -> Any:
        raise AssertionError("choosing at random compares nothing")

    task = open_task(spec.replace(MARK, str(seed)))
    examples = task.examples(seed)
    drawn = sorted(random.Random(f"attention {seed}").sample(range(len(examples)), min(limit, len(examples))))
    asked = {seed: [examples[place] for place in drawn]}
    if task.fixed:
        chosen = own_shots(task, asked, [count])
    else:
        check_pool(task, [count], Choice())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "demonstrations.jsonl"
            choose_all(task, asked, [count], Choice(), path, no_bank)
            chosen = read_chosen(task, path)
    return [(one, [Shown(shot, shot) for shot in chosen[seed, count, one.id]]) for one in asked[seed]]


def _of_file(demos: Any, image: str | None, question: str) -> Asked:
    """The one prompt of demonstrations in a file and a query."""
    from ..evaluation.methods import Shown
    from ..evaluation.task import Example, Shot

    shots = [Shot(str(number), demo) for number, demo in enumerate(read_demonstrations(demos))]
    query = Example("query", () if image is None else (image,), question, ("",))
    return query, [Shown(shot, shot) for shot in shots]


def _table(summary: dict[str, Any]) -> Table:
    """Share of each part by layer, with the attention of one of its tokens as a multiple of the average token's."""
    from ..evaluation.attention import PARTS

    table = Table(
        "layer",
        *(f"{label}\n{summary['tokens'][part]:g} tokens" for part, label in PARTS.items()),
        title=f"Attention at the first new token, mean of {summary['prompts']} prompts (x: a token to the average's)",
    )
    for row, layer in enumerate(summary["layers"]):
        cells = []
        for part in PARTS:
            times = summary["token_relative_to_average"][part][row]
            cells.append(f"{summary['share'][part][row]:.3f}" + ("" if times is None else f"  x{times:.2g}"))
        table.add_row(str(layer), *cells)
    return table
