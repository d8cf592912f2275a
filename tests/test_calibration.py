"""Projectors that map inner layers to the input are calibrated: no channel and no sink hides what the others say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import plugin
from safetensors.torch import load_file
from training_runs import trainer

from modeling_aim import AimConfig, AimForConditionalGeneration
from modeling_aim.configuration_aim import PROJECTOR_FORMS
from modeling_aim.projector_aim import PROJECTOR_WEIGHTS, SCALE_KEY, AimProjector, load_projector

pytestmark = pytest.mark.usefixtures("without_pictures")

WIDTH = 512
OUTLIERS = torch.tensor([10.0, 13.0, 16.0, 19.0, 22.0, 25.0]) * 0.6745  # of the median size of the others
INPUT_FORMS = [form for form in PROJECTOR_FORMS if form != "identity"]


def projector_of(form: str, read_layers: list[int], entry_layers: list[int]) -> AimProjector:
    config = plugin("llava").model.config.to_dict()["backbone_config"]
    config["text_config"] |= {"hidden_size": WIDTH, "num_hidden_layers": 4}
    made = AimConfig(config, read_layers=read_layers, entry_layers=entry_layers, projector_form=form)
    return AimProjector(made).eval()


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    """States of words that have nothing in common but six large channels, as middle layers have them."""
    found = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    found[:, :6] = OUTLIERS + found[:, :6]
    return found


def mean_cosine(vectors: torch.Tensor) -> float:
    unit = torch.nn.functional.normalize(vectors.detach(), dim=-1)
    return float(((unit @ unit.T).sum() - len(unit)) / (len(unit) * (len(unit) - 1)))


@pytest.mark.parametrize("form", ["residual", "residual_mlp"])
def test_large_channels_do_not_make_all_words_alike(form: str) -> None:
    projector, words = projector_of(form, [2], [0]), states(40, seed=1)
    assert mean_cosine(projector(words)) > 0.43
    projector.calibrate(states(400))
    assert abs(mean_cosine(projector(words))) < 0.05
    plain = torch.nn.functional.cosine_similarity(projector(words).detach()[:, 6:], words[:, 6:])
    assert float(plain.min()) > 0.9  # what the other channels say is passed on


def test_a_sink_keeps_its_content() -> None:
    """One token in a hundred has two channels that are a thousand times larger, or all of them."""
    sample = states(400)
    sample[::100, 40:42] = 1000.0
    projector = projector_of("residual", [2], [0])
    word = states(1, seed=1)
    massive = word.clone()
    massive[:, 40:42] = 1000.0
    content = [i for i in range(6, WIDTH) if i not in (40, 41)]

    def share(vector: torch.Tensor) -> float:
        return float((vector[0, content].norm() / vector[0].norm()).detach())

    assert share(projector(massive)) < 0.06
    projector.calibrate(sample)
    assert share(projector(massive)) > 0.9
    torch.testing.assert_close(projector(300 * word), projector(word), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["identity", "residual", "residual_mlp"])
def test_at_depth_nothing_changes(form: str) -> None:
    projector = projector_of(form, [0, 2], [0, 2])
    both = torch.cat([states(9), states(9, seed=1)], dim=-1)
    assert not projector.can_calibrate and torch.equal(projector(both), both)
    with pytest.raises(ValueError, match="inner layers to the input"):
        projector.calibrate(both)


def test_the_papers_projector_reads_the_last_state_as_it_is() -> None:
    assert not projector_of("linear_norm", [-1], [0]).can_calibrate


def test_a_bad_sample_is_refused() -> None:
    projector = projector_of("residual", [2], [0])
    for sample in (states(5)[:, :-1], states(0), states(5) / 0):
        with pytest.raises(ValueError, match=r"The sample has the shape .* \(tokens, 512\)"):
            projector.calibrate(sample)


def at_input(form: str = "residual") -> Any:
    return plugin("llava", preset="paper", read_layers=[1, 2], projector_form=form).model


@pytest.mark.parametrize("form", INPUT_FORMS)
def test_training_calibrates_and_the_repository_has_it(form: str, tmp_path: Path) -> None:
    model = at_input(form)
    before = model.source
    run = trainer(model, tmp_path / "run", max_steps=1)
    run.train()
    scale = getattr(model.projector, SCALE_KEY)
    assert scale.shape == (2 * model.config.hidden_size,) and bool((scale > 0).all())
    assert model.source != before
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / PROJECTOR_WEIGHTS)
    assert torch.equal(stored[f"projector.{SCALE_KEY}"], scale)
    loaded = AimForConditionalGeneration.from_pretrained(tmp_path / "saved", backbone=model.backbone)
    sample = torch.randn(3, 2 * model.config.hidden_size)
    assert torch.equal(loaded.project(sample), model.project(sample)) and loaded.source == model.source
    again = trainer(loaded, tmp_path / "more", max_steps=1)
    again.train()  # a calibrated projector keeps its calibration
    assert torch.equal(getattr(loaded.projector, SCALE_KEY), scale)


def test_weights_without_a_calibration_load_as_they_were(tmp_path: Path) -> None:
    model = at_input()
    model.save_pretrained(tmp_path)
    assert f"projector.{SCALE_KEY}" not in load_file(tmp_path / PROJECTOR_WEIGHTS)
    loaded = AimForConditionalGeneration.from_pretrained(tmp_path, backbone=model.backbone)
    sample = torch.randn(3, 2 * model.config.hidden_size)
    assert torch.equal(loaded.project(sample), model.project(sample))
    trainer(loaded, tmp_path / "run", max_steps=1).train()  # trained without scales, it stays without
    assert getattr(loaded.projector, SCALE_KEY) is None
    loaded.projector.calibrate(torch.randn(20, 2 * model.config.hidden_size))
    load_projector(loaded.projector, loaded.config, str(tmp_path / PROJECTOR_WEIGHTS), str(tmp_path))
    assert getattr(loaded.projector, SCALE_KEY) is None


@pytest.mark.parametrize("scale", [-1.0, 0.0, float("nan")])
def test_scales_that_cannot_be_are_refused(scale: float, tmp_path: Path) -> None:
    model = at_input()
    model.projector.set_scale(torch.full((2 * model.config.hidden_size,), scale))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=SCALE_KEY):
        AimForConditionalGeneration.from_pretrained(tmp_path, backbone=model.backbone)


def test_gradients_pass_a_calibrated_projector() -> None:
    projector = projector_of("residual_mlp", [2], [0])
    projector.calibrate(states(400))
    assert SCALE_KEY in projector.state_dict() and all("scale" not in name for name, _ in projector.named_parameters())
    projector(states(5)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in projector.parameters())
