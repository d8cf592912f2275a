"""A projector with random weights: a control whose fused tokens say nothing."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ..configuration_aim import AimConfig
from ..projector_aim import AimProjector


def random_projector(config: AimConfig, seed: int, scale: torch.Tensor | None = None) -> nn.Module:
    """An untrained projector with the weights of a seed: a control whose fused tokens say nothing.

    Untrained residual forms pass the state on, which says much: at the input `linear` and `mlp` of the same size stand
    for them, at depth a random rotation of the state.

    Args:
        config: of the projector that it stands for.
        seed: of the weights.
        scale: the calibration of that projector, where it has one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.enters_at_depth:
            return RandomRotation(config.hidden_size)
        plain = copy.deepcopy(config)
        plain.projector_form = config.projector_form.replace("residual_mlp", "mlp").replace("residual", "linear")
        projector = AimProjector(plain).eval()
        projector.set_scale(scale)
        return projector


class RandomRotation(nn.Module):
    """Turns each state of a depth into a random direction, always the same for the same state, and keeps its size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("rotation", nn.init.orthogonal_(torch.empty(width, width)))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """States `(tokens, depths x width)`, each depth rotated."""
        rotation = self.get_buffer("rotation").to(states)
        return (states.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)
