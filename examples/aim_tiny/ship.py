"""Write what aim-tiny ships: backbone, AIM projector and processor to hub_configs/aim-tiny, controls to controls/.

    python examples/aim_tiny/ship.py

The repository's code and model card are added by the package (`save_pretrained`); here are the weights. Controls that
were not trained yet are left as they are.
"""

from __future__ import annotations

import json
import sys

import torch
from backbone import load
from projector import FORMS, new_projector
from safetensors.torch import load_file, save_file
from support import BUILD, CONTROLS, OUT, ROOT, write
from words import processor

sys.path.insert(0, str(ROOT))


def trained(kind: str):
    """A trained projector and its settings."""
    model = load("llava")
    projector = new_projector(model, FORMS[kind])
    norm = projector.norm_at_start
    projector.load_state_dict(torch.load(BUILD / f"{kind}.pt", weights_only=True))
    return projector, {**FORMS[kind], "projector_norm": norm}


def ship_aim() -> None:
    """The package itself writes the repository: config, projector, processor, code, and the backbone."""
    from modeling_aim import AimForConditionalGeneration, AimProcessor

    backbone = load("llava")
    backbone.generation_config.update(max_new_tokens=16, do_sample=False)
    projector, settings = trained("aim")
    settings.pop("projector_norm")
    model = AimForConditionalGeneration.from_backbone(backbone, processor=AimProcessor(processor()), **settings)
    model.projector.load_state_dict(projector.state_dict())
    model.save_pretrained(OUT, include_backbone=True)
    path = OUT / "backbone" / "model.safetensors"
    weights = {name_of_every_version(name): weight for name, weight in load_file(path).items()}
    write(path, lambda p: save_file(weights, p, metadata={"format": "pt"}))


def name_of_every_version(name: str) -> str:
    """The vision tower's names as published LLaVA checkpoints have them: newer transformers map these to their own,
    older ones know no others."""
    before, tower, after = name.partition("vision_tower.")
    return name if not tower or after.startswith("vision_model.") else f"{before}{tower}vision_model.{after}"


def ship_control(kind: str) -> None:
    projector, settings = trained(kind)
    weights = {f"projector.{k}": v.contiguous() for k, v in projector.state_dict().items()}
    write(CONTROLS / f"{kind}.safetensors", lambda p: save_file(weights, p))
    settings.setdefault("projector_intermediate_size", None)
    write(CONTROLS / f"{kind}.json", lambda p: p.write_text(json.dumps(settings, indent=2) + "\n"))


def ship_interleaved() -> None:
    """Only what was tuned, in bfloat16: the vision tower is the shipped one."""
    weights = torch.load(BUILD / "interleaved.pt", weights_only=True)
    tuned = {k: v.bfloat16().contiguous() for k, v in weights.items() if "vision_tower" not in k}
    write(CONTROLS / "full_interleaved.safetensors", lambda p: save_file(tuned, p))


if __name__ == "__main__":
    ship_aim()
    for control in ("aim_paper", "aim_generic"):
        if (BUILD / f"{control}.pt").exists():
            ship_control(control)
    if (BUILD / "interleaved.pt").exists():
        ship_interleaved()
    write(BUILD / "shipped.txt", lambda p: p.write_text("hub_configs/aim-tiny\n"))
