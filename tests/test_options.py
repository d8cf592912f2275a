"""The command line: options follow from the settings of each command, and what is wrong is said in one line."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from modeling_aim.cli import app
from modeling_aim.cli.main import COMMANDS
from modeling_aim.cli.options import command, field_help, option_name
from modeling_aim.evaluation import EvalSettings
from modeling_aim.training import TrainSettings

WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


@dataclass(frozen=True, kw_only=True)
class Parent:
    """Shared.

    Args:
        device_map: where it goes.
    """

    device_map: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings(Parent):
    """One field of each kind.

    Args:
        name: the argument.
        output: a path.
        count: a number
            on two lines.
        rate: another, with `code`.
        layers: several numbers.
        data: several texts.
        arguments: named values.
        columns: named texts.
        fast: off unless asked for.
        balanced: on unless asked not to.
    """

    name: str
    output: Path
    count: int = 3
    rate: float | None = None
    layers: tuple[int, ...] | None = None
    data: tuple[str, ...] = ("a", "b")
    arguments: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    fast: bool = False
    balanced: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count={self.count}: expected at least 1.")


def given(*arguments: str) -> tuple[Settings | None, str, int]:
    """Settings that a command gets from what is typed, what it prints, and its exit code."""
    received: list[Settings] = []
    tried = typer.Typer()

    @command(tried, "aim try", positional=("name",))
    def run(settings: Settings) -> None:
        received.append(settings)

    done = CliRunner().invoke(tried, list(arguments), env=WIDE)
    return (received[0] if received else None), done.output, done.exit_code


def test_what_is_not_typed_is_the_default_of_the_dataclass() -> None:
    assert given("x", "--output", "o")[0] == Settings(name="x", output=Path("o"))


def test_every_kind_of_value() -> None:
    typed = ["x", "--output", "o", "--count", "7", "--rate", "1e-3", "--layers", "-1,12", "--fast", "--no-balanced"]
    typed += ["--data", "mmc4:p,weight=2", "--data", "one,two", "--set", "report_to=wandb", "--set", "use_cpu=true"]
    typed += ["--columns", "image=img,label=1", "--device-map", "auto"]
    assert given(*typed)[0] == Settings(
        name="x", output=Path("o"), count=7, rate=1e-3, layers=(-1, 12), fast=True, balanced=False,
        data=("mmc4:p,weight=2", "one", "two"), arguments={"report_to": "wandb", "use_cpu": True},
        columns={"image": "img", "label": "1"}, device_map="auto",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "aim try: NAME, --output must be given; see aim try --help."),
        (["x", "--output", "o", "--count", "many"], "aim try: --count 'many': expected a whole number."),
        (["x", "--output", "o", "--rate", "fast"], "aim try: --rate 'fast': expected a number."),
        (["x", "--output", "o", "--layers", "1,x"], "aim try: --layers 'x': expected a whole number."),
        (["x", "--output", "o", "--set", "report_to"], "aim try: --set 'report_to': expected NAME=VALUE."),
        (["x", "--output", "o", "--count", "0"], "aim try: count=0: expected at least 1."),
    ],
)
def test_a_bad_value_is_one_line_and_an_exit_code(typed: list[str], message: str) -> None:
    settings, output, code = given(*typed)
    assert settings is None and code == 1 and output == message + "\n"


def test_help_is_the_docstring() -> None:
    output = given("--help")[1]
    for text in ("Where it goes.", "A number on two lines. [default: 3]", "Another, with code.", "[default: a,b]"):
        assert text in output
    assert "--balanced" in output and "--no-balanced" in output and "--no-fast" not in output
    assert output.count("Required.") == 2


def test_a_field_without_help_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Undocumented(Settings):
        """Two fields more, one of them without an entry.

        Args:
            other: has one.
        """

        other: int = 1
        missing: int = 1

    with pytest.raises(TypeError, match=r"Undocumented does not document \['missing'\]"):
        field_help(Undocumented)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    module, summary = COMMANDS[name]
    done = CliRunner().invoke(app, [name, "--help"], env=WIDE)
    assert done.exit_code == 0 and "--help" in done.output, done.output
    assert summary.endswith(".") and import_module(f"modeling_aim.cli.{module}").app
    listed = CliRunner().invoke(app, ["--help"], env=WIDE).output
    assert name in listed and summary in " ".join(listed.split())


@pytest.mark.parametrize(("name", "settings"), [("train", TrainSettings), ("eval", EvalSettings)])
def test_every_setting_has_an_option(name: str, settings: type) -> None:
    output = CliRunner().invoke(app, [name, "--help"], env=WIDE).output
    for one in fields(settings):
        assert option_name(one.name) in output, one.name
        assert one.default is not MISSING or one.default_factory is not MISSING or "Required." in output


def test_a_command_that_does_not_exist() -> None:
    done = CliRunner().invoke(app, ["trian"])
    assert done.exit_code != 0 and "train" in done.output
