"""Command-line options from a settings dataclass: the fields are the options, the docstring is their help.

    @command(app, "aim train")
    def train(settings: TrainSettings) -> None:
        '''Train a projector for a frozen backbone.'''

The `Args:` section of the dataclass has one entry for each field. `batch_size: int = 8` becomes `--batch-size INTEGER`
with its default; a bool becomes `--x`, or `--x / --no-x` where it is true by default; a tuple takes commas,
or the option several times; a dict takes `NAME=VALUE`, also several times. Where a dict and another field share an
option (`--image`), `NAME=VALUE` goes to the dict and anything else to the other. A value of the wrong type ends in one
line and exit code 1, as a `ValueError` of the dataclass does.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from ..bounds import as_option, check_least_options
from .terminal import reported

Function = TypeVar("Function", bound=Callable[..., None])

# Options that are not called like their field, the same in all commands.
OPTION_NAMES = {"projector_form": "form", "arguments": "set", "as_json": "json", "image_settings": "image"}
NAMED = re.compile(r"[A-Za-z_]\w*=")
METAVARS = {int: "INTEGER", float: "NUMBER", Path: "PATH", dict: "NAME=VALUE"}


def command(
    app: typer.Typer,
    title: str,
    *,
    positional: Sequence[str] = (),
    group: bool = False,
    instead: Mapping[str, tuple[Callable[[], None], str]] | None = None,
) -> Callable[[Function], Function]:
    """Register a function of one settings object as a command.

    Args:
        app: gets the command.
        title: the command as it is typed, for messages: `"aim bank build"`. Its last word is the command's name.
        positional: fields that are arguments instead of options.
        group: it is what `app` does without a subcommand.
        instead: options by name that do something else and end the command, such as `--list`: a function and its help.
    """

    def register(function: Function) -> Function:
        settings_class = get_type_hints(function)["settings"]
        hints, help_texts = get_type_hints(settings_class), field_help(settings_class)
        by_name = {field.name: field for field in _own_first(settings_class)}
        order = [*positional, *(name for name in by_name if name not in positional)]
        shared = _shared(order, hints)
        for name, other in shared.items():
            help_texts[name] += f" With NAME=VALUE: {help_texts[other]}"
        parameters = [
            _parameter(by_name[name], hints[name], help_texts[name], name in positional, several=name in shared)
            for name in order
            if name not in shared.values()
        ]

        parameters += [_instead(name, action, help_text) for name, (action, help_text) in (instead or {}).items()]

        def run(**values: Any) -> None:
            values = {name: value for name, value in values.items() if name not in (instead or {})}
            context = values.pop("context", None) if group else None  # a field may have that name too
            if context is not None and context.invoked_subcommand is not None:
                return
            with reported(title):
                for name, other in shared.items():
                    values |= _parted(values[name] or [], name, other)
                missing = [name for name in order if _required(by_name[name]) and not _given(values[name])]
                if missing:
                    names = [name.upper() if name in positional else option_name(name) for name in missing]
                    raise ValueError(f"{', '.join(names)} must be given; see {title} --help.")
                settings = settings_class(
                    **{
                        name: parsed(value, hints[name], name.upper() if name in positional else option_name(name))
                        for name, value in values.items()
                        if _given(value)
                    }
                )
                function(settings)

        if group:
            context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
            parameters.insert(0, context)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = function.__doc__
        if group:
            app.callback(invoke_without_command=True)(run)
        else:
            app.command(title.split()[-1])(run)
        return function

    return register


def option_name(field_name: str) -> str:
    """`--batch-size` of `batch_size`."""
    return as_option(OPTION_NAMES.get(field_name, field_name))


def field_help(settings_class: type) -> dict[str, str]:
    """The text of each field in the `Args:` sections of a dataclass and its parents.

    Raises:
        TypeError: a field has no entry of its own.
    """
    texts: dict[str, str] = {}
    for owner in reversed(inspect.getmro(settings_class)):
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.cleandoc(owner.__doc__ or ""), re.M | re.S)
        entries = re.findall(r"^    (\w+): (.*?)(?=^    \w|\Z)", section.group(1) if section else "", re.M | re.S)
        texts |= {name: " ".join(text.split()).replace("`", "") for name, text in entries}
    without = [field.name for field in fields(settings_class) if field.name not in texts]
    if without:
        raise TypeError(f"{settings_class.__name__} does not document {without} in its Args section.")
    return texts


def check_least(settings: object, least: int, *names: str) -> None:
    """Raise `ValueError` for a field that is below its least value; `None` counts as no value."""
    check_least_options(settings, least, *names, option=option_name)


def parsed(given: Any, hint: Any, option: str) -> Any:
    """What was typed, as a field's type has it.

    Args:
        given: text, a list of texts, or a bool.
        hint: type of the field.
        option: for messages.

    Raises:
        ValueError: it is not such a value; the message has what was given and what is expected.
    """
    kind = _without_none(hint)
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        return tuple(parsed(piece, inner, option) for text in given for piece in _pieces(text))
    if get_origin(kind) is dict:
        as_json = get_args(kind)[1] is not str
        pieces = [piece for text in given for piece in re.split(r",(?=\s*[\w-]+=)", text)]
        return dict(_named_value(piece, as_json, option) for piece in pieces)
    if kind in (int, float):
        expected = "a whole number" if kind is int else "a number"
        try:
            return kind(given)
        except ValueError:
            raise ValueError(f"{option} {given!r}: expected {expected}.") from None
    return Path(given) if kind is Path else given


def _pieces(text: str) -> list[str]:
    """The parts of a list with commas; a spec, `KIND:PATH,name=value`, is one part, and so is `NAME:name=value`."""
    if re.fullmatch(r"[\w-]+(:\w+=[\w.]+)*(,[\w-]+(:\w+=[\w.]+)*)*", text):
        return text.split(",")
    if ":" in text or re.search(r",\s*[\w-]+=", text):
        return [text]
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def _named_value(text: str, as_json: bool, option: str) -> tuple[str, Any]:
    """`NAME=VALUE`, where asked with the value as JSON if it is that."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{option} {text!r}: expected NAME=VALUE.")
    try:
        return name.strip(), json.loads(value) if as_json else value
    except json.JSONDecodeError:
        return name.strip(), value


def _shared(order: Sequence[str], hints: Mapping[str, Any]) -> dict[str, str]:
    """The fields of one value whose option is also that of a dict, and that dict."""
    named = {option_name(name): name for name in order if get_origin(_without_none(hints[name])) is dict}
    return {n: named[option_name(n)] for n in order if named.get(option_name(n), n) != n}


def _parted(texts: Sequence[str], name: str, other: str) -> dict[str, Any]:
    """What was typed for an option that two fields share: one value for the first, `NAME=VALUE` for the other."""
    named = [text for text in texts if NAMED.match(text) and not Path(text).exists()]
    single = [text for text in texts if text not in named]
    if len(single) > 1:
        raise ValueError(f"{option_name(name)} was given {len(single)} times without NAME=: {', '.join(single)}.")
    return {name: single[0] if single else None, other: named}


def _parameter(
    field: Field[Any], hint: Any, help_text: str, positional: bool, several: bool = False
) -> inspect.Parameter:
    """One field as typer takes it. Values arrive as text, so that all errors are reported in the same way."""
    kind = _without_none(hint)
    several = several or get_origin(kind) in (tuple, dict)
    default = _shown_default(field)
    if _required(field):
        help_text += " Required."
    described: dict[str, Any] = {"help": escape(help_text[0].upper() + help_text[1:]), "show_default": bool(default)}
    if kind is not bool:
        element = get_args(kind)[0] if get_origin(kind) is tuple else get_origin(kind) or kind
        described["metavar"] = METAVARS.get(element, "TEXT") + (",..." if get_origin(kind) is tuple else "")
    if positional:
        described["metavar"] = field.name.upper()
    names: tuple[str, ...] = (option_name(field.name),)
    annotation: Any = list[str] | None if several else str | None
    if kind is bool:
        annotation, described["show_default"] = bool, field.default
        names = (option_name(field.name) + (f"/--no-{option_name(field.name)[2:]}" if field.default else ""),)
    declared = typer.Argument(**described) if positional else typer.Option(*names, **described)
    value = field.default if kind is bool else ([default] if several and default else default)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=Annotated[annotation, declared]
    )


def _instead(name: str, action: Callable[[], None], help_text: str) -> inspect.Parameter:
    """An option that runs `action` and ends the command, whatever else is given."""

    def ended(wanted: bool) -> None:
        if wanted:
            action()
            raise typer.Exit

    option = typer.Option(f"--{name}", callback=ended, is_eager=True, help=help_text)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def _shown_default(field: Field[Any]) -> str | None:
    """A default as it would be typed; `None` where there is nothing to show."""
    value = None if field.default is MISSING else field.default
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or None
    return None if value is None else str(value).encode("unicode_escape").decode()


def _own_first(settings_class: type) -> list[Field[Any]]:
    """Fields of a dataclass, those that it inherits behind its own."""
    own = vars(settings_class).get("__annotations__", {})
    return sorted(fields(settings_class), key=lambda field: field.name not in own)


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _given(value: object) -> bool:
    return value is not None and value != []


def _without_none(hint: Any) -> Any:
    """The type of a value that may also be `None`."""
    others = [kind for kind in get_args(hint) if kind is not NoneType]
    return others[0] if NoneType in get_args(hint) else hint
