"""What the `aim` commands share: files of demonstrations, and errors as one message instead of a traceback."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

errors = Console(stderr=True)
PASSED = "\n\t\u200c\u200d"  # joiners are part of words and of emoji


@contextmanager
def reported(command: str) -> Iterator[None]:
    """Show an expected error as one message instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        errors.print(f"[red]{command}:[/red] {escape(printable(str(error)))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def printable(text: str) -> str:
    """A text from outside, for a terminal: control and formatting characters as escapes, which JSON reads back."""

    def shown(char: str) -> str:
        if char in PASSED or unicodedata.category(char)[0] != "C":
            return char
        units = char.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))

    return "".join(map(shown, text))


def read_demonstrations(path: Path) -> Iterator[dict[str, Any]]:
    """Demonstrations of a jsonl file; image paths are relative to the file.

    Raises:
        ValueError: a line is no JSON object; the message names file and line.
        FileNotFoundError: there is no such file.
    """
    for number, demo in numbered_json(path):
        if not isinstance(demo, dict):
            raise ValueError(f"{path}, line {number}: expected an object such as {{'image': ..., 'label': ...}}.")
        for key in ("image", "images"):
            if isinstance(demo.get(key), str):
                demo[key] = _beside(path, demo[key])
            elif isinstance(demo.get(key), list):
                demo[key] = [_beside(path, name) for name in demo[key]]
        yield demo


def numbered_json(path: Path) -> Iterator[tuple[int, Any]]:
    """What the lines of a jsonl file hold, with their numbers; empty ones are passed by.

    Raises:
        ValueError: a line is not JSON; the message names file and line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}). Expected one object a line.") from error
            yield number, value


def _beside(path: Path, name: str) -> str:
    """An image named in a file: a URL as it is, a path relative to the file's folder."""
    return name if name.startswith(("http://", "https://", "data:")) else os.fspath(path.parent / name)
