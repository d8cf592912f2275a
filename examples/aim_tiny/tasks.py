"""Few-shot tasks in aim-tiny's small world, for training and for evaluation; splits as in `world.py`.

    python examples/aim_tiny/tasks.py --out build/tasks                       # evaluation episodes, a folder a task
    python examples/aim_tiny/tasks.py --out build/tasks --tasks counts,pairs,distractor,two_words --shots 12
    python examples/aim_tiny/tasks.py --split train --count 1000 --out build/training
    aim eval --repo hub_configs/aim-tiny --tasks episodes:build/tasks/operator/episodes.jsonl --shots 0,2,4,8

An episode hides a rule. Demonstrations show images with the answer that the rule gives, and a query asks for the
answer to a new image, whose concept (colour and shape) never occurs in another split:

* `link_context`: images of a concept have a made-up name;
* `operator`: a made-up word tells one property, colour or shape; which of the two, and which word stands for which
  colour or shape, only the demonstrations' images say;
* `counting`: the question names something of the image ("circle :"), the answer is how many there are;
* `attribute`: the answer is colour, shape, texture, number or size; the question does not say which;
* `captions`: captions of one style: how much they tell, and in which order.

Four more ask more of the images, for evaluation alone:

* `counts`: a made-up word stands for one, two or three things;
* `pairs`: four words stand for the pairs of two values of one property and two of another, so that neither tells;
* `distractor`: two words, whose concepts differ in the colour or in the shape alone;
* `two_words`: demonstrations name a colour or a shape, and the query wants both words, so it needs two of them.

Where the rule sits decides what a prompt without the demonstrations' images can do: no more than guess in the first
two and the last four. In the others the words of the answers give the rule away.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import world
from PIL import Image
from tqdm import tqdm
from world import Scene

OPERATIONS = ("colour", "shape")
ATTRIBUTES = tuple(world.QUESTIONS)
NEUTRAL = ("what is it ?", "question what is it ? answer", "the answer is", "tell me the answer :", "it is")
STYLES = tuple((detail, order) for detail in range(5) for order in ((0, 1) if detail == 4 else (0,)))
NAMING = tuple(wording for wording in world.WORDINGS.values() if wording.question)


@dataclass(frozen=True)
class Shot:
    """An image of a pool with what is asked about it and what is answered; a caption has no question."""

    split: str
    concept: int
    index: int
    question: str
    answer: str

    @property
    def scene(self) -> Scene:
        return world.pool_scene(self.split, self.concept, self.index)

    @property
    def image(self) -> Image.Image:
        return world.pool_image(self.split, self.concept, self.index)

    @property
    def image_name(self) -> str:
        return f"{self.split}-{self.concept}-{self.index}.png"

    def pair(self, image: Any) -> dict[str, Any]:
        """As AIM takes it: image and text, or image, question and answer."""
        words = {"question": self.question, "answer": self.answer} if self.question else {"text": self.answer}
        return {"image": image, **words}


@dataclass(frozen=True)
class Episode:
    """Demonstrations that share a rule, and queries, each of which is answered from all of them."""

    task: str
    rule: str
    demos: tuple[Shot, ...]
    queries: tuple[Shot, ...]


# --- rules: what is asked about a scene, and what is answered

Say = Callable[[Scene], tuple[str, str]]


def counting(rng: random.Random) -> tuple[str, Say]:
    form = rng.choice(["{} :", "{} ?", "question {} ? answer"])

    def say(scene: Scene) -> tuple[str, str]:
        named = random.Random(f"{scene} {form}").choice([scene.shape, scene.colour, f"{scene.colour} {scene.shape}"])
        return form.format(named), scene.count + " ."

    return "count", say


def attribute(rng: random.Random) -> tuple[str, Say]:
    name, question = rng.choice(ATTRIBUTES), rng.choice(NEUTRAL)
    return name, lambda scene: (question, getattr(scene, name) + " .")


def captions(rng: random.Random) -> tuple[str, Say]:
    detail, order = rng.choice(STYLES)
    return f"style {detail} {order}", lambda s: ("", world.caption(s, random.Random(order), detail) + " .")


RULES: dict[str, Callable[[random.Random], tuple[str, Say]]] = {
    "counting": counting,
    "attribute": attribute,
    "captions": captions,
}
NAMED = ("link_context", "operator")  # answers are made-up words
TASKS = (*NAMED, *RULES)
LOOKING = ("counts", "pairs", "distractor", "two_words")  # answers are made-up words, too; for evaluation
PAIRED = (("colour", "count"), ("shape", "count"), ("colour", "texture"), ("shape", "texture"), ("texture", "count"))


# --- episodes


def episode(task: str, seed: int | str, split: str, shots: int, queries: int = 1, ways: int = 2) -> Episode:
    """The episode of a seed.

    Args:
        task: one of `TASKS` or `LOOKING`.
        seed: the same seed gives the same episode.
        split: of `world.SPLITS`.
        shots: demonstrations in all.
        queries: how many are asked.
        ways: made-up words (`link_context`, `operator`). Demonstrations come in rounds of one of each, so that any run
            of them is balanced.
    """
    rng = random.Random(f"{task} {seed} {split} {shots} {ways}")
    if task in LOOKING:
        return _looking(task, rng, split, shots, queries)
    if task in NAMED:
        return _naming(task, rng, split, shots, queries, min(ways, shots))
    rule, say = RULES[task](rng)
    picks = _picks(rng, split, shots + queries)
    made = [Shot(split, *pick, *say(world.pool_scene(split, *pick))) for pick in picks]
    return Episode(task, rule, tuple(made[:shots]), tuple(made[shots:]))


def _images(split: str, shots: int) -> int:
    """Images of a concept to draw from: those of the split, and more where an episode asks for more than they are."""
    usual = world.IMAGES_PER_CONCEPT[split]
    return usual if shots <= usual else 2 * shots


def _picks(rng: random.Random, split: str, count: int) -> list[tuple[int, int]]:
    """Different images of a pool."""
    concepts, images = len(world.concepts(split)), world.IMAGES_PER_CONCEPT[split]
    return [divmod(place, images) for place in rng.sample(range(concepts * images), count)]


def _naming(task: str, rng: random.Random, split: str, shots: int, queries: int, ways: int) -> Episode:
    """Each of `ways` concepts, or of so many colours or shapes, has a made-up name."""
    if task == "link_context":
        rule = f"{ways}-way"
        things = [[concept] for concept in world.draw_concepts(rng, split, ways, rng.random() < 0.5)]
    else:
        rule = rng.choice(OPERATIONS)
        table, part = world.concepts(split), OPERATIONS.index(rule)
        values = rng.sample(sorted({concept[part] for concept in table}), min(ways, 4))
        things = [[place for place, concept in enumerate(table) if concept[part] == value] for value in values]
    names = world.draw_names(rng, split, len(things))
    rounds = [way for _ in range(shots) for way in rng.sample(range(len(things)), len(things))][:shots]
    wordings = [rng.choice(NAMING)] * (shots + queries)
    if split == "train" and rng.random() < 0.3:
        wordings = rng.choices(NAMING, k=shots + queries)
    used: set[tuple[int, int]] = set()

    def shot(way: int, wording: world.Wording) -> Shot:
        while (pick := (rng.choice(things[way]), rng.randrange(_images(split, shots)))) in used:
            pass
        used.add(pick)
        return Shot(split, *pick, wording.question, wording.answer.format(names[way]))

    asked = [rng.randrange(len(things)) for _ in range(queries)]
    made = [shot(way, wording) for way, wording in zip([*rounds, *asked], wordings, strict=True)]
    return Episode(task, rule, tuple(made[:shots]), tuple(made[shots:]))


def _looking(task: str, rng: random.Random, split: str, shots: int, queries: int) -> Episode:
    """Made-up words for what must be looked for: a number, a pair of properties, one of two concepts nearly alike."""
    kinds = _kinds(task, rng, split)
    words = dict(zip(kinds, world.draw_names(rng, split, len(kinds)), strict=True))
    wording, used = rng.choice(NAMING), set()
    fitting: dict[tuple[Any, ...], list[tuple[int, int]]] = {}  # images by the properties that they have

    def pick(*wanted: tuple[tuple[str, str], ...]) -> tuple[int, int]:
        """An image that was not shown, with all properties that are wanted."""
        if wanted not in fitting:
            properties = [one for kind in wanted for one in kind]
            places = itertools.product(range(len(world.concepts(split))), range(_images(split, shots)))
            fitting[wanted] = [place for place in places if _has(world.pool_scene(split, *place), *properties)]
        fit = [place for place in fitting[wanted] if place not in used]
        used.add(place := rng.choice(fit))
        return place

    rounds = [kind for _ in range(shots) for kind in rng.sample(kinds, len(kinds))][:shots]
    demos = []
    for kind in rounds:
        asked = world.QUESTIONS[kind[0][0]][0] if task == "two_words" else wording.question
        answer = f"it is {words[kind]} ." if task == "two_words" else wording.answer.format(words[kind])
        demos.append(Shot(split, *pick(kind), asked, answer))
    made = []
    for _ in range(queries):
        if task == "two_words":
            colours, shapes = ([kind for kind in kinds if kind[0][0] == name] for name in OPERATIONS)
            there = {(scene[0], scene[1]) for scene in world.concepts(split)}
            both = [(c, s) for c in colours for s in shapes if (c[0][1], s[0][1]) in there]
            colour, shape = rng.choice(both)
            asked, answer = "what is it ?", f"it is {words[colour]} {words[shape]} ."
            made.append(Shot(split, *pick(colour, shape), asked, answer))
        else:
            kind = rng.choice(kinds)
            made.append(Shot(split, *pick(kind), wording.question, wording.answer.format(words[kind])))
    return Episode(task, " ".join("+".join(value for _, value in kind) for kind in kinds), tuple(demos), tuple(made))


def _kinds(task: str, rng: random.Random, split: str) -> list[tuple[tuple[str, str], ...]]:
    """What each word of an episode stands for: properties with their values."""
    table = world.concepts(split)
    if task == "counts":
        return [(("count", value),) for value in world.COUNTS]
    if task == "distractor":
        near = [(a, b) for a, b in itertools.combinations(table, 2) if (a[0] == b[0]) != (a[1] == b[1])]
        return [(("colour", colour), ("shape", shape)) for colour, shape in rng.choice(near)]
    if task == "two_words":  # two concepts, so that each colour occurs with one of the shapes
        one, other = rng.choice([(a, b) for a, b in itertools.combinations(table, 2) if a[0] != b[0] and a[1] != b[1]])
        return [(("colour", c),) for c in (one[0], other[0])] + [(("shape", s),) for s in (one[1], other[1])]
    names = rng.choice(PAIRED)
    values = {
        "colour": sorted({colour for colour, _ in table}), "shape": sorted({shape for _, shape in table}),
        "texture": world.TEXTURES, "count": world.COUNTS,
    }  # fmt: skip
    chosen = [[(name, value) for value in rng.sample(values[name], 2)] for name in names]
    return list(itertools.product(*chosen))


def _has(scene: Scene, *wanted: tuple[str, str]) -> bool:
    return all(getattr(scene, name) == value for name, value in wanted)


def named(name: str) -> tuple[str, int]:
    """A task and its made-up words: `"5-way"` is `link_context` with five; a task's own name has two."""
    ways = name.removesuffix("-way")
    return ("link_context", int(ways)) if ways.isdigit() else (name, 2)


def episodes(task: str, split: str, count: int, shots: int = 16, seed: int = 0, ways: int = 2) -> Iterator[Episode]:
    """Episodes for evaluation: all of `shots` demonstrations and one query."""
    return (episode(task, f"{seed}.{number}", split, shots, ways=ways) for number in range(count))


def training_episodes(
    task: str, count: int, shots: Callable[[random.Random], int], queries: int = 2, seed: int = 0
) -> Iterator[Episode]:
    """Episodes for training, with 2 to 8 made-up words.

    Args:
        task: one of `TASKS`.
        count: how many.
        shots: draws the number of demonstrations: `few_or_many(16)`, or `draw` of a `ShotLaw`.
        queries: of each.
        seed: the same seed gives the same episodes.
    """
    rng = random.Random(f"training {task} {seed}")
    for number in range(count):
        ways = rng.choice([2, 2, 3, 4, 5, 5, 6, 7, 8, 8])
        yield episode(task, f"{seed}.{number}", "train", max(2, shots(rng)), queries, ways)


def few_or_many(most: int) -> Callable[[random.Random], int]:
    """Draws 1 to `most`, few more often than many."""
    return lambda rng: rng.randint(1, rng.choice([most // 4, most // 2, most]))


# --- files


def write_episodes(path: Path, made: Iterable[Episode]) -> Path:
    """Write episodes as `{"demos": [...], "queries": [...]}` lines, and their images into `images/` beside the file.

    Args:
        path: of the jsonl file.
        made: episodes.
    """
    folder = path.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    there = {image.name for image in folder.iterdir()}

    def pair(shot: Shot) -> dict[str, Any]:
        if shot.image_name not in there:
            shot.image.save(folder / shot.image_name)
            there.add(shot.image_name)
        return shot.pair(f"images/{shot.image_name}")

    with path.open("w", encoding="utf-8") as file:
        for one in made:
            parts = {"demos": [pair(shot) for shot in one.demos], "queries": [pair(shot) for shot in one.queries]}
            file.write(json.dumps({"task": one.task, "rule": one.rule, **parts}) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/tasks"))
    parser.add_argument("--split", choices=world.SPLITS, default="test")
    parser.add_argument("--count", type=int, default=200, help="episodes a task")
    parser.add_argument("--shots", type=int, default=16, help="demonstrations; for training the largest number")
    parser.add_argument("--ways", type=int, default=2, help="made-up words of an episode (evaluation)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", default=",".join(TASKS))
    args = parser.parse_args()
    for task in args.tasks.split(","):
        if args.split == "train":
            made = training_episodes(task, args.count, few_or_many(args.shots), seed=args.seed)
        else:
            made = episodes(task, args.split, args.count, args.shots, args.seed, args.ways)
        path = write_episodes(args.out / task / "episodes.jsonl", tqdm(made, task, total=args.count))
        print(f"{path}: {args.count} episodes")


if __name__ == "__main__":
    main()
