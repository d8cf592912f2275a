"""The only new weights: one small map from hidden states of the frozen backbone to fused tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from .configuration_aim import AimConfig
from .files_aim import file_digest, read_safetensors, safetensors_metadata

MOST_WEIGHTS = 2**24
PROJECTOR_WEIGHTS = "aim_projector.safetensors"
FORM_KEY = "aim_form"  # in the metadata of the weights: what they are bound to
DIGEST_KEY = "projector_sha256"  # in config.json: digest of the weights' file, which belongs to it
LARGEST_VALUE = 3.0  # of a calibrated state, in units of the standard deviation of its channels
MEDIAN_OF_NORMAL = 0.6745  # median size of a standard normal
SMALLEST_SCALE = 0.05  # of a channel, relative to the median of all channels of its depth
SCALE_KEY = "channel_scale"  # the scales among the weights, where the projector is calibrated


class AimProjector(nn.Module):
    """Turn each kept hidden state of a demonstration into one fused virtual token (AIM, section 3.2).

    With `n` the read width (hidden size `h` x read layers) and `e` the entry width (`h` x entry layers), there are two
    kinds of forms.

    Where states enter at the depth where they were read (`config.enters_at_depth`; `e = n`), a form begins as the
    identity and works without training. With `x_k` the state of each depth and `u_k = x_k / rms(x_k)`:

    * `identity`: `x_k`; no weights;
    * `residual`: `x_k + rms(x_k) map_k(u_1, u_2, ...)`, with `Linear(n, e)` for the map, zero at the start;
    * `residual_mlp`: the same with `Linear(n, m)`, GELU, `Linear(m, e)`, of which the last one is zero at the start.

    Where states enter at the input embeddings (`entry_layers=[0]`; `e = h`), a projector must be trained:

    * `linear_norm`: `Linear(n, h)`, then `LayerNorm(h)`: the paper's;
    * `linear`: `s Linear(n, h)`; states of inner layers, which passed no norm, are scaled to unit variance first;
    * `mlp`: `LayerNorm(n)`, `Linear(n, m)`, GELU, `s Linear(m, h)`;
    * `residual`, `residual_mlp`: `s (v / rms(v) + map(u_1, u_2, ...))`, where `v` is the mean of the `u_k`, with the
      same maps. They assume that hidden states and input embeddings share directions.

    The inner width `m` is `config.projector_intermediate_size`, or `2 * h`, or less where that is over 2**24 weights.
    The constant `s` is `config.projector_norm / sqrt(h)`, the RMS of an input embedding. Learned changes are relative
    to it (at depth, to the RMS of the state), so that a learning rate has the same effect on backbones with small
    embeddings.

    Middle layers have a few channels that are tens of times larger than the others, and attention sinks: tokens whose
    norm is a huge multiple of the median. At the input embeddings neither belongs. So a projector to the input that
    reads such layers is calibrated at the start of training (`calibrate`): each channel is divided by its scale, each
    state by its own, and values are clipped at three standard deviations. The scales are stored with the weights;
    without them, and at depth, states are taken as they are.

    At the input, an untrained projector gives vectors whose norm is about `config.projector_norm`: a LayerNorm of gain
    1 would give `sqrt(h)`, tens of times the norm of an input embedding, so its gain starts at `s`.
    """

    def __init__(self, config: AimConfig) -> None:
        super().__init__()
        self.width = width = config.hidden_size
        read_width, entry_width = (width * len(layers) for layers in (config.read_layers, config.entry_layers))
        self.read_width = read_width
        inner = config.projector_intermediate_size or inner_width(width, read_width + entry_width)
        self.scale = config.projector_norm * width**-0.5
        self.at_depth = config.enters_at_depth
        self.residual = config.projector_form.startswith("residual")
        self.scale_states = config.projector_form == "linear" and list(config.read_layers) != [-1]
        self.can_calibrate = not self.at_depth and list(config.read_layers) != [-1]  # the last state has passed a norm
        self.register_buffer(SCALE_KEY, None)
        self.layers = nn.Sequential()
        if config.projector_form == "mlp":
            self.layers.append(nn.LayerNorm(read_width))
        if config.projector_form.endswith("mlp"):
            self.layers.extend([nn.Linear(read_width, inner), nn.GELU(), nn.Linear(inner, entry_width)])
        elif config.projector_form != "identity":
            self.layers.append(nn.Linear(read_width, entry_width))
        if config.projector_form == "linear_norm":
            self.layers.append(nn.LayerNorm(width))
        self._digest: tuple[Any, str] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights. At the input the output norm is `config.projector_norm`; at depth the map begins as 0."""
        self.is_new = True  # until weights are loaded: weights that were trained without scales stay without
        gelu_scale = 0.425**-0.5  # second moment of GELU on a standard normal is 0.425
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for linear in linears:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        if self.residual:
            nn.init.zeros_(linears[-1].weight)
        elif len(linears) > 1:
            linears[-1].weight.mul_(gelu_scale)
        if len(self.layers) and isinstance(self.layers[-1], nn.LayerNorm):
            nn.init.constant_(self.layers[-1].weight, self.scale)
            nn.init.zeros_(self.layers[-1].bias)

    @torch.no_grad()
    def calibrate(self, states: torch.Tensor) -> None:
        """Take the scale of each channel from a sample of states `(tokens, n)`; see the class.

        The scale is the median size, which sinks do not move. A channel that is nearly always 0 gets a small share of
        the median scale of its depth.

        Raises:
            ValueError: the projector enters at depth or reads the last state alone, or the sample has another width or
                numbers that are not finite.
        """
        if not self.can_calibrate:
            raise ValueError("Only a projector that maps inner layers to the input embeddings can be calibrated.")
        shaped = states.ndim == 2 and len(states) and states.shape[1] == self.read_width
        if not shaped or not bool(states.isfinite().all()):
            raise ValueError(
                f"The sample has the shape {tuple(states.shape)}; expected finite states (tokens, {self.read_width})."
            )
        scale = states.float().abs().median(dim=0).values.unflatten(0, (-1, self.width))
        usual = scale.median(dim=-1, keepdim=True).values.clamp(min=torch.finfo(torch.float32).tiny)
        weight = next(self.parameters())
        self.set_scale(scale.clamp(min=SMALLEST_SCALE * usual).flatten().to(weight.device))

    def set_scale(self, scale: torch.Tensor | None) -> None:
        """Use these scales of the channels `(n,)`, or none."""
        self.register_buffer(SCALE_KEY, scale)

    def calibrated(self, states: torch.Tensor) -> torch.Tensor:
        """States `(..., n)` with channels, and then tokens, of the same size; unchanged without a calibration."""
        scale: torch.Tensor | None = getattr(self, SCALE_KEY)
        if scale is None:
            return states
        parts = (states / scale.to(states)).unflatten(-1, (-1, self.width))
        deviation = parts.abs().median(dim=-1, keepdim=True).values / MEDIAN_OF_NORMAL
        parts = parts / deviation.clamp(min=torch.finfo(parts.dtype).tiny)
        return parts.clamp(-LARGEST_VALUE, LARGEST_VALUE).flatten(-2)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `states` `(..., n)` to fused tokens `(..., e)`, on the projector's device and in its dtype.

        `identity` has neither: it returns the states unchanged.
        """
        weight = next(self.parameters(), None)
        if weight is None:
            return states
        states = self.calibrated(states.to(weight))
        if self.residual:
            parts = states.unflatten(-1, (-1, self.width))
            joined = nn.functional.rms_norm(parts, (self.width,))
            change = self.layers(joined.flatten(-2))
            if self.at_depth:
                sizes = parts.square().mean(dim=-1, keepdim=True).sqrt()
                return (parts + sizes * change.unflatten(-1, (-1, self.width))).flatten(-2)
            state = nn.functional.rms_norm(joined.mean(dim=-2), (self.width,))
            return self.scale * (state + change)
        mapped = self.layers(nn.functional.rms_norm(states, states.shape[-1:]) if self.scale_states else states)
        return mapped if isinstance(self.layers[-1], nn.LayerNorm) else self.scale * mapped

    def digest(self) -> str:
        """Identity of the weights, recomputed after a change (not one through `.data`) or a switch of `training`."""
        values = [*self.parameters(), *self.buffers()]
        weights = [(id(p), p.data_ptr(), -1 if p.is_inference() else p._version) for p in values]
        state = weights, self.training
        if self._digest is None or self._digest[0] != state:
            self._digest = (state, projector_digest(self.state_dict()))
        return self._digest[1]


def inner_width(width: int, outer: int) -> int:
    """The inner width of an MLP: twice the backbone's, with at most as many weights as the paper's projector at 4096.

    Args:
        width: hidden size.
        outer: input width plus output width.
    """
    return min(2 * width, max(MOST_WEIGHTS // outer // 64 * 64, 64))


def projector_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Identity of projector weights, the same in float32 and bfloat16: sha256 of their values rounded to bfloat16."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        rounded = weights[name].detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- the file of the weights


def projector_file(weights: dict[str, torch.Tensor], config: AimConfig) -> bytes:
    """Weights as a safetensors file, whose metadata say what they are bound to."""
    return save(weights, metadata={"format": "pt", FORM_KEY: json.dumps(config.form, sort_keys=True)})


def load_projector(
    projector: AimProjector, config: AimConfig, file: str, name: str, digest: str | None = None
) -> None:
    """Load the weights of a projector from a safetensors file of the repository `name`.

    Args:
        projector: takes the weights.
        config: its configuration.
        file: path of the weights.
        name: of the repository, for messages.
        digest: the digest of the file in its config.json; `None` where config.json has none.

    Raises:
        ValueError: they are of another form, of other shapes, or damaged; or belong to another config.json.
    """
    weights = {key.removeprefix("projector."): value for key, value in read_safetensors(file).items()}
    own = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    own.pop(SCALE_KEY, None)
    if SCALE_KEY in weights and projector.can_calibrate:
        own[SCALE_KEY] = (projector.read_width,)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    form = _stored_form(file) or config.form
    wrong = [f"{key}={form.get(key)} (here: {value})" for key, value in config.form.items() if form.get(key) != value]
    if wrong:
        raise ValueError(
            f"The {PROJECTOR_WEIGHTS} of {name} was trained with {', '.join(wrong)}, and its weights are not "
            "valid with others. Load it with its own settings, or train a new projector: aim train."
        )
    if shapes != own:
        raise ValueError(
            f"The {PROJECTOR_WEIGHTS} of {name} holds {shapes}, but its config.json "
            f"(projector_form={config.projector_form!r}, hidden size {config.hidden_size}, "
            f"read_layers={config.read_layers}, entry_layers={config.entry_layers}) asks for {own}. "
            "Files of two repositories may be mixed."
        )
    if digest is not None and file_digest(file) != digest:
        raise ValueError(
            f"The {PROJECTOR_WEIGHTS} and the config.json of {name} were not saved together: a save was cut short "
            "or one of them was replaced. Save the model again; or, if the weights are those you want, remove "
            f"{DIGEST_KEY} from config.json."
        )
    bad = sorted(
        key for key, value in weights.items()
        if not value.is_floating_point() or not bool(torch.isfinite(value.float()).all())
    )  # fmt: skip
    if bad:
        raise ValueError(
            f"The {PROJECTOR_WEIGHTS} of {name} holds numbers that are not real or not finite, in {bad}: every "
            "answer would be empty or random. Take an earlier checkpoint, or train the projector again."
        )
    scale = weights.get(SCALE_KEY)
    if scale is not None and not bool((scale > 0).all()):
        raise ValueError(f"{SCALE_KEY} in the {PROJECTOR_WEIGHTS} of {name} has scales that are not above 0.")
    projector.set_scale(None if scale is None else scale.to(next(projector.parameters()).device))
    projector.load_state_dict(weights)
    projector.is_new = False


def _stored_form(file: str) -> dict[str, Any] | None:
    """The settings that the weights in a safetensors file are bound to, by its metadata; `None` where it has none."""
    stored = safetensors_metadata(file).get(FORM_KEY)
    try:
        form = None if stored is None else json.loads(stored)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{FORM_KEY} in the metadata of {file} is not JSON ({error}); the file is damaged."
        ) from error
    if not isinstance(form, dict | None):
        raise ValueError(f"{FORM_KEY} in the metadata of {file} is {form!r:.80}; expected an object.")
    return form


def without_digest(config: AimConfig) -> tuple[AimConfig, str | None]:
    """A configuration without the digest of the weights that it was saved with, and the digest."""
    digest = vars(config).pop(DIGEST_KEY, None)
    if not isinstance(digest, str | None):
        raise ValueError(f"{DIGEST_KEY}={digest!r} of config.json: expected text.")
    return config, digest
