"""One stage of training: what is trained in it, and HF `Trainer` for that."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from ..backbone_aim import decoder_layers
from ..files_aim import read_safetensors, write_whole
from ..progress import write_line
from ..runs import PRECISIONS
from ..training.checkpoints import last_checkpoint
from ..training.optimizer import OTHERS, MuonAndAdamW
from ..training.pace import LogLines
from ..training.settings import shared_arguments
from ..training.trainer import NotFinite
from .data import ByLength, Collator, Examples
from .parts import Joined
from .settings import FULL_RATE, LORA_RATE, BackboneSettings

logger = logging.get_logger(__name__)

WEIGHTS = "trained.safetensors"  # of a checkpoint: what is trained, by name; and of a finished stage
LOG = "log.json"
LORA_DROPOUT = 0.05
SAMPLE = 16  # examples by which tokens a step are estimated


@dataclass(frozen=True)
class Stage:
    """What one of LLaVA's two stages is.

    Args:
        number: 1 or 2.
        specs: its data.
        steps: optimizer steps; `None` for `epochs`.
        epochs: passes over the data.
        total_batch: examples of a step.
        connector_rate: peak of the connector's learning rate.
        language_rate: of the language model's; `None` where that is frozen.
    """

    number: int
    specs: tuple[str, ...]
    steps: int | None
    epochs: float
    total_batch: int
    connector_rate: float
    language_rate: float | None

    @property
    def name(self) -> str:
        return f"stage{self.number}"

    def folder(self, output: Path) -> Path:
        """Where its checkpoints lie."""
        return output / self.name

    def is_done(self, output: Path) -> bool:
        """Whether its weights are there, whole."""
        return (self.folder(output) / LOG).exists()


def stages_of(settings: BackboneSettings) -> list[Stage]:
    """The stages that a run has data for."""
    rate = settings.stage2_learning_rate
    first = Stage(
        1, settings.stage1, settings.stage1_steps, settings.stage1_epochs, settings.stage1_batch_size,
        settings.stage1_learning_rate, None,
    )  # fmt: skip
    connector_rate = (rate or FULL_RATE) * (OTHERS if settings.optimizer == "muon" else 1)
    second = Stage(
        2, settings.stage2, settings.stage2_steps, settings.stage2_epochs, settings.stage2_batch_size,
        connector_rate, rate or (LORA_RATE if settings.lora_rank else FULL_RATE),
    )  # fmt: skip
    return [stage for stage in (first, second) if stage.specs]


class StageTrainer(Trainer):
    """`Trainer` whose checkpoints hold the weights that are trained, and nothing of what is frozen.

    Args:
        connector: has a learning rate of its own.
        connector_rate: its peak.
        frozen: modules that are never in training mode.
        layers: decoder layers whose matrices Muon trains; `None` for AdamW alone.
        lengths: tokens of each example, about.
        **kwargs: as for `Trainer`.

    Raises:
        NotFinite: in training, a loss that is not a finite number; checkpoints on disk are not touched.
    """

    def __init__(
        self, *, connector: nn.Module, connector_rate: float, frozen: list[nn.Module], layers: nn.Module | None,
        lengths: np.ndarray, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        if layers is not None and self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed cuts weights into flat pieces, and Muon needs matrices: use --optimizer adamw."
            )
        self.connector, self.connector_rate, self.frozen = connector, connector_rate, frozen
        self.layers, self.lengths = layers, lengths
        self.skipped: Counter[str] = Counter()

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """AdamW, or what `args.optim` names, with two learning rates; or Muon with AdamW."""
        model: Any = self.model
        if self.optimizer is None and self.layers is not None:
            inner = [weight for weight in self.layers.parameters() if weight.requires_grad]
            ours = {id(weight) for weight in inner}
            outer = [w for w in model.parameters() if w.requires_grad and id(w) not in ours]
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = MuonAndAdamW(inner, rate, decay, others=outer)
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            own = {id(weight) for weight in self.connector.parameters()}
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            groups = [
                {"params": [w for w in trained if id(w) not in own], "lr": self.args.learning_rate},
                {"params": [w for w in trained if id(w) in own], "lr": self.connector_rate},
            ]
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int] | None:
        if getattr(self.args, "train_sampling_strategy", "random") != "random":
            return super()._get_train_sampler(*args)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength(self.lengths, step, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy of the labelled tokens; also of a batch of which nothing could be used."""
        for module in self.frozen:
            module.eval()
        inputs = {**inputs}
        self.skipped.update(inputs.pop("skipped", {}))
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not bool((inputs["labels"] != -100).any()):
            loss = outputs.logits.float().sum() * 0
        if "pixel_values" not in inputs:  # every process has to see every weight, and a loss a gradient
            loss = loss + sum(weight.sum() for weight in self.connector.parameters()) * 0
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One step; a loss that is not finite stops the run before it reaches the weights."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise NotFinite(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}. The last checkpoint is good: try a "
                "smaller learning rate, or bfloat16 instead of float16."
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log, with what was left out."""
        skipped = {f"skipped/{reason}": float(count) for reason, count in sorted(self.skipped.items())}
        super().log({**logs, **skipped} if "loss" in logs else logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # Trainer asks every process
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.accelerator.unwrap_model(self.model), folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))


def trained_names(model: nn.Module) -> list[str]:
    """Names of the weights that are trained."""
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def save_trained(model: nn.Module, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write the weights that are trained to a folder; the file is whole or not there."""
    weights = dict(model.named_parameters()) if state is None else state
    tensors = {name: weights[name].detach().cpu().contiguous() for name in trained_names(model)}
    scratch = folder / f".{WEIGHTS}"
    save_file(tensors, scratch)
    scratch.replace(folder / WEIGHTS)


@torch.no_grad()
def load_trained(model: nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint, or of a finished stage, on a model that is prepared for its training."""
    weights = dict(model.named_parameters())
    for name, tensor in read_safetensors(str(folder / WEIGHTS), trained_names(model)).items():
        weights[name].copy_(tensor)


def prepare(joined: Joined, stage: Stage, settings: BackboneSettings) -> Any:
    """Make what a stage trains trainable, in float32.

    Args:
        joined: its language model is frozen, or has been trained in another stage.
        stage: to come.
        settings: of the run.

    Returns:
        The model, or the same one with LoRA.
    """
    model: Any = joined.model.requires_grad_(False)
    trained: list[nn.Module] = [joined.connector]
    if stage.language_rate is not None and settings.lora_rank:
        model = with_lora(model, settings)
    elif stage.language_rate is not None:
        trained += [joined.language_model, joined.model.lm_head]
    for module in trained:
        module.float().requires_grad_(True)
    return model


def with_lora(model: Any, settings: BackboneSettings) -> Any:
    """LoRA on every linear layer of the language model's decoder, with the same first weights each time.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'modeling-aim[train]', or leave out --lora-rank.") from error
    names = [
        name for name, module in model.named_modules()
        if name.startswith("model.language_model.") and isinstance(module, nn.Linear)
    ]  # fmt: skip
    alpha = 2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    torch.manual_seed(settings.seed + 2)
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=alpha, lora_dropout=LORA_DROPOUT, target_modules=names, bias="none"
    )
    return get_peft_model(model, config)


def run_stage(joined: Joined, stage: Stage, examples: Examples, settings: BackboneSettings) -> Any:
    """Train one stage, or resume it, and write its weights and its log.

    Returns:
        The model that was trained: LLaVA, or LLaVA with LoRA.
    """
    folder = stage.folder(Path(settings.output))
    model = prepare(joined, stage, settings)
    collator = Collator(
        joined.writer, joined.processor.image_processor, stage.language_rate is None, settings.max_length,
        settings.stage2_format == "plain",
    )  # fmt: skip
    muon = settings.optimizer == "muon" and stage.language_rate is not None
    frozen: list[nn.Module] = [joined.vision_tower]
    if stage.language_rate is None:
        frozen += [joined.language_model]
    trainer = StageTrainer(
        model=model,
        args=_arguments(settings, stage, len(examples)),
        train_dataset=examples,
        data_collator=collator,
        connector=joined.connector,
        connector_rate=stage.connector_rate,
        frozen=frozen,
        layers=decoder_layers(joined.model) if muon else None,
        lengths=examples.lengths(joined.writer.image_tokens),
    )
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines())
    if trainer.args.should_save:
        write_line(_estimate(trainer, stage, examples, collator))
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if folder.exists() else None)
    if trainer.args.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(trainer.accelerator.unwrap_model(trainer.model), folder)
        record = {"history": trainer.state.log_history, "steps": trainer.state.global_step,
                  "skipped": dict(examples.left_out + trainer.skipped), "examples": len(examples)}  # fmt: skip
        write_whole(folder / LOG, json.dumps(record, indent=1).encode())
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return model


def _estimate(trainer: StageTrainer, stage: Stage, examples: Examples, collator: Collator) -> str:
    """What the stage trains and what a step is, in a line.

    Raises:
        ValueError: none of the inspected examples can be used.
    """
    model: Any = trainer.model
    weights = list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    sample = [examples[n] for n in range(0, len(examples), max(1, len(examples) // SAMPLE))][:SAMPLE]
    batch = collator(sample)
    if not bool((batch["labels"] != -100).any()):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(batch["skipped"].items()))
        raise ValueError(f"{stage.name}: none of {len(sample)} examples that were looked at can be used ({reasons}).")
    args = trainer.args
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens = step * int(batch["attention_mask"].sum()) / len(sample)
    scored = step * int((batch["labels"] != -100).sum()) / len(sample)
    what = {1: "the connector", 2: "connector and language model"}[stage.number]
    return (
        f"Stage {stage.number} trains {what}: {trained:,} of {sum(map(torch.Tensor.numel, weights)):,} parameters, on "
        f"{len(examples):,} examples in {args.max_steps:,} steps of {step} ({args.per_device_train_batch_size} a "
        f"pass); about {tokens:,.0f} tokens a step, {scored:,.0f} of them in the loss."
    )


def _arguments(settings: BackboneSettings, stage: Stage, examples: int) -> TrainingArguments:
    """The stage as HF `TrainingArguments`; what the user names there wins."""
    has_device = torch.accelerator.is_available()
    values: dict[str, Any] = {
        **shared_arguments(settings),
        "output_dir": str(stage.folder(Path(settings.output))),
        "learning_rate": stage.connector_rate if stage.language_rate is None else stage.language_rate,
        "save_total_limit": 1,
        "logging_first_step": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
        "bf16": PRECISIONS[settings.dtype] is torch.bfloat16,
        "fp16": PRECISIONS[settings.dtype] is torch.float16 and has_device,
        "seed": settings.seed + stage.number,
        **settings.arguments,
    }
    processes = TrainingArguments(**{**values, "bf16": False, "fp16": False}).world_size
    share = max(1, min(stage.total_batch, examples) // processes)  # of a step, that one process takes
    accumulation = math.ceil(share / settings.batch_size)
    batch = math.ceil(share / accumulation)
    a_pass = max(1, math.ceil(examples / (batch * processes * accumulation)))
    steps = stage.steps or max(1, round(stage.epochs * a_pass))
    steps = int(settings.arguments.get("max_steps", steps))
    own = {
        "max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
        "warmup_steps": int(settings.warmup * steps),
    }  # fmt: skip
    return TrainingArguments(**{**values, **own, **settings.arguments})
