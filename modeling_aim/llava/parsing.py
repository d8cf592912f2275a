"""What a text model wrote, taken apart: questions and answers, descriptions."""

from __future__ import annotations

import re

BETWEEN = re.compile(r"^[ \t]*={3,}[ \t]*$", re.MULTILINE)
PART = re.compile(r"\A\W*(question|answer)\W*?:[*_\s]*(.*)\Z", re.IGNORECASE | re.DOTALL)


class Unparsable(ValueError):
    """A text does not have the form that was asked for."""


def questions_and_answers(text: str, is_cut: bool = False) -> list[tuple[str, str]]:
    """The pairs of `Question:\\n...\\n===\\nAnswer:\\n...`, blocks between lines of equal signs.

    Args:
        text: what a text model wrote.
        is_cut: it was cut off at its longest; the last part is then left out.

    Raises:
        Unparsable: a block is neither a question nor an answer, they do not alternate, or there is no whole pair.
    """
    blocks = [block.strip() for block in BETWEEN.split(text) if block.strip()]
    blocks = blocks[:-1] if is_cut else blocks
    pairs: list[tuple[str, str]] = []
    question: str | None = None
    for number, block in enumerate(blocks, 1):
        marker = PART.match(block)
        if not marker or not marker[2].strip():
            raise Unparsable(f"part {number} is neither 'Question:' nor 'Answer:' with words")
        words = marker[2].strip()
        is_question = marker[1].lower() == "question"
        if is_question == (question is not None):
            raise Unparsable(
                f"part {number} is a second {marker[1].lower()} in a row, or an answer without a question"
            )
        if is_question:
            question = words
        else:
            pairs.append((question or "", words))
            question = None
    if question is not None and not is_cut:
        raise Unparsable("the last question has no answer")
    if not pairs:
        raise Unparsable("cut off before the first answer ended" if is_cut else "no question with an answer")
    return pairs


def description(text: str, is_cut: bool = False) -> str:
    """Running text, whole.

    Raises:
        Unparsable: it was cut off, or has the form of a conversation.
    """
    words = text.strip()
    if is_cut:
        raise Unparsable("cut off before its end")
    if BETWEEN.search(words) or PART.match(words):
        raise Unparsable("questions and answers where a description was asked for")
    return words


def one_line(text: str, is_cut: bool = False) -> str:
    """A single line.

    Raises:
        Unparsable: it was cut off, or has several lines.
    """
    words = text.strip()
    if is_cut:
        raise Unparsable("cut off before its end")
    if "\n" in words:
        raise Unparsable("several lines where one was asked for")
    return words
