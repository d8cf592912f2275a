"""Data of Link-Context Learning (arXiv 2308.07891): labelled class folders, made-up names, the published rows."""

from __future__ import annotations

import json
import os
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .jsonl import numbered_json
from .mining import ImageClass
from .pairs import IMAGE_SUFFIXES, Pair


@dataclass(frozen=True)
class Wording:
    """How a class is named in demonstrations and asked for in queries; training and evaluation share it.

    Args:
        question: asked of the query.
        answer: its answer, with `{label}` for the name.
        demonstration_question: what a demonstration answers; `None` for a statement.
        demonstration: what a demonstration says. The bare `{label}` without a question is a label, which the processor
            words by its own `label_template`.
    """

    question: str
    answer: str = "{label}"
    demonstration_question: str | None = None
    demonstration: str = "{label}"

    def __post_init__(self) -> None:
        for name in ("answer", "demonstration"):
            if "{label}" not in getattr(self, name):
                raise ValueError(f"The wording's {name}={getattr(self, name)!r} must contain {{label}}.")

    @classmethod
    def of(cls, value: str | Wording) -> Wording:
        """A wording, by its name where that is given."""
        if isinstance(value, str) and value not in WORDINGS:
            raise ValueError(f"wording={value!r} is unknown; choose one of {tuple(WORDINGS)}, or give a Wording.")
        return WORDINGS[value] if isinstance(value, str) else value

    def shown(self, image: object, name: str) -> Pair:
        """A raw demonstration."""
        words = self.demonstration.replace("{label}", name)
        if self.demonstration_question is not None:
            return {"image": image, "question": self.demonstration_question, "answer": words}
        return {"image": image, "label" if self.demonstration == "{label}" else "text": words}

    def query(self, image: object, name: str, question: str | None = None) -> Pair:
        """A raw query with its answer; `question` in the place of the wording's own."""
        return {"image": image, "question": question or self.question, "answer": self.answer.replace("{label}", name)}


# The paper puts [BEGIN EXAMPLE] and [END EXAMPLE] around demonstrations, which stand in one prompt there; AIM reads
# each alone. An image stands where the backbone's prompts have it.
WORDINGS = {
    "label": Wording("What is this?"),
    "paper": Wording(
        question="Based on the previous examples, what is in the image?",
        answer='there is "{label}" in the image.',
        demonstration_question="What is in the image?",
        demonstration='there is "{label}" in the image.',
    ),
}


# Link-Context Learning trains with about 65 wordings of the query and evaluates with one. These are our own sentences.
OPENINGS = (
    "Based on the previous examples,", "From the examples above,", "Going by what was shown before,",
    "With the examples in mind,", "Given the images that were named,", "After these examples,",
    "Using what the examples show,", "Following the names used above,", "In the words of the examples,",
    "Compared with the earlier images,", "Considering the context,", "If you follow the examples,",
    "As things are named here,",
)  # fmt: skip
QUESTIONS = tuple(
    f"{opening} {asked}"
    for opening in OPENINGS
    for asked in (
        "what is in the image?",
        "what does the image show?",
        "what is the main object in the image?",
        "which of the things named before is in the image?",
        "what would you call the thing in the image?",
    )
)

# Its policy_2way_ref, in our own sentences: every image has a name of its own; the query asks for those of its class.
REFERENCE_QUESTION = "What is this image called?"
REFERENCE = 'This image is called "{name}".'
SAME_CLASS = "Which of the previous images show the same kind of thing as this image? List their names in order."


def class_folders(
    path: str | os.PathLike[str], names: Mapping[str, str] | str | os.PathLike[str] | None = None
) -> list[ImageClass]:
    """The classes of a labelled image folder, by name of their folders; hidden ones are left out.

    Args:
        path: holds one folder a class.
        names: of the classes by folder, or a JSON file of them; the folders' own when `None`.

    Raises:
        ValueError: fewer than two classes, or a folder without a name.
        FileNotFoundError: no such folder or file.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of classes at {root}.")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(folders) < 2:
        count = "1 folder" if folders else "no folders"
        raise ValueError(f"{root} has {count} of images; expected {root}/LABEL/*.png with at least two labels.")
    if isinstance(names, (str, os.PathLike)):
        try:
            names = json.loads(Path(names).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"The class names in {names} are not JSON ({error}).") from error
    if names is None:
        names = {folder.name: folder.name for folder in folders}
    if not isinstance(names, Mapping):
        raise ValueError(f"Class names are given by folder, {{'n02119789': 'kit fox'}}; got {names!r:.80}.")
    unnamed = [f.name for f in folders if not (isinstance(names.get(f.name), str) and names[f.name].strip())]
    if unnamed:
        raise ValueError(f"{len(unnamed)} class folders of {root} have no name in names=, for example {unnamed[:3]}.")
    return [ImageClass(folder.name, names[folder.name].strip(), _images(folder)) for folder in folders]


def _images(folder: Path) -> tuple[str, ...]:
    paths = (os.path.join(base, file) for base, _, files in os.walk(folder) for file in files)
    return tuple(sorted(path for path in paths if Path(path).suffix.lower() in IMAGE_SUFFIXES))


def random_name(rng: random.Random, taken: set[str]) -> str:
    """A random lowercase string of 1 to 10 letters that is not in `taken`."""
    while True:
        name = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 10)))
        if name not in taken:
            return name


# --- the published rows


@dataclass(frozen=True)
class PairedClass:
    """One class of a published test pair.

    Args:
        key: id of the class.
        name: of the class, as it is in the file.
        context: paths of images to demonstrate it with; the first are taken.
        queries: paths of images to ask for.
    """

    key: str
    name: str
    context: tuple[str, ...]
    queries: tuple[str, ...]


def test_pairs(
    path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> Iterator[tuple[PairedClass, PairedClass]]:
    """The published test pairs: rows 2i and 2i + 1, each the other's negative.

    A row has `class_id`, `class_name`, `context_samples` (32 paths) and `test_samples` (50).

    Args:
        path: the jsonl file.
        images: the folder that image paths are relative to; that of the file when `None`.

    Raises:
        ValueError: a row is not as described, or there is an odd number of rows.
        FileNotFoundError: no such file.
    """
    root = Path(path).parent if images is None else Path(images)
    rows = list(class_rows(Path(path), ("class_id", "class_name", "context_samples", "test_samples")))
    if len(rows) % 2 or not rows:
        raise ValueError(f"{path} has {len(rows)} rows; test pairs are rows 2i and 2i + 1, so an even number.")
    classes = [
        PairedClass(
            str(row["class_id"]),
            row["class_name"].strip(),
            tuple(image_paths(root, row["context_samples"], path, line)),
            tuple(image_paths(root, row["test_samples"], path, line)),
        )
        for line, row in rows
    ]
    yield from zip(classes[::2], classes[1::2], strict=True)


def class_rows(path: Path, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a jsonl file with the numbers of their lines, each with `keys` and a class name."""
    for line, row in numbered_json(path):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            has = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}, line {line}: a row with {missing} missing; it has {has}, not {list(keys)}.")
        if not (isinstance(row["class_name"], str) and row["class_name"].strip()):
            raise ValueError(f"{path}, line {line}: class_name is {row['class_name']!r:.40}; expected a name.")
        yield line, row


def image_paths(root: Path, names: object, path: str | os.PathLike[str], line: int) -> Iterator[str]:
    """Image paths of a row, each once."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{path}, line {line}: {names!r:.60} is not a list of image paths.")
    for name in dict.fromkeys(names):
        yield os.path.join(root, name)
