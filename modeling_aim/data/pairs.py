"""Pairs of image and text as datasets hold them: raw demonstrations with their images unopened, and opening them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..demonstrations_aim import Demonstration

logger = logging.get_logger(__name__)

Pair = Mapping[str, Any]  # a raw demonstration as a dict; `image` may also be bytes, or {"bytes": ..., "path": ...}
NAMED_AT_MOST = 5  # of each reason, in the log; all are counted
NO_UNICODE = "text that is no Unicode"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


_NAMED: Counter[str] = Counter()


def opened(
    pairs: Iterable[Pair], skipped: Counter[str], unusable: Callable[[Demonstration], str | None] | None = None
) -> Iterator[Demonstration]:
    """Pairs with their images opened; what cannot be used is left out and counted in `skipped`.

    Args:
        pairs: raw demonstrations.
        skipped: counts reasons.
        unusable: says why a model cannot read a demonstration, if it cannot (`AimProcessor.why_unreadable`).
    """
    for pair in pairs:
        try:
            demo = Demonstration.of({key: _image(value) if "image" in key else value for key, value in pair.items()})
            reason = None if unusable is None else unusable(demo)
        except (ValueError, OSError) as error:
            words = any(isinstance(pair.get(key), str) and pair[key].strip() for key in ("text", "label", "answer"))
            image = "read the image" in str(error).lower()
            other = NO_UNICODE if "lone surrogate" in str(error) else "other bad pair"
            reason = "no text" if not words else "unreadable or missing image" if image else other
        if reason is None:
            yield demo
            continue
        skipped[reason] += 1
        if is_refused(reason):
            _NAMED[reason] += 1
            if _NAMED[reason] <= NAMED_AT_MOST:
                shown = {key: value for key, value in pair.items() if isinstance(value, str)}
                logger.warning(f"Left out, {reason}: {str(shown)[:200]!a}")


def is_refused(reason: str) -> bool:
    """Whether a reason to leave a pair out speaks of words or images that are there, and no model can read."""
    return reason == NO_UNICODE or reason.startswith(("text that holds", "image that the processor"))


def _image(value: Any) -> Any:
    """An image as `Demonstration` takes it, of what datasets hold; a dataset that holds none here has lost it."""
    if isinstance(value, (list, tuple)):
        return [_image(one) for one in value]
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if value is None or value == []:
        raise ValueError("Cannot read the image: there is none.")
    return value


def located(folder: Path, image: Any) -> Any:
    """An image (or several) where the data says it is: paths relative to a folder, URLs and bytes as they are."""
    if isinstance(image, (list, tuple)):
        return [located(folder, one) for one in image]
    if isinstance(image, Mapping):
        return image.get("bytes") or located(folder, image.get("path"))
    if isinstance(image, str) and image and not image.startswith(("http://", "https://", "data:")):
        return os.path.join(folder, image)
    return image or None
