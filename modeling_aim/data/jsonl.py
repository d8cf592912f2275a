"""Files of JSON: one object a line, demonstrations, and single values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def numbered_json(path: Path) -> Iterator[tuple[int, Any]]:
    """What the lines of a jsonl file hold, with their numbers; empty ones are passed by.

    Raises:
        ValueError: a line is not JSON; the message names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if b"\\u" in line:
                    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}). Expected one object a line.") from error
            yield number, value


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as the lines of a jsonl file; a lone surrogate becomes the escape that JSON has for it."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a jsonl file; they are on disk when this returns."""
    with path.open("ab") as file:
        file.write(json_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Take away a last line that a kill cut off. No other process may be writing."""
    with path.open("rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def beside(path: Path, name: str) -> str:
    """An image named in a file: a URL as it is, a path relative to the file's folder."""
    return name if name.startswith(("http://", "https://", "data:")) else os.fspath(path.parent / name)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it is cut short or another kind of file.") from error
