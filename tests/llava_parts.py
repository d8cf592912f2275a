"""Tiny vision towers and language models with their processors and tokenizers, and data in LLaVA's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from backbones import picture
from families import QWEN3_CHAT, QWEN_SPECIAL, make_tokenizer, text_settings, vision_settings

# As published language models write them: contents are strings.
LLAMA_CHAT = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
QWEN2_CHAT = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZE = {"height": 28, "width": 28}


def save_clip(folder: Path, whole: bool = False) -> str:
    """A CLIP tower of two layers and four patches; `whole`: a checkpoint with its text half."""
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(**vision_settings(image_size=28, patch_size=14, projection_dim=32))
    model: Any = hf.CLIPVisionModel(vision)
    if whole:
        text = hf.CLIPTextConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        )
        model = hf.CLIPModel(hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    model.save_pretrained(folder)
    hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIZE).save_pretrained(folder)
    return str(folder)


def save_siglip(folder: Path) -> str:
    """A SigLIP checkpoint, both halves, as they are published; its tower has no class token."""
    torch.manual_seed(0)
    vision = hf.SiglipVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = hf.SiglipTextConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    hf.SiglipModel(hf.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder)
    hf.SiglipImageProcessor(size=SIZE).save_pretrained(folder)
    return str(folder)


def save_llama(folder: Path, **more: Any) -> str:
    """A Llama whose tokenizer has neither a padding token nor one for images."""
    tokenizer = make_tokenizer([], "<s>", LLAMA_CHAT)
    tokenizer.pad_token = None
    return _save_language_model(folder, hf.LlamaForCausalLM, hf.LlamaConfig, tokenizer, **more)


def save_qwen(folder: Path, **more: Any) -> str:
    """A Qwen2 with a tied head and no BOS, whose turns end in another token than its texts."""
    tokenizer = make_tokenizer(QWEN_SPECIAL, None, QWEN2_CHAT)
    return _save_language_model(
        folder, hf.Qwen2ForCausalLM, hf.Qwen2Config, tokenizer, tie_word_embeddings=True, **more
    )


def save_qwen3(folder: Path, **more: Any) -> str:
    """A Qwen3 whose template takes strings and parts."""
    tokenizer = make_tokenizer(QWEN_SPECIAL, None, QWEN3_CHAT)
    return _save_language_model(folder, hf.Qwen3ForCausalLM, hf.Qwen3Config, tokenizer, head_dim=16, **more)


def _save_language_model(folder: Path, model_class: Any, config_class: Any, tokenizer: Any, **more: Any) -> str:
    torch.manual_seed(1)
    model_class(config_class(**text_settings(tokenizer, **more))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


CONVERSATIONS = (
    (("<image>\nWhat is this?", "A dax."), ("And its colour?", "It is red.")),
    (("Is it a wug?\n<image>", "Yes, a wug."),),
    (("<image>\nDescribe it.", "A small blicket on a table."),),
    (("What is a fep?", "I have never seen one."),),  # LLaVA-1.5's mixture has texts without an image
)


def save_data(folder: Path, count: int = 8) -> tuple[str, str]:
    """Captions and conversations in LLaVA's JSON, with their images in a folder beside it: what `--data` takes."""
    (folder / "images").mkdir(parents=True)
    captions, conversations = [], []
    for number in range(count):
        image = f"{number}.png"
        picture(number).save(folder / "images" / image)
        caption = [("<image>\nDescribe the image concisely.", f"a small thing number {number}")]
        captions.append(_record(number, image, caption))
        turns = CONVERSATIONS[number % len(CONVERSATIONS)]
        conversations.append(_record(number, image if "<image>" in turns[0][0] else None, turns))
    for name, records in (("captions", captions), ("conversations", conversations)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return tuple(f"llava:{folder / name}.json,images={folder / 'images'}" for name in ("captions", "conversations"))  # type: ignore[return-value]


def _record(number: int, image: str | None, turns: Any) -> dict[str, Any]:
    values = [
        {"from": who, "value": value} for turn in turns for who, value in zip(("human", "gpt"), turn, strict=True)
    ]
    return {"id": str(number), **({"image": image} if image else {}), "conversations": values}
