"""What the examples share: a model, drawn shapes with made-up names, and a question about each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent / "aim_tiny"))
import world

AIM_TINY = str(Path(__file__).resolve().parents[1] / "hub_configs" / "aim-tiny")


def load(repo: str) -> tuple[Any, Any]:
    """Model and processor of an AIM repository, with the code that it carries."""
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
    return model, AutoProcessor.from_pretrained(repo, trust_remote_code=True)


def shapes(
    ways: int, shots: int, seed: str = "bank", asked: int = 1
) -> tuple[list[dict[str, Any]], list[tuple[Any, str]]]:
    """Demonstrations of `ways` held-out concepts, `shots` of each, and `asked` new images of each with its name."""
    plan = world.plan_of(seed, ways, shots)
    demos = world.episode(seed, ways, shots).demos
    demo_keys = set(plan.demos)
    queries = []
    for way in range(ways):
        free = [i for i in range(world.IMAGES_PER_CONCEPT["test"]) if (way, i) not in demo_keys][:asked]
        queries += [(world.pool_image("test", plan.concept_ids[way], i), plan.bindings[way]) for i in free]
    return demos, queries


def ask(model: Any, processor: Any, image: Any, /, **options: Any) -> str:
    """What the model calls an image."""
    inputs = processor(images=image, text="<image> this is", return_tensors="pt")
    ids = model.generate(**inputs, **options, max_new_tokens=4, do_sample=False)
    words = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return words.split(".")[0].strip()
