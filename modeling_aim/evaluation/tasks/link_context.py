"""Link-Context Learning (arXiv 2308.07891): what an image shows is bound to a name by demonstrations alone.

ISEKAI and the published test pairs of ImageNet as they are, and any labelled image folder with made-up names.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ...data.images import Pictures, is_image
from ...data.jsonl import numbered_json, read_json
from ...data.link_context import Wording, class_folders, random_name, test_pairs
from ...data.mining import ClassFeatures, similarity
from ...data.rows import existing
from ...data.tables import fetched
from ..metrics import lcl_published, named
from ..task import Example, Prediction, Shot
from .data_task import DataTask

Named = tuple[str, Any]  # an image with its name in the dataset
KEYS = ("image_name", "positive_list", "negative_list", "positive_promt", "negative_promt", "label_name")


class LinkContextTask(DataTask):
    """What the tasks share: demonstrations of each class in equal numbers, shuffled, and names as answers.

    Args:
        name: to show.
        wording: `"paper"` or `"label"`, as in training.
        ways: classes in an example.
    """

    fixed = True
    max_new_tokens = 20

    def __init__(self, name: str, wording: str, ways: int = 2) -> None:
        super().__init__(name)
        self.wording, self.ways = Wording.of(wording), ways

    def query(self, name: str, image: Any, label: str, others: Sequence[str], **facts: Any) -> Example:
        """An example: an image whose class is called `label`, and not one of `others`."""
        facts = {"others": list(others), **facts}
        return Example(name, (image,), self.wording.question, (label,), label=label, facts=facts)

    def mixed(self, example: Example, count: int, seed: int, images: Mapping[str, Sequence[Named]]) -> list[Shot]:
        """`count` demonstrations in all, as many of each class, shuffled.

        Args:
            example: that they are shown for.
            count: in all.
            seed: of the order.
            images: of each class by its name; the first are shown.

        Raises:
            ValueError: a class has not as many, or they cannot be as many of each.
        """
        if count % len(images):
            raise ValueError(
                f"{self.name} shows as many demonstrations of each of {len(images)} classes, so {count} in all cannot "
                f"be; ask for multiples of {len(images)}."
            )
        many = count // len(images)
        few = {name: len(some) for name, some in images.items() if len(some) < many}
        if few:
            raise ValueError(
                f"{self.name}, example {example.id}: {many} demonstrations of each class, but there are {few}."
            )
        shots = [
            Shot(f"{own} as {name}", self.wording.shown(image, name), name)
            for name, some in images.items()
            for own, image in some[:many]
        ]
        random.Random(f"{self.name} {seed} {example.id} {count}").shuffle(shots)
        return shots

    def per_class(self, count: int) -> int | None:
        return count // self.ways

    def shots_note(self, count: int) -> str:
        each = count // self.ways
        note = f"{each} of each of {self.ways} classes: {count}-shot in LCL's paper, {each}-shot in its code"
        return note if count else ""

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        """LCL's accuracy as published, and in the normalised form."""
        label, others = str(example.label), example.facts["others"]
        return {
            "accuracy": float(named(prediction.text, label, others)),
            "accuracy_published": float(all(lcl_published(prediction.text, label, other) for other in others)),
        }

    def notes(self) -> list[str]:
        note = "accuracy: the name and no other, as whole words, case aside; accuracy_published: as in LCL's code."
        return [*super().notes(), note]


class Isekai(LinkContextTask):
    """ISEKAI: generated images of things that do not exist, beside something that resembles them.

    Args:
        path: folder of the dataset, or its Hub id: images, and a file of JSON lines (or a list) with the keys
            `image_name, positive_list, negative_list, positive_promt, negative_promt, label_name` (spelled so).
        annotations: that file, where it is not in the folder.
        images: folder that names of images are relative to; that of the dataset when `None`.
        wording: `"paper"` or `"label"`.
        name: to show.

    Raises:
        FileNotFoundError: there is no such folder or file, or an image is missing.
        ValueError: when it is read, the annotations are not as described.
    """

    hub: ClassVar[str]

    def __init__(
        self,
        path: str = "",
        *,
        annotations: str | None = None,
        images: str | None = None,
        wording: str = "paper",
        name: str | None = None,
    ) -> None:
        super().__init__(name or self.hub.partition("/")[2], wording)
        self.path = path or self.hub
        self.dropped: set[str] = set()  # examples whose own image is among the demonstrations of the original
        self.annotations = None if annotations is None else existing(annotations)
        self.images = None if images is None else existing(images)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """What is asked.

        Raises:
            FileNotFoundError: there are no annotations.
            ValueError: they are not as described.
        """
        folder = None if self.annotations else fetched(self.path, ["*"])
        files = [self.annotations] if folder is None else sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")])
        for file in files:
            rows = _annotations(file) if file is not None else []
            if rows and all(isinstance(row, dict) and set(KEYS) <= set(row) for row in rows):
                return rows
        if self.annotations:
            raise ValueError(f"{self.annotations} is not a list (or lines) of objects with the keys {list(KEYS)}.")
        raise FileNotFoundError(
            f"{folder} has no JSON file of objects with the keys {list(KEYS)}. Give the annotations of the paper's "
            "repository: annotations=..."
        )

    @cached_property
    def pictures(self) -> Pictures:
        return Pictures(self.images or fetched(self.path, ["*"]))

    def place(self, name: str) -> Any:
        """Where an image is.

        Raises:
            FileNotFoundError: nowhere.
        """
        path = self.pictures.find(name)
        if path is None:
            raise FileNotFoundError(
                f"{self.pictures.folder} has no image {name!r}, which its annotations name. Fetch the dataset again, "
                "or give the folder: images=..."
            )
        return path

    @cached_property
    def queries(self) -> list[Example]:
        examples = []
        for number, row in enumerate(self.rows):
            label, names = str(row["label_name"]), [str(row["positive_promt"]), str(row["negative_promt"])]
            others = [name for name in names if name.lower() != label.lower()]
            if len(others) != 1:
                raise ValueError(f"{self.name}, row {number}: label_name {label!r} is not one of {names}.")
            image = self.place(row["image_name"])
            if self.found(Path(), image) is not None:
                examples.append(self.query(str(number), image, label, others, row=number))
        return examples

    def examples(self, seed: int) -> Sequence[Example]:
        return self.queries

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        row = self.rows[example.facts["row"]]
        images: dict[str, list[Named]] = {}
        for name, listed in (("positive_promt", "positive_list"), ("negative_promt", "negative_list")):
            names = [image_name for image_name in row[listed] if image_name != row["image_name"]]  # never the query
            self.dropped |= {example.id} if len(names) < len(row[listed]) else set()
            images[str(row[name])] = [(image_name, self.shown(image_name)) for image_name in names[: count // 2]]
        return self.mixed(example, count, seed, images)

    def notes(self) -> list[str]:
        note = (
            f"{len(self.dropped)} examples list their own image among the demonstrations. LCL's code shows it; here "
            "the next one replaces it."
        )
        return [*super().notes(), *([note] if self.dropped else [])]

    def shown(self, name: str) -> Any:
        """An image to demonstrate with.

        Raises:
            FileNotFoundError: it is nowhere.
            ValueError: it cannot be opened.
        """
        place = self.place(name)
        if not is_image(place):
            raise ValueError(f"{self.name}: the image {name!r} cannot be opened. Fetch it again.")
        return place


def _annotations(path: Path) -> list[Any]:
    """Objects of a file of JSON lines or of one list, whatever its ending: the original calls lines .json."""
    try:
        read = read_json(path)
    except ValueError:
        try:
            return [row for _, row in numbered_json(path)]
        except ValueError:
            return []
    return read if isinstance(read, list) else [read]


class Isekai10(Isekai):
    """ISEKAI-10: ten kinds of things that do not exist, each against something real that resembles it."""

    hub = "ISEKAI-Portal/ISEKAI-10"


class IsekaiPair(Isekai):
    """ISEKAI-pair: things that do not exist against one another."""

    hub = "ISEKAI-Portal/ISEKAI-pair"


class LclPairs(LinkContextTask):
    """The published test pairs of Link-Context Learning: 100 classes of ImageNet, 50 queries each, by their own names.

    Args:
        path: the jsonl file (`test100_pairs.jsonl`): `class_id`, `class_name`, `context_samples`, `test_samples`; rows
            2i and 2i + 1 are a pair.
        queries: how many of the `test_samples` of each class are asked, the first in the file; 0: all of them, which
            is 25 times as many in the published file and another figure.
        images: the folder that image paths are relative to; that of the file when `None`.
        wording: `"paper"` or `"label"`.
        name: to show.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: when it is read, a row is not as described.
    """

    def __init__(
        self,
        path: str,
        *,
        queries: int = 50,
        images: str | None = None,
        wording: str = "paper",
        name: str | None = None,
    ) -> None:
        super().__init__(name or "LCL", wording)
        if queries < 0:
            raise ValueError(f"queries={queries}: expected how many of each class are asked, or 0 for all.")
        self.each = queries
        self.path, self.images = existing(path), None if images is None else existing(images)

    @cached_property
    def pairs(self) -> list[tuple[Any, Any]]:
        return list(test_pairs(self.path, self.images))

    @cached_property
    def queries(self) -> list[Example]:
        examples = []
        for number, pair in enumerate(self.pairs):
            for own, other in (pair, pair[::-1]):
                for place, image in enumerate(own.queries[: self.each or None]):
                    if self.found(Path(), image) is not None:
                        name = f"{own.key} {place}"
                        examples.append(self.query(name, image, own.name.lower(), [other.name.lower()], pair=number))
        if not examples:
            raise ValueError(f"{self.path} has no query that can be used. {' '.join(self.notes())}")
        return examples

    def examples(self, seed: int) -> Sequence[Example]:
        return self.queries

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        pair = self.pairs[example.facts["pair"]]
        images = {image_class.name.lower(): self._context[image_class.key] for image_class in pair}
        return self.mixed(example, count, seed, images)

    @cached_property
    def _context(self) -> dict[str, list[Named]]:
        """Images to demonstrate each class with, those left out that cannot be opened."""
        query_images = {image for pair in self.pairs for image_class in pair for image in image_class.queries}
        by_class = {}
        for image_class in (image_class for pair in self.pairs for image_class in pair):
            fresh = [image for image in image_class.context if image not in query_images]
            usable = [image for image in fresh if self.found(Path(), image, "demonstration") is not None]
            by_class[image_class.key] = [(f"{image_class.key}/{Path(image).name}", image) for image in usable]
        return by_class


class ClassFolder(LinkContextTask):
    """Any labelled image folder as a k-way link-context task: in every example, classes have names of their own.

    Nobody knows these names, so only the demonstrations can tell. The same images are asked with every seed; it
    decides the names, the classes that stand beside, and the images that are shown.

    Args:
        path: a folder a class.
        ways: classes in an example, each with as many demonstrations.
        queries: images of each class that are asked; the others are shown.
        features: class features (`ClassFeatures`, safetensors) to take the most similar classes as the others; any
            when `None`.
        wording: `"label"` or `"paper"`.
        split_seed: draws which images are asked.
        name: to show; that of the folder when `None`.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: too few classes, or, when it is read, a class with too few images.
    """

    def __init__(
        self,
        path: str,
        *,
        ways: int = 2,
        queries: int = 10,
        features: str | None = None,
        wording: str = "label",
        split_seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(name or existing(path).name, wording, ways)
        self.path, self.classes = existing(path), class_folders(path)
        if not 2 <= ways <= len(self.classes):
            raise ValueError(f"ways={ways}: {path} has {len(self.classes)} classes; expected 2 to as many.")
        if queries < 1:
            raise ValueError(f"queries={queries}: expected at least 1 image of each class.")
        self.queries, self.split_seed = queries, split_seed
        self.alike: list[list[int]] | None = None
        if features is not None:
            read = ClassFeatures.load(existing(features)).of(self.classes, f"The features in {features}")
            ranked = similarity(read.text, read.images).argsort(dim=1, descending=True).tolist()
            self.alike = [[other for other in some if other != own] for own, some in enumerate(ranked)]

    @cached_property
    def sides(self) -> list[tuple[list[str], list[str]]]:
        """Of each class, the images that are asked and those that are shown."""
        halves = []
        for image_class in self.classes:
            readable = [image for image in image_class.images if is_image(image)]
            if len(readable) < len(image_class.images):
                self.left_out["image that cannot be opened"] += len(image_class.images) - len(readable)
            if len(readable) < self.queries + 1:
                raise ValueError(
                    f"{self.name}: the class {image_class.key!r} has {len(readable)} images that can be opened; of "
                    f"{self.queries} + 1, 1 or more are shown. Ask for fewer queries, or remove the class."
                )
            order = random.Random(f"{image_class.key} {self.split_seed}").sample(readable, len(readable))
            halves.append((sorted(order[: self.queries]), sorted(order[self.queries :])))
        return halves

    def examples(self, seed: int) -> Sequence[Example]:
        taken = {image_class.name.lower() for image_class in self.classes}
        queries = []
        for own, (query_images, _) in enumerate(self.sides):
            for number, image in enumerate(query_images):
                rng = random.Random(f"{self.name} {seed} {own} {number}")
                others = self.alike[own] if self.alike else [k for k in range(len(self.classes)) if k != own]
                beside = others[: self.ways - 1] if self.alike else rng.sample(others, self.ways - 1)
                names = _names(rng, self.ways, taken)
                facts = {"classes": [own, *beside], "names": names}
                key = self.classes[own].key
                queries.append(self.query(f"{key} {number}", image, names[0], names[1:], **facts))
        return queries

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        images: dict[str, list[Named]] = {}
        for number, name in zip(example.facts["classes"], example.facts["names"], strict=True):
            candidates = self.sides[number][1]
            drawn = random.Random(f"{self.name} {seed} {example.id} {number}").sample(candidates, len(candidates))
            images[name] = [(os.path.relpath(image, self.path), image) for image in drawn]
        return self.mixed(example, count, seed, images)


def _names(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """Made-up names of four letters or more: shorter ones occur in answers by chance."""
    names: list[str] = []
    while len(names) < count:
        name = random_name(rng, taken | set(names))
        if len(name) >= 4:
            names.append(name)
    return names
