"""The model card of a backbone from parts, and the picture of its losses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.rows import is_hub_id
from ..publishing import base_names
from ..training.report import LossLine, draw_lines, hub_datasets, logged
from .parts import Joined
from .settings import BackboneSettings
from .stages import Stage

TITLES = {1: "stage 1: connector", 2: "stage 2: connector and language model"}


def draw_losses(logs: Mapping[int, Mapping[str, Any]], path: Path) -> Path | None:
    """Draw the loss of each stage over its steps; see `draw_lines`.

    Args:
        logs: of each stage, by its number; `history` is Trainer's.
        path: of the PNG file.
    """
    panels = []
    for number, log in logs.items():
        points = logged(log["history"], "loss")
        panels.append([LossLine(TITLES[number], points, len(points) < 20)])
    return draw_lines(panels, "loss a token of an answer (nats)", 4.5, path, titled=True)


def backbone_card(
    settings: BackboneSettings,
    stages: list[Stage],
    logs: Mapping[int, Mapping[str, Any]],
    joined: Joined,
    picture: Path | None,
) -> str:
    """The card: parts, recipe, data by base name, losses. The licence is the user's to choose.

    Args:
        settings: of the run.
        stages: that were run.
        logs: of each stage, by its number.
        joined: the result.
        picture: of the losses, beside the card.
    """
    parts = [settings.vision_tower, settings.language_model]
    part_names = [base_names(part) for part in parts]
    config = joined.model.config
    meta = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "modeling-aim"],
        "base_model": [part for part in parts if is_hub_id(part) and not Path(part).exists()],
        "datasets": hub_datasets([*settings.stage1, *settings.stage2]),
    }
    front = "\n".join(f"{name}: {json.dumps(value)}" for name, value in meta.items() if value)
    recipe = "\n\n".join(_stage_section(settings, stage, logs[stage.number]) for stage in stages)
    image = f"\n![Loss over steps]({picture.name})\n" if picture else ""
    nothing = "No stage was run: the connector has random weights, and images mean nothing yet.\n"
    return f"""---
{front}
---

# A LLaVA of {part_names[0]} and {part_names[1]}

A vision-language model of the stock class `LlavaForConditionalGeneration`, made by `aim backbone`: a connector (two
linear layers, GELU between) takes the features of layer {config.vision_feature_layer} of the vision tower to the
embeddings of the language model, {joined.writer.image_tokens} tokens an image. The vision tower is as published.

The licence is that of the parts and of the data, and yours to state.

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="FOLDER_OR_ID")
content = [{{"type": "image", "url": "image.png"}}, {{"type": "text", "text": "What is this?"}}]
print(ask(text=[{{"role": "user", "content": content}}], return_full_text=False)[0]["generated_text"])
```

## Training

{recipe or nothing}{image}"""


def _stage_section(settings: BackboneSettings, stage: Stage, log: Mapping[str, Any]) -> str:
    """What one stage was trained on, how, and with which loss."""
    losses = [row["loss"] for row in log["history"] if "loss" in row]
    decay = settings.arguments.get("weight_decay", 0)
    rows: dict[str, Any] = {
        "data": ", ".join(f"`{base_names(spec)}`" for spec in stage.specs),
        "examples": f"{log['examples']:,}",
        "steps": f"{log['steps']:,} of up to {stage.total_batch} examples",
        "learning rate": f"{stage.connector_rate:g} (connector)",
        "schedule": f"cosine, {settings.warmup:.0%} warm-up, weight decay {decay or 'none'}",
        "precision": settings.dtype,
        "seed": settings.seed,
        "loss": f"{losses[0]:.4f} at the first report, {losses[-1]:.4f} at the last" if losses else "not reported",
        "left out": ", ".join(f"{reason}: {count}" for reason, count in sorted(log["skipped"].items())) or "nothing",
    }
    if stage.language_rate is not None:
        rows["learning rate"] += f", {stage.language_rate:g} (language model)"
        alpha = 2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
        lora = f"LoRA of rank {settings.lora_rank}, alpha {alpha}, merged" if settings.lora_rank else "all weights"
        if settings.optimizer == "muon":
            rows["optimizer"] = "Muon for the matrices of the language model's layers, AdamW for all else"
        if settings.stage2_format == "plain":
            rows["format"] = "texts one after another, without the chat template"
        rows["language model"] = lora + (", 4-bit while it was trained" if settings.load_in_4bit else "")
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    title = TITLES[stage.number].capitalize()
    counted = "captions" if stage.number == 1 else "answers"
    return f"**{title}.** The loss counts {counted} alone.\n\n| | |\n|---|---|\n{table}\n"
