"""Scores in a judge's reviews: read as LLaVA's code reads them, and honestly; and the summary of each.

LLaVA's `eval_gpt_review_bench.py` takes a first line of exactly two parts and makes anything else [-1, -1], which its
`summarize_gpt_review.py` averages in. That figure is reproduced; the honest one leaves failures out and counts them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

FAILED = [-1, -1]
FIRST_LINES = 3  # in which two scores are looked for
LEAST, MOST = 1.0, 10.0
LABELS = re.compile(
    r"\b(assistant|answer|response|candidate|model)\s*#?\s*[12]\b|\bscores?\b|/\s*10\b|\bout of (10|ten)\b",
    re.IGNORECASE,
)
NUMBER = re.compile(r"(?<![\w.])(?<!\d-)-?\d+(?:\.\d+)?(?![\w]|\.\d)")


def published_scores(review: str) -> list[float]:
    """The two scores of a review as the published code reads them; `[-1, -1]` where it does not."""
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(parts[0]), float(parts[1])] if len(parts) == 2 else list(FAILED)
    except ValueError:
        return list(FAILED)


def honest_scores(review: str) -> tuple[float, float] | None:
    """The two scores of a review, both from 1 to 10; `None` where they cannot be parsed.

    They are looked for in the first three lines that are not empty: two numbers on a line, or one on each of two lines
    in a row. Names such as "Assistant 1:" and "/10" are no numbers, nor are marks of Markdown.
    """
    lines = [line for line in review.splitlines() if line.strip()][:FIRST_LINES]
    numbers = [
        [float(text) for text in NUMBER.findall(LABELS.sub(" ", re.sub(r"[*_`#|]", " ", line)))] for line in lines
    ]
    for place, line_numbers in enumerate(numbers):
        following = numbers[place + 1] if place + 1 < len(numbers) else []
        pair = (
            line_numbers
            if len(line_numbers) == 2
            else [*line_numbers, *following]
            if len(line_numbers) == len(following) == 1
            else []
        )
        if pair:
            return (pair[0], pair[1]) if all(LEAST <= value <= MOST for value in pair) else None
        if line_numbers:
            return None
    return None


def published_summary(reviews: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The published figures, by category and for all: failures count as -1.

    Args:
        reviews: each with its `tuple`, and its `category` where it has one.

    Returns:
        `relative`, the candidate's mean as a percentage of the reference's, and `reference` and `candidate`, ten times
        their means; NaN where the reference's mean is 0.
    """
    by_category: dict[str, list[Sequence[float]]] = {}
    for review in reviews:
        for name in (review["category"], "all") if "category" in review else ("all",):
            by_category.setdefault(name, []).append(review["tuple"])
    figures = {}
    for name, pairs in sorted(by_category.items()):
        first, second = (round(mean, 3) for mean in np.asarray(pairs, dtype=float).mean(0).tolist())
        relative = round(second / first * 100, 1) if first else math.nan
        figures[name] = {
            "relative": relative,
            "reference": round(first * 10, 1),
            "candidate": round(second * 10, 1),
        }
    return figures


def honest_summary(
    scored: Iterable[tuple[str, tuple[float, float] | None]],
) -> dict[str, dict[str, float | int | None]]:
    """Figures without failures, by category and for all.

    Args:
        scored: category, and scores of reference and candidate; `None` for a failure.

    Returns:
        As `published_summary`, `None` where nothing parsed, with the number of `reviews` and of `failures`.
    """
    by_category: dict[str, list[tuple[float, float] | None]] = {}
    for category, pair in scored:
        for name in (category, "all"):
            by_category.setdefault(name, []).append(pair)
    figures: dict[str, dict[str, float | int | None]] = {}
    for name, pairs in sorted(by_category.items()):
        parsed = [pair for pair in pairs if pair is not None]
        means = np.asarray(parsed).mean(0).tolist() if parsed else None
        figures[name] = {
            "relative": round(means[1] / means[0] * 100, 1) if means else None,
            "reference": round(means[0] * 10, 1) if means else None,
            "candidate": round(means[1] * 10, 1) if means else None,
            "reviews": len(pairs),
            "failures": len(pairs) - len(parsed),
        }
    return figures
