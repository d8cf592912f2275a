"""aim-tiny's two LLaVA stages by `aim backbone`: tower and language model as folders, its corpus as LLaVA's JSON.

    python examples/aim_tiny/parts.py                         # after the stages vision and llm of build.py
    python examples/aim_tiny/parts.py --shipped --batches 20 --folder build/short  # on the shipped parts
    python examples/aim_tiny/parts.py --adopt                 # the result becomes the backbone of the later stages

Samples become conversations whose words and targets are those of `backbone.py llava`, token for token: a chat template
without words of its own puts the turns behind one another. Three things have no place in LLaVA's JSON: gaps in the
positions, several queries behind the same demonstrations, and Muon. docs/LOG.md says what is known of the difference.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import world
from backbone import ALIGN_STEPS, LLAVA_STEPS, TOKENS
from corpus import Sample, asking, describing, naming
from support import BUILD, ROOT, progress, ranks, write
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedModel
from words import EOS, IMAGE, VISUAL_TOKENS, new_model, processor, token_id, tokenizer

sys.path.insert(0, str(ROOT))
from modeling_aim.llava import BackboneSettings, build_backbone

BARE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"  # its words are in the corpus
RATES = 3e-3, 1.5e-3  # of stage 1 and 2, AdamW
CONVERSATIONS = 24  # of one step of stage 2


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
    words = tokenizer()
    words.chat_template, own = BARE, words.chat_template
    words.save_pretrained(language)
    words.chat_template = own
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
    """A batch of stage 2 as `llava_batch` of backbone.py mixes it, with one query an episode."""
    kind = rng.random()
    demos = rng.randint(3, 32)
    most = 32 if kind < 0.3 or rng.random() < 0.3 else 12
    shown = "none" if kind < 0.3 else "query" if kind < 0.55 or rng.random() < 0.6 else "demo"
    telling = rng.choice(["terse", "easy"]) if 0.3 <= kind < 0.55 else "full"
    demos = demos if telling != "full" else rng.randint(2, most)
    tokens = 0
    while tokens < TOKENS:
        if kind < 0.2:
            sample = (describing if kind < 0.08 else asking)(rng, True)
        else:
            sample = naming(rng, min(demos, rng.randint(2, 8)), demos, shown, telling=telling)
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


def build(folder: Path, shipped: bool, align: int, batches: int) -> Path:
    """Both stages; the folder of the backbone.

    Args:
        folder: where parts, data and backbone go.
        shipped: as for `parts`.
        align, batches: batches of stage 1 and 2.
    """
    tower, language = parts(folder / "parts", shipped)
    settings = BackboneSettings(
        vision_tower=tower, language_model=language, output=str(folder / "llava"),
        stage1=(data(folder, "captions", captions, align),),
        stage2=(data(folder, "conversations", conversations, batches),),
        stage1_batch_size=64, stage2_batch_size=CONVERSATIONS, batch_size=CONVERSATIONS,
        stage1_learning_rate=RATES[0], stage2_learning_rate=RATES[1], vision_feature_layer=-1, max_length=4096,
        dtype="float32", arguments={"bf16": True}, log_every=5,
    )  # fmt: skip
    return build_backbone(settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shipped", action="store_true", help="take the parts of hub_configs/aim-tiny")
    parser.add_argument("--align", type=int, default=ALIGN_STEPS, help="batches of stage 1")
    parser.add_argument("--batches", type=int, default=LLAVA_STEPS, help="batches of stage 2")
    parser.add_argument("--folder", type=Path, default=BUILD / "parts", help="where all of it goes")
    parser.add_argument("--adopt", action="store_true", help="write build/aim-tiny/llava.pt, for the later stages")
    args = parser.parse_args()
    output = build(args.folder, args.shipped, min(args.align, args.batches), args.batches)
    if args.adopt and ranks()[0] == 0:
        model = LlavaForConditionalGeneration.from_pretrained(output)
        write(BUILD / "llava.pt", lambda path: torch.save(model.state_dict(), path))


if __name__ == "__main__":
    main()
