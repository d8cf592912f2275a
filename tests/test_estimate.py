"""What a run says of itself before it begins, and what it logs on the way."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
from backbones import plugin
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from training_runs import Things, trainer
from typer.testing import CliRunner

from modeling_aim.cli import app
from modeling_aim.projector_aim import PROJECTOR_WEIGHTS
from modeling_aim.speed.estimate import Compute, Estimate, activation_bytes, announce
from modeling_aim.training import AimTrainer, Mixture, ShotLaw, TrainSettings, train
from modeling_aim.training.pace import LogLines, Pace, StepTimes
from modeling_aim.training.targets import logits_kept

pytestmark = pytest.mark.usefixtures("without_pictures")

saved_backbone, settings = training_runs.saved_backbone, training_runs.settings  # the fixtures
PLANNED = TrainSettings("backbone", ("data",), "out", batch_size=4, dtype="float32", steps=100)


def estimated(family: str, folder: Path, planned: TrainSettings = PLANNED) -> tuple[Estimate, AimTrainer, list[Any]]:
    model = plugin(family, read_layers=[0, 1]).model
    run = trainer(model, folder)
    episodes = list(itertools.islice(Mixture([Things()], [1.0], ShotLaw(3)), planned.batch_size))
    return Estimate.of(model, planned, run.data_collator, episodes), run, episodes


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_vl"])
def test_the_estimate_is_what_torch_counts_of_a_step(family: str, tmp_path: Path) -> None:
    estimate, run, episodes = estimated(family, tmp_path)
    model: Any = run.model
    demos = {demo.key: demo for row in run.data_collator(episodes)["demos"] for demo in row}
    states = model.read_states(list(demos.values()))
    assert estimate.state_bytes == pytest.approx(sum(s.numel() * s.element_size() for s in states) / len(states))
    assert isinstance(estimate.compute, Compute), estimate.compute
    with FlopCounterMode(display=False) as reading:
        model.read_states(list(demos.values()), 1)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    answered = bytes_kept = 0
    for episode in episodes:
        inputs = {**run.data_collator([episode])}
        for name in ("sources", "skipped", "counts"):
            inputs.pop(name)
        fused = [model.read(row) for row in inputs["demos"]]
        inputs["demos"] = [replace(row, vectors=row.vectors.requires_grad_()) for row in fused]
        inputs["logits_to_keep"] = logits_kept(inputs["labels"])  # as in training
        kept.clear()
        with FlopCounterMode(display=False) as answering, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(**inputs).loss
            bytes_kept += sum(kept.values())
            loss.backward()
        answered += answering.get_total_flops()
    assert estimate.compute.reading == pytest.approx(reading.get_total_flops(), rel=0.35)
    assert estimate.compute.answering == pytest.approx(answered, rel=0.35)
    assert 0.4 < activation_bytes(model, estimate.sample, len(episodes), False) / bytes_kept < 2.5


def test_recomputing_layers_costs_compute_and_spares_memory(tmp_path: Path) -> None:
    plain, _, _ = estimated("llava", tmp_path)
    spared, _, _ = estimated("llava", tmp_path, replace(PLANNED, gradient_checkpointing=True))
    assert isinstance(plain.compute, Compute) and isinstance(spared.compute, Compute)
    assert plain.compute.answering < spared.compute.answering and plain.compute.reading == spared.compute.reading
    assert plain.memory["activations"] > spared.memory["activations"]


def test_a_backbone_that_cannot_be_counted_has_the_other_lines(tmp_path: Path) -> None:
    estimate, _, _ = estimated("idefics", tmp_path)
    text = "\n".join(estimate.lines())
    assert "Compute: not counted (aim bench does not know how an image enters idefics" in text
    assert "Memory of a process" in text and "a step" in estimate.measured_line(1.5, 0.25, 7200)
    assert "3:00:00 to the end, of which 0:45:00 reading" in estimate.measured_line(1.5, 0.25, 7200)


def test_a_dry_run_shows_all_of_it_and_writes_nothing(settings: TrainSettings, listing: Any) -> None:
    folder = Path(settings.output).parent
    before = listing(folder)
    typed = ["train", "--backbone", settings.backbone, "--data", settings.data[0], "--output", settings.output]
    typed += ["--dtype", "float32", "--steps", "500", "--batch-size", "2", "--shots", "2", "--set", "use_cpu=true"]
    done = CliRunner().invoke(app, [*typed, "--keep-states", str(folder / "states"), "--dry-run"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert listing(folder) == before and "Nothing was written (--dry-run)." in done.stdout
    for line in (
        "Projector: residual_mlp, read at [0,", "weights are trained", "An image of 500 x 400 pixels is 5 tokens",
        "A demonstration: 4 visual and", "A step: 2 episodes,", "FLOPs a step counted", "Memory of a process: weights",
        "--memory 1 GiB holds", "--disk 20 GiB", "Checkpoints: ", "Measured: ", "to the end, of which",
    ):  # fmt: skip
        assert line in done.stderr, (line, done.stderr)


def test_a_run_begins_with_it_and_its_logs_have_the_pace(
    settings: TrainSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(replace(settings, held_out=0.4, save_every=3), announce)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("Projector: ")] and "Measured: " in "\n".join(said)
    rows = [row for row in run.state.log_history if "loss" in row]
    for row in rows:
        assert all(row[f"{name}_per_second"] > 0 for name in ("episodes", "tokens", "images"))
        assert 0 <= row["reading_share"] <= 1
    steps = [line for line in said if line.startswith("step ") and "held-out" not in line]
    assert len(steps) == settings.steps and "step 6 of 6: loss" in steps[-1] and "0:00:00 left" in steps[-1]
    assert all(word in steps[1] for word in ("episodes/s", "tokens/s", "images/s", "reading", "left"))
    held = [line for line in said if "held-out accuracy" in line]
    assert len(held) == 3 and "step 0 of 6: held-out loss" in held[0]
    weights = load_file(Path(settings.output) / PROJECTOR_WEIGHTS)
    trained = sum(weight.numel() for weight in weights.values())
    assert f"{trained:,} weights are trained" in "\n".join(said)


def test_the_pace_leaves_evaluations_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now, read = [100.0], [0.0]
    monkeypatch.setattr("modeling_aim.training.pace.time.perf_counter", lambda: now[0])
    pace = Pace(lambda: read[0], processes=2)
    assert pace.report() == {}
    pace.count({"episodes": 4, "tokens": 800, "images": 12})
    now[0], read[0] = 104.0, 1.0
    with pace.paused():
        now[0], read[0] = 150.0, 40.0
    expected = {"episodes_per_second": 2.0, "tokens_per_second": 400.0, "images_per_second": 6.0}
    assert pace.report() == {**expected, "reading_share": 0.25}
    pace.count({"episodes": 1})
    now[0] = 151.0
    assert pace.report()["episodes_per_second"] == 2.0


class State:
    """What callbacks see of a run."""

    max_steps, is_world_process_zero = 100, True

    def __init__(self, step: int) -> None:
        self.global_step = step


def test_measured_steps_are_those_that_nothing_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, found = [0.0], []
    monkeypatch.setattr("modeling_aim.training.pace.time.perf_counter", lambda: now[0])
    times = StepTimes(lambda: now[0] / 4, lambda *measured: found.append(measured))
    for step in range(1, 12):
        now[0] += 2.0 if step > 1 else 60.0
        times.on_step_end(None, State(step), None)
        if step == 3:
            now[0] += 1000.0
            times.on_evaluate(None, State(step), None)
    assert found == [(2.0, 0.25, 8)]


def test_lines_of_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("modeling_aim.training.pace.time.perf_counter", lambda: now[0])
    lines = LogLines()
    lines.on_train_begin(None, State(40), None)  # a resumed run
    now[0] = 20.0
    lines.on_log(None, State(50), None, logs={"loss": 1.25, "learning_rate": 1e-3, "reading_share": 0.5})
    lines.on_log(None, State(50), None, logs={"eval_loss": 2.0})
    lines.on_log(None, State(50), None, logs={"eval_accuracy": 0.75})
    assert capsys.readouterr().err.splitlines() == [
        "step 50 of 100: loss 1.2500, rate 1.00e-03, reading 50%, 0:01:40 left",
        "step 50 of 100: held-out loss 2.0000, held-out accuracy 0.750",
    ]
