"""The only new weights: one small map from hidden states of the frozen backbone to its own input embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from .configuration_aim import AimConfig


class AimProjector(nn.Module):
    """Turn each kept hidden state of a demonstration into one fused virtual token (AIM, section 3.2).

    The forms, with `n` the read width (hidden size x joined layers) and `h` the hidden size:

    * `linear_norm`: `Linear(n, h)`, then `LayerNorm(h)`: the paper's;
    * `linear`: `s Linear(n, h)`; states of inner layers, whose size no norm has set, get unit variance first;
    * `mlp`: `LayerNorm(n)`, `Linear(n, m)`, GELU, `s Linear(m, h)`;
    * `residual`: the state itself, plus a map that starts at zero. With `u_k = x_k / rms(x_k)` for the state `x_k` of
      each of the joined layers, and `v` their mean: `s (v / rms(v) + Linear(n, h)(u_1, u_2, ...))`. It presumes that
      hidden states and input embeddings share directions;
    * `residual_mlp`: the same with `Linear(n, m)`, GELU, `Linear(m, h)` for the map.

    The inner width `m` is `config.projector_intermediate_size`, or `2 * h`. The constant `s` is `config.projector_norm
    / sqrt(h)`, the size of a number in an input embedding: what is learned is measured in embeddings, so a learning
    rate means the same where these are small.

    Whatever the form, an untrained projector gives vectors whose norm is about `config.projector_norm`: a LayerNorm
    of gain 1 would give `sqrt(h)`, tens of times the norm of an input embedding, so its gain starts at `s`.
    """

    def __init__(self, config: AimConfig) -> None:
        super().__init__()
        self.width = width = config.hidden_size
        read_width = width * len(config.read_layers)
        inner = config.projector_intermediate_size or 2 * width
        self.scale = config.projector_norm * width**-0.5
        self.residual = config.projector_form.startswith("residual")
        self.scale_states = config.projector_form == "linear" and list(config.read_layers) != [-1]
        self.layers = nn.Sequential()
        if config.projector_form == "mlp":
            self.layers.append(nn.LayerNorm(read_width))
        if config.projector_form.endswith("mlp"):
            self.layers.extend([nn.Linear(read_width, inner), nn.GELU(), nn.Linear(inner, width)])
        else:
            self.layers.append(nn.Linear(read_width, width))
        if config.projector_form == "linear_norm":
            self.layers.append(nn.LayerNorm(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, so that the output norm is `config.projector_norm` for inputs of unit variance."""
        gelu_scale = 0.425**-0.5  # second moment of GELU on a standard normal is 0.425
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for linear in linears:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        if self.residual:
            nn.init.zeros_(linears[-1].weight)
        elif len(linears) > 1:
            linears[-1].weight.mul_(gelu_scale)
        if isinstance(self.layers[-1], nn.LayerNorm):
            nn.init.constant_(self.layers[-1].weight, self.scale)
            nn.init.zeros_(self.layers[-1].bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `states` `(..., n)` to fused tokens `(..., h)`, in the projector's own dtype."""
        states = states.to(next(self.parameters()).dtype)
        if self.residual:
            joined = nn.functional.rms_norm(states.unflatten(-1, (-1, self.width)), (self.width,))
            state = nn.functional.rms_norm(joined.mean(dim=-2), (self.width,))
            return self.scale * (state + self.layers(joined.flatten(-2)))
        found = self.layers(nn.functional.rms_norm(states, states.shape[-1:]) if self.scale_states else states)
        return found if isinstance(self.layers[-1], nn.LayerNorm) else self.scale * found


def projector_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Identity of projector weights, the same in float32 and bfloat16: sha256 of their values rounded to bfloat16."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        rounded = weights[name].detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
