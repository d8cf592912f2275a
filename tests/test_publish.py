"""`aim publish`: what a run left, as others get it: nothing pickled, no local path, loaded from an empty cache."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from backbones import DEMOS, build, picture
from hub_server import HubServer
from training_runs import data_on_disk
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from modeling_aim import AimForConditionalGeneration
from modeling_aim.cli import app
from modeling_aim.publishing import base_names, without_paths
from modeling_aim.training.run import train
from modeling_aim.training.settings import TrainSettings


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a local backbone, with its checkpoints, in a folder that has a name of its own."""
    root = tmp_path_factory.mktemp("home of somebody")
    settings = TrainSettings(
        backbone=build("llava").save(root / "backbone"),
        data=(f"{data_on_disk(root / 'data')},images={root / 'data'}",),
        output=str(root / "run"),
        dtype="float32",
        steps=2,
        batch_size=2,
        shots=1,
        held_out=0,
        save_every=1,
        arguments={"use_cpu": True},
    )
    train(settings)
    (root / "run" / "notes.txt").write_text("mine")
    torch.save({"x": torch.zeros(1)}, root / "run" / "old.bin")
    return root


@pytest.fixture
def signed_in(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


def publish(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["publish", *map(str, arguments)], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_is_published_without_checkpoints_pickles_and_paths(signed_in: HubServer, trained: Path) -> None:
    hub = signed_in
    hub.add_repo("stock/llava", trained / "backbone")
    assert list((trained / "run").glob("checkpoint-*"))  # there is something to leave out
    output = publish(trained / "run", "user/plugin", "--backbone", "stock/llava")
    assert "checkpoint-2" in output and "old.bin" in output and "notes.txt" in output
    files = hub.files("user/plugin")
    assert {"config.json", "README.md", "aim_projector.safetensors", "modeling_aim.py", "tokenizer.json"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".txt")) or "checkpoint" in name]
    for name, content in files.items():
        if not name.endswith((".safetensors", ".png")):
            assert str(trained).encode() not in content and b"home of somebody" not in content, name
    card, record = files["README.md"].decode(), json.loads(files["aim_training.json"])
    assert record["settings"]["data"] == ["pairs:pairs.jsonl,images=data"]
    assert "`pairs:pairs.jsonl,images=data`" in card and "base_model: stock/llava" in card
    assert 'from_pretrained("user/plugin"' in card and "this/repository" not in card
    assert "mine" in (trained / "run" / "notes.txt").read_text()  # the folder itself stays as it was
    assert str(trained) in (trained / "run" / "aim_training.json").read_text()
    mine = AimForConditionalGeneration.from_pretrained(trained / "run")
    theirs = AutoModelForImageTextToText.from_pretrained("user/plugin", trust_remote_code=True)
    query = mine.processor(images=picture(9), text=mine.processor.prompt("What is this?"), return_tensors="pt")
    for options in ({"demos": DEMOS}, {}):
        answers = [m.generate(**query, max_new_tokens=4, do_sample=False, **options) for m in (mine, theirs)]
        assert torch.equal(*answers)


def test_a_repository_with_its_backbone(signed_in: HubServer, trained: Path, tmp_path: Path) -> None:
    publish(trained / "run", "user/whole", "--include-backbone", "--no-check")
    files = signed_in.files("user/whole")
    assert "backbone/model.safetensors" in files and not any(b"home of somebody" in one for one in files.values())
    config = json.loads(files["config.json"])
    assert config["backbone_name_or_path"] is None and "in the folder `backbone`" in files["README.md"].decode()
    for name, content in files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    publish(tmp_path / "copy", "user/again", "--revision", "second", "--no-check")  # its own backbone goes along
    assert set(signed_in.files("user/again", "second")) == set(files)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("run", "user/x"), r"backbone is the local folder .*--backbone owner/name.*--include-backbone"),
        (("run", "user/x", "--backbone", "a/b", "--include-backbone"), "not both"),
        (("data", "user/x"), r"data holds no config\.json; give the folder of an AIM repository"),
        (("backbone", "user/x"), "backbone holds a llava; give the folder"),
        (("half", "user/x"), "The run in .*half is not finished. Give the command that began it again"),
        (
            ("run", "user/x", "--backbone", "stock/other"),
            r"empty cache, the repository fails: .*Nothing was published",
        ),
        (("run", "user/x", "--dtype", "int4"), "--dtype 'int4': expected one of"),
    ],
)
def test_what_cannot_be_published_is_said(
    signed_in: HubServer, trained: Path, arguments: tuple[str, ...], match: str
) -> None:
    if "stock/other" in arguments:
        built = build("llava", seed=5)
        built.model.save_pretrained(signed_in.home / "other")
        signed_in.add_repo("stock/other", signed_in.home / "other")
    if arguments[0] == "half" and not (trained / "half").exists():
        shutil.copytree(trained / "run", trained / "half")
        record = json.loads((trained / "run" / "aim_training.json").read_text())
        (trained / "half" / "aim_training.json").write_text(json.dumps({**record, "finished": False}))
    done = CliRunner().invoke(app, ["publish", str(trained / arguments[0]), *arguments[1:]], env={"COLUMNS": "300"})
    assert done.exit_code == 1 and re.search(match, " ".join(done.output.split())), done.output
    assert "user/x" not in signed_in.repos


def test_nobody_is_logged_in(hub: HubServer, trained: Path) -> None:
    for token in ("", "hf_wrong"):
        done = CliRunner().invoke(
            app, ["publish", str(trained / "run"), "user/x", "--backbone", "a/b"], env={"HF_TOKEN": token}
        )
        assert done.exit_code == 1 and "Log in: hf auth login" in " ".join(done.output.split()), done.output
    assert "user/x" not in hub.repos


def test_training_pushes_the_same_files(signed_in: HubServer, trained: Path, tmp_path: Path) -> None:
    signed_in.add_repo("stock/llava", trained / "backbone")
    settings = TrainSettings(
        backbone="stock/llava", data=(f"pairs:{trained / 'data' / 'pairs.jsonl'}",), output=str(tmp_path / "run"),
        dtype="float32", steps=1, batch_size=1, shots=1, held_out=0, arguments={"use_cpu": True},
        push_to_hub="user/pushed",
    )  # fmt: skip
    train(replace(settings))
    files = signed_in.files("user/pushed")
    assert b"pairs:pairs.jsonl" in files["README.md"] and not any(
        str(trained).encode() in one for one in files.values()
    )
    assert not [name for name in files if "checkpoint" in name or name.endswith(".bin")]


@pytest.mark.parametrize(
    ("given", "published"),
    [
        ("mmc4:/data/docs_*_v2.jsonl.zip,images=/data/x,weight=2", "mmc4:docs_*_v2.jsonl.zip,images=x,weight=2"),
        ("pairs:data/train.jsonl", "pairs:train.jsonl"),
        ("obelics:HuggingFaceM4/OBELICS,download=true", "obelics:HuggingFaceM4/OBELICS,download=true"),
        ("/models/my llava", "my llava"),
        ("~/models/llava/", "llava"),
        (r"C:\models\llava", "llava"),
        ("okvqa", "okvqa"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
    ],
)  # fmt: skip
def test_base_names(given: str, published: str) -> None:
    assert base_names(given) == published


def test_paths_in_a_text() -> None:
    text = (
        "Read /home/me/x.jsonl and `pairs:/data/y.json`, see https://a.org/b/c, [d](docs/e.md), </s>, 1/2 and/or ~/z."
    )
    assert without_paths(text) == (
        "Read x.jsonl and `pairs:y.json`, see https://a.org/b/c, [d](docs/e.md), </s>, 1/2 and/or z."
    )
