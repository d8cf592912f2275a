"""Without a terminal: plain lines with rate and time left, and tables that are not cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_cli_errors
from backbones import picture
from transformers.utils import logging
from typer.testing import CliRunner

from modeling_aim.cli import app
from modeling_aim.progress import PlainLines, duration, rate, tracked

files = test_cli_errors.files  # the fixture


def lines_of(total: int | None, seconds: list[float], counts: list[int] | None = None) -> list[str]:
    """What is written where items end at these seconds."""
    now, written = [0.0], []
    lines = PlainLines("read", "rows", total, written.append, lambda: now[0])
    for place, end in enumerate(seconds):
        now[0] = end
        lines.advance(1 if counts is None else counts[place], "a note" if place == 0 else "")
    lines.finish()
    return written


def test_a_slow_run_has_a_line_each_thirty_seconds() -> None:
    assert lines_of(1000, [29.0, 31.0, 45.0, 62.0]) == [
        "read: 2 of 1,000 rows, 0.0645 a second, 4:17:49 left",
        "read: 4 of 1,000 rows, 0.0645 a second, 4:17:18 left",
    ]


def test_a_fast_run_has_a_line_each_tenth_but_not_each_instant() -> None:
    assert len(lines_of(100, [0.001 * i for i in range(1, 101)])) == 1
    lines = lines_of(100, [0.5 * i for i in range(1, 101)])
    assert len(lines) == 10 and lines[-1] == "read: 100 of 100 rows, 2 a second, 0:00:50 in all"


def test_a_total_that_is_not_known_or_not_reached() -> None:
    assert lines_of(None, [40.0, 41.0]) == [
        "read: 1 rows, 0.025 a second (a note)", "read: 2 rows, 0.0488 a second",
    ]  # fmt: skip
    assert lines_of(10, [0.1])[-1].startswith("read: 1 of 10 rows")
    assert lines_of(5, []) == []


def test_items_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked([3, 1], "check", "things")) == [3, 1]
    assert capsys.readouterr().err.startswith("check: 2 of 2 things, ")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (-1, "0:00:00")])
def test_a_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_rate() -> None:
    assert (rate(1234, 1), rate(1, 3), rate(0, 0)) == ("1,234", "0.333", "0")


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup: nothing says how wide a line may be."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(logging, "_tqdm_active", True)  # the tests turn bars off


@pytest.mark.usefixtures("no_terminal")
def test_a_table_in_a_file_is_whole() -> None:
    done = CliRunner().invoke(app, ["bench", "--shape", "tiny", "--shots", "0,1", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    assert "…" not in done.stdout and "prefix-kv" in done.stdout and "first token, ms (quartiles)" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 200


@pytest.mark.usefixtures("no_terminal")
def test_a_bank_is_built_with_plain_lines(files: Path, tmp_path: Path) -> None:
    names = ["dax", "wug", "blicket"]
    for number, _ in enumerate(names):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "label": name} for number, name in enumerate(names)]
    (tmp_path / "demos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    typed = ["--repo", files / "repo", "--demos", tmp_path / "demos.jsonl", "--output", tmp_path / "bank"]
    done = CliRunner().invoke(app, ["bank", "build", *map(str, typed)])
    assert done.exit_code == 0, done.output
    assert "\nread: 3 of 3 demonstrations, " in done.stderr
    assert "Reading demonstrations" not in done.stderr  # the bar of a terminal
