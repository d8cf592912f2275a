"""Training a projector: what a batch holds, and what is learned."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import training_runs
from backbones import picture
from torch.utils.data import DataLoader
from training_runs import Things, arguments, losses, trainer

from modeling_aim import AimForConditionalGeneration, Demonstration, laptop_quantization_config
from modeling_aim.configuration_aim import PROJECTOR_FORMS
from modeling_aim.training import (
    AimTrainer,
    Episode,
    EpisodeCollator,
    EpisodeStream,
    Mixture,
    ShotLaw,
    TrainSettings,
    train,
)
from modeling_aim.training.optimizer import usual_rate
from modeling_aim.training.run import RUN_FILE

saved_backbone, settings = training_runs.saved_backbone, training_runs.settings  # the fixtures

SHAPES = ("llava", "qwen2_5_vl", "idefics", "idefics3")


# --- what a batch holds


@pytest.mark.parametrize("family", SHAPES)
def test_labels_are_answer_and_end_behind_the_prompt_of_answering_time(family: str) -> None:
    model = backbones.plugin(family).model
    pairs = [Demonstration.of(pair) for document in Things(6).documents(0) for pair in document]
    batch = EpisodeCollator(model)([Episode(tuple(pairs), tuple(range(1, 6)))])
    assert [len(demos) for demos in batch["demos"]] == [1, 2, 3, 4, 5]
    decode = model.processor.tokenizer.decode
    for ids, labels, target in zip(batch["input_ids"], batch["labels"], pairs[1:], strict=True):
        scored = labels != -100
        assert decode(labels[scored]).strip() == target.text + "</s>"
        assert torch.equal(ids[scored], labels[scored]) and scored[-1]
        if target.question is not None:
            prompt = model.processor.prompt(target.question)
            query = model.processor(images=target.images[0], text=prompt, return_tensors="pt")["input_ids"][0]
            assert torch.equal(ids[~scored][-len(query) :], query)


@pytest.mark.parametrize("family", ["smolvlm", "llava", "idefics3"])
@pytest.mark.parametrize("prompts", ["plain", "chat"])
@pytest.mark.parametrize("teacher", ["full", "text"])
def test_targets_and_their_teacher_begin_with_bos_once(family: str, prompts: str, teacher: str) -> None:
    """Captions and plain questions are rendered by no chat template, which alone writes SmolVLM's BOS."""
    model = backbones.plugin(family).model
    bos = model.processor.tokenizer.bos_token_id
    pairs = [Demonstration.of(pair) for document in Things(6).documents(0) for pair in document]
    batch = EpisodeCollator(model, teacher, prompts)([Episode(tuple(pairs), tuple(range(1, 6)))])
    assert {pair.question for pair in pairs[1:]} == {None, "What is it?"}
    for inputs in (batch, batch["teacher"]):
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            kept = ids[mask.bool()].tolist()
            assert kept[0] == bos and kept.count(bos) == 1


def test_a_target_without_room_is_skipped_and_early_demonstrations_leave() -> None:
    built = backbones.build("llava", max_position_embeddings=60)
    model = AimForConditionalGeneration.from_backbone(built.model, built.processor)
    demos = [Demonstration.of((picture(i), "one two three four five six")) for i in range(8)]
    target = Demonstration.of((picture(9), "yes"))
    long = Demonstration.of((picture(9), "word " * 60))
    batch = EpisodeCollator(model)([Episode((*demos, target), (8,)), Episode((*demos, long), (8,))])
    assert len(batch["demos"]) == 1 and 0 < len(batch["demos"][0]) < 8
    assert batch["demos"][0][-1] is demos[-1]
    assert batch["skipped"] == {"target longer than the context": 1}
    model(**{k: v for k, v in batch.items() if k not in ("sources", "skipped")})  # it fits
    with pytest.raises(ValueError, match=r"No target of this batch fits in the backbone's 60 positions"):
        EpisodeCollator(model)([Episode((*demos, long), (8,))])


def test_grouping_by_length_changes_the_order_alone() -> None:
    stream = [episode for episode, _ in zip(Mixture([Things()], [1.0], ShotLaw(5)), range(40), strict=False)]
    plain, grouped = (list(EpisodeStream(stream, 10, group_by_length=group)) for group in (False, True))
    assert plain == stream
    assert sorted(map(id, grouped)) == sorted(map(id, stream)) and grouped != stream

    def spread(episodes: list[Any]) -> int:
        lengths = [[len(e.pairs) for e in episodes[i : i + 10]] for i in range(0, 40, 10)]
        return sum(max(block) - min(block) for block in lengths)

    assert spread(grouped) < spread(stream) / 2


@pytest.mark.parametrize("group", [False, True])
def test_workers_of_a_loader_share_what_one_process_gives(group: bool) -> None:
    """Batch by batch the same, whatever the number of workers; what a resumed run has behind it comes as `None`."""

    def batches(workers: int, skip: int = 0) -> list[Any]:
        data = EpisodeStream(Mixture([Things()], [1.0], ShotLaw(2)), 4, group_by_length=group)
        data.skip = skip
        loader = DataLoader(data, batch_size=4, num_workers=workers, collate_fn=list)
        return [
            [[pair.key for pair in episode.opened().pairs] if episode else None for episode in batch]
            for batch, _ in zip(loader, range(9), strict=False)
        ]

    alone = batches(0)
    assert batches(2) == alone
    assert batches(2, skip=5) == [[None] * 4] * 5 + alone[5:]


# --- what is learned


@pytest.mark.parametrize("family", SHAPES)
def test_only_the_projector_learns_and_the_loss_falls(family: str, tmp_path: Path) -> None:
    model = backbones.plugin(family).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(model, tmp_path, max_steps=12)
    run.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("projector.") for name in changed)
    assert sum(losses(run)[-4:]) < sum(losses(run)[:4])


@pytest.mark.parametrize("form", [form for form in PROJECTOR_FORMS if form != "identity"])
def test_every_form_learns(form: str, tmp_path: Path) -> None:
    model = backbones.plugin("llava", projector_form=form, read_layers=[1, -1]).model
    run = trainer(model, tmp_path, max_steps=16)
    run.train()
    assert sum(losses(run)[-4:]) < sum(losses(run)[:4])


def test_a_new_projector_is_by_default_what_learned_best(settings: TrainSettings) -> None:
    """It maps at the input and at a depth, 1 of 3; Muon's rate goes by the projector's longest side, 2 x 64."""
    run = train(replace(settings, learning_rate=None))
    config: Any = run.model.config  # type: ignore[union-attr]
    assert (config.projector_form, config.read_layers, config.entry_layers) == ("residual_mlp", [0, 1], [0, 1])
    assert run.args.learning_rate == 1e-3 and settings.optimizer == "adamw"
    assert usual_rate("muon", run.model.projector.parameters()) == pytest.approx(0.6 / 128**0.5)  # type: ignore[union-attr]
    assert (run.train_dataset.episodes.law.law, run.train_dataset.episodes.law.most) == ("exponential", 2)  # type: ignore
    settled = json.loads((Path(settings.output) / RUN_FILE).read_text())["settled"]
    assert settled == {"learning_rate": 1e-3, **config.form}
    assert "| learning rate | 0.001 |" in (Path(settings.output) / "README.md").read_text()
    with pytest.raises(ValueError, match="optimizer='adamw'"):
        replace(settings, optimizer="muon", arguments={"optim": "adafactor"})


def test_muon_takes_the_matrices_and_leaves_the_rest_to_adamw(tmp_path: Path) -> None:
    model = backbones.plugin("llava", projector_form="mlp").model
    run = trainer(model, tmp_path, {"optimizer": "muon"}, max_steps=16, weight_decay=0.1, warmup_steps=4)
    run.train()
    assert sum(losses(run)[-4:]) < sum(losses(run)[:4])
    optimizer: Any = run.optimizer
    muon, adamw = optimizer.optimizer.parts
    assert {weight.ndim for group in muon.param_groups for weight in group["params"]} == {2}
    taken = [weight for part in (muon, adamw) for group in part.param_groups for weight in group["params"]]
    assert {id(weight) for weight in taken} == {id(weight) for weight in model.projector.parameters()}
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([run.lr_scheduler.get_last_lr()[0] / part for part in (1, 3)])
    assert rates[0] < 1e-2  # the schedule reaches both


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family == "llava" else pytest.mark.slow) for family in SHAPES]
)
def test_sixteen_samples_are_learned_by_heart(family: str, tmp_path: Path) -> None:
    """All ask the same of the same image: only the fused tokens of each demonstration can tell the answers apart."""
    model = backbones.plugin(family, projector_form="residual_mlp").model
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdefghij", k=4)) for _ in range(16)]
    demos = [Demonstration.of((picture(i), f"this is {name} here")) for i, name in enumerate(names)]
    asked = [Demonstration.of((picture(99), "What?", name)) for name in names]
    samples = [Episode(pair, (1,)) for pair in zip(demos, asked, strict=True)]
    options: dict[str, Any] = {
        "max_steps": 120 if family == "llava" else 200,
        "learning_rate": 2e-2,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
    }
    run = AimTrainer(model, arguments(tmp_path, **options), train_dataset=samples, optimizer="muon")
    run.train()
    assert losses(run)[0] > 2 and losses(run)[-1] < 0.1


@pytest.mark.parametrize("teacher", ["full", "text"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_distillation_brings_the_student_nearer_to_its_teacher(family: str, teacher: str, tmp_path: Path) -> None:
    model = backbones.plugin(family, projector_form="mlp").model
    pairs = [Demonstration.of(pair) for document in Things(8).documents(0) for pair in document]
    samples = [Episode(tuple(pairs[:4]), (1, 2, 3)), Episode(tuple(pairs[4:]), (1, 2, 3))]
    run = AimTrainer(
        model, arguments(tmp_path, max_steps=12), teacher=teacher, distillation=1.0, train_dataset=samples
    )
    run.train()
    assert all(loss >= 0 for loss in losses(run)) and losses(run)[-1] < 0.7 * losses(run)[0]


def test_a_4_bit_backbone_trains(saved_backbone: str, tmp_path: Path) -> None:
    model = AimForConditionalGeneration.from_backbone(
        saved_backbone, preset="trained", quantization_config=laptop_quantization_config(), dtype=torch.float32
    )
    packed = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    run = trainer(model, tmp_path, max_steps=8)
    run.train()
    assert sum(losses(run)[-3:]) < sum(losses(run)[:3])
    assert all(torch.equal(value, packed[name]) for name, value in model.backbone.state_dict().items())
