"""Thumbnails of demonstrations: made when a bank is built, opened with care, since anybody may have made a bank."""

from __future__ import annotations

import io

from PIL import Image

from ..demonstrations_aim import Demonstration

MAX_PIXELS = 2**22  # of a thumbnail; decoding one takes three bytes a pixel


def thumbnail(demo: Demonstration, size: int) -> bytes:
    """A JPEG of the first image, at most `size` pixels wide and high; empty where there is no image."""
    if not demo.images:
        return b""
    small = demo.images[0].convert("RGB")
    small.thumbnail((size, size), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def open_thumbnail(content: bytes) -> Image.Image:
    """Decode a thumbnail: a JPEG of a few pixels, and nothing else that Pillow can open.

    Raises:
        ValueError: it is not a JPEG, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG",))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"A thumbnail of the bank is not a small JPEG ({error}).") from error
