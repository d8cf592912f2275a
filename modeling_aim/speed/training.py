"""Steps a second of training a projector, by the places where its tokens enter; run by `make bench`.

    python -m modeling_aim.speed.training                     # aim-tiny on this machine's cores
    python -m modeling_aim.speed.training --backbone llava-hf/llava-1.5-7b-hf --device cuda

The default projector of `aim train` enters at two places, the input and a depth. With the depth alone gradient stops
there: a step has no backward pass below. With the input alone it reads the same depth. Each is timed with reads kept,
with reads not kept, and as the final pass alone, which is the floor: fused tokens are given, the backbone answers, and
gradient comes back to them. The rest of a step is what training adds: opening and encoding the targets, reading
demonstrations or finding what was read, the projector, the optimizer. All take the same episodes in turn, in one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TrainingArguments

from .. import AimForConditionalGeneration, AimProcessor, Demonstration
from ..backbone_aim import load_backbone
from ..configuration_aim import default_depth
from ..training import AimTrainer, Episode, KeptStates, TrainSettings

AIM_TINY = str(Path(__file__).resolve().parents[2] / "hub_configs" / "aim-tiny" / "backbone")
BOUND = 32 * 2**30
NAMES = ("final pass alone", "reads kept", "reads not kept")
PLACES = ("both places", "depth alone", "input alone")


def episodes(count: int, shots: int, pixels: int) -> list[Episode]:
    """Random images with a few words each; every pair after the first is a target."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        noise = torch.randint(0, 256, (shots + 1, pixels, pixels, 3), generator=generator, dtype=torch.uint8)
        pairs = [
            Demonstration.of(
                {"image": Image.fromarray(image.numpy()), "text": f"a small red circle , one of {number} ."}
            )
            for image in noise
        ]
        made.append(Episode(tuple(pairs), tuple(range(1, shots + 1))))
    return made


def final_pass(trainer: Any, batch: list[Episode]) -> Callable[[], None]:
    """Forward and backward of the backbone alone, all else made ready."""
    model: Any = trainer.model
    made = trainer._prepare_inputs(trainer.data_collator(batch))
    labels = made["labels"]
    for name in ("sources", "skipped", "counts"):
        made.pop(name)
    scored = (labels != -100).int()
    made["logits_to_keep"] = int((scored.shape[1] - scored.argmax(dim=1)).max()) + 1
    rows = [model.read(demos) for demos in made.pop("demos")]
    demos = [replace(row, vectors=row.vectors.clone().requires_grad_()) for row in rows]

    def run() -> None:
        model(**made, demos=demos).loss.backward()

    return run


def step(trainer: Any, batch: list[Episode]) -> Callable[[], None]:
    """A whole step of training, from opened images to changed weights."""

    def run() -> None:
        made = trainer._prepare_inputs(trainer.data_collator(batch))
        trainer.training_step(trainer.model, made)
        torch.nn.utils.clip_grad_norm_(trainer.model.projector.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return run


def trainer_of(model: AimForConditionalGeneration, folder: str, device: str, pixels: int) -> Any:
    """A trainer at a rate of nothing: the fused tokens of the final pass alone stay those of this projector."""
    options = TrainingArguments(folder, max_steps=1, learning_rate=0.0, report_to="none", use_cpu=device == "cpu")
    trainer = AimTrainer(
        model, options, optimizer=TrainSettings.optimizer, train_dataset=episodes(1, 1, pixels), group_by_length=False
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # what `train` sets
    model.train()
    return trainer


def steps(trainer: Any, batch: list[Episode], device: str) -> tuple[float, float]:
    """Seconds of a step with reads kept, and with reads not kept."""
    model = trainer.model
    model.read_cache.max_bytes = BOUND
    kept = timed(step(trainer, batch), device)
    states, model.read_cache = model.read_cache, KeptStates(0)
    unkept = timed(step(trainer, batch), device)
    model.read_cache = states
    return kept, unkept


def timed(run: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=AIM_TINY, help="backbone: a folder or a Hub id")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=4, help="episodes in a batch")
    parser.add_argument("--shots", type=int, default=8, help="demonstrations of an episode")
    parser.add_argument("--pixels", type=int, default=64, help="width and height of the images")
    parser.add_argument("--batches", type=int, default=4, help="batches that are gone through again and again")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    made = episodes(args.batches * args.batch_size, args.shots, args.pixels)
    batches = [made[start : start + args.batch_size] for start in range(0, len(made), args.batch_size)]
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    backbone = load_backbone(args.backbone, dtype=dtype, device_map=args.device)
    processor = AimProcessor.from_pretrained(args.backbone)
    with tempfile.TemporaryDirectory() as folder:
        turns = []
        depth = [default_depth(backbone.config.get_text_config())]
        settings: tuple[dict[str, Any], ...] = ({}, {"read_layers": depth}, {"entry_layers": [0]})
        for place, layers in zip(PLACES, settings, strict=True):
            model = AimForConditionalGeneration.from_backbone(backbone, processor, preset="trained", **layers)
            turns.append((place, trainer_of(model, folder, args.device, args.pixels)))
        times: dict[str, list[float]] = {f"{place}: {name}": [] for place in PLACES for name in NAMES}
        floors = {place: [final_pass(trainer, batch) for batch in batches] for place, trainer in turns}
        for repeat in range(args.repeats + 1):  # the first is for warming up, and fills the cache
            for number, batch in enumerate(batches):
                for place, trainer in turns:
                    seconds = (timed(floors[place][number], args.device), *steps(trainer, batch, args.device))
                    for name, value in zip(NAMES, seconds, strict=True):
                        times[f"{place}: {name}"] += [value] if repeat else []
    report(times, args)


def report(times: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Print medians and quartiles, beside the final pass of the same place."""
    floor_times = {place: statistics.median(times[f"{place}: {NAMES[0]}"]) for place in PLACES}
    by_code: dict[str, dict[str, Any]] = {
        name: {
            "steps a second": 1 / statistics.median(values),
            "milliseconds": 1000 * statistics.median(values),
            "quartiles": [1000 * value for value in statistics.quantiles(values, n=4, method="inclusive")[::2]],
            "times the final pass": statistics.median(values) / floor_times[name.partition(":")[0]],
        }
        for name, values in times.items()
    }
    if args.json:
        print(json.dumps(by_code))
        return
    print(f"training, {args.batch_size} episodes of {args.shots} demonstrations, all but the first pair are targets")
    print(f"{'':30}{'steps/s':>9}{'ms':>9}{'quartiles':>18}{'x final pass':>14}")
    for name, row in by_code.items():
        low, high = row["quartiles"]
        numbers = f"{row['steps a second']:9.2f}{row['milliseconds']:9.1f}{low:9.1f}{high:9.1f}"
        print(f"{name:30}{numbers}{row['times the final pass']:14.2f}")


if __name__ == "__main__":
    main()
