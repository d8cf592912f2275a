"""What one line of text names: `KIND[:PATH][,name=value...]`, as datasets and tasks are given to the commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints


def split_spec(
    spec: str, kinds: Mapping[str, Callable[..., Any]], more: Mapping[str, Any], omitted: tuple[str, ...] = ()
) -> tuple[str, str, dict[str, Any]]:
    """Kind, path and settings of a line of text; the path is empty if it has none.

    Args:
        spec: `KIND[:PATH][,name=value...]`; other commas belong to the path or to a value.
        kinds: what makes each kind. Its keyword-only settings are those that may be given.
        more: settings of every kind besides, with their types.
        omitted: keyword settings that may not be given here.

    Raises:
        ValueError: a setting or a value is wrong, and the message has those there are. An unknown kind comes back as
            it is, for the caller to say what it expected.
    """
    kind, _, rest = spec.partition(":")
    if "," in kind:  # KIND,name=value with a colon in the value
        kind, rest = spec.split(",", 1)
        rest = "," + rest
    path, *settings = re.split(r",(?=\s*[\w-]+=)", rest)
    if kind not in kinds:
        return kind, path, {}
    hints = {name: hint for name, hint in settings_of(kinds[kind]).items() if name not in omitted} | dict(more)
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.strip().partition("=")
        if name not in hints:
            raise ValueError(f"{spec!r}: {kind} has no setting {name!r}; it has {sorted(hints)}.")
        values[name] = _typed(value, hints[name], f"{spec!r}: {name}={value}")
    return kind, path, values


@contextmanager
def spec_named(spec: str) -> Iterator[None]:
    """Errors inside this block name the line of text that they are about."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        same = next(
            type_ for type_ in (FileNotFoundError, ValueError, ImportError, OSError) if isinstance(error, type_)
        )
        raise same(f"{spec!r}: {error}") from error


def settings_of(kind: Callable[..., Any]) -> dict[str, Any]:
    """Keyword settings of a class with their types; where it passes settings on, those of its parents too."""
    keywords: dict[str, Any] = {}
    for owner in inspect.getmro(kind) if inspect.isclass(kind) else ():
        init = vars(owner).get("__init__")
        if init is None:
            continue
        parameters, hints = inspect.signature(init).parameters.values(), get_type_hints(init)
        own = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        keywords = {**{name: hints[name] for name in own}, **keywords}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return keywords


def _typed(value: str, hint: Any, place: str) -> Any:
    """A value of a setting as its type has it."""
    types = get_args(hint) or (hint,)
    if bool in types:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{place}: expected true or false.")
        return value.lower() == "true"
    for type_, what in ((int, "a whole number"), (float, "a number")):
        if type_ in types:
            try:
                return type_(value)
            except ValueError:
                raise ValueError(f"{place}: expected {what}.") from None
    return value
