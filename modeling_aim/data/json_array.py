"""A JSON file that holds a list, one entry at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 2**18  # bytes that are read at a time
LONGEST = 2**26  # characters of an entry


def json_entries(path: Path, piece: int = PIECE) -> Iterator[tuple[Any, int, int]]:
    """Entries of a JSON file that holds a list, with their places; the file is never in memory as a whole.

    Args:
        path: the file, in UTF-8.
        piece: bytes that are read at a time.

    Yields:
        An entry, its first byte in the file, and the byte after its last.

    Raises:
        ValueError: it is not JSON, or holds something else than a list.
    """
    with path.open("rb") as file:
        text = _Text(file, piece)
        try:
            mark = text.next()
            if mark != "[":
                kind = type(text.value()).__name__
                raise NotAList(f"{path} holds a JSON {kind}; expected a list of objects.")
            text.take(1)
            if text.next() == "]":
                mark = "]"
            while mark != "]":
                text.next()
                begin = text.place
                yield text.value(), begin, text.place
                mark = text.next()
                if mark not in (",", "]"):
                    raise ValueError(f"a comma or the end of the list is missing at byte {text.place}")
                text.take(int(mark == ","))
            text.take(1)
            if text.next():
                raise ValueError(f"there is more behind its list, at byte {text.place}")
        except NotAList:
            raise
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); it is cut short or another kind of file.") from error


class NotAList(ValueError):
    """A JSON file holds something else than a list."""


class _Text:
    """The text of a file from some place on, read as far as it is needed.

    Attributes:
        place: the byte of the file where the text that is not yet taken begins.
    """

    def __init__(self, file: BinaryIO, piece: int) -> None:
        self.file, self.piece, self.ended = file, piece, False
        self.text, self.at = "", 0
        self.place = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(self.place)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode

    def take(self, count: int) -> None:
        """Advance by so many characters."""
        self.place += len(self.text[self.at : self.at + count].encode())
        self.at += count

    def next(self) -> str:
        """The next character that is not a space; nothing at the end."""
        while True:
            rest = self.at
            while rest < len(self.text) and self.text[rest] in " \t\r\n":
                rest += 1
            self.take(rest - self.at)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def value(self) -> Any:
        """The next JSON value."""
        while True:
            try:
                value, end = self._decode(self.text, self.at)
            except ValueError:
                if self.ended or len(self.text) - self.at > LONGEST:
                    raise
            else:
                if self.ended or self.text[end : end + 1] not in ("", *".eE"):  # a number may go on
                    self.take(end - self.at)
                    return value
            self._more()

    def _more(self) -> None:
        read = self.file.read(self.piece)
        self.ended = not read
        self.text, self.at = self.text[self.at :] + self._decoder.decode(read, final=self.ended), 0
