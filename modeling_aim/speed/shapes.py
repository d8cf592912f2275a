"""Backbones at real sizes with random weights, and how an image enters a prompt of each: speed depends on no more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ..image_settings import TRIED
from ..processing_aim import AimProcessor
from .published import BACKBONES, CLIP_L, llama


@dataclass(frozen=True)
class Picture:
    """How one image enters a prompt.

    Args:
        tokens: places that it takes among the words.
        pixels: shape of what `pixel_values` holds of it.
        rows: `pixel_values` has a row for each row of the batch, with the parts of its images along the second axis;
            else the images of all rows follow one another along the first.
        more: further inputs, one row an image.
        typed: the backbone takes a marker of image tokens (`mm_token_type_ids`).
    """

    tokens: int
    pixels: tuple[int, ...]
    rows: bool = False
    more: dict[str, tuple[int, ...]] = field(default_factory=dict)
    typed: bool = False


GRID = (50, 80)  # patches of an image of any size


def _side(config: PreTrainedConfig) -> int:
    """Patches along one side of what the vision tower sees at once."""
    return config.vision_config.image_size // config.vision_config.patch_size


def _whole(config: PreTrainedConfig) -> Picture:
    """One size for every image."""
    size = config.vision_config.image_size
    tokens = _side(config) ** 2 + (getattr(config, "vision_feature_select_strategy", "default") == "full")
    return Picture(tokens, (1, 3, size, size))


def _tiles_in_rows(config: PreTrainedConfig) -> Picture:
    """Two by two tiles and a small copy of the whole image; a token ends each line of the tiles."""
    size, lines = config.vision_config.image_size, 2 * _side(config)
    tokens = _side(config) ** 2 + lines * (lines + 1)
    return Picture(tokens, (1, 5, 3, size, size), more={"image_sizes": (2 * size, 2 * size)})


def _patches(config: PreTrainedConfig) -> Picture:
    """Patches of an image of any size; every 2 x 2 become one token."""
    vision = config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = GRID[0] * GRID[1]
    tokens = patches // vision.spatial_merge_size**2
    return Picture(tokens, (patches, width), more={"image_grid_thw": (1, *GRID)}, typed=True)


def _split(config: PreTrainedConfig, tiles: int = 17) -> Picture:
    """Four by four tiles and a small copy of the whole image; the tokens that name the tiles are left out."""
    size = config.vision_config.image_size
    tokens = tiles * _side(config) ** 2 // config.scale_factor**2
    return Picture(tokens, (tiles, 3, size, size), rows=True)


PICTURES: dict[str, Callable[[Any], Picture]] = {
    "idefics3": _split,
    "llava": _whole,
    "llava_next": _tiles_in_rows,
    "qwen2_5_vl": _patches,
    "qwen2_vl": _patches,
    "qwen3_vl": _patches,
    "smolvlm": _split,
    "vipllava": _whole,
}


def picture_of(config: PreTrainedConfig) -> Picture:
    """How an image enters a prompt of this backbone.

    Raises:
        ValueError: its family is not known.
    """
    if config.model_type not in PICTURES:
        raise ValueError(
            f"aim bench does not know how an image enters {config.model_type}; it knows {', '.join(PICTURES)}."
        )
    return PICTURES[config.model_type](config)


def picture_with(config: PreTrainedConfig, processor: AimProcessor) -> Picture:
    """How an image of 500 x 400 pixels enters a prompt of this backbone, with the settings of its processor.

    Args:
        config: of the backbone.
        processor: an `AimProcessor`.

    Raises:
        ValueError: its family is not known.
    """
    usual = picture_of(config)
    image = Image.new("RGB", TRIED, "gray")
    made = processor(images=[[image]], text=[processor.front(1) + "a"], return_tensors="pt")
    image_id = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
    tokens = int((made["input_ids"] == image_id).sum())
    pixels = tuple(made["pixel_values"].shape[usual.rows :])
    more = {name: tuple(made[name][0].tolist()) for name in usual.more}
    return replace(usual, tokens=tokens, pixels=pixels, more=more)


def _small(image_size: int, **text: Any) -> dict[str, Any]:
    """A decoder as wide as deep ones of 1B, and a small vision tower: few-shot prompts that two cores can read."""
    vision = {**CLIP_L, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12}
    vision.update(num_attention_heads=6, image_size=image_size)
    decoder = {**llama(1024, 8, 16, 4096, num_key_value_heads=4, vocab_size=32064), "tie_word_embeddings": True}
    return {
        "model_type": "llava", "vision_config": vision, "image_token_index": 32000, "tie_word_embeddings": True,
        "text_config": {**decoder, "max_position_embeddings": 32768, **text},
    }  # fmt: skip


def _tiny() -> dict[str, Any]:
    """Seconds for everything, for tests."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = _small(28, **size, intermediate_size=128, vocab_size=512)
    config["vision_config"] = {**config["vision_config"], "num_hidden_layers": 2, "hidden_size": 48}
    return {**config, "image_token_index": 511}


def _published(folder: str, text_of: str | None = None) -> dict[str, Any]:
    """A published backbone; with the text decoder of another one."""
    config = copy.deepcopy(BACKBONES[folder][1])
    if text_of is not None:
        config["text_config"] = copy.deepcopy(BACKBONES[text_of][1]["text_config"])
    return config


SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": _published("llava-1.5-7b"),
    "llava-1.5-13b": _published("llava-1.5-13b"),
    "llava-next-7b": _published("llava-v1.6-mistral-7b", text_of="llava-1.5-7b"),
    "llava-next-mistral-7b": _published("llava-v1.6-mistral-7b"),
    "qwen2-vl-2b": _published("Qwen2-VL-2B"),
    "qwen2-vl-7b": _published("Qwen2-VL-7B"),
    "qwen2.5-vl-3b": _published("Qwen2.5-VL-3B"),
    "qwen2.5-vl-7b": _published("Qwen2.5-VL-7B"),
    "qwen3-vl-4b": _published("Qwen3-VL-4B"),
    "qwen3-vl-8b": _published("Qwen3-VL-8B"),
    "idefics3-8b": _published("Idefics3-8B-Llama3"),
    "smolvlm-256m": _published("SmolVLM-256M"),
    "smolvlm-500m": _published("SmolVLM-500M"),
    "smolvlm-2.2b": _published("SmolVLM-2.2B"),
    "idefics3-8b-whole": _published("Idefics3-8B-Llama3"),
    "smolvlm-256m-whole": _published("SmolVLM-256M"),
    "smolvlm-2.2b-whole": _published("SmolVLM-2.2B"),
    "cpu-576": _small(336),
    "cpu-64": _small(112),
    "tiny": _tiny(),
}


def shape_config(name: str) -> Any:
    """The configuration of a backbone of `SHAPES`.

    Raises:
        ValueError: there is no shape of this name.
    """
    if name not in SHAPES:
        raise ValueError(f"There is no shape {name!r}; there are {', '.join(SHAPES)}.")
    return AutoConfig.for_model(**copy.deepcopy(SHAPES[name]))


def shape_picture(name: str) -> Picture:
    """How an image enters a backbone of `SHAPES`: `-whole` ones do not split it into tiles."""
    config = shape_config(name)
    return _split(config, tiles=1) if name.endswith("-whole") else picture_of(config)


def random_backbone(config: PreTrainedConfig, dtype: torch.dtype, device: str, load_in_4bit: bool = False) -> Any:
    """A backbone with random weights.

    Args:
        config: its configuration.
        dtype: precision of what is not quantized.
        device: where it is made; with `load_in_4bit`, first of all in `dtype`.
        load_in_4bit: quantize the layers of the text decoder, as `laptop_quantization_config` says.

    Raises:
        ValueError: the machine has less memory than the weights need.
    """
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    needed = sum(p.numel() for p in empty.parameters()) * dtype.itemsize
    free = free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"The weights need {needed / 2**30:.1f} GiB, but {device} has {free / 2**30:.1f} GiB free. Choose a "
            "smaller --shape, or count without weights: --count-only."
        )
    torch.manual_seed(0)
    with torch.device(device):
        backbone = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    return _in_4bit(backbone) if load_in_4bit else backbone


def free_memory(device: str) -> int | None:
    """Bytes that can still be taken on a device; `None` where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            memory = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(memory["MemAvailable"].split()[0]) * 1024


def _in_4bit(backbone: PreTrainedModel) -> Any:
    """Quantize the linear layers of the text decoder, one after another."""
    import bitsandbytes

    from ..backbone_aim import decoder_layers, laptop_quantization_config

    settings = laptop_quantization_config()
    for layer in decoder_layers(backbone):
        for module in list(layer.modules()):
            for name, linear in list(module.named_children()):
                if type(linear) is nn.Linear:
                    quantized = bitsandbytes.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=linear.bias is not None,
                        compute_dtype=settings.bnb_4bit_compute_dtype,
                        compress_statistics=settings.bnb_4bit_use_double_quant,
                        quant_type=settings.bnb_4bit_quant_type,
                        device="meta",
                    )
                    weight = linear.weight.data
                    quantized.weight = bitsandbytes.nn.Params4bit(
                        weight.cpu(), requires_grad=False, quant_type=settings.bnb_4bit_quant_type
                    )
                    quantized.bias = linear.bias
                    setattr(module, name, quantized.to(weight.device))
    return backbone
