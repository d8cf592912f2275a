"""`aim eval judge` and `aim eval answers`: LLaVA-Bench, with any judge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ..data.demonstrations import read_demonstrations
from ..data.jsonl import numbered_json
from ..llava.answers import write_answers
from ..llava.asking import Stopped
from ..llava.judge import REVIEWS, SUMMARY, UNPARSABLE, JudgeSettings
from ..llava.judge import judge as run
from .loading import LoadingSettings
from .options import check_least
from .terminal import errors, safe, wide_console


def judge(settings: JudgeSettings) -> None:
    """Have a text model judge answers against a reference (LLaVA-Bench); rerun the same command to resume.

    It shows what will be asked and what it costs before it starts; --dry-run stops there.
    """
    summary = run(settings, lambda line: errors.print(safe(line), soft_wrap=True))
    if summary is None:
        return
    table = Table("order", "category", "published: relative", "reference", "candidate", "honest: relative", "failures")
    for order, figures in summary["published"].items():
        for category, published in figures.items():
            honest = summary["honest"][order][category]
            numbers = [str(published[name]) for name in ("relative", "reference", "candidate")]
            relative = "–" if honest["relative"] is None else str(honest["relative"])
            table.add_row(order, safe(category), *numbers, relative, f"{honest['failures']} of {honest['reviews']}")
    console = wide_console()
    console.print(table)
    console.print(
        "published: reviews that do not parse count as -1, as in LLaVA's code; honest: they are left out.",
        soft_wrap=True,
    )
    if summary.get("both_orders"):
        both, turned = summary["both_orders"]["all"], summary["winner_turned_by_order"]
        console.print(
            f"Both orders: relative {both['relative']}; the order turned the winner in {turned} of "
            f"{summary['of_questions']} questions.",
            soft_wrap=True,
        )
    for reason, count in summary["unanswered"].items():
        console.print(f"Without a review: {count:,} × {safe(reason)}", soft_wrap=True)
    names = f"{REVIEWS}, {SUMMARY} and {UNPARSABLE}"
    console.print(f"{safe(settings.output)}: {names}.", soft_wrap=True)
    if summary["stopped"]:
        raise Stopped(summary["stopped"])


@dataclass(frozen=True, kw_only=True)
class AnswersSettings(LoadingSettings):
    """What `aim eval answers` takes.

    Args:
        repo: AIM repository: a folder or a Hub id.
        questions: jsonl with question_id, image and text a line.
        images: folder of the images.
        output: jsonl of the answers; the same command resumes there.
        demos: file with one demonstration a line; without it the backbone answers alone.
        max_new_tokens: most tokens of an answer.
    """

    repo: str
    questions: Path
    images: Path
    output: Path
    demos: Path | None = None
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        check_least(self, 1, "max_new_tokens")


def answers(settings: AnswersSettings) -> None:
    """Answer the questions of LLaVA-Bench with an AIM repository, for `aim eval judge --candidate`."""
    questions = [row for _, row in numbered_json(settings.questions)]
    if not all(isinstance(row, dict) and {"question_id", "image", "text"} <= set(row) for row in questions):
        raise ValueError(f"{settings.questions}: expected question_id, image and text on every line.")
    demos = [] if settings.demos is None else list(read_demonstrations(settings.demos))
    model = settings.load(settings.repo)
    count = write_answers(
        model, questions, settings.images, settings.output, demos, settings.max_new_tokens, Path(settings.repo).name
    )
    wide_console().print(f"{safe(settings.output)}: {count:,} questions answered now, {len(questions):,} in all.")
