"""What differs between families of backbones: data, keyed by `model_type`. All else is taken from the backbone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How a family differs from what AIM expects of any backbone; most do not.

    Args:
        processor: class of its processor, where that differs.
        image_token: the placeholder of an image in a prompt, where its processor has none; empty when the processor
            puts images in front by itself.
        images_between_words: the processor takes a prompt as a list of words and images, not as one text.
        flat_images: the processor takes the images of all prompts as one list, not as one a prompt.
        words_alone: how prompts are written for the tokenizer (`"{bos}{words}"`) where none has an image and the
            processor refuses such batches.
        read_alone: read demonstrations one at a time: the processor refuses images with different numbers of tiles,
            the backbone numbers images across rows, or images are padded to a common size before they become tokens.
        blank_image: the backbone requires `pixel_values` even for text alone; zeros are passed, and without a
            placeholder they are not used.
        prefix_kv: when a prompt can continue the KV of its prefix: `"always"`; `"unpadded"` where padding between the
            two counts as positions; `"never"` where words attend to later ones, positions are lost, or every prompt
            needs an image.
        states_at_depth: its decoder layers pass on one state a token, `(batch, length, width)`. Where `False`, states
            are read after the last layer and enter at the input alone.
    """

    processor: str | None = None
    image_token: str | None = None
    images_between_words: bool = False
    flat_images: bool = False
    words_alone: str | None = None
    read_alone: bool = False
    blank_image: bool = False
    prefix_kv: str = "always"
    states_at_depth: bool = True


FAMILIES = {
    "aria": Family(),
    "aya_vision": Family(),
    "blip-2": Family(processor="Blip2Processor", image_token="", blank_image=True, prefix_kv="never"),
    "chameleon": Family(),
    "cohere2_vision": Family(),
    "deepseek_vl": Family(),
    "deepseek_vl_hybrid": Family(),
    "emu3": Family(read_alone=True),
    "ernie4_5_vl_moe": Family(),
    "exaone4_5": Family(),
    "fast_vlm": Family(),
    "fuyu": Family(processor="FuyuProcessor", image_token=""),
    "gemma3": Family(),
    "gemma3n": Family(states_at_depth=False),
    "gemma4": Family(),
    "gemma4_unified": Family(),
    "glm46v": Family(),
    "glm4v": Family(),
    "glm4v_moe": Family(),
    "glm_ocr": Family(),
    "got_ocr2": Family(processor="GotOcr2Processor", flat_images=True, words_alone="{words}"),
    "granite4_vision": Family(),
    "granite_docling": Family(),
    "hunyuan_vl": Family(read_alone=True, prefix_kv="never"),
    "hyperclovax_vision_v2": Family(prefix_kv="unpadded"),
    "idefics": Family(processor="IdeficsProcessor", image_token="<image>", images_between_words=True),
    "idefics2": Family(),
    "idefics3": Family(),
    "internvl": Family(),
    "janus": Family(),
    "kimi_k25": Family(),
    "lfm2_vl": Family(),
    "lfm3_vl": Family(),
    "lighton_ocr": Family(),
    "llama4": Family(),
    "llava": Family(),
    "llava_next": Family(),
    "llava_next_video": Family(),
    "llava_onevision": Family(),
    "minicpmv4_6": Family(),
    "minimax_m3_vl": Family(),
    "mistral3": Family(),
    "mllama": Family(),
    "molmo2": Family(),
    "ovis2": Family(),
    "paddleocr_vl": Family(),
    "paligemma": Family(processor="PaliGemmaProcessor", words_alone="{bos}{words}\n", prefix_kv="never"),
    "perception_lm": Family(read_alone=True),
    "qianfan_ocr": Family(),
    "qwen2_5_omni_thinker": Family(prefix_kv="never"),
    "qwen2_5_vl": Family(),
    "qwen2_vl": Family(),
    "qwen3_5": Family(),
    "qwen3_5_moe": Family(),
    "qwen3_omni_moe_thinker": Family(prefix_kv="never"),
    "qwen3_vl": Family(),
    "qwen3_vl_moe": Family(),
    "smolvlm": Family(),
    "video_llama_3": Family(),
    "video_llava": Family(),
    "vipllava": Family(),
}


def family_of_processor(processor: object) -> Family:
    """The family whose processor differs and is of this class; an ordinary one otherwise."""
    name = type(processor).__name__
    return next((family for family in FAMILIES.values() if family.processor == name), Family())


def family_of(model_type: str) -> Family:
    """The family of a model type; an ordinary one where it is not known."""
    return FAMILIES.get(model_type, Family())
