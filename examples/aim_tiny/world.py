"""The small world of aim-tiny: images the project draws itself, made-up names, and naming episodes.

    python examples/aim_tiny/world.py --ways 5 --shots 2 --out build/episode.png

A *concept* is a (colour, shape) pair; texture, count, size and place vary freely. An *episode* binds each of a few
concepts to a made-up name by demonstrations and asks for the name of a new image. Concepts, names and images of the
three splits are disjoint; every colour, shape and syllable is still seen in training.
"""

from __future__ import annotations

import argparse
import colorsys
import functools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

PIXELS = 64
COLOURS = {
    "red": 0.0,
    "orange": 0.085,
    "yellow": 0.16,
    "green": 0.33,
    "cyan": 0.5,
    "blue": 0.635,
    "purple": 0.76,
    "pink": 0.9,
}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "heart", "moon"]
TEXTURES = ["plain", "stripes", "dots", "checks", "waves"]
COUNTS = ["one", "two", "three"]
SIZES = ["small", "large"]
SPLITS = ["train", "validation", "test"]
IMAGES_PER_CONCEPT = {"train": 1000, "validation": 64, "test": 64}

STARTS = sorted({c + v for c in "bdfgklmnpw" for v in "aiou"})
ENDS = [
    "x",
    "g",
    "p",
    "ko",
    "lu",
    "mi",
    "ne",
    "ra",
    "so",
    "ti",
    "vo",
    "zu",
    "bel",
    "dor",
    "fen",
    "gam",
    "kip",
    "lon",
    "mur",
    "nap",
]
ENDS += [
    "pos",
    "rik",
    "sul",
    "tam",
    "vex",
    "wim",
    "yod",
    "zil",
    "bra",
    "cre",
    "dri",
    "flo",
    "gru",
    "pla",
    "ske",
    "spi",
    "sto",
    "tru",
    "qua",
    "jee",
]


# --- splits ----------------------------------------------------------------------------------------------------------


def split_of_concept(colour: int, shape: int) -> str:
    """Diagonals of the colour x shape table: 40 train, 8 validation and 16 test concepts."""
    diagonal = (shape - colour) % 8
    if diagonal in (0, 3):
        return "test"
    if diagonal in (1, 6) and colour % 2 == 0:
        return "validation"
    return "train"


@functools.cache
def concepts(split: str) -> tuple[tuple[str, str], ...]:
    """The (colour, shape) pairs of a split."""
    return tuple(
        (c, s) for i, c in enumerate(COLOURS) for j, s in enumerate(SHAPES) if split_of_concept(i, j) == split
    )


@functools.cache
def names(split: str) -> tuple[str, ...]:
    """The made-up names of a split: a start and an end syllable; 200 each are held out for validation and test."""
    everything = [start + end for start in STARTS for end in ENDS]
    random.Random("names").shuffle(everything)
    return tuple({"test": everything[:200], "validation": everything[200:400], "train": everything[400:]}[split])


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What an image shows, in words."""

    colour: str
    shape: str
    texture: str
    count: str
    size: str


def random_scene(rng: random.Random, concept: tuple[str, str]) -> Scene:
    return Scene(*concept, rng.choice(TEXTURES), rng.choice(COUNTS), rng.choice(SIZES))


def draw(scene: Scene, rng: random.Random, boxes: list[list[float]] | None = None) -> Image.Image:
    """A 64x64 RGB image, drawn at three times the size and reduced (anti-aliased), with jitter in every property.

    `boxes` gets left, top, right and bottom of each shape, as shares of the image.
    """
    scale = 3
    side = PIXELS * scale
    image = background(scene.texture, side, rng)
    pen = ImageDraw.Draw(image)
    count = COUNTS.index(scene.count) + 1
    low, high = {"small": (5.5, 7.5), "large": (10.0, 12.5)}[scene.size]
    placed: list[tuple[float, float, float]] = []
    tries = 0
    while len(placed) < count:
        tries += 1
        if tries > 60:  # no room: start again
            placed, tries = [], 0
        radius = rng.uniform(low, high)
        x, y = rng.uniform(radius + 1, PIXELS - radius - 1), rng.uniform(radius + 1, PIXELS - radius - 1)
        if all(math.hypot(x - a, y - b) > radius + r + 1 for a, b, r in placed):
            placed.append((x, y, radius))
    if boxes is not None:
        boxes += [[round(edge / PIXELS, 3) for edge in (x - r, y - r, x + r, y + r)] for x, y, r in placed]
    ink = jittered(scene.colour, rng)
    for x, y, radius in placed:
        draw_shape(
            pen, scene.shape, x * scale, y * scale, radius * scale, math.radians(rng.uniform(-14, 14)), ink, image
        )
    return image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)


def jittered(colour: str, rng: random.Random) -> tuple[int, ...]:
    if colour == "grey":
        return (rng.choice([rng.randint(0, 20), rng.randint(225, 255)]),) * 3
    if colour not in COLOURS:
        kind, hue = colour.split()
        depth, light = {
            "clear": ((0.8, 1), (0.8, 1)),
            "pale": ((0.25, 0.6), (0.7, 1)),
            "dark": ((0.6, 1), (0.35, 0.65)),
        }[kind]
        return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(float(hue), rng.uniform(*depth), rng.uniform(*light)))
    hue = (COLOURS[colour] + rng.uniform(-0.018, 0.018)) % 1
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, rng.uniform(0.8, 1), rng.uniform(0.8, 1)))


def background(texture: str, side: int, rng: random.Random) -> Image.Image:
    """Grey textures, so that the colour belongs to the shapes."""
    base = rng.randint(35, 190)
    other = base + rng.choice([-1, 1]) * rng.randint(28, 45)
    other = max(0, min(255, other))
    image = Image.new("RGB", (side, side), (base,) * 3)
    pen = ImageDraw.Draw(image)
    step = rng.randint(20, 28)
    shift = rng.randint(0, step)
    ink = (other,) * 3
    if texture == "stripes":
        for x in range(-side, 2 * side, step):
            pen.line([(x + shift, 0), (x + shift + side * rng_sign(shift), side)], fill=ink, width=step // 3)
    elif texture == "dots":
        for x in range(-step + shift, side + step, step):
            for y in range(-step + shift, side + step, step):
                pen.ellipse([x, y, x + step // 2.4, y + step // 2.4], fill=ink)
    elif texture == "checks":
        for i, x in enumerate(range(-2 * step + shift, side, step)):
            for j, y in enumerate(range(-2 * step + shift, side, step)):
                if (i + j) % 2:
                    pen.rectangle([x, y, x + step - 1, y + step - 1], fill=ink)
    elif texture == "waves":
        for y in range(-step + shift, side + step, step):
            points = [(x, y + step / 3 * math.sin(x * 2 * math.pi / (2.2 * step))) for x in range(0, side + 6, 6)]
            pen.line(points, fill=ink, width=step // 4, joint="curve")
    return image


def rng_sign(number: int) -> int:
    return 1 if number % 2 else -1


def draw_shape(pen, shape: str, x: float, y: float, r: float, turn: float, ink, image: Image.Image) -> None:
    """One shape of radius r around (x, y), turned by a small angle."""

    def at(points):
        cos, sin = math.cos(turn), math.sin(turn)
        return [(x + r * (a * cos - b * sin), y + r * (a * sin + b * cos)) for a, b in points]

    if shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=ink)
    elif shape == "square":
        pen.polygon(at([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]), fill=ink)
    elif shape == "triangle":
        pen.polygon(at([(0, -1), (0.95, 0.8), (-0.95, 0.8)]), fill=ink)
    elif shape == "star":
        pen.polygon(
            at([polar(k * math.pi / 5 - math.pi / 2, 1.1 if k % 2 == 0 else 0.45) for k in range(10)]), fill=ink
        )
    elif shape == "cross":
        arm = 0.32
        pen.polygon(at([(-arm, -1), (arm, -1), (arm, 1), (-arm, 1)]), fill=ink)
        pen.polygon(at([(-1, -arm), (1, -arm), (1, arm), (-1, arm)]), fill=ink)
    elif shape == "ring":
        pen.ellipse([x - r, y - r, x + r, y + r], outline=ink, width=round(r * 0.38))
    elif shape == "heart":
        pen.polygon(at([heart_point(2 * math.pi * k / 40) for k in range(40)]), fill=ink)
    elif shape == "blob":
        corners = pen_rng(x, y).sample(range(24), pen_rng(x, y, r).randint(4, 8))
        pen.polygon(
            at([polar(math.pi * c / 12, pen_rng(x, y, c).uniform(0.55, 1.1)) for c in sorted(corners)]), fill=ink
        )
    elif shape == "moon":
        outer = [polar(t, 1) for t in (math.radians(a) for a in range(55, 306, 10))]
        inner = [(0.45 + polar(t, 0.82)[0], polar(t, 0.82)[1]) for t in (math.radians(a) for a in range(280, 79, -10))]
        pen.polygon(at(outer + inner), fill=ink)


def heart_point(t: float) -> tuple[float, float]:
    height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -height / 15


def pen_rng(*numbers: float) -> random.Random:
    return random.Random(f"{numbers}")


def polar(angle: float, radius: float) -> tuple[float, float]:
    return radius * math.cos(angle), radius * math.sin(angle)


@functools.cache
def pool_scene(split: str, concept: int, index: int) -> Scene:
    """The scene of image `index` of the concept `concept` of a split; the same in every process."""
    return random_scene(random.Random(f"scene {split} {concept} {index}"), concepts(split)[concept])


def pool_image(split: str, concept: int, index: int) -> Image.Image:
    """The image that shows `pool_scene`: drawing it again gives the same pixels."""
    return draw(pool_scene(split, concept, index), random.Random(f"image {split} {concept} {index}"))


def unnamed_scene(rng: random.Random) -> Scene:
    """A named shape in a colour without a name (pale, dark, grey, or a hue away from every colour it is held out
    with); or a named colour in a shape without a name."""
    if rng.random() < 0.4:
        return random_scene(rng, (rng.choice(list(COLOURS)), "blob"))
    shape, hue, kind = rng.choice(SHAPES), rng.random(), rng.random()
    if kind < 0.55:
        colour = "grey" if kind < 0.1 else f"{'pale' if kind < 0.35 else 'dark'} {hue:.4f}"
        return random_scene(rng, (colour, shape))
    held = [hue for c, hue in COLOURS.items() if (c, shape) not in concepts("train")]
    while any(min(abs(hue - h), 1 - abs(hue - h)) < 0.022 for h in held):
        hue = rng.random()
    return random_scene(rng, (f"clear {hue:.4f}", shape))


# --- words -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wording:
    """How a demonstration and a question are put. `{}` is the name; `<image>` stands before the text.

    `head` + `<image>` + `question` is what is asked, `answer` what is answered; a demonstration is both together.
    """

    question: str
    answer: str
    head: str = ""

    def demonstration(self, name: str) -> str:
        return join(self.question, self.answer.format(name))


def join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


WORDINGS = {
    "this": Wording("this is", "{} ."),
    "shows": Wording("the image shows a", "{} ."),
    "qa": Wording("question what is this ? answer", "this is {} ."),
    "chat": Wording("what is this ? ASSISTANT:", "this is {} .", head="USER:"),
    "there": Wording("there is a", "{} in the image ."),
    "called": Wording("it is called", "{} ."),
    "see": Wording("here we see a", "{} ."),
    "name": Wording("what is the name of it ? it is", "{} ."),
    "that": Wording("", "that is a {} ."),
    "plain": Wording("what is this ?", "this is {} ."),
    "look": Wording("look , this one is a", "{} ."),
    "short": Wording("question what is it ? answer it is", "{} ."),
    "chatname": Wording("what do you see ? ASSISTANT:", "a {} .", head="USER:"),
    "word": Wording("what is the word ? answer the word is", "{} ."),
}


def draw_wordings(
    rng: random.Random, demos: int, queries: int, telling: str = "full"
) -> tuple[list[Wording], list[Wording]]:
    """Wordings of an episode for training: mostly one; else another one for the queries, or one for each."""
    kind, all_ = rng.random(), list(WORDINGS.values())
    if telling != "full":
        kind, all_ = 0, all_[:3] if telling == "easy" else [TERSE]
    first, second = rng.choice(all_), rng.choice(all_)
    if kind < 0.7:
        return [first] * demos, [first] * queries
    if kind < 0.9:
        return [first] * demos, [second] * queries
    return [rng.choice(all_) for _ in range(demos)], [rng.choice(all_) for _ in range(queries)]


TERSE = Wording("", "{} .")  # "red circle bako .": what naming is learned from first
EVALUATED = ("this", "shows", "qa", "chat")


def plural(scene: Scene) -> str:
    ending = {"cross": "es"}.get(scene.shape, "s")
    return scene.shape if scene.count == "one" else scene.shape + ending


def caption(scene: Scene, rng: random.Random | None = None, detail: int | None = None) -> str:
    """A caption; how much it tells and in which order is drawn from `rng` (None: everything, in the plain order)."""
    thing = f"{scene.colour} {plural(scene)}"
    if rng is None:
        return f"{scene.count} {scene.size} {thing} on {scene.texture}"
    detail = rng.randrange(6) if detail is None else detail
    article = "a" if scene.count == "one" else scene.count
    if detail == 0:
        return f"{article} {thing}"
    if detail == 1:
        return f"{scene.count} {scene.size} {thing} on {scene.texture}"
    if detail == 2:
        return f"{article} {scene.size} {thing}"
    if detail == 3:
        return f"on {scene.texture} , {scene.count} {thing}"
    facts = [f"the colour is {scene.colour}", f"the shape is {scene.shape}", f"the texture is {scene.texture}",
             f"the number is {scene.count}", f"the size is {scene.size}"]  # fmt: skip
    if detail == 4:
        facts = [f"colour {scene.colour}", f"shape {scene.shape}"]
    rng.shuffle(facts)
    return " , ".join(facts)


QUESTIONS = {
    "colour": ["what colour is it ?", "what is the colour ?"],
    "shape": ["what shape is it ?", "what is the shape ?"],
    "texture": ["what is the texture ?", "what is behind it ?"],
    "count": ["how many are there ?", "what is the number ?"],
    "size": ["what size is it ?", "what is the size ?"],
}


# --- episodes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """An episode before anything is drawn: who is called what, and in which order the images come.

    `demos` and `query` hold (position in `concept_ids`, image index); `bindings[i]` is the name of `concept_ids[i]`.
    """

    split: str
    concept_ids: tuple[int, ...]
    bindings: tuple[str, ...]
    demos: tuple[tuple[int, int], ...]
    query: tuple[int, int]


def draw_names(rng: random.Random, split: str, ways: int) -> tuple[str, ...]:
    """Names of one episode share no syllable, so that each token of a name belongs to one concept only."""
    chosen: list[str] = []
    while len(chosen) < ways:
        name = rng.choice(names(split))
        if all(syllables(name)[0] != syllables(c)[0] and syllables(name)[1] != syllables(c)[1] for c in chosen):
            chosen.append(name)
    return tuple(chosen)


def syllables(name: str) -> tuple[str, str]:
    return name[:2], name[2:]


def draw_concepts(rng: random.Random, split: str, ways: int, hard: bool) -> tuple[int, ...]:
    """Different concepts of a split; `hard`: each further one shares colour or shape with one drawn before."""
    table = concepts(split)
    chosen = [rng.randrange(len(table))]
    while len(chosen) < ways:
        free = [i for i in range(len(table)) if i not in chosen]
        near = [i for i in free if any(table[i][0] == table[j][0] or table[i][1] == table[j][1] for j in chosen)]
        chosen.append(rng.choice(near if hard and near else free))
    return tuple(chosen)


def plan(rng: random.Random, ways: int, shots: int, split: str, demos: int | None = None) -> Plan:
    """`ways` concepts, `shots` demonstrations of each, shuffled; hard negatives half the time.

    `demos` (training only): that many demonstrations in all, each concept at least once.
    """
    ids = draw_concepts(rng, split, ways, hard=rng.random() < 0.5)
    which = [w for w in range(ways) for _ in range(shots)]
    if demos is not None:
        which = list(range(ways)) + [rng.randrange(ways) for _ in range(demos - ways)]
    rng.shuffle(which)
    per_concept = IMAGES_PER_CONCEPT[split]
    asked = rng.randrange(ways)
    used: set[tuple[int, int]] = set()

    def fresh(way: int) -> tuple[int, int]:
        while (pick := (way, rng.randrange(per_concept))) in used:
            pass
        used.add(pick)
        return pick

    return Plan(split, ids, draw_names(rng, split, ways), tuple(fresh(w) for w in which), fresh(asked))


def plan_of(seed: int | str, ways: int, shots: int, split: str = "test") -> Plan:
    """The plan of a seed; the wording does not change it, so wordings are compared on the same episodes."""
    return plan(random.Random(f"episode {seed} {ways} {shots} {split}"), ways, shots, split)


@dataclass(frozen=True)
class Episode:
    """What a user would hand over: `demos` as AIM takes them, then the query."""

    demos: list[dict]
    image: Image.Image
    question: str
    answer: str
    name: str


def episode(seed: int | str, ways: int, shots: int, split: str = "test", wording: str = "this") -> Episode:
    """`ways` x `shots` demonstrations and a query with its gold answer.

    A demonstration is `{"image", "text"}`, or `{"image", "question", "answer"}` for the wordings "qa" and "chat".
    `question` is the prompt's text without the image placeholder.
    """
    p, w = plan_of(seed, ways, shots, split), WORDINGS[wording]

    def picture(pick: tuple[int, int]) -> Image.Image:
        return pool_image(split, p.concept_ids[pick[0]], pick[1])

    demos: list[dict] = []
    for pick in p.demos:
        name = p.bindings[pick[0]]
        if w.answer.startswith("{}"):
            demos.append({"image": picture(pick), "text": w.demonstration(name)})
        else:
            demos.append({"image": picture(pick), "question": w.question, "answer": w.answer.format(name)})
    name = p.bindings[p.query[0]]
    return Episode(demos, picture(p.query), w.question, w.answer.format(name), name)


def main() -> None:
    parser = argparse.ArgumentParser(description="draw one episode")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=2)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--out", default="build/episode.png")
    args = parser.parse_args()
    shown = episode(args.seed, args.ways, args.shots, args.split)
    zoom, pictures = 2, [d["image"] for d in shown.demos] + [shown.image]
    sheet = Image.new("RGB", (PIXELS * zoom * len(pictures), PIXELS * zoom + 16), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture.resize((PIXELS * zoom,) * 2), (i * PIXELS * zoom, 0))
        label = shown.demos[i]["text"] if i < len(shown.demos) else f"? {shown.name}"
        ImageDraw.Draw(sheet).text((i * PIXELS * zoom + 2, PIXELS * zoom + 2), label, fill="black")
    sheet.save(args.out)
    print(f"{args.out}: {len(shown.demos)} demonstrations, the answer is {shown.answer!r}")


if __name__ == "__main__":
    main()
