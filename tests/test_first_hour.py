"""The first hour of a user, on SmolVLM-256M's config with small layers and a Hub of its own.

Check, tune, train, an interruption, resume, evaluation, publishing; then, as somebody else without this package: load
by id and revision, a pipeline, 4-bit.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from backbones import picture, run_without_package
from hub_server import HubServer
from killed_commands import killed_command
from small_real import small_backbone
from typer.testing import CliRunner

from modeling_aim.cli import app

STEPS = 30
SAVE_EVERY = 3
SOMEBODY_ELSE = """
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, pipeline

repo, revision = given["repo"], given["revision"]
demos = [{"image": given["image"], "label": label} for label in ("dax", "wug")]
options = dict(max_new_tokens=4, do_sample=False)

def answer(model, processor):
    inputs = processor(images=given["image"], text=processor.prompt("What is this?"), return_tensors="pt")
    ids = model.generate(**inputs.to(model.device, model.dtype), demos=demos, **options)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

found = {}
for name, place in {"id": {}, "revision": {"revision": revision}}.items():
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, **place)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True, **place)
    found[name] = answer(model, processor)
four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
small = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, quantization_config=four_bit)
found["4-bit"] = answer(small, processor)
found["quantized"] = sorted({type(one).__name__ for one in small.backbone.modules() if "4bit" in str(type(one))})
pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
said = pipe(
    images=given["image"], text=pipe.processor.prompt("What is this?"), demos=demos, return_full_text=False, **options
)
found["pipeline"] = said[0]["generated_text"]
found["code"] = type(model).__module__.split(".")[0]
print()
print(json.dumps(found))
"""


def aim(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, f"aim {' '.join(map(str, arguments))}\n{done.output}"
    return done.output


def interrupt(command: list[str], hub: HubServer) -> None:
    """Begin a run in a process of its own and press Ctrl-C after its first checkpoint."""
    environment = {**hub.env(), "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    interrupted = killed_command("step", SAVE_EVERY + 2, signal.SIGINT, command, environment)
    output = interrupted.stdout + interrupted.stderr
    assert interrupted.returncode == 130, output
    assert "stopped" in output and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_hour(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)
    backbone = small_backbone("SmolVLM-256M", tmp_path / "backbone")
    hub.add_repo(backbone, tmp_path / "backbone")
    for number in range(8):
        picture(number, (50, 40)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{number}.png", "label": ("dax", "wug")[number % 2]} for number in range(8)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"image": row["image"], "question": "What is this?", "answer": row["label"]} for row in rows]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))

    aim("check", backbone)  # ends with an error where a property does not hold
    assert "tuned" in aim("tune", "--backbone", backbone, "--demos", "demos.jsonl", "--output", "tuned")
    command = [
        "train", "--backbone", "tuned", "--data", f"pairs:{tmp_path / 'demos.jsonl'}", "--output", "trained",
        "--steps", str(STEPS), "--batch-size", "1", "--shots", "2", "--save-every", str(SAVE_EVERY),
        "--eval-episodes", "2",
    ]  # fmt: skip
    interrupt(command, hub)
    assert not json.loads((tmp_path / "trained" / "aim_training.json").read_text())["finished"]
    reached = max(int(folder.name.rpartition("-")[2]) for folder in (tmp_path / "trained").glob("checkpoint-*"))
    assert SAVE_EVERY <= reached < STEPS
    assert f"trained for {STEPS} steps" in aim(*command)  # the same command
    with pytest.raises(AssertionError, match="is finished"):
        aim(*command)

    task = f"jsonl:{tmp_path / 'questions.jsonl'},match=exact"
    aim("eval", "--repo", "trained", "--tasks", task, "--shots", "0,2", "--seeds", "1", "--output", "evaluated")
    aim("eval", "card", "evaluated", "trained")
    first = aim("publish", "trained", "user/first-hour")
    sha = hub.repos["user/first-hour"].branches["main"]
    assert sha in first and "checkpoint" in first
    files = hub.files("user/first-hour")
    assert b"## Few-shot evaluation" in files["README.md"]
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt", ".pth"))]
    hub.commit("user/first-hour", {"README.md": "another card"})  # the first one stays by its revision

    given = {"repo": "user/first-hour", "revision": sha, "image": str(tmp_path / "0.png")}
    found = run_without_package(SOMEBODY_ELSE, given, hub.env())
    assert found["id"] == found["revision"] == found["pipeline"] and found["4-bit"]
    assert found["code"] == "transformers_modules" and found["quantized"] == ["Linear4bit"]
