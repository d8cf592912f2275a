"""Long runs that meet bad rows, damaged files and each other."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from backbones import picture
from eval_tasks import Naming, Pictures, predictions
from eval_tasks import settings as eval_settings
from forked import run_python
from safetensors.torch import load_file, save_file
from test_bad_input import fails
from training_runs import WORDS, data_on_disk, saved_backbone, settings, trainer  # noqa: F401

from modeling_aim import Demonstration
from modeling_aim.evaluation import Example, Shot, evaluate
from modeling_aim.evaluation.compare import compare_runs
from modeling_aim.evaluation.tasks.registry import TASKS
from modeling_aim.files_aim import only_one
from modeling_aim.training import Episode, EpisodeCollator, KeptStates, Mixture, ShotLaw, Source, TrainSettings, train
from modeling_aim.training.checkpoints import why_damaged
from modeling_aim.training.episodes import Opener
from modeling_aim.training.run import RUN_FILE, last_checkpoint

pytestmark = pytest.mark.usefixtures("without_pictures")

PLACEHOLDERS = {"llava": "<image>", "qwen2_5_vl": "<|image_pad|>", "idefics3": "<image>", "idefics": "<image>"}


# --- bad rows of training data


class Rows(Source):
    """Pictures with words; every `every`-th row has `bad` words instead."""

    name = "rows"

    def __init__(self, bad: Sequence[dict[str, Any]], every: int = 5, count: int = 40) -> None:
        self.bad, self.every, self.count = bad, every, count

    def documents(self, seed: int) -> Iterator[Sequence[Any]]:
        for i in range(self.count):
            row = {"image": picture(i % 8), "text": f"a small {WORDS[i % len(WORDS)]}"}
            yield [{**row, **self.bad[i % len(self.bad)]} if i % self.every == 2 else row]


def bad_rows(family: str) -> list[dict[str, Any]]:
    token = PLACEHOLDERS[family]
    asked = {"question": f"What is {token}?", "answer": "it", "text": None}
    return [{"text": f"a {token} of a cat"}, {"text": "a \ud800 cat"}, asked, {"text": f"two {token}{token}"}]


@pytest.mark.parametrize("family", PLACEHOLDERS)
def test_a_row_that_no_model_can_read_is_counted_named_and_skipped(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = backbones.plugin(family, preset="trained").model
    data = Mixture([Rows(bad_rows(family))], [1.0], ShotLaw(1, "fixed"))
    run = trainer(model, tmp_path, per_device_train_batch_size=1, max_steps=14)
    run.train_dataset.episodes = data  # type: ignore[union-attr]
    run.train()
    assert run.state.global_step == 14
    assert run.skipped["text that is no Unicode"] > 0
    assert run.skipped[f"text that holds the placeholder {PLACEHOLDERS[family]}"] > 1


@pytest.mark.parametrize("family", PLACEHOLDERS)
def test_a_bad_row_in_a_batch_of_ones_own_episodes_is_skipped(family: str) -> None:
    model = backbones.plugin(family, preset="trained").model
    token = PLACEHOLDERS[family]
    words = ["a cat here", f"a {token} here", "a dog here", "a bird here"]
    pairs = tuple(Demonstration.of((picture(i), text)) for i, text in enumerate(words))
    batch = EpisodeCollator(model)([Episode(pairs, (1, 2, 3))])
    assert batch["skipped"] == {f"text that holds the placeholder {token}": 1}
    assert [[demo.text for demo in demos] for demos in batch["demos"]] == [words[:1], [words[0], words[2]]]
    model(**{name: value for name, value in batch.items() if name not in ("sources", "skipped")}).loss.backward()
    fails(lambda: model.read([pairs[1]]), "placeholder", "cannot be read")


def test_data_that_is_bad_throughout_ends_the_run() -> None:
    data = Mixture([Rows(bad_rows("llava"), every=3, count=2000)], [1.0], ShotLaw(2))
    opener = Opener(backbones.plugin("llava").model.processor.why_unreadable)

    def read() -> None:
        for number, episode in enumerate(data):
            opener(episode)
            assert number < 2000, "no end"

    fails(read, "pairs of rows cannot be read", "Fix the data")


def test_a_run_resumes_behind_a_bad_row(settings: TrainSettings, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "data"
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    for place, text in ((3, "a <image> of a cat"), (7, "a \\ud83d cat")):
        lines[place] = f'{{"image": "{place}.png", "text": "{text}"}}'
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    run = train(replace(settings, steps=8))
    assert run.state.global_step == 8
    assert {"text that is no Unicode", "text that holds the placeholder <image>"} <= set(run.skipped)


# --- checkpoints


@pytest.fixture
def interrupted(settings: TrainSettings) -> TrainSettings:  # noqa: F811
    """A run that has checkpoints 4 and 6, and is not finished."""
    train(settings)
    record = Path(settings.output) / RUN_FILE
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    return replace(settings, steps=6)


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def damage(folder: Path, kind: str, trap: Path) -> None:
    weights, optimizer = folder / "aim_projector.safetensors", folder / "optimizer.pt"
    if kind == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif kind == "a bit of the weights":
        data = bytearray(weights.read_bytes())
        data[-9] ^= 4
        weights.write_bytes(data)
    elif kind == "a bit of the optimizer":
        data = bytearray(optimizer.read_bytes())
        data[len(data) // 2] ^= 4
        optimizer.write_bytes(data)
    elif kind == "optimizer cut short":
        optimizer.write_bytes(optimizer.read_bytes()[:-500])
    elif kind == "malicious optimizer":
        torch.save({"state": {}, "param_groups": Evil(str(trap))}, optimizer)
    elif kind == "optimizer of another kind":
        optimizer.write_bytes(b"not a zip")
    elif kind == "configuration":
        (folder / "config.json").write_text('{"model_type": ')
    elif kind == "random state":
        next(folder.glob("rng_state*.pth")).write_bytes(b"PK\x03\x04" + b"\0" * 100)


KINDS = (
    "weights cut short", "a bit of the weights", "a bit of the optimizer", "optimizer cut short",
    "malicious optimizer", "optimizer of another kind", "configuration", "random state",
)  # fmt: skip


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    interrupted: TrainSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, output, trap = tmp_path / "whole", Path(interrupted.output), tmp_path / "trap"
    shutil.copytree(output, whole)
    assert last_checkpoint(output) == str(output / "checkpoint-6")
    for kind in KINDS:
        shutil.rmtree(output)
        shutil.copytree(whole, output)
        damage(output / "checkpoint-6", kind, trap)
        assert why_damaged(output / "checkpoint-6"), kind
        assert last_checkpoint(output) == str(output / "checkpoint-4"), kind
        damage(output / "checkpoint-4", kind, trap)
        fails(lambda: train(interrupted), "No checkpoint", "checkpoint-6", "checkpoint-4", "--overwrite")
        assert (output / "checkpoint-6").exists() and not trap.exists(), kind
    shutil.rmtree(output)
    shutil.copytree(whole, output)
    damage(output / "checkpoint-6", "malicious optimizer", trap)
    train(interrupted)
    for name, value in load_file(whole / "aim_projector.safetensors").items():
        torch.testing.assert_close(load_file(output / "aim_projector.safetensors")[name], value, rtol=1e-3, atol=1e-4)
    assert not trap.exists()


def test_a_damaged_record_of_a_run_is_named(interrupted: TrainSettings) -> None:
    record = Path(interrupted.output) / RUN_FILE
    whole = record.read_text()
    for text in (whole[:40], "[]", '{"settings": 3, "finished": false}', '{"finished": true}', "\x00", "[" * 100_000):
        record.write_text(text)
        fails(lambda: train(interrupted), RUN_FILE, "not JSON|not a record", "--overwrite")


def test_two_runs_in_one_folder_are_one(interrupted: TrainSettings) -> None:
    with only_one(interrupted.output, "aim train"):
        fails(lambda: train(interrupted), "Another `aim train`", interrupted.output, "another folder")
        fails(lambda: train(replace(interrupted, overwrite=True)), "Another `aim train`")
    train(interrupted)


def test_states_of_another_shape_are_read_again(tmp_path: Path) -> None:
    states = KeptStates(0, tmp_path, reader={}, width=8)
    wanted = torch.randn(3, 8)
    states.put(("key", None), wanted, wanted.numel() * 4)
    file = next(tmp_path.rglob("*.safetensors"))
    assert torch.equal(states.get(("key", None)), wanted)
    nan = wanted.clone()
    nan[1, 1] = float("nan")
    for wrong in (wanted[:, :4], wanted[0], wanted[None], wanted.to(torch.int32), wanted[:0], nan):
        save_file({"states": wrong.contiguous()}, file)
        assert KeptStates(0, tmp_path, reader={}, width=8).get(("key", None)) is None
        assert not file.exists()


# --- evaluation


class Broken(Pictures):
    """An example with an image that is cut short behind a good header, and one with a placeholder in its question."""

    name = "broken"

    def __init__(self, path: str = "", *, folder: str) -> None:
        super().__init__(count=12, pool=16)
        place = Path(folder)
        picture(3, (300, 300)).save(place / "half.png")
        (place / "half.png").write_bytes((place / "half.png").read_bytes()[:9000])
        self.bad = str(place / "half.png")

    def examples(self, seed: int) -> Sequence[Example]:
        found = list(super().examples(seed))
        found[1] = replace(found[1], images=(self.bad,))
        found[2] = replace(found[2], question="What is <image>?")
        return found

    def pool(self) -> Sequence[Shot]:
        """One demonstration is cut short too."""
        found = super().pool()
        return [Shot(found[0].id, {**found[0].pair, "image": self.bad}, found[0].label), *found[1:]]


def test_a_bad_example_is_left_out_of_all_methods(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TASKS, "broken", Broken)
    given = eval_settings(tmp_path, tasks=(f"broken:,folder={tmp_path}",), shots=(0, 4), seeds=1)
    results = evaluate(given)
    chosen = map(json.loads, (tmp_path / "run/demonstrations/broken.jsonl").read_text().splitlines())
    shown = {row["example"] for row in chosen if "p0" in row["demonstrations"]}
    bad = {"q1", "q2"} | shown
    assert shown - {"q1", "q2"}, "nobody is shown the bad demonstration"
    told = next(note for note in results["notes"] if "left out" in note)
    assert told.startswith(f"broken: {len(bad)} examples are left out of all methods")
    asked: dict[Any, set[str]] = {}
    for row in predictions(tmp_path / "run"):
        asked.setdefault((row["method"], row["shots"]), set()).add(row["example"])
    assert len(asked) > 2 and set(map(frozenset, asked.values())) == {frozenset({f"q{i}" for i in range(12)} - bad)}


def test_two_evaluations_in_one_folder_are_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TASKS, "naming", Naming)
    given = eval_settings(tmp_path, tasks=("naming:,count=2",), shots=(0,), seeds=1)
    with only_one(tmp_path / "run", "aim eval"):
        fails(lambda: evaluate(given), "Another `aim eval`", "another folder")
    evaluate(given)
    (tmp_path / "run" / "aim_eval.json").write_text('{"settings": ')
    fails(lambda: evaluate(given), "aim_eval.json", "not JSON", "--overwrite")


def test_the_lock_of_a_killed_run_keeps_nobody_out(tmp_path: Path) -> None:
    script = "import sys, os\nfrom modeling_aim.files_aim import only_one\nwith only_one(sys.argv[1], 'aim train'):\n"
    script += "    open(sys.argv[1] + '/begun', 'w').close()\n    os.kill(os.getpid(), 9)\n"
    done = run_python(["-c", script, str(tmp_path / "run")])
    assert done.returncode == -9 and (tmp_path / "run/begun").exists()
    with only_one(tmp_path / "run", "aim train"):
        pass


def test_a_damaged_run_to_compare_is_named(tmp_path: Path) -> None:
    for results, rows, said in (
        ('{"tasks"', "{}", "results.json is not JSON"),
        ("[]", "{}", "not a result of `aim eval`"),
    ):
        (tmp_path / "results.json").write_text(results)
        (tmp_path / "predictions.jsonl").write_text(rows)
        fails(lambda: compare_runs(tmp_path, tmp_path, ("full", "aim")), said)
    (tmp_path / "results.json").write_text('{"tasks": [], "cells": [], "settings": {"seeds": 1}}')
    (tmp_path / "predictions.jsonl").write_text('{"a": ')
    fails(lambda: compare_runs(tmp_path, tmp_path, ("full", "aim")), "predictions.jsonl, line 1")


def test_json_that_cannot_be_read_names_file_and_line(tmp_path: Path) -> None:
    from modeling_aim.data.demonstrations import read_demonstrations

    path = tmp_path / "demos.jsonl"
    good = json.dumps({"text": "a dax"}).encode()
    for bad in (b"\x89PNG\r\n", b"[" * 100_000, b'{"text": "a \\ud800 dax"}', b'{"text": ', b"\xff\xfe{", b"3"):
        path.write_bytes(good + b"\n" + bad)
        fails(lambda: list(read_demonstrations(path)), "demos.jsonl, line 2", "object")
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n" + b'{"text": "\\ud83d\\ude00"}')
    assert [demo["text"] for demo in read_demonstrations(path)] == ["a dax", "\U0001f600"]
