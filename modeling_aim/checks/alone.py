"""How far the backbone itself, without AIM, goes from itself when what enters it is rounded once more.

A discrete choice inside a backbone (the experts of a token, the code of an image patch) can turn on one rounding
error, and what one rounding becomes in its logits differs between backbones. No tolerance for all of them tells that
from a defect of AIM; the backbone's own passes do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..backbone_aim import image_positions
from ..reading_aim import read_hidden_states
from ..state_aim import preserved_state
from .case import Case, difference

DRAWS = 8  # of roundings; of those that a choice turns on, some do so in a part of the draws only
LOGITS: tuple[int, ...] = ()  # in place of depths whose states are compared


def under_rounding(case: Case, prompts: Sequence[Mapping[str, Any]], layers: Sequence[int] = LOGITS) -> float:
    """The largest difference of a word of plain prompts when pixels and embeddings are off by one rounding.

    Args:
        case: the model; its demonstrations are not used.
        prompts: the backbone's own inputs of one prompt each.
        layers: depths whose states are compared, as in `AimConfig`; where there are none, the logits are.
    """
    largest = 0.0
    for inputs in prompts:
        expected = _words(case, inputs, layers)
        for seed in range(DRAWS):
            generator = torch.Generator().manual_seed(seed)
            with _embeddings_rounded(case.model.backbone, generator):
                rounded = {name: _rounded(value, generator) for name, value in inputs.items()}
                largest = max(largest, difference(_words(case, rounded, layers), expected))
    return largest


@torch.no_grad()
def _words(case: Case, inputs: Mapping[str, Any], layers: Sequence[int]) -> torch.Tensor:
    """Logits or states of the words of one prompt, `(words, width)`."""
    backbone, ids = case.model.backbone, inputs["input_ids"]
    with preserved_state(backbone):
        values = read_hidden_states(backbone, inputs, layers) if layers else backbone(**inputs).logits
    return values[~image_positions(backbone.config, ids).to(values.device)]


@contextmanager
def _embeddings_rounded(backbone: Any, generator: torch.Generator) -> Iterator[None]:
    """Have the embeddings of the backbone off by one rounding meanwhile."""
    embeddings = backbone.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, output: _rounded(output, generator))
    try:
        yield
    finally:
        handle.remove()


def _rounded(value: Any, generator: torch.Generator) -> Any:
    """Numbers off by up to one unit in their last place; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    off = 2 * torch.rand(value.shape, generator=generator).to(value.device) - 1
    return (value.float() * (1 + torch.finfo(value.dtype).eps * off)).to(value.dtype)
