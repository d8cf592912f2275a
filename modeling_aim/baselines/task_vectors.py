"""A state of the decoder that holds a task, in place of demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..backbone_aim import decoder_layers
from ..configuration_aim import default_depth
from ..reading_aim import layer_input
from .reading import Expert, Reading, Ready, SeenError, checked_depth, forward


def task_vector(reading: Reading, depth: int | None = None, reads: int = 8) -> Ready:
    """Nothing in the context: one state of the middle of the decoder, which holds the task, replaces the query's.

    Hendel et al., In-Context Learning Creates Task Vectors (arXiv 2310.15916): the state at the last token of a
    demonstration's question after the other demonstrations, mean over several of them. MTV (arXiv 2406.15334) is
    its successor with attention heads, which it has to search for each task.

    Args:
        reading: the prompt.
        depth: behind how many layers; two fifths of them when `None`.
        reads: how many demonstrations are asked, at most.

    Raises:
        ValueError: the backbone has not as many layers.
    """
    depth = checked_depth(
        reading,
        default_depth(reading.backbone.config.get_text_config(decoder=True)) if depth is None else depth,
        "task-vector",
    )
    numbers = reading.numbers[-reads:]
    states = [_state_of(reading, number, depth) for number in numbers]
    mean = torch.stack(states).mean(0) if states else None

    def answer() -> list[Expert]:
        expert = reading.whole([])
        return [expert if mean is None else replace(expert, during=partial(_replaced, reading.backbone, depth, mean))]

    return answer


def _state_of(reading: Reading, number: int, depth: int) -> torch.Tensor:
    """The state of the last token before a demonstration's answer, behind all other demonstrations."""
    others = [other for other in reading.numbers if other != number]
    inputs = dict(reading.encode([*others, number], True))
    length = inputs["input_ids"].shape[1]
    length_asked, states = length - reading.answer_lengths[number], []
    places = reading.places(inputs, 0)[..., :length_asked]
    inputs = {
        name: value[:, :length_asked] if _by_token(name, value, length) else value for name, value in inputs.items()
    }

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        states.append(layer_input(args, kwargs)[1][0, -1])
        raise SeenError

    hook = decoder_layers(reading.backbone)[depth].register_forward_pre_hook(see, with_kwargs=True)
    try:
        with suppress(SeenError):
            forward(reading.backbone, inputs, places, DynamicCache())
    finally:
        hook.remove()
    return states[0]


def _by_token(name: str, value: torch.Tensor, length: int) -> bool:
    return value.ndim >= 2 and value.shape[1] == length and not name.startswith(("pixel", "image"))


@contextmanager
def _replaced(backbone: PreTrainedModel, depth: int, state: torch.Tensor) -> Iterator[None]:
    """The state of the last token is another one at the input of a layer."""

    def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place, states = layer_input(args, kwargs)
        states = torch.cat([states[:, :-1], state.to(states).expand(len(states), 1, -1)], 1)
        if isinstance(place, str):
            return args, {**kwargs, place: states}
        return (*args[:place], states, *args[place + 1 :]), kwargs

    hook = decoder_layers(backbone)[depth].register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
