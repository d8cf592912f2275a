"""The vision tower of aim-tiny: a CLIP ViT taught the five attributes; the attribute heads are thrown away.

    python examples/aim_tiny/vision.py        # 4 800 steps, about 20 minutes of one core; resumes where it stopped

Every patch token learns to tell the attributes of the whole image (a linear head, mean and single tokens), because
LLaVA hands all 64 patch tokens to the language model. Held-out concepts are never seen. So that a shape is known in a
colour it was never seen with, a second phase adds shapes in colours without a name and colours in shapes without
one, and the softmax over shapes leaves
out those the colour is held out with: without the two, held-out shapes were at chance.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import world
from support import BUILD, Checkpoint, cosine, progress, write
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

STEPS, BATCH, UNNAMED = (2400, 2400), 128, 30_000
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ATTRIBUTES = [list(world.COLOURS), world.SHAPES, world.TEXTURES, world.COUNTS, world.SIZES]


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                            image_size=world.PIXELS, patch_size=8, projection_dim=128, hidden_act="relu")  # fmt: skip


def images(split: str) -> np.ndarray:
    """All images of a split's pool, `(concepts, images, 64, 64, 3)` uint8, drawn once and memory-mapped."""
    path = BUILD / f"images-{split}.npy"
    if not path.exists():
        shape = len(world.concepts(split)), world.IMAGES_PER_CONCEPT[split]
        pool = np.empty((*shape, world.PIXELS, world.PIXELS, 3), np.uint8)
        for c in progress(range(shape[0]), f"draw {split}"):
            for i in range(shape[1]):
                pool[c, i] = np.asarray(world.pool_image(split, c, i))
        write(path, lambda p: np.save(p.open("wb"), pool))
    return np.load(path, mmap_mode="r")


def pixels(batch: np.ndarray) -> torch.Tensor:
    """uint8 images `(n, 64, 64, 3)` as the CLIP image processor hands them over, `(n, 3, 64, 64)`."""
    x = torch.from_numpy(np.array(batch)).float().div_(255)
    return ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def labels(split: str) -> torch.Tensor:
    """Attribute numbers of every pool image, `(concepts, images, 5)`."""

    def numbers(scene: world.Scene) -> list[int]:
        return [words.index(w) for words, w in zip(ATTRIBUTES, vars(scene).values(), strict=True)]

    rows = [
        [numbers(world.pool_scene(split, c, i)) for i in range(world.IMAGES_PER_CONCEPT[split])]
        for c in range(len(world.concepts(split)))
    ]
    return torch.tensor(rows)


def unnamed() -> tuple[np.ndarray, torch.Tensor]:
    """Shapes in colours without a name and the other way round: images and attribute numbers, -1 for no name."""
    path, rng = BUILD / "images-unnamed.npy", random.Random("unnamed")
    scenes = [world.unnamed_scene(rng) for _ in range(UNNAMED)]
    if not path.exists():
        drawn = np.stack([np.asarray(world.draw(s, rng)) for s in progress(scenes, "draw unnamed")])
        write(path, lambda p: np.save(p.open("wb"), drawn))
    rows = [
        [words.index(w) if w in words else -1 for words, w in zip(ATTRIBUTES, vars(s).values(), strict=True)]
        for s in scenes
    ]
    return np.load(path, mmap_mode="r"), torch.tensor(rows)


def allowed() -> torch.Tensor:
    """Which shapes a colour is seen with in training, `(colours, shapes)`."""
    return torch.tensor([[(c, s) in world.concepts("train") for s in world.SHAPES] for c in world.COLOURS])


class Reader(nn.Module):
    """Vision tower and the attribute head on its patch tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = CLIPVisionModel._from_config(
            vision_config(), attn_implementation="eager"
        )  # its backward is the fast one on a CPU
        self.head = nn.Linear(128, sum(map(len, ATTRIBUTES)))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
        return self.head(F.layer_norm(hidden, (128,))).split(list(map(len, ATTRIBUTES)), -1)


def loss_of(parts: tuple[torch.Tensor, ...], target: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(())
    shapes = torch.cat([allowed(), torch.ones(1, 8, dtype=torch.bool)])[
        target[:, 0]
    ]  # the last row serves colours without a name (-1)
    for k, logits in enumerate(parts):
        logits = logits.float()
        if k == 1:
            logits = logits.masked_fill(~shapes.unsqueeze(1), -30.0)
        single = logits[:, torch.randint(64, (6,))]
        total = total + F.cross_entropy(logits.mean(1), target[:, k], ignore_index=-1)
        total = total + 0.5 * F.cross_entropy(single.flatten(0, 1), target[:, k].repeat_interleave(6), ignore_index=-1)
    return total


@torch.no_grad()
def accuracy(model: Reader, split: str) -> list[float]:
    pool, target = images(split), labels(split).flatten(0, 1)
    x = pixels(pool.reshape(-1, *pool.shape[2:]))
    parts = [torch.cat(p) for p in zip(*(model(b) for b in x.split(256)), strict=True)]
    return [round((p.mean(1).argmax(-1) == target[:, k]).float().mean().item(), 3) for k, p in enumerate(parts)]


def train() -> None:
    pool, target = images("train"), labels("train").flatten(0, 1)
    pool = pool.reshape(-1, *pool.shape[2:])
    more, more_target = unnamed()
    model = Reader()
    for phase, steps in enumerate(STEPS):
        torch.manual_seed(phase)
        rng = np.random.default_rng(phase)
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
                  {"params": [p for p in model.parameters() if p.ndim < 2]}]  # fmt: skip
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
        checkpoint = Checkpoint(f"vision{phase}", model, [optimizer])
        for step in progress(range(checkpoint.start, steps), f"vision {phase}", initial=checkpoint.start, total=steps):
            cosine(optimizer, 1e-3, step, steps, warmup=100)
            pick = np.sort(rng.choice(len(pool), BATCH - 60 * phase, replace=False))
            x, y = pool[pick], target[pick]
            if phase:
                pick = np.sort(rng.choice(len(more), 60, replace=False))
                x, y = np.concatenate([x, more[pick]]), torch.cat([y, more_target[pick]])
            x = pixels(x)
            if rng.random() < 0.5:
                x = x.flip(-1)
            with torch.autocast("cpu", torch.bfloat16):
                parts = model(x)
            loss = loss_of(parts, y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 200 == 0:
                right = [(p.mean(1).argmax(-1) == y[:, k]).float().mean().item() for k, p in enumerate(parts)]
                held = accuracy(model, "validation")
                print(
                    f"step {step} loss {loss.item():.3f} train {[round(r, 2) for r in right]} held out {held}",
                    flush=True,
                )
            checkpoint.save(step + 1)
        checkpoint.save(steps, every=0)
    print("validation: colour, shape, texture, count, size", accuracy(model, "validation"))
    write(BUILD / "vision.pt", lambda p: torch.save(model.tower.state_dict(), p))


if __name__ == "__main__":
    train()
