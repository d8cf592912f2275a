"""Identify and load any backbone through the names that all families share.

No family is named here. A backbone has `base_model` (no LM head), `get_decoder`,
`get_input_embeddings` and `config.get_text_config()`.
"""

from __future__ import annotations

import copy
import inspect
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging

from .configuration_aim import AimConfig
from .families_aim import FAMILIES, family_of
from .files_aim import HUB_KWARGS

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.get_logger(__name__)

USE_INPUT_ADVICE = (
    "What works is the input: from_backbone(..., preset='paper'), read_layers=[-1] and entry_layers=[0], with a "
    "projector that is trained."
)


def why_not(backbone: PreTrainedModel) -> str | None:
    """Why AIM cannot work with a backbone, in one sentence; `None` where it can."""
    if backbone.config.is_encoder_decoder:
        return "it is an encoder-decoder, whose answer does not continue the prompt that fused tokens stand in."
    if not backbone.can_generate():
        return "it does not generate text."
    if not {"input_ids", "attention_mask"} <= set(inspect.signature(backbone.forward).parameters):
        return "it does not take its prompt as input_ids and attention_mask."
    try:
        embedding_weight(backbone)
    except (AssertionError, AttributeError, NotImplementedError):
        return "it does not say through get_input_embeddings() how it embeds its prompt."
    if backbone.base_model is backbone and lm_head(backbone) is None:
        return "it has neither a model below its LM head nor says through get_output_embeddings() where that is."
    return None


def check_usable(backbone: PreTrainedModel) -> None:
    """Raise `ValueError` for a backbone that AIM cannot work with; the message says why."""
    reason = why_not(backbone)
    if reason is not None:
        raise ValueError(f"AIM cannot use {type(backbone).__name__}: {reason}")


def check_given(backbone: object) -> PreTrainedModel:
    """Return a backbone that AIM is put on for the first time, checked; log a warning for one that was not tested.

    Raises:
        TypeError: it is not a loaded model, or an AIM model itself.
        ValueError: AIM cannot work with it.
    """
    if not isinstance(backbone, PreTrainedModel) or backbone.config.model_type == AimConfig.model_type:
        raise TypeError(
            f"backbone is a {type(backbone).__name__}; expected a Hub id, a folder, or a vision-language model of "
            "transformers (of a PEFT model: peft_model.merge_and_unload())."
        )
    if backbone.config.model_type not in FAMILIES:
        logger.warning(
            f"AIM has not been tested with {backbone.config.model_type} backbones. It works if the properties "
            "that `aim check BACKBONE` tries hold; please report those that do not."
        )
    check_usable(backbone)
    return backbone


def decoder_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The stack of text decoder layers, in order.

    Raises:
        ValueError: the backbone has no stack of `num_hidden_layers` layers in its decoder.
    """
    count = backbone.config.get_text_config(decoder=True).num_hidden_layers
    decoder = backbone.get_decoder()
    own = getattr(decoder, "layers", None)
    stacks = [own] if own is not None else [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    for stack in stacks:
        if isinstance(stack, nn.ModuleList) and len(stack) == count:
            return stack
    raise ValueError(
        f"{type(backbone).__name__} has no stack of {count} decoder layers where AIM looks for it "
        f"(get_decoder() is {type(decoder).__name__}), so states cannot enter at depth. {USE_INPUT_ADVICE}"
    )


def check_depth(backbone: PreTrainedModel) -> None:
    """Raise `ValueError` for a backbone in which no state can be read or enter at depth; the message has the way out.

    `families_aim.py` lists the families whose layers pass on something else; for others `layer_input` raises an error.
    """
    decoder_layers(backbone)
    if not family_of(backbone.config.model_type).states_at_depth:
        raise ValueError(
            f"The decoder layers of {type(backbone).__name__} hand on several streams of states at once, of which "
            f"none is the state of a word, so states cannot enter at depth. {USE_INPUT_ADVICE}"
        )


def lm_head(backbone: PreTrainedModel) -> nn.Module | None:
    """The LM head, of the backbone or of its decoder."""
    for module in (backbone, backbone.get_decoder()):
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        if head is not None:
            return head
    return None


def image_positions(config: PreTrainedConfig, ids: torch.Tensor) -> torch.Tensor:
    """Mask of the image tokens in `ids`."""
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return ids == token
    return torch.zeros_like(ids, dtype=torch.bool)


def embedding_weight(backbone: PreTrainedModel) -> torch.Tensor:
    """The rows of the input embeddings, `(vocabulary, hidden size)`."""
    weight = backbone.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _spread(count: int, total: int) -> list[int]:
    """`count` indices from the first to the last of `total`; in integers, since float32 cannot count that far."""
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


@torch.no_grad()
def _embedded(backbone: PreTrainedModel, count: int) -> torch.Tensor | None:
    """Input embeddings of `count` ids `(count, hidden size)`, as the model sees them; `None` without weights."""
    embedding, weight = backbone.get_input_embeddings(), embedding_weight(backbone)
    if weight.is_meta and not hasattr(embedding, "_hf_hook"):
        return None
    ids = torch.tensor([_spread(count, weight.shape[0])], device=module_device(backbone))
    return embedding(ids)[0].detach().float().cpu()


def module_device(backbone: PreTrainedModel) -> torch.device:
    """Where the inputs of a backbone go, also when parts of it are offloaded."""
    weight = embedding_weight(backbone)
    if not weight.is_meta:
        return weight.device
    hook = getattr(backbone.get_input_embeddings(), "_hf_hook", None)
    return torch.device("meta" if hook is None else hook.execution_device)


def embedding_norm(backbone: PreTrainedModel) -> float:
    """Mean norm of the input embeddings, padding rows left out: the scale of fused tokens at the input."""
    rows = _embedded(backbone, 4096)
    if rows is None:
        return 1.0
    norms = rows.norm(dim=-1)
    return float(norms[norms > 0].mean()) if bool((norms > 0).any()) else 1.0


def fingerprint(backbone: PreTrainedModel) -> list[float] | None:
    """A few weights that identify a backbone, whatever its precision or quantization.

    They are taken from what is never quantized: input embeddings, final norm and LM head. A backbone whose decoder
    layers alone were tuned (a merged LoRA, say) has the same fingerprint. `None` where there are no weights.
    """
    rows = _embedded(backbone, 24)
    if rows is None:
        return None
    norms = [p for p in backbone.get_decoder().parameters() if p.ndim == 1 and p.is_floating_point() and not p.is_meta]
    head = backbone.get_output_embeddings()
    samples = [float(row[i % len(row)]) for i, row in enumerate(rows)]
    for weight in (norms[-1] if norms else None, getattr(head, "weight", None)):
        if weight is not None and not weight.is_meta and weight.is_floating_point():
            flat = weight.detach().reshape(-1)
            samples += flat[torch.tensor(_spread(8, flat.numel()), device=flat.device)].float().tolist()
    return [float(f"{value:.4g}") for value in samples]


def has_fingerprint(backbone: PreTrainedModel, known: list[float] | None) -> bool:
    """Whether `backbone` may be the one whose fingerprint is `known`; `True` where either is unknown."""
    actual = fingerprint(backbone)
    if known is None or actual is None or len(actual) != len(known):  # parts of it may be offloaded
        return True
    return torch.allclose(torch.tensor(actual), torch.tensor(known), rtol=2e-2, atol=1e-4)


def check_backbone(backbone: PreTrainedModel, expected: PreTrainedConfig | None, known: list[float] | None) -> None:
    """Raise `ValueError` unless `backbone` is the one a projector was made for.

    Args:
        backbone: what was loaded or given.
        expected: the configuration stored with the projector.
        known: the fingerprint stored with the projector.
    """
    if expected is None:
        return
    pairs: list[tuple[str, Any, Any]] = [("model type", backbone.config.model_type, expected.model_type)]
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        actual, stored = (getattr(c.get_text_config(), name, None) for c in (backbone.config, expected))
        pairs.append((name, actual, stored))
    wrong = [f"{name} {actual} (the projector's: {stored})" for name, actual, stored in pairs if actual != stored]
    if not wrong and not has_fingerprint(backbone, known):
        wrong = ["the same shape, but other weights"]
    if wrong:
        name = backbone.config.name_or_path or type(backbone).__name__
        raise ValueError(
            f"This projector was trained for another backbone than {name}: {'; '.join(wrong)}. Load the backbone "
            "named in its config.json, or make a new projector with AimForConditionalGeneration.from_backbone(...)."
        )


def modules_kept_unquantized(backbone: PreTrainedModel) -> list[str]:
    """Every module besides the text decoder layers: LM head, vision tower, connector, embeddings, norms.

    bitsandbytes drops its own default list where a user gives one, so these are added to the user's list.
    """
    stack = decoder_layers(backbone)
    path = next(name for name, module in backbone.named_modules() if module is stack)
    kept, prefix, module = [], "", backbone
    for part in path.split("."):
        kept += [prefix + name for name, _ in module.named_children() if name != part]
        prefix, module = f"{prefix}{part}.", getattr(module, part)
    return kept


def longest_prompt(config: PreTrainedConfig) -> int | None:
    """The most positions of the backbone's text decoder; `None` where its configuration has no such number."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


# --- loading, and 4-bit weights


def load_backbone(name: str, **kwargs: Any) -> Any:
    """Load a backbone with the user's own arguments; only its text decoder layers are quantized.

    Returns:
        The backbone; where `output_loading_info=True` is among the arguments, the library's report of its files too.

    Raises:
        ValueError: `dtype` is unknown; its files are damaged; or weights are missing in them. The library draws these
            at random and prints a report, but answers of such a backbone mean nothing.
    """
    for option in ("dtype", "torch_dtype"):
        dtype = kwargs.get(option)
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"{option}={dtype!r:.40}: expected auto, float32, bfloat16 or float16.")
    kwargs.setdefault("trust_remote_code", False)  # trusting this repository does not imply trusting the backbone's
    quantization = kwargs.get("quantization_config")
    if quantization is not None:
        place = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        kwargs["quantization_config"] = _with_modules_kept(quantization, AutoConfig.from_pretrained(name, **place))
    output_loading_info = kwargs.pop("output_loading_info", False)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True, **kwargs)
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"The backbone {os.path.join(name, kwargs.get('subfolder') or '')} cannot be loaded "
            f"({type(error).__name__}: {error!s:.300}). Its files may be damaged or incomplete, or of another version "
            f"than transformers {transformers.__version__}. Download or save them again."
        ) from error
    backbone, info = loaded
    if output_loading_info:
        return backbone, info
    missing = sorted(info["missing_keys"])
    if missing:
        folder = os.path.join(name, *filter(None, [kwargs.get("subfolder")]))
        raise ValueError(
            f"{len(missing)} weights of {type(backbone).__name__} are missing in {folder}: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. Its files are incomplete, or another version of transformers "
            f"than {transformers.__version__} wrote them (config.json says {backbone.config.transformers_version}). "
            "To use random weights in their place, load it with transformers and pass it as backbone=model."
        )
    return backbone


def _with_modules_kept(quantization: QuantizationConfigMixin | dict[str, Any], config: PreTrainedConfig) -> Any:
    """Add LM head, vision tower and connector to the modules that are not quantized, whatever the user listed."""
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    quantization = copy.copy(quantization)
    with torch.device("meta"):
        kept = modules_kept_unquantized(AutoModelForImageTextToText.from_config(config))
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization, name):
            setattr(quantization, name, sorted({*(getattr(quantization, name) or []), *kept}))
    return quantization


def never_repack(backbone: PreTrainedModel, only_odd: bool = False) -> None:
    """Keep 4-bit weights as they were loaded, from now on.

    On a CPU with AVX512-BF16, bitsandbytes repacks the weights of a layer in its first inference. The backward pass
    through a repacked layer does not give its gradient, and a layer can be repacked only if its output width is a
    multiple of 32 and its input width one of 64.

    Args:
        backbone: may be quantized or not.
        only_odd: only the layers that cannot be repacked.
    """
    module: Any
    for module in backbone.modules():
        even = getattr(module, "out_features", 0) % 32 == 0 and getattr(module, "in_features", 0) % 64 == 0
        if not getattr(module, "support_avx512bf16_for_cpu", False) or (only_odd and even):
            continue
        module.support_avx512bf16_for_cpu = False
        weight, state = module.weight, getattr(module.weight, "quant_state", None)
        if state is not None and getattr(state, "packing_format_for_cpu", False):
            unpack = import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse
            weight.data, weight.quant_state = unpack(weight.data, state)


def laptop_quantization_config() -> BitsAndBytesConfig:
    """4-bit weights (NF4, doubly quantized): a 7B backbone takes about 5 GB; the projector stays in full precision.

    Pass it as `quantization_config=` to `from_pretrained`. It saves memory, not time.
    """
    low = torch.bfloat16 if not torch.cuda.is_available() or torch.cuda.is_bf16_supported() else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=low
    )
