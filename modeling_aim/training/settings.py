"""The settings of a training run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import TrainingArguments

from ..bounds import check_least
from ..progress import has_bars
from ..runs import PRECISIONS
from .optimizer import OPTIMIZERS
from .targets import PROMPTS, TEACHERS


@dataclass(frozen=True)
class TrainSettings:
    """What `aim train` takes; defaults were chosen on aim-tiny (docs/LOG.md), for sizes it cannot tell, LLaVA's.

    Args:
        backbone: Hub id or folder of the backbone, or of an AIM repository whose projector is trained further.
        data: sources of training data, `KIND:PATH[,name=value...]`; see docs/TRAINING.md.
        output: folder of the Hub repository that comes out.
        steps: optimizer steps.
        batch_size: episodes of one process in one forward pass, with up to `shots` targets each.
        accumulation: forward passes of one step.
        learning_rate: peak of the learning rate, which falls as a cosine; by default 1e-3 (adamw) or 0.6 / sqrt(the
            longest side) (muon).
        warmup: share of the steps after which the peak is reached.
        optimizer: adamw (for which `arguments` may name another `optim`) or muon (for the projector's matrices; AdamW,
            at a third of the rate, for the rest).
        shots: most demonstrations of an episode.
        shot_law: distribution of their number: exponential, which favours many, uniform or fixed.
        preset: trained (a projector at the depth where states are read) or paper (one for the input).
        projector_form: form of a new projector, in place of the preset's: residual_mlp or residual; for the input mlp,
            linear or linear_norm too.
        projector_size: inner width of the mlp forms.
        read_layers: depths whose states are read, such as 13 or 0,13; by default the input and two fifths of the
            layers.
        entry_layers: depths that the states enter, 0 for the input; by default those where they were read.
        read_span: tokens of a demonstration that are kept: text or answer.
        max_fused_tokens: most fused tokens of a demonstration.
        revision: revision of the backbone.
        dtype: precision of the backbone: bfloat16, float16 or float32.
        load_in_4bit: load the backbone in 4-bit, for a laptop.
        device_map: where the backbone goes; by default one device.
        image_settings: settings of the backbone's image processor by its own names, such as max_pixels=200704 or
            do_image_splitting=false: how many tokens an image is. They are stored in the repository.
        gradient_checkpointing: recompute the backbone's layers in the backward pass, for memory.
        prompts: how questions are written: chat, plain or mixed.
        teacher: distil from the backbone that reads the demonstrations full, or as text.
        distillation: weight of the divergence to the teacher, in 0..1.
        eval_data: held-out sources, given like `data`; without them a share of `data` is held out.
        held_out: share of the documents of `data` that are held out where there is no `eval_data`; 0 for none.
        eval_episodes: held-out episodes that are scored before the first step and at every save.
        memory: GiB of hidden states that are kept in memory.
        keep_states: folder where all hidden states are kept.
        disk: GiB of hidden states that are kept in that folder.
        save_every: steps from one checkpoint to the next.
        log_every: steps from one report to the next.
        seed: seed of the order, the episodes, and the projector's first weights.
        overwrite: replace another run in the output folder.
        dry_run: show what the run will take, measure a few steps, and write nothing.
        push_to_hub: repository to push the result to.
        arguments: further `TrainingArguments` of transformers by name, such as report_to=wandb.
    """

    backbone: str
    data: tuple[str, ...]
    output: str
    steps: int = 2000
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float | None = None
    warmup: float = 0.03
    optimizer: str = "adamw"
    shots: int = 8
    shot_law: str = "exponential"
    preset: str = "trained"
    projector_form: str | None = None
    projector_size: int | None = None
    read_layers: tuple[int, ...] | None = None
    entry_layers: tuple[int, ...] | None = None
    read_span: str = "text"
    max_fused_tokens: int | None = None
    revision: str | None = None
    dtype: str = "bfloat16"
    load_in_4bit: bool = False
    device_map: str | None = None
    image_settings: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    prompts: str = "chat"
    teacher: str | None = None
    distillation: float = 0.5
    eval_data: tuple[str, ...] = ()
    held_out: float = 0.02
    eval_episodes: int = 200
    memory: float = 1.0
    keep_states: str | None = None
    disk: float = 20.0
    save_every: int = 200
    log_every: int = 10
    seed: int = 0
    overwrite: bool = False
    dry_run: bool = False
    push_to_hub: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "dtype": tuple(PRECISIONS), "prompts": PROMPTS, "teacher": (None, *TEACHERS), "optimizer": OPTIMIZERS,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {known}.")
        counts = ("steps", "batch_size", "accumulation", "shots", "eval_episodes", "save_every", "log_every")
        check_least(self, 1, *counts)
        check_least(self, 0, "memory", "disk")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: expected a share of the documents, from 0 to less than 1.")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation={self.distillation} must lie in 0..1, the weight of the divergence.")
        if self.optimizer == "muon" and "optim" in self.arguments:
            raise ValueError(
                f"optim={self.arguments['optim']!r} is for optimizer='adamw' (--optimizer adamw): muon is set."
            )
        check_arguments(self.arguments)
        if self.push_to_hub is not None and os.path.isdir(self.backbone):
            raise ValueError(
                f"The backbone is the local folder {self.backbone}, which others do not have, so the result cannot be "
                "pushed by itself. Train without push_to_hub, then model.push_to_hub(..., include_backbone=True)."
            )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what transformers' `TrainingArguments` does not know, or has as a number."""
    known = TrainingArguments.__dataclass_fields__
    unknown = set(arguments) - set(known)
    if unknown:
        raise ValueError(f"TrainingArguments of transformers has no {sorted(unknown)}; see its documentation.")
    for name, value in arguments.items():
        usual = known[name].default
        if isinstance(usual, (int, float)) and not isinstance(usual, bool) and isinstance(value, str):
            raise ValueError(f"{name}={value!r}: expected a number, such as {usual}.")


class LongRun(Protocol):
    """Settings of a run that saves and logs."""

    @property
    def gradient_checkpointing(self) -> bool: ...

    @property
    def save_every(self) -> int: ...

    @property
    def log_every(self) -> int: ...


def shared_arguments(settings: LongRun) -> dict[str, Any]:
    """What runs of `aim train` and `aim backbone` have in common as `TrainingArguments`."""
    new_name = "activation_checkpointing" in TrainingArguments.__dataclass_fields__  # of transformers 6
    return {
        "activation_checkpointing" if new_name else "gradient_checkpointing": settings.gradient_checkpointing,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "save_steps": settings.save_every,
        "logging_steps": settings.log_every,
        "report_to": "none",
        "disable_tqdm": not has_bars(),
        "use_cpu": not torch.accelerator.is_available(),  # without it, several processes on CPUs train each alone
    }
