"""`aim check` on a family beyond those of the matrix, and on a class that cannot work."""

from __future__ import annotations

from pathlib import Path

import backbones
import pytest
from more_families import BUILDERS
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

from modeling_aim import AimForConditionalGeneration
from modeling_aim.checks import PROPERTIES
from modeling_aim.cli import app


def test_another_family_gets_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbones.MORE_FAMILIES, "internvl", BUILDERS["internvl"])
    built = backbones.build("internvl")
    built.model.save_pretrained(tmp_path)
    built.processor.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.output.count("│ yes") >= len(PROPERTIES) - 2 and "│ no " not in done.output


def test_a_class_that_cannot_work_is_told_why(tmp_path: Path) -> None:
    config = AutoConfig.for_model("florence2")
    config.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["check", str(tmp_path), "--from-config"])
    assert done.exit_code == 1
    assert "cannot use Florence2" in done.output and "encoder-decoder" in " ".join(done.output.split())


def test_so_it_is_wherever_a_plug_in_is_made() -> None:
    config = AutoConfig.for_model("florence2")
    for part in (config.text_config, config.vision_config):
        part.update({name: 1 for name in ("encoder_layers", "decoder_layers") if hasattr(part, name)})
    with pytest.raises(ValueError, match="cannot use Florence2ForConditionalGeneration: it is an encoder-decoder"):
        AimForConditionalGeneration.from_backbone(AutoModelForImageTextToText.from_config(config))
