"""The base of tasks over files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ...data.images import Unopened, is_image
from ...data.pairs import located
from ...data.tables import counted
from ..task import Task


class DataTask(Task):
    """A task that reads files: it has a name to show, and counts what it leaves out.

    Args:
        name: in tables and files.
    """

    def __init__(self, name: str) -> None:
        if name != name.strip() or not name:
            raise ValueError(f"name={name!r}: expected the name to show for the task.")
        self.name, self.left_out = name, Counter[str]()

    def found(self, folder: Path, value: object, what: str = "example") -> tuple[Any, ...] | None:
        """Images where they are, unopened; `None`, and counted, if a file is missing or is not an image.

        Args:
            folder: what paths are relative to.
            value: an image or several, as a row holds them.
            what: is left out without it.
        """
        images = value if isinstance(value, (list, tuple)) else [value]
        places = tuple(image if isinstance(image, Unopened) else located(folder, image) for image in images)
        if places and all(map(is_image, places)):
            return places
        self.left_out[f"{what} with an image that is missing or cannot be opened"] += 1
        return None

    def notes(self) -> list[str]:
        return [f"Left out: {counted(self.left_out)}."] if self.left_out else []
