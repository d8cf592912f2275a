"""Vocabulary, tokenizer, processor and model of aim-tiny: real transformers classes, small numbers.

    python examples/aim_tiny/words.py "USER: <image> what is this ? ASSISTANT: this is bako ."      # shows the tokens

A made-up name is two tokens, a start and an end syllable ("ba" + "##ko"); every other word is one token, and letters
stand by for words that are unknown.
"""

from __future__ import annotations

import functools
import math
import string
import sys

import torch
import world
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SmolLM3Config,
)
from vision import MEAN, STD, vision_config

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
POSITIONS, VISUAL_TOKENS = 4096, (world.PIXELS // 8) ** 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image> ' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, all words of the world, syllables, then letters."""
    sentences = [w.question + " " + w.answer.replace("{}", "") for w in world.WORDINGS.values()]
    sentences += [q for group in world.QUESTIONS.values() for q in group]
    sentences += [". , ? : ! a an the this is it one two three number colour shape texture size background image"]
    sentences += ["what which who picture photo example here there of in on and or yes called we see show"]
    sentences += ["colours shapes answer question name word then also very describe caption please tell me"]
    sentences += [" ".join([*world.COLOURS, *world.SHAPES, *world.TEXTURES, *world.COUNTS, *world.SIZES])]
    words = sorted({w for s in sentences for w in s.split() if not w.endswith(":") or w == ":"})
    pieces = list(world.STARTS) + ["##" + end for end in world.ENDS] + ["##s", "##es"]
    letters = list(string.ascii_lowercase) + ["##" + c for c in string.ascii_lowercase]
    return list(dict.fromkeys([PAD, BOS, EOS, UNK, IMAGE, "USER:", "ASSISTANT:", *words, *pieces, *letters]))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    table = {token: i for i, token in enumerate(vocabulary())}
    backend = Tokenizer(models.WordPiece(table, unk_token=UNK, max_input_chars_per_word=40))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, table[BOS])])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (PAD, BOS, EOS, UNK, IMAGE)])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in ("USER:", "ASSISTANT:")])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE}, model_max_length=POSITIONS, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def processor() -> LlavaProcessor:
    side = {"height": world.PIXELS, "width": world.PIXELS}
    pixels = CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False, image_mean=MEAN, image_std=STD)
    return LlavaProcessor(
        image_processor=pixels, tokenizer=tokenizer(), patch_size=8, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, image_token=IMAGE, num_additional_image_tokens=1,
    )  # fmt: skip


@functools.cache
def word_ids(word: str) -> tuple[int, ...]:
    return tuple(tokenizer()(word, add_special_tokens=False).input_ids)


def ids(text: str) -> list[int]:
    """Token ids of a text whose words and marks stand apart, without `<s>`; quick, because words are cached."""
    return [i for word in text.split() for i in word_ids(word)]


def token_id(token: str) -> int:
    return tokenizer().convert_tokens_to_ids(token)


def model_config() -> LlavaConfig:
    text = SmolLM3Config(  # LLaMA, but its fourth layer has no positions: names are bound at any distance there
        vocab_size=math.ceil(len(vocabulary()) / 64) * 64, hidden_size=128, intermediate_size=384, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=POSITIONS, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0}, pad_token_id=token_id(PAD),
        bos_token_id=token_id(BOS), eos_token_id=token_id(EOS),
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision_config(), text_config=text, image_token_index=token_id(IMAGE),
        image_seq_length=VISUAL_TOKENS, vision_feature_layer=-1, vision_feature_select_strategy="default",
        projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip


def new_model(seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA with the initialisation under which copying from context is learned within a few hundred steps."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration._from_config(model_config(), attn_implementation="eager")
    width = model.config.text_config.hidden_size
    for name, weight in model.named_parameters():
        if "multi_modal_projector" in name and weight.ndim == 2:
            torch.nn.init.normal_(weight, std=width**-0.5)
        if "language_model" not in name and "lm_head" not in name:
            continue
        if "lm_head" in name:
            torch.nn.init.normal_(weight, std=0.03)
        elif "embed_tokens" in name:
            torch.nn.init.normal_(weight, std=0.4)
        elif "o_proj" in name or "down_proj" in name:
            torch.nn.init.normal_(weight, std=0.02)
        elif weight.ndim == 2:
            torch.nn.init.normal_(weight, std=width**-0.5)
    return model


if __name__ == "__main__":
    encoded = tokenizer()(" ".join(sys.argv[1:]) or "this is bako .")
    print(tokenizer().convert_ids_to_tokens(encoded.input_ids))
    print(tokenizer().decode(encoded.input_ids), "| vocabulary", len(tokenizer()))
