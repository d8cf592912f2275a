"""What differs between families of backbones: data, keyed by `model_type`. All else is asked of the backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How a family differs from what AIM expects of any backbone; most do not.

    Args:
        processor: class of its processor, where that differs.
        image_token: stands for an image in a prompt, where its processor does not say; empty when the processor puts
            images in front by itself.
        images_between_words: the processor takes a prompt as a list of words and images, not as one text.
    """

    processor: str | None = None
    image_token: str | None = None
    images_between_words: bool = False


FAMILIES = {
    "aya_vision": Family(),
    "blip-2": Family(processor="Blip2Processor", image_token=""),
    "cohere2_vision": Family(),
    "deepseek_vl": Family(),
    "gemma3": Family(),
    "glm4v": Family(),
    "idefics": Family(processor="IdeficsProcessor", image_token="<image>", images_between_words=True),
    "idefics2": Family(),
    "idefics3": Family(),
    "internvl": Family(),
    "lfm2_vl": Family(),
    "llama4": Family(),
    "llava": Family(),
    "llava_next": Family(),
    "llava_next_video": Family(),
    "llava_onevision": Family(),
    "mistral3": Family(),
    "mllama": Family(),
    "ovis2": Family(),
    "paligemma": Family(),
    "qwen2_5_vl": Family(),
    "qwen2_vl": Family(),
    "qwen3_5": Family(),
    "qwen3_5_moe": Family(),
    "qwen3_vl": Family(),
    "qwen3_vl_moe": Family(),
    "smolvlm": Family(),
    "vipllava": Family(),
}


def family_of_processor(processor: Any) -> Family:
    """The family whose processor differs and is of this class; an ordinary one otherwise."""
    name = type(processor).__name__
    return next((family for family in FAMILIES.values() if family.processor == name), Family())
