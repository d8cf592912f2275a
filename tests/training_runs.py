"""Short training runs on tiny backbones, their data and settings, for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from backbones import picture
from transformers import TrainingArguments

from modeling_aim.training import (
    AimTrainer,
    Mixture,
    ShotLaw,
    Source,
    TrainSettings,
)

WORDS = ["cat", "dog", "bird", "fish", "horse", "mouse", "tiger", "wolf"]


class Things(Source):
    """Pictures with a word each; every third is a question."""

    name = "things"

    def __init__(self, count: int = 30) -> None:
        self.count = count

    def documents(self, seed: int) -> Iterator[Sequence[Any]]:
        for i in torch.randperm(self.count, generator=torch.Generator().manual_seed(seed)).tolist():
            word = WORDS[i % len(WORDS)]
            asked = {"question": "What is it?", "answer": word} if i % 3 == 0 else {"text": f"a small {word}"}
            yield [{"image": picture(i), **asked}]


def arguments(folder: Path, **given: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
    }
    options |= {
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "warmup_steps": 0,
    }
    return TrainingArguments(str(folder), **{**options, **given})


def trainer(model: Any, folder: Path, options: dict[str, Any] | None = None, **given: Any) -> AimTrainer:
    data = Mixture([Things()], [1.0], ShotLaw(3))
    return AimTrainer(model, arguments(folder, **given), train_dataset=data, **(options or {}))


def losses(run: AimTrainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def data_on_disk(folder: Path, count: int = 12) -> str:
    """Image-text pairs as a jsonl file with images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "text": f"a small {WORDS[i % len(WORDS)]}"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return f"pairs:{folder / 'pairs.jsonl'}"


@pytest.fixture(scope="module")
def saved_backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LLaVA with its processor, as a backbone's own repository holds them."""
    folder = tmp_path_factory.mktemp("backbone")
    built = backbones.build("llava")
    built.model.save_pretrained(folder)
    built.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(saved_backbone: str, tmp_path: Path) -> TrainSettings:
    """A short run."""
    return TrainSettings(
        backbone=saved_backbone,
        data=(data_on_disk(tmp_path / "data"),),
        output=str(tmp_path / "run"),
        steps=6,
        batch_size=2,
        shots=2,
        learning_rate=1e-2,
        dtype="float32",
        save_every=2,
        log_every=1,
        held_out=0.0,
        arguments={"use_cpu": True, "disable_tqdm": True},
    )
