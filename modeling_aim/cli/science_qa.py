"""`aim eval science-qa`: figures of files of answers to ScienceQA, alone and together with GPT-4's.

aim eval science-qa answers.jsonl --data ScienceQA/data/scienceqa --gpt4 gpt4.json --judge judge.jsonl
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..evaluation.science_qa import (
    gpt4_figures,
    open_problems,
    own_figures,
    read_answers,
    read_outputs,
    requery_figures,
)
from ..evaluation.tasks.science_qa import PARTS
from ..files_aim import write_whole
from .terminal import print_json, wide_console


@dataclass(frozen=True, kw_only=True)
class ScienceQaSettings:
    """What `aim eval science-qa` takes.

    Args:
        answers: jsonl of question_id and text, as LLaVA writes it, or a predictions.jsonl of aim eval.
        data: folder of the official problems.json and pid_splits.json.
        split: of the questions.
        method: of a predictions.jsonl, the method whose answers are read.
        shots: of a predictions.jsonl, the number of demonstrations whose answers are read.
        gpt4: GPT-4's answers, a JSON object of outputs by id: its ensemble with ours, and the upper bound.
        judge: answers of a judge who saw both, jsonl like ANSWERS: the second ensemble; needs --gpt4.
        seed: of what the two ensembles draw where an answer does not parse.
        output: JSON file for the chosen options in the published layout, with which ScienceQA's own evaluate_acc.py
            runs.
        as_json: print JSON instead of tables.
    """

    answers: Path
    data: Path
    split: str = "test"
    method: str | None = None
    shots: int | None = None
    gpt4: Path | None = None
    judge: Path | None = None
    seed: int = 0
    output: Path | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        if self.judge is not None and self.gpt4 is None:
            raise ValueError("--judge needs --gpt4: its ensemble is compared with GPT-4's own answers.")


def science_qa(settings: ScienceQaSettings) -> None:
    """Score answers to ScienceQA as LLaVA's three scorers do: alone, with GPT-4, and with a judge of both."""
    problems = open_problems(settings.data, settings.split)
    answers = read_answers(settings.answers, settings.method, settings.shots)
    figures: dict[str, Any] = {"own": own_figures(problems, answers)}
    if settings.gpt4 is not None:
        gpt4 = read_outputs(settings.gpt4)
        figures["gpt4"] = gpt4_figures(problems, answers, gpt4, settings.seed)
        if settings.judge is not None:
            judge = read_answers(settings.judge)
            figures["judge"] = requery_figures(problems, answers, gpt4, judge, settings.seed)
    if settings.output is not None:
        last = figures["judge"] if "judge" in figures else figures["own"]
        texts = {} if "judge" in figures else {name: answers.get(name, "FAILED") for name in problems}
        _write(settings.output, last, texts)
    printed = {name: {k: v for k, v in of.items() if k != "results"} for name, of in figures.items()}
    if settings.as_json:
        print_json({**printed, "seed": settings.seed})
    else:
        _show(printed, settings.seed)


def _write(path: Path, figures: dict[str, Any], texts: dict[str, str]) -> None:
    """The published layout of results: accuracy, options by question, texts."""
    published = {
        "acc": 100 * figures["correct"] / figures["total"],
        "correct": figures["correct"],
        "count": figures["total"],
        "results": figures["results"],
        "outputs": texts,
    }
    write_whole(path, (json.dumps(published, indent=2) + "\n").encode())


ROWS = (
    ("own", "correct", "ours"),
    ("gpt4", "correct", "GPT-4, ours where it failed"),
    ("gpt4", "upper", "upper bound: either is right"),
    ("judge", "gpt4_correct", "GPT-4, drawn where it failed"),
    ("judge", "correct", "judge, ours where it failed or is missing"),
)


def _show(figures: dict[str, Any], seed: int) -> None:
    console = wide_console()
    table = Table("answers", "right", "of", "accuracy %")
    for name, key, label in ROWS:
        if name in figures:
            right, total = figures[name][key], figures[name]["total"]
            table.add_row(label, str(right), str(total), f"{100 * right / total:.2f}")
    console.print(table)
    by_part = Table("accuracy % by subject, context, grade", *PARTS, "all")
    for name, label in (("own", "ours"), ("judge", "judge, ours")):
        if name in figures:
            parts = figures[name]["parts"]
            cells = [f"{100 * parts[part]:.2f}" if part in parts else "–" for part in PARTS]
            by_part.add_row(label, *cells, f"{100 * figures[name]['correct'] / figures[name]['total']:.2f}")
    console.print(by_part)
    own = figures["own"]
    console.print(
        f"Ours: {own['failed']} without a letter, which count as wrong, {own['missing']} of them missing.",
        soft_wrap=True,
    )
    if "gpt4" in figures:
        of = figures["gpt4"]
        console.print(
            f'With GPT-4 only "The answer is B." is read: {of["gpt4_failed"]} of its answers have none, and '
            f"{of['our_failed']} of ours, for which an option is drawn (seed {seed}). {of['missing']} questions are "
            "left out because one of the files lacks them.",
            soft_wrap=True,
        )
    if "judge" in figures:
        of = figures["judge"]
        console.print(
            f"Judge: {of['judge_failed']} without an answer, {of['judge_missing']} of them missing.", soft_wrap=True
        )
