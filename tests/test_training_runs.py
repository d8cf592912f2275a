"""A run of training: resumed, distributed, its reads kept, its folder, what it refuses, what is held out."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import backbones
import pyarrow
import pytest
import torch
import training_runs
from backbones import picture
from forked import run_python
from hub_server import HubServer
from killed_commands import killed_command
from pyarrow import parquet
from safetensors.torch import load_file
from training_runs import WORDS, data_on_disk, losses, trainer
from transformers import pipeline
from typer.testing import CliRunner

from modeling_aim import AimForConditionalGeneration
from modeling_aim.cli import app
from modeling_aim.projector_aim import PROJECTOR_WEIGHTS
from modeling_aim.training import (
    KeptStates,
    Mixture,
    NotFinite,
    ShotLaw,
    TrainSettings,
    open_source,
    train,
)
from modeling_aim.training.run import RUN_FILE, last_checkpoint

pytestmark = pytest.mark.usefixtures("without_pictures")

saved_backbone, settings = training_runs.saved_backbone, training_runs.settings  # the fixtures

# --- interrupted, distributed


def test_a_killed_run_goes_on_to_the_same_weights(settings: TrainSettings, tmp_path: Path) -> None:
    """SIGKILL after a counted step between checkpoints, then the same command again."""
    settings = replace(settings, steps=10, optimizer="adamw")
    train(settings)
    arguments = ["train", "--backbone", settings.backbone, "--data", settings.data[0]]
    arguments += ["--output", str(tmp_path / "killed"), "--steps", "10", "--batch-size", "2", "--shots", "2"]
    arguments += ["--optimizer", "adamw", "--learning-rate", "1e-2", "--dtype", "float32", "--save-every", "2"]
    arguments += ["--log-every", "1", "--set", "use_cpu=true", "--set", "disable_tqdm=true"]
    killed = killed_command("step", 5, signal.SIGKILL, arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last_checkpoint(tmp_path / "killed") == str(tmp_path / "killed/checkpoint-4")
    assert not (tmp_path / "killed" / PROJECTOR_WEIGHTS).exists()
    done = run_python(["-m", "modeling_aim", *arguments])
    assert done.returncode == 0, done.stderr
    whole, resumed = (load_file(folder / PROJECTOR_WEIGHTS) for folder in (Path(settings.output), tmp_path / "killed"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [True, False], ids=["reads kept on disk", "read again"])
def test_muon_goes_on_where_it_was(settings: TrainSettings, tmp_path: Path, kept: bool) -> None:
    settings = replace(settings, steps=8, optimizer="muon")
    if kept:
        settings = replace(settings, keep_states=str(tmp_path / "states"))
    else:
        settings = replace(settings, projector_form="mlp")
    train(settings)
    whole, again = Path(settings.output), tmp_path / "again"
    shutil.copytree(whole / "checkpoint-6", again / "checkpoint-6")
    (again / RUN_FILE).write_text((whole / RUN_FILE).read_text().replace('"finished": true', '"finished": false'))
    train(replace(settings, output=str(again)))
    wanted, found = (load_file(folder / PROJECTOR_WEIGHTS) for folder in (whole, again))
    for name, value in wanted.items():
        # what is read again has other neighbours in its pass, and Muon's iteration is in bfloat16
        torch.testing.assert_close(found[name], value, rtol=0 if kept else 1e-3, atol=0 if kept else 5e-5)


def test_an_unfinished_checkpoint_is_passed_by(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import conftest, backbones, training_runs
from pathlib import Path
from modeling_aim.training import *
model = backbones.plugin("llava").model
data = Mixture([training_runs.Things()], [1.0], ShotLaw(3))
arguments = training_runs.arguments(Path(sys.argv[2]), per_device_train_batch_size=int(sys.argv[3]), max_steps=3)
run = AimTrainer(model, arguments, train_dataset=data)
run.train()
if run.args.process_index == 0:
    weights = {name: value.tolist() for name, value in model.projector.state_dict().items()}
    print(json.dumps({"processes": run.args.world_size, "losses": training_runs.losses(run), "weights": weights}))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_of_the_doubled_batch(tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    here, out = str(Path(__file__).parent), str(tmp_path / "out")
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for command in ([*many, str(script), here, out, "2"], [sys.executable, str(script), here, out, "4"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1]))
    two, one = found
    assert (two["processes"], one["processes"]) == (2, 1)
    torch.testing.assert_close(torch.tensor(two["losses"]), torch.tensor(one["losses"]), rtol=1e-4, atol=1e-4)
    for name, value in one["weights"].items():
        torch.testing.assert_close(torch.tensor(two["weights"][name]), torch.tensor(value), rtol=1e-3, atol=1e-5)


# --- reads are kept


def test_what_was_read_is_not_read_again_in_this_run_or_the_next(tmp_path: Path) -> None:
    read: list[int] = []

    def run(folder: Path) -> list[float]:
        model = backbones.plugin("llava").model
        states = model.read_states
        model.read_states = lambda demos, *more: (read.append(len(demos)), states(demos, *more))[1]  # type: ignore
        kept = KeptStates(2**20, tmp_path / "states", reader={"backbone": "tiny"})
        done = trainer(model, folder, {"kept_states": kept}, max_steps=6)
        done.train()
        return losses(done)

    first = run(tmp_path / "one")
    assert 0 < sum(read) <= 30  # as many as there are pairs
    read.clear()
    assert run(tmp_path / "two") == pytest.approx(first, rel=1e-4)
    assert sum(read) == 0


def test_kept_states_are_bounded_and_damaged_ones_are_read_again(tmp_path: Path) -> None:
    kept = KeptStates(1000, tmp_path, max_disk_bytes=4000, reader={"a": 1})
    values = {str(i): torch.full((10, 10), float(i)) for i in range(12)}
    for name, value in values.items():
        kept.put((name, "now"), value, 400)
        assert kept.nbytes <= 1000
    files = list(tmp_path.glob("*/*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in files) <= 4000
    again = KeptStates(1000, tmp_path, max_disk_bytes=4000, reader={"a": 1})
    found = {name: again.get((name, "later")) for name in values}
    assert sum(value is not None for value in found.values()) == len(files)
    assert all(value is None or torch.equal(value, values[name]) for name, value in found.items())
    assert all(KeptStates(0, tmp_path, reader={"a": 2}).get((name, "")) is None for name in values)
    for path in files:
        path.write_bytes(path.read_bytes()[:50])
    assert all(KeptStates(0, tmp_path, reader={"a": 1}).get((name, "")) is None for name in values)


# --- the command, and what it refuses


@pytest.mark.draws
def test_a_run_leaves_a_repository_that_answers(settings: TrainSettings, tmp_path: Path) -> None:
    held = data_on_disk(tmp_path / "held", 6)
    train(replace(settings, eval_data=(held,), eval_episodes=3))
    output = Path(settings.output)
    card = (output / "README.md").read_text()
    kind, _, path = settings.data[0].partition(":")
    assert "## Training" in card and f"{kind}:{Path(path).name}" in card and "Held-out targets" in card
    assert str(Path(path).parent) not in card  # folders of this machine
    history = json.loads(next(output.glob("checkpoint-*/trainer_state.json")).read_text())["log_history"]
    assert next(row["step"] for row in history if "eval_loss" in row) == 0 and "eval_accuracy" in str(history)
    assert (output / "training.png").stat().st_size > 1000 and "training.png" in card
    pipe = pipeline("image-text-to-text", model=settings.output, trust_remote_code=True)
    demos = [{"image": picture(0), "label": "dax"}]
    found = pipe(images=picture(1), text="<image> What is it?", demos=demos, max_new_tokens=3)
    assert isinstance(found[0]["generated_text"], str)


@pytest.mark.draws
def test_a_run_pushes_what_it_leaves(settings: TrainSettings, hub: HubServer, monkeypatch: Any) -> None:
    """Backbone from the Hub, projector to the Hub: what is there loads by its id and answers, with its card."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.add_repo("user/backbone", settings.backbone)
    train(replace(settings, backbone="user/backbone", push_to_hub="user/trained"))
    files = hub.files("user/trained")
    assert {"aim_projector.safetensors", "training.png", "aim_training.json", "modeling_aim.py"} <= set(files)
    assert "## Training" in files["README.md"].decode()
    assert not any(name.startswith("checkpoint") or name == "model.safetensors" for name in files)
    pipe = pipeline("image-text-to-text", model="user/trained", trust_remote_code=True)
    demos = [{"image": picture(0), "label": "dax"}]
    found = pipe(images=picture(1), text="<image> What is it?", demos=demos, max_new_tokens=3)
    assert isinstance(found[0]["generated_text"], str)


def test_web_pages_train_through_the_command(settings: TrainSettings, tmp_path: Path) -> None:
    """A shard of MMC4 and one of OBELICS, as published, half and half."""
    for i in range(6):
        picture(i).save(tmp_path / f"{i}.png")
    words = [f"Here is a small {word}." for word in WORDS]
    matched = [{"image_name": f"{i}.png", "matched_text_index": i, "matched_sim": 0.3} for i in range(6)]
    mmc4 = tmp_path / "docs_shard_0_v2.jsonl"
    mmc4.write_text("\n".join([json.dumps({"text_list": words, "image_info": matched}), "{broken", "{}"]))
    images = [str(tmp_path / f"{i // 2}.png") if i % 2 == 0 else None for i in range(8)]
    rows = {"images": [images], "texts": [[None if image else words[i] for i, image in enumerate(images)]]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "obelics.parquet")
    command = ["train", "--backbone", settings.backbone, "--output", settings.output, "--steps", "4", "--shots", "3"]
    command += ["--data", f"mmc4:{mmc4},images={tmp_path}", "--data", f"obelics:{tmp_path}/obelics.parquet,weight=2"]
    command += ["--batch-size", "2", "--dtype", "float32", "--set", "use_cpu=true"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "trained for 4 steps" in " ".join(done.output.split())
    card = (Path(settings.output) / "README.md").read_text()
    assert "mmc4:" in card and "obelics:" in card and "line that is" in card
    answered = pipeline("image-text-to-text", model=settings.output, trust_remote_code=True)(
        images=picture(9), text="<image> What is it?", demos=[{"image": picture(0), "label": "dax"}], max_new_tokens=3
    )
    assert isinstance(answered[0]["generated_text"], str)


def test_another_run_in_the_folder_is_left_alone(settings: TrainSettings, listing: Any) -> None:
    output = Path(settings.output)
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    before = listing(output)
    with pytest.raises(ValueError, match=r"holds thesis\.txt and more, but no run"):
        train(settings)
    assert listing(output) == before
    (output / "thesis.txt").unlink()
    train(replace(settings, steps=2))
    before = listing(output)
    with pytest.raises(ValueError, match=r"holds another run: steps was 2, is 6"):
        train(settings)
    with pytest.raises(ValueError, match=r"is finished"):
        train(replace(settings, steps=2))
    assert listing(output) == before
    train(replace(settings, steps=1, overwrite=True))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_checkpoint(settings: TrainSettings) -> None:
    settings = replace(settings, learning_rate=1e30, optimizer="adamw", projector_form="linear_norm", save_every=1)
    with pytest.raises(NotFinite, match=r"The loss of step \d+ is (nan|inf).*small"):
        train(replace(settings, arguments={**settings.arguments, "max_grad_norm": 0}))
    last = last_checkpoint(Path(settings.output))
    assert last is not None
    assert all(torch.isfinite(value).all() for value in load_file(f"{last}/{PROJECTOR_WEIGHTS}").values())


def test_a_projector_is_trained_further_in_its_own_form(settings: TrainSettings, tmp_path: Path) -> None:
    """Two layers are read, as the repository says; nothing of the new run's defaults replaces that."""
    train(replace(settings, read_layers=(1, 3), projector_form="linear"))
    before = load_file(Path(settings.output) / PROJECTOR_WEIGHTS)
    further = replace(settings, backbone=settings.output, output=str(tmp_path / "further"))
    with pytest.raises(ValueError, match=r"AIM repository.*projector_form='mlp' \(it has 'linear'\)"):
        train(replace(further, projector_form="mlp"))
    assert not any((tmp_path / "further").glob("*"))
    config: Any = train(further).model.config  # type: ignore[union-attr]
    assert (config.projector_form, config.read_layers) == ("linear", [1, 3])
    after = load_file(tmp_path / "further" / PROJECTOR_WEIGHTS)
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_of_another_backbone_is_refused(settings: TrainSettings, tmp_path: Path) -> None:
    other = backbones.build("llava", seed=5)
    other.model.save_pretrained(tmp_path / "other")
    other.processor.save_pretrained(tmp_path / "other")
    train(settings)
    model = AimForConditionalGeneration.from_backbone(str(tmp_path / "other"))
    last = last_checkpoint(Path(settings.output))
    with pytest.raises(ValueError, match="backbone"):
        trainer(model, tmp_path / "out").train(resume_from_checkpoint=last)


def test_settings_that_cannot_work_are_named(settings: TrainSettings) -> None:
    for change, message in (
        ({"dtype": "int3"}, r"dtype='int3' is unknown"),
        ({"shots": 0}, r"shots=0"),
        ({"shot_law": "often"}, r"shot law 'often' is unknown"),
        ({"data": ()}, r"nothing to train on"),
        ({"data": ("pairs:/nowhere/at/all.jsonl",)}, r"/nowhere/at/all\.jsonl"),
        ({"arguments": {"lerning_rate": 1}}, r"has no \['lerning_rate'\]"),
        ({"teacher": "loud"}, r"teacher='loud' is unknown"),
        ({"prompts": "loud"}, r"prompts='loud' is unknown"),
        ({"optimizer": "sgd"}, r"optimizer='sgd' is unknown"),
        ({"distillation": 2.0}, r"distillation=2\.0"),
        ({"push_to_hub": "me/mine"}, r"local folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(replace(settings, **change))
    with pytest.raises(OSError, match="no/backbone"):
        train(replace(settings, backbone="/no/backbone"))
    assert not Path(settings.output).exists()


# --- what is held out


def test_a_share_of_the_documents_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    spec = data_on_disk(tmp_path, 60)
    train_part, held = Mixture([open_source(spec)[0]], [1.0], ShotLaw(2)).split(0.25)
    images = []
    for part in (train_part, held):
        drawn = itertools.islice(part, 60)
        images.append({pair.images[0].tobytes() for episode in drawn for pair in episode.opened().pairs})
    assert images[0] and images[1] and not images[0] & images[1]
    assert 5 <= len(images[1]) <= 25


def test_a_run_that_never_gets_above_the_untrained_start_keeps_that(
    settings: TrainSettings,
) -> None:
    data = (data_on_disk(Path(settings.output).parent / "more", 60),)
    run = train(replace(settings, data=data, held_out=0.25, eval_episodes=8, learning_rate=0.0, steps=4))
    assert sorted(run.held_out("eval_loss")) == [0, 2, 4] and not run.improved
    weights = load_file(Path(settings.output) / "aim_projector.safetensors")
    assert not any(weights[name].any() for name in weights if name.startswith("projector.layers.2"))
    assert "never got above step 0" in (Path(settings.output) / "README.md").read_text()


def test_the_best_checkpoint_on_held_out_data_is_kept(settings: TrainSettings) -> None:
    data = (data_on_disk(Path(settings.output).parent / "more", 60),)
    run = train(replace(settings, data=data, held_out=0.25, eval_episodes=8, steps=8))
    scores = run.held_out("eval_score")
    assert sorted(scores) == [0, 2, 4, 6, 8] and run.improved
    best = max(scores, key=scores.__getitem__)
    kept = load_file(Path(settings.output) / "aim_projector.safetensors")
    at_best = load_file(Path(settings.output) / f"checkpoint-{best}" / "aim_projector.safetensors")
    assert all(torch.equal(kept[name], at_best[name]) for name in kept)


def test_identity_has_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no weights to train.*preset='trained'"):
        trainer(backbones.plugin("llava", preset="untrained").model, tmp_path)


def test_an_untrained_repository_is_trained_at_its_depth(settings: TrainSettings, tmp_path: Path) -> None:
    untrained = AimForConditionalGeneration.from_backbone(settings.backbone, read_layers=[2])
    untrained.save_pretrained(tmp_path / "untrained")
    run = train(replace(settings, backbone=str(tmp_path / "untrained"), steps=2))
    config: Any = run.model.config  # type: ignore[union-attr]
    assert (config.projector_form, config.read_layers) == ("residual_mlp", [0, 2])
