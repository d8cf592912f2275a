"""Pairs of image and text as datasets hold them: raw demonstrations with their images unopened, and opening them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..demonstrations_aim import Demonstration
from ..images_aim import open_image

logger = logging.get_logger(__name__)

Shrink = Callable[[tuple[int, int]], int]
Pair = Mapping[str, Any]  # a raw demonstration as a dict; `image` may also be bytes, or {"bytes": ..., "path": ...}
NAMED_AT_MOST = 5  # of each reason, in the log; all are counted
NO_UNICODE = "text that is no Unicode"
NO_IMAGE = "unreadable or missing image"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
_NAMED: Counter[str] = Counter()


class Unopened(Mapping[str, Any]):
    """An image as `datasets` holds it undecoded, `{"bytes", "path"}`, but read only when it is asked for.

    Training holds thousands of them at a time, and walks past those of other processes: making one opens nothing, and
    it holds no bytes. `repr` is its identity in a dataset, the same in every process and run.

    Attributes:
        place: where it is. Images are the same if their places are; they are not read for that.
    """

    place: tuple[Any, ...]

    def under(self, folder: Path) -> Unopened:
        """This image, where a path that the data names is relative to a folder."""
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unopened) and self.place == other.place

    def __hash__(self) -> int:
        return hash(self.place)

    def __iter__(self) -> Iterator[str]:
        return iter(("bytes", "path"))

    def __len__(self) -> int:
        return 2


class Unread(Mapping[str, Any]):
    """A raw demonstration whose words are read from a file only when they are asked for.

    Attributes:
        size: its characters and its images.
    """

    size: tuple[int, int]

    def read(self) -> dict[str, Any]:
        """What it holds."""
        raise NotImplementedError

    def __getitem__(self, key: str) -> Any:
        return self.read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read())

    def __len__(self) -> int:
        return len(self.read())


class Replaceable:
    """An image in whose place another one stands if it cannot be read.

    Args:
        image: the first choice, unopened.
        spares: others, which several images may share: each is used once.
    """

    def __init__(self, image: object, spares: list[Any]) -> None:
        self.image, self.spares = image, spares


def opened(
    pairs: Iterable[Pair], skipped: Counter[str], unusable: Callable[[Demonstration], str | None] | None = None
) -> Iterator[Demonstration]:
    """Pairs with their images opened; what cannot be used is left out and counted in `skipped`, see `opened_pair`."""
    demos = (opened_pair(pair, skipped, unusable) for pair in pairs)
    return (demo for demo in demos if demo is not None)


def opened_pair(
    pair: Pair | Demonstration,
    skipped: Counter[str],
    unusable: Callable[[Demonstration], str | None] | None = None,
    shrink: Shrink | None = None,
) -> Demonstration | None:
    """A pair with its images opened; `None` where it cannot be used.

    Args:
        pair: a raw demonstration, or one that is opened already.
        skipped: counts reasons.
        unusable: says why a model cannot read a demonstration, if it cannot (`AimProcessor.why_unreadable`).
        shrink: by how much a large image may be shrunk when it is opened, see `open_image`.
    """
    pair = pair.read() if isinstance(pair, Unread) else pair
    try:
        demo = pair if isinstance(pair, Demonstration) else _demonstration(pair, skipped, shrink)
        reason = None if unusable is None else unusable(demo)
    except (ValueError, OSError) as error:
        demo, reason = None, _reason(pair, error)
    if reason is None:
        return demo
    skipped[reason] += 1
    if is_refused(reason):
        _NAMED[reason] += 1
        if _NAMED[reason] <= NAMED_AT_MOST:
            words: Mapping[str, Any] = pair if isinstance(pair, Mapping) else vars(pair)
            texts = {key: value for key, value in words.items() if isinstance(value, str)}
            logger.warning(f"Left out, {reason}: {str(texts)[:200]!a}")
    return None


def _demonstration(pair: Pair, skipped: Counter[str], shrink: Shrink | None) -> Demonstration:
    words = {key: value for key, value in pair.items() if "image" not in key}
    Demonstration.of(words)  # an image is not opened for words that cannot be used
    return Demonstration.of({k: words[k] if k in words else _open(v, skipped, shrink) for k, v in pair.items()})


def _open(value: object, skipped: Counter[str], shrink: Shrink | None) -> Any:
    """An image, or several, opened; what can be replaced is, as often as it has to be."""
    if isinstance(value, (list, tuple)):
        return [_open(item, skipped, shrink) for item in value]
    if not isinstance(value, Replaceable):
        return open_image(_image(value), shrink=shrink)
    while True:
        try:
            return open_image(_image(value.image), shrink=shrink)
        except (ValueError, OSError):
            if not value.spares:
                raise
            skipped[NO_IMAGE] += 1
            value.image = value.spares.pop(0)


def _reason(pair: Any, error: Exception) -> str:
    words = any(isinstance(pair.get(key), str) and pair[key].strip() for key in ("text", "label", "answer"))
    image = "read the image" in str(error).lower()
    other = NO_UNICODE if "lone surrogate" in str(error) else "other bad pair"
    return "no text" if not words else NO_IMAGE if image else other


def size_of(pair: Pair | Demonstration) -> tuple[int, int]:
    """Characters and images of a pair, which is not opened for it."""
    if isinstance(pair, Demonstration):
        return len(pair.text) + len(pair.question or ""), len(pair.images)
    if isinstance(pair, Unread):
        return pair.size
    words = (pair.get(key) for key in ("text", "label", "question", "answer"))
    images = pair.get("images") if pair.get("images") is not None else pair.get("image")
    number = len(images) if isinstance(images, (list, tuple)) else int(images is not None)
    return sum(len(text) for text in words if isinstance(text, str)), number


def is_refused(reason: str) -> bool:
    """Whether a reason to leave a pair out speaks of words or images that are there, and no model can read."""
    return reason == NO_UNICODE or reason.startswith(("text that holds", "image that the processor"))


def _image(value: object) -> Any:
    """An image as `open_image` takes it, of what datasets hold; a dataset that holds none here has lost it."""
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if value is None or value == []:
        raise ValueError("Cannot read the image: there is none.")
    return value


def located(folder: Path, image: object) -> Any:
    """An image (or several) where the data says it is: paths relative to a folder, URLs and bytes as they are."""
    if isinstance(image, (list, tuple)):
        return [located(folder, item) for item in image]
    if isinstance(image, Unopened):
        return image.under(folder)
    if isinstance(image, Mapping):
        return image.get("bytes") or located(folder, image.get("path"))
    if isinstance(image, str) and image and not image.startswith(("http://", "https://", "data:")):
        return os.path.join(folder, image)
    return image or None
