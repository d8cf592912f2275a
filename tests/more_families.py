"""Builders as in `families.py` for backbones beyond those that AIM names; `docs/survey_backbones.py` tries them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from families import WIDTH, Pair, clip_vision, make_tokenizer, text_settings, vision_settings

CHAT = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)
TURNS = ["<|turn|>", "<|end|>"]


def tokenizer_with(image: str, bos: str | None = "<s>", more: tuple[str, ...] = (), **named: str) -> Any:
    """A tokenizer that knows special tokens by name (`tokenizer.boi_token`, ...); `image` stands for one in a chat."""
    tokenizer = make_tokenizer([*TURNS, *more], bos, CHAT.replace("IMAGE", image))
    if named:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": list(named.values())}, replace_extra_special_tokens=False
        )
        for name, token in named.items():
            tokenizer._set_model_specific_special_tokens({name: token})
    return tokenizer


def siglip(**more: Any) -> hf.SiglipVisionConfig:
    """A SigLIP tower with four patches an image."""
    settings = vision_settings(image_size=28, patch_size=14, **more)
    settings.pop("initializer_range")
    return hf.SiglipVisionConfig(**settings)


def internvl() -> Pair:
    """Tiles of one size."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = tokenizer_with("<IMG_CONTEXT>\\n", None, video_token="<video>", **names)
    config = hf.InternVLConfig(
        vision_config=vision_settings(image_size=[28, 28], patch_size=[7, 7]),
        text_config=hf.Qwen2Config(**text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = hf.GotOcr2ImageProcessor(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    processor = hf.InternVLProcessor(
        images, tokenizer, hf.InternVLVideoProcessor(), image_seq_length=4, chat_template=tokenizer.chat_template
    )
    return hf.InternVLForConditionalGeneration(config), processor


def gemma3() -> Pair:
    """Attention in both directions within an image, sliding windows, scaled embeddings."""
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image_soft>"}
    tokenizer = tokenizer_with("<boi>", **names)
    text = text_settings(tokenizer, head_dim=16, query_pre_attn_scalar=16, sliding_window=64)
    config = hf.Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        vision_config=siglip(vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids("<boi>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<eoi>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft>"),
    )
    images = hf.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    processor = hf.Gemma3Processor(images, tokenizer, tokenizer.chat_template, image_seq_length=4)
    model = hf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros when fresh
    return model, processor


def paligemma() -> Pair:
    """A prefix with attention in both directions; images in front, no chat template."""
    tokenizer = make_tokenizer([], "<s>")
    images = hf.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = hf.PaliGemmaProcessor(images, tokenizer)
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**text_settings(tokenizer, head_dim=16)),
        vision_config=siglip(vision_use_head=False, projection_dim=WIDTH),
        image_token_index=processor.image_token_id,
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def mllama() -> Pair:
    """Cross-attention, to tiles."""
    tokenizer = tokenizer_with("<|image|>", more=("<|python_tag|>", "<|image|>"))
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    config = hf.MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
        },
        text_config=text_settings(
            tokenizer, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        ),
        image_token_index=image,
    )
    images = hf.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4)
    model = hf.MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.ndim == 1 and len(parameter) == 1:
            parameter.data.fill_(1.0)  # with the zeros of a fresh model, images have no effect
    return model, hf.MllamaProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def mistral3() -> Pair:
    """Images of any size, with a token at the end of each row of patches."""
    tokenizer = tokenizer_with("[IMG]", more=("[IMG]", "[IMG_BREAK]", "[IMG_END]"))
    vision = {
        "image_size": 56,
        "patch_size": 7,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**vision_settings(**vision)),
        text_config=hf.MistralConfig(**text_settings(tokenizer, head_dim=16)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    images = hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14)
    processor = hf.PixtralProcessor(
        images, tokenizer, patch_size=7, spatial_merge_size=2, chat_template=tokenizer.chat_template
    )
    return hf.Mistral3ForConditionalGeneration(config), processor


def aya_vision() -> Pair:
    """Tiles, in front of a decoder with parallel attention and MLP."""
    more = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL")
    tokenizer = tokenizer_with("<image>", more=(*more, *(f"TILE_{i}" for i in range(1, 4))))
    config = hf.AyaVisionConfig(
        vision_config=siglip(vision_use_head=False),
        text_config=hf.Cohere2Config(**text_settings(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    images = hf.GotOcr2ImageProcessor(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    processor = hf.AyaVisionProcessor(
        images, tokenizer, patch_size=14, img_size=28, downsample_factor=2, chat_template=tokenizer.chat_template
    )
    return hf.AyaVisionForConditionalGeneration(config), processor


def cohere2_vision() -> Pair:
    """The same with other tokens."""
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>", "img_line_break_token": "<break>"}
    tokenizer = tokenizer_with("<image>", **names)
    config = hf.Cohere2VisionConfig(
        vision_config=siglip(vision_use_head=False),
        text_config=hf.Cohere2Config(**text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        downsample_factor=2,
        alignment_intermediate_size=128,
    )
    images = hf.Cohere2VisionImageProcessor(size={"height": 28, "width": 28}, max_patches=3, patch_size=1)
    processor = hf.Cohere2VisionProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    return hf.Cohere2VisionForConditionalGeneration(config), processor


def ovis2() -> Pair:
    """Images as mixtures of visual words."""
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tokenizer = tokenizer_with("<image>", None, more=("<image>", "<IMG_ATOM>", *marks))
    config = hf.Ovis2Config(
        vision_config=vision_settings(image_size=28, patch_size=7, vocab_size=64, hidden_stride=2),
        text_config=hf.Qwen2Config(**text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(list(marks)),
        vocab_size=len(tokenizer) + 2,
        hidden_size=WIDTH,
    )
    images = hf.Ovis2ImageProcessor(size={"height": 28, "width": 28}, max_patches=3)
    processor = hf.Ovis2Processor(
        images, tokenizer, tokenizer.chat_template, image_token="<image>", image_seq_length=4
    )
    return hf.Ovis2ForConditionalGeneration(config), processor


def llama4() -> Pair:
    """Experts, chunked attention, tiles; no model of its own below the LM head."""
    names = (
        "<|image|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|patch|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
    )
    tokenizer = tokenizer_with("<|image|>", more=names)
    text = text_settings(
        tokenizer, head_dim=16, intermediate_size_mlp=128, num_local_experts=4, attention_chunk_size=512
    )
    vision = vision_settings(image_size=28, patch_size=7, projector_input_dim=32, projector_output_dim=32)
    config = hf.Llama4Config(
        text_config=text,
        vision_config={**vision, "intermediate_size": 128, "vision_output_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
    )
    images = hf.Llama4ImageProcessor(size={"height": 28, "width": 28}, max_patches=4)
    processor = hf.Llama4Processor(
        images, tokenizer, patch_size=7, pixel_shuffle_ratio=0.5, chat_template=tokenizer.chat_template
    )
    return hf.Llama4ForConditionalGeneration(config), processor


def lfm2_vl() -> Pair:
    """Short convolutions between layers with attention."""
    names = ("<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    tokenizer = tokenizer_with("<image>", more=names)
    vision = vision_settings(patch_size=8, num_patches=64)
    vision.pop("initializer_range")
    config = hf.Lfm2VlConfig(
        vision_config=hf.Siglip2VisionConfig(**vision, vision_use_head=False),
        text_config=hf.Lfm2Config(**text_settings(tokenizer, layer_types=["conv", "full_attention", "conv"])),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projector_hidden_size=64,
    )
    images = hf.Lfm2VlImageProcessor(
        do_image_splitting=False, min_image_tokens=1, max_image_tokens=16, encoder_patch_size=8, tile_size=32
    )
    processor = hf.Lfm2VlProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    return hf.Lfm2VlForConditionalGeneration(config), processor


def glm4v() -> Pair:
    """M-RoPE, with images as videos of one frame."""
    names = (
        "<|image|>",
        "<|video|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
    )
    tokenizer = tokenizer_with("<|begin_of_image|><|image|><|end_of_image|>", None, more=names)
    image, video, start, end, video_start, video_end = tokenizer.convert_tokens_to_ids(list(names))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = hf.Glm4vConfig(
        text_config=text_settings(tokenizer, rope_parameters=rope),
        vision_config={
            **vision_settings(patch_size=14, image_size=84),
            "depth": 2,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "intermediate_size": 64,
        },
        image_token_id=image,
        video_token_id=video,
        image_start_token_id=start,
        image_end_token_id=end,
        video_start_token_id=video_start,
        video_end_token_id=video_end,
    )
    images = hf.Glm4vImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 2 * 84 * 84})
    processor = hf.Glm4vProcessor(images, tokenizer, hf.Glm4vVideoProcessor(), chat_template=tokenizer.chat_template)
    return hf.Glm4vForConditionalGeneration(config), processor


def llava_next_video() -> Pair:
    """LLaVA-NeXT that can take videos."""
    tokenizer = tokenizer_with("<image>", more=("<image>", "<video>"))
    tiles = [[28, 56], [56, 28], [56, 56]]
    config = hf.LlavaNextVideoConfig(
        vision_config=clip_vision(),
        text_config=hf.LlamaConfig(**text_settings(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tiles,
    )
    size = {"height": 28, "width": 28}
    processor = hf.LlavaNextVideoProcessor(
        hf.LlavaNextVideoVideoProcessor(size=size, crop_size=size),
        hf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=tiles),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    return hf.LlavaNextVideoForConditionalGeneration(config), processor


def deepseek_vl() -> Pair:
    """One size for every image."""
    tokenizer = tokenizer_with("<image_placeholder>", image_token="<image_placeholder>")
    config = hf.DeepseekVLConfig(
        text_config=text_settings(tokenizer),
        vision_config=siglip(vision_use_head=False),
        image_token_id=tokenizer.convert_tokens_to_ids("<image_placeholder>"),
    )
    images = hf.DeepseekVLImageProcessor(size={"height": 28, "width": 28}, min_size=14)
    processor = hf.DeepseekVLProcessor(images, tokenizer, chat_template=tokenizer.chat_template, num_image_tokens=4)
    return hf.DeepseekVLForConditionalGeneration(config), processor


def blip_2() -> Pair:
    """A few query tokens an image, in front of OPT."""
    tokenizer = make_tokenizer([], "<s>")
    processor = hf.Blip2Processor(
        hf.BlipImageProcessor(size={"height": 28, "width": 28}), tokenizer, num_query_tokens=4
    )
    text = text_settings(tokenizer, ffn_dim=128, word_embed_proj_dim=WIDTH, init_std=0.2)
    qformer = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = vision_settings(image_size=28, patch_size=14)
    config = hf.Blip2Config(
        vision_config=vision,
        qformer_config={**qformer, "encoder_hidden_size": 32, "vocab_size": 64},
        text_config=hf.OPTConfig(**text),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return hf.Blip2ForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[..., Pair]] = {
    "aya_vision": aya_vision,
    "blip-2": blip_2,
    "cohere2_vision": cohere2_vision,
    "deepseek_vl": deepseek_vl,
    "gemma3": gemma3,
    "glm4v": glm4v,
    "internvl": internvl,
    "lfm2_vl": lfm2_vl,
    "llama4": llama4,
    "llava_next_video": llava_next_video,
    "mistral3": mistral3,
    "mllama": mllama,
    "ovis2": ovis2,
    "paligemma": paligemma,
}
