"""Captions and boxes of images: what a text model is shown in place of an image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.jsonl import numbered_json, read_json

TOLERANCE = 0.01  # by how much a box may leave the image, as rounding does; it is cut at the edge
MOST_OUTSIDE = 0.5  # of all boxes; above it they are in other units


@dataclass(frozen=True)
class Box:
    """An object in an image.

    Args:
        category: what it is.
        corners: left, top, right and bottom, as shares of the image's width and height.
    """

    category: str
    corners: tuple[float, float, float, float]

    @property
    def area(self) -> float:
        left, top, right, bottom = self.corners
        return (right - left) * (bottom - top)

    def __str__(self) -> str:
        return f"{self.category}: {[round(value, 3) for value in self.corners]}"


@dataclass(frozen=True)
class CaptionedImage:
    """An image in words.

    Args:
        id: of the image.
        image: its file, relative to the folder of the images.
        captions: a line each.
        boxes: its objects; none where they are not known.
    """

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()

    @property
    def in_words(self) -> str:
        return "\n".join(self.captions)

    @property
    def with_boxes(self) -> str:
        """Captions, an empty line, and a line for each box."""
        return self.in_words + "\n\n" + "\n".join(map(str, self.boxes)) if self.boxes else self.in_words


def read_captioned(
    source: Path, instances: Path | None, images: Path | None, left_out: Counter[str]
) -> list[CaptionedImage]:
    """Images in words, from a file of rows or from COCO's own files.

    Args:
        source: jsonl with `{"id", "image", "captions", "instances": [{"category", "bbox"}]}` a line, boxes as shares
            of the image; or COCO's captions (`captions_val2014.json`).
        instances: COCO's boxes (`instances_val2014.json`), for COCO's captions.
        images: folder of the images, where each is looked for.
        left_out: gets what cannot be used, by reason.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file has another format, boxes are not shares of the image, or nothing can be used.
    """
    for path in (source, instances, images):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path} was not found. Check the path.")
    if source.suffix == ".json":
        rows = _coco_rows(source, instances)
    elif instances is not None:
        raise ValueError(f"--instances goes with COCO's captions (.json); {source} has the boxes in its own rows.")
    else:
        rows = (row for _, row in numbered_json(source))
    read, seen, boxes = [], set(), Counter[str]()
    for row in rows:
        made = _made(row, boxes)
        if isinstance(made, str):
            left_out[made] += 1
        elif made in seen:
            left_out["the same row again"] += 1
        elif images is not None and not (images / made.image).is_file():
            left_out[f"image that is not in {images}"] += 1
        else:
            seen.add(made)
            read.append(made)
    if boxes["outside"] > MOST_OUTSIDE * boxes.total():
        raise ValueError(
            f"{source}: {boxes['outside']} of {boxes.total()} boxes are outside the image. Expected [left, top, "
            "right, bottom] as shares of its width and height, 0 to 1; of boxes in pixels divide by the size of the "
            "image."
        )
    left_out.update({"box outside the image": boxes["outside"]} if boxes["outside"] else {})
    left_out.update({"box without a category or four numbers": boxes["broken"]} if boxes["broken"] else {})
    if not read:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.items()) or "it is empty"
        raise ValueError(f"{source} has no image with captions that can be used ({reasons}).")
    return read


def _made(row: Any, boxes: Counter[str]) -> CaptionedImage | str:
    """An image in words, or why a row gives none; its boxes are counted by whether they can be used."""
    if not isinstance(row, Mapping) or not isinstance(row.get("image"), str) or not row["image"]:
        return "row without an image"
    texts_or_text = row.get("captions", row.get("caption"))
    texts = (
        [texts_or_text] if isinstance(texts_or_text, str) else texts_or_text if isinstance(texts_or_text, list) else []
    )
    captions = tuple(" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip())
    if not captions:
        return "row without captions"
    instances = row.get("instances")
    usable = []
    for instance in instances if isinstance(instances, list) else []:
        box = _box(instance)
        boxes["outside" if box is None else "broken" if isinstance(box, str) else "usable"] += 1
        usable += [box] if isinstance(box, Box) else []
    return CaptionedImage(str(row.get("id", row["image"])), row["image"], captions, tuple(usable))


def _box(instance: Any) -> Box | str | None:
    """A box; `None` if it is outside the image or empty, a string if it is not a box."""
    corners = instance.get("bbox") if isinstance(instance, Mapping) else None
    category = instance.get("category") if isinstance(instance, Mapping) else None
    if not isinstance(category, str) or not category.strip() or not isinstance(corners, list) or len(corners) != 4:
        return "broken"
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in corners):
        return "broken"
    if not all(-TOLERANCE <= value <= 1 + TOLERANCE for value in corners):
        return None
    left, top, right, bottom = (min(max(float(value), 0.0), 1.0) for value in corners)
    return Box(category.strip(), (left, top, right, bottom)) if left < right and top < bottom else None


# --- COCO's own files


def _coco_rows(captions: Path, instances: Path | None) -> Iterator[dict[str, Any]]:
    """Rows as of the jsonl, from COCO's captions and boxes in pixels `[left, top, width, height]`."""
    read = _coco(captions, "caption")
    boxes: dict[Any, list[dict[str, Any]]] = {}
    if instances is not None:
        objects = _coco(instances, "bbox")
        sizes = {image["id"]: (image.get("width"), image.get("height")) for image in objects["images"]}
        names = {entry["id"]: entry["name"] for entry in objects.get("categories", ())}
        for entry in objects["annotations"]:
            corners = _shares(entry.get("bbox"), *sizes.get(entry.get("image_id"), (None, None)))
            name = names.get(entry.get("category_id"))
            boxes.setdefault(entry.get("image_id"), []).append({"category": name, "bbox": corners})
    texts: dict[Any, list[str]] = {}
    for entry in read["annotations"]:
        texts.setdefault(entry.get("image_id"), []).append(entry.get("caption"))
    for image in read["images"]:
        key = image["id"]
        name = image.get("file_name")
        yield {"id": str(key), "image": name, "captions": texts.get(key, []), "instances": boxes.get(key, [])}


def _coco(path: Path, needed: str) -> dict[str, Any]:
    read = read_json(path)
    lists = [read.get(name) if isinstance(read, dict) else None for name in ("images", "annotations")]
    whole = all(isinstance(part, list) and part and all(isinstance(row, dict) for row in part) for part in lists)
    if not whole or needed not in read["annotations"][0] or not all("id" in image for image in read["images"]):
        raise ValueError(
            f"{path} is not COCO's: expected images with an id, and annotations with an image_id and a {needed} each."
        )
    return read


def _shares(box: object, width: object, height: object) -> list[float] | None:
    """A box in pixels as corners in shares of the image, three decimals; `None` if it is not a box."""
    if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        return None
    if not (isinstance(width, (int, float)) and isinstance(height, (int, float)) and width > 0 and height > 0):
        return None
    left, top, wide, high = box
    corners = (left / width, top / height, (left + wide) / width, (top + high) / height)
    return [round(value, 3) for value in corners]
