"""What the tests of `aim eval` share: small tasks, settings, and what a run wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbones import picture
from PIL import Image

from modeling_aim.evaluation import EvalSettings, Example, Prediction, Shot, Task

ROOT = Path(__file__).resolve().parents[1]
AIM_TINY = str(ROOT / "hub_configs" / "aim-tiny")
UNTIMED = ("milliseconds", "reading_milliseconds", "first_token_milliseconds")
sys.path.insert(0, str(ROOT / "examples" / "aim_tiny"))
import world  # noqa: E402


class Naming(Task):
    """Held-out concepts under made-up names; another draw of concepts, names and images for each seed."""

    name, fixed, max_new_tokens = "naming", True, 4

    def __init__(self, path: str = "", *, count: int = 6, options: bool = False) -> None:
        self.count, self.options = count, options

    def examples(self, seed: int) -> Sequence[Example]:
        found = []
        for number in range(self.count):
            plan = world.plan_of(f"{seed}.{number}", 2, 4)
            name, image = plan.bindings[plan.query[0]], image_of(plan, plan.query)
            options = plan.bindings if self.options else ()
            found.append(Example(f"{seed}.{number}", (image,), "this is", (name,), tuple(options)))
        return found

    def shots(self, example: Example, count: int, seed: int) -> Sequence[Shot]:
        plan = world.plan_of(example.id, 2, 4)
        if count > len(plan.demos):
            raise ValueError(f"{self.name} has {len(plan.demos)} demonstrations, not {count}.")
        words = [world.WORDINGS["this"].demonstration(plan.bindings[way]) for way, _ in plan.demos]
        pairs = [{"image": image_of(plan, pick), "text": say} for pick, say in zip(plan.demos, words, strict=True)]
        return [Shot(f"{example.id}/{place}", pair) for place, pair in enumerate(pairs)][:count]

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        return {"accuracy": float(prediction.text.split(".")[0].strip() == example.answers[0])}


class Pictures(Task):
    """Random pictures with a word each, a pool to draw from; every second answer is a share of it."""

    name, max_new_tokens = "pictures", 3

    def __init__(self, path: str = "", *, count: int = 3, pool: int = 6, options: str = "") -> None:
        self.count, self.size, self.options = count, pool, tuple(filter(None, options.split("|")))

    def examples(self, seed: int) -> Sequence[Example]:
        return [
            Example(f"q{i}", (picture(100 + i),), f"What is number {i}?", ("cat",), self.options)
            for i in range(self.count)
        ]

    def pool(self) -> Sequence[Shot]:
        if not hasattr(self, "_pool"):
            words = ["cat", "dog", "bird"]
            pairs = [
                {"image": picture(i), "question": "What is it?", "answer": words[i % 3]} for i in range(self.size)
            ]
            self._pool = [Shot(f"p{i}", pair, str(pair["answer"])) for i, pair in enumerate(pairs)]
        return self._pool

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        return {"accuracy": (len(prediction.text) % 3) / 2}


def image_of(plan: world.Plan, pick: tuple[int, int]) -> Image.Image:
    return world.pool_image("test", plan.concept_ids[pick[0]], pick[1])


def settings(tmp_path: Path, **given: Any) -> EvalSettings:
    options: dict[str, Any] = {"repo": AIM_TINY, "tasks": ("naming",), "shots": (0, 2, 8), "seeds": 2}
    return EvalSettings(**{**options, "output": str(tmp_path / "run"), **given})


def predictions(folder: Path | str) -> list[dict[str, Any]]:
    lines = (Path(folder) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in UNTIMED} for line in lines]


def figures(results: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(cell["method"], cell["shots"]): cell for cell in results["cells"]}


def episode_file(folder: Path, count: int = 10, drawn: str = "file") -> Path:
    """Write naming episodes with their images, as `episodes:` takes them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        plan = world.plan_of(f"{drawn} {number}", 2, 2)

        def stored(pick: tuple[int, int], plan: world.Plan = plan) -> str:
            name = f"images/{plan.concept_ids[pick[0]]}-{pick[1]}.png"
            image_of(plan, pick).save(folder / name)
            return name

        demos = [{"image": stored(p), "text": f"this is {plan.bindings[p[0]]} ."} for p in plan.demos]
        query = {"image": stored(plan.query), "question": "this is", "answer": plan.bindings[plan.query[0]]}
        lines.append(json.dumps({"demos": demos, "queries": [query]}))
    (folder / "naming.jsonl").write_text("\n".join(lines))
    return folder / "naming.jsonl"
