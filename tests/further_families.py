"""More builders as in `popular_families.py`; `docs/survey_backbones.py` tries them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from families import QWEN_SPECIAL, TILES, WIDTH, Pair, clip_vision, text_settings, vision_settings
from more_families import siglip
from popular_families import CHATML, MROPE, chat, ids_of, tokenizer_of

# --- images as words of a vocabulary


def chameleon() -> Pair:
    """Images quantized to tokens; the processor puts a separator behind the prompt; no chat template."""
    names = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    tokenizer = tokenizer_of(["<reserved08706>"], None, "<s>", adds_bos=True, **names)
    tokenizer.sep_token = "<reserved08706>"
    codes = [f"IMGIMG{letter}Z" for letter in "ABCDEFGHIJ"]  # as published, with letters for digits
    tokenizer.add_tokens(codes)
    draw = {"embed_dim": 8, "num_embeddings": len(codes), "latent_channels": 32, "base_channels": 32}
    draw |= {"resolution": 32, "channel_multiplier": [1, 1, 1, 1, 1], "num_res_blocks": 1}
    config = hf.ChameleonConfig(**text_settings(tokenizer), vq_config=draw, vocabulary_map=tokenizer.get_vocab())
    size = {"height": 32, "width": 32}
    processor = hf.ChameleonProcessor(
        hf.ChameleonImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer, image_seq_length=4
    )
    return hf.ChameleonForConditionalGeneration(config), processor


def emu3() -> Pair:
    """Images quantized to tokens, with their size in words before them."""
    names = {"image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>"}
    names |= {"image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>"}
    template = chat("<image>", "ROLE: ", " ")
    codes = [f"<|visual token {number:06d}|>" for number in range(16)]
    tokenizer = tokenizer_of(["<|extra_200|>", *codes], template, "<|extra_203|>", **names)
    draw = {"codebook_size": len(codes), "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "hidden_size": 32}
    draw |= {"num_res_blocks": 1, "attn_resolutions": []}
    config = hf.Emu3Config(text_config=text_settings(tokenizer), vq_config=draw, vocabulary_map=tokenizer.get_vocab())
    images = hf.Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=48 * 48)
    return hf.Emu3ForConditionalGeneration(config), hf.Emu3Processor(images, tokenizer, chat_template=template)


# --- a fixed number of tokens an image


def aria() -> Pair:
    """Experts behind a few queries an image."""
    template = chat("<fim_prefix><|img|><fim_suffix>", *CHATML)
    special = ["<|im_start|>", "<|im_end|>", "<fim_prefix>", "<fim_suffix>"]
    tokenizer = tokenizer_of(special, template, "<s>", image_token="<|img|>")
    vision = hf.Idefics3VisionConfig(**vision_settings(image_size=980, patch_size=140))
    vision.model_type = "idefics3_vision"
    config = hf.AriaConfig(
        text_config=text_settings(tokenizer, moe_num_experts=4),
        vision_config=vision,
        projector_patch_to_query_dict={49: 4},
        **ids_of(tokenizer, image_token_index="<|img|>"),
    )
    processor = hf.AriaProcessor(
        hf.AriaImageProcessor(), tokenizer, chat_template=template, size_conversion={490: 4, 980: 4}
    )
    model = hf.AriaForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.query)  # zeros when fresh
    return model, processor


def got_ocr2() -> Pair:
    """A tower of windows for large images, 256 tokens of each; every prompt has one; no chat template."""
    tokenizer = tokenizer_of(["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"], None)
    vision = vision_settings(image_size=1024, patch_size=16, output_channels=8, mlp_dim=32, hidden_size=16)
    vision |= {"window_size": 8, "global_attn_indexes": [], "num_hidden_layers": 1}
    vision.pop("intermediate_size")
    config = hf.GotOcr2Config(
        vision_config=vision,
        text_config=hf.Qwen2Config(**text_settings(tokenizer)),
        image_seq_length=256,
        **ids_of(tokenizer, image_token_index="<imgpad>"),
    )
    processor = hf.GotOcr2Processor(hf.GotOcr2ImageProcessor(size={"height": 1024, "width": 1024}), tokenizer)
    return hf.GotOcr2ForConditionalGeneration(config), processor


def deepseek_vl_hybrid() -> Pair:
    """Two towers, one of them for large images."""
    template = chat("<image_placeholder>", "ROLE: ", "\n\n")
    tokenizer = tokenizer_of([], template, "<s>", adds_bos=True, image_token="<image_placeholder>")
    large = {**vision_settings(image_size=64, patch_size=8), "output_channels": 16, "mlp_dim": 64, "window_size": 4}
    config = hf.DeepseekVLHybridConfig(
        text_config=hf.LlamaConfig(**text_settings(tokenizer)),
        vision_config=siglip(vision_use_head=False),
        high_res_vision_config=hf.SamVisionConfig(**large, global_attn_indexes=[1]),
        **ids_of(tokenizer, image_token_id="<image_placeholder>"),
    )
    images = hf.DeepseekVLHybridImageProcessor(
        size={"height": 28, "width": 28}, high_res_size={"height": 64, "width": 64}, min_size=14
    )
    processor = hf.DeepseekVLHybridProcessor(images, tokenizer, chat_template=template, num_image_tokens=4)
    return hf.DeepseekVLHybridForConditionalGeneration(config), processor


def janus() -> Pair:
    """One tower to look, another to draw."""
    template = chat("<image_placeholder>\n", "<|ROLE|>: ", "\n\n")
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tokenizer_of(["<|User|>", "<|Assistant|>"], template, "<s>", adds_bos=True, **names)
    vision = vision_settings(image_size=28, patch_size=14, num_image_tokens=4, projection_dim=WIDTH)
    vision.pop("intermediate_size")
    draw = {"embed_dim": 8, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32, "num_patches": 2}
    draw |= {
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
    }
    config = hf.JanusConfig(
        text_config=hf.LlamaConfig(**text_settings(tokenizer)),
        vision_config=vision,
        vq_config=draw,
        **ids_of(tokenizer, image_token_id="<image_placeholder>"),
    )
    images = hf.JanusImageProcessor(size={"height": 28, "width": 28}, min_size=14)
    processor = hf.JanusProcessor(images, tokenizer, chat_template=template, num_image_tokens=4)
    return hf.JanusForConditionalGeneration(config), processor


def video_llava() -> Pair:
    """LLaVA with a second tower for videos."""
    template = chat("<image>\n", "ROLE: ", " ")
    tokenizer = tokenizer_of(["<image>", "<video>"], template, "<s>", adds_bos=True)
    config = hf.VideoLlavaConfig(
        vision_config=clip_vision(),
        text_config=hf.LlamaConfig(**text_settings(tokenizer)),
        image_seq_length=5,
        vision_feature_select_strategy="full",
        **ids_of(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    size = {"height": 28, "width": 28}
    processor = hf.VideoLlavaProcessor(
        hf.VideoLlavaImageProcessor(size=size, crop_size=size, do_center_crop=False),
        hf.VideoLlavaVideoProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    return hf.VideoLlavaForConditionalGeneration(config), processor


# --- tiles


def qianfan_ocr() -> Pair:
    """Tiles of one size, written as `<image>` in a prompt."""
    template = chat("<image>\n", *CHATML)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = tokenizer_of(["<|im_start|>", "<|im_end|>"], template, **names)
    config = hf.QianfanOCRConfig(
        vision_config=vision_settings(image_size=28, patch_size=7),
        text_config=hf.Qwen3Config(**text_settings(tokenizer, head_dim=16)),
        image_seq_length=4,
        **ids_of(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    images = hf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=3)
    processor = hf.QianfanOCRProcessor(images, tokenizer, image_seq_length=4, chat_template=template)
    return hf.QianfanOCRForConditionalGeneration(config), processor


def granite4_vision() -> Pair:
    """LLaVA-NeXT's tiles; features of several vision layers are added to decoder layers."""
    template = chat("<image>\n", "<|start_of_role|>ROLE<|end_of_role|>", "<|end_of_text|>\n")
    special = ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<image>"]
    tokenizer = tokenizer_of(special, template)
    tiles = [[32, 64], [64, 32], [64, 64]]
    vision = vision_settings(image_size=32, patch_size=8, hidden_size=64)
    vision.pop("initializer_range")
    config = hf.Granite4VisionConfig(
        vision_config=hf.SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=text_settings(tokenizer),
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 64}
        | {"cross_attention_frequency": 1, "use_qformer_text_input": False},
        image_grid_pinpoints=tiles,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[0, 1, 1, 2],
        **ids_of(tokenizer, image_token_index="<image>"),
    )
    size = {"height": 32, "width": 32}
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=size, image_grid_pinpoints=tiles)
    processor = hf.Granite4VisionProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        chat_template=template,
    )
    return hf.Granite4VisionForConditionalGeneration(config), processor


def granite_docling() -> Pair:
    """Tiles, each named by its row and column; features of several vision layers."""
    template = chat("<image>", "<|start_of_role|>ROLE<|end_of_role|>", "<|end_of_text|>\n")
    special = ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<fake_token_around_image>", "<image>"]
    tokenizer = tokenizer_of([*special, "<global-img>", *TILES], template)
    vision = vision_settings(image_size=32, patch_size=8, out_hidden_size=WIDTH, scale_factor=2)
    config = hf.GraniteDoclingConfig(
        vision_config={**vision, "deepstack_visual_indexes": [0], "use_fine_route": False},
        text_config=text_settings(tokenizer),
        **ids_of(tokenizer, image_token_id="<image>"),
    )
    images = hf.GraniteDoclingImageProcessor(size={"height": 32, "width": 32}, max_patches=3)
    processor = hf.GraniteDoclingProcessor(images, tokenizer, image_seq_len=4, chat_template=template)
    return hf.GraniteDoclingForConditionalGeneration(config), processor


# --- kin of Qwen-VL


def hunyuan_vl() -> Pair:
    """Rotary positions of several axes; BOS by the chat template alone."""
    image = [f"<\uff5chy_place\u2581holder\u2581no\u2581{number}\uff5c>" for number in (100, 102, 101)]
    bos = "<\uff5chy_begin\u2581of\u2581sentence\uff5c>"
    template = chat("".join(image), "", "<\uff5chy_User\uff5c>", start=bos)
    names = dict(zip(("image_start_token", "image_token", "image_end_token"), image, strict=True))
    tokenizer = tokenizer_of(["<\uff5chy_User\uff5c>"], template, bos, **names)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "mrope_section": [2, 2, 2, 2], "factor": 1.0}
    vision = vision_settings(patch_size=14, max_image_size=84, img_max_token_num=36, out_hidden_size=WIDTH)
    vision.pop("initializer_range")
    config = hf.HunYuanVLConfig(
        text_config=text_settings(tokenizer, head_dim=16, rope_parameters=rope),
        vision_config=vision,
        **ids_of(tokenizer, im_start_id=image[0], image_token_id=image[1], im_end_id=image[2]),
    )
    images = hf.HunYuanVLImageProcessor(patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 9 * 28 * 28})
    processor = hf.HunYuanVLProcessor(images, tokenizer, chat_template=template)
    return hf.HunYuanVLForConditionalGeneration(config), processor


def minimax_m3_vl() -> Pair:
    """Experts, and attention to chosen blocks of keys."""
    template = chat("]<]image[>[", "]~b]ROLE\n", "[e~[\n", start="]~!b[")
    special = ["]~b]", "[e~[", "]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["]
    tokenizer = tokenizer_of(special, template, "]~!b[")
    blocks = {"index_n_heads": 1, "index_head_dim": 16, "index_block_size": 16, "index_topk_blocks": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 64, "rotary_dim": 8}
    text = text_settings(tokenizer, head_dim=16, shared_intermediate_size=32, **blocks, **experts)
    text |= {"mlp_layer_types": ["dense", "sparse", "sparse"], "intermediate_size": 32}
    text |= {"layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"]}
    config = hf.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision_settings(image_size=84, patch_size=14, num_attention_heads=1),
        projector_hidden_size=WIDTH,
        **ids_of(tokenizer, image_token_index="]<]image[>[", video_token_index="]<]video[>["),
    )
    images = hf.MiniMaxM3VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 9 * 28 * 28})
    processor = hf.MiniMaxM3VLProcessor(images, tokenizer, hf.MiniMaxM3VLVideoProcessor(), chat_template=template)
    return hf.MiniMaxM3SparseForConditionalGeneration(config), processor


def lfm3_vl() -> Pair:
    """Short convolutions in tower and decoder; BOS by the chat template alone."""
    template = chat("<|vision_start|><|image_pad|><|vision_end|>", *CHATML, start="<|startoftext|>")
    tokenizer = tokenizer_of(QWEN_SPECIAL, template, "<|startoftext|>")
    text = text_settings(tokenizer, head_dim=16, sliding_window=64, conv_L_cache=3)
    text["layer_types"] = ["conv", "full_attention", "conv"]
    config = hf.Lfm3VlConfig(
        text_config={**text, "model_type": "lfm3"},
        vision_config=vision_settings(
            patch_size=14, num_key_value_heads=1, layer_types=["conv", "full_attention"], rope_parameters=None
        ),
        projector_hidden_size=64,
        **_qwen_ids(tokenizer),
    )
    images = hf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=9 * 28 * 28)
    processor = hf.Lfm3VlProcessor(images, tokenizer, hf.Qwen3VLVideoProcessor(), chat_template=template)
    return hf.Lfm3VlForConditionalGeneration(config), processor


def hyperclovax_vision_v2() -> Pair:
    """The tower of Qwen2.5-VL in front of a decoder with other norms."""
    template = chat("<|vision_start|><|image_pad|><|vision_end|>", *CHATML)
    tokenizer = tokenizer_of(QWEN_SPECIAL, template, "<|endoftext|>")
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 14, "window_size": 56}
    config = hf.HyperCLOVAXVisionV2Config(
        text_config={**text_settings(tokenizer), "model_type": "hyperclovax"},
        vision_config={**vision_settings(fullatt_block_indexes=[1], **vision), "model_type": "qwen2_5_vl_vision"},
        **ids_of(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    images = hf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=9 * 28 * 28)
    processor = hf.HyperCLOVAXVisionV2Processor(images, tokenizer, hf.Qwen2VLVideoProcessor(), chat_template=template)
    return hf.HyperCLOVAXVisionV2ForConditionalGeneration(config), processor


def qwen2_5_omni_thinker() -> Pair:
    """Qwen2.5-VL that can take sound."""
    template = chat("<|vision_bos|><|IMAGE|><|vision_eos|>", *CHATML)
    names = {"image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>"}
    names |= {"vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"}
    names |= {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    tokenizer = tokenizer_of(["<|im_start|>", "<|im_end|>"], template, **names)
    sound = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32}
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 14, "window_size": 56}
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config=text_settings(tokenizer, rope_parameters=MROPE),
        vision_config=vision_settings(fullatt_block_indexes=[1], **vision),
        audio_config={**sound, "output_dim": WIDTH, "num_mel_bins": 16, "max_source_positions": 100},
        **ids_of(
            tokenizer,
            image_token_index="<|IMAGE|>",
            audio_token_index="<|AUDIO|>",
            video_token_index="<|VIDEO|>",
            audio_start_token_id="<|audio_bos|>",
            audio_end_token_id="<|audio_eos|>",
        ),
    )
    config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_bos|>")
    processor = hf.Qwen2_5OmniProcessor(
        hf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=9 * 28 * 28),
        hf.Qwen2VLVideoProcessor(),
        hf.WhisperFeatureExtractor(feature_size=16),
        tokenizer,
        chat_template=template,
    )
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def qwen3_omni_moe_thinker() -> Pair:
    """Qwen3-VL with experts that can take sound."""
    template = chat("<|vision_start|><|image_pad|><|vision_end|>", *CHATML)
    names = {"image_token": "<|image_pad|>", "audio_token": "<|audio_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    names |= {"audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
    tokenizer = tokenizer_of(["<|im_start|>", "<|im_end|>"], template, **names)
    sound = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32}
    sound |= {"output_dim": WIDTH, "num_mel_bins": 16, "max_source_positions": 100, "downsample_hidden_size": 16}
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    rope = {**MROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": WIDTH, "num_position_embeddings": 16}
    config = hf.Qwen3OmniMoeThinkerConfig(
        text_config=text_settings(tokenizer, rope_parameters=rope, **experts),
        vision_config=vision_settings(deepstack_visual_indexes=[0, 1], **vision),
        audio_config=sound,
        **ids_of(
            tokenizer,
            image_token_id="<|image_pad|>",
            audio_token_id="<|audio_pad|>",
            video_token_id="<|video_pad|>",
            audio_start_token_id="<|audio_start|>",
        ),
    )
    config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    processor = hf.Qwen3OmniMoeProcessor(
        hf.Qwen2VLImageProcessor(patch_size=16, min_pixels=32 * 32, max_pixels=9 * 32 * 32),
        hf.Qwen2VLVideoProcessor(patch_size=16),
        hf.WhisperFeatureExtractor(feature_size=16),
        tokenizer,
        chat_template=template,
    )
    return hf.Qwen3OmniMoeThinkerForConditionalGeneration(config), processor


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    return ids_of(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
    )


BUILDERS: dict[str, Callable[..., Pair]] = {
    "aria": aria,
    "chameleon": chameleon,
    "deepseek_vl_hybrid": deepseek_vl_hybrid,
    "emu3": emu3,
    "got_ocr2": got_ocr2,
    "granite4_vision": granite4_vision,
    "granite_docling": granite_docling,
    "hunyuan_vl": hunyuan_vl,
    "hyperclovax_vision_v2": hyperclovax_vision_v2,
    "janus": janus,
    "lfm3_vl": lfm3_vl,
    "minimax_m3_vl": minimax_m3_vl,
    "qianfan_ocr": qianfan_ocr,
    "qwen2_5_omni_thinker": qwen2_5_omni_thinker,
    "qwen3_omni_moe_thinker": qwen3_omni_moe_thinker,
    "video_llava": video_llava,
}
