"""`AimTrainer`: HF `Trainer` for a projector on a frozen backbone (section 3.3 of the paper).

    trainer = AimTrainer(model, TrainingArguments("out", max_steps=1000), train_dataset=Mixture(...))
    trainer.train()

The loss is the frozen backbone's own cross-entropy on the target tokens, with the fused tokens of the demonstrations
before the query. What Trainer does with any model (accelerate's DDP, FSDP and DeepSpeed, precision,
accumulation, checkpoints, logging, `push_to_hub`) it does here.
"""

from __future__ import annotations

import inspect
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..backbone_aim import check_backbone, longest_prompt
from ..configuration_aim import AimConfig
from ..projector_aim import DIGEST_KEY, PROJECTOR_WEIGHTS, SCALE_KEY
from ..projector_aim import load_projector as load_weights
from .episodes import Mixture
from .kept_states import KeptStates
from .optimizer import OPTIMIZERS, MuonAndAdamW
from .pace import Pace
from .stream import EpisodeStream
from .targets import EpisodeCollator, logits_kept

if TYPE_CHECKING:
    from .. import AimForConditionalGeneration

logger = logging.get_logger(__name__)

CALIBRATION_STATES = 512  # states of demonstrations' tokens that a projector to the input is calibrated on
MOST_EPISODES = 64


class NotFinite(ValueError):
    """The loss is not a number, so the projector would be lost with the next step."""


class SkipUnopened(TrainerCallback):
    """Where a run resumes, the episodes that it has behind it are passed by with their images unopened."""

    def __init__(self, stream: EpisodeStream) -> None:
        self.stream = stream

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        behind = 0 if args.ignore_data_skip else state.global_step % state.max_steps  # as Trainer counts them
        self.stream.skip = behind * args.gradient_accumulation_steps


class AimTrainer(Trainer):
    """`Trainer` for `AimForConditionalGeneration`: datasets give episodes, checkpoints hold the projector alone.

    A `Mixture` is distributed over processes and workers (`EpisodeStream`). Each opens only the images of
    its own episodes.

    Args:
        model: the plug-in; its backbone may be in 4-bit.
        args: as for `Trainer`. `per_device_train_batch_size` counts episodes; a stream needs `max_steps`.
        prompts: how questions are put: `"chat"`, `"plain"` or `"mixed"`, see `AnswerFrame`.
        teacher: distillation from the same backbone that reads the demonstrations `"full"` or as `"text"`.
        distillation: weight of the KL divergence to the teacher; the cross-entropy has the rest.
        temperature: of teacher and student in the divergence.
        optimizer: `"muon"`, see `MuonAndAdamW`, or `"adamw"`: what `args.optim` names.
        group_by_length: sort a window of the stream by length, see `EpisodeStream`.
        kept_states: where hidden states of demonstrations are kept; 1 GiB of memory when `None`.
        **kwargs: as for `Trainer` (`train_dataset`, `eval_dataset`, `callbacks`, ...).

    Raises:
        NotFinite: in training, a loss that is not a finite number; checkpoints on disk are not touched.
    """

    def __init__(
        self,
        model: AimForConditionalGeneration,
        args: TrainingArguments,
        *,
        prompts: str = "chat",
        teacher: str | None = None,
        distillation: float = 0.5,
        temperature: float = 1.0,
        optimizer: str = "adamw",
        group_by_length: bool = True,
        kept_states: KeptStates | None = None,
        **kwargs: Any,
    ) -> None:
        if not len(model.projector.layers):
            raise ValueError(
                "projector_form='identity' has no weights to train. Put a projector there: "
                "AimForConditionalGeneration.from_backbone(backbone, preset='trained'), or aim train."
            )
        if not 0 <= distillation <= 1 or temperature <= 0:
            raise ValueError(
                f"distillation={distillation} must lie in 0..1 and temperature={temperature} above 0; the weight of "
                "the cross-entropy is 1 - distillation."
            )
        args.remove_unused_columns = False  # an episode is an object, not columns
        args.prediction_loss_only = True
        accelerator: Any = args.accelerator_config  # images cannot be sent from one process to the others:
        accelerator.dispatch_batches = False  # each goes through the stream and takes its share
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every step uses the whole projector
        model.read_cache = KeptStates(2**30) if kept_states is None else kept_states
        kwargs.setdefault("data_collator", EpisodeCollator(model, teacher, prompts))
        kwargs.setdefault("processing_class", model.processor)
        self._episodes = train = kwargs.get("train_dataset")
        if isinstance(train, (Mixture, IterableDataset)) and not isinstance(train, EpisodeStream):
            train = EpisodeStream(train, args.train_batch_size * args.world_size, group_by_length, args.seed)
        if isinstance(train, EpisodeStream):
            kwargs["train_dataset"] = train
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), SkipUnopened(train)]
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r} is unknown; choose one of {OPTIMIZERS}.")
        if optimizer == "muon":
            options = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
            kwargs.setdefault("optimizer_cls_and_kwargs", (_muon, options))
        super().__init__(model, args, **kwargs)
        if optimizer == "muon" and self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed cuts weights into flat pieces, and Muon needs matrices: use optimizer='adamw'."
            )
        self.teacher, self.distillation, self.temperature = teacher, distillation, temperature
        self._verdicts: list[torch.Tensor] = []
        self.skipped: Counter[str] = Counter()
        self._pace = Pace(self.reading_seconds, args.world_size)
        taken = inspect.signature(model.backbone.forward).parameters
        self._keeps_logits = "logits_to_keep" in taken

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's training, after the projector is calibrated where its form needs that (`AimProjector`)."""
        if not resume_from_checkpoint:  # a checkpoint has the scales of its run
            self.calibrate()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def calibrate(self) -> None:
        """Calibrate a new projector on some hundred states of the data, unless its form needs no calibration."""
        model: Any = self.accelerator.unwrap_model(self.model)
        projector = model.projector
        done = getattr(projector, SCALE_KEY) is not None or not projector.is_new
        if done or not projector.can_calibrate or self._episodes is None:
            return
        sample: list[torch.Tensor] = []
        for episode in islice(iter(self._episodes), MOST_EPISODES):
            demos = {demo.key: demo for row in self.data_collator([episode])["demos"] for demo in row}
            sample += model.read_states(list(demos.values()))
            if sum(map(len, sample)) >= CALIBRATION_STATES:
                break
        if sample:
            projector.calibrate(torch.cat(sample))
            scale = broadcast(getattr(projector, SCALE_KEY))  # processes may see different data
            projector.set_scale(scale)
            logger.info(f"Calibrated the projector's {len(scale)} channels on {sum(map(len, sample))} states.")

    def compute_loss(
        self,
        model: AimForConditionalGeneration,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy of the targets, and the divergence to the teacher where there is one."""
        inputs = {**inputs}
        self.skipped.update(inputs.pop("skipped", {}))
        inputs.pop("sources", None)
        self._pace.count(inputs.pop("counts", {}) if model.training else {})
        taught = inputs.pop("teacher", None)
        if self._keeps_logits:
            inputs["logits_to_keep"] = logits_kept(inputs["labels"])
        labels = inputs["labels"]
        if num_items_in_batch is not None:  # none at all, where nothing of the batch could be read
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not bool((labels != -100).any()):
            loss = outputs.logits.float().sum() * 0
        if not model.training:
            self._verdicts.append(_right(outputs.logits, labels))
        if taught is not None:
            divergence = self._divergence(outputs.logits, labels, taught, num_items_in_batch)
            loss = (1 - self.distillation) * loss + self.distillation * divergence
        return (loss, outputs) if return_outputs else loss

    def _divergence(
        self, logits: torch.Tensor, labels: torch.Tensor, taught: dict[str, Any], items: torch.Tensor | int | None
    ) -> Any:
        """KL divergence of the student from the teacher at the target tokens, a mean over them."""
        known = taught.pop("labels")
        teacher = self._teacher_logits(taught, known)
        student = _at_targets(logits, labels)
        same = [bool(torch.equal(a[a != -100], b[b != -100])) for a, b in zip(labels, known, strict=True)]
        if not all(same):
            raise ValueError(
                "Teacher and student see other tokens for the same target: the tokenizer joins words over the edge of "
                "the prompt. End questions with a line break or a mark, or train without distillation."
            )
        student, teacher = (torch.log_softmax(x.float() / self.temperature, dim=-1) for x in (student, teacher))
        total = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) * self.temperature**2
        if items is None:
            return total / max(len(student), 1)
        shared = self.args.average_tokens_across_devices and self.args.world_size > 1
        return total / items * (self.args.world_size if shared else 1)

    @torch.no_grad()
    def _teacher_logits(self, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        model: Any = self.accelerator.unwrap_model(self.model)
        longest = longest_prompt(model.backbone.config)
        if longest is not None and inputs["input_ids"].shape[1] > longest:
            raise ValueError(
                f"The teacher's prompt has {inputs['input_ids'].shape[1]} tokens, but the backbone has {longest} "
                "positions. Distil from text (teacher='text'), or with fewer shots."
            )
        return _at_targets(model(**inputs).logits, labels)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's evaluation, with the share of targets of which every token is the most likely one."""
        self._verdicts = []
        with self._pace.paused():
            metrics = super().evaluate(*args, **kwargs)
        right = torch.cat(self._verdicts) if self._verdicts else torch.zeros(0, device=self.args.device)
        counts = self.accelerator.reduce(torch.stack([right.sum(), right.new_tensor(len(right))]).to(self.args.device))
        accuracy = round(float(counts[0] / counts[1].clamp(min=1)), 4)
        more = {"eval_accuracy": accuracy, "eval_score": accuracy - metrics["eval_loss"] / 1000}
        self.log(more)
        return {**metrics, **more}

    def held_out(self, name: str) -> dict[int, float]:
        """`eval_loss`, `eval_accuracy` or `eval_score` by step; step 0 is before training.

        The score is what the best checkpoint is chosen by: accuracy, and the loss where that is equal.
        """
        return {int(row["step"]): row[name] for row in self.state.log_history if name in row}

    @property
    def improved(self) -> bool:
        """Whether training brought the held-out score above that of step 0; `True` where nothing is held out."""
        scores = self.held_out("eval_score")
        return 0 not in scores or len(scores) < 2 or max(scores.values()) > scores[0]

    @property
    def verdict(self) -> str:
        """In one sentence what training did on held-out data."""
        losses, right, scores = (self.held_out(f"eval_{name}") for name in ("loss", "accuracy", "score"))
        if 0 not in scores or len(scores) < 2:
            return "Nothing was held out, so nothing tells whether training helped."
        best = max((step for step in scores if step), key=scores.__getitem__)
        before, after = (f"{right[step]:.3f} right, loss {losses[step]:.4f}" for step in (0, best))
        if self.improved:
            return f"Held-out targets: {before} before training; {after} at step {best}, which is kept."
        return (
            f"On held-out targets training never got above step 0 ({before}; the best after it, at step {best}: "
            f"{after}), so the untrained projector is kept. Train on other data, longer, or at a lower rate."
        )

    def training_step(
        self,
        model: AimForConditionalGeneration,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One step; a loss that is not finite stops the run before it reaches the weights."""
        sources, first = inputs.get("sources"), inputs["demos"][0][0].text
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise NotFinite(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}, in a batch of "
                f"{len(inputs['demos'])} targets from {sorted(set(sources or []))} whose first demonstration says "
                f"{first[:80]!r}. The weights were not changed by it, and the last checkpoint is good: try a smaller "
                "learning rate, or bfloat16 instead of float16."
            )
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log, with the pace, what was skipped and how often a read was spared."""
        kept = self.model.read_cache  # type: ignore[union-attr]
        if "loss" in logs:
            logs = {**logs, **self._pace.report()}
        if "loss" in logs and isinstance(kept, KeptStates) and kept.hits + kept.misses:
            logs = {**logs, "reads_spared": round(kept.hits / (kept.hits + kept.misses), 4)}
        if "loss" in logs and self.skipped:
            logs = {**logs, **{f"skipped/{reason}": count for reason, count in sorted(self.skipped.items())}}
        super().log(logs, *args, **kwargs)

    def reading_seconds(self) -> float:
        """Seconds that this process has read demonstrations for."""
        return getattr(self.model.read_cache, "reading_seconds", 0.0)  # type: ignore[union-attr]

    # --- checkpoints hold a projector, not a model.safetensors

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_projector(model or self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_projector(self.model, str(self.state.best_model_checkpoint))


def load_projector(model: Any, checkpoint: str) -> None:
    """Put the projector of a checkpoint on a model.

    Raises:
        ValueError: the checkpoint belongs to another backbone or another projector.
    """
    config = AimConfig.from_pretrained(checkpoint)
    check_backbone(model.backbone, config.backbone_config, config.backbone_fingerprint)
    digest = getattr(config, DIGEST_KEY, None)
    load_weights(model.projector, model.config, str(Path(checkpoint) / PROJECTOR_WEIGHTS), checkpoint, digest)


def _muon() -> Any:
    """A factory as Trainer takes it for optimizers that choose the weights themselves."""
    return lambda model, **options: MuonAndAdamW((p for p in model.parameters() if p.requires_grad), **options)


def _right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """For each row with a target, 1 if all its tokens are the most likely ones; `logits` may lack first positions."""
    labels = labels[:, -logits.shape[1] :][:, 1:].to(logits.device)
    same = logits[:, :-1].argmax(dim=-1) == labels
    return (same | (labels == -100)).all(dim=1)[(labels != -100).any(dim=1)].float()


def _at_targets(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits that predict the labels `(targets, vocabulary)`; `logits` may lack the first positions."""
    labels = labels[:, -logits.shape[1] :]
    return logits[:, :-1][labels[:, 1:] != -100]
