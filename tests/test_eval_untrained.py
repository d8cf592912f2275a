"""`aim eval` without training: answers, depths, what is shared, and what cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from eval_tasks import AIM_TINY, Naming, Pictures, figures, predictions, settings

from modeling_aim import AimForConditionalGeneration, AimProcessor, Demonstration
from modeling_aim.evaluation import evaluate
from modeling_aim.evaluation.methods import PromptBuilder, ShownShot, method_of
from modeling_aim.evaluation.subject import load_subject
from modeling_aim.evaluation.tasks.registry import TASKS

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(autouse=True)
def own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "naming", Naming)
    monkeypatch.setitem(TASKS, "pictures", Pictures)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], str]]:
    """The layers and the key of every demonstration that is read in a test."""
    read: list[tuple[tuple[int, ...], str]] = []
    states = AimForConditionalGeneration.read_states

    def watched(model: Any, demos: Sequence[Demonstration], *more: Any) -> list[torch.Tensor]:
        read.extend((tuple(model.config.read_layers), demo.key) for demo in demos)
        return states(model, demos, *more)

    monkeypatch.setattr(AimForConditionalGeneration, "read_states", watched)
    return read


def test_a_model_without_aim(tmp_path: Path) -> None:
    results = evaluate(settings(tmp_path, repo=None, backbone=f"{AIM_TINY}/backbone", shots=(0, 4), seeds=1))
    untrained = ("aim-untrained", "aim-untrained-shuffled")
    assert set(figures(results)) == {("zero", 0), *((method, 4) for method in ("text", "full", *untrained))}
    methods = tuple(results["settings"]["methods"])
    with_aim = evaluate(settings(tmp_path / "aim", shots=(0, 4), seeds=1, methods=methods))
    assert [c["mean"] for c in with_aim["cells"]] == [c["mean"] for c in results["cells"]]
    assert [row["prediction"] for row in predictions(tmp_path / "run")] == [
        row["prediction"] for row in predictions(tmp_path / "aim" / "run")
    ]


@pytest.mark.parametrize("entry", [0, 2])
def test_methods_share_what_was_read_at_one_depth(
    entry: int, tmp_path: Path, read: list[tuple[tuple[int, ...], str]]
) -> None:
    """And no method with another depth gets it; without training the depth is the repository's, where it has one."""
    tiny = backbones.build("llava")
    model = AimForConditionalGeneration.from_backbone(
        tiny.model, tiny.processor, projector_form="residual", read_layers=[2], entry_layers=[entry]
    )
    model.save_pretrained(tmp_path / "repo", include_backbone=True)
    methods = ("aim", "aim-untrained:depth=1", "aim-untrained:depth=2", "aim-untrained")
    options: dict[str, Any] = {"tasks": ("pictures:,count=2,pool=5",), "shots": (4,), "seeds": 1, "batch_size": 2}
    results = evaluate(settings(tmp_path, repo=str(tmp_path / "repo"), methods=methods, **options))
    shown = {name for row in predictions(tmp_path / "run") for name in row["demonstrations"]}
    assert len(read) == len(set(read)) == 2 * len(shown) and {layers for layers, _ in read} == {(1,), (2,)}
    own = 2 if entry else 1  # of three layers, 1 is the default
    assert [results["model"][name].split()[3] for name in methods[1:]] == ["1", "2", str(own)]
    answers = {m: [r["prediction"] for r in predictions(tmp_path / "run") if r["method"] == m] for m in methods}
    assert answers["aim-untrained"] == answers[f"aim-untrained:depth={own}"]
    if entry:  # a projector at depth begins as the identity
        assert answers["aim"] == answers["aim-untrained"]


@pytest.mark.parametrize("given", ["repo", "backbone"])
def test_answers_without_training_are_those_of_single_calls(given: str, tmp_path: Path) -> None:
    methods = ("aim-untrained", "aim-untrained:depth=1", "aim-untrained-shuffled")
    place = {"repo": None, "backbone": None, given: AIM_TINY if given == "repo" else f"{AIM_TINY}/backbone"}
    run_settings = settings(tmp_path, **place, shots=(4,), seeds=1, methods=methods, tasks=("naming:,count=4",))
    results = evaluate(run_settings)
    backbone, processor = f"{AIM_TINY}/backbone", AimProcessor.from_pretrained(AIM_TINY)
    models = {k: AimForConditionalGeneration.from_backbone(backbone, processor, read_layers=[k]) for k in (1, 2)}
    task, found = Naming(count=4), predictions(tmp_path / "run")
    for row in found:
        example = task.examples(0)[int(row["example"].split(".")[1])]
        shots = task.shots(example, row["shots"], 0)
        shown = (
            method_of(row["method"]).show(PromptBuilder(processor), example, [ShownShot(s, s) for s in shots], 0).fused
        )
        demos = [{**one.words_of.pair, "image": one.images[0]} for one in shown]
        model = models[1 if row["method"].endswith("=1") else 2]
        inputs = processor(images=[list(example.images)], text=["<image>this is"], return_tensors="pt")
        ids = model.generate(**inputs, demos=demos, max_new_tokens=4)
        said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert row["prediction"] == said.strip()
    assert len(found) == 12 and "after 2 decoder layers" in (tmp_path / "run/results.md").read_text()
    assert results["notes"] == []


def test_a_plug_in_without_training_shares_the_backbone() -> None:
    subject = load_subject(AIM_TINY, None)
    other = subject.untrained(1)
    assert other.backbone is subject.backbone and other.processor is subject.processor
    assert subject.untrained(1) is other and not list(other.plugin.projector.parameters())


def test_a_backbone_without_a_stack_of_layers_is_evaluated_without_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(backbone: Any) -> Any:
        raise ValueError("no stack of layers")

    monkeypatch.setattr("modeling_aim.backbone_aim.decoder_layers", none)
    place: dict[str, Any] = {"repo": None, "backbone": f"{AIM_TINY}/backbone", "tasks": ("pictures:,count=2",)}
    results = evaluate(settings(tmp_path, **place, shots=(2,), seeds=1))
    assert set(figures(results)) == {("zero", 0), ("text", 2), ("full", 2)}
    assert any("aim-untrained-shuffled: left out, states cannot enter" in note for note in results["notes"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": ("aim:depth=2",)}, "'aim:depth=2': expected aim-untrained:depth=K"),
        ({"methods": ("aim-untrained:depth=deep",)}, "expected aim-untrained:depth=K"),
        ({"methods": ("aim-untrained:depth=5",)}, r"states can be put back at 0..4, but not at 5"),
    ],
)
def test_a_depth_that_cannot_be_is_said_before_anything_is_answered(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(settings(tmp_path, **given))
    assert not (tmp_path / "run").exists()
