"""Hooks on decoder layers: attention of the last tokens over all, and tokens that leave the prompt behind a layer.

Attention functions are not patched. An attention module that has run is called once more by hand, with its last
queries alone and with eager attention, which gives its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backbone_aim import decoder_layers
from ..reading_aim import layer_input
from .reading import CannotServe


def attention_of(layer: nn.Module) -> Any:
    """The self-attention of a decoder layer.

    Raises:
        CannotServe: no function knows its layer and its configuration.
    """
    for module in layer.modules():
        if module is not layer and isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "config"):
            return module
    raise CannotServe(f"{type(layer).__name__} has no attention module that knows its place (layer_idx)")


def _last(value: object, length: int, window: int) -> Any:
    """What of an argument of an attention module belongs to its last tokens."""
    if isinstance(value, (tuple, list)):
        return type(value)(_last(item, length, window) for item in value)
    if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.is_floating_point() and value.shape[-2] == length:
        return value[..., -window:, :]
    if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.shape[-1:] == (length,):
        return value[..., -window:]
    return value


def window_attention(module: Any, kwargs: Mapping[str, Any], window: int) -> torch.Tensor:
    """Attention weights of the last tokens of a pass that a module has just made, `(heads, window, rows)`.

    Args:
        module: the attention module.
        kwargs: what it was called with.
        window: how many tokens.

    Raises:
        CannotServe: it gives no weights.
    """
    states, cache = kwargs["hidden_states"], kwargs["past_key_values"]
    length, window = states.shape[1], min(window, states.shape[1])
    scratch = copy.copy(cache)
    scratch.layers = list(cache.layers)
    layer = scratch.layers[module.layer_idx] = copy.copy(cache.layers[module.layer_idx])
    rows = layer.keys.shape[-2]
    layer.keys, layer.values = layer.keys[..., : rows - window, :], layer.values[..., : rows - window, :]
    mask, low = kwargs.get("attention_mask"), torch.finfo(states.dtype).min
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        mask = mask[:, :, -window:]
        mask = mask if mask.is_floating_point() else torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, low)
    else:
        mask = torch.full((1, 1, window, rows), low, dtype=states.dtype, device=states.device)
        mask = mask.triu(rows - window + 1)
    named = ("hidden_states", "past_key_values", "attention_mask")
    more = {name: _last(value, length, window) for name, value in kwargs.items() if name not in named}
    own = module.config
    module.config = copy.copy(own)
    module.config._attn_implementation_internal = "eager"
    try:
        output = module.forward(
            hidden_states=states[:, -window:], past_key_values=scratch, attention_mask=mask, **more
        )
    finally:
        module.config = own
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if not isinstance(weights, torch.Tensor) or weights.ndim != 4:
        raise CannotServe(f"{type(module).__name__} gives no attention weights")
    return weights[0]


@contextmanager
def watched_attention(
    backbone: PreTrainedModel,
    window: int,
    layers: Sequence[int] | None = None,
    seen: dict[int, torch.Tensor] | None = None,
) -> Iterator[dict[int, torch.Tensor]]:
    """The attention of the last tokens of each pass meanwhile, by layer, `(heads, window, rows)`.

    Args:
        backbone: the backbone.
        window: how many tokens.
        layers: which, counted from 0; all when `None`.
        seen: where it is kept.
    """
    seen = {} if seen is None else seen

    def watch(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        arguments = {**kwargs, **({"hidden_states": args[0]} if args else {})}
        seen[number] = window_attention(module, arguments, window)

    with ExitStack() as hooks:
        for number, layer in enumerate(decoder_layers(backbone)):
            if layers is None or number in layers:
                module = attention_of(layer)
                hooks.enter_context(module.register_forward_hook(partial(watch, number), with_kwargs=True))
        yield seen


Choose = Callable[[torch.Tensor, torch.Tensor, Mapping[int, torch.Tensor]], torch.Tensor]


@contextmanager
def dropping(backbone: PreTrainedModel, stages: Mapping[int, Choose], watch: Sequence[int] = ()) -> Iterator[None]:
    """Tokens leave the prompt of the pass meanwhile: later layers neither compute nor keep them.

    Args:
        backbone: the backbone.
        stages: by the layer at whose input tokens leave: what chooses those that stay. It is called with the states
            `(length, width)`, the original places of these tokens `(length,)` and attention of the last token by
            layer `(heads, length)`, and gives indices into the states.
        watch: layers whose attention is watched.
    """
    seen: dict[int, torch.Tensor] = {}
    here: dict[str, torch.Tensor] = {}  # original places of the tokens that are there, and of all

    def enter(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place, states = layer_input(args, kwargs)
        if number == 0:
            here["all"] = here["kept"] = torch.arange(states.shape[1], device=states.device)
        if number in stages:
            rows = stages[number](states[0], here["kept"], {n: weights[:, -1] for n, weights in seen.items()})
            here["kept"], states = here["kept"][rows], states[:, rows]
        if len(here["kept"]) == len(here["all"]):
            return None
        more = {name: _of_tokens(value, here["kept"], len(here["all"])) for name, value in kwargs.items()}
        if isinstance(place, str):
            return args, {**more, place: states}
        return (*args[:place], states, *args[place + 1 :]), more

    with ExitStack() as hooks:
        if watch:
            hooks.enter_context(watched_attention(backbone, 1, watch, seen))
        for number, layer in enumerate(decoder_layers(backbone)):
            hooks.enter_context(layer.register_forward_pre_hook(partial(enter, number), with_kwargs=True))
        yield


def _of_tokens(value: Any, kept: torch.Tensor, length: int) -> Any:
    """What of an argument of a decoder layer, which is made for `length` tokens, belongs to those that are kept."""
    if isinstance(value, (tuple, list)):
        return type(value)(_of_tokens(item, kept, length) for item in value)
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    if value.shape[-2:] == (length, length):  # a mask
        return value[..., kept, :][..., kept]
    if value.is_floating_point() and value.shape[-2] == length:  # cosine and sine
        return value[..., kept, :]
    return value[..., kept] if value.shape[-1] == length and not value.is_floating_point() else value
