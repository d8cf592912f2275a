"""Chats of lmms-eval's tasks as the adapter takes them: parts in their order, and images opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..images_aim import open_image

IMAGE_KEYS = ("url", "image", "path")  # lmms-eval's own name first


def parts_of(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a turn: `{"type": "text", "text"}` or `{"type": "image", "image"}`.

    Args:
        turn: its `content` is a list of such parts, in which plain strings are text too, or one plain string.

    Raises:
        ValueError: a part is neither text nor an image; the message says what it is.
    """
    content = turn["content"]
    return [_part(part) for part in ([content] if isinstance(content, str | Mapping) else content)]


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    key = next((key for key in IMAGE_KEYS if key in part), None) if kind == "image" else None
    if key is None:
        raise ValueError(f"--model aim reads images and text; this task has {kind}.")
    return {"type": "image", "image": part[key]}


def bare(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a turn without its image, for a chat template."""
    return {"type": "image"} if part["type"] == "image" else dict(part)


def pictures(visuals: Any) -> tuple[Image.Image, ...]:
    """The images that a task shows, in RGB.

    Args:
        visuals: PIL images, or paths of image files; or one of either.

    Raises:
        ValueError: one of them is not an image, or a file that cannot be opened.
    """
    is_single = isinstance(visuals, Image.Image | str | os.PathLike)
    return tuple(_opened(visual) for visual in ([visuals] if is_single else visuals or ()))


def _opened(visual: Any) -> Image.Image:
    if isinstance(visual, Image.Image):
        return visual.convert("RGB")
    if isinstance(visual, str | os.PathLike) and os.path.isfile(visual):
        return open_image(os.fspath(visual))
    raise ValueError(
        f"--model aim reads images: PIL images, or paths of image files. This task shows {visual!r:.80} "
        f"({type(visual).__name__})."
    )
