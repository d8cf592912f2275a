"""One short builder a family: a tiny, randomly initialised model of its real class with its real processor.

Everything is built offline from config; a builder takes settings of the text decoder. Chat templates are those of the
families' checkpoints, without the parts for tools and videos.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

Pair = tuple[Any, Any]  # model and processor

WIDTH = 64
IMAGES_THEN_TEXT = (
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
)
LLAVA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}" + IMAGES_THEN_TEXT + "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VIPLLAVA_CHAT = (
    "{% for m in messages %}{{ {'user': '###Human: ', 'assistant': '###Assistant: ', 'system': ''}[m['role']] }}"
    + IMAGES_THEN_TEXT
    + "{% endfor %}{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<<SYS>>\\n' + m['content'][0]['text'] + "
    "'\\n<</SYS>>\\n\\n' }}{% elif m['role'] == 'user' %}{{ '[INST] ' }}"
    + IMAGES_THEN_TEXT
    + "{{ '[/INST]' }}{% else %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
ONEVISION_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + c['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN_CHAT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3_CHAT = QWEN_CHAT[QWEN_CHAT.index("{% for m") :]  # no system turn of its own
QWEN3_5_CHAT = QWEN3_CHAT.replace(
    "'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
)
IDEFICS2_CHAT = (
    "{% for m in messages %}{{ m['role'].capitalize() }}{% if m['content'][0]['type'] == 'image' %}{{ ':' }}"
    "{% else %}{{ ': ' }}{% endif %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<end_of_utterance>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IDEFICS3_CHAT = "{{ '<s>' }}" + IDEFICS2_CHAT
SMOLVLM_CHAT = "{{ '<|im_start|>' }}" + IDEFICS2_CHAT
QWEN_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IDEFICS_SPECIAL = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
TILES = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]


def make_tokenizer(
    special: list[str], bos: str | None, chat_template: str | None = None, adds_bos: bool = True
) -> hf.PreTrainedTokenizerFast:
    """A byte-level tokenizer with `special` tokens; nothing is out of its vocabulary.

    With `adds_bos=False`, it has a BOS token that only a chat template writes, if at all.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token=bos,
        eos_token="</s>",
        additional_special_tokens=special,
        chat_template=chat_template,
    )
    if bos is not None and adds_bos:
        fast.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, fast.convert_tokens_to_ids(bos))]
        )
    return fast


def text_settings(tokenizer: hf.PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """A text decoder of three layers with grouped-query attention."""
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


def vision_settings(**more: Any) -> dict[str, Any]:
    """A vision tower of two layers."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**size, "initializer_range": 0.3, **more}


def clip_vision() -> hf.CLIPVisionConfig:
    """A CLIP tower with four patches an image."""
    return hf.CLIPVisionConfig(
        **vision_settings(image_size=28, patch_size=14, projection_dim=32, initializer_range=0.5)
    )


# --- LLaVA and its kin


def llava(**text: Any) -> Pair:
    """One size for every image."""
    return _llava("Llava", LLAVA_CHAT, text)


def vipllava(**text: Any) -> Pair:
    """LLaVA with several layers of the vision tower joined."""
    return _llava("VipLlava", VIPLLAVA_CHAT, text, vision_feature_layers=[-2, -1])


def _llava(name: str, chat: str, text: dict[str, Any], **more: Any) -> Pair:
    tokenizer = make_tokenizer(["<image>"], "<s>", chat)
    config = getattr(hf, name + "Config")(
        vision_config=clip_vision(),
        text_config=hf.LlamaConfig(**text_settings(tokenizer, **text)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **more,
    )
    size = {"height": 28, "width": 28}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    )
    return getattr(hf, name + "ForConditionalGeneration")(config), processor


def llava_next(**text: Any) -> Pair:
    """Images in tiles, and at a low resolution; with the padding between cut off."""
    tokenizer = make_tokenizer(["<image>"], "<s>", MISTRAL_CHAT)
    tiles = [[28, 56], [56, 28], [56, 56]]
    config = hf.LlavaNextConfig(
        vision_config=clip_vision(),
        text_config=hf.MistralConfig(**text_settings(tokenizer, **text)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=tiles,
    )
    size = {"height": 28, "width": 28}
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size=size, image_grid_pinpoints=tiles),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL_CHAT,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision(**text: Any) -> Pair:
    """Tiles for a lone image, one size for each of several."""
    tokenizer = make_tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"], None, ONEVISION_CHAT)
    tiles = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_siglip(), vision_use_head=False),
        text_config=hf.Qwen2Config(**text_settings(tokenizer, **text)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tiles,
    )
    size = {"height": 28, "width": 28}
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiles),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_CHAT,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _siglip() -> dict[str, Any]:
    settings = vision_settings(image_size=28, patch_size=14)
    settings.pop("initializer_range")
    return settings


# --- Qwen-VL: images of any size, positions in three dimensions


def qwen2_vl(**text: Any) -> Pair:
    """Dynamic resolution and M-RoPE."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 14}
    return _qwen("Qwen2VL", vision, {**_multimodal_rope(head_dim=16), **text})


def qwen2_5_vl(**text: Any) -> Pair:
    """The same with windows in the vision tower."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", vision, {**_multimodal_rope(head_dim=16), **text})


def qwen3_vl(**text: Any) -> Pair:
    """Features of several vision layers are added to the first decoder layers."""
    vision = _qwen3_vision(deepstack_visual_indexes=[0, 1])
    return _qwen("Qwen3VL", vision, {**_interleaved_rope(head_dim=16), **text})


def qwen3_vl_moe(**text: Any) -> Pair:
    """The same with experts."""
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    vision = _qwen3_vision(deepstack_visual_indexes=[0, 1])
    return _qwen("Qwen3VLMoe", vision, {**_interleaved_rope(head_dim=16), **experts, **text})


def qwen3_5(**text: Any) -> Pair:
    """Layers with a recurrent state between those with attention."""
    return _qwen("Qwen3_5", _qwen3_vision(), {**_hybrid(), **text})


def qwen3_5_moe(**text: Any) -> Pair:
    """The same with experts."""
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    experts["shared_expert_intermediate_size"] = 32
    return _qwen("Qwen3_5Moe", _qwen3_vision(), {**_hybrid(), **experts, **text})


def _multimodal_rope(head_dim: int) -> dict[str, Any]:
    sections = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}}


def _interleaved_rope(head_dim: int, partial: float = 1.0) -> dict[str, Any]:
    half = int(head_dim * partial) // 2
    sections = [half - 2 * (half // 4), half // 4, half // 4]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections, "mrope_interleaved": True}
    return {"head_dim": head_dim, "rope_parameters": {**rope, "partial_rotary_factor": partial}}


def _hybrid() -> dict[str, Any]:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "initializer_range": 0.1}
    heads |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    layers = ["linear_attention", "full_attention", "linear_attention"]
    return {**_interleaved_rope(head_dim=32, partial=0.25), **heads, "layer_types": layers}


def _qwen3_vision(**more: Any) -> dict[str, Any]:
    size = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH}
    return {**size, "patch_size": 16, "num_position_embeddings": 16, "initializer_range": 0.3, **more}


def _qwen(name: str, vision: dict[str, Any], text: dict[str, Any]) -> Pair:
    """`name` is that of the classes; later generations have a video processor of their own."""
    early = name in ("Qwen2VL", "Qwen2_5_VL")
    chat = QWEN_CHAT if early else QWEN3_5_CHAT if name.startswith("Qwen3_5") else QWEN3_CHAT
    tokenizer = make_tokenizer(QWEN_SPECIAL, None, chat)
    start, end, image, video = tokenizer.convert_tokens_to_ids(QWEN_SPECIAL[2:])
    config = getattr(hf, name + "Config")(
        text_config=text_settings(tokenizer, **text),
        vision_config={"spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    size = 2 * vision["patch_size"]
    pixels = {"min_pixels": 4 * size**2 // 4, "max_pixels": 9 * size**2}
    images = hf.Qwen2VLImageProcessor(patch_size=vision["patch_size"], **pixels)
    if early:
        processor_class = {"Qwen2VL": hf.Qwen2VLProcessor, "Qwen2_5_VL": hf.Qwen2_5_VLProcessor}[name]
        processor = processor_class(images, tokenizer, hf.Qwen2VLVideoProcessor(), chat_template=chat)
    else:
        processor = hf.Qwen3VLProcessor(images, tokenizer, hf.Qwen3VLVideoProcessor(), chat_template=chat)
    return getattr(hf, name + "ForConditionalGeneration")(config), processor


# --- IDEFICS


def idefics(**text: Any) -> Pair:
    """Images come in by cross-attention, from a processor that takes them between the words; no chat template."""
    tokenizer = make_tokenizer(IDEFICS_SPECIAL[:2], "<s>")
    settings = text_settings(tokenizer, vocab_size=len(tokenizer) - 2, additional_vocab_size=2, **text)
    settings.pop("num_key_value_heads")
    vision = vision_settings(image_size=28, patch_size=14)
    vision["embed_dim"] = vision.pop("hidden_size")
    config = hf.IdeficsConfig(
        **settings,
        vision_config=vision,
        perceiver_config={"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
        | {"resampler_head_dim": 16},
        use_resampler=True,
        alpha_initializer="ones",  # with the zeros of a fresh model, images have no effect
    )
    processor = hf.IdeficsProcessor(hf.IdeficsImageProcessor(image_size=28), tokenizer)
    return hf.IdeficsForVisionText2Text(config), processor


def idefics2(**text: Any) -> Pair:
    """Images of any size, resampled to a few tokens."""
    tokenizer = make_tokenizer(IDEFICS_SPECIAL, "<s>", IDEFICS2_CHAT)
    size = {"shortest_edge": 28, "longest_edge": 56}
    processor = hf.Idefics2Processor(
        hf.Idefics2ImageProcessor(size=size), tokenizer, image_seq_len=4, chat_template=IDEFICS2_CHAT
    )
    config = hf.Idefics2Config(
        vision_config=vision_settings(image_size=56, patch_size=14),
        perceiver_config={"hidden_size": WIDTH, "resampler_n_latents": 4, "resampler_depth": 1}
        | {"resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2, "initializer_range": 0.2},
        text_config=hf.MistralConfig(**text_settings(tokenizer, **text)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return hf.Idefics2ForConditionalGeneration(config), processor


def idefics3(**text: Any) -> Pair:
    """Images in tiles, each named by its row and column."""
    return _tiled("Idefics3", IDEFICS3_CHAT, "<s>", text)


def smolvlm(**text: Any) -> Pair:
    """Idefics3 in small."""
    return _tiled("SmolVLM", SMOLVLM_CHAT, "<|im_start|>", text)


def _tiled(name: str, chat: str, bos: str, text: dict[str, Any]) -> Pair:
    smol = name == "SmolVLM"  # its BOS is written by the chat template alone
    special = [*IDEFICS_SPECIAL, "<global-img>", *TILES, *(["<|im_start|>", "<video>"] if smol else [])]
    tokenizer = make_tokenizer(special, bos, chat, adds_bos=not smol)
    config = getattr(hf, name + "Config")(
        vision_config=vision_settings(image_size=32, patch_size=8),
        text_config=hf.LlamaConfig(**text_settings(tokenizer, **text)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    tile = {"longest_edge": 32}
    kind = (
        "ImageProcessor" if Version(hf.__version__) >= Version("5.23") else "ImageProcessorPil"
    )  # what a reload gives
    images = getattr(hf, name + kind)(size={"longest_edge": 64}, max_image_size=tile)
    parts = [images, tokenizer]
    if smol:
        sampling = {"fps": 1, "max_frames": 4, "video_size": tile}
        parts.append(hf.SmolVLMVideoProcessor(size=tile, max_image_size=tile, video_sampling=sampling))
    processor = getattr(hf, name + "Processor")(*parts, image_seq_len=4, chat_template=chat)
    return getattr(hf, name + "ForConditionalGeneration")(config), processor


FAMILIES: dict[str, Callable[..., Pair]] = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "idefics3": idefics3}
MORE_FAMILIES: dict[str, Callable[..., Pair]] = {
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "vipllava": vipllava,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "idefics": idefics,
    "idefics2": idefics2,
    "smolvlm": smolvlm,
}
