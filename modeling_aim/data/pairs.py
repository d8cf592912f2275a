"""Pairs of image and text as data sets hold them: raw demonstrations with their images unopened, and opening them."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.image_utils import load_image

from ..demonstrations_aim import Demonstration

Pair = Mapping[str, Any]  # a raw demonstration as a dict; `image` may also be bytes, or {"bytes": ..., "path": ...}
DOWNLOAD_SECONDS = 20.0
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


def opened(pairs: Iterable[Pair], skipped: Counter[str]) -> Iterator[Demonstration]:
    """Pairs with their images opened; what cannot be is left out and counted in `skipped`."""
    for pair in pairs:
        try:
            yield Demonstration.of({key: _image(value) if "image" in key else value for key, value in pair.items()})
        except (ValueError, OSError) as error:
            words = any(isinstance(pair.get(key), str) and pair[key].strip() for key in ("text", "label", "answer"))
            image = "read the image" in str(error).lower()
            skipped["no text" if not words else "unreadable or missing image" if image else "other bad pair"] += 1


def _image(value: Any) -> Any:
    """An image as `Demonstration` takes it, of what data sets hold; a data set that holds none here has lost it."""
    if isinstance(value, (list, tuple)):
        return [_image(one) for one in value]
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if value is None or value == []:
        raise ValueError("Cannot read the image: there is none.")
    try:
        if isinstance(value, (bytes, bytearray)):
            return Image.open(io.BytesIO(value))
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            return load_image(value, timeout=DOWNLOAD_SECONDS)  # without one, a dead server holds up the training
    except Exception as error:
        raise ValueError(f"Cannot read the image {value!r:.120} ({type(error).__name__}: {error}).") from error
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
