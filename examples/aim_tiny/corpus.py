"""What the language model of aim-tiny reads in training: lists to copy, captions, questions, naming episodes.

    python examples/aim_tiny/corpus.py        # prints a few samples of every kind

A sample holds at most ONE image. Episodes are made of text; at most one of their demonstrations, or the query, is an
image. Their length goes up to that of the longest prompt with every image in context, by descriptions as long as an
image and by gaps in the positions.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
import world
from words import BOS, EOS, IMAGE, VISUAL_TOKENS, ids, token_id, tokenizer
from world import WORDINGS, Wording

RESTATED = ("this", "shows", "qa", "chat", "there", "see", "that", "look")
IMAGE_IDS = [token_id(IMAGE)] * VISUAL_TOKENS


@dataclass
class Sample:
    """Token ids, which of them are targets, their positions, and the pool image each run of 64 `<image>` shows."""

    ids: list[int] = field(default_factory=lambda: [token_id(BOS)])
    target: list[bool] = field(default_factory=lambda: [False])
    positions: list[int] = field(default_factory=lambda: [0])
    images: list[tuple[int, int]] = field(default_factory=list)

    def add(self, tokens: list[int], target: bool = False) -> None:
        start = self.positions[-1] + 1
        self.ids += tokens
        self.target += [target] * len(tokens)
        self.positions += range(start, start + len(tokens))

    def skip(self, gap: int) -> None:
        """Leave a gap before the next token, as wide as an image would be."""
        self.positions[-1] += gap


@dataclass(frozen=True)
class Picture:
    """A pool image of the training split as an episode's content: shown itself, or told in words."""

    concept: int
    index: int

    @property
    def scene(self) -> world.Scene:
        return world.pool_scene("train", self.concept, self.index)


def random_picture(rng: random.Random, concept: int | None = None) -> Picture:
    concept = rng.randrange(len(world.concepts("train"))) if concept is None else concept
    return Picture(concept, rng.randrange(world.IMAGES_PER_CONCEPT["train"]))


def show(sample: Sample, picture: Picture) -> None:
    sample.images.append((picture.concept, picture.index))
    sample.add(IMAGE_IDS)


def tell(rng: random.Random, scene: world.Scene, length: int = 0, telling: str = "full") -> list[int]:
    """The scene in words; at least `length` tokens, which takes several captions of the same scene.

    `telling`: "terse" (the concept's two words), "easy" (a plain caption) or "full" (captions of every kind).
    """
    if telling == "terse":
        return ids(f"{scene.colour} {scene.shape}")
    told = ids(world.caption(scene, rng, rng.choice([0, 0, 2])) + " .") if telling == "easy" else []
    while not told or len(told) < length - 8:
        told += ids(world.caption(scene, rng) + " .")
    return told


# --- copying ---------------------------------------------------------------------------------------------------------


def copying(rng: random.Random, length: int) -> Sample:
    """A random sequence twice, or a list of keys and values in which keys come back: the second time is the target."""
    sample, words = Sample(), range(7, len(tokenizer()))
    if rng.random() < 0.5:
        once = [rng.choice(words) for _ in range(rng.randint(4, max(5, length // 2 - 1)))]
        sample.add(once)
        if rng.random() < 0.5:
            sample.add([rng.choice(words)])
        sample.add(once, target=True)
        return sample
    keys, values = rng.choice([(1, 1), (2, 1), (1, 2), (2, 2)])
    pairs = [([rng.choice(words) for _ in range(keys)], [rng.choice(words) for _ in range(values)])
             for _ in range(rng.randint(2, 8))]  # fmt: skip
    middle = [rng.choice(words) for _ in range(rng.choice([0, 0, 1, 2, 3]))]
    seen: set[int] = set()
    while len(sample.ids) < length:
        k = rng.randrange(len(pairs))
        sample.add(pairs[k][0] + middle)
        sample.add(pairs[k][1], target=k in seen)
        seen.add(k)
    return sample


# --- one image or caption --------------------------------------------------------------------------------------------


def describing(rng: random.Random, shown: bool) -> Sample:
    """An image (or a caption) and a caption of it, as a bare text, an answer or a turn of a chat."""
    picture, sample = random_picture(rng), Sample()
    detail = rng.choice([0, 1, 1, 1, 2, 3, 4, 5])
    target = world.caption(picture.scene, rng, detail)
    head, question = rng.choice(
        [("", ""), ("", "describe the image ."), ("USER:", "please describe the image . ASSISTANT:")]
    )
    if rng.random() < 0.3:
        wording = WORDINGS[rng.choice(["this", "shows", "qa", "chat", "there", "see"])]
        thing = world.caption(picture.scene, rng, 0).removeprefix("a ")
        thing = thing if wording.question.endswith(" a") else "a " + thing if picture.scene.count == "one" else thing
        head, question, target = wording.head, wording.question, wording.answer.format(thing).removesuffix(" .")
    sample.add(ids(head))
    show(sample, picture) if shown else sample.add(tell(rng, picture.scene))
    sample.add(ids(question))
    sample.add([*ids(target + " ."), token_id(EOS)], target=True)
    return sample


def asking(rng: random.Random, shown: bool) -> Sample:
    """An image (or a full caption) and one to three questions about its attributes."""
    picture, sample = random_picture(rng), Sample()
    chat = rng.random() < 0.5
    sample.add(ids("USER:" if chat else ""))
    show(sample, picture) if shown else sample.add(ids(world.caption(picture.scene, rng, rng.choice([1, 5])) + " ."))
    asked = rng.sample(sorted(world.QUESTIONS), rng.randint(1, 3))
    for k, attribute in enumerate(asked):
        question = rng.choice(world.QUESTIONS[attribute])
        if chat:
            sample.add(ids(("USER: " if k else "") + question + " ASSISTANT:"))
        else:
            sample.add(ids(f"question {question} answer"))
        sample.add(ids(getattr(picture.scene, attribute) + " ."), target=True)
    sample.add([token_id(EOS)], target=True)
    return sample


def restating(rng: random.Random, count: int, telling: str) -> Sample:
    """Captions one after another, each said again or asked about at once: the latest scene has to be told from those
    before it, as in an episode, but every answer can be read off. Without it names are bound three times as slowly."""
    sample = Sample()
    for _ in range(count):
        scene, wording = random_picture(rng).scene, WORDINGS[rng.choice(RESTATED)]
        sample.add(ids(wording.head))
        sample.add(tell(rng, scene, telling=telling))
        if rng.random() < 0.5:
            before, after = wording.answer.split("{}")
            sample.add(ids(world.join(wording.question, before)))
            sample.add(ids(f"{scene.colour} {scene.shape}"), target=True)
            sample.add(ids(after))
            continue
        for attribute in rng.sample(["colour", "shape"], rng.randint(1, 2)):
            sample.add(ids(rng.choice(world.QUESTIONS[attribute])))
            sample.add(ids(getattr(scene, attribute)), target=True)
            sample.add(ids("."))
    return sample


# --- naming episodes -------------------------------------------------------------------------------------------------


def put(
    sample: Sample,
    rng: random.Random,
    wording: Wording,
    picture: Picture,
    shown: bool,
    length: int = 0,
    telling: str = "full",
) -> None:
    """Everything of a demonstration or a query that stands before the answer."""
    sample.add(ids(wording.head))
    show(sample, picture) if shown else sample.add(tell(rng, picture.scene, length, telling))
    sample.add(ids(wording.question))


def say(sample: Sample, wording: Wording, name: str, known: bool) -> None:
    """The answer; the name is a target once its concept has been named before."""
    before, after = wording.answer.split("{}")
    sample.add(ids(before))
    sample.add(ids(name), target=known)
    sample.add(ids(after))


def naming(
    rng: random.Random,
    ways: int,
    demos: int,
    shown: str = "query",
    length: int = 0,
    gaps: bool = False,
    telling: str = "full",
) -> Sample:
    """A naming episode.

    Args:
        ways, demos: concepts, and demonstrations in all.
        shown: what is an image: `"none"`, `"query"`, `"demo"` (one, anywhere), or `"all"` (interleaved control only).
        length: tokens of a description in words, at least.
        gaps: leave gaps in the positions where images would stand.
        telling: how scenes are put in words, see `tell`; names are bound to terse ones first, then to easy ones.
    """
    p = world.plan(rng, ways, 0, "train", demos=demos)
    sample = Sample()
    told, (wording,) = world.draw_wordings(rng, demos, 1, telling)
    ways_shown = [way for way, _ in p.demos]
    one = min(range(demos), key=lambda k: (ways_shown.count(ways_shown[k]), rng.random())) if shown == "demo" else -1
    named: set[int] = set()
    gap = rng.choice([VISUAL_TOKENS, VISUAL_TOKENS, rng.randint(10, 90)])
    for k, ((way, index), said) in enumerate(zip(p.demos, told, strict=True)):
        image = k == one or shown == "all"
        if gaps and not image:
            sample.skip(gap)
        put(sample, rng, said, Picture(p.concept_ids[way], index), image, rng.randint(length // 2, length), telling)
        say(sample, said, p.bindings[way], known=way in named)
        named.add(way)
    way = ways_shown[one] if shown == "demo" and rng.random() < 0.5 else p.query[0]
    picture = random_picture(rng, p.concept_ids[way])
    put(sample, rng, wording, picture, shown in ("query", "all"), rng.randint(length // 2, length), telling)
    sample.add([*ids(wording.answer.format(p.bindings[way])), token_id(EOS)], target=True)
    return sample


# --- batches ---------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Padded on the right: under a causal mask what is padded changes nothing before it."""

    ids: torch.Tensor
    target: torch.Tensor
    positions: torch.Tensor
    images: list[tuple[int, int]]


def collate(samples: list[Sample]) -> Batch:
    length = max(len(s.ids) for s in samples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    return Batch(
        padded([s.ids for s in samples], 0),
        padded([list(map(int, s.target)) for s in samples], 0).bool(),
        padded([s.positions for s in samples], 0),
        [image for s in samples for image in s.images],
    )


if __name__ == "__main__":
    r = random.Random(0)
    for made in (
        copying(r, 20),
        describing(r, False),
        asking(r, True),
        restating(r, 3, "easy"),
        naming(r, 3, 6, "none", telling="terse"),
        naming(r, 2, 4, "demo"),
        naming(r, 2, 3, "none", 60),
    ):
        marked = [
            f"[{t}]" if on else t
            for t, on in zip(tokenizer().convert_ids_to_tokens(made.ids), made.target, strict=True)
        ]
        print(len(made.ids), " ".join(marked).replace(" ".join([IMAGE] * VISUAL_TOKENS), "<64 image tokens>"), "\n")
