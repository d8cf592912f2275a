"""Tiny backbones and plug-ins on them, demonstrations, and scripts that run without the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, MORE_FAMILIES
from forked import run_python
from PIL import Image

from modeling_aim import AimForConditionalGeneration, Demonstration

# One family of each kind of architecture, for tests that would be the same on the others.
KINDS = (*FAMILIES, "qwen3_vl", "qwen3_5_moe", "idefics", "idefics2")


def slow_unless_of_its_kind(family: str, param: Any) -> Any:
    """A parameter of a test; the test is slow for families other than `KINDS`."""
    import pytest  # scripts without tests import this file too

    return pytest.param(param, marks=() if family in KINDS else pytest.mark.slow)


@dataclass
class Backbone:
    """A tiny backbone with its processor."""

    family: str
    model: Any
    processor: Any

    def save(self, folder: Path) -> str:
        """Write what a backbone's own repository holds; the folder's path."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return str(folder)


def build(family: str, seed: int = 0, **text: Any) -> Backbone:
    """The tiny backbone of `family`, the same each time; `text` are settings of its text decoder."""
    torch.manual_seed(seed)
    model, processor = {**FAMILIES, **MORE_FAMILIES}[family](**text)
    model.eval()
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    image = getattr(model.config, "image_token_id", None)
    if image is not None:
        model.generation_config.suppress_tokens = [image]  # random weights would draw it now and then
    processor.tokenizer.padding_side = "left"
    return Backbone(family, model, processor)


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A picture of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), generator=generator).byte().numpy())


DEMOS: tuple[Any, ...] = (
    (picture(0), "dax"),
    (picture(1, (64, 40)), "a blue wug is here."),
    {"text": "A sentence without any image."},
    {"images": [picture(2), picture(3, (30, 52))], "question": "Which one?", "answer": "The second one."},
    {"image": picture(4), "label": "blicket"},
)


@dataclass
class Plugin:
    """An untrained plug-in on a tiny backbone."""

    family: str
    model: AimForConditionalGeneration

    @property
    def backbone(self) -> Any:
        return self.model.backbone

    @property
    def processor(self) -> Any:
        return self.model.processor

    def query(self, *questions: str, image: int | None = 9) -> dict[str, Any]:
        """A left-padded batch of questions, each with an image of its own (or none of them, for `image=None`)."""
        questions = questions or ("What is this?",)
        prompts = [self.processor.prompt(question, images=image is not None) for question in questions]
        pictures = None if image is None else [[picture(image + row)] for row in range(len(questions))]
        return dict(self.processor(images=pictures, text=prompts, padding=True, return_tensors="pt"))

    def answer(self, inputs: dict[str, Any], demos: Any = None, **options: Any) -> torch.Tensor:
        """The new tokens, greedily chosen unless `options` say otherwise."""
        options = {"max_new_tokens": 6, "do_sample": False, **options}
        output = self.model.generate(**inputs, demos=demos, **options)
        length = inputs["input_ids"].shape[1]
        assert torch.equal(
            output[:, :length], inputs["input_ids"].repeat_interleave(len(output) // len(inputs["input_ids"]), 0)
        )
        return output[:, length:]


def plugin(family: str, **settings: Any) -> Plugin:
    """A new plug-in with the settings of `from_backbone`; the projector's weights are the same each time.

    A projector at depth begins as the identity: its weights are changed a little, so that it is one of its own.
    """
    backbone = build(family)
    torch.manual_seed(1)
    last = bool({-1, 3} & set(settings.get("read_layers", ())))  # after the last layer: for the input alone
    settings = {"preset": "paper" if last else "trained", **settings}
    if settings["preset"] == "trained" and "projector_form" not in settings:
        settings = {"read_layers": [1], **settings}  # one depth: depth 0 embeds the words once more, which tests count
    model = AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor, **settings)
    if model.config.enters_at_depth and len(model.projector.layers):
        torch.nn.init.normal_(model.projector.layers[-1].weight, std=0.05)
    return Plugin(family, model)


def on_disk(folder: Path) -> dict[str, Any]:
    """`DEMOS` and the image of `Plugin.query` as files, for a script."""
    folder.mkdir(exist_ok=True)
    demos = []
    for number, demo in enumerate(map(Demonstration.of, DEMOS)):
        paths = [folder / f"{number}-{i}.png" for i in range(len(demo.images))]
        for image, path in zip(demo.images, paths, strict=True):
            image.save(path)
        words = {"question": demo.question, "answer": demo.text} if demo.question else {"text": demo.text}
        demos.append({"images": [str(path) for path in paths], **words})
    picture(9).save(folder / "query.png")
    return {"demos": demos, "image": str(folder / "query.png"), "question": "What is this?"}


WITHOUT_PACKAGE = """
import json, sys
sys.modules["modeling_aim"] = None  # importing it fails, as where it is not installed
given = json.loads(sys.argv[1])
"""


def run_without_package(code: str, given: dict[str, Any], env: dict[str, str] | None = None) -> Any:
    """What `code` prints last, as JSON: a script that has `given` and cannot import the package."""
    done = run_python(["-c", WITHOUT_PACKAGE + code, json.dumps(given)], env=env)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
