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
