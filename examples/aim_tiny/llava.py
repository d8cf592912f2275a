"""LLaVA's two stages of aim-tiny by `aim backbone`: tower and language model as folders, the corpus as LLaVA's JSON.

    python examples/aim_tiny/llava.py             # after the stages vision and llm of build.py; rerun it to resume
    python examples/aim_tiny/llava.py --shipped --align 2 --batches 20 --folder build/short    # on the shipped parts

The words of a conversation hold its form, so it is written without the chat template (`--stage2-format plain`).
`command` has the recipe; the result is a stock LLaVA with its processor in build/aim-tiny/llava.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import world
from corpus import Sample, asking, describing, naming
from support import BUILD, ROOT, progress, write
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedModel
from words import EOS, IMAGE, VISUAL_TOKENS, new_model, processor, token_id, tokenizer

ALIGN_BATCHES, CONVERSATION_BATCHES, TOKENS = 100, 600, 6400  # of stage 1; of stage 2, with so many tokens
RECIPE = {
    "stage1-batch-size": 64, "stage1-learning-rate": 3e-3, "stage2-batch-size": 32, "stage2-learning-rate": 4e-3,
    "stage2-format": "plain", "optimizer": "muon", "batch-size": 8, "warmup": 0.05, "vision-feature-layer": -1,
    "max-length": 4096, "dtype": "float32", "save-every": 50, "log-every": 10,
}  # fmt: skip
ARGUMENTS = {"weight_decay": 0.05, "adam_beta2": 0.98, "bf16": "true", "disable_tqdm": "true"}


def parts(folder: Path, shipped: bool) -> tuple[str, str]:
    """Write vision tower and language model as repositories of their own; their folders.

    Args:
        folder: where they go.
        shipped: take those of hub_configs/aim-tiny instead of those in build/aim-tiny.
    """
    if shipped:
        whole: Any = LlavaForConditionalGeneration.from_pretrained(ROOT / "hub_configs" / "aim-tiny" / "backbone")
    else:
        whole = new_model()
        whole.load_state_dict(torch.load(BUILD / "llm.pt", weights_only=True))
        whole.model.vision_tower.load_state_dict(torch.load(BUILD / "vision.pt", weights_only=True))
    tower, language = folder / "tower", folder / "language"
    whole.model.vision_tower.save_pretrained(tower)
    processor().image_processor.save_pretrained(tower)
    config = AutoConfig.for_model(**whole.config.text_config.to_dict())
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.base_model.load_state_dict(whole.model.language_model.state_dict())
    model.get_output_embeddings().load_state_dict(whole.lm_head.state_dict())
    model.save_pretrained(language)
    tokenizer().save_pretrained(language)
    return str(tower), str(language)


def turns_of(sample: Sample) -> list[tuple[str, str]]:
    """A sample as turns: what is no target in the human's, with `<image>` for an image, and targets in the answers."""
    turns, image = [], token_id(IMAGE)
    tokens = list(zip(sample.ids, sample.target, strict=True))[1:]  # the tokenizer writes `<s>`
    asked = ""
    for target, group in groupby(tokens, key=lambda token: token[1]):
        ids = [i for i, _ in group]
        words = []
        for is_image, run in groupby(ids, key=lambda i: i == image):
            run = list(run)
            words += [IMAGE] * (len(run) // VISUAL_TOKENS) if is_image else [tokenizer().decode(run)]
        text = " ".join(words).removesuffix(EOS).strip()
        if not target:
            asked = text
        elif text:
            turns.append((asked, text))
            asked = ""
    return turns


def record(sample: Sample) -> dict[str, Any]:
    """A sample in LLaVA's JSON; an image is named by its concept and its number in the pool."""
    values = [{"from": who, "value": words} for turn in turns_of(sample)
              for who, words in zip(("human", "gpt"), turn, strict=True)]  # fmt: skip
    images = [f"{concept}-{index}.png" for concept, index in sample.images]
    image = {"image": images[0] if len(images) == 1 else images} if images else {}
    return {**image, "conversations": values}


def captions(rng: random.Random) -> Iterator[Sample]:
    """A batch of stage 1: captions alone, since the human turn is the image."""
    yield from (describing(rng, True) for _ in range(64))


def conversations(rng: random.Random) -> Iterator[Sample]:
    """A batch of stage 2: captions, questions, episodes in words, and episodes in which the query or one demonstration
    is an image; one in four of the latter with descriptions as long as an image, for long prompts."""
    kind = rng.random()
    demos = rng.randint(3, 32)
    most = 32 if kind < 0.3 or rng.random() < 0.3 else 12
    shown = "none" if kind < 0.3 else "query" if kind < 0.55 or rng.random() < 0.6 else "demo"
    telling = rng.choice(["terse", "easy"]) if 0.3 <= kind < 0.55 else "full"
    demos = demos if telling != "full" else rng.randint(2, most)
    length = rng.choice([45, 60, 75]) if telling == "full" and rng.random() < 0.25 else 0
    tokens = 0
    while tokens < TOKENS:
        if kind < 0.2:
            sample = (describing if kind < 0.08 else asking)(rng, True)
        else:
            sample = naming(rng, min(demos, rng.randint(2, 8)), demos, shown, length, telling=telling)
        tokens += len(sample.ids)
        yield sample


def data(folder: Path, name: str, make: Callable[[random.Random], Iterator[Sample]], batches: int) -> str:
    """Write the samples of some batches and their images, as `--stage1` and `--stage2` take them."""
    path, images = folder / f"{name}-{batches}.json", folder / "images"
    if not path.exists():
        images.mkdir(parents=True, exist_ok=True)
        records = []
        for batch in progress(range(batches), name):
            for sample in make(random.Random(f"{name} {batch}")):
                records.append({"id": str(len(records)), **record(sample)})
                for concept, index in sample.images:
                    place = images / f"{concept}-{index}.png"
                    if not place.exists():
                        world.pool_image("train", concept, index).save(place)
        write(path, lambda scratch: scratch.write_text(json.dumps(records)))
    return f"llava:{path},images={images}"


def command(folder: Path, output: Path, shipped: bool, align: int, batches: int) -> list[str]:
    """The arguments of `aim backbone`; parts and data are written where they are not there yet.

    Args:
        folder: where parts and data go.
        output: where the backbone goes.
        shipped: as for `parts`.
        align, batches: batches of stage 1 and 2.
    """
    tower, language = parts(folder / "parts", shipped)
    words = ["backbone", "--vision-tower", tower, "--language-model", language, "--output", str(output)]
    words += ["--stage1", data(folder, "captions", captions, align)]
    words += ["--stage2", data(folder, "conversations", conversations, batches)]
    words += [word for name, value in RECIPE.items() for word in (f"--{name}", str(value))]
    return [*words, *(word for name, value in ARGUMENTS.items() for word in ("--set", f"{name}={value}"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shipped", action="store_true", help="take the parts of hub_configs/aim-tiny")
    parser.add_argument("--align", type=int, default=ALIGN_BATCHES, help="batches of stage 1")
    parser.add_argument("--batches", type=int, default=CONVERSATION_BATCHES, help="batches of stage 2")
    parser.add_argument("--folder", type=Path, default=BUILD, help="where all of it goes")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="that train together")
    args = parser.parse_args()
    words = command(args.folder / "stages", args.folder / "llava", args.shipped, args.align, args.batches)
    print(f"aim {shlex.join(words)}", flush=True)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(args.processes)] if args.processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, *launch, "-m", "modeling_aim", *words], check=True, cwd=ROOT, env=environment)


if __name__ == "__main__":
    main()
