"""Demonstrations for vLLM's chat completions: content parts with embeddings, and a chat template that places them.

vLLM (0.24 and newer, started with `--enable-prompt-embeds`) takes `{"type": "prompt_embeds", "data": ...}` among the
parts of a message (vllm-project/vllm pull request 40720). Where the chat template writes such a part, it puts the
embeddings, and counts them as positions of text: what fused tokens are. A chat template decides where that is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..demonstrations_aim import FusedDemonstrations

if TYPE_CHECKING:
    from .. import AimForConditionalGeneration, AimProcessor

NAME = "demonstrations"  # of the message that holds them
SENTINEL = "<prompt_embeds>"  # what vLLM writes for a part before it puts the embeddings there
SERVED = ("llava", "qwen2_vl", "qwen2_5_vl")
REFUSED = {
    "qwen3_vl": "vLLM adds image features to several of its layers, and cannot when embeddings are mixed in",
    "qwen3_vl_moe": "vLLM adds image features to several of its layers, and cannot when embeddings are mixed in",
    "idefics": "images reach it by cross-attention, and vLLM does not have it",
    "mllama": "images reach it by cross-attention",
}
# In front of the model's own template: BOS, the parts of the first message if it is named so, and nothing around them.
FRONT = """\
{{%- if messages and messages[0]['name'] is defined and messages[0]['name'] == '{name}' %}}
{{{{- {bos} }}}}
{{%- if messages[0]['content'] is string %}}{{{{- messages[0]['content'] | replace('\\n', '') }}}}
{{%- else %}}{{%- for part in messages[0]['content'] %}}{{{{- part['text'] }}}}{{%- endfor %}}{{%- endif %}}
{{%- set messages = messages[1:] %}}{{%- set bos_token = '' %}}
{{%- endif %}}"""


def check_exportable(model: AimForConditionalGeneration) -> None:
    """Raise `ValueError` where vLLM cannot answer from the demonstrations of a model; the message says why.

    Args:
        model: the plug-in.
    """
    family = model.backbone.config.model_type
    if family not in SERVED:
        reason = REFUSED.get(family, "it is not known whether vLLM counts their positions as this backbone does")
        raise ValueError(
            f"Demonstrations of a {family} backbone cannot be given to vLLM: {reason}. It works for "
            f"{', '.join(SERVED)}; aim serve answers with every backbone."
        )
    if model.config.entry_layers != [0]:
        raise ValueError(
            f"These fused tokens enter at the depths {model.config.entry_layers} of the decoder, and vLLM takes "
            "embeddings at its input alone. Train a projector for the input (aim train --entry-layers 0), or use aim "
            "serve."
        )


def chat_message(fused: FusedDemonstrations) -> dict[str, Any]:
    """The first message of a chat: a content part for each demonstration.

    Args:
        fused: what `read` returned, or a slice of a bank.

    Returns:
        A message as JSON has it. The server decodes each part with `torch.load(..., weights_only=True)`.
    """
    parts = [{"type": "prompt_embeds", "data": encoded(demo.vectors)} for demo in fused]
    return {"role": "system", "name": NAME, "content": parts}


def encoded(vectors: torch.Tensor) -> str:
    """Embeddings `(tokens, hidden size)` as base64 of what `torch.save` writes."""
    file = io.BytesIO()
    torch.save(vectors.detach().cpu().contiguous().clone(), file)  # of a view, the whole storage would be saved
    return base64.b64encode(file.getvalue()).decode()


def chat_template(processor: AimProcessor, begins_with_bos: bool) -> str:
    """The chat template of a backbone, with demonstrations right after BOS, where the plug-in puts them.

    Args:
        processor: the plug-in's processor.
        begins_with_bos: whether prompts of the backbone begin with BOS. vLLM adds none to a chat, so it is written.

    Raises:
        ValueError: the backbone has no chat template, or one that cannot be extended.
    """
    own = processor.chat_template
    if own is None:
        raise ValueError("This backbone has no chat template, so vLLM cannot answer chats with it.")
    template = FRONT.format(name=NAME, bos="bos_token" if begins_with_bos else "''") + own
    bos = processor.tokenizer.bos_token if begins_with_bos else ""
    query = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    for count in (0, 2):
        wanted = (bos + SENTINEL * count if count else "") + _rendered(processor, [query], own).removeprefix(
            bos if count else ""
        )
        if _rendered(processor, [*shown_as(count), query], template) != wanted:
            raise ValueError(
                "The chat template of this backbone cannot be extended: what stands before its first message is not "
                "BOS alone. Write one by hand that renders the first message bare after BOS."
            )
    return template


def shown_as(count: int) -> list[dict[str, Any]]:
    """The message of `count` demonstrations as a chat template of vLLM gets it."""
    parts = [{"type": "text", "text": SENTINEL}] * count
    return [{"role": "system", "name": NAME, "content": parts}] if count else []


def _rendered(processor: AimProcessor, chat: Sequence[Any], template: str) -> str:
    return str(processor.processor.apply_chat_template(chat, chat_template=template, add_generation_prompt=True))


def begins_with_bos(model: AimForConditionalGeneration) -> bool:
    """Whether prompts of a model begin with BOS, behind which its fused tokens stand."""
    processor = model.processor
    first = processor(text=[processor.prompt("a", images=0)], return_tensors="pt")["input_ids"][0, 0]
    return int(first) == getattr(model.config.get_text_config(), "bos_token_id", None)
