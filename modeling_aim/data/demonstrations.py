"""Demonstrations as the commands take them: a jsonl file, or a folder of labelled images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .jsonl import beside, numbered_json


def read_demonstrations(path: Path) -> Iterator[dict[str, Any]]:
    """Demonstrations of a jsonl file, or of a folder that holds a folder of images for each label.

    Image paths in a file are relative to it.

    Raises:
        ValueError: a line is not a JSON object (the message names file and line); a folder has fewer than two labels.
        FileNotFoundError: there is no such file or folder.
    """
    if path.is_dir():
        from .link_context import class_folders  # needs torch

        for image_class in class_folders(path):
            yield from ({"image": image, "label": image_class.name} for image in image_class.images)
        return
    if not path.exists():
        raise FileNotFoundError(
            f'{path} was not found; expected a file with one object a line, {{"image": ..., "label": ...}}, or a '
            "folder with a folder of images for each label."
        )
    for number, demo in numbered_json(path):
        if not isinstance(demo, dict):
            raise ValueError(f"{path}, line {number}: expected an object such as {{'image': ..., 'label': ...}}.")
        for key in ("image", "images"):
            if isinstance(demo.get(key), str):
                demo[key] = beside(path, demo[key])
            elif isinstance(demo.get(key), list):
                demo[key] = [beside(path, name) for name in demo[key]]
        yield demo
