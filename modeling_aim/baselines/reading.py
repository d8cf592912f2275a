"""Demonstrations as KV in real caches, and a query that is answered behind one or several of them.

A `Reading` holds the pieces of one prompt: demonstrations and a query. What reads demonstrations gives a `Context`
(KV, and what its rows are); what is answered from is one `Expert`, or several, whose logits are averaged.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..backbone_aim import decoder_layers, image_positions
from ..state_aim import preserved_state

Inputs = dict[str, torch.Tensor]
CROSS_ATTENTION = ("cross_layer_interval", "cross_attention_layers")  # settings of decoders that have it
GRID_INPUTS = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")


class CannotServe(ValueError):
    """A backbone that a method cannot be run on; the message says why."""


@dataclass(frozen=True)
class Context:
    """Demonstrations that were read.

    Args:
        cache: keys and values; layers may have kept different rows.
        ids: of what was read, `(length,)`: also of rows that are not kept any more.
        places: positions of it, `(axes, length)`; several axes where an image has a grid of them.
        is_image: which of it are image tokens, `(length,)`.
        head: how many tokens at its beginning belong to no demonstration (BOS).
    """

    cache: DynamicCache
    ids: torch.Tensor
    places: torch.Tensor
    is_image: torch.Tensor
    head: int

    @property
    def next_place(self) -> int:
        """The position of what comes behind."""
        return int(self.places.max()) + 1 if self.places.numel() else 0

    def keep(self, rows: torch.Tensor | Sequence[torch.Tensor]) -> Context:
        """The same with some of its rows alone.

        Args:
            rows: indices `(kept,)` of rows for all layers; or for each layer `(kept,)`, or `(KV heads, kept)` where
                each head keeps rows of its own.
        """
        by_layer = [rows] * len(self.cache.layers) if isinstance(rows, torch.Tensor) else list(rows)
        kept = [_rows(layer, index) for layer, index in zip(self.cache.layers, by_layer, strict=True)]
        return replace(self, cache=cache_of(kept))


def _rows(layer: Any, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of some rows of a layer, in their order."""
    index = index.sort(dim=-1).values.to(layer.keys.device)
    if index.ndim == 1:
        return layer.keys[:, :, index], layer.values[:, :, index]
    return tuple(  # type: ignore[return-value]
        kv.gather(2, index[None, :, :, None].expand(len(kv), -1, -1, kv.shape[-1]))
        for kv in (layer.keys, layer.values)
    )


def cache_of(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache with these keys and values, a pair `(batch, KV heads, rows, width)` a layer."""
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def copied(cache: DynamicCache) -> DynamicCache:
    """A cache that grows by itself. Its layers concatenate old and new KV, so no KV is copied."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in layers_of(cache)]
    return own


def joined(caches: Sequence[DynamicCache]) -> DynamicCache:
    """The rows of several caches side by side."""
    layers = zip(*(layers_of(cache) for cache in caches), strict=True)
    return cache_of([tuple(torch.cat([getattr(x, n) for x in row], 2) for n in ("keys", "values")) for row in layers])  # type: ignore[misc]


def layers_of(cache: DynamicCache) -> list[Any]:
    """The layers of a cache, which hold `keys` and `values`."""
    return list(cache.layers)


def rows_of(cache: DynamicCache) -> float:
    """Rows that a cache holds, mean over layers."""
    return sum(layer.keys.shape[-2] for layer in layers_of(cache)) / max(len(layers_of(cache)), 1)


@dataclass(frozen=True)
class Expert:
    """A query behind a cache.

    Args:
        inputs: the backbone's inputs of what is not in the cache.
        places: positions of it, `(axes, 1, length)`.
        cache: what stands before it. The first pass adds to it.
        weight: of its logits among those of all experts.
        during: what is in force while its first pass runs.
    """

    inputs: Inputs
    places: torch.Tensor
    cache: DynamicCache = field(default_factory=DynamicCache)
    weight: float = 1.0
    during: Callable[[], AbstractContextManager[Any]] = nullcontext


Ready = Callable[[], list[Expert]]


class SeenError(Exception):
    """Ends a pass of which no more is wanted."""


class Reading:
    """The pieces of one prompt on a backbone.

    Args:
        backbone: in evaluation mode.
        encode: gives the backbone's inputs of some pieces: `encode(numbers, begins)`, with BOS where `begins`. Number
            `count` is the query.
        count: demonstrations.
        answer_lengths: how many tokens at the end of each demonstration are its answer.
        head: tokens of BOS.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        encode: Callable[[Sequence[int], bool], Mapping[str, Any]],
        count: int,
        answer_lengths: Sequence[int],
        head: int,
    ) -> None:
        self.backbone, self.encode, self.count, self.head = backbone, encode, count, head
        self.answer_lengths = list(answer_lengths)

    @property
    def numbers(self) -> list[int]:
        """Of all demonstrations."""
        return list(range(self.count))

    # --- reading

    @torch.no_grad()
    def context(self, numbers: Sequence[int], past: Context | None = None) -> Context:
        """Some demonstrations in one pass, from the beginning of a prompt or behind others.

        Args:
            numbers: which.
            past: what they stand behind; its cache is not changed.
        """
        if not numbers:
            empty = torch.zeros(0, dtype=torch.long, device=self.backbone.device)
            return Context(DynamicCache(), empty, empty[None], empty.bool(), 0)
        inputs = dict(self.encode(numbers, past is None))
        places = self.places(inputs, 0 if past is None else past.next_place)
        cache = DynamicCache() if past is None else copied(past.cache)
        forward(self.backbone, inputs, places, cache)
        check_cache(cache)
        ids = inputs["input_ids"][0]
        own = Context(cache, ids, places[:, 0], image_positions(self.backbone.config, ids), self.head)
        if past is None:
            return own
        ids, places, is_image = (torch.cat(pair, -1) for pair in zip(_about(past), _about(own), strict=True))
        return Context(cache, ids, places, is_image, past.head)

    @torch.no_grad()
    def alone(self) -> list[Context]:
        """Each demonstration by itself, all from the beginning of a prompt; those of one shape in one pass."""
        groups: dict[Any, list[tuple[int, Inputs]]] = {}
        for number in self.numbers:
            inputs = dict(self.encode([number], True))
            shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
            groups.setdefault(shapes, []).append((number, inputs))
        contexts: dict[int, Context] = {}
        for group in groups.values():
            batch = {name: torch.cat([inputs[name] for _, inputs in group]) for name in group[0][1]}
            places, cache = self.places(batch, 0), DynamicCache()
            forward(self.backbone, batch, places, cache)
            check_cache(cache)
            is_image = image_positions(self.backbone.config, batch["input_ids"])
            for row, (number, _) in enumerate(group):
                own = cache_of([(x.keys[row : row + 1], x.values[row : row + 1]) for x in layers_of(cache)])
                place = places[:, row if places.shape[1] > 1 else 0]
                contexts[number] = Context(own, batch["input_ids"][row], place, is_image[row], self.head)
        return [contexts[number] for number in self.numbers]

    def behind(self, context: Context, weight: float = 1.0) -> Expert:
        """The query behind a context."""
        inputs = dict(self.encode([self.count], not len(context.ids)))
        return Expert(inputs, self.places(inputs, context.next_place), copied(context.cache), weight)

    def whole(self, numbers: Sequence[int] | None = None) -> Expert:
        """The query behind some demonstrations, all in one pass, with nothing in a cache."""
        inputs = dict(self.encode([*(self.numbers if numbers is None else numbers), self.count], True))
        return Expert(inputs, self.places(inputs, 0))

    def places(self, inputs: Inputs, start: int) -> torch.Tensor:
        """Positions of some inputs from `start` on, `(axes, batch, length)`; three axes with an image grid."""
        ids = inputs["input_ids"]
        base: Any = self.backbone.base_model
        if not hasattr(base, "get_rope_index"):
            return torch.arange(start, start + ids.shape[1], device=ids.device)[None, None]
        known = inspect.signature(base.get_rope_index).parameters
        return base.get_rope_index(**{n: inputs[n] for n in GRID_INPUTS if n in known and n in inputs})[0] + start


def _about(context: Context) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return context.ids, context.places, context.is_image


def check_cache(cache: DynamicCache) -> None:
    """Raise `CannotServe` unless every layer holds keys and values of every token."""
    layers = layers_of(cache)
    if not layers or not all(type(x) is DynamicLayer and x.is_initialized for x in layers):
        raise CannotServe("some layers of its cache hold no keys and values of the prompt's tokens")


def check_backbone(backbone: PreTrainedModel) -> None:
    """Raise `CannotServe` for a backbone whose demonstrations are not keys and values of single tokens."""
    try:
        decoder_layers(backbone)
    except ValueError as error:
        raise CannotServe(str(error)) from error
    configs = (backbone.config, backbone.config.get_text_config(decoder=True))
    if any(hasattr(config, name) for config in configs for name in CROSS_ATTENTION):
        raise CannotServe("images reach its decoder by cross-attention, so they are not among the KV of its tokens")
    kinds = set(getattr(backbone.config.get_text_config(decoder=True), "layer_types", None) or ())
    recurrent = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
    if recurrent:
        raise CannotServe(f"its layers ({', '.join(recurrent)}) keep a state and no KV of single tokens")


def checked_depth(reading: Reading, depth: int, name: str, least: int = 1) -> int:
    """A setting `depth` of a method, or `ValueError` where the backbone has not as many layers."""
    layers = len(decoder_layers(reading.backbone))
    if not least <= depth < layers:
        raise ValueError(
            f"{name}:depth={depth}: expected {least} to {layers - 1}, for this backbone has {layers} layers."
        )
    return depth


# --- passes


@torch.no_grad()
def forward(
    backbone: PreTrainedModel, inputs: Mapping[str, Any], places: torch.Tensor, cache: DynamicCache, logits: int = 0
) -> Any:
    """One pass behind a cache, which grows.

    Args:
        backbone: the backbone.
        inputs: of what is new, `(batch, length)`; `inputs_embeds`, where there are such, stand for its ids and images.
        places: positions of it.
        cache: what stands before it.
        logits: of how many last tokens logits are wanted.

    Returns:
        Logits `(batch, logits, vocabulary)`; `None` where none are wanted.
    """
    call_inputs = dict(inputs)
    batch, new = call_inputs["input_ids"].shape
    if "inputs_embeds" in call_inputs:
        call_inputs.pop("input_ids")
    past = cache.get_seq_length()
    call_inputs["attention_mask"] = torch.ones(batch, past + new, dtype=torch.long, device=places.device)
    call_inputs["position_ids"] = places.expand(-1, batch, -1) if len(places) > 1 else places[0].expand(batch, -1)
    call_inputs |= {"past_key_values": cache, "use_cache": True, "return_dict": True}
    with preserved_state(backbone), fitted_masks(backbone, cache):
        if not logits:
            backbone.base_model(**call_inputs)
            return None
        if "logits_to_keep" in inspect.signature(backbone.forward).parameters:
            call_inputs["logits_to_keep"] = logits
        return backbone(**call_inputs).logits[:, -logits:]


@contextmanager
def fitted_masks(backbone: PreTrainedModel, cache: DynamicCache) -> Iterator[None]:
    """Give each layer a mask as wide as its own KV, where layers have kept different numbers of rows.

    The backbone makes one mask for all. All old rows are seen, so a mask is cut or widened at its left end.
    """
    lengths = [layer.keys.shape[-2] if layer.is_initialized else 0 for layer in layers_of(cache)]
    if len(set(lengths)) < 2:
        yield
        return

    def fit(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask, states = kwargs.get("attention_mask"), args[0] if args else kwargs["hidden_states"]
        if not isinstance(mask, torch.Tensor):
            return None
        missing = lengths[number] + states.shape[1] - mask.shape[-1]
        if missing > 0:
            mask = torch.cat([mask[..., :1].expand(*mask.shape[:-1], missing), mask], dim=-1)
        return args, {**kwargs, "attention_mask": mask[..., max(-missing, 0) :]}

    with ExitStack() as hooks:
        for number, layer in enumerate(decoder_layers(backbone)):
            hooks.enter_context(layer.register_forward_pre_hook(partial(fit, number), with_kwargs=True))
        yield


class Answering:
    """An answer that several experts write together: their logits, weighted, are those of a product of experts.

    Args:
        backbone: the backbone.
        experts: at least one; weights add up to 1.

    Attributes:
        logits: of the next token, `(vocabulary,)` in float32.
        kv_bytes: keys and values after the prompt, of all experts.
        tokens: rows of these, mean over layers.
    """

    def __init__(self, backbone: PreTrainedModel, experts: Sequence[Expert]) -> None:
        self.backbone, self.weights = backbone, [expert.weight for expert in experts]
        self.caches, self.places = [copied(expert.cache) for expert in experts], []
        logits = []
        for expert, cache in zip(experts, self.caches, strict=True):
            with expert.during():
                logits.append(forward(backbone, expert.inputs, expert.places, cache, logits=1))
            self.places.append(int(expert.places.max()) + 1)
        self.axes = len(experts[0].places)
        self.logits = self._mixed(logits)[-1]
        kept = [kv for cache in self.caches for layer in layers_of(cache) for kv in (layer.keys, layer.values)]
        self.kv_bytes = sum(kv.numel() * kv.element_size() for kv in kept)
        self.tokens = sum(rows_of(cache) for cache in self.caches)

    def _mixed(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        mixed = sum(weight * rows[0].float() for weight, rows in zip(self.weights, logits, strict=True))
        assert isinstance(mixed, torch.Tensor)
        return mixed

    def fork(self) -> Answering:
        """Another answer from here on."""
        own = copy.copy(self)
        own.caches, own.places = [copied(cache) for cache in self.caches], list(self.places)
        return own

    def push(self, ids: Sequence[int]) -> torch.Tensor:
        """Continue with some tokens; returns the logits after each of them, `(tokens, vocabulary)`."""
        tokens = torch.tensor([list(ids)], device=self.logits.device)
        logits = []
        for number, cache in enumerate(self.caches):
            start = self.places[number]
            places = torch.arange(start, start + len(ids), device=tokens.device).expand(self.axes, 1, -1)
            inputs = {"input_ids": tokens}
            logits.append(forward(self.backbone, inputs, places, cache, logits=len(ids)))
            self.places[number] += len(ids)
        mixed = self._mixed(logits)
        self.logits = mixed[-1]
        return mixed

    def write(self, most: int, ends: Sequence[int] = (), never: Sequence[int] = ()) -> list[int]:
        """Greedy decoding.

        Args:
            most: new tokens, at most.
            ends: ids that end an answer; they are not part of it.
            never: ids that are not written.
        """
        written: list[int] = []
        while len(written) < most:
            logits = self.logits.clone()
            logits[list(never)] = -torch.inf
            best = int(logits.argmax())
            if best in ends:
                break
            written.append(best)
            if len(written) < most:
                self.push([best])
        return written

    def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probability of each of some tokens that would come next."""
        first, fork = self.logits.log_softmax(-1)[None], self.fork()
        rest = fork.push(ids[:-1]).log_softmax(-1) if len(ids) > 1 else first[:0]
        return torch.cat([first, rest])[range(len(ids)), list(ids)].tolist()
