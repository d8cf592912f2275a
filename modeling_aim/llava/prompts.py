"""Prompts for instruction data: a system message and worked examples for each kind, in this project's own words.

LLaVA's own prompts are in its repository (`playground/data/prompts`); a copy of that folder is read as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDERS = {"conversation": "conversation", "detail": "detail_description", "complex": "complex_reasoning"}


@dataclass(frozen=True)
class Prompts:
    """What stands before the words of an image.

    Args:
        system: the instructions of the text model.
        examples: captions (with boxes) and what is to be written of them.
    """

    system: str
    examples: tuple[tuple[str, str], ...]

    def messages(self, words: str) -> tuple[dict[str, str], ...]:
        """The chat in which a text model is asked about an image in words."""
        turns = [{"role": "system", "content": self.system}]
        for description, written in self.examples:
            turns += [{"role": "user", "content": description}, {"role": "assistant", "content": written}]
        return (*turns, {"role": "user", "content": words})


def read_prompts(folder: Path, kind: str) -> Prompts:
    """The prompts of one kind in a folder of LLaVA's layout, as they are.

    Args:
        folder: with `conversation`, `detail_description` and `complex_reasoning`, each with \
`system_message.txt` and
            pairs `NNN_caps.txt`, `NNN_conv.txt`.
        kind: conversation, detail or complex.

    Raises:
        FileNotFoundError: there is no such folder or system message.
        ValueError: a file of a pair is missing, or is not UTF-8.
    """
    inner = folder / FOLDERS[kind]
    system = inner / "system_message.txt"
    if not system.is_file():
        raise FileNotFoundError(
            f"{system} was not found: --prompts takes a folder with {FOLDERS[kind]}/ of that file."
        )
    descriptions, answers = ({path.name.removesuffix(end): path for path in inner.glob(f"*{end}")}
                      for end in ("_caps.txt", "_conv.txt"))  # fmt: skip
    single = sorted(set(descriptions) ^ set(answers))
    if single:
        raise ValueError(f"{inner}: {single[0]} lacks its _caps.txt or its _conv.txt.")
    try:
        pairs = [
            (descriptions[n].read_text(encoding="utf-8"), answers[n].read_text(encoding="utf-8"))
            for n in sorted(descriptions)
        ]
        return Prompts(system.read_text(encoding="utf-8"), tuple(pairs))
    except UnicodeDecodeError as error:
        raise ValueError(f"A prompt in {inner} is not UTF-8 ({error}).") from error


def detail_question(number: int) -> str:
    """One of the questions that a detailed description answers."""
    return DETAIL_QUESTIONS[number % len(DETAIL_QUESTIONS)]


DETAIL_QUESTIONS = (
    "Describe the image in detail.",
    "What does this image show? Give a full description.",
    "Tell me everything that can be seen here.",
    "Write a thorough description of the scene.",
    "Walk me through this picture, part by part.",
    "What is going on here, and what does the place look like?",
    "Give a long and careful account of the image.",
    "Explain what is in the picture and where it is.",
)

_KITCHEN = """A woman cuts vegetables at a kitchen counter.
A cook is preparing a salad in a small kitchen.
Someone with an apron chops peppers on a board.
A kitchen with pots on the stove and a person at work.
A woman stands at a counter with a knife and a bowl."""

_KITCHEN_BOXES = """

person: [0.312, 0.094, 0.671, 0.982]
knife: [0.441, 0.602, 0.498, 0.668]
bowl: [0.602, 0.631, 0.741, 0.752]
bowl: [0.768, 0.655, 0.861, 0.744]
oven: [0.012, 0.471, 0.254, 0.993]"""

_STATION = """A man with a bicycle waits on a train platform.
A cyclist stands next to the tracks while a train arrives.
A yellow train pulls into a station.
One person with a bike and a backpack at a railway station.
The platform is nearly empty except for a man and his bicycle."""

_STATION_BOXES = """

train: [0.402, 0.213, 0.998, 0.771]
person: [0.151, 0.337, 0.262, 0.884]
bicycle: [0.184, 0.552, 0.391, 0.921]
backpack: [0.163, 0.404, 0.231, 0.571]"""

CONVERSATION = Prompts(
    """You look at an image together with a person who asks about it. You are given sentences that \
describe the image; write as if you saw the image itself, and never mention the sentences or a \
description.

Write a conversation of several questions and answers. Ask about what can be seen: which objects there are and \
of what kind, how many of them, what they do, where they are, and how they stand to each other. Ask only what \
has a definite answer: the image shows it, or shows that it is not so. Leave out whatever is uncertain.

After these, one or two questions may go further, such as how objects in the image are used or what should be \
kept in mind. Answer those at more length, with reasons.

Put every question and every answer in this form, with a line of three equal signs between any two parts:
Question:
...
===
Answer:
...""",
    (
        (
            _KITCHEN,
            """Question:
What is the woman doing?
===
Answer:
She is cutting vegetables on a board at the kitchen counter.
===
Question:
What does she wear over her clothes?
===
Answer:
She wears an apron.
===
Question:
Which room is this?
===
Answer:
It is a small kitchen with pots on the stove.
===
Question:
What should she keep in mind while she works?
===
Answer:
She handles a sharp knife, so the board must not slip and her fingers should be bent away from the blade. The \
pots on the stove may be hot as well, and with little room in the kitchen she should leave space between them \
and her board.""",
        ),
        (
            _STATION,
            """Question:
What is the man waiting for?
===
Answer:
He is waiting for the train that is pulling into the station.
===
Question:
What colour is the train?
===
Answer:
The train is yellow.
===
Question:
Is the platform crowded?
===
Answer:
No, it is nearly empty; there is only the man with his bicycle.
===
Question:
What does he carry with him?
===
Answer:
He has a bicycle beside him and a backpack.""",
        ),
    ),
)

DETAIL = Prompts(
    """You look at an image. You are given sentences that describe it, and its objects with their places: \
after the name of each object its left, top, right and bottom edge, as shares of the image's width \
and height.

Describe the image in detail, as if you saw it. Say what there is, how many, where, and how things stand to each \
other, and use the places for that, but give no numbers of them and never mention sentences or boxes. Write \
plain running text, and only what the given words support.""",
    (
        (
            _KITCHEN + _KITCHEN_BOXES,
            """The image shows a small kitchen in which a woman in an apron is at work. She stands in the middle \
of the picture, at a counter, and chops peppers and other vegetables on a board with a knife in \
her hand. To the right of her, on the same counter, are two bowls: a larger one within her reach \
and a smaller one farther to the right. On the left edge of the picture stands an oven, with pots \
on its stove. Everything suggests that she is preparing a salad.""",
        ),
        (
            _STATION + _STATION_BOXES,
            """The image shows a railway station with a nearly empty platform. A yellow train takes up most of \
the right side of the picture, from the middle to its edge, and is just pulling in. On the left \
stands a man who waits for it. He has a backpack on his back, and he holds a bicycle, which stands \
in front of him and to his right, between him and the train. Nobody else can be seen.""",
        ),
    ),
)

COMPLEX = Prompts(
    """You look at an image. You are given sentences that describe it, and its objects with their places: \
after the name of each object its left, top, right and bottom edge, as shares of the image's width \
and height.

Write one question about the image that cannot be answered by naming what is seen: it needs a step of thought \
about reasons, background, use, consequences or advice. It must still be about this image. The question must not \
give away what has to be found out by looking. Then answer it, step by step, with what the image shows as the \
ground. Write as if you saw the image; never mention sentences, boxes or numbers of them.

Use this form, with a line of three equal signs in between:
Question:
...
===
Answer:
...""",
    (
        (
            _KITCHEN + _KITCHEN_BOXES,
            """Question:
Which signs show that the meal will be ready in stages rather than all at once?
===
Answer:
Two things happen side by side. The woman is still cutting raw vegetables, and the bowls within her reach will \
take them, so the cold part of the meal is only being prepared. At the same time there are pots on the stove, \
where something can cook without her. Since the hot part needs longer but less attention, she uses that time for \
the salad.""",
        ),
        (
            _STATION + _STATION_BOXES,
            """Question:
What might the man have to think about before he gets on?
===
Answer:
He travels with a bicycle, which not every train takes. He has to find the carriage that has room for it, \
perhaps buy a ticket for it, and be quick, because lifting it through a door takes longer than stepping in. It \
helps that the platform is nearly empty: he can walk along the train without getting in anyone's way. His \
backpack leaves both hands free.""",
        ),
    ),
)

OWN = {"conversation": CONVERSATION, "detail": DETAIL, "complex": COMPLEX}

STYLES = {
    "headline": "the headline of a newspaper, in capital letters and without a full stop",
    "question": "one question that begins with 'Why'",
    "telegram": "a telegram: at most five words, each followed by STOP",
    "child": "one sentence that a child of four would say",
}

STYLE_SYSTEM = (
    "You are given sentences that describe an image. Say what the image shows as {style}. Write that alone, on one "
    "line, "
    "and only what the sentences support."
)
