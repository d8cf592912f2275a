"""Write what aim-tiny ships: backbone, AIM projector and processor to hub_configs/aim-tiny, controls to controls/.

    python examples/aim_tiny/ship.py

The repository's code is added by the package (`save_pretrained`); here are weights and model card. Controls that were
not trained yet are left as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from backbone import new_model
from projector import MIX
from safetensors.torch import load_file, save_file
from support import BUILD, CONTROLS, OUT, ROOT, write
from transformers import LlavaForConditionalGeneration
from words import processor

sys.path.insert(0, str(ROOT))
from modeling_aim import AimConfig, AimForConditionalGeneration, AimProcessor
from modeling_aim.files_aim import model_card

FORM = ("read_layers", "entry_layers", "projector_form", "projector_intermediate_size", "projector_norm")
CARD = """
## Training

Backbone and projector were trained by the project that this repository comes from, on drawn shapes, with
`make aim-tiny`. The backbone is a LLaVA that was trained on one image a sequence and then frozen. The projector was
trained by `aim train` ({steps} steps of {batch_size} episodes, {optimizer}, up to {shots} demonstrations an
episode) on five synthetic tasks: {tasks}.
`examples/aim_tiny/projector.py` has the command, `examples/aim_tiny/tasks.py` the tasks. Concepts, made-up words and
images of their test splits were never trained on. The project's README says how well it does.
"""


def ship_aim(run: Path) -> None:
    """The package itself writes the repository: config, projector, processor, code, and the backbone.

    Args:
        run: output of the projector's run.
    """
    backbone = new_model()
    backbone.load_state_dict(LlavaForConditionalGeneration.from_pretrained(BUILD / "llava").state_dict())
    backbone.generation_config.update(max_new_tokens=16, do_sample=False)
    form = json.loads((run / "config.json").read_text())
    options = {name: form[name] for name in FORM[:-1]}
    model = AimForConditionalGeneration.from_backbone(backbone, processor=AimProcessor(processor()), **options)
    weights = load_file(run / "aim_projector.safetensors")
    model.projector.load_state_dict({name.removeprefix("projector."): weight for name, weight in weights.items()})
    model.save_pretrained(OUT, include_backbone=True)
    path = OUT / "backbone" / "model.safetensors"
    weights = {name_of_every_version(name): weight for name, weight in load_file(path).items()}
    write(path, lambda p: save_file(weights, p, metadata={"format": "pt"}))
    settings = json.loads((run / "aim_training.json").read_text())["settings"]
    card = model_card(AimConfig.from_pretrained(OUT), model.projector)
    training_section = CARD.format(**settings, tasks=", ".join(MIX).replace("_", " "))
    write(OUT / "README.md", lambda p: p.write_text(card + training_section))


def name_of_every_version(name: str) -> str:
    """The vision tower's names as published LLaVA checkpoints have them: newer transformers map these to their own,
    older ones know no others."""
    before, tower, after = name.partition("vision_tower.")
    return name if not tower or after.startswith("vision_model.") else f"{before}{tower}vision_model.{after}"


def ship_control(kind: str, run: Path) -> None:
    """A control is its projector, in bfloat16, and the form of it."""
    form = json.loads((run / "config.json").read_text())
    weights = {name: weight.bfloat16() for name, weight in load_file(run / "aim_projector.safetensors").items()}
    write(CONTROLS / f"{kind}.safetensors", lambda p: save_file(weights, p))
    form_json = json.dumps({name: form[name] for name in FORM}, indent=2) + "\n"
    write(CONTROLS / f"{kind}.json", lambda p: p.write_text(form_json))


def ship_interleaved() -> None:
    """Only what was tuned, in bfloat16: the vision tower is the shipped one."""
    weights = torch.load(BUILD / "interleaved.pt", weights_only=True)
    tuned = {k: v.bfloat16().contiguous() for k, v in weights.items() if "vision_tower" not in k}
    write(CONTROLS / "full_interleaved.safetensors", lambda p: save_file(tuned, p))


if __name__ == "__main__":
    ship_aim(BUILD / "aim")
    for control in ("aim_paper", "aim_generic"):
        if (BUILD / control / "README.md").exists():
            ship_control(control, BUILD / control)
    if (BUILD / "interleaved.pt").exists():
        ship_interleaved()
    write(BUILD / "shipped.txt", lambda p: p.write_text("hub_configs/aim-tiny\n"))
