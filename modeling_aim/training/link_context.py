"""Link-context episodes (Link-Context Learning, arXiv 2308.07891): demonstrations bind what is seen to a made-up name.

An episode shows images of a class under a random string and images of a class that looks like it under its own name,
shuffled, and then asks for one more image of either. Only the demonstrations can answer that, not memory.

    source = LinkContext("imagenet/train", clip="openai/clip-vit-base-patch16", policy="2way_random_shot")
    source = LclRows("train900_pairs.jsonl", images="imagenet")  # the published rows, with neighbours already mined
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..data.link_context import (
    QUESTIONS,
    REFERENCE,
    REFERENCE_QUESTION,
    SAME_CLASS,
    Wording,
    class_folders,
    class_rows,
    image_paths,
    random_name,
)
from ..data.mining import ClassFeatures, ImageClass, clip_features, mined_neighbours, similarity
from ..data.pairs import Pair, Replaceable
from .episodes import Episode, ShotLaw, Source

logger = logging.get_logger(__name__)

POLICIES = ("2way_weight", "2way_random_shot", "2way_ref", "2way_ref_or_weight", "2way_uniform", "mix")
OLD_POLICIES = {"2-way": "2way_weight", "2-way-weight": "2way_random_shot", "2-way-random": "2way_uniform"}
REFERENCES = 3  # of each class at least, where images have names of their own
RENAMES = ("positive", "both")
NEIGHBOURS = ("similar", "random")
SHOTS = 16  # of each class, in the paper
SPARES = 16  # images of a class that may replace broken ones


@dataclass(frozen=True)
class Neighbour:
    """A class that another may be shown with.

    Args:
        number: of the class.
        weight: how often it is drawn, relative to the other neighbours.
        images: of it, besides those of the class.
    """

    number: int
    weight: float
    images: tuple[str, ...] = ()


class LinkedClasses(Source):
    """Link-context episodes over classes whose neighbours are known. One pass has each class once as the positive.

    `ShotLaw` counts demonstrations in all, the paper counts those of each class. Of the law only `most` is used, as
    the ceiling: `most // ways` of each class. How many there are below it is decided by the policy.

    Args:
        classes: at least two.
        neighbours: those of each class.
        name: of the source.
        policy: of Link-Context Learning's code, `"2way_weight"`, always `shots` of each class;
            `"2way_random_shot"`, 1 to `shots`, each number `e ** 0.5` times as likely as the one below it;
            `"2way_ref"`, 3 to `shots`, each image under a name of its own, and the query asks for the names of its
            class; `"2way_ref_or_weight"`, half and half. Ours: `"2way_uniform"`, 1 to `shots`, all alike; `"mix"`, as
            `"2way_weight"`, but half of the episodes are ordinary ones.
        shots: demonstrations of each class; 16 as in the paper, or what the law has room for, when `None`.
        ways: classes in an episode. The paper: 2.
        rename: which classes get a random name: `"positive"` as in the paper, or `"both"` (all of them).
        wording: `"label"`, `"paper"`, or a `Wording`.
        questions: `"one"`, the wording's own; or `"varied"`, one of 65 for each query, as the paper trains. The
            default is `"varied"` with the wording `"paper"`.
        ordinary: share of ordinary episodes (images under their true names, and another image to be named), which
            have as many demonstrations in all. 0.5 for `"mix"` and else 0, when `None`.

    Raises:
        ValueError: a setting is unknown or there are too few classes; while it is read, a class has too few images,
            or the law no room for one demonstration of each class.
    """

    def __init__(
        self,
        classes: Sequence[ImageClass],
        neighbours: Sequence[Sequence[Neighbour]],
        *,
        name: str,
        policy: str = "2way_weight",
        shots: int | None = None,
        ways: int = 2,
        rename: str = "positive",
        wording: str | Wording = "label",
        questions: str | None = None,
        ordinary: float | None = None,
    ) -> None:
        policy = policy.removeprefix("policy_")
        check_policy(policy)
        questions = questions or ("varied" if wording == "paper" else "one")
        for setting, value, known in (("rename", rename, RENAMES), ("questions", questions, ("one", "varied"))):
            if value not in known:
                raise ValueError(f"{setting}={value!r} is unknown; choose one of {known}.")
        if policy.startswith("2way_ref") and shots is not None and shots < REFERENCES:
            raise ValueError(f"shots={shots}: policy={policy!r} shows at least {REFERENCES} images of each class.")
        if shots is not None and shots < 1:
            raise ValueError(f"shots={shots}: at least one demonstration of each class is needed.")
        if not ways >= 2:
            raise ValueError(f"ways={ways}: an episode needs at least two classes.")
        self.ordinary = (0.5 if policy == "mix" else 0.0) if ordinary is None else ordinary
        if not 0 <= self.ordinary <= 1:
            raise ValueError(f"ordinary={ordinary}: expected a share in 0..1.")
        self.classes, self.neighbours, self.name = list(classes), [list(some) for some in neighbours], name
        self.policy, self.shots, self.ways, self.rename = policy, shots, ways, rename
        self.wording, self.varied = Wording.of(wording), questions == "varied"
        self._taken = {image_class.name.lower() for image_class in self.classes}
        self._check_neighbours()

    def _check_neighbours(self) -> None:
        for image_class, some in zip(self.classes, self.neighbours, strict=True):
            names = {self.classes[neighbour.number].name for neighbour in some}
            if len(names) < self.ways - 1:
                raise ValueError(
                    f"{self.name}: the class {image_class.key!r} has {len(names)} neighbours of different names, but "
                    f"ways={self.ways} needs {self.ways - 1}. Give more classes, or fewer ways."
                )

    def most(self, law: ShotLaw) -> int:
        """The largest number of demonstrations of each class under a law; `ways` times as many are there in all.

        Raises:
            ValueError: the law has no room for `shots`, or for one demonstration of each class.
        """
        ceiling = law.most // self.ways
        wanted = self.shots or (REFERENCES if self.policy.startswith("2way_ref") else 1)
        if ceiling < wanted:
            raise ValueError(
                f"{self.name}: {wanted} demonstrations of each of {self.ways} classes are {wanted * self.ways} in all,"
                f" but episodes may have {law.most} in all. Allow {wanted * self.ways} in all, or ask for fewer of "
                "each class."
            )
        return self.shots or min(SHOTS, ceiling)

    def counts(self, law: ShotLaw) -> str:
        """Both counts of demonstrations under a law, in words: of each class, and in all."""
        most = self.most(law)
        fewest = {"2way_random_shot": 1, "2way_uniform": 1, "2way_ref": REFERENCES, "2way_ref_or_weight": REFERENCES}
        lowest = fewest.get(self.policy, most)
        many = [f"{lowest * k} to {most * k}" if lowest < most else f"{most * k}" for k in (1, self.ways)]
        return f"{self.policy}: {many[0]} demonstrations of each of {self.ways} classes, {many[1]} in all"

    def documents(self, seed: int) -> Iterator[Sequence[Pair]]:
        """One pass over the images under their true names, as ordinary demonstrations, class by class."""
        rng = random.Random(f"{self.name} documents {seed}")
        for image_class in rng.sample(self.classes, len(self.classes)):
            for image in rng.sample(image_class.images, len(image_class.images)):
                yield [self.wording.shown(image, image_class.name)]

    def episodes(self, law: ShotLaw, seed: int) -> Iterator[Episode]:
        """One pass: an episode for each class as the positive, of which only the query is a target.

        In the place of an image that cannot be read stands another one of its class, as long as there are some; then
        the episode is left out.

        Args:
            law: gives the ceiling of demonstrations in all.
            seed: decides everything else.
        """
        most = self.most(law)
        self._check_images(most)
        logger.info(f"{self.name}: {self.counts(law)}.")
        rng = random.Random(f"{self.name} {seed}")
        for positive in rng.sample(range(len(self.classes)), len(self.classes)):
            if not self.gives(self.classes[positive].key):
                continue
            shots = self._draw(most, rng)
            make = self._ordinary if rng.random() < self.ordinary else self._linked
            if make == self._linked and self._refers(rng):
                make, shots = self._referred, rng.randint(REFERENCES, most)
            pairs = make(positive, shots, rng)
            yield self._episode(pairs, [len(pairs) - 1], whole=True)

    def _check_images(self, most: int) -> None:
        short = [image_class for image_class in self.classes if len(image_class.images) < most + 1]
        if short:
            examples = ", ".join(f"{image_class.key!r} ({len(image_class.images)})" for image_class in short[:5])
            examples += ", ..." if len(short) > 5 else ""
            raise ValueError(
                f"{self.name}: {most} demonstrations of each class and a query need {most + 1} images a class; "
                f"{len(short)} of {len(self.classes)} classes have fewer: {examples}. "
                "Remove them, or ask for fewer shots."
            )

    def _draw(self, most: int, rng: random.Random) -> int:
        """How many demonstrations each class has."""
        if self.policy not in ("2way_random_shot", "2way_uniform"):
            return most
        weights = [math.exp(count / 2) if self.policy == "2way_random_shot" else 1.0 for count in range(1, most + 1)]
        return rng.choices(range(1, most + 1), weights)[0]

    def _refers(self, rng: random.Random) -> bool:
        """Whether an episode asks for the names of single images."""
        return self.policy == "2way_ref" or (self.policy == "2way_ref_or_weight" and rng.random() < 0.5)

    def _linked(self, positive: int, shots: int, rng: random.Random) -> list[Pair]:
        """Demonstrations of a class and of its neighbours, shuffled, and a query of one of them."""
        pools = self._pools(positive, rng)
        taken = set(self._taken)
        names = [name for name, _ in pools]
        for place in range(self.ways if self.rename == "both" else 1):
            names[place] = random_name(rng, taken)
            taken.add(names[place])
        target = rng.randrange(self.ways)
        demos: list[Pair] = []
        for place, (_, images) in enumerate(pools):
            drawn = _drawn(
                images, shots + (place == target), rng
            )  # the query is another image than the demonstrations
            demos += [self.wording.shown(image, names[place]) for image in drawn[:shots]]
            if place == target:
                query = self.wording.query(drawn[-1], names[place], rng.choice(QUESTIONS) if self.varied else None)
        rng.shuffle(demos)
        return [*demos, query]

    def _referred(self, positive: int, shots: int, rng: random.Random) -> list[Pair]:
        """Images of a class and of its neighbours, each under a random name; asked are the names of one class.

        `policy_2way_ref` of Link-Context Learning's code answers with the names of the other class; here they are
        those of the query's own.
        """
        target, taken = rng.randrange(self.ways), set(self._taken)
        labelled_pairs: list[tuple[Pair, str, bool]] = []
        for place, (_, images) in enumerate(self._pools(positive, rng)):
            drawn = _drawn(images, shots + (place == target), rng)
            for image in drawn[:shots]:
                name = random_name(rng, taken)
                taken.add(name)
                pair = {"image": image, "question": REFERENCE_QUESTION, "answer": REFERENCE.format(name=name)}
                labelled_pairs.append((pair, name, place == target))
            if place == target:
                query_image = drawn[-1]
        rng.shuffle(labelled_pairs)
        names = ", ".join(name for _, name, same in labelled_pairs if same)
        return [
            *(pair for pair, _, _ in labelled_pairs),
            {"image": query_image, "question": SAME_CLASS, "answer": names},
        ]

    def _pools(self, positive: int, rng: random.Random) -> list[tuple[str, tuple[str, ...]]]:
        """Name and images of a class, and of each of the classes beside it."""
        image_class = self.classes[positive]
        pools = [(image_class.name, image_class.images)]
        for neighbour in self._negatives(positive, rng):
            other = self.classes[neighbour.number]
            pools.append((other.name, tuple(dict.fromkeys([*other.images, *neighbour.images]))))
        return pools

    def _negatives(self, positive: int, rng: random.Random) -> list[Neighbour]:
        """Neighbours with different names, drawn by weight."""
        chosen: list[Neighbour] = []
        left = self.neighbours[positive]
        while len(chosen) < self.ways - 1:
            chosen += rng.choices(left, [neighbour.weight for neighbour in left])
            drawn = self.classes[chosen[-1].number].name
            left = [neighbour for neighbour in left if self.classes[neighbour.number].name != drawn]
        return chosen

    def _ordinary(self, number: int, shots: int, rng: random.Random) -> list[Pair]:
        """Images of any class under their true names, and one of class `number` to be named."""
        wanted, image_class = Counter({number: 1}), self.classes[number]
        while wanted.total() <= shots * self.ways:
            drawn = rng.randrange(len(self.classes))
            wanted[drawn] += wanted[drawn] < len(self.classes[drawn].images)
        images = {k: _drawn(self.classes[k].images, count, rng) for k, count in wanted.items()}
        query = self.wording.query(images[number].pop(), image_class.name)
        demos = [self.wording.shown(image, self.classes[k].name) for k, some in images.items() for image in some]
        rng.shuffle(demos)
        return [*demos, query]


def check_policy(policy: str) -> None:
    """Raise `ValueError` for a policy that there is not; the message has its name of today, or why it is not made."""
    if policy in OLD_POLICIES:
        raise ValueError(
            f"policy={policy!r} is an old name. Policies are called as in Link-Context Learning's code now: it is "
            f"{OLD_POLICIES[policy]!r} ('2way_weight' is always as many shots, '2way_random_shot' draws their number)."
        )
    if policy == "jigsaw":
        raise ValueError(
            "policy='jigsaw' is not made: it asks for the coordinates of an image's pieces, and each piece would be a "
            "demonstration without words of its own, at which AIM reads states. Use 2way_ref_or_weight and other data."
        )
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is unknown; choose one of {POLICIES}.")


def _drawn(images: Sequence[str], count: int, rng: random.Random) -> list[Any]:
    """Some of the images of a class; the others may replace them."""
    order = rng.sample(images, len(images))
    spares = order[count : count + SPARES]
    return [Replaceable(image, spares) for image in order[:count]]


class LinkContext(LinkedClasses):
    """Link-context episodes over a labelled image folder: one folder a class.

    Args:
        path: the folder; images may lie in subfolders of a class.
        features: class features to mine neighbours from (`ClassFeatures`, or a safetensors file of them, whose
            classes are names of class folders); with `clip`, the file to keep them in.
        clip: Hub id or folder of a CLIP that computes them. The paper: `openai/clip-vit-base-patch16`.
        means: of its image features, `"unit"`, or `"raw"` as in Link-Context Learning's code (`clip_features`).
        neighbours: `"similar"`, mined from features; or `"random"`, any other class, all alike, without features.
        names: names of the classes by folder, or a JSON file of them, where a folder is not called by its class's
            name (WordNet ids).
        seed: of the mining.
        **settings: as for `LinkedClasses`: `policy`, `shots`, `ways`, `rename`, `wording`, `questions`, `ordinary`.

    Raises:
        ValueError: fewer than two classes, a class without a name, features of other classes, an unknown setting.
        FileNotFoundError: no such folder or file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        features: ClassFeatures | str | os.PathLike[str] | None = None,
        clip: str | os.PathLike[str] | None = None,
        means: str = "unit",
        neighbours: str = "similar",
        names: Mapping[str, str] | str | os.PathLike[str] | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        if neighbours not in NEIGHBOURS:
            raise ValueError(f"neighbours={neighbours!r} is unknown; choose one of {NEIGHBOURS}.")
        if neighbours == "similar" and features is None and clip is None:
            raise ValueError(
                "Neighbours are mined from class features: give clip= (a CLIP that computes them), features= (a file "
                "of them), or neighbours='random'."
            )
        if means != "unit" and clip is None:
            raise ValueError(f"means={means!r} is of the features that a CLIP computes; give clip=, too.")
        classes = class_folders(path, names)
        if neighbours == "random":
            everybody = range(len(classes))
            neighbour_lists = [[Neighbour(other, 1.0) for other in everybody if other != own] for own in everybody]
        else:
            mined = mined_neighbours(_alike(classes, features, clip, means), seed)
            neighbour_lists = [
                [Neighbour(other, len(some) - place) for place, other in enumerate(some)] for some in mined
            ]
        super().__init__(classes, neighbour_lists, name=f"link-context {Path(path).name}", **settings)


def _alike(
    classes: Sequence[ImageClass],
    features: ClassFeatures | str | os.PathLike[str] | None,
    clip: str | os.PathLike[str] | None,
    means: str,
) -> Any:
    """How alike classes are, of features that are given, or computed."""
    if isinstance(features, ClassFeatures):
        features = features.of(classes)
    elif clip is not None:
        features = clip_features(classes, clip, features, means=means)
    else:
        assert features is not None
        features = ClassFeatures.load(features).of(classes, f"The features in {os.fspath(features)}")
    return similarity(features.text, features.images)


# --- the published rows


class LclRows(LinkedClasses):
    """Link-context episodes of the rows published for training: classes with samples, and neighbours already mined.

    A row has `class_id`, `class_name`, `samples` (paths of 36 images) and `neighbours`, in the files spelled
    `neighbors` (36 of `[class id, class name, image]`, nearest first). Names are lower-cased as in the original code.
    Negatives are the neighbour's image and the samples of its own row; a neighbour without a row is never drawn.

    Args:
        path: the jsonl file.
        images: the folder that image paths are relative to; that of the file when `None`.
        **settings: as for `LinkedClasses`.

    Raises:
        ValueError: a row is not as described; the message names file and line.
        FileNotFoundError: no such file.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None, **settings: Any
    ) -> None:
        root = Path(path).parent if images is None else Path(images)
        rows = list(class_rows(Path(path), ("class_id", "class_name", "samples", "neighbors")))
        if len(rows) < 2:
            raise ValueError(f"{path} has {len(rows)} rows; link-context episodes need at least two classes.")
        numbers = {str(row["class_id"]): number for number, (_, row) in enumerate(rows)}
        if len(numbers) < len(rows):
            raise ValueError(f"{path} has {len(rows)} rows of only {len(numbers)} classes; expected one row a class.")
        classes, neighbour_lists = [], []
        for line, row in rows:
            key, samples = str(row["class_id"]), tuple(image_paths(root, row["samples"], path, line))
            classes.append(ImageClass(key, row["class_name"].strip().lower(), samples))
            neighbour_lists.append(list(_row_neighbours(row["neighbors"], numbers, root, path, line)))
        super().__init__(classes, neighbour_lists, name=f"lcl {Path(path).stem}", **settings)


def _row_neighbours(
    listed: object, numbers: Mapping[str, int], root: Path, path: str | os.PathLike[str], line: int
) -> Iterator[Neighbour]:
    """Neighbours of a row that have rows of their own, with the weights of their places among all: 36, 35, ..., 1."""
    if not isinstance(listed, list) or not all(isinstance(entry, list) and len(entry) == 3 for entry in listed):
        raise ValueError(f"{path}, line {line}: its neighbors are not lists [class id, class name, image].")
    for place, (key, _, image) in enumerate(listed):
        if str(key) in numbers:
            more = tuple(image_paths(root, [image], path, line))
            yield Neighbour(numbers[str(key)], len(listed) - place, more)
