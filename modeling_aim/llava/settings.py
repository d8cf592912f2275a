"""The settings of a backbone that is made from parts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ..bounds import check_least
from ..runs import PRECISIONS
from ..training.optimizer import OPTIMIZERS
from ..training.settings import check_arguments

CONNECTOR_RATE = 1e-3  # of stage 1, LLaVA-1.5
FULL_RATE, LORA_RATE = 2e-5, 2e-4  # of the language model in stage 2, by LLaVA's two scripts; the connector: the first
FORMATS = ("chat", "plain")


@dataclass(frozen=True)
class BackboneSettings:
    """What `aim backbone` takes; defaults are LLaVA-1.5's (arXiv 2310.03744).

    Args:
        vision_tower: Hub id or folder of the vision tower; of a CLIP or SigLIP checkpoint its vision half is taken.
        language_model: Hub id or folder of a causal language model.
        output: folder of the Hub repository that comes out.
        stage1: image-caption pairs for the connector, `llava:FILE.json[,images=FOLDER]` or `pairs:PATH`; without them
            stage 1 is left out.
        stage2: conversations about images for connector and language model, given like `stage1`; without them stage 2
            is left out.
        lora_rank: train the language model in stage 2 by LoRA of this rank, merged at the end; 0 trains all its
            weights.
        lora_alpha: scale of LoRA, divided by the rank; by default twice the rank.
        load_in_4bit: hold the frozen language model in 4-bit while it is trained by LoRA, for a laptop.
        image_processor: Hub id or folder of the image processor, by default that of the vision tower.
        vision_revision: revision of the vision tower.
        language_revision: revision of the language model.
        chat_template: for a language model without one, v1 (LLaVA's conversations) or a Jinja file; also in place of
            its own.
        image_token: token that stands for an image in a prompt, added where the tokenizer lacks it.
        vision_feature_layer: layer of the vision tower whose features are used, counted from the end.
        stage1_steps: optimizer steps of stage 1; by default one epoch.
        stage2_steps: optimizer steps of stage 2; by default one epoch.
        stage1_epochs: passes of stage 1 over its data, where no steps are given.
        stage2_epochs: passes of stage 2 over its data, where no steps are given.
        stage1_batch_size: captions of one optimizer step of stage 1, on all processes together.
        stage2_batch_size: conversations of one optimizer step of stage 2, on all processes together.
        stage1_learning_rate: peak of the learning rate of stage 1.
        stage2_learning_rate: peak of the language model's learning rate in stage 2; by default 2e-5, with LoRA 2e-4.
            The connector's is 2e-5 or the given one.
        stage2_format: how conversations are written: chat (by the chat template) or plain (their texts one after
            another, for data that holds the words of its own form; EOS ends a conversation).
        optimizer: adamw (for which `arguments` may name another `optim`) or muon (in stage 2, for the matrices of the
            language model's layers; AdamW, at a third of the rate, for all else).
        batch_size: captions or conversations of one process in one forward pass.
        warmup: share of the steps after which the peak is reached.
        max_length: tokens of a caption or conversation with its image; what is longer is cut.
        dtype: precision of the frozen parts and of the result, bfloat16, float16 or float32; what is trained is held
            in float32.
        gradient_checkpointing: recompute layers in the backward pass, for memory.
        save_every: steps from one checkpoint to the next.
        log_every: steps from one report to the next.
        seed: seed of the connector's first weights and of the order of the data.
        overwrite: replace another run in the output folder.
        arguments: further `TrainingArguments` of transformers by name, such as report_to=wandb.
    """

    vision_tower: str
    language_model: str
    output: str
    stage1: tuple[str, ...] = ()
    stage2: tuple[str, ...] = ()
    lora_rank: int = 0
    lora_alpha: int | None = None
    load_in_4bit: bool = False
    image_processor: str | None = None
    vision_revision: str | None = None
    language_revision: str | None = None
    chat_template: str | None = None
    image_token: str = "<image>"
    vision_feature_layer: int = -2
    stage1_steps: int | None = None
    stage2_steps: int | None = None
    stage1_epochs: float = 1.0
    stage2_epochs: float = 1.0
    stage1_batch_size: int = 256
    stage2_batch_size: int = 128
    stage1_learning_rate: float = CONNECTOR_RATE
    stage2_learning_rate: float | None = None
    stage2_format: str = "chat"
    optimizer: str = "adamw"
    batch_size: int = 8
    warmup: float = 0.03
    max_length: int = 2048
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    save_every: int = 200
    log_every: int = 10
    seed: int = 0
    overwrite: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("stage1", "stage2"):
            given = getattr(self, name)
            specs = (given,) if isinstance(given, (str, os.PathLike)) else tuple(given or ())
            object.__setattr__(self, name, tuple(str(spec) for spec in specs))
        for name in ("vision_tower", "language_model", "output"):
            object.__setattr__(self, name, str(getattr(self, name)))
        choices = {"dtype": tuple(PRECISIONS), "stage2_format": FORMATS, "optimizer": OPTIMIZERS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {known}.")
        counts = ("stage1_batch_size", "stage2_batch_size", "batch_size", "save_every", "log_every", "max_length")
        check_least(self, 1, *counts, "stage1_steps", "stage2_steps")
        check_least(self, 0, "lora_rank")
        for name in ("stage1_epochs", "stage2_epochs", "stage1_learning_rate", "stage2_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: expected more than 0.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup}: expected a share of the steps, from 0 to less than 1.")
        if self.optimizer == "muon" and "optim" in self.arguments:
            raise ValueError(f"optim={self.arguments['optim']!r} is for optimizer='adamw' (--optimizer adamw).")
        if self.optimizer == "muon" and self.stage2 and self.stage2_learning_rate is None:
            raise ValueError(
                "optimizer='muon': LLaVA's rate is AdamW's; give stage 2 another (--stage2-learning-rate)."
            )
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError(
                "load_in_4bit (--load-in-4bit) is for LoRA: 4-bit weights are not trained. Give lora_rank too "
                "(--lora-rank 64)."
            )
        check_arguments(self.arguments)
