"""What `aim check` runs: the model to check, with images small enough for a check to end, and all properties on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from .. import AimConfig, AimForConditionalGeneration, AimProcessor, laptop_quantization_config
from ..backbone_aim import check_usable
from . import answering, reading  # noqa: F401  they register the properties
from .case import PROPERTIES, Case, NotApplicable, noise

LAYERS = 2  # of the text decoder of a backbone that is made from its config; its towers get one
INNER = 256  # inner width of its towers' MLPs
ONE_TILE = {"do_image_splitting": False, "crop_to_patches": False, "do_pan_and_scan": False}
LARGEST_IMAGE = 2**20  # numbers in the pixels of an image of a check; one tile of 512 x 512 has 786 432


@dataclass(frozen=True)
class Outcome:
    """The result of checking a property on a backbone: it holds where neither `problem` nor `beside` is given.

    Args:
        name: of the property.
        sentence: what it says.
        problem: why it does not hold.
        beside: why it does not apply: what the backbone itself does otherwise.
    """

    name: str
    sentence: str
    problem: str | None = None
    beside: str | None = None


def try_properties(model: AimForConditionalGeneration) -> Iterator[Outcome]:
    """Try every property on `model`."""
    case = Case(model)
    for tried in PROPERTIES.values():
        problem = beside = None
        try:
            tried(case)
        except NotApplicable as reason:
            beside = str(reason).splitlines()[0][:300]
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:300] or type(error).__name__
        yield Outcome(tried.name, tried.sentence, problem, beside)


def run_checks(model: AimForConditionalGeneration) -> Iterator[tuple[str, str | None]]:
    """Try every property that applies to `model`; yields what it says and, where it does not hold, why."""
    return ((o.sentence, o.problem) for o in try_properties(model) if o.beside is None)


def check_model(
    backbone: str,
    revision: str | None = None,
    from_config: bool = False,
    load_in_4bit: bool = False,
    device_map: str | None = None,
) -> AimForConditionalGeneration:
    """The model to check: an AIM repository, or a backbone that answers without training where it can.

    Its processor makes small images, whatever the repository's settings are: what is checked does not depend on them.

    Args:
        backbone: folder or Hub id of either.
        revision: its revision.
        from_config: build the backbone from its config with random weights, two layers of text and one of vision;
            needs no weights.
        load_in_4bit: load the backbone in 4-bit.
        device_map: where the backbone goes.
    """
    place: dict[str, Any] = {} if revision is None else {"revision": revision}
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if load_in_4bit:
        options["quantization_config"] = laptop_quantization_config()
    config = AutoConfig.from_pretrained(backbone, **place)
    known: Any = backbone
    processor = None
    if from_config:
        config = config.backbone_config if isinstance(config, AimConfig) else config
        known, processor = random_backbone(config), AimProcessor.from_pretrained(backbone, **place)
        place, options = {}, {}
    if isinstance(config, AimConfig):
        model = AimForConditionalGeneration.from_pretrained(backbone, **place, **options)
    else:
        model = without_training(known, processor, {**place, **options})
    make_images_small(model)
    return model


def without_training(
    backbone: str | PreTrainedModel, processor: AimProcessor | None, options: dict[str, Any]
) -> AimForConditionalGeneration:
    """AIM on a backbone, with states put back at depth where the backbone can, as in the paper where it cannot."""
    try:
        return AimForConditionalGeneration.from_backbone(backbone, processor, **options)
    except ValueError as error:
        if "preset='paper'" not in str(error):
            raise
    return AimForConditionalGeneration.from_backbone(backbone, processor, preset="paper", **options)


def random_backbone(config: Any) -> Any:
    """A backbone with random weights of the real widths and few layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = min(text.num_hidden_layers, LAYERS)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    towers = [getattr(config, name) for name in config.sub_configs if name.startswith("vision")]
    if not isinstance(getattr(config, "vision_feature_layers", None), list):  # they count the tower's layers
        for tower in towers:
            _cut_tower(tower)
    torch.manual_seed(0)
    backbone = AutoModelForImageTextToText.from_config(config)
    check_usable(backbone)
    return backbone


def _cut_tower(tower: PreTrainedConfig) -> None:
    """Give a vision tower one layer with a narrow MLP: it takes most of the time of a check."""
    for name, most in (("num_hidden_layers", 1), ("depth", 1), ("intermediate_size", INNER)):
        if isinstance(getattr(tower, name, None), int):
            setattr(tower, name, min(getattr(tower, name), most))
    for name, value in vars(tower).items():
        if name.endswith("_indexes") and isinstance(value, list):  # of layers that are no longer there
            setattr(tower, name, [0])


def make_images_small(model: AimForConditionalGeneration) -> None:
    """Have the model's processor, in a copy, make few tiles of an image: a check takes some hundred images."""
    processor = copy.deepcopy(model.processor)
    images = processor.image_processor
    tile = getattr(images, "max_image_size", None)
    if isinstance(tile, dict) and "longest_edge" in tile and _numbers(processor) > LARGEST_IMAGE:
        images.size = type(images.size)(**tile)  # else images are enlarged before they are made small again
        model.processor = processor
    for name, value in ONE_TILE.items():
        if _numbers(processor) <= LARGEST_IMAGE:
            return
        if getattr(images, name, None) is not None:
            setattr(images, name, value)
            model.processor = processor


def _numbers(processor: AimProcessor) -> int:
    """How many numbers the pixels of an image of a check are."""
    inputs = processor(images=[[noise(1)]], text=[processor.prompt("a")], return_tensors="pt")
    return sum(value.numel() for name, value in inputs.items() if name.startswith("pixel_values"))
