"""Tiny randomly initialised backbones of the real classes, with their real processors, built offline from config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from modeling_aim import AimForConditionalGeneration

WIDTH = 64


def make_tokenizer(special: list[str], bos: str | None, chat_template: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with `special` tokens; nothing is out of its vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=bos,
        eos_token="</s>",
        additional_special_tokens=special,
        chat_template=chat_template,
    )
    if bos is not None:
        from tokenizers.processors import TemplateProcessing

        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fast.convert_tokens_to_ids(bos))]
        )
    return fast


LLAVA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] | selectattr('type', 'equalto', "
    "'image') %}{{ '<image>\\n' }}{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IDEFICS_CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ m['role'].capitalize() + ':' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<end_of_utterance>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def text_settings(tokenizer: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
        **more,
    }


def llava(**text: Any) -> tuple[Any, Any]:
    tokenizer = make_tokenizer(["<image>"], "<s>", LLAVA_CHAT)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=32,
        initializer_range=0.5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text_settings(tokenizer, **text)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    return LlavaForConditionalGeneration(config), processor


def qwen2_5_vl(**text: Any) -> tuple[Any, Any]:
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = make_tokenizer(special, None, QWEN_CHAT)
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    settings = text_settings(tokenizer, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, **text)
    config = Qwen2_5_VLConfig(
        text_config=settings,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=84 * 84),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=QWEN_CHAT,
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def idefics3(**text: Any) -> tuple[Any, Any]:
    special = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    special += [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
    tokenizer = make_tokenizer(special, "<s>", IDEFICS_CHAT)
    config = Idefics3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.3,
        },
        text_config=LlamaConfig(**text_settings(tokenizer, **text)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS_CHAT,
    )
    return Idefics3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[..., tuple[Any, Any]]] = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "idefics3": idefics3}


@dataclass
class Backbone:
    """A tiny backbone with its processor."""

    family: str
    model: Any
    processor: Any


def build(family: str, seed: int = 0, **text: Any) -> Backbone:
    """The tiny backbone of `family`, the same each time; `text` are settings of its text decoder."""
    torch.manual_seed(seed)
    model, processor = FAMILIES[family](**text)
    model.eval()
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
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
    """A new plug-in with the settings of `from_backbone`; the projector's weights are the same each time."""
    backbone = build(family)
    torch.manual_seed(1)
    return Plugin(family, AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor, **settings))
