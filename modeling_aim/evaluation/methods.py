"""Methods: ways to show demonstrations to a model. All of a run see the same examples with the same demonstrations.

A method makes a `Prompt` of a query and its demonstrations. It never opens an image and never sees a model, so a new
one is a function of a few lines with an entry in `METHODS`. Its name may carry settings: `aim-untrained:depth=12`,
`snapkv:ratio=.5:window=16`. Those that work on the KV of a prompt's pieces are in `modeling_aim/baselines`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..baselines.methods import BASELINES, Baseline, baseline_of
from ..demonstrations_aim import Demonstration
from ..processing_aim import AimProcessor
from .task import Example, Shot

PROMPTS = ("plain", "chat")
Projector = Literal["own", "random", "untrained"]


@dataclass(frozen=True)
class ShownShot:
    """A demonstration as one prompt shows it.

    Args:
        words_of: whose words are shown.
        images_of: whose images are shown with them; the same one unless images are shuffled.
    """

    words_of: Shot
    images_of: Shot

    @property
    def key(self) -> tuple[str, str]:
        """Identity within a task."""
        return self.words_of.id, self.images_of.id

    @property
    def words(self) -> Demonstration:
        """The demonstration without its images: enough to word it."""
        return Demonstration.of({name: value for name, value in self.words_of.pair.items() if "image" not in name})

    @property
    def images(self) -> tuple[Any, ...]:
        """Its images, unopened."""
        pair = self.images_of.pair
        image = pair["images"] if pair.get("images") is not None else pair.get("image")
        return () if image is None else tuple(image) if isinstance(image, (list, tuple)) else (image,)


@dataclass(frozen=True)
class Part:
    """A piece of a prompt: a demonstration, or last the query.

    Args:
        text: words with the backbone's placeholder for each image.
        answer_start: the character at which a demonstration's answer begins.
        images: unopened.
    """

    text: str
    answer_start: int
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What a model is given for one query.

    Args:
        text: words with the backbone's placeholder for each image.
        images: unopened, in the order of their placeholders.
        fused: demonstrations that the plug-in reads; their fused tokens come before `text`.
        projector: what makes fused tokens of them: the repository's own projector, one with random weights, or none,
            so that states are put back at the depth where they were read.
        depth: where, of `"untrained"`; the repository's own depths or the default one when `None`.
        parts: the same text in pieces, for a `baseline`.
        baseline: the method that works on them.
    """

    text: str
    images: tuple[Any, ...]
    fused: tuple[ShownShot, ...] = ()
    projector: Projector = "own"
    depth: int | None = None
    parts: tuple[Part, ...] = ()
    baseline: Baseline | None = None


class PromptBuilder:
    """Makes the text of a prompt from a query and its demonstrations.

    A demonstration stands in a prompt with the words that AIM reads of it (`AimProcessor.apply_template`).

    Args:
        processor: of the backbone.
        prompts: `"plain"`: images, then the question, demonstrations before them in the same form; `"chat"`: the
            backbone's chat template, with demonstrations as earlier turns.
        separator: what ends a demonstration of a plain prompt.

    Raises:
        ValueError: `prompts` is unknown, or the backbone has no chat template.
    """

    def __init__(self, processor: AimProcessor, prompts: str = "plain", separator: str = "\n") -> None:
        if prompts not in PROMPTS:
            raise ValueError(f"prompts={prompts!r} is unknown; choose one of {PROMPTS}.")
        if prompts == "chat" and processor.chat_template is None:
            raise ValueError(
                "This backbone has no chat template, so it cannot be asked in chats. Use prompts='plain'."
            )
        self.processor, self.prompts, self.separator = processor, prompts, separator

    def prompt(self, example: Example, demos: Sequence[ShownShot] = (), images: bool = True) -> str:
        """The words of a query behind those of its demonstrations.

        Args:
            example: the query.
            shown: demonstrations that stand in the prompt itself.
            images: whether their images do, too.
        """
        if self.prompts == "plain":
            parts = [self._front(example), *(self._plain(demo, images) + self.separator for demo in demos)]
            return "".join(parts) + self.processor.image_text * len(example.images) + example.question
        turns = [turn for demo in demos for turn in self._turns(demo, images)]
        turns.append(_turn("user", example.question, len(example.images)))
        if example.instruction:
            turns[0]["content"].insert(0, {"type": "text", "text": self._told(example)})
        return self.processor.rendered(turns)

    def parts(self, example: Example, demos: Sequence[ShownShot]) -> tuple[Part, ...]:
        """A plain prompt in pieces: each demonstration with what ends it, and the query."""
        image, parts = self.processor.image_text, []
        for demo in demos:
            text = self._plain(demo, True) + self.separator
            start = len(image) * len(demo.images) + self.processor.apply_template(demo.words)[1]
            parts.append(Part(text, start, demo.images))
        parts.append(Part(image * len(example.images) + example.question, 0, example.images))
        front, first = self._front(example), parts[0]
        return replace(first, text=front + first.text, answer_start=len(front) + first.answer_start), *parts[1:]

    def option(self, prompt: str, option: str) -> str:
        """An option as it stands behind a prompt: after a space, unless something else divides them."""
        template = self.processor.question_template
        divides = template[: template.index("{answer}")][-1:].isspace()
        image = self.processor.image_text
        ends_bare = prompt and not prompt[-1].isspace() and not (image and prompt.endswith(image))
        return f" {option}" if ends_bare and divides else option

    def _front(self, example: Example) -> str:
        """What stands before the demonstrations of a plain prompt: BOS that only a chat template writes, the task."""
        return self.processor.front(0) + self._told(example)

    def _told(self, example: Example) -> str:
        return f"{example.instruction}\n" if example.instruction else ""

    def _plain(self, demo: ShownShot, images: bool) -> str:
        return (
            self.processor.image_text * (len(demo.images) if images else 0)
            + self.processor.apply_template(demo.words)[0]
        )

    def _turns(self, demo: ShownShot, images: bool) -> list[dict[str, Any]]:
        """A user turn with what is asked, where something is, and the assistant's with what is said."""
        demonstration = demo.words
        words, start, _ = self.processor.apply_template(demonstration)
        question_words = words[:start] if demonstration.question is not None else ""
        count = len(demo.images) if images else 0
        question = question_words.strip() or (None if count else "")
        return [_turn("user", question, count), _turn("assistant", words[len(question_words) :])]


def _turn(role: str, words: str | None, images: int = 0) -> dict[str, Any]:
    text_parts = [] if words is None else [{"type": "text", "text": words}]
    return {"role": role, "content": [{"type": "image"}] * images + text_parts}


# --- the methods

Show = Callable[[PromptBuilder, Example, Sequence[ShownShot], int], Prompt]


def zero(builder: PromptBuilder, example: Example, demos: Sequence[ShownShot], seed: int) -> Prompt:
    """The query alone."""
    return Prompt(builder.prompt(example), example.images)


def text_only(builder: PromptBuilder, example: Example, demos: Sequence[ShownShot], seed: int) -> Prompt:
    """The demonstrations' words before the query, without their images."""
    return Prompt(builder.prompt(example, demos, images=False), example.images)


def full(builder: PromptBuilder, example: Example, demos: Sequence[ShownShot], seed: int) -> Prompt:
    """The demonstrations' images and words before the query."""
    return Prompt(builder.prompt(example, demos), (*(i for demo in demos for i in demo.images), *example.images))


def in_pieces(builder: PromptBuilder, example: Example, demos: Sequence[ShownShot], seed: int) -> Prompt:
    """As `full`, in pieces that a method of `modeling_aim/baselines` reads."""
    prompt = full(builder, example, demos, seed)
    return replace(prompt, parts=builder.parts(example, demos) if builder.prompts == "plain" else ())


def aim(builder: PromptBuilder, example: Example, demos: Sequence[ShownShot], seed: int) -> Prompt:
    """The demonstrations as fused tokens."""
    return Prompt(builder.prompt(example), example.images, tuple(demos))


def aim_shuffled(builder: PromptBuilder, example: Example, demos: Sequence[ShownShot], seed: int) -> Prompt:
    """As `aim`, with images shuffled among the demonstrations: what is left does not come from the images."""
    sources = [demo.images_of for demo in demos]
    random.Random(f"deal {seed} {example.id}").shuffle(sources)
    shuffled = [replace(demo, images_of=source) for demo, source in zip(demos, sources, strict=True)]
    return aim(builder, example, shuffled, seed)


@dataclass(frozen=True)
class Method:
    """A way to show demonstrations.

    Args:
        make: makes the prompt of a query.
        needs_aim: it needs an AIM repository.
        many_images: it puts several images into one prompt.
        shots: it shows demonstrations at all.
        draws: it draws something by the seed beside the demonstrations.
        projector, depth, baseline: of its prompts; see `Prompt`.
    """

    make: Show
    needs_aim: bool = False
    many_images: bool = False
    shots: bool = True
    draws: bool = False
    projector: Projector = "own"
    depth: int | None = None
    baseline: Baseline | None = None

    def show(self, builder: PromptBuilder, example: Example, demos: Sequence[ShownShot], seed: int) -> Prompt:
        """The prompt of a query with its demonstrations."""
        prompt = self.make(builder, example, demos, seed)
        return replace(prompt, projector=self.projector, depth=self.depth, baseline=self.baseline)


METHODS: dict[str, Method] = {
    "zero": Method(zero, shots=False),
    "text": Method(text_only),
    "full": Method(full, many_images=True),
    "aim": Method(aim, needs_aim=True),
    "aim-shuffled": Method(aim_shuffled, needs_aim=True, draws=True),
    "aim-random": Method(aim, needs_aim=True, draws=True, projector="random"),  # what is left is not from training
    "aim-untrained": Method(aim, projector="untrained"),
    "aim-untrained-shuffled": Method(aim_shuffled, draws=True, projector="untrained"),
    **{
        name: Method(in_pieces, many_images=baseline.many_images, baseline=baseline)
        for name, baseline in BASELINES.items()
    },
}
BY_DEFAULT = tuple(name for name in METHODS if name not in BASELINES)


def method_of(name: str) -> Method:
    """A method by its name, with the settings behind it, as in `aim-untrained:depth=12`.

    Raises:
        ValueError: there is no such method, or it has no such setting.
    """
    plain, colon, setting = name.partition(":")
    if plain not in METHODS:
        raise ValueError(f"There is no method {name}; choose of {', '.join(METHODS)}.")
    method, (key, _, value) = METHODS[plain], setting.partition("=")
    if not colon:
        return method
    if method.baseline is not None:
        return replace(method, baseline=baseline_of(name))
    if key != "depth" or not value.isdecimal() or method.projector != "untrained":
        raise ValueError(f"Method {name!r}: expected aim-untrained:depth=K or aim-untrained-shuffled:depth=K.")
    return replace(method, depth=int(value))


def check_methods(names: Sequence[str], has_aim: bool) -> None:
    """Raise `ValueError` unless all are methods that a model can be evaluated with."""
    if not names:
        raise ValueError(f"There is no method given; choose of {', '.join(METHODS)}.")
    methods = {name: method_of(name) for name in names}
    if len(set(names)) < len(names):
        raise ValueError(f"A method is given twice: {', '.join(names)}.")
    needing = [name for name, method in methods.items() if method.needs_aim]
    if needing and not has_aim:
        can = ", ".join(name for name, method in METHODS.items() if not method.needs_aim)
        raise ValueError(
            f"{', '.join(needing)} need an AIM repository (--repo), but a backbone alone was given. It can be "
            f"evaluated with {can}."
        )
