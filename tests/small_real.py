"""Backbones of published configs in small: the real class and settings, few and narrow layers, random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from backbones import build
from transformers import AutoConfig, AutoModelForImageTextToText

from modeling_aim.speed.published import BACKBONES

LAYERS = 4  # of the decoder
# What is taken from the tests' tiny model of the same class: widths, and what has to fit its tokenizer and processor.
SMALL = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types", "num_attention_heads", "head_dim",
    "num_key_value_heads", "vocab_size", "rope_parameters", "initializer_range", "scale_factor",
}  # fmt: skip


def small_backbone(name: str, folder: Path) -> str:
    """Save the backbone of a folder of `hub_configs/` in small, with a processor; return its Hub id."""
    hub_id, published = BACKBONES[name][:2]
    tiny = build(published["model_type"], num_hidden_layers=LAYERS)
    real = AutoConfig.for_model(**copy.deepcopy(published)).to_dict()
    config = AutoConfig.for_model(**_smaller(real, tiny.model.config.to_dict()))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config = tiny.model.generation_config
    model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return hub_id


def _smaller(real: dict[str, Any], tiny: dict[str, Any]) -> dict[str, Any]:
    text = {name: tiny["text_config"].get(name, value) for name, value in real["text_config"].items()
            if name in SMALL or name.endswith("token_id")}  # fmt: skip
    parts = {"text_config": {**real["text_config"], **text}, "vision_config": tiny["vision_config"]}
    top = {name: tiny[name] for name in real if name in tiny and (name in SMALL or "token" in name)}
    return {**real, **top, **parts}
