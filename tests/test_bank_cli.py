"""The commands of the bank, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from backbones import picture, plugin
from PIL import Image
from typer.testing import CliRunner

from modeling_aim.cli import app

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("dax", "wug", "blicket", "dax")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository, and demonstrations as files."""
    folder = tmp_path_factory.mktemp("files")
    plugin("llava").model.save_pretrained(folder / "repo", include_backbone=True)
    lines = []
    for seed, name in enumerate(NAMES):
        picture(seed).save(folder / f"{seed}.png")
        lines.append(json.dumps({"image": f"{seed}.png", "label": name}))
    (folder / "demos.jsonl").write_text("\n".join([*lines, lines[0]]))
    return folder


def run(*arguments: Any, fails: bool = False) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (done.exit_code != 0) == fails, done.output
    return done.output


def build(folder: Path, output: Path, *more: Any, fails: bool = False) -> str:
    command = ["bank", "build", "--repo", folder / "repo", "--demos", folder / "demos.jsonl", "--output", output]
    return run(*command, *more, fails=fails)


def test_build_inspect_and_select(folder: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    said = build(folder, bank, "--batch-size", 2, "--storage", "int8", "--keep-states")
    assert "4 demonstrations" in said and "merged duplicates: 1" in said
    info = json.loads(run("bank", "inspect", bank, "--json", "--verify"))
    assert info["demonstrations"] == 4 and info["labels"] == {"dax": 2, "blicket": 1, "wug": 1}
    assert info["stored_as"] == "int8" and info["hidden_states"] and info["merged_duplicates"] == 1
    shown = run("bank", "inspect", bank)
    assert all(word in shown for word in ("dax 2", "backbone", "projector", "fused tokens", "yes", "image 64"))
    sheet = tmp_path / "chosen.png"
    command = ["bank", "select", bank, "--repo", folder / "repo", "--image", folder / "1.png"]
    chosen = json.loads(run(*command, "--shots", 3, "--output", sheet, "--json"))
    assert chosen[-1]["number"] == 1 and [row["label"] for row in chosen][-1] == "wug"
    assert {row["label"] for row in chosen} == {"dax", "wug", "blicket"}
    with Image.open(sheet) as drawn:
        assert drawn.width > 300 and len(drawn.convert("RGB").getcolors(10**6) or ()) > 100
    assert "most similar last" in run(*command, "--shots", 2, "--select", "mmices", "--question", "What is this?")


def test_errors_are_one_message(folder: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    build(folder, bank, "--keep-states")
    repo = folder / "repo"
    for command in (
        ["bank", "build", "--repo", repo, "--output", bank],
        ["bank", "select", bank, "--repo", repo, "--image", folder / "1.png", "--shots", 9],
        ["bank", "select", bank, "--repo", repo, "--question", "What is this?"],
        ["bank", "inspect", tmp_path / "nowhere"],
        ["export-prompt-embeds", "--repo", repo, "--question", "a", "--output", bank, "--bank", bank, "--demos", bank],
    ):
        assert "Traceback" not in run(*command, fails=True)
    build(folder, bank, "--keep-states", "--storage", "int8", fails=True)
    shard = next(bank.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])
    run("bank", "inspect", bank, fails=True)
    left = json.loads(run("bank", "inspect", bank, "--skip-damaged", "--json"))
    assert left["demonstrations"] == 0 and left["hidden_states"] is False
