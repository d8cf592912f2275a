"""One training run, from data to a Hub repository: `aim train`, and `train(TrainSettings(...))` in Python."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PrinterCallback, TrainingArguments
from transformers.utils import logging

from .. import AimConfig, AimForConditionalGeneration
from ..backbone_aim import laptop_quantization_config
from ..configuration_aim import PRESETS, preset_settings
from ..files_aim import model_card, only_one
from ..image_settings import check_readable, set_image_settings
from ..publishing import publish
from ..runs import PRECISIONS, RunRecord
from .checkpoints import last_checkpoint, stored_scale
from .episodes import Episode, Mixture, ShotLaw
from .kept_states import KeptStates
from .optimizer import usual_rate
from .pace import MEASURED, WARM_UP, LogLines
from .report import curves, hub_datasets, training_section
from .settings import TrainSettings, shared_arguments
from .sources import open_source
from .trainer import AimTrainer

logger = logging.get_logger(__name__)

RUN_FILE = "aim_training.json"
GIB = 2**30
CHANGEABLE = {
    "output", "overwrite", "push_to_hub", "save_every", "log_every", "memory", "keep_states", "disk", "device_map",
    "dry_run",
}  # fmt: skip
Announce = Callable[[AimTrainer, "TrainSettings", Iterable[Episode]], None]
RECORD = RunRecord("aim train", RUN_FILE, frozenset(CHANGEABLE))


class Held(Dataset):
    """The first episodes of a stream, held for evaluation with their images unopened."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self.episodes = list(episodes)

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, place: int) -> Episode:
        return self.episodes[place]


def train(settings: TrainSettings, announce: Announce | None = None) -> AimTrainer:
    """Train a projector; resumes an interrupted run with the same settings.

    Args:
        settings: all of the run.
        announce: is called on the main process before training with trainer, settings and the stream of episodes;
            `modeling_aim.speed.estimate.announce` writes what the run will take.

    Returns:
        The trainer, after `settings.output` was written: projector, processor, code, and a model card with data,
        settings and curves. With `dry_run` nothing is written.

    Raises:
        ValueError: settings or data that cannot work, or an output folder that holds another run.
        NotFinite: the loss became NaN or infinite.
    """
    mixture = _mixture(settings.data, settings)
    mixture.check()  # before the backbone is loaded
    held: Mixture | None = None
    if settings.eval_data:
        held = _mixture(settings.eval_data, settings, seed=10**6)
        held.check()
    elif settings.held_out:
        mixture, held = _split(mixture, settings.held_out)
    arguments = _arguments(settings, held is not None)
    _check_processes(arguments)
    RECORD.earlier(settings)  # before a folder is made
    if settings.dry_run:
        return _dry_run(settings, mixture, announce)
    with only_one(settings.output, "aim train") if PartialState().is_main_process else nullcontext():
        return _train(settings, arguments, mixture, held, announce)


def _dry_run(settings: TrainSettings, mixture: Mixture, announce: Announce | None) -> AimTrainer:
    """Write what the run will take, and measure some steps of it in a folder that is removed."""
    model = _model(settings)
    with tempfile.TemporaryDirectory() as folder:
        steps = min(WARM_UP + MEASURED, settings.steps)
        own = {**settings.arguments, "save_strategy": "no", "report_to": "none"}
        short = replace(settings, output=folder, steps=steps, arguments=own, log_every=steps + 1)
        trainer = _trainer(model, short, _arguments(short, False), mixture, None)
        if announce is not None and PartialState().is_main_process:
            announce(trainer, settings, mixture)
        trainer.train()
    return trainer


def _train(
    settings: TrainSettings,
    arguments: TrainingArguments,
    mixture: Mixture,
    held: Mixture | None,
    announce: Announce | None,
) -> AimTrainer:
    """The run, after all that can be checked without a model."""
    last = claim(settings)
    model = _model(settings)
    trainer = _trainer(model, settings, arguments, mixture, held)
    if last is None:
        _begin(settings)
    if announce is not None and PartialState().is_main_process:
        announce(trainer, settings, mixture)
    if last is None:
        trainer.calibrate()
    elif (scale := stored_scale(last)) is not None:
        model.projector.set_scale(scale.to(model.device))
    untrained = {name: weight.clone() for name, weight in model.projector.state_dict().items()}
    try:
        trainer.train(resume_from_checkpoint=last)
    except pickle.UnpicklingError as error:
        raise ValueError(f"The checkpoint {last} holds something else than tensors and numbers: {error}") from error
    if not trainer.improved:
        logger.warning(trainer.verdict)
        model.projector.load_state_dict(untrained)
    finish(trainer, settings)
    return trainer


def _trainer(
    model: AimForConditionalGeneration,
    settings: TrainSettings,
    arguments: TrainingArguments,
    mixture: Mixture,
    held: Mixture | None,
) -> AimTrainer:
    """The trainer of a run.

    Args:
        model: the plug-in.
        settings: of the run.
        arguments: of `Trainer`.
        mixture, held: trained on, and held out.
    """
    if settings.learning_rate is None and "learning_rate" not in settings.arguments:
        arguments.learning_rate = usual_rate(settings.optimizer, model.projector.parameters())
    keep_states = None if settings.dry_run else settings.keep_states
    kept = KeptStates(
        int(settings.memory * GIB), keep_states, int(settings.disk * GIB), _reader(model, settings), read_width(model)
    )
    trainer = AimTrainer(
        model,
        arguments,
        prompts=settings.prompts,
        teacher=settings.teacher,
        distillation=settings.distillation,
        optimizer=settings.optimizer,
        kept_states=kept,
        train_dataset=mixture,
        eval_dataset=None if held is None else Held(list(itertools.islice(held, settings.eval_episodes))),
    )
    if arguments.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines())
    return trainer


def finish(trainer: AimTrainer, settings: TrainSettings) -> None:
    """Write the Hub repository: model, model card, curves."""
    output, model = Path(settings.output), trainer.accelerator.unwrap_model(trainer.model)
    trainer.save_model(settings.output)
    if not trainer.args.should_save:
        return
    picture = curves(trainer.state.log_history, output / "training.png")
    settled = _settled(trainer)
    section = training_section({**asdict(settings), **settled}, trainer, picture)
    card = model_card(model.config, model.projector, hub_datasets(settings.data))
    (output / "README.md").write_text(card + section, encoding="utf-8")
    _write_run(output, settings, finished=True, settled=settled)
    if settings.push_to_hub is not None:
        publish(output, settings.push_to_hub, check=False)


def claim(settings: TrainSettings) -> str | None:
    """See whether the output folder is free for this run; nothing is written yet.

    Returns:
        The checkpoint to resume from, where the run was started before.

    Raises:
        ValueError: the folder holds another run, a finished one, or something else.
    """
    output = Path(settings.output)
    earlier = RECORD.earlier(settings)
    if earlier is not None:
        if not earlier["finished"] and last_checkpoint(output) is None:
            return None  # nothing is lost by starting over
        RECORD.check_same(settings, earlier)
        if earlier["finished"]:
            raise ValueError(
                f"The run in {output} is finished. To train it further, give it as the backbone of a new run, or "
                "overwrite=True (--overwrite)."
            )
    return None if settings.overwrite else last_checkpoint(output)


def _begin(settings: TrainSettings) -> None:
    """Make the output folder this run's: its settings go in, checkpoints of a run before it go out."""
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    _write_run(output, settings, finished=False)
    if PartialState().is_main_process:
        for path in output.glob("checkpoint-*[0-9]"):
            shutil.rmtree(path)


def _write_run(output: Path, settings: TrainSettings, finished: bool, **more: Any) -> None:
    RECORD.write(output, {"settings": RECORD.comparable(settings), **more, "finished": finished})


def _settled(trainer: AimTrainer) -> dict[str, Any]:
    """What was left open in the settings."""
    config: Any = trainer.model.config  # type: ignore[union-attr]
    return {"learning_rate": float(f"{trainer.args.learning_rate:.4g}"), **config.form}


def _mixture(specs: Sequence[str], settings: TrainSettings, seed: int = 0) -> Mixture:
    opened = [open_source(spec) for spec in specs]
    law = ShotLaw(settings.shots, settings.shot_law)
    return Mixture([source for source, _ in opened], [weight for _, weight in opened], law, settings.seed + seed)


def _split(mixture: Mixture, share: float) -> tuple[Mixture, Mixture | None]:
    """What is trained on and what is held out; `None` where the data is too little to hold some of it out."""
    train, held = mixture.split(share)
    try:
        train.check()
        held.check()
    except ValueError:
        logger.warning(
            f"The data is too little to hold {share:.0%} of its documents out, so nothing tells whether training "
            "helps, and the last weights are kept. Give held-out data with eval_data (--eval-data)."
        )
        return mixture, None
    return train, held


def _check_processes(arguments: TrainingArguments) -> None:
    """Raise `ValueError` where several processes were started that do not know of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != arguments.world_size:
        raise ValueError(
            f"{started} processes were started, but this one would train alone (use_cpu={arguments.use_cpu}), and all "
            "would write the same folder. Leave use_cpu as it is, or start one process."
        )


def _model(settings: TrainSettings) -> Any:
    """The plug-in to train, with the image settings of the run."""
    model = _loaded(settings)
    set_image_settings(model.processor, settings.image_settings)
    check_readable(model, settings.image_settings)
    return model


def _loaded(settings: TrainSettings) -> Any:
    """The plug-in to train: a new projector on a backbone, or that of an AIM repository."""
    options: dict[str, Any] = {"dtype": PRECISIONS[settings.dtype], "device_map": settings.device_map}
    if settings.revision:
        options["revision"] = settings.revision
    if settings.load_in_4bit:
        options["quantization_config"] = laptop_quantization_config()
        if torch.cuda.is_available() and settings.device_map is None:  # one process, one device
            options["device_map"] = {"": PartialState().local_process_index}
    torch.manual_seed(settings.seed)
    stored, _ = PreTrainedConfig.get_config_dict(settings.backbone, revision=settings.revision)
    if stored.get("model_type") == AimConfig.model_type:
        _check_form(settings, AimConfig.from_dict(stored))
        model = AimForConditionalGeneration.from_pretrained(settings.backbone, **options)
        return model if len(model.projector.layers) else _with_projector(model, settings)
    return AimForConditionalGeneration.from_backbone(
        settings.backbone,
        preset=settings.preset,
        read_layers=settings.read_layers,
        entry_layers=settings.entry_layers,
        read_span=settings.read_span,
        max_fused_tokens=settings.max_fused_tokens,
        projector_form=settings.projector_form,
        projector_intermediate_size=settings.projector_size,
        **options,
    )


def _with_projector(model: AimForConditionalGeneration, settings: TrainSettings) -> Any:
    """A plug-in without weights, with a new projector at the input and at the depth where it reads."""
    config = copy.deepcopy(model.config)
    config.read_layers = list(settings.read_layers or sorted({0, *config.read_layers}))
    config.entry_layers = None
    config.projector_form = settings.projector_form or PRESETS["trained"]["projector_form"]
    config.projector_intermediate_size = settings.projector_size
    config.check()
    trained = AimForConditionalGeneration(config, backbone=model.backbone, processor=model.processor)
    trained._loaded_from = model._loaded_from
    return trained


def _check_form(settings: TrainSettings, config: AimConfig) -> None:
    """Raise `ValueError` where another form is asked for than that of the projector that is trained further."""
    has = {
        "projector_form": config.projector_form,
        "projector_size": config.projector_intermediate_size,
        "read_layers": tuple(config.read_layers or ()),
        "entry_layers": tuple(config.entry_layers or ()),
        "read_span": config.read_span,
        "max_fused_tokens": config.max_fused_tokens,
    }
    usual = {field.name: field.default for field in fields(TrainSettings)}
    if settings.preset != usual["preset"]:
        settings = replace(settings, **{k: v for k, v in preset_settings(settings.preset).items() if v is not None})
    requested = {name: tuple(v) if isinstance(v := getattr(settings, name), list) else v for name in has}
    if config.projector_form == "identity":  # a projector is put on it
        del has["projector_form"], has["projector_size"]
    other = [
        f"{name}={requested[name]!r} (it has {has[name]!r})"
        for name in has
        if requested[name] not in (usual[name], has[name])
    ]
    if other:
        raise ValueError(
            f"{settings.backbone} is an AIM repository: its projector is trained further as it is. Leave out "
            f"{', '.join(other)}, or give the backbone itself for a new projector."
        )


def read_width(model: AimForConditionalGeneration) -> int:
    """Numbers in what is read of one token."""
    return model.config.hidden_size * len(model.config.read_layers)


def _reader(model: AimForConditionalGeneration, settings: TrainSettings) -> dict[str, Any]:
    """What decides the hidden states of a demonstration, beside the demonstration."""
    return {**model.reader, "dtype": settings.dtype, "4-bit": settings.load_in_4bit}


def _arguments(settings: TrainSettings, evaluates: bool) -> TrainingArguments:
    """The run as HF `TrainingArguments`; what the user names there wins."""
    values: dict[str, Any] = {
        **shared_arguments(settings),
        "output_dir": settings.output,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate or 0.0,
        "warmup_steps": int(settings.warmup * settings.steps),
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": settings.save_every,
        "eval_on_start": evaluates,
        "load_best_model_at_end": evaluates,
        "metric_for_best_model": "eval_score" if evaluates else None,
        "greater_is_better": True if evaluates else None,
        "ddp_find_unused_parameters": False,
        "seed": settings.seed,
    }
    return TrainingArguments(**{**values, **settings.arguments})
