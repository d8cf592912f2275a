"""Read hidden states and image features from a frozen backbone, in one pass that runs no further than needed.

The hooks of `watch_layers` see what passes through decoder and vision tower. No family is named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .backbone_aim import USE_INPUT_ADVICE, decoder_layers, embedding_weight, image_positions, lm_head
from .batching_aim import SharedImages, repeat_images, shared_images
from .state_aim import answering, preserved_state

LAST_STATE = -1  # among read layers: the state after the last norm
EMBEDDING_ARGUMENTS = {
    "inputs_embeds", "attention_mask", "position_ids", "input_ids", "cache_position", "past_key_values",
}  # fmt: skip


@dataclass
class _Capture:
    """What is captured of one pass of a backbone.

    Args:
        layers: the depths whose states are kept; `LAST_STATE` for those that enter the LM head.
        images: keep what enters the first layer, and what leaves the vision tower.
        share_images: call the vision tower with each of several equal images once.
        stop_at_decoder: keep the arguments of the decoder, and do not run it.

    Attributes:
        states: hidden states `(batch, length, width)` by depth.
        entered: what enters the first layer.
        vision: what leaves the vision tower.
        shared: the call of the vision tower, where some of its images are equal.
        decoder_arguments: the keyword arguments of the decoder.
    """

    layers: frozenset[int] = frozenset()
    images: bool = False
    share_images: bool = False
    stop_at_decoder: bool = False
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    entered: torch.Tensor | None = None
    vision: torch.Tensor | None = None
    shared: SharedImages | None = None
    decoder_arguments: dict[str, Any] = field(default_factory=dict)

    def finished(self, depth: int) -> bool:
        """Whether no wanted state lies deeper than `depth`."""
        return LAST_STATE not in self.layers and max(self.layers, default=0) <= depth


_CAPTURE: ContextVar[_Capture | None] = ContextVar("aim_capture", default=None)


class _ReadFinished(Exception):
    """Raised after the last layer that is read, so that later layers do not run."""


def watch_layers(backbone: PreTrainedModel) -> None:
    """Register the hooks through which `read_hidden_states` sees layers and images.

    The hooks do nothing outside a read, so several plug-ins can share a backbone, and a read in one thread is
    invisible to the others (`ContextVar`).
    """
    decoder = backbone.get_decoder()
    if _keep_decoder in decoder._forward_pre_hooks.values():  # another plug-in has registered them
        return
    decoder.register_forward_pre_hook(_keep_decoder, with_kwargs=True)
    head = lm_head(backbone)
    if backbone.base_model is backbone and head is not None:
        head.register_forward_pre_hook(_keep_last)
    tower = backbone.get_encoder("image") if hasattr(backbone, "get_encoder") else backbone
    if tower is not None and tower is not backbone:
        tower.register_forward_pre_hook(_share_images, with_kwargs=True)
        tower.register_forward_hook(_keep_vision)
    with suppress(ValueError):  # without a stack of layers only the last state can be read, and no image features
        layers = decoder_layers(backbone)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(_keep_layer_input, number), with_kwargs=True)
        layers[-1].register_forward_hook(partial(_keep_layer_output, len(layers)))


def layer_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | str, torch.Tensor]:
    """The hidden states `(batch, length, width)` that a decoder layer is called with, and the argument they are.

    Raises:
        ValueError: what it is called with has another shape.
    """
    named = [("hidden_states", kwargs["hidden_states"])] if "hidden_states" in kwargs else []
    arguments: list[tuple[int | str, Any]] = [*named, *enumerate(args), *kwargs.items()]
    states = [(place, value) for place, value in arguments if isinstance(value, torch.Tensor) and value.ndim >= 3]
    states = [(place, value) for place, value in states if value.is_floating_point()]
    if states and states[0][1].ndim == 3:
        return states[0]
    shape = f"with states of the shape {tuple(states[0][1].shape)}" if states else f"with {sorted(kwargs)}"
    raise ValueError(
        f"A decoder layer is called {shape} where (batch, length, width) is expected, so states cannot be read or "
        f"enter at depth. {USE_INPUT_ADVICE}"
    )


def _keep_layer_input(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Keep the input of layer `number` as the state at that depth.

    Also at shallower wanted depths whose layers did not run (cross-attention layers without an image).
    """
    capture = _CAPTURE.get()
    if capture is None:
        return
    wanted = [depth for depth in capture.layers - capture.states.keys() if 0 < depth <= number]
    enters = capture.images and capture.entered is None
    if wanted or enters:
        with nullcontext() if wanted else suppress(ValueError):  # images may be seen in the tower instead
            states = layer_input(args, kwargs)[1]
            capture.states.update(dict.fromkeys(wanted, states))
            capture.entered = states if enters else capture.entered
    if capture.finished(number):
        raise _ReadFinished


def _keep_layer_output(
    number: int, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor | tuple[torch.Tensor, ...]
) -> None:
    capture = _CAPTURE.get()
    if capture is not None and number in capture.layers:
        capture.states[number] = output[0] if isinstance(output, tuple) else output
        if capture.finished(number):
            raise _ReadFinished


def _keep_last(head: nn.Module, args: tuple[Any, ...]) -> None:
    """Read a backbone that has no separate model below its LM head from the input of the head."""
    capture = _CAPTURE.get()
    if capture is not None and LAST_STATE in capture.layers:
        capture.states[LAST_STATE] = args[0]
        raise _ReadFinished


def _share_images(
    tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    capture = _CAPTURE.get()
    if capture is None or not capture.share_images:
        return None
    capture.shared = shared = shared_images(args, kwargs)
    return None if shared is None else (shared.args, shared.kwargs)


def _keep_vision(tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    capture = _CAPTURE.get()
    if capture is None:
        return None
    if capture.shared is not None:
        output = repeat_images(tower, capture.shared, output)
    if capture.images:
        first = output if isinstance(output, torch.Tensor) else getattr(output, "last_hidden_state", None)
        capture.vision = output[0] if first is None else first
    return output


def _keep_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    capture = _CAPTURE.get()
    if capture is not None and capture.stop_at_decoder:
        capture.decoder_arguments = dict(kwargs)
        raise _ReadFinished


@contextmanager
def _captured(backbone: PreTrainedModel, capture: _Capture) -> Iterator[None]:
    """Capture what `capture` asks for while the block runs the backbone; stop the pass once everything is captured.

    The backbone is in inference mode: what is read is kept, and dropout would be kept with it.
    """
    token = _CAPTURE.set(capture)
    try:
        with answering(backbone), preserved_state(backbone), suppress(_ReadFinished):
            yield
    finally:
        _CAPTURE.reset(token)


@torch.no_grad()
def decoder_inputs(backbone: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The embeddings `(batch, length, width)` that the text decoder gets for a prompt.

    Raises:
        ValueError: it gets more than embeddings at consecutive positions.
    """
    capture = _Capture(stop_at_decoder=True)
    with _captured(backbone, capture):
        backbone.base_model(**inputs, use_cache=False, return_dict=True)
    arguments = capture.decoder_arguments
    embeddings, mask, places = (arguments.get(name) for name in ("inputs_embeds", "attention_mask", "position_ids"))
    more = sorted(
        name for name, value in arguments.items() if name not in EMBEDDING_ARGUMENTS and _holds_tensors(value)
    )
    if not isinstance(embeddings, torch.Tensor):
        embeddings, more = torch.empty(0), ["images by cross-attention, or ids instead of embeddings"]
    elif isinstance(places, torch.Tensor) and places.ndim == 3:
        more.append("positions in the image grid (M-RoPE)")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        more.append("an attention mask of its own")
    if more:
        raise ValueError(
            f"{type(backbone).__name__} cannot answer from prompt embeddings alone: its decoder also gets "
            f"{', '.join(more)}. Use generate() here; docs/BANK.md says which backbones embeddings serve."
        )
    return embeddings


def _holds_tensors(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, torch.Tensor)


def _run(backbone: PreTrainedModel, inputs: Mapping[str, Any], capture: _Capture) -> _Capture:
    """Run the backbone only as far as `capture` needs, and return it."""
    if capture.layers or capture.images:  # else the embeddings alone
        with _captured(backbone, capture):
            output = backbone.base_model(**inputs, use_cache=False, return_dict=True)
            capture.states[LAST_STATE] = output.last_hidden_state
    return capture


@torch.no_grad()
def read_hidden_states(
    backbone: PreTrainedModel, inputs: Mapping[str, Any], read_layers: Sequence[int], share_images: bool = False
) -> torch.Tensor:
    """One forward pass without LM head, KV cache or gradient.

    Args:
        backbone: the frozen backbone, prepared by `watch_layers`.
        inputs: a padded batch of the backbone's own inputs.
        read_layers: as in `AimConfig`; layers after the last of them are not run.
        share_images: look for equal images, so that the vision tower sees each of them once.

    Returns:
        Hidden states `(batch, length, len(read_layers) * hidden size)`.
    """
    capture = _run(backbone, inputs, _Capture(frozenset(read_layers) - {0}, share_images=share_images))
    return _joined(backbone, inputs, capture, read_layers)


@torch.no_grad()
def read_with_images(
    backbone: PreTrainedModel, inputs: Mapping[str, Any], read_layers: Sequence[int], share_images: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of `read_hidden_states` and `image_features` from one pass."""
    capture = _run(backbone, inputs, _Capture(frozenset(read_layers) - {0}, images=True, share_images=share_images))
    return _joined(backbone, inputs, capture, read_layers), _pooled_images(backbone, inputs, capture)


def _joined(
    backbone: PreTrainedModel, inputs: Mapping[str, Any], capture: _Capture, read_layers: Sequence[int]
) -> torch.Tensor:
    """The states of several depths side by side; depth 0 is the embedding of the words."""
    states = [capture.states[k] if k else backbone.get_input_embeddings()(inputs["input_ids"]) for k in read_layers]
    return torch.cat([state.to(states[0].device) for state in states], dim=-1)


@torch.no_grad()
def image_features(backbone: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The images of each row as the backbone's decoder gets them, averaged over their positions.

    Vision tower and connector run, the decoder does not. Where images have no positions in the prompt
    (cross-attention), the output of the vision tower is averaged instead.

    Args:
        backbone: prepared by `watch_layers`.
        inputs: a padded batch of the backbone's own inputs.

    Returns:
        `(batch, width)` in float32, zeros in rows without an image.
    """
    return _pooled_images(backbone, inputs, _run(backbone, inputs, _Capture(images=True)))


def _pooled_images(backbone: PreTrainedModel, inputs: Mapping[str, Any], capture: _Capture) -> torch.Tensor:
    ids = inputs["input_ids"]
    image_mask, entered = image_positions(backbone.config, ids), capture.entered
    if entered is not None and entered.ndim == 3 and bool(image_mask.any()):
        row, place = image_mask.nonzero()[0]
        plain = backbone.get_input_embeddings()(ids[row, place][None])[0]
        if not torch.allclose(entered[row, place].to(plain), plain):  # else images come by another way
            weights = image_mask.to(entered.device)[..., None]
            total = torch.where(weights, entered.float(), 0.0).sum(dim=1)
            return total / weights.sum(dim=1).clamp(min=1)
    seen, pixels = capture.vision, inputs.get("pixel_values")
    if seen is None or pixels is None or seen.shape[0] % len(ids) or pixels.shape[0] != len(ids):
        return torch.zeros(len(ids), embedding_weight(backbone).shape[1])
    there = pixels.reshape(len(ids), -1).abs().amax(dim=1) > 0
    pooled = seen.float().reshape(len(ids), -1, seen.shape[-1]).mean(dim=1)
    return torch.where(there.to(pooled.device)[:, None], pooled, 0.0)
