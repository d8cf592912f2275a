"""What the `aim` commands share: an error is one message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

errors = Console(stderr=True)


@contextmanager
def reported(command: str) -> Iterator[None]:
    """Show an expected error as one message instead of a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        errors.print(f"[red]{command}:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def whole_numbers(option: str, given: str | None) -> tuple[int, ...] | None:
    """The numbers of an option such as `--read-layers 12,24`.

    Raises:
        ValueError: one of them is none.
    """
    try:
        return None if given is None else tuple(int(number) for number in given.split(","))
    except ValueError:
        raise ValueError(f"{option} {given!r}: expected whole numbers, as in -1 or 12,24.") from None
