"""The KV of a prefix of fused tokens: computed once, kept in an LRU cache, and used by any number of answers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from .demonstrations_aim import FusedDemonstrations, Part, check_source, kind_of
from .files_aim import as_bytes
from .injection_aim import FusedPrompt, injected, is_per_token
from .state_aim import answering, continues_after_kv, preserved_state

logger = logging.get_logger(__name__)

PREFIX_STATES = Version(Version(transformers.__version__).base_version) >= Version("5.23")


class FusedPrefix:
    """Demonstrations whose KV the model keeps: a value that `generate` takes as `demos`.

    The value itself holds only the fused tokens. The KV is in `model.prefix_cache`, which is bounded in bytes; after
    an eviction the next call that needs it computes it again.

    Args:
        fused: the demonstrations, in the order of the prompt.
    """

    aim_kind: ClassVar[str] = "prefix"

    def __init__(self, fused: FusedDemonstrations) -> None:
        self._fused = fused
        digest = hashlib.sha256(str((str(fused.vectors.dtype), fused.lengths, fused.ids.tolist())).encode())
        digest.update(as_bytes(fused.vectors))
        self.prefix_key = digest.hexdigest()

    @property
    def fused(self) -> FusedDemonstrations:
        """The demonstrations."""
        return self._fused

    def __len__(self) -> int:
        return len(self._fused)

    @property
    def num_tokens(self) -> int:
        """Fused tokens of all demonstrations together."""
        return self._fused.num_tokens


@torch.no_grad()
def prefix_kv(model: Any, prefix: FusedPrefix, bos: Sequence[int]) -> Any:
    """KV of `bos` (one id, or none) and the fused tokens of a prefix, for one row; kept in `model.prefix_cache`."""
    key = (prefix.prefix_key, tuple(bos), str(model.device), model._backbone_state())
    cache = model.prefix_cache.get(key)
    if cache is None:
        # FusedPrompt needs a query: give it one token, then cut that token off.
        if model._processor is None and model._loaded_from is None:
            inputs = {"input_ids": prefix.fused.ids[-1:][None].to(model.device)}
        else:
            inputs = dict(model.processor(text=["a"], return_tensors="pt").to(model.device, model.dtype))
        length = inputs["input_ids"].shape[1]
        ids = torch.tensor([*bos, *inputs["input_ids"][0, -1:].tolist()], device=model.device)[None]
        for name, value in inputs.items():
            if is_per_token(name, value, (1, length)):
                inputs[name] = ids if name == "input_ids" else value[:, -1:].expand(1, ids.shape[1], *value.shape[2:])
        prompt = model._unchecked_prompt(inputs, [prefix.fused], prefix_first=True)
        width, prompt.width = prompt.width, len(bos) + prefix.num_tokens  # keep BOS and the fused tokens
        for name, value in prompt.inputs.items():
            if is_per_token(name, value, (1, width)):
                prompt.inputs[name] = value[:, : prompt.width]
        with answering(model.backbone), preserved_state(model.backbone), injected(prompt):
            cache = model.backbone.base_model(**prompt.inputs, use_cache=True, return_dict=True).past_key_values
        model.prefix_cache.put(key, cache, cache_bytes(cache))
    return cache


OPTIONS_WITHOUT_PREFIX_KV = (
    "past_key_values", "cache_implementation", "prefill_chunk_size", "assistant_model", "custom_generate",
    "prompt_lookup_num_tokens", "use_mtp", "penalty_alpha", "dola_layers",
)  # fmt: skip


def prefilled(
    model: Any, rows: Sequence[tuple[Part, ...]], options: Mapping[str, Any]
) -> tuple[FusedPrompt, Cache] | None:
    """The prompt with a shared prefix first, and the prefix KV for each row.

    `None` where the KV cannot be used; the log gives the reason, once for each reason.
    """
    prefixes: list[Any] = [parts[0] for parts in rows if len(parts) == 1 and kind_of(parts[0]) == "prefix"]
    result = _prefilled(model, prefixes, len(rows), options)
    if isinstance(result, str):
        logger.warning_once(f"The KV of prefilled demonstrations is not used: {result}. Their fused tokens are.")
        return None
    return result


def _prefilled(
    model: Any, prefixes: Sequence[FusedPrefix], batch: int, options: Mapping[str, Any]
) -> tuple[FusedPrompt, Cache] | str:
    """What `prefilled` returns, or why KV cannot be used."""
    ids, config = options["input_ids"], options.get("generation_config")

    def setting(name: str) -> Any:
        values = [options.get(name), getattr(config, name, None), getattr(model.generation_config, name, None)]
        return next((value for value in values if value is not None), None)

    if len(prefixes) < batch or len({prefix.prefix_key for prefix in prefixes}) > 1:
        return "a row has other demonstrations than one prefix, or the rows have different prefixes"
    if setting("use_cache") is False:
        return "use_cache=False"
    unusual = [name for name in OPTIONS_WITHOUT_PREFIX_KV if setting(name)]
    if unusual:
        return f"generate was called with {', '.join(unusual)}"
    prefix, mask = prefixes[0], options.get("attention_mask")
    check_source(prefix.fused.source, model.source)
    padded = mask is not None and not bool(mask.all())
    if padded and (setting("repetition_penalty") or 1) != 1:
        return "the batch is padded, and repetition_penalty would count the padding, which stands after the prefix"
    if not continues_after_kv(model.backbone, padded):
        return (
            "on this backbone, or this release of transformers, a prompt (a padded one) cannot continue from cached KV"
        )
    begins = [0] * batch if mask is None else mask.long().argmax(dim=1).tolist()
    firsts = {tuple(model._bos_of(int(ids[row, begin]))) for row, begin in enumerate(begins)}
    if len(firsts) > 1:
        return "the prompts of the batch begin differently"
    bos = firsts.pop()
    cache = prefix_kv(model, prefix, bos)
    if not serves(cache, padded):
        return "this backbone's cache cannot be continued from a prefix alone (or not in a padded batch)"
    prompt = model._fused_prompt(options, [prefix.fused] * batch, prefix_first=True)
    prompt.tokens_seen = len(bos) + prefix.num_tokens  # the KV already holds these tokens: injection starts after them
    copies = max(int(setting("num_beams") or 1), int(setting("num_return_sequences") or 1))
    return prompt, grown_from(cache, batch * copies)


def grown_from(cache: Any, rows: int) -> Cache:
    """A KV cache of `rows` rows that continues one of a single row and does not change it.

    Layers that concatenate old and new KV into new tensors start with a view of the old: nothing is copied, for any
    number of rows and of concurrent generations. Layers of other kinds write into their tensors and are copied.
    """
    own = copy.copy(cache)
    own.layers = []
    for layer in cache.layers:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            layer = copy.copy(layer)
            layer.keys, layer.values = (kv.expand(rows, -1, -1, -1) for kv in (layer.keys, layer.values))
        else:
            layer = copy.deepcopy(layer)
            if rows > 1:
                layer.reorder_cache(torch.zeros(rows, dtype=torch.long))
        own.layers.append(layer)
    return own


def serves(cache: object, padded: bool) -> bool:
    """Whether the KV of a prefix alone is the KV that the prefix has in a whole prompt.

    It is not in layers that a prefix alone does not enter (cross-attention, where even masked words may attend to the
    images of the query), nor, with padding between the prefix and a query, in layers that count the padding: sliding
    windows and recurrent states. Such layers need transformers 5.23, the oldest release on which they were tried and
    work. Caches without layers are not supported.

    Args:
        cache: the KV that `generate` would continue.
        padded: rows of the batch have padding.
    """
    layers = getattr(cache, "layers", None) or []
    entered = all(getattr(layer, "is_initialized", True) for layer in layers)
    plain = all(type(layer) is DynamicLayer for layer in layers)
    return bool(layers) and entered and (plain or (PREFIX_STATES and not padded))


def note_fused(*caches: Any) -> None:
    """Note on KV caches that fused tokens are in them, which the caller's ids and masks do not count."""
    for cache in caches:
        if cache is not None:
            cache.holds_fused_tokens = True


def check_continued(inputs: Mapping[str, Any], whole_prompt: bool) -> None:
    """Raise `ValueError` where ids or a mask without fused tokens continue KV with them: positions would be wrong.

    Args:
        inputs: the backbone's inputs of the next call.
        whole_prompt: the ids are those of the whole prompt, as for `generate`, and not of the next tokens alone.
    """
    cache, ids, mask = (inputs.get(name) for name in ("past_key_values", "input_ids", "attention_mask"))
    held = 0
    if cache is not None and getattr(cache, "holds_fused_tokens", False):
        held = int(cache.get_seq_length())
        cache.holds_fused_tokens = held > 0  # it may have been reset
    if held and whole_prompt:
        raise ValueError(
            "past_key_values are of an answer from demonstrations and hold their fused tokens, which the prompt does "
            "not have. Give the whole prompt and the demonstrations again, without past_key_values; "
            "demos=model.prefill(demos) computes the demonstrations' part only once."
        )
    if held and ids is not None and mask is not None and mask.ndim == 2 and mask.shape[1] < held + ids.shape[1]:
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but past_key_values hold {held} tokens, fused ones among "
            f"them, and input_ids {ids.shape[1]} more. Leave the mask out, or give one for all {held + ids.shape[1]}."
        )


def cache_bytes(cache: object) -> int:
    """Bytes of the tensors that a KV cache holds."""
    tensor_bytes: dict[int, int] = {}

    def count(value: object) -> None:
        if isinstance(value, torch.Tensor):
            tensor_bytes[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, (list, tuple)):
            for item in value:
                count(item)
        elif isinstance(value, dict):
            count(list(value.values()))
        elif hasattr(value, "__dict__"):
            count(list(vars(value).values()))

    count(getattr(cache, "layers", cache))
    return sum(tensor_bytes.values())
