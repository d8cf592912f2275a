"""Whatever fails in a command ends in one line and a non-zero code; no text of others steers the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from backbones import build, picture, plugin
from rich.console import Console
from training_runs import data_on_disk
from typer.testing import CliRunner

from modeling_aim import AimForConditionalGeneration
from modeling_aim.cli import app
from modeling_aim.cli.terminal import print_json, reported, safe

ROOT = Path(__file__).resolve().parents[1]
AIM_TINY = str(ROOT / "hub_configs" / "aim-tiny")
STEERING = ("\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "a\rb", "\x9b2J", "\u202egnp.exe", "\u2066x\u2069", "\x08\x08")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    build("llava").save(folder / "backbone")
    aim = plugin("llava")
    aim.model.save_pretrained(folder / "repo", include_backbone=True)
    with torch.no_grad():
        aim.model.projector.layers[-1].weight[0] = float("nan")
    aim.model.save_pretrained(folder / "nan", include_backbone=True)
    picture(0).save(folder / "0.png")
    (folder / "demos.jsonl").write_text(json.dumps({"image": "0.png", "label": "dax"}))
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "binary.jsonl").write_bytes(bytes(range(256)) * 4)
    (folder / "surrogate.jsonl").write_text('{"label": "a \\ud800"}')
    (folder / "no_image.jsonl").write_text('{"image": "0.png", "label": "dax"}\n{"image": null, "label": "wug"}')
    (folder / "half").mkdir()
    (folder / "half" / "results.json").write_text('{"tasks"')
    (folder / "half" / "predictions.jsonl").write_text("{")
    data_on_disk(folder / "data")
    return folder


def answer(files: Path, *more: Any, demos: str = "demos.jsonl", repo: str = "repo") -> list[Any]:
    return ["answer", "--repo", files / repo, "--demos", files / demos, "--question", "What?", *more]


def train(files: Path, *more: Any) -> list[Any]:
    data = f"pairs:{files / 'data' / 'pairs.jsonl'}"
    return ["train", "--backbone", files / "backbone", "--data", data, "--set", "use_cpu=true", *more]


CASES: dict[str, Any] = {
    "a deep line": lambda f, o: answer(f, demos="deep.jsonl"),
    "a binary file": lambda f, o: answer(f, demos="binary.jsonl"),
    "a demonstration that lost its image": lambda f, o: answer(f, demos="no_image.jsonl"),
    "a lone surrogate": lambda f, o: answer(f, demos="surrogate.jsonl"),
    "a missing file": lambda f, o: answer(f, demos="[/red]nowhere.jsonl"),
    "a missing file to tune with": lambda f, o: ["tune", "--repo", f / "repo", "--demos", f / "nowhere.jsonl"],
    "a folder without images to tune with": lambda f, o: ["tune", "--backbone", f / "backbone", "--demos", f / "half"],
    "a backbone as a repository": lambda f, o: answer(f, repo="backbone"),
    "a missing repository": lambda f, o: answer(f, repo="no/where/at/all"),
    "a device that is not there": lambda f, o: answer(f, "--device-map", "gpu7"),
    "a GPU that is not there": lambda f, o: answer(f, "--device-map", f"cuda:{torch.cuda.device_count()}"),
    "weights that are not finite": lambda f, o: answer(f, repo="nan"),
    "a bank of weights that are not finite": lambda f, o: [
        "bank", "build", "--repo", f / "nan", "--demos", f / "demos.jsonl", "--output", o,
    ],
    "an image that is none": lambda f, o: answer(f, "--image", f / "demos.jsonl"),
    "AIM on AIM": lambda f, o: ["init", AIM_TINY, "--output", o],
    "a number that is none": lambda f, o: train(f, "--output", o, "--steps", 1, "--set", "max_grad_norm=x"),
    "a file as a folder": lambda f, o: train(f, "--output", f / "demos.jsonl", "--steps", 1),
    "a folder that is not there": lambda f, o: [
        "export-prompt-embeds", "--repo", f / "repo", "--question", "What?", "--output", o / "no" / "file",
    ],
    "no run to compare": lambda f, o: ["eval", "compare", f / "repo", f / "half"],
    "a damaged run to compare": lambda f, o: ["eval", "compare", f / "half", f / "half", "--between", "full,aim"],
    "a list that is not there": lambda f, o: [
        "eval", "--repo", f / "repo", "--tasks", "episodes:nowhere", "--output", o, "--select", "fixed:nope",
    ],
    "no bank": lambda f, o: ["bank", "inspect", f / "repo"],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_whatever_fails_is_one_line(
    files: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "5000")
    done = CliRunner().invoke(app, [str(one) for one in CASES[case](files, tmp_path / "out[/red]")])
    said = [line for line in done.stderr.splitlines() if line.startswith("aim ")]
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), (case, done.output, done.exception)
    assert len(said) == 1 and len(said[0]) > 30 and "Traceback" not in done.output, done.output


def test_answer_names_the_demonstration_that_lost_its_image(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "5000")
    done = CliRunner().invoke(app, [str(part) for part in answer(files, demos="no_image.jsonl")])
    assert "Demonstration 1 ('wug') has None for its image" in done.stderr


def test_answer_asks_a_question_without_an_image(files: Path) -> None:
    done = CliRunner().invoke(app, [str(part) for part in answer(files, "--json", "--max-new-tokens", 4)])
    assert done.exit_code == 0, done.output
    model = AimForConditionalGeneration.from_pretrained(files / "repo")
    inputs = model.processor(text=model.processor.prompt("What?", images=0), return_tensors="pt")
    demos = [{"image": files / "0.png", "label": "dax"}]
    ids = model.generate(**inputs, demos=demos, max_new_tokens=4, do_sample=False)
    length = inputs["input_ids"].shape[1]
    result = json.loads(done.stdout)
    assert result["answer"] == model.processor.decode(ids[0, length:], skip_special_tokens=True).strip()
    assert result["prompt_tokens"] == length + result["fused_tokens"] > length


def test_paths_with_markup_are_shown_as_they_are(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "i[/red]x"
    done = CliRunner().invoke(app, ["init", str(files / "backbone"), "--output", str(output)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert (output / "config.json").exists()
    assert "i[/red]x" in done.output.replace("\n", "")


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), KeyError("x"), AssertionError(), RecursionError("deep")])
def test_the_environment_asks_for_the_rest(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(typer.Exit) as ended, reported("aim test"):
        raise error
    said = capsys.readouterr().err
    assert ended.value.exit_code == 1 and said.count("\n") == 1
    assert said.startswith(f"aim test: {type(error).__name__}: ") and "AIM_TRACEBACK=1" in said
    monkeypatch.setenv("AIM_TRACEBACK", "1")
    with pytest.raises(type(error)), reported("aim test"):
        raise error


def test_a_command_that_ends_itself_is_left_alone(capsys: pytest.CaptureFixture) -> None:
    for ending in (typer.Exit(3), typer.Abort(), typer.BadParameter("x")):
        with pytest.raises(type(ending)), reported("aim test"):
            raise ending
    with pytest.raises(typer.Exit) as ended, reported("aim test"):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130 and "stopped" in capsys.readouterr().err


@pytest.mark.parametrize("text", [*STEERING, "[red]x[/red]", "[/red]", "\ud800", "[link=file:///etc]x[/link]"])
def test_no_text_steers_the_terminal(text: str, capsys: pytest.CaptureFixture) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=500, highlight=False)
    console.print(f"[b]label[/b] {safe(text)}")
    shown = file.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert not any(letter in shown for letter in "\x1b\x07\r\x9b\x08\u202e\u2066\ud800")
    if text.startswith("["):
        assert text in shown
    print_json({"label": text})
    line = capsys.readouterr().out
    assert json.loads(line) == {"label": text}
    assert not any(letter in line for letter in "\x1b\x07\r\x9b\x08\u202e\u2066\ud800")
    with pytest.raises(typer.Exit), reported("aim test"):
        raise ValueError(f"No label {text}.")
    assert not any(letter in capsys.readouterr().err for letter in "\x1b\x07\r\x9b\x08\u202e\u2066\ud800")
