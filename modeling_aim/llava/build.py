"""A backbone from a vision tower and a language model, in LLaVA's two stages: `aim backbone`."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import logging

from ..files_aim import only_one, staged_folder
from ..progress import write_line
from ..publishing import base_names
from ..runs import PRECISIONS, RunRecord
from .card import backbone_card, draw_losses
from .data import Examples
from .parts import Joined, join
from .settings import BackboneSettings
from .stages import LOG, Stage, load_trained, prepare, run_stage, stages_of

logger = logging.get_logger(__name__)

RECORD_FILE = "aim_backbone.json"
CHANGEABLE = frozenset({"output", "overwrite", "save_every", "log_every"})
RECORD = RunRecord("aim backbone", RECORD_FILE, CHANGEABLE)


def build_backbone(settings: BackboneSettings) -> Path:
    """Make a `LlavaForConditionalGeneration` with its processor; resumes an interrupted run with the same settings.

    Args:
        settings: all of the run.

    Returns:
        `settings.output`, with model, processor, and a model card with recipe, data and curves. Nothing is done where
        the same run is finished.

    Raises:
        ValueError: parts, data or settings that cannot work, or an output folder that holds another run.
        ImportError: LoRA without peft.
        NotFinite: the loss became NaN or infinite.
    """
    output = Path(settings.output)
    if _is_finished(settings):
        write_line(f"{output}: this run is finished.")
        return output
    on_cpu = settings.arguments.get("use_cpu", not torch.accelerator.is_available())
    state = PartialState(
        cpu=bool(on_cpu)
    )  # before Trainer: otherwise processes on CPUs each take themselves for the main
    stages = stages_of(settings)
    if not stages:
        logger.warning(
            "Without data for stage 1 or 2 the connector keeps its random weights: images mean nothing yet."
        )
    examples = {
        stage.name: Examples(stage.specs, stage.name, settings.seed) for stage in stages if not stage.is_done(output)
    }
    with only_one(output, "aim backbone") if state.is_main_process else nullcontext():
        if state.is_main_process:
            _begin(settings)
        state.wait_for_everyone()
        joined = _trained(settings, stages, examples)
        if state.is_main_process:
            _write(joined, settings, stages)
        state.wait_for_everyone()
    return output


def _is_finished(settings: BackboneSettings) -> bool:
    """Whether the output folder holds this run, finished.

    Raises:
        ValueError: it holds another run, or something else.
    """
    earlier = RECORD.earlier(settings)
    if earlier is None:
        return False
    finished = bool(earlier["finished"])
    RECORD.check_same(_public(settings) if finished else settings, earlier)
    return finished


def _public(settings: BackboneSettings) -> BackboneSettings:
    """The settings without paths of this machine, as the record of a finished run has them."""
    return replace(settings, **{name: _base_names(value) for name, value in vars(settings).items() if value})


def _base_names(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_base_names(item) for item in value)
    return base_names(value) if isinstance(value, str) else value


def _begin(settings: BackboneSettings) -> None:
    """Make the output folder this run's; what an overwritten run left goes out."""
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    if RECORD.earlier(settings) is None:
        for name in ("stage1", "stage2"):
            shutil.rmtree(output / name, ignore_errors=True)
        RECORD.write(output, {"settings": RECORD.comparable(settings), "finished": False})


def _trained(settings: BackboneSettings, stages: list[Stage], examples: dict[str, Examples]) -> Joined:
    """Both parts joined, with the weights that the stages bring them to; a finished stage is not run again."""
    output, four_bit = Path(settings.output), settings.load_in_4bit
    joined = join(settings, four_bit)
    for stage in stages:
        if stage.is_done(output):
            write_line(f"Stage {stage.number} is finished; its weights are taken.")
            model = prepare(joined, stage, settings)
            load_trained(model, stage.folder(output))
        else:
            model = run_stage(joined, stage, examples[stage.name], settings)
        if stage.language_rate is None:
            continue
        if four_bit:  # LoRA is merged into the weights as they were published
            joined = join(settings)
            model = prepare(joined, stage, settings)
            load_trained(model, stage.folder(output))
        if settings.lora_rank:
            joined.model = model.merge_and_unload()
    if four_bit and not any(stage.number == 2 for stage in stages):
        joined, four_bit = join(settings), False
        for stage in stages:
            load_trained(prepare(joined, stage, settings), stage.folder(output))
    return joined


def _write(joined: Joined, settings: BackboneSettings, stages: list[Stage]) -> None:
    """Write the repository; until its last file is in place the run counts as unfinished."""
    output = Path(settings.output)
    logs = {stage.number: json.loads((stage.folder(output) / LOG).read_text(encoding="utf-8")) for stage in stages}
    model: Any = joined.model
    model = model.to(device="cpu", dtype=PRECISIONS[settings.dtype]).requires_grad_(False).eval()
    model.config.name_or_path = ""
    with staged_folder(output) as stage_folder:
        model.save_pretrained(stage_folder)
        joined.processor.save_pretrained(stage_folder)
        picture = draw_losses(logs, stage_folder / "loss.png")
        lines = [json.dumps({"stage": number, **row}) for number, log in logs.items() for row in log["history"]]
        (stage_folder / "training_log.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        card = backbone_card(settings, stages, logs, joined, picture)
        (stage_folder / "README.md").write_text(card, encoding="utf-8")
    RECORD.write(output, {"settings": RECORD.comparable(_public(settings)), "finished": True})
    for stage in stages:
        shutil.rmtree(stage.folder(output))
