"""LLaVA-Bench: a text model compares the answers of a candidate with those of a reference (arXiv 2304.08485).

    aim eval judge --questions questions.jsonl --context context.jsonl --reference gpt4.jsonl --candidate mine.jsonl \\
        --model gpt-4.1 --endpoint https://api.openai.com/v1 --key-from OPENAI_API_KEY --output build/judge
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.jsonl import json_lines, numbered_json
from ..files_aim import only_one, write_whole
from .asking import ANSWERS, Asking, AskingSettings, Ledger, Outcome, Stopped, check_output, costs_of
from .rules import IN_THE_WILD, OWN_RULES, SYSTEM, Rule, read_rules
from .scores import honest_scores, honest_summary, published_scores, published_summary
from .text_model import Request

REVIEWS, SWAPPED, SUMMARY, UNPARSABLE = "reviews.jsonl", "reviews_swapped.jsonl", "summary.json", "unparsable.jsonl"
ORDERS = {"first": REVIEWS, "swapped": SWAPPED}
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(AskingSettings):
    """What `aim eval judge` takes.

    Args:
        questions: jsonl with question_id, image, text and category a line.
        context: jsonl with image and caption a line (in the wild), or image, captions and instances (COCO).
        reference: jsonl with the answers of the reference: question_id and text; shown first.
        candidate: jsonl with the answers that are judged; shown second. aim eval answers writes such a file.
        output: folder of the reviews; the same command resumes there.
        rules: rule.json in the published form, read as it is; own rules by default.
        swap: ask a second time with the candidate shown first.
        caption_by_character: show a caption that is one text with a character a line, as the published code does with
            the published context file of LLaVA-Bench (in the wild).
    """

    questions: Path
    context: Path
    reference: Path
    candidate: Path
    output: Path
    rules: Path | None = None
    swap: bool = False
    caption_by_character: bool = False
    temperature: float = 0.2


@dataclass(frozen=True)
class Comparison:
    """A question with both answers, as a judge gets it.

    Args:
        number: place in the file of questions, from 1.
        question: its row.
        category: of its rule.
        shown: the words of the image.
        answers: rows of the reference and of the candidate.
        rule: the instructions of the judge.
    """

    number: int
    question: Row
    category: str
    shown: str
    answers: tuple[Row, Row]
    rule: Rule

    def content(self, swapped: bool) -> str:
        """What the judge reads."""
        first, second = self.answers[::-1] if swapped else self.answers
        role = self.rule.role
        return (
            f"[Context]\n{self.shown}\n\n[Question]\n{self.question['text']}\n\n"
            f"[{role} 1]\n{first['text']}\n\n[End of {role} 1]\n\n"
            f"[{role} 2]\n{second['text']}\n\n[End of {role} 2]\n\n[System]\n{self.rule.prompt}\n\n"
        )

    def review(self, content: str, swapped: bool) -> dict[str, Any]:
        """The judge's review as a row of the published form; answer 1 is the one that was shown first."""
        ids = [answer.get("answer_id", answer["question_id"]) for answer in self.answers]
        first, second = ids[::-1] if swapped else ids
        return {
            "id": self.number, "question_id": self.question["question_id"], "answer1_id": first, "answer2_id": second,
            "category": self.category, "content": content, "tuple": published_scores(content),
        }  # fmt: skip


def judge(settings: JudgeSettings, show: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Ask the judge, and write its reviews and their summary.

    Args:
        settings: files, judge, output.
        show: takes lines about what is going to be asked.

    Returns:
        The summary; `None` of a dry run.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file has another form, answers or contexts are missing, or there is no rule for a category.
        Stopped: the run ended before the first review.
    """
    comparisons = read_comparisons(settings)
    orders = list(ORDERS)[: 1 + settings.swap]
    requests = {
        f"{order} {comparison.number}": Request(
            (
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": comparison.content(order == "swapped")},
            ),
            settings.model or "",
            settings.temperature,
            settings.answer_tokens,
        )
        for order in orders
        for comparison in comparisons
    }
    check_output(settings.output)
    with only_one(settings.output, "aim eval judge"):
        ledger = Ledger(settings.output / ANSWERS)
        show(str(costs_of(requests, ledger)))
        if settings.dry_run:
            return None
        outcome = Asking(settings.opened(), ledger, settings).run(requests, "judged")
        if outcome.stopped and not outcome.answers:
            raise Stopped(outcome.stopped)
        return _written(settings.output, comparisons, orders, outcome)


def _written(output: Path, comparisons: list[Comparison], orders: list[str], outcome: Outcome) -> dict[str, Any]:
    """Write reviews, what did not parse and the summary."""
    unparsable: list[dict[str, Any]] = []
    scores: dict[tuple[str, int], tuple[float, float] | None] = {}  # of reference and candidate
    published: dict[str, Any] = {}
    for order in orders:
        reviews = []
        for comparison in comparisons:
            answer = outcome.answers.get(f"{order} {comparison.number}")
            if answer is None:
                continue
            review = comparison.review(answer.text, order == "swapped")
            pair = honest_scores(answer.text)
            if pair is None:
                unparsable.append({"order": order, **review})
            scores[order, comparison.number] = pair if pair is None or order == "first" else (pair[1], pair[0])
            reviews.append(review)
        write_whole(output / ORDERS[order], json_lines(reviews))
        turned = [{**row, "tuple": row["tuple"][::-1]} if order == "swapped" else row for row in reviews]
        published[order] = {
            name: {key: value if math.isfinite(value) else None for key, value in figures.items()}
            for name, figures in published_summary(turned).items()
        }
    categories = {comparison.number: comparison.category for comparison in comparisons}
    summary: dict[str, Any] = {"published": published, "honest": {}}
    for order in orders:
        own = [(categories[number], pair) for (asked, number), pair in scores.items() if asked == order]
        summary["honest"][order] = honest_summary(own)
    if len(orders) > 1:
        summary |= _both_orders(categories, scores)
    summary |= {"unanswered": dict(outcome.reasons()), "stopped": outcome.stopped}
    write_whole(output / UNPARSABLE, json_lines(unparsable))
    write_whole(output / SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


def _both_orders(
    categories: Mapping[int, str], scores: Mapping[tuple[str, int], tuple[float, float] | None]
) -> dict[str, Any]:
    """Means over both orders, of the questions whose reviews both parse; and how often the order turns the winner."""
    both: list[tuple[str, tuple[float, float] | None]] = []
    turned = parsed = 0
    for number, category in categories.items():
        if any((order, number) not in scores for order in ORDERS):
            continue
        first, swapped = (scores[order, number] for order in ORDERS)
        if first is None or swapped is None:
            both.append((category, None))
            continue
        both.append((category, ((first[0] + swapped[0]) / 2, (first[1] + swapped[1]) / 2)))
        parsed += 1
        turned += np.sign(first[0] - first[1]) != np.sign(swapped[0] - swapped[1])
    return {"both_orders": honest_summary(both), "winner_turned_by_order": int(turned), "of_questions": parsed}


# --- files


def read_comparisons(settings: JudgeSettings) -> list[Comparison]:
    """The questions in their order, each with its context, its two answers and its rule.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a row lacks a key, an answer or a context is missing, or a category has no rule.
    """
    rules = OWN_RULES if settings.rules is None else read_rules(settings.rules)
    questions = _rows(settings.questions, ("question_id", "image", "text", "category"))
    contexts = {row["image"]: row for row in _rows(settings.context, ("image",))}
    answers = [_by_question(path) for path in (settings.reference, settings.candidate)]
    for path, answers_of_path in zip((settings.reference, settings.candidate), answers, strict=True):
        missing = [row["question_id"] for row in questions if row["question_id"] not in answers_of_path]
        if missing:
            raise ValueError(
                f"{path} has no answer to {len(missing)} of {len(questions)} questions, such as question_id "
                f"{missing[0]!r}."
            )
    comparisons = []
    for number, question in enumerate(questions, 1):
        context = contexts.get(question["image"])
        if context is None:
            raise ValueError(f"{settings.context} has nothing about the image {question['image']!r}.")
        shown, in_the_wild = _in_words(context, settings.context, settings.caption_by_character)
        category = (IN_THE_WILD if in_the_wild else "") + question["category"]
        if category not in rules:
            raise ValueError(f"There is no rule for the category {category!r}; there are {', '.join(sorted(rules))}.")
        pair = answers[0][question["question_id"]], answers[1][question["question_id"]]
        comparisons.append(Comparison(number, question, category, shown, pair, rules[category]))
    return comparisons


def _in_words(context: Row, path: Path, by_character: bool) -> tuple[str, bool]:
    """The description of an image that a judge sees, and whether it is of LLaVA-Bench (in the wild)."""
    captions, boxes = context.get("captions"), context.get("instances")
    if isinstance(captions, list) and isinstance(boxes, list):
        lines = "\n".join(f"{box['category']}: {box['bbox']}" for box in boxes)
        return "\n".join(captions) + f"\n\n{lines}", False
    caption = context.get("caption")
    if isinstance(caption, str) and not by_character:
        return caption, True
    if isinstance(caption, (str, list)):
        return "\n".join(caption), True
    raise ValueError(
        f"{path}: the context of {context['image']!r} has {sorted(context)}; expected caption (in the wild), or "
        "captions and instances (COCO)."
    )


def _by_question(path: Path) -> dict[Any, Row]:
    rows = _rows(path, ("question_id", "text"))
    by_question = {row["question_id"]: row for row in rows}
    if len(by_question) < len(rows):
        raise ValueError(f"{path} answers {len(rows) - len(by_question)} questions twice. Give one answer to each.")
    return by_question


def _rows(path: Path, keys: tuple[str, ...]) -> list[Row]:
    rows = []
    for number, row in numbered_json(path):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(
                f"{path}, line {number} lacks {', '.join(missing)}. Expected an object with {', '.join(keys)}."
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty.")
    return rows
