"""Load what aim-tiny's evaluation compares: the backbone, the control tuned on many images, what AIM puts on it.

Not run by itself; `python examples/aim_tiny/evaluate.py` evaluates them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from support import CONTROLS, OUT, ROOT
from transformers import LlavaForConditionalGeneration

sys.path.insert(0, str(ROOT))
from modeling_aim.configuration_aim import AimConfig, preset_settings
from modeling_aim.evaluation.random_projector import random_projector
from modeling_aim.projector_aim import AimProjector


@dataclass(frozen=True)
class Plugin:
    """What is read of a demonstration, what makes fused tokens of it, and where these enter.

    `read_layers` and `entry_layers` are those of `AimConfig`; a fused token has one vector for each entry layer.
    """

    projector: torch.nn.Module
    read_layers: tuple[int, ...]
    entry_layers: tuple[int, ...]

    def entering(self, states: torch.Tensor) -> dict[int, torch.Tensor]:
        """What enters at each layer, `(tokens, width)`, for states `(tokens, read layers x width)`."""
        vectors = self.projector(states).unflatten(-1, (len(self.entry_layers), -1))
        return {layer: vectors[:, place] for place, layer in enumerate(self.entry_layers)}


def four_bit():
    """NF4 for the linears of the language model alone."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
                              llm_int8_skip_modules=["lm_head", "vision_tower", "multi_modal_projector"])  # fmt: skip


def load_backbone(load_in_4bit: bool = False, folder: Path = OUT / "backbone") -> LlavaForConditionalGeneration:
    options = {"quantization_config": four_bit()} if load_in_4bit else {}
    return LlavaForConditionalGeneration.from_pretrained(folder, **options).eval()


def load_interleaved(load_in_4bit: bool = False) -> LlavaForConditionalGeneration:
    """The control tuned on many images: the backbone with other weights of projection and language model."""
    model = load_backbone()
    weights = {k: v.float() for k, v in load_file(CONTROLS / "full_interleaved.safetensors").items()}
    model.load_state_dict(weights, strict=False)
    if not load_in_4bit:
        return model
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=four_bit()).eval()


def load_plugin(
    method: str, backbone: LlavaForConditionalGeneration, repo: Path = OUT, depth: int | None = None
) -> Plugin:
    """What a method puts on the backbone; shuffled images use that of `aim`, the random projector has its places.

    Args:
        method: one that begins with `aim`.
        backbone: what it is put on.
        repo: whose projector is `aim`.
        depth: where states are read and put back by `aim_untrained`; the package's default where `None`.

    Raises:
        ValueError: the repository averages fused tokens down, which this evaluation does not.
    """
    if method.startswith("aim_untrained"):
        config = AimConfig(backbone.config, **preset_settings("untrained", None if depth is None else [depth]))
        return plugin_of(AimProjector(config), config)
    control = method in ("aim_paper", "aim_generic")
    settings = json.loads((CONTROLS / f"{method}.json" if control else repo / "config.json").read_text())
    if limit := settings.get("max_fused_tokens"):
        raise ValueError(f"{repo} has max_fused_tokens={limit}, expected null: evaluate it with aim eval.")
    form = {k: settings[k] for k in ("read_layers", "projector_form", "projector_intermediate_size", "projector_norm")}
    form["entry_layers"] = settings.get("entry_layers", [0])  # older files are all for the input, and do not say so
    config = AimConfig(backbone.config, **form)
    if method == "aim_random_projector":
        return plugin_of(random_projector(config, seed=1), config)
    projector = AimProjector(config)
    if projector.state_dict():
        weights = load_file(CONTROLS / f"{method}.safetensors" if control else repo / "aim_projector.safetensors")
        projector.load_state_dict({k.removeprefix("projector."): v.float() for k, v in weights.items()})
    return plugin_of(projector, config)


def plugin_of(projector: torch.nn.Module, config: AimConfig) -> Plugin:
    return Plugin(projector.eval(), tuple(config.read_layers), tuple(config.entry_layers))
