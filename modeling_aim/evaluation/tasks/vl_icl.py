"""The image-to-text tasks of VL-ICL Bench (arXiv 2403.13164), which cannot be solved without their demonstrations.

The dataset (`ys-zong/VL-ICL`) has a folder a task with `query.json`, `support.json` and archives of the images, which
may be unpacked or not.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ...data.images import Pictures
from ...data.jsonl import read_json
from ...data.tables import fetched
from ..metrics import exact_match, yes_or_no, yes_or_no_said
from ..task import Example, Prediction, Shot
from .data_task import DataTask
from .splits import SAME

HUB = "ys-zong/VL-ICL"
PROMPT = "{question}\nAnswer:"
INSTRUCTIONS = ("nothing", "concise", "detailed")  # those of VL-ICL's code, which has `nothing` by default
CONCISE = {
    "textocr": "Answer with the text inside the red box.",
    "operator_induction": "Induce the mathematical operator and calculate the result.",
    "operator_induction_interleaved": "Induce the mathematical operator between the two images and calculate the "
    "result.",
    "open_mi": "Answer the question with a single word or phase.",
    "clevr": "Find objects of the given type, induce what operation to use and calculate the result.",
    "matching_mi": "Determine the output for the new pair of images.",
}
DETAILED = {
    "textocr": "An image will be provided where a red box is drawn around the text of interest. Answer with the text "
    "inside the red box. Ensure that the transcription is precise, reflecting the exact characters, including "
    "letters, numbers, symbols.",
    "operator_induction": "The image contains two digit numbers and a ? representing the mathematical operator. "
    "Induce the mathematical operator (addition, multiplication, minus) according to the results of the in-context "
    "examples and calculate the result.",
    "operator_induction_interleaved": "There are two input images, each representing a single digit number. Induce "
    "the mathematical operator (addition, multiplication, minus) that is applied between the two images according to "
    "the results of the in-context examples. Calculate the result for the new query images.",
    "open_mi": "Induce the concept from the in-context examples. Answer the question with a single word or phase.",
    "clevr": "The image contains objects of different shapes, colors, sizes and materials. The question describes "
    "the attribute and its value. You need to find all objects within the image that satisfy the condition. You "
    "should induce what operation to use according to the results of the in-context examples and then calculate the "
    "result.",
    "matching_mi": "According to the few-shot examples, induce what operation to do and determine the output for the "
    'two new images. Answer with "yes" or "no".',
}
OPERATORS = ("+", "-", "x")  # of a demonstration's three answers, in this order


class VlIcl(DataTask):
    """What the tasks share: their files, and exact match after VL-ICL's cut.

    Args:
        path: folder of the dataset or of the one task, or its Hub id.
        instruction: what precedes the prompt: `nothing`, or VL-ICL's `concise` or `detailed` words. Its
            published commands have `detailed`.
        name: to show; that of the task when `None`.

    Raises:
        FileNotFoundError: there is no such folder; when it is read, a file or an image is missing.
        ValueError: when it is read, a file is not as published.
    """

    kind: ClassVar[str]
    needed: ClassVar[tuple[str, ...]] = ("image", "question", "answer")  # of a query
    shown_keys: ClassVar[tuple[str, ...]] = ("image", "question", "answer")  # of a demonstration
    digits: ClassVar[bool] = False

    def __init__(self, path: str = HUB, *, instruction: str = "nothing", name: str | None = None) -> None:
        super().__init__(name or self.kind)
        if instruction not in INSTRUCTIONS:
            raise ValueError(f"instruction={instruction!r} is unknown; choose one of {INSTRUCTIONS}.")
        self.path, self.instruction = path, instruction
        words = {"nothing": {}, "concise": CONCISE, "detailed": DETAILED}[instruction]
        self.told = words.get(self.kind, "")

    def notes(self) -> list[str]:
        note = f"instruction={self.instruction}, before the prompt (after the fused tokens, which stand first)."
        return [*super().notes(), *([note] if self.told else [])]

    @cached_property
    def folder(self) -> Path:
        """Of the task."""
        root = fetched(self.path, [f"{self.kind}/*"])
        return root / self.kind if (root / self.kind).is_dir() else root

    @cached_property
    def pictures(self) -> Pictures:
        return Pictures(self.folder, self.folder.parent, [self.kind])

    def read(self, file: str, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Entries of one of the two files.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a list of objects with these keys.
        """
        path = self.folder / file
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} has no {file}; {self.kind} has query.json and support.json.")
        entries = read_json(path)
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path} is not a list of objects.")
        for number, entry in enumerate(entries):
            missing = [key for key in keys if key not in entry]
            if missing:
                raise ValueError(
                    f"{path}, entry {number} has {sorted(entry)}, but not {missing}; needed: {list(keys)}."
                )
        return entries

    def located(self, entries: Sequence[Any]) -> list[list[Any]]:
        """Images of entries, each a name or a list of names.

        Raises:
            FileNotFoundError: some are neither unpacked nor in an archive.
        """
        names = [[entry] if isinstance(entry, str) else list(entry) for entry in entries]
        places = {name: self.pictures.find(name) for some in names for name in some}
        missing = sorted(name for name, place in places.items() if place is None)
        if missing:
            raise FileNotFoundError(
                f"{self.folder}: {len(missing)} of {len(places)} images are missing, for example {missing[0]!r}. "
                "Unpack the archives again, or put them beside their JSON files, where they are read as they are."
            )
        return [[places[name] for name in some] for some in names]

    @cached_property
    def queries(self) -> list[Example]:
        entries = self.read("query.json", self.needed)
        places = self.located([entry["image"] for entry in entries])
        names = [str(entry.get("id", number)) for number, entry in enumerate(entries)]
        if len(set(names)) < len(names):
            names = [str(number) for number in range(len(entries))]
        examples = []
        for entry, name, images in zip(entries, names, places, strict=True):
            if self.found(Path(), images) is not None:
                examples.append(self.example(entry, name, images))
        if not examples:
            raise ValueError(f"{self.folder} has no query that can be used. {' '.join(self.notes())}")
        return examples

    def example(self, entry: Mapping[str, Any], name: str, images: Sequence[Any]) -> Example:
        """A query."""
        prompt = PROMPT.format(question=entry["question"])
        answer = str(entry["answer"])
        return Example(name, tuple(images), prompt, (answer,), label=answer, instruction=self.told)

    def shot(self, name: str, images: Sequence[Any], question: str, answer: Any) -> Shot:
        """A demonstration."""
        prompt = PROMPT.format(question=question)
        return Shot(name, {"images": list(images), "question": prompt, "answer": str(answer)}, str(answer))

    def examples(self, seed: int) -> Sequence[Example]:
        return self.queries

    def pool(self) -> Sequence[Shot]:
        return () if self.fixed else self._pool

    @cached_property
    def _pool(self) -> list[Shot]:
        entries = self.read("support.json", self.shown_keys)
        pool = []
        for number, images in enumerate(self.located([entry["image"] for entry in entries])):
            if self.may_show(images):
                entry = entries[number]
                pool.append(self.shot(f"support {number}", images, entry["question"], entry["answer"]))
        return pool

    def may_show(self, images: Sequence[Any]) -> bool:
        """Whether the images of a demonstration can be opened and are not those of a query; else it is counted."""
        if tuple(images) in self._asked:
            self.left_out[SAME] += 1
            return False
        return self.found(Path(), images, "demonstration") is not None

    @cached_property
    def _asked(self) -> set[tuple[Any, ...]]:
        return {example.images for example in self.queries}

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        return {"accuracy": float(exact_match(prediction.text, example.answers, self.digits))}

    def drawn(self, support: Sequence[Any], count: int, example: Example, seed: int) -> list[Any]:
        """The first `count` of an order that seed and example decide, so that fewer are a part of more."""
        if count > len(support):
            raise ValueError(f"{self.name} has {len(support)} demonstrations to show, but {count} are asked for.")
        return random.Random(f"{self.name} {seed} {example.id}").sample(support, len(support))[:count]

    def halved(self, count: int) -> int:
        """How many of each of two kinds are `count` in all."""
        if count % 2:
            raise ValueError(
                f"{self.name} shows as many of each of two kinds, so {count} in all cannot be; ask for even numbers."
            )
        return count // 2


class Clevr(VlIcl):
    """CLEVR count induction: how many objects have the attribute of the question? Demonstrations show what it asks."""

    kind, digits = "clevr", True

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        exact = float(exact_match(prediction.text, example.answers))
        return {**super().score(example, prediction), "accuracy_published": exact}

    def notes(self) -> list[str]:
        note = "accuracy: the first run of digits; accuracy_published: all of the cut answer, as in VL-ICL's code."
        return [*super().notes(), note]


class TextOcr(VlIcl):
    """The text in the red box of a picture."""

    kind = "textocr"


class OperatorInduction(VlIcl):
    """Two digits and a question mark in an image: which operation it stands for follows from the demonstrations.

    A demonstration has an answer for each operator; those of the query's operator are shown.
    """

    kind, digits, fixed = "operator_induction", True, True
    needed = ("image", "question", "answer", "operator")

    def example(self, entry: Mapping[str, Any], name: str, images: Sequence[Any]) -> Example:
        if entry["operator"] not in OPERATORS:
            raise ValueError(f"{self.folder}, query {name}: operator {entry['operator']!r} is not one of {OPERATORS}.")
        prompt = PROMPT.format(question=entry["question"])
        facts = {"operator": entry["operator"]}
        answer, operator = str(entry["answer"]), entry["operator"]
        return Example(name, tuple(images), prompt, (answer,), label=operator, facts=facts, instruction=self.told)

    @cached_property
    def support(self) -> list[tuple[str, dict[str, Any], list[Any]]]:
        """Name, entry and images of all demonstrations."""
        entries = self.read("support.json", self.shown_keys)
        places = self.located([entry["image"] for entry in entries])
        candidates = []
        for number, (entry, images) in enumerate(zip(entries, places, strict=True)):
            if not isinstance(entry["answer"], list) or len(entry["answer"]) != len(OPERATORS):
                raise ValueError(
                    f"{self.folder}/support.json, entry {number}: its answer is {entry['answer']!r:.60}; expected one "
                    f"for each of {OPERATORS}."
                )
            if self.may_show(images):
                candidates.append((f"support {number}", entry, images))
        return candidates

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        operator = example.facts["operator"]
        return [
            self.shot(f"{name} {operator}", images, entry["question"], entry["answer"][OPERATORS.index(operator)])
            for name, entry, images in self.drawn(self.support, count, example, seed)
        ]


class InterleavedOperatorInduction(OperatorInduction):
    """The same with each digit in an image of its own."""

    kind = "operator_induction_interleaved"


class OpenMi(VlIcl):
    """Fast binding on Mini-ImageNet: two classes under made-up names, and an image of one of them to be named."""

    kind, fixed = "open_mi", True
    needed = ("image", "question", "answer", "classes", "support")

    def __init__(self, path: str = HUB, *, instruction: str = "nothing", name: str | None = None) -> None:
        super().__init__(path, instruction=instruction, name=name)
        self.support: dict[str, dict[str, list[str]]] = {}  # of each query: images by class

    def example(self, entry: Mapping[str, Any], name: str, images: Sequence[Any]) -> Example:
        classes, support, answer = entry["classes"], entry["support"], str(entry["answer"])
        named = isinstance(support, dict) and all(
            isinstance(label, dict) and "images" in label for label in support.values()
        )
        if not named or answer not in support or len([label for label in classes if label in support]) < 2:
            raise ValueError(
                f"{self.folder}, query {name}: its classes are {classes!r:.60} and its answer {answer!r}; expected "
                "two or more classes, each with images in its support, and the answer among them."
            )
        self.support[name] = {label: list(support[label]["images"]) for label in classes if label in support}
        return super().example(entry, name, images)

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        many, answer, support = self.halved(count), example.answers[0], self.support[example.id]
        rng = random.Random(f"{self.name} {seed} {example.id}")
        names = [answer, rng.choice([label for label in support if label != answer])]
        rng.shuffle(names)
        few = {name: len(support[name]) for name in names if len(support[name]) < many}
        if few:
            raise ValueError(
                f"{self.name}, query {example.id}: {many} demonstrations of each class, but there are {few}."
            )
        pairs = [(name, support[name][number]) for number in range(many) for name in names]
        places = self.located([image for _, image in pairs])
        return [
            self.shot(f"{image} as {name}", self._opened(images, image), "This is a", name)
            for (name, image), images in zip(pairs, places, strict=True)
        ]

    def _opened(self, images: list[Any], name: str) -> list[Any]:
        opened = self.found(Path(), images, "demonstration")
        if opened is None:
            raise ValueError(
                f"{self.name}: the demonstration image {name!r} cannot be opened. Fetch its archive again."
            )
        return images

    def per_class(self, count: int) -> int | None:
        return count // 2

    def shots_note(self, count: int) -> str:
        return f"{count // 2} of each of 2 classes, VL-ICL's {count // 2}-shot" if count else ""


class MatchingMi(VlIcl):
    """Fast matching on Mini-ImageNet: do two images belong together? Demonstrations show what that means."""

    kind, fixed = "matching_mi", True
    shown_keys = ("same", "diff")

    @cached_property
    def support(self) -> list[tuple[int, dict[str, Any]]]:
        """Pairs of demonstrations, one of either kind, with their images found, by number."""
        pairs = []
        for number, entry in enumerate(self.read("support.json", self.shown_keys)):
            kinds = [entry["same"], entry["diff"]]
            if not all(isinstance(half, dict) and {"image", "question", "answer"} <= set(half) for half in kinds):
                raise ValueError(
                    f"{self.folder}/support.json, entry {number}: expected image, question and answer in each."
                )
            places = self.located([half["image"] for half in kinds])
            if all(map(self.may_show, places)):
                same, diff = ({**half, "image": images} for half, images in zip(kinds, places, strict=True))
                pairs.append((number, {"same": same, "diff": diff}))
        return pairs

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        return [
            self.shot(f"support {number} {kind}", pair[kind]["image"], pair[kind]["question"], pair[kind]["answer"])
            for number, pair in self.drawn(self.support, self.halved(count), example, seed)
            for kind in ("same", "diff")
        ]

    def per_class(self, count: int) -> int | None:
        return count // 2

    def shots_note(self, count: int) -> str:
        return f"{count // 2} of each of 2 answers, VL-ICL's {count // 2}-shot" if count else ""

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        text, right = prediction.text, example.answers[0]
        return {"accuracy": float(yes_or_no(text, right)), "accuracy_said": float(yes_or_no_said(text, right))}

    def notes(self) -> list[str]:
        note = (
            "accuracy is VL-ICL's, where whatever does not say yes counts as no; accuracy_said wants one of the words."
        )
        return [*super().notes(), note]
