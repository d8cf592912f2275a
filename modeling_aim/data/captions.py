"""Captions as datasets publish them: COCO's JSON, Karpathy's JSON, Flickr30k's results.csv."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .jsonl import read_json

SAME = {"val": "validation", "dev": "validation", "restval": "train"}  # other names of splits
KARPATHY = {"filename", "split", "sentences"}


def caption_rows(path: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Rows of image and text of a JSON file, one for each caption.

    Args:
        path: COCO's captions (`images`, and `annotations` with a `caption` each), Karpathy's (`images` with
            `sentences`), or a list of objects, which are rows as they are.
        split: of Karpathy's file, `"train"` with its `restval` by default.

    Raises:
        ValueError: it is another kind of JSON; of LLaVA's the message says how it is read.
    """
    read = read_json(path)
    if isinstance(read, list) and all(isinstance(row, dict) for row in read):
        if read and "conversations" in read[0]:
            raise ValueError(f"{path} is in LLaVA's format. Give llava:{path}")
        return read
    images = read.get("images") if isinstance(read, dict) else None
    if isinstance(images, list) and images and all(isinstance(row, dict) for row in images):
        if set(images[0]) >= KARPATHY:
            return _karpathy(path, images, split or "train")
        annotations = read.get("annotations")
        if isinstance(annotations, list) and annotations and "caption" in annotations[0]:
            names = {row["id"]: row["file_name"] for row in images if "id" in row and "file_name" in row}
            return [
                {"image": names.get(row.get("image_id")), "text": row.get("caption")}
                for row in annotations
                if isinstance(row, dict)
            ]
    keys = sorted(read) if isinstance(read, dict) else type(read).__name__
    raise ValueError(
        f"{path} holds {keys}; expected COCO's captions (images and annotations with a caption each), Karpathy's "
        "images with sentences, or a list of objects with an image and a text."
    )


def _karpathy(path: Path, images: Sequence[Mapping[str, Any]], split: str) -> list[dict[str, Any]]:
    chosen = [row for row in images if SAME.get(row["split"], row["split"]) == SAME.get(split, split)]
    if not chosen:
        raise ValueError(f"{path} has the splits {sorted({row['split'] for row in images})}, but not {split!r}.")
    return [
        {"image": os.path.join(row.get("filepath") or "", row["filename"]), "text": sentence.get("raw")}
        for row in chosen
        for sentence in row["sentences"]
    ]


def is_results(path: Path) -> bool:
    """Whether a csv file is written as Flickr30k's results.csv, with ` | ` between its columns."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    return "|" in header and "," not in header


def result_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of Flickr30k's `results.csv`: `image_name| comment_number| comment`. One published row lacks a bar."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        names = [name.strip() for name in file.readline().split("|")]
        for cells in csv.reader(file, delimiter="|", quoting=csv.QUOTE_NONE):
            row = dict(zip(names, (cell.strip() for cell in cells), strict=False))
            yield {"image": row.get("image_name"), "text": row.get("comment")}


def images_folder(path: Path, names: Sequence[str]) -> Path:
    """Where the images of an annotation file lie, found by their names: beside it, or in a folder beside it.

    Of a file in a folder `annotations`, as COCO has it, the folders beside that one count too.

    Args:
        path: the file.
        names: of some of its images.
    """
    roots = [path.parent, *([path.parent.parent] if path.parent.name.lower() == "annotations" else [])]
    inner = [entry for root in roots for entry in sorted(root.iterdir()) if entry.is_dir()]
    for folder in (*roots, *inner):
        if any((folder / name).is_file() for name in names):
            return folder
    return path.parent
