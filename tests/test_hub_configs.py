"""Each folder of hub_configs/ parses, builds at its real size on the meta device, and is what its script writes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

from modeling_aim import AimConfig, AimProjector
from modeling_aim.configuration_aim import PRESETS

WRITTEN_WITH = "5.23."
HUB_CONFIGS = Path(__file__).resolve().parents[1] / "hub_configs"
FOLDERS = sorted(p.name for p in HUB_CONFIGS.iterdir() if (p / "config.json").exists() and p.name != "aim-tiny")
SIZES = {  # billions of parameters, as published with each backbone
    "llava-1.5-7b": 7.06, "llava-1.5-13b": 13.35, "llava-v1.6-mistral-7b": 7.57, "llava-onevision-qwen2-7b": 8.03,
    "Qwen2-VL-2B": 2.21, "Qwen2-VL-7B": 8.29, "Qwen2.5-VL-3B": 3.75, "Qwen2.5-VL-7B": 8.29, "Qwen3-VL-2B": 2.13,
    "Qwen3-VL-4B": 4.44, "Qwen3-VL-8B": 8.77, "idefics-9b": 8.93, "idefics2-8b": 8.40, "Idefics3-8B-Llama3": 8.46,
    "SmolVLM-256M": 0.256, "SmolVLM-500M": 0.508, "SmolVLM-2.2B": 2.25,
}  # fmt: skip


def test_a_folder_for_each_backbone() -> None:
    assert set(FOLDERS) == set(SIZES)


@pytest.mark.parametrize("folder", FOLDERS)
def test_builds_at_its_real_size(folder: str) -> None:
    config = AimConfig.from_pretrained(HUB_CONFIGS / folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in model.projector.parameters())
    assert sum(p.numel() for p in model.backbone.parameters()) / 1e9 == pytest.approx(SIZES[folder], rel=0.01)
    assert not list(model.projector.parameters())  # it works without training
    width = config.hidden_size
    trained, paper = (AimConfig(config.backbone_config, **PRESETS[name]) for name in ("trained", "paper"))
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in AimProjector(form).parameters()) for form in (trained, paper)]
    assert sizes[1] == width * width + 3 * width and sizes[0] < 17_000_000


def test_the_folders_are_what_the_script_writes() -> None:
    if not transformers.__version__.startswith(WRITTEN_WITH):
        pytest.skip(f"written with transformers {WRITTEN_WITH}; others put other defaults into a config.json")
    script = HUB_CONFIGS / "make.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
