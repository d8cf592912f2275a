"""The published config.json of backbones that people use, by the folder of `hub_configs/` that is made of each."""

from __future__ import annotations

from typing import Any

CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "patch_size": 14,
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}  # fmt: skip


def llama(width: int, layers: int, heads: int, inner: int, **more: Any) -> dict[str, Any]:
    """A text decoder of the LLaMA kind."""
    return {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": inner, "num_key_value_heads": heads, **more,
    }  # fmt: skip


def llava(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    text = llama(width, layers, heads, inner, vocab_size=32064, max_position_embeddings=4096)
    return {"model_type": "llava", "vision_config": CLIP_L, "text_config": text, "image_token_index": 32000}


def qwen2(width: int, layers: int, heads: int, kv: int, inner: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": inner, "vocab_size": vocab, "max_position_embeddings": 32768, **more,
    }  # fmt: skip


def qwen_vl(kind: str, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> dict[str, Any]:
    sections = [24, 20, 20] if kind == "qwen3_vl" else [16, 24, 24]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": sections}
    if kind == "qwen3_vl":
        rope.update(rope_theta=5000000.0, mrope_interleaved=True)
    text = {**text, "rope_parameters": rope, "tie_word_embeddings": tied}
    return {"model_type": kind, "text_config": text, "vision_config": vision, "tie_word_embeddings": tied, **QWEN_IDS}


def qwen3_vl(width: int, layers: int, heads: int, inner: int, vision: dict[str, Any], tied: bool) -> dict[str, Any]:
    text = qwen2(width, layers, heads, 8, inner, 151936, head_dim=128, max_position_embeddings=262144)
    return qwen_vl("qwen3_vl", text, {**vision, "out_hidden_size": width}, tied)


QWEN3_SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
QWEN3_LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def smolvlm(text: dict[str, Any], vision: dict[str, Any], scale: int) -> dict[str, Any]:
    return {
        "model_type": "idefics3", "text_config": {**text, "vocab_size": 49280}, "vision_config": vision,
        "scale_factor": scale, "image_token_id": 49190,
    }  # fmt: skip


SIGLIP_B = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "patch_size": 16, "image_size": 512,
}  # fmt: skip
MISTRAL = llama(4096, 32, 32, 14336, model_type="mistral", num_key_value_heads=8)

# folder: (Hub id of the backbone, its config, visual tokens an image, parameters in billions as published)
BACKBONES: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "llava-1.5-7b": ("llava-hf/llava-1.5-7b-hf", llava(4096, 32, 32, 11008), "576", 7.06),
    "llava-1.5-13b": ("llava-hf/llava-1.5-13b-hf", llava(5120, 40, 40, 13824), "576", 13.35),
    "llava-v1.6-mistral-7b": (
        "llava-hf/llava-v1.6-mistral-7b-hf",
        {
            "model_type": "llava_next", "vision_config": CLIP_L, "image_token_index": 32000,
            "text_config": {**MISTRAL, "vocab_size": 32064, "max_position_embeddings": 32768,
                            "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        },
        "1176 to 2880", 7.57,
    ),
    "llava-onevision-qwen2-7b": (
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        {
            "model_type": "llava_onevision", "image_token_index": 151646, "video_token_index": 151647,
            "vision_config": {"model_type": "siglip_vision_model", **SIGLIP, "num_hidden_layers": 26,
                              "image_size": 384, "vision_use_head": False},
            "text_config": {"model_type": "qwen2", **qwen2(3584, 28, 28, 4, 18944, 152000),
                            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        },
        "729 to 7290", 8.03,
    ),
    "Qwen2-VL-2B": (
        "Qwen/Qwen2-VL-2B-Instruct",
        qwen_vl("qwen2_vl", qwen2(1536, 28, 12, 2, 8960, 151936), {"depth": 32, "hidden_size": 1536}, True),
        "one a 28 x 28 px", 2.21,
    ),
    "Qwen2-VL-7B": (
        "Qwen/Qwen2-VL-7B-Instruct",
        qwen_vl("qwen2_vl", qwen2(3584, 28, 28, 4, 18944, 152064), {"depth": 32, "hidden_size": 3584}, False),
        "one a 28 x 28 px", 8.29,
    ),
    "Qwen2.5-VL-3B": (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        qwen_vl("qwen2_5_vl", qwen2(2048, 36, 16, 2, 11008, 151936, max_position_embeddings=128000),
                {"depth": 32, "hidden_size": 1280, "out_hidden_size": 2048}, True),
        "one a 28 x 28 px", 3.75,
    ),
    "Qwen2.5-VL-7B": (
        "Qwen/Qwen2.5-VL-7B-Instruct",
        qwen_vl("qwen2_5_vl", qwen2(3584, 28, 28, 4, 18944, 152064, max_position_embeddings=128000),
                {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584}, False),
        "one a 28 x 28 px", 8.29,
    ),
    "Qwen3-VL-2B": ("Qwen/Qwen3-VL-2B-Instruct", qwen3_vl(2048, 28, 16, 6144, QWEN3_SMALL, True),
                    "one a 32 x 32 px", 2.13),
    "Qwen3-VL-4B": ("Qwen/Qwen3-VL-4B-Instruct", qwen3_vl(2560, 36, 32, 9728, QWEN3_SMALL, True),
                    "one a 32 x 32 px", 4.44),
    "Qwen3-VL-8B": ("Qwen/Qwen3-VL-8B-Instruct", qwen3_vl(4096, 36, 32, 12288, QWEN3_LARGE, False),
                    "one a 32 x 32 px", 8.77),
    "idefics-9b": (
        "HuggingFaceM4/idefics-9b-instruct",
        {
            "model_type": "idefics", "vocab_size": 32000, "additional_vocab_size": 2, "hidden_size": 4096,
            "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "use_resampler": True,
            "cross_layer_interval": 4, "qk_layer_norms": True, "max_position_embeddings": 2048,
            "vision_config": {"embed_dim": 1280, "image_size": 224, "intermediate_size": 5120, "patch_size": 14,
                              "num_hidden_layers": 32, "num_attention_heads": 16},
            "perceiver_config": {"use_resampler": True, "resampler_n_latents": 64, "resampler_depth": 6,
                                 "resampler_n_heads": 16, "resampler_head_dim": 96,
                                 "qk_layer_norms_perceiver": True},
        },
        "64 (cross-attention)", 8.93,
    ),
    "idefics2-8b": (
        "HuggingFaceM4/idefics2-8b",
        {
            "model_type": "idefics2", "image_token_id": 32001, "vision_config": {**SIGLIP, "image_size": 980},
            "text_config": {**MISTRAL, "vocab_size": 32003, "max_position_embeddings": 32768},
            "perceiver_config": {"hidden_size": 4096, "resampler_n_latents": 64, "resampler_depth": 3},
        },
        "64, or 320 split", 8.40,
    ),
    "Idefics3-8B-Llama3": (
        "HuggingFaceM4/Idefics3-8B-Llama3",
        {
            "model_type": "idefics3", "image_token_id": 128257, "scale_factor": 2,
            "vision_config": {**SIGLIP, "image_size": 364},
            "text_config": llama(4096, 32, 32, 14336, num_key_value_heads=8, vocab_size=128259,
                                 max_position_embeddings=131072, bos_token_id=128000, eos_token_id=128001,
                                 rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        },
        "169, or up to 2873 split", 8.46,
    ),
    "SmolVLM-256M": (
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        smolvlm(llama(576, 30, 9, 1536, num_key_value_heads=3, max_position_embeddings=8192), SIGLIP_B, 4),
        "64, or up to 1088 split", 0.256,
    ),
    "SmolVLM-500M": (
        "HuggingFaceTB/SmolVLM-500M-Instruct",
        smolvlm(llama(960, 32, 15, 2560, num_key_value_heads=5, max_position_embeddings=8192), SIGLIP_B, 4),
        "64, or up to 1088 split", 0.508,
    ),
    "SmolVLM-2.2B": (
        "HuggingFaceTB/SmolVLM-Instruct",
        smolvlm(llama(2048, 24, 32, 8192, max_position_embeddings=16384), {**SIGLIP, "image_size": 384}, 3),
        "81, or up to 1377 split", 2.25,
    ),
}  # fmt: skip
