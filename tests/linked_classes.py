"""Folders of painted classes and their features, for the tests of link-context episodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modeling_aim import Demonstration
from modeling_aim.data.mining import ClassFeatures
from modeling_aim.training.episodes import Episode, Mixture, ShotLaw

CLASSES, IMAGES = 6, 12
NAMES = [f"thing {number}" for number in range(CLASSES)]


def paint(path: Path, number: int, image: int) -> None:
    """An image whose red says its class and whose green says which of its images it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (20 * number, 10 * image, 7)).save(path)


def seen(demo: Demonstration) -> tuple[int, int]:
    """Class and number of a painted image."""
    red, green, _ = demo.images[0].getpixel((0, 0))
    return red // 20, green // 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("linked") / "classes0"  # the draws follow from its name
    for number, image in itertools.product(range(CLASSES), range(IMAGES)):
        paint(root / NAMES[number] / f"{image:02d}.png", number, image)
    return root


@pytest.fixture(scope="module")
def features(folder: Path) -> ClassFeatures:
    """Classes on a line of angles: the nearest of class 0 is class 1, and so on."""
    angles = torch.arange(CLASSES) * 0.3
    line = torch.stack([angles.cos(), angles.sin()], dim=1)
    return ClassFeatures(tuple(NAMES), line, line)


def read(source: Any, count: int, law: ShotLaw | None = None, seed: int = 0) -> list[Episode]:
    """The next episodes with their images opened."""
    stream: Iterator[Episode] = iter(Mixture([source], [1], law or ShotLaw(8), seed))
    return [episode.opened() for episode in itertools.islice(stream, count)]


def label(demo: Demonstration) -> str:
    return demo.text
