"""What the stages of the build share: files written whole, checkpoints, the learning rate, progress bars.

Not run by itself; `python examples/aim_tiny/build.py` runs the stages.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "aim-tiny"
OUT = ROOT / "hub_configs" / "aim-tiny"
CONTROLS = Path(__file__).resolve().parent / "controls"
BUILD.mkdir(parents=True, exist_ok=True)


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Write a file under a name of this process and rename it last: what exists is whole, whoever was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer(temporary)
    os.replace(temporary, path)


class Checkpoint:
    """The state of a long stage, written every two minutes; `start` is the step to resume from."""

    def __init__(self, stage: str, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.path, self.model, self.optimizers = BUILD / f"{stage}.checkpoint", model, optimizers
        self.start, self.last = 0, time.time()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            model.load_state_dict(state["model"], strict=False)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.start = state["step"]

    def save(self, step: int, every: float = 120.0) -> None:
        if time.time() - self.last < every or ranks()[0]:
            return
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"model": self.model.state_dict(), "optimizers": optimizers, "step": step}
        write(self.path, lambda p: torch.save(state, p))
        self.last = time.time()


def optimizers_of(model: torch.nn.Module, rate: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices of layers, AdamW at a third of its rate for every other trained weight; with the peak
    rate of each."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = [p for name, p in trained.items() if "layers." in name and p.ndim == 2]
    outer = [p for name, p in trained.items() if not ("layers." in name and p.ndim == 2)]
    made: list[tuple[torch.optim.Optimizer, float]] = []
    if outer:
        made.append((torch.optim.AdamW(outer, lr=rate / 3, betas=(0.9, 0.98), weight_decay=0.0), rate / 3))
    if inner:
        made.append((torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"), rate))
    return made


def cosine(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int = 30) -> None:
    """Linear warm-up, then half a cosine down to a fiftieth."""
    done = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    rate = peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def ranks() -> tuple[int, int]:
    """This process and how many train together (`python -m torch.distributed.run --nproc-per-node 2 ...`)."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return rank, count


def share_gradients(weights: list[torch.nn.Parameter]) -> None:
    """The mean gradient of the processes that train together."""
    count = ranks()[1]
    if count > 1:
        together = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights])
        dist.all_reduce(together)
        for p, g in zip(weights, (together / count).split([p.numel() for p in weights]), strict=True):
            p.grad = g.view_as(p).clone()


def return_memory() -> None:
    """Give freed memory back: batches of every shape would leave gigabytes of holes."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def progress(items, title: str, **options):
    """A progress bar on a terminal, a line a minute in a log."""
    place = int(os.environ.get("AIM_TINY_BAR", 0))
    return tqdm(items, desc=title, mininterval=0.5 if os.isatty(2) else 60, position=place, **options)
