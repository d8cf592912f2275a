"""The KV of a prefix of fused tokens: computed once, kept in an LRU cache, and used by any number of answers."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .backbone_aim import goes_on_behind_kv, preserved_state
from .demonstrations_aim import FusedDemonstrations, check_source, is_prefix
from .files_aim import as_bytes
from .injection_aim import FusedPrompt, injected

PREFIX_STATES = Version(Version(transformers.__version__).base_version) >= Version("5.23")


class FusedPrefix:
    """Demonstrations whose KV the model keeps: a value that `generate` takes as `demos`.

    The value itself holds the fused tokens alone. The KV lies in `model.prefix_cache`, bounded in bytes; when it had
    to leave, the next call that needs it computes it again.

    Args:
        fused: what was read, in the order in which it stands in the prompt.
    """

    def __init__(self, fused: FusedDemonstrations) -> None:
        self._fused = fused
        digest = hashlib.sha256(str((str(fused.vectors.dtype), fused.lengths)).encode())
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


def same_prefix(demos: Any) -> Any:
    """The one prefix that all rows are given, or `None`."""
    if is_prefix(demos):
        return demos
    if isinstance(demos, (list, tuple)) and demos and all(is_prefix(one) for one in demos):
        return demos[0] if len({one.prefix_key for one in demos}) == 1 else None
    return None


def grown_from(cache: Any, rows: int) -> Any:
    """A KV cache of `rows` rows that goes on from one of a single row and leaves that as it is.

    Layers that grow by joining old and new KV into new tensors begin with a view of the old: nothing is copied, for
    any number of rows and of generations at a time. Layers of other kinds write into their tensors and are copied.
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


def serves(cache: Any, padded: bool) -> bool:
    """Whether KV of a prefix alone is the KV that the prefix has in a whole prompt.

    It is not in layers that the prefix alone does not enter (with cross-attention, where even masked words may look
    at the images of the query). With padding between the prefix and a query, it is none in layers that count what
    lies between: sliding windows and recurrent states; before transformers 5.23, the oldest on which that was tried
    and holds, in none of these at all. Caches of a kind of their own, without layers, are not looked into.

    Args:
        cache: what `generate` would go on from.
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
    """Raise `ValueError` where ids or a mask without fused tokens go on from KV with them: all places would be wrong.

    Args:
        inputs: the backbone's inputs of the next call.
        whole_prompt: the ids are those of the whole prompt, as for `generate`, and not of the next tokens alone.
    """
    cache, ids, mask = (inputs.get(name) for name in ("past_key_values", "input_ids", "attention_mask"))
    held = cache.get_seq_length() if cache is not None and getattr(cache, "holds_fused_tokens", False) else 0
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


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a KV cache holds."""
    found: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.numel() * value.element_size()
        elif isinstance(value, (list, tuple)):
            for one in value:
                count(one)
        elif isinstance(value, dict):
            count(list(value.values()))
        elif hasattr(value, "__dict__"):
            count(list(vars(value).values()))

    count(getattr(cache, "layers", cache))
    return sum(found.values())


class PrefixMixin:
    """What `AimForConditionalGeneration` does with prefixes; `self` is the model."""

    @torch.no_grad()
    def prefill(self: Any, demos: Any) -> FusedPrefix:
        """Read demonstrations and compute the KV of their fused tokens, once for any number of calls of `generate`.

        The KV is kept in `model.prefix_cache`, at most `prefix_cache.max_bytes`; the least recently used leaves, and
        is computed again when it is needed. It serves greedy and sampled decoding and beams of prompts that all rows
        of a batch share; everything else (other demonstrations a row, a cache of the caller's own, `use_cache=False`,
        assisted decoding, cross-attention, a padded batch on a backbone with sliding windows or a recurrent state)
        takes the fused tokens as they are.
        The answers are the same within float tolerance.

        Args:
            demos: as for `read`; their order counts.

        Returns:
            A value that `generate` takes as `demos`.
        """
        prefix = demos if is_prefix(demos) else FusedPrefix(self.read(demos))
        check_source(prefix.fused.source, self.source)
        if len(prefix):
            self._prefix_kv(prefix)
        return prefix

    def _prefix_kv(self: Any, prefix: FusedPrefix) -> tuple[Any, list[int]]:
        """KV of BOS and the fused tokens of a prefix, for one row, and the ids before these tokens (BOS or none)."""
        key = (prefix.prefix_key, str(self.device), self._backbone_state())
        kept = self.prefix_cache.get(key)
        if kept is None:
            inputs = dict(self.processor(text=["a"], return_tensors="pt").to(self.device, self.dtype))
            prompt = self._widened(inputs, [prefix.fused], first=True)
            bos = inputs["input_ids"][0, : int(prompt.columns[0])].tolist()
            full, prompt.width = prompt.width, len(bos) + prefix.num_tokens
            for name, value in prompt.inputs.items():
                if isinstance(value, torch.Tensor) and value.shape[:2] == (1, full) and name != "pixel_values":
                    prompt.inputs[name] = value[:, : prompt.width]
            with preserved_state(self.backbone), injected(prompt):
                cache = self.backbone.base_model(**prompt.inputs, use_cache=True, return_dict=True).past_key_values
            kept = cache, bos
            self.prefix_cache.put(key, kept, cache_bytes(cache))
        return kept

    def _prefilled(self: Any, demos: Any, options: Mapping[str, Any]) -> tuple[FusedPrompt, Any] | None:
        """A prompt that begins with a prefix, and the KV of that for each row; `None` where KV cannot be used."""
        prefix = same_prefix(demos)
        ids, config = options["input_ids"], options.get("generation_config")

        def setting(name: str) -> Any:
            given = [options.get(name), getattr(config, name, None), getattr(self.generation_config, name, None)]
            return next((value for value in given if value is not None), None)

        unusual = [
            "past_key_values", "cache_implementation", "prefill_chunk_size", "assistant_model", "custom_generate",
            "prompt_lookup_num_tokens", "use_mtp", "penalty_alpha", "dola_layers",
        ]  # fmt: skip
        if prefix is None or not len(prefix) or ids is None or setting("use_cache") is False:
            return None
        if not goes_on_behind_kv(self.backbone):
            return None
        mask = options.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        if any(setting(name) for name in unusual):
            return None
        cache, bos = self._prefix_kv(prefix)
        if not serves(cache, padded):
            return None
        prompt = self._fused_prompt(dict(options), [prefix] * len(ids), first=True)
        if not bool((prompt.columns.view(len(ids), -1)[:, 0] == len(bos)).all()):  # prompts that begin otherwise
            return None
        prompt.seen = len(bos) + prefix.num_tokens
        rows = len(ids) * max(int(setting("num_beams") or 1), int(setting("num_return_sequences") or 1))
        return prompt, grown_from(cache, rows)
