"""Least values of settings, checked where a settings dataclass is made."""

from __future__ import annotations

from collections.abc import Callable


def as_option(name: str) -> str:
    """`--batch-size` of `batch_size`."""
    return "--" + name.replace("_", "-")


def check_least(
    settings: object, least: float, *names: str, shown: Callable[[str], str] = "{}=".format
) -> None:  # fmt: skip
    """Raise `ValueError` for a field that is below its least value; `None` counts as no value.

    Args:
        settings: has the fields.
        least: of all of them.
        *names: of the fields.
        shown: how the message begins, from the name: as in Python (`batch_size=`) by default.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{shown(name)}{value}: expected at least {least}.")


def check_least_options(
    settings: object, least: float, *names: str, option: Callable[[str], str] = as_option
) -> None:  # fmt: skip
    """As `check_least`, with the names as options of a command."""
    check_least(settings, least, *names, shown=lambda name: f"{option(name)} ")
