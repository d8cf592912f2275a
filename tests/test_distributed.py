"""A backbone whose weights are spread over processes, as FSDP does it, trains as a whole one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from forked import run_together
from PIL import Image

BACKBONE = str(Path(__file__).parents[1] / "hub_configs" / "aim-tiny" / "backbone")

PROCESS = """
import json, os, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, sys.argv[1])
import backbones
from modeling_aim.backbone_aim import decoder_layers
from modeling_aim.training.optimizer import MuonAndAdamW

dist.init_process_group("gloo")
case = backbones.plugin("llava", projector_form="mlp")
model = case.model.train()
inputs, demos = case.query(), [backbones.DEMOS[:2]]
labels = inputs["input_ids"].clone()
labels[:, :-2] = -100
found = {}
before = {name: value.clone() for name, value in model.projector.state_dict().items()}
for kind in ("whole", "sharded"):
    if kind == "sharded":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in decoder_layers(model.backbone):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model.read_cache.clear()
    model.zero_grad()
    loss = model(**inputs, labels=labels, demos=demos).loss
    loss.backward()
    weights = list(model.projector.parameters())
    whole = (lambda tensor: tensor.full_tensor()) if kind == "sharded" else (lambda tensor: tensor)
    gradients = [whole(p.grad).flatten()[:50].tolist() for p in weights]
    optimizer = MuonAndAdamW(weights, lr=0.1)
    optimizer.step()
    stepped = [whole(p.detach()).flatten()[:50].tolist() for p in weights]
    saved = get_optimizer_state_dict(model.projector, optimizer)  # as accelerate saves a checkpoint under FSDP 2
    set_optimizer_state_dict(model.projector, optimizer, saved)
    optimizer.step()
    again = [whole(p.detach()).flatten()[:50].tolist() for p in weights]
    found[kind] = [loss.item(), gradients, stepped, again]
    if kind == "whole":
        start = [p.flatten()[:50].tolist() for p in before.values()]
        model.projector.load_state_dict(before)
if dist.get_rank() == 0:
    print(json.dumps({**found, "start": start}), flush=True)
dist.barrier()
os._exit(0)  # torch ends its threads in an order that now and then aborts the process
"""


@pytest.mark.slow
def test_a_sharded_model_gives_the_same_loss_gradients_and_step_of_muon(tmp_path: Path) -> None:
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script), str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    whole, sharded = found["whole"], found["sharded"]
    assert sharded[0] == pytest.approx(whole[0], rel=1e-5)
    assert any(any(gradient) for gradient in whole[1])
    for one, other in zip(whole[1], sharded[1], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-7)
    for step, start in ((2, found["start"]), (3, whole[2])):
        assert all(one != begun for one, begun in zip(whole[step], start, strict=True))
        for one, other in zip(whole[step], sharded[step], strict=True):
            assert other == pytest.approx(one, rel=0, abs=1e-2)  # of a rate of 0.1; Muon's iteration is in bfloat16


@pytest.mark.slow
def test_processes_that_do_not_know_of_each_other_do_not_train(tmp_path: Path) -> None:
    arguments = ["--backbone", BACKBONE, "--data", f"episodes:{_one_episode(tmp_path)}", "--output", "out"]
    command = [sys.executable, "-m", "modeling_aim", "train", *arguments, "--set", "use_cpu=false"]
    environment = {**os.environ, "WORLD_SIZE": "2", "COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "2 processes were started" in done.stderr and "use_cpu" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_itself_takes_several_processes(tmp_path: Path) -> None:
    """Each would train alone, and write the same folder, where Trainer is not told that they are on CPUs."""
    arguments = ["--backbone", BACKBONE, "--data", f"episodes:{_one_episode(tmp_path)}", "--output", "out"]
    arguments += ["--steps", "2", "--batch-size", "1", "--shots", "1", "--prompts", "plain", "--dtype", "float32"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
    # what torch.distributed.run sets, which test_eval_run.py starts
    processes = run_together(["-m", "modeling_aim", "train", *arguments], ranks, tmp_path)
    assert [done.returncode for done in processes] == [0, 0], processes
    assert "".join(done.stdout for done in processes).count("trained for 2 steps") == 1


def _one_episode(folder: Path) -> Path:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    line = {
        "demos": [{"image": "a.png", "text": "x"}],
        "queries": [{"image": "a.png", "question": "q", "answer": "y"}],
    }
    path = folder / "episodes.jsonl"
    path.write_text(json.dumps(line) + "\n")
    return path
