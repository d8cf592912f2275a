"""What the `aim` commands share: an error is one message instead of a traceback."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

errors = Console(stderr=True)
PASSED = "\n\t\u200c\u200d"  # joiners are part of words and of emoji


def printable(text: str) -> str:
    """A text from outside, for a terminal: control and formatting characters as escapes, which JSON reads back."""

    def shown(char: str) -> str:
        if char in PASSED or unicodedata.category(char)[0] != "C":
            return char
        units = char.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))

    return "".join(map(shown, text))


@contextmanager
def reported(command: str) -> Iterator[None]:
    """Show an expected error as one message instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        errors.print(f"[red]{command}:[/red] {escape(printable(str(error)))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
