"""Builders as in `popular_families.py`, of families whose vision tower is one of timm's: they need that package."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from families import Pair, text_settings
from popular_families import CHATML, chat, ids_of, tokenizer_of


def gemma3n() -> Pair:
    """Several streams of states, embeddings for each layer, layers that share keys and values."""
    template = chat("<image_soft_token>", "<start_of_turn>ROLE\n", "<end_of_turn>\n", start="<bos>")
    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    names |= {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
    tokenizer = tokenizer_of(["<start_of_turn>", "<end_of_turn>"], template, "<bos>", adds_bos=True, **names)
    words = len(tokenizer)
    text = text_settings(tokenizer, num_hidden_layers=4, head_dim=16, sliding_window=64, vocab_size=words + 16)
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    text |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": words, "laurel_rank": 8}
    text |= {"activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2}
    eyes = {"architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": 8, "vocab_offset": words}
    sound = {"conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "hidden_size": 32, "input_feat_size": 16}
    config = hf.Gemma3nConfig(
        text_config=text,
        vision_config=eyes,
        audio_config={**sound, "sscp_conv_channel_size": [8, 8], "vocab_size": 8, "vocab_offset": words + 8},
        vision_soft_tokens_per_image=4,
        **ids_of(
            tokenizer,
            image_token_id="<image_soft_token>",
            boi_token_id="<start_of_image>",
            eoi_token_id="<end_of_image>",
            audio_token_id="<audio_soft_token>",
            boa_token_id="<start_of_audio>",
            eoa_token_id="<end_of_audio>",
        ),
    )
    processor = hf.Gemma3nProcessor(
        hf.Gemma3nAudioFeatureExtractor(),
        hf.SiglipImageProcessor(size={"height": 64, "width": 64}),
        tokenizer,
        chat_template=template,
        image_seq_length=4,
    )
    model = hf.Gemma3nForConditionalGeneration(config)
    draw_tower(model.model.vision_tower)
    return model, processor


def perception_lm() -> Pair:
    """Tiles and a thumbnail; BOS by the chat template alone."""
    template = chat("<|image|>", "<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", "<|begin_of_text|>")
    special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    tokenizer = tokenizer_of(special, template, "<|begin_of_text|>", **names)
    tower = {"img_size": [64, 64], "embed_dim": 64}
    config = hf.PerceptionLMConfig(
        vision_config=hf.TimmWrapperConfig(architecture="test_vit", model_args=tower, do_pooling=False),
        text_config=hf.LlamaConfig(**text_settings(tokenizer)),
        vision_use_cls_token=True,
        projector_pooling_ratio=2,
        **ids_of(tokenizer, image_token_id="<|image|>", video_token_id="<|video|>"),
    )
    size = {"height": 64, "width": 64}
    processor = hf.PerceptionLMProcessor(
        hf.PerceptionLMVideoProcessor(size=size),
        hf.PerceptionLMImageProcessor(tile_size=64, max_num_tiles=2, size=size),
        tokenizer,
        patch_size=16,
        pooling_ratio=2,
        chat_template=template,
    )
    return hf.PerceptionLMForConditionalGeneration(config), processor


def fast_vlm() -> Pair:
    """LLaVA behind a convolutional tower."""
    template = chat("<image>\n", *CHATML)
    tokenizer = tokenizer_of(["<|im_start|>", "<|im_end|>", "<image>"], template)
    config = hf.FastVlmConfig(
        vision_config=hf.TimmWrapperConfig(architecture="test_efficientnet", hidden_size=256, do_pooling=False),
        text_config=hf.Qwen2Config(**text_settings(tokenizer)),
        image_seq_length=4,
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    size = {"height": 64, "width": 64}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=template,
    )
    model = hf.FastVlmForConditionalGeneration(config)
    draw_tower(model.model.vision_tower)
    return model, processor


def draw_tower(tower: torch.nn.Module) -> None:
    """Draw the weights of convolutions as timm does: with transformers' own range, 1e-14 is left of an image."""
    for weight in tower.parameters():
        if weight.ndim == 4:
            torch.nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


BUILDERS: dict[str, Callable[..., Pair]] = {"fast_vlm": fast_vlm, "gemma3n": gemma3n, "perception_lm": perception_lm}
