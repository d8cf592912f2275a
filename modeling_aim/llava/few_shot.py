"""Few-shot episodes from captions and boxes: made-up names, hidden rules, styles. They train and evaluate AIM.

Each episode is a line `{"demos": [...], "queries": [...]}`; what they share must be inferred from the demonstrations:
a *name* stands for a category, a *rule* gives the answer from the boxes, a *style* is how an image is described.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .captioned import CaptionedImage

SORTS = ("naming", "style", "rule")
NAMING_QUESTION = "What is in this image?"
RULE_QUESTION = "Which word belongs to this image?"
STYLE_QUESTION = "What does this image show?"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRIES = 50  # at an episode before the images are held to be too few
Episode = dict[str, Any]


def naming_episodes(images: Sequence[CaptionedImage], count: int, shots: int, rng: random.Random) -> Iterator[Episode]:
    """Episodes in which categories have made-up names.

    Args:
        images: with boxes.
        count: of episodes, at most.
        shots: demonstrations of each, half of either category.
        rng: draws.
    """
    from ..data.link_context import random_name  # with torch

    by_category: dict[str, list[CaptionedImage]] = {}
    for image in images:
        for category in {box.category for box in image.boxes}:
            by_category.setdefault(category, []).append(image)
    each = max(1, shots // 2)
    common = sorted(category for category, demonstrated in by_category.items() if len(demonstrated) > each)
    for _ in range(count if len(common) > 1 else 0):
        for _ in range(TRIES):
            asked_category, other = rng.sample(common, 2)
            pools = [
                _with_first_only(by_category[a], b) for a, b in ((asked_category, other), (other, asked_category))
            ]
            if len(pools[0]) > each and len(pools[1]) >= each:
                break
        else:
            return
        taken: set[str] = set()
        names = {asked_category: random_name(rng, taken), other: random_name(rng, taken)}
        query, *first = rng.sample(pools[0], each + 1)
        demonstrated = [(image, names[asked_category]) for image in first]
        demonstrated += [(image, names[other]) for image in rng.sample(pools[1], each)]
        rng.shuffle(demonstrated)
        yield _episode("naming", NAMING_QUESTION, [*demonstrated, (query, names[asked_category])], {"names": names})


def _with_first_only(images: Sequence[CaptionedImage], other: str) -> list[CaptionedImage]:
    return [image for image in images if all(box.category != other for box in image.boxes)]


def rule_episodes(images: Sequence[CaptionedImage], count: int, shots: int, rng: random.Random) -> Iterator[Episode]:
    """Episodes in which the answer follows from the boxes by a rule that is not stated; arguments as above."""
    usable = [image for image in images if image.boxes]
    categories = sorted({box.category for image in usable for box in image.boxes})
    for _ in range(count if len(usable) > shots else 0):
        for _ in range(TRIES):
            name, rule = _drawn_rule(rng, categories)
            chosen = rng.sample(usable, shots + 1)
            demonstrated = [(image, rule(image)) for image in chosen]
            answers = [answer for _, answer in demonstrated[:-1]]
            if demonstrated[-1][1] in answers and len(set(answers)) > 1:  # the answer is shown, and so is another one
                break
        else:
            return
        yield _episode("rule", RULE_QUESTION, demonstrated, {"rule": name})


def _drawn_rule(rng: random.Random, categories: Sequence[str]) -> tuple[str, Callable[[CaptionedImage], str]]:
    """A rule and what it says of an image."""
    category = rng.choice(categories)
    rules: dict[str, Callable[[CaptionedImage], str]] = {
        "the largest object": lambda image: max(image.boxes, key=lambda box: box.area).category,
        "the side of the largest object": _side,
        f"whether there is a {category}": lambda image: "yes" if _count(image, category) else "no",
        f"the number of {category}": lambda image: _number(_count(image, category)),
        "the number of objects": lambda image: _number(len(image.boxes)),
    }
    return rng.choice(list(rules.items()))


def _side(image: CaptionedImage) -> str:
    left, _, right, _ = max(image.boxes, key=lambda box: box.area).corners
    return "left" if left + right < 1 else "right"


def _count(image: CaptionedImage, category: str) -> int:
    return sum(box.category == category for box in image.boxes)


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else "many"


def style_episodes(
    written: Mapping[str, Sequence[tuple[CaptionedImage, str]]], count: int, shots: int, rng: random.Random
) -> Iterator[Episode]:
    """Episodes whose answers share a style.

    Args:
        written: what a text model wrote of images, by style.
        count, shots, rng: as above.
    """
    styles = sorted(style for style, lines in written.items() if len(lines) > shots)
    for number in range(count if styles else 0):
        style = styles[number % len(styles)]
        yield _episode("style", STYLE_QUESTION, rng.sample(written[style], shots + 1), {"style": style})


def _episode(
    sort: str, question: str, demonstrated: Sequence[tuple[CaptionedImage, str]], hidden: Mapping[str, Any]
) -> Episode:
    """The line of an episode: the last image is its query."""
    pairs = [{"image": image.image, "question": question, "answer": answer} for image, answer in demonstrated]
    return {"demos": pairs[:-1], "queries": pairs[-1:], "kind": sort, "hidden": dict(hidden)}
