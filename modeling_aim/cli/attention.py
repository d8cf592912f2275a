"""`aim eval attention`: where a backbone looks when it starts to answer from demonstrations.

aim eval attention --repo hub_configs/aim-tiny --task episodes:data/episodes.jsonl --shots 8 --output build/attention
aim eval attention --repo hub_configs/aim-tiny --demos demos.jsonl --image q.png --question "What is this?" --output o
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..data.demonstrations import read_demonstrations
from ..evaluation.attention import PARTS, picture, study
from ..evaluation.choosing import Choice, check_pool, choose_all, own_shots, read_chosen
from ..evaluation.methods import ShownShot
from ..evaluation.seeds import MARK
from ..evaluation.subject import load_subject
from ..evaluation.task import Example, Shot
from ..evaluation.tasks.registry import open_task
from ..progress import tracked
from .loading import LoadingSettings
from .options import check_least
from .terminal import safe, wide_console

PromptPlan = tuple[Example, list[ShownShot]]  # a query and the demonstrations before it


@dataclass(frozen=True, kw_only=True)
class AttentionSettings(LoadingSettings):
    """What `aim eval attention` takes.

    Args:
        output: folder for attention.json and attention.png.
        repo: AIM repository whose backbone is studied.
        backbone: instead of --repo, a backbone: a folder or a Hub id.
        task: KIND:PATH[,name=value...], as for aim eval.
        demos: instead of --task, a file with one demonstration a line, as for aim answer.
        question: with --demos, the question about the query.
        image: with --demos, the image of the query: a file or a URL.
        shots: demonstrations in a prompt (with --task).
        limit: most prompts (with --task).
        seed: decides examples and demonstrations.
        prompts: how prompts are written: plain or chat.
    """

    output: Path
    repo: str | None = None
    backbone: str | None = None
    task: str | None = None
    demos: Path | None = None
    question: str | None = None
    image: str | None = None
    shots: int = 8
    limit: int = 100
    seed: int = 0
    prompts: str = "plain"

    def __post_init__(self) -> None:
        check_least(self, 1, "shots", "limit")
        if (self.repo is None) == (self.backbone is None):
            raise ValueError("Give --repo or --backbone, one of them.")
        if (self.task is None) == (self.demos is None):
            raise ValueError("Give --task SPEC, or --demos FILE with --question, one of them.")
        if self.demos is not None and self.question is None:
            raise ValueError("--demos needs a query: --question, and --image where it has one.")


def attention(settings: AttentionSettings) -> None:
    """Measure how much attention the first new token pays to images and text of demonstrations, layer by layer.

    The backbone reads all demonstrations with their images in one prompt; a projector has no part in it.
    """
    plans = _of_task(settings) if settings.task else [_of_file(settings)]
    subject = load_subject(
        settings.repo, settings.backbone, revision=settings.revision, dtype=settings.dtype,
        load_in_4bit=settings.load_in_4bit, device_map=settings.device_map, prompts=settings.prompts,
        image_settings=settings.image_settings,
    )  # fmt: skip
    about = {
        **subject.identity,
        "of": settings.repo or settings.backbone,
        "task": settings.task or str(settings.demos),
        "demonstrations": len(plans[0][1]),
        "seed": settings.seed,
        "prompts_put": settings.prompts,
    }
    result = study(subject, tracked(plans, "attention", "prompts"), about)
    settings.output.mkdir(parents=True, exist_ok=True)
    summary = result.summary()
    path = settings.output / "attention.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    drawn = picture(result, settings.output / "attention.png")
    wide_console().print(_table(summary))
    beside = "no picture: matplotlib is not installed" if drawn is None else drawn
    wide_console().print(f"{safe(path)}, {safe(beside)}", soft_wrap=True, highlight=False)


def _of_task(settings: AttentionSettings) -> list[PromptPlan]:
    """Examples of a task with the demonstrations that `aim eval` chooses for them at random."""

    def no_bank(demos: Iterator[Any]) -> Any:
        raise AssertionError("choosing at random compares nothing")

    count, seed = settings.shots, settings.seed
    task = open_task((settings.task or "").replace(MARK, str(seed)))
    examples = task.examples(seed)
    sample = random.Random(f"attention {seed}").sample(range(len(examples)), min(settings.limit, len(examples)))
    queries = {seed: [examples[place] for place in sorted(sample)]}
    if task.fixed:
        chosen = own_shots(task, queries, [count])
    else:
        check_pool(task, [count], Choice())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "demonstrations.jsonl"
            choose_all(task, queries, [count], Choice(), path, no_bank)
            chosen = read_chosen(task, path)
    return [(query, [ShownShot(shot, shot) for shot in chosen[seed, count, query.id]]) for query in queries[seed]]


def _of_file(settings: AttentionSettings) -> PromptPlan:
    """The one prompt of demonstrations in a file and a query."""
    assert settings.demos is not None
    shots = [Shot(str(number), demo) for number, demo in enumerate(read_demonstrations(settings.demos))]
    images = () if settings.image is None else (settings.image,)
    return Example("query", images, settings.question or "", ("",)), [ShownShot(shot, shot) for shot in shots]


def _table(summary: dict[str, Any]) -> Table:
    """Share of each part by layer, with the attention of one of its tokens as a multiple of the average token's."""
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
