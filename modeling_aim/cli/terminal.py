"""What the `aim` commands share: an error is one line instead of a traceback, and no text steers the terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

errors = Console(stderr=True)
# control characters but line breaks, marks that turn the direction of text round, lone surrogates
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")
# of click itself or of the one inside typer, by version
CLICK: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
WIDEST = 1000  # characters of a line in a file or a pipe
EXPECTED = (ValueError, OSError, ImportError)  # whose messages are made for people


def wide_console() -> Console:
    """The console of results: as wide as a terminal, and in a file or a pipe as wide as the widest table."""
    console = Console()
    narrow = console.is_terminal or "COLUMNS" in os.environ
    return console if narrow else Console(width=WIDEST)


@contextmanager
def reported(command: str) -> Iterator[None]:
    """Show any failure as one line, with a non-zero exit code; with AIM_TRACEBACK=1 set, as a traceback."""
    try:
        yield
    except (typer.Exit, typer.Abort, CLICK):
        raise
    except KeyboardInterrupt:
        errors.print(f"[red]{command}:[/red] stopped.", highlight=False)
        raise typer.Exit(130) from None
    except Exception as error:
        if os.environ.get("AIM_TRACEBACK", "0") not in ("", "0"):
            raise
        message = str(error).strip()
        if not isinstance(error, EXPECTED) or not message:
            message = f"{type(error).__name__}: {message} (AIM_TRACEBACK=1 shows where)"
        line = " ".join(part.strip() for part in message.splitlines() if part.strip())
        errors.print(f"[red]{command}:[/red] {safe(line)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def safe(value: object) -> str:
    """A text as rich can print it: markup, terminal escapes and what is no Unicode are shown, not obeyed."""
    return escape(STEERING.sub(lambda match: ascii(match[0])[1:-1], str(value)))


def print_json(value: object) -> None:
    """Print a value as JSON on one line."""
    text = json.dumps(value, ensure_ascii=False)  # which escapes the other control characters itself
    typer.echo(STEERING.sub(lambda match: json.dumps(match[0])[1:-1], text))
