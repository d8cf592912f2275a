"""Saving that is cut short, fails or meets others: no mixture that loads, and nothing of others' removed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import Plugin, plugin
from safetensors.torch import load_file, save_file
from test_bad_input import fails

from modeling_aim import AimForConditionalGeneration, files_aim
from modeling_aim.files_aim import only_one, staged_folder
from modeling_aim.projector_aim import DIGEST_KEY, PROJECTOR_WEIGHTS


@pytest.fixture
def trained() -> Plugin:
    return plugin("llava", preset="trained")


def changed(aim: Plugin) -> None:
    with torch.no_grad():
        for weight in aim.model.projector.parameters():
            weight.add_(0.01)


def load(folder: Path, aim: Plugin) -> Any:
    return AimForConditionalGeneration.from_pretrained(folder, backbone=aim.backbone)


def test_a_save_cut_short_after_any_file_is_refused_or_whole(trained: Plugin, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    trained.model.save_pretrained(folder)
    old = load_file(folder / PROJECTOR_WEIGHTS)
    moves = 0
    while True:
        shutil.rmtree(folder)
        trained.model.save_pretrained(folder)
        before = load_file(folder / PROJECTOR_WEIGHTS)
        changed(trained)
        replace, made = os.replace, 0

        def killed(source: Any, target: Any, replace: Any = replace, moves: int = moves) -> None:
            nonlocal made
            if made == moves:
                raise KeyboardInterrupt
            made += 1
            replace(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files_aim.os, "replace", killed)
            try:
                trained.model.save_pretrained(folder)
                break
            except KeyboardInterrupt:
                pass
        weights = load_file(folder / PROJECTOR_WEIGHTS)
        if all(torch.equal(weights[name], before[name]) for name in weights):
            load(folder, trained)
        else:
            fails(lambda: load(folder, trained), PROJECTOR_WEIGHTS, "not saved together", "Save the model again")
        assert not list(folder.glob(".saving-*"))
        moves += 1
    assert moves > 5 and set(old) == set(load_file(folder / PROJECTOR_WEIGHTS))
    load(folder, trained)


def test_weights_of_another_save_are_refused_and_old_folders_load(trained: Plugin, tmp_path: Path) -> None:
    for name in ("first", "second"):
        trained.model.save_pretrained(tmp_path / name)
        changed(trained)
    shutil.copy(tmp_path / "second" / PROJECTOR_WEIGHTS, tmp_path / "first")
    fails(lambda: load(tmp_path / "first", trained), "not saved together", DIGEST_KEY)
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    del config[DIGEST_KEY]
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    again = load(tmp_path / "first", trained)
    assert not hasattr(again.config, DIGEST_KEY)


def test_use_of_a_processor_does_not_change_its_file(tmp_path: Path) -> None:
    processor = plugin("llava").processor
    files = []
    for use in (lambda: None, lambda: processor.image_text):
        use()
        processor.save_pretrained(tmp_path)
        files.append((tmp_path / "processor_config.json").read_text())
    assert files[0] == files[1]


def test_what_is_saved_again_loads(trained: Plugin, tmp_path: Path) -> None:
    trained.model.save_pretrained(tmp_path)
    again = load(tmp_path, trained)
    with torch.no_grad():
        next(again.projector.parameters()).add_(0.5)
    again.save_pretrained(tmp_path)
    third = load(tmp_path, trained)
    for one, other in zip(third.projector.parameters(), again.projector.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(trained: Plugin, tmp_path: Path, bad: float) -> None:
    with torch.no_grad():
        next(iter(trained.model.projector.parameters())).view(-1)[7] = bad
    trained.model.save_pretrained(tmp_path)
    fails(lambda: load(tmp_path, trained), PROJECTOR_WEIGHTS, "not finite|not real or not finite")


def test_a_first_save_that_fails_removes_its_own_stage_alone(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with pytest.raises(RuntimeError), staged_folder(target) as stage:
        (stage / "mine").write_text("half")
        (target / "of somebody else").write_text("whole")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["of somebody else"]
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "other") as stage:
        (stage / "mine").write_text("half")
        raise RuntimeError
    assert not (tmp_path / "other").exists()


def test_only_one_works_in_a_folder(tmp_path: Path) -> None:
    with only_one(tmp_path / "run", "aim train"):
        fails(lambda: only_one(tmp_path / "run", "aim train").__enter__(), "aim train", "at work", "another folder")
    assert not (tmp_path / "run").exists()
    with only_one(tmp_path / "run", "aim train"):
        (tmp_path / "run" / "file").write_text("kept")
    assert (tmp_path / "run" / "file").exists()


@pytest.mark.parametrize("subfolder", ["../x", "a/../../x", "/etc", "..", "a\\..\\..\\x", "C:/x"])
def test_a_backbone_outside_of_its_repository_is_refused(trained: Plugin, tmp_path: Path, subfolder: str) -> None:
    folder = tmp_path / "repository"
    trained.model.save_pretrained(folder, include_backbone=True)
    shutil.copytree(folder / "backbone", tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "backbone_subfolder": subfolder}))
    fails(lambda: AimForConditionalGeneration.from_pretrained(folder), "leaves the repository", "backbone_subfolder")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/b/c", "some\nthing"])
def test_a_folder_that_is_not_there_is_named(name: str) -> None:
    from modeling_aim import AimProcessor

    for call in (
        AimForConditionalGeneration.from_pretrained, AimForConditionalGeneration.from_backbone,
        AimProcessor.from_pretrained,
    ):  # fmt: skip
        message = fails(lambda call=call: call(name), "does not exist", "Hub id", error=FileNotFoundError)
        assert "Repo id" not in message


def test_a_model_goes_through_pickle(trained: Plugin) -> None:
    import io

    file = io.BytesIO()
    torch.save(trained.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    inputs, demos = trained.query(), [([], "a dax")]
    assert torch.equal(
        again.generate(**inputs, demos=demos, max_new_tokens=4, do_sample=False),
        trained.model.generate(**inputs, demos=demos, max_new_tokens=4, do_sample=False),
    )


def test_weights_are_bound_whatever_their_tensors(trained: Plugin, tmp_path: Path) -> None:
    """A projector with one number changed is not the one that was saved."""
    trained.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / PROJECTOR_WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    metadata = files_aim.safetensors_metadata(str(tmp_path / PROJECTOR_WEIGHTS))
    save_file(tensors, tmp_path / PROJECTOR_WEIGHTS, metadata=metadata)
    fails(lambda: load(tmp_path, trained), "not saved together")
