"""Builders as in `more_families.py`, for what is popular today; `docs/survey_backbones.py` tries them.

Tokenizers have the special tokens of the published ones, and BOS as those have it: put there by the tokenizer, written
by the chat template, by both or by neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import transformers as hf
from families import WIDTH, Pair, make_tokenizer, text_settings, vision_settings
from tokenizers import Regex, models, normalizers, pre_tokenizers

CHATML = "<|im_start|>ROLE\n", "<|im_end|>\n"
GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
GLM_SPECIAL = [
    "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>", "<|begin_of_image|>",
    "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
]  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}  # of a head of 16
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}


def chat(image: str, turn: str, end: str = "", start: str = "") -> str:
    """A chat template: `start`, then of each message `turn` with its ROLE, its content, and `end`."""
    open_turn = f"{{{{ {turn!r}.replace('ROLE', ROLE) }}}}"
    return (
        f"{{{{ {start!r} }}}}{{% for m in messages %}}"
        + open_turn.replace(", ROLE)", ", m['role'])")
        + "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        + f"{{% if c['type'] == 'image' %}}{{{{ {image!r} }}}}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}"
        + f"{{% endfor %}}{{% endif %}}{{{{ {end!r} }}}}{{% endfor %}}"
        + "{% if add_generation_prompt %}"
        + open_turn.replace(", ROLE)", ", 'assistant')")
        + "{% endif %}"
    )


def tokenizer_of(
    special: list[str], template: str | None, bos: str | None = None, adds_bos: bool = False, **named: str
) -> Any:
    """A tokenizer with `special` tokens, those in `named` as attributes (`tokenizer.boi_token`, ...)."""
    tokens = dict.fromkeys([*special, *named.values(), *([bos] if bos else [])])
    tokenizer = make_tokenizer([token for token in tokens if token != "<s>"], bos, template, adds_bos)
    for name, token in named.items():
        tokenizer._set_model_specific_special_tokens({name: token})
    return tokenizer


def ids_of(tokenizer: Any, **tokens: str) -> dict[str, int]:
    """The ids of tokens, by the names that a configuration has for them."""
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


# --- images of any size, a token for each patch or group of them


def gemma4() -> Pair:
    """Layers that share keys and values, embeddings for each layer, BOS by tokenizer and template; E2B in small."""
    shared = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
    position = {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 640}
    return _gemma4("Gemma4", shared, vision_settings(**position))


def gemma4_unified() -> Pair:
    """The same without a tower and without embeddings for each layer; images look at themselves both ways."""
    vision = {"mm_embed_dim": WIDTH, "mm_posemb_size": 640, "output_proj_dims": WIDTH}
    return _gemma4("Gemma4Unified", {"use_bidirectional_attention": "vision"}, vision)


def _gemma4(name: str, more: dict[str, Any], vision: dict[str, Any]) -> Pair:
    template = chat("<|image|>", "<|turn>ROLE\n", "<turn|>\n", start="<bos>")
    names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
    names |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    tokenizer = tokenizer_of(["<|turn>", "<turn|>", "<|video|>"], template, "<bos>", adds_bos=True, **names)
    text = text_settings(tokenizer, num_hidden_layers=4, head_dim=16, global_head_dim=32, sliding_window=64)
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2, **more}
    if "hidden_size_per_layer_input" in more:
        text["vocab_size_per_layer_input"] = text["vocab_size"]
    patches = {"patch_size": 2, "pooling_kernel_size": 3}
    config = getattr(hf, name + "Config")(
        text_config=text,
        vision_config={**vision, **patches},
        audio_config=None,
        **ids_of(
            tokenizer,
            image_token_id="<|image|>",
            boi_token_id="<|image>",
            eoi_token_id="<image|>",
            video_token_id="<|video|>",
            audio_token_id="<|audio|>",
            boa_token_id="<|audio>",
            eoa_token_index="<audio|>",
        ),
    )
    processor = getattr(hf, name + "Processor")(
        getattr(hf, name + "AudioFeatureExtractor")(),
        getattr(hf, name + "ImageProcessor")(max_soft_tokens=70, **patches),
        tokenizer,
        getattr(hf, name + "VideoProcessor")(**patches),
        chat_template=template,
        image_seq_length=70,
    )
    return getattr(hf, name + "ForConditionalGeneration")(config), processor


def glm4v_moe() -> Pair:
    """M-RoPE and experts."""
    experts = {**EXPERTS, "n_routed_experts": 4, "head_dim": 16}
    rope = {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
    return _glm("Glm4vMoe", {**experts, **rope}, hf.Glm4vProcessor, "Glm4v")


def glm46v() -> Pair:
    """GLM-4.6V: the decoder of GLM-4.1V, another processor."""
    return _glm("Glm46V", {"rope_parameters": MROPE}, hf.Glm46VProcessor, "Glm46V")


def glm_ocr() -> Pair:
    """GLM-OCR: a small decoder, the processor of GLM-4.6V."""
    return _glm("GlmOcr", {"rope_parameters": MROPE, "head_dim": 16}, hf.Glm46VProcessor, "Glm46V")


def _glm(name: str, text: dict[str, Any], processor_class: Any, images: str) -> Pair:
    template = chat(GLM_IMAGE, "<|ROLE|>\n", start="[gMASK]<sop>\n")
    tokenizer = tokenizer_of(GLM_SPECIAL, template)
    vision = vision_settings(patch_size=14, image_size=84, depth=2, num_heads=2, out_hidden_size=WIDTH)
    if name == "Glm46V":
        vision["model_type"], text["model_type"] = "glm4v_vision", "glm4v_text"
    config = getattr(hf, name + "Config")(
        text_config={**text_settings(tokenizer), **text},
        vision_config=vision,
        **ids_of(
            tokenizer,
            image_token_id="<|image|>",
            video_token_id="<|video|>",
            image_start_token_id="<|begin_of_image|>",
            image_end_token_id="<|end_of_image|>",
            video_start_token_id="<|begin_of_video|>",
            video_end_token_id="<|end_of_video|>",
        ),
    )
    size = {"shortest_edge": 56 * 56, "longest_edge": 2 * 84 * 84}
    processor = processor_class(
        getattr(hf, images + "ImageProcessor")(size=size),
        tokenizer,
        getattr(hf, images + "VideoProcessor")(),
        chat_template=template,
    )
    return getattr(hf, name + "ForConditionalGeneration")(config), processor


def exaone4_5() -> Pair:
    """Windows in tower and decoder; its BOS stands nowhere."""
    template = chat("<vision><|image_pad|></vision>", "<|ROLE|>\n", "<|endofturn|>\n")
    special = ["<|user|>", "<|assistant|>", "<|system|>", "<|endofturn|>", "<vision>", "</vision>"]
    tokenizer = tokenizer_of([*special, "<|image_pad|>", "<|video_pad|>"], template, "[BOS]")
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    vision = {"depth": 2, "num_heads": 2, "num_key_value_heads": 1, "out_hidden_size": WIDTH, "patch_size": 14}
    config = hf.Exaone4_5_Config(
        text_config=hf.Exaone4Config(**text_settings(tokenizer, head_dim=16, sliding_window=64, layer_types=layers)),
        vision_config=vision_settings(window_size=56, fullatt_block_indexes=[1], **vision),
        **ids_of(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    processor = hf.Exaone4_5_Processor(
        hf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=9 * 28 * 28),
        tokenizer,
        hf.Qwen2VLVideoProcessor(),
        chat_template=template,
    )
    return hf.Exaone4_5_ForConditionalGeneration(config), processor


def kimi_k25() -> Pair:
    """Experts, and attention with latent keys and values; its BOS stands nowhere."""
    image = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
    template = chat(image, "<|im_ROLE|>ROLE<|im_middle|>", "<|im_end|>")
    special = ["<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>"]
    special += ["<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>"]
    tokenizer = tokenizer_of([*special, "<|kimi_k25_video_placeholder|>"], template, "[BOS]")
    latent = {"kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    text = text_settings(tokenizer, num_key_value_heads=4, first_k_dense_replace=1, n_routed_experts=4)
    vision = vision_settings(patch_size=14, pos_emb_height=8, pos_emb_width=8)
    vision.pop("initializer_range")
    config = hf.Kimi_K25Config(
        text_config=hf.DeepseekV3Config(**text, **EXPERTS, **latent),
        vision_config=vision,
        projection_hidden_size=32,
        **ids_of(
            tokenizer,
            image_token_id="<|media_pad|>",
            video_token_id="<|kimi_k25_video_placeholder|>",
            vision_start_token_id="<|media_begin|>",
            vision_end_token_id="<|media_end|>",
        ),
    )
    size = {"size": {"max_height": 6, "max_width": 6}, "max_patches": 36}
    processor = hf.Kimi_K25Processor(
        hf.Kimi_K25ImageProcessor(**size), tokenizer, hf.Kimi_K25VideoProcessor(**size), chat_template=template
    )
    return hf.Kimi_K25ForConditionalGeneration(config), processor


def lighton_ocr() -> Pair:
    """A Pixtral tower in front of Qwen3."""
    template = chat("<|image_pad|>", *CHATML)
    names = {
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    }
    tokenizer = tokenizer_of(["<|im_start|>", "<|im_end|>"], template, **names)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = hf.LightOnOcrConfig(
        vision_config=hf.PixtralVisionConfig(
            **vision_settings(image_size=56, patch_size=7, head_dim=16, rope_parameters=rope)
        ),
        text_config=hf.Qwen3Config(**text_settings(tokenizer, head_dim=16)),
        spatial_merge_size=2,
        **ids_of(tokenizer, image_token_id="<|image_pad|>"),
    )
    processor = hf.LightOnOcrProcessor(
        hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=14),
        tokenizer,
        patch_size=7,
        spatial_merge_size=2,
        chat_template=template,
    )
    return hf.LightOnOcrForConditionalGeneration(config), processor


def paddleocr_vl() -> Pair:
    """M-RoPE, images of any size; BOS by the chat template alone."""
    template = chat("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "ROLE: ", "\n", start="<|begin_of_sentence|>")
    special = ["<|IMAGE_START|>", "<|IMAGE_END|>", "<|video_pad|>"]
    tokenizer = tokenizer_of(special, template, "<|begin_of_sentence|>", image_token="<|IMAGE_PLACEHOLDER|>")
    vision = vision_settings(image_size=56, patch_size=14)
    vision.pop("initializer_range")
    config = hf.PaddleOCRVLConfig(
        text_config=text_settings(tokenizer, head_dim=16, rope_parameters=MROPE),
        vision_config=vision,
        **ids_of(
            tokenizer,
            image_token_id="<|IMAGE_PLACEHOLDER|>",
            video_token_id="<|video_pad|>",
            vision_start_token_id="<|IMAGE_START|>",
            vision_end_token_id="<|IMAGE_END|>",
        ),
    )
    images = hf.PaddleOCRVLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 9 * 28 * 28})
    processor = hf.PaddleOCRVLProcessor(images, tokenizer, chat_template=template)
    return hf.PaddleOCRVLForConditionalGeneration(config), processor


def video_llama_3() -> Pair:
    """A tower with rotary positions in front of Qwen2."""
    template = chat("<|image_pad|>\n", *CHATML)
    tokenizer = tokenizer_of(["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"], template)
    config = hf.VideoLlama3Config(
        text_config=hf.Qwen2Config(**text_settings(tokenizer)),
        vision_config=vision_settings(patch_size=14),
        **ids_of(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    images = hf.VideoLlama3ImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 16 * 14 * 14})
    processor = hf.VideoLlama3Processor(images, tokenizer, hf.VideoLlama3VideoProcessor(), chat_template=template)
    return hf.VideoLlama3ForConditionalGeneration(config), processor


def ernie4_5_vl_moe() -> Pair:
    """Experts for words and others for images; its BOS stands nowhere."""
    template = chat("Picture: <|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "ROLE: ", "\n")
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>"}
    names |= {"image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>"}
    names |= {"video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>"}
    tokenizer = tokenizer_of([], template, "<s>", **names)
    experts = {"moe_intermediate_size": [32, 32], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    config = hf.Ernie4_5_VLMoeConfig(
        text_config=text_settings(tokenizer, rope_parameters=rope, **experts),
        vision_config=vision_settings(depth=2, num_heads=2, patch_size=14),
        **ids_of(
            tokenizer,
            image_token_id="<|IMAGE_PLACEHOLDER|>",
            image_start_token_id="<|IMAGE_START|>",
            image_end_token_id="<|IMAGE_END|>",
            video_token_id="<|VIDEO_PLACEHOLDER|>",
            video_start_token_id="<|VIDEO_START|>",
            video_end_token_id="<|VIDEO_END|>",
        ),
    )
    processor = hf.Ernie4_5_VLMoeProcessor(
        hf.Ernie4_5_VLMoeImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 9 * 28 * 28}),
        tokenizer,
        hf.Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False),
        chat_template=template,
    )
    return hf.Ernie4_5_VLMoeForConditionalGeneration(config), processor


def minicpmv4_6() -> Pair:
    """Slices of any size, merged in the tower and behind it; layers with a recurrent state."""
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"image_start_token": "<image>", "image_end_token": "</image>"}
    names |= {"slice_start_token": "<slice>", "slice_end_token": "</slice>"}
    names |= {"image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
    template = chat("<|image_pad|>", *CHATML)
    tokenizer = tokenizer_of(["<|im_start|>", "<|im_end|>"], template, **names)
    vision = vision_settings(image_size=56, patch_size=7)
    vision.pop("initializer_range")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "initializer_range": 0.1}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "head_dim": 32}
    layers = ["linear_attention", "full_attention", "linear_attention"]
    text = text_settings(tokenizer, rope_parameters={**rope, "partial_rotary_factor": 0.25}, layer_types=layers)
    config = hf.MiniCPMV4_6Config(
        text_config={**text, **linear, "model_type": "qwen3_5_text"},
        vision_config=vision,
        insert_layer_id=0,
        image_size=56,
        **ids_of(tokenizer, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )
    size = {"scale_resolution": 56, "patch_size": 7, "max_slice_nums": 4}
    processor = hf.MiniCPMV4_6Processor(
        hf.MiniCPMV4_6ImageProcessor(**size), hf.MiniCPMV4_6VideoProcessor(**size), tokenizer, chat_template=template
    )
    return hf.MiniCPMV4_6ForConditionalGeneration(config), processor


def molmo2() -> Pair:
    """Overlapping crops, pooled by attention; the processor puts BOS in front."""
    special = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>", "<im_end>"]
    special += ["<frame_end>", "<im_low>", "<|image|>", "<|video|>", "<|im_start|>", "<|im_end|>"]
    template = chat("<|image|>", *CHATML)
    tokenizer = tokenizer_of(special, template, "<s>")
    heads = {"num_key_value_heads": 2, "head_dim": 16}
    vision = vision_settings(image_size=[28, 28], patch_size=7, **heads)
    adapter = {**vision_settings(**heads), "vision_feature_layer": [1, 0], "text_hidden_size": WIDTH}
    adapter.pop("num_hidden_layers")
    config = hf.Molmo2Config(
        vision_config=vision,
        adapter_config=adapter,
        text_config=text_settings(tokenizer, head_dim=16, additional_vocab_size=0),
        **ids_of(
            tokenizer,
            image_start_token_id="<im_start>",
            low_res_image_start_token_id="<low_res_im_start>",
            image_end_token_id="<im_end>",
            image_patch_id="<im_patch>",
            frame_start_token_id="<frame_start>",
            frame_end_token_id="<frame_end>",
        ),
    )
    size = {"size": {"height": 28, "width": 28}, "patch_size": 7}
    processor = hf.Molmo2Processor(
        hf.Molmo2ImageProcessor(max_crops=2, overlap_margins=[1, 1], **size),
        hf.Molmo2VideoProcessor(**size),
        tokenizer,
        chat_template=template,
    )
    return hf.Molmo2ForConditionalGeneration(config), processor


def fuyu() -> Pair:
    """No tower: patches go straight to the decoder; one image a prompt, in front; no chat template."""
    tokenizer = tokenizer_of([], None, "<s>")
    words = ["|SPEAKER|", "|NEWLINE|", "<0x00>", "<0x01>", "<0x02>", "<0x03>", "<0x04>"]
    backend, vocab = tokenizer.backend_tokenizer, tokenizer.get_vocab()
    vocab |= {word: len(vocab) + number for number, word in enumerate(words)}  # ordinary words, as in a SentencePiece
    backend.model = models.BPE(vocab=vocab, merges=[], ignore_merges=True)
    backend.normalizer = normalizers.Prepend(" ")  # which its processor cuts off in front of images
    alone = pre_tokenizers.Split(Regex("|".join(map(re.escape, words))), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([alone, byte_level])
    text = text_settings(tokenizer, qk_layernorm=True)
    text.pop("num_key_value_heads")
    config = hf.FuyuConfig(
        text_config=hf.PersimmonConfig(**text),
        patch_size=14,
        image_size=56,
        **ids_of(tokenizer, image_token_id="|SPEAKER|"),
    )
    patch = {"height": 14, "width": 14}
    images = hf.FuyuImageProcessor(size={"height": 56, "width": 56}, patch_size=patch)
    return hf.FuyuForCausalLM(config), hf.FuyuProcessor(images, tokenizer)


BUILDERS: dict[str, Callable[..., Pair]] = {
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "exaone4_5": exaone4_5,
    "fuyu": fuyu,
    "gemma4": gemma4,
    "gemma4_unified": gemma4_unified,
    "glm46v": glm46v,
    "glm4v_moe": glm4v_moe,
    "glm_ocr": glm_ocr,
    "kimi_k25": kimi_k25,
    "lighton_ocr": lighton_ocr,
    "minicpmv4_6": minicpmv4_6,
    "molmo2": molmo2,
    "paddleocr_vl": paddleocr_vl,
    "video_llama_3": video_llama_3,
}
