"""What a run will take, before it begins: from its first episodes, and FLOPs counted as `aim bench` counts them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from ..image_settings import tokens_line
from ..progress import duration, write_line
from ..training.pace import StepTimes
from ..training.targets import logits_kept
from .counting import Twin
from .shapes import free_memory, picture_with

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .. import AimForConditionalGeneration
    from ..training import EpisodeCollator, TrainSettings

GIB = 2**30
ADAM_BYTES, MUON_BYTES = 8, 4  # of optimizer state for a weight
WEIGHT_AND_GRADIENT = 8
MOST_EPISODES = 8  # that are opened for the estimate


@dataclass(frozen=True)
class Sample:
    """What the first episodes of a run hold, on average.

    Args:
        demonstrations: that an episode reads.
        targets: of an episode: rows that are answered.
        visual_tokens: of a demonstration.
        text_tokens: of a demonstration, which are its fused tokens.
        read_tokens: of a demonstration, those that frame it included.
        answer_tokens: of a row, fused tokens and padding included.
        scored_tokens: of a row: those whose logits are kept.
    """

    demonstrations: float
    targets: float
    visual_tokens: float
    text_tokens: float
    read_tokens: float
    answer_tokens: float
    scored_tokens: float


@dataclass(frozen=True)
class Compute:
    """FLOPs of one step of one process, counted.

    Args:
        reading: demonstrations, each read again.
        answering: the targets, forward and backward.
    """

    reading: float
    answering: float

    @property
    def share(self) -> float:
        """Of reading in all."""
        return self.reading / (self.reading + self.answering)


def sample_episodes(model: AimForConditionalGeneration, collator: EpisodeCollator, episodes: Iterable[Any]) -> Sample:
    """Look at some episodes as the run will see them.

    Args:
        model: the plug-in.
        collator: makes a batch of them.
        episodes: the first of the run.
    """
    batches = [collator([episode]) for episode in episodes]
    demos = [demo for batch in batches for demo in {d.key: d for row in batch["demos"] for d in row}.values()]
    read, text, visual = [], [], []
    image_id = _image_id(model.backbone.config)
    for demo in demos:
        inputs, kept = model.processor.encode_demonstrations([demo], model.config.read_span)
        read.append(inputs["input_ids"].shape[1])
        text.append(min(int(kept.sum()), model.config.max_fused_tokens or read[-1]))
        words = int(model.processor.encode_demonstrations([demo], "text")[1].sum())
        images = int((inputs["input_ids"] == image_id).sum()) if image_id is not None else read[-1] - words
        visual.append(images)
    fused = dict(zip((demo.key for demo in demos), text, strict=True))
    rows, answered, scored = 0, 0, 0
    for batch in batches:
        lengths = [
            int(mask.sum()) + sum(fused[demo.key] for demo in row)
            for row, mask in zip(batch["demos"], batch["attention_mask"], strict=True)
        ]
        rows += len(lengths)
        answered += len(lengths) * max(lengths)  # rows are padded to the longest one
        scored += len(lengths) * logits_kept(batch["labels"])
    count = len(batches)
    return Sample(
        len(demos) / count, rows / count, _mean(visual), _mean(text), _mean(read), answered / rows, scored / rows
    )


def count_compute(model: AimForConditionalGeneration, sample: Sample, episodes: int, recomputed: bool) -> Compute:
    """Count the FLOPs of a step on modules without weights.

    Frozen weights have no gradient of their own, so a backward pass costs as much as the forward pass through the
    layers above the first place where states enter.

    Args:
        model: the plug-in.
        sample: of the run.
        episodes: in a step.
        recomputed: whether layers are recomputed in the backward pass.

    Raises:
        ValueError: it is not known how an image enters this backbone.
    """
    config = copy.deepcopy(model.backbone.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    picture = picture_with(config, model.processor)
    twin = Twin(config, picture=picture)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    deepest = layers if -1 in model.config.read_layers else max(model.config.read_layers)
    above = (layers - min(model.config.entry_layers)) / layers
    image = twin.image * sample.visual_tokens / max(picture.tokens, 1)
    read = image + deepest / layers * twin.decoder(round(sample.read_tokens))[0]
    decoder = twin.decoder(round(sample.answer_tokens))[0] * (1 + above + (above if recomputed else 0))
    head = 4 * text.hidden_size * text.vocab_size * sample.scored_tokens
    weights = sum(p.numel() for p in model.projector.parameters())
    projector = 6 * weights * sample.text_tokens * sample.demonstrations
    answer = sample.targets * (image + decoder + head) + projector
    return Compute(episodes * sample.demonstrations * read, episodes * answer)


def activation_bytes(model: AimForConditionalGeneration, sample: Sample, episodes: int, recomputed: bool) -> float:
    """About how much the backward pass of one forward pass keeps, from the widths of the text decoder.

    Weights are frozen, so only what is not linear keeps its inputs: norms (in float32), attention, and the gate of the
    MLP. The logits are kept in the backbone's precision and twice in float32.

    Args:
        model, sample, recomputed: as for `count_compute`.
        episodes: in one forward pass.
    """
    text = model.backbone.config.get_text_config(decoder=True)
    size, width = model.dtype.itemsize, text.hidden_size
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or width // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * width
    token = 8 * width + size * (2 * width + 2 * (heads + kv_heads) * head_width + 3 * inner)
    layers = text.num_hidden_layers - max(min(model.config.entry_layers), 0)
    kept = layers * size * width + token if recomputed else layers * token
    rows = episodes * sample.targets
    return rows * (sample.answer_tokens * kept + sample.scored_tokens * text.vocab_size * (size + 12))


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Args:
        model: the plug-in.
        settings: `TrainSettings` of the run.
        sample: what its first episodes hold.
        processes: that share the work.
        compute: of one step of one process; words, why it is not known.
    """

    model: Any
    settings: Any
    sample: Sample
    processes: int
    compute: Compute | str

    @classmethod
    def of(
        cls,
        model: AimForConditionalGeneration,
        settings: TrainSettings,
        collator: EpisodeCollator,
        episodes: Iterable[Any],
        processes: int = 1,
    ) -> Estimate:
        """Make the estimate from the first episodes of a run."""
        sample = sample_episodes(model, collator, episodes)
        each_step = settings.batch_size * settings.accumulation
        compute: Compute | str
        try:
            compute = count_compute(model, sample, each_step, settings.gradient_checkpointing)
        except Exception as error:  # a backbone that does not run without weights is no reason to stop
            compute = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return cls(model, settings, sample, processes, compute)

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of weights, activations (estimated), and of projector, gradients and optimizer."""
        weights = sum(p.numel() * p.element_size() for p in self.model.backbone.parameters())
        state = MUON_BYTES if self.settings.optimizer == "muon" else ADAM_BYTES
        activations = activation_bytes(
            self.model, self.sample, self.settings.batch_size, self.settings.gradient_checkpointing
        )
        trained = self._trained * (WEIGHT_AND_GRADIENT + state)
        return {"weights": weights, "activations": activations, "optimizer": trained}

    @property
    def _trained(self) -> int:
        return sum(p.numel() for p in self.model.projector.parameters())

    @property
    def state_bytes(self) -> float:
        """Bytes of what is kept of a demonstration."""
        config = self.model.config
        return self.sample.text_tokens * config.hidden_size * len(config.read_layers) * self.model.dtype.itemsize

    def lines(self) -> list[str]:
        """What is written at the head of a run."""
        return [
            self._projector_line(), tokens_line(self.model.processor), *self._work_lines(), self._memory_line(),
            self._states_line(), self._checkpoint_line(),
        ]  # fmt: skip

    def _projector_line(self) -> str:
        config, trained = self.model.config, self._trained
        frozen = sum(_numel(p) for p in self.model.backbone.parameters())
        projector = self.model.projector
        calibrated = ", calibrated on its first states" if projector.can_calibrate and projector.is_new else ""
        return (
            f"Projector: {config.projector_form}{calibrated}, read at {config.read_layers}, enters at "
            f"{config.entry_layers}; {trained:,} weights are trained, {trained / (trained + frozen):.2%} of "
            f"{(trained + frozen) / 1e6:,.1f} million."
        )

    def _work_lines(self) -> list[str]:
        sample, settings = self.sample, self.settings
        episodes = settings.batch_size * settings.accumulation * self.processes
        read = episodes * sample.demonstrations * sample.read_tokens
        answered = episodes * sample.targets * sample.answer_tokens
        lines = [
            f"A demonstration: {sample.visual_tokens:,.0f} visual and {sample.text_tokens:,.0f} text tokens.",
            f"A step: {episodes} episodes, {episodes * sample.targets:,.0f} targets, {read:,.0f} tokens read and "
            f"{answered:,.0f} answered, padding included.",
        ]
        if isinstance(self.compute, str):
            return [*lines, f"Compute: not counted ({self.compute})."]
        total = self.processes * (self.compute.reading + self.compute.answering)
        return [*lines, f"Compute: {_flops(total)} a step counted, {self.compute.share:.0%} of it reading."]

    def _memory_line(self) -> str:
        memory, device = self.memory, self.model.device
        free = free_memory(str(device))
        room = "" if free is None else f"; {_bytes(free)} are free on {device} beside the weights"
        return (
            f"Memory of a process: weights {_bytes(memory['weights'])}, activations about "
            f"{_bytes(memory['activations'])}, projector with gradient and optimizer {_bytes(memory['optimizer'])}"
            f"{room}."
        )

    def _states_line(self) -> str:
        settings, size = self.settings, self.state_bytes
        episodes = settings.steps * settings.batch_size * settings.accumulation * self.processes
        reads = episodes * self.sample.demonstrations
        line = (
            f"Hidden-state cache: {_bytes(size)} a demonstration; --memory {settings.memory:g} GiB holds "
            f"{settings.memory * GIB / size:,.0f} of them"
        )
        if settings.keep_states is not None:
            line += f", --disk {settings.disk:g} GiB {settings.disk * GIB / size:,.0f}"
        return f"{line}; the run reads {reads:,.0f}, which would be {_bytes(reads * size)}."

    def _checkpoint_line(self) -> str:
        state = MUON_BYTES if self.settings.optimizer == "muon" else ADAM_BYTES
        checkpoint, repository = self._trained * (4 + state), self._trained * 4
        return f"Checkpoints: {_bytes(checkpoint)} each, two stay; the repository is {_bytes(repository)} and code."

    def measured_line(self, seconds: float, share: float, left: int) -> str:
        """What measured steps say beside the estimate.

        Args:
            seconds: of a step.
            share: of reading in it.
            left: steps to the end.
        """
        line = f"Measured: {seconds:.3g} s a step, {share:.0%} of it reading"
        if isinstance(self.compute, Compute):
            work = self.compute.reading + self.compute.answering
            line += f" ({self.compute.share:.0%} by count; {_flops(work / seconds)} a second, were nothing kept)"
        if self.model.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.model.device)
            line += f"; peak memory {_bytes(peak)}, {_bytes(sum(self.memory.values()))} by estimate"
        hours, reading = left * seconds, left * seconds * share
        return f"{line}; {duration(hours)} to the end, of which {duration(reading)} reading."


def announce(trainer: Any, settings: TrainSettings, episodes: Iterable[Any]) -> None:
    """Write what a run will take, and have what is measured written after some steps.

    Args:
        trainer: before training.
        settings: `TrainSettings` of the run.
        episodes: its stream; a few are taken.
    """
    try:
        first = islice(episodes, min(settings.batch_size, MOST_EPISODES))
        estimate = Estimate.of(trainer.model, settings, trainer.data_collator, first, trainer.args.world_size)
        lines = estimate.lines()
    except Exception as error:  # a run that can train does not end for want of an estimate
        write_line(f"There is no estimate of this run: {type(error).__name__}: {error!s:.300}")
        return
    for line in lines:
        write_line(line)

    def measured(seconds: float, share: float, steps_done: int) -> None:
        left = settings.steps if settings.dry_run else settings.steps - steps_done
        write_line(estimate.measured_line(seconds, share, left))

    trainer.add_callback(StepTimes(trainer.reading_seconds, measured))


def _numel(weight: torch.Tensor) -> int:
    """Numbers in a weight, of one in 4-bit too, whose bytes hold two."""
    packed = type(weight).__name__ == "Params4bit" and weight.dtype == torch.uint8
    return weight.numel() * (2 if packed else 1)


def _image_id(config: PreTrainedConfig) -> int | None:
    for name in ("image_token_id", "image_token_index"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    return None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if count >= 100 or unit == "bytes" else f"{count:.3g} {unit}"


def _flops(count: float) -> str:
    for unit in ("MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs"):
        count /= 1e6 if unit == "MFLOPs" else 1e3
        if count < 1000 or unit == "PFLOPs":
            break
    return f"{count:.3g} {unit}"
