"""LLaVA's whole way on one laptop, in small: instruction data, a backbone, a judge, and AIM on top without training.

    python examples/llava_pipeline.py --output build/pipeline

1. captions and boxes of images of the small world (`examples/aim_tiny/world.py`);
2. a local chat model writes instruction data from them (`aim data instruct`);
3. `aim backbone` joins a vision tower and a language model and trains both of LLaVA's stages on the data;
4. the backbone answers questions about new images, and a local judge compares its answers with right ones
   (`aim eval judge`);
5. AIM on that backbone answers from demonstrations, without training.

Every step is the code that large models take. What is a toy: the chat model that writes and judges has some hundred
thousand parameters and is trained here, on texts of this world made by rules. It learns the form of its answers
at once, and what the captions say late, if at all: what it writes may be wrong, and its judgements are checked against
the facts. Vision tower and language model are those of aim-tiny, and the connector between them is new.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lesson import AIM_TINY, ask, shapes
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from modeling_aim import AimForConditionalGeneration
from modeling_aim.llava import BackboneSettings, build_backbone
from modeling_aim.llava.answers import write_answers
from modeling_aim.llava.instructions import InstructSettings, make_instructions
from modeling_aim.llava.judge import JudgeSettings, judge

sys.path.insert(0, str(Path(__file__).resolve().parent / "aim_tiny"))
import chat
import world

CAPTION = "<image>\nDescribe the image concisely."
JUDGED = 6  # images


def drawn(folder: Path, name: str, count: int, split: str) -> list[tuple[dict[str, Any], world.Scene]]:
    """Images of the small world with their captions and boxes, and what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, concepts, made = random.Random(name), world.concepts(split), []
    for number in range(count):
        scene, boxes = world.random_scene(rng, concepts[number % len(concepts)]), []
        world.draw(scene, rng, boxes).save(folder / f"{name}{number}.png")
        made.append((chat.row(f"{name}{number}", scene, boxes), scene))
    return made


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parts(folder: Path) -> tuple[Path, Path]:
    """The vision tower and the language model of aim-tiny, each in a folder of its own, without their connector."""
    whole: Any = AutoModelForImageTextToText.from_pretrained(f"{AIM_TINY}/backbone")
    processor: Any = AutoProcessor.from_pretrained(f"{AIM_TINY}/backbone")
    whole.model.vision_tower.save_pretrained(folder / "tower")
    processor.image_processor.save_pretrained(folder / "tower")
    language: Any = AutoModelForCausalLM.from_config(whole.config.text_config)
    language.model.load_state_dict(whole.model.language_model.state_dict())
    language.lm_head.load_state_dict(whole.lm_head.state_dict())
    language.generation_config = whole.generation_config
    language.save_pretrained(folder / "language")
    processor.tokenizer.save_pretrained(folder / "language")
    return folder / "tower", folder / "language"


def instruction_data(output: Path, images: Path, rows: list[dict[str, Any]], chat_model: Path) -> Path:
    """Instruction data from captions and boxes, written by the chat model."""
    made = make_instructions(
        InstructSettings(
            source=write_lines(output / "captions_and_boxes.jsonl", rows), images=images,
            output=output / "instructions", prompts=chat.prompts(output / "prompts"), model=str(chat_model),
            temperature=0.0, answer_tokens=80,
        )
    )  # fmt: skip
    assert made is not None
    print(f"instruction data: {made.counts}, {made.pairs} questions, {len(made.unparsable)} answers did not parse")
    return output / "instructions" / "instructions.json"


def trained_backbone(output: Path, images: Path, rows: list[dict[str, Any]], data: Path, steps: Sequence[int]) -> Path:
    """A backbone from parts: stage 1 on the captions, stage 2 on the instruction data."""
    tower, language = parts(output / "parts")
    captions = [
        {"id": row["id"], "image": row["image"], "conversations": [
            {"from": "human", "value": CAPTION}, {"from": "gpt", "value": f"{row['captions'][0]} ."}]} for row in rows
    ]  # fmt: skip
    (output / "captions.json").write_text(json.dumps(captions))
    return build_backbone(
        BackboneSettings(
            vision_tower=str(tower), language_model=str(language), output=str(output / "backbone"),
            stage1=(f"llava:{output / 'captions.json'},images={images}",), stage2=(f"llava:{data},images={images}",),
            stage1_steps=steps[0], stage2_steps=steps[1], stage1_batch_size=16, stage2_batch_size=16, batch_size=16,
            stage1_learning_rate=3e-3, stage2_learning_rate=3e-4, vision_feature_layer=-1, dtype="float32",
            arguments={"use_cpu": True},
        )
    )  # fmt: skip


def judged(output: Path, images: Path, model: Any, chat_model: Path) -> None:
    """Let the chat model compare the backbone's answers with right ones, and say how far it can be trusted."""
    questions, context, right = [], [], []
    for row, scene in drawn(images, "new", JUDGED, "test"):
        context.append({"image": row["image"], "caption": row["captions"][0]})
        for question, answer in chat.facts(scene).values():
            number = len(questions)
            questions.append({"question_id": number, "image": row["image"], "text": question, "category": "conv"})
            right.append({"question_id": number, "text": answer, "answer_id": f"right-{number}", "model_id": "facts"})
    write_answers(model, questions, images, output / "answers.jsonl", max_new_tokens=4, model_id="backbone")
    summary = judge(
        JudgeSettings(
            questions=write_lines(output / "questions.jsonl", questions), candidate=output / "answers.jsonl",
            reference=write_lines(output / "right.jsonl", right),
            context=write_lines(output / "context.jsonl", context), rules=chat.rules(output / "rule.json"),
            output=output / "judge", model=str(chat_model), swap=True,
            answer_tokens=12, temperature=0.0,
        )
    )  # fmt: skip
    assert summary is not None
    print(f"judge, published summary: {summary['published']['first']['all']}")
    print(f"judge, honest summary, both orders: {summary['both_orders']['all']}")
    given = [json.loads(line)["text"] for line in (output / "answers.jsonl").read_text().splitlines()]
    is_right = [text == answer["text"] for text, answer in zip(given, right, strict=True)]
    reviews = [json.loads(line) for line in (output / "judge" / "reviews.jsonl").read_text().splitlines()]
    agreed = sum((row["tuple"][1] > 5) == fine for row, fine in zip(reviews, is_right, strict=True))
    print(
        f"the facts: {sum(is_right)} of {len(right)} answers are right; the judge agrees with {agreed} of {len(right)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/pipeline"))
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--asked", type=int, default=40, help="images of which instruction data is made")
    parser.add_argument("--chat-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, nargs=2, default=(120, 80), help="of stages 1 and 2")
    args = parser.parse_args()
    torch.manual_seed(0)
    output, images, chat_model = args.output, args.output / "images", args.output / "chat"
    rows = [row for row, _ in drawn(images, "seen", args.images, "train")]
    if not (chat_model / "config.json").exists():
        chat.train(chat_model, chat.lesson, args.chat_steps)
    data = instruction_data(output, images, rows[: args.asked], chat_model)
    backbone = trained_backbone(output, images, rows, data, args.steps)
    model = AimForConditionalGeneration.from_backbone(str(backbone))
    judged(output, images, model, chat_model)
    demos, queries = shapes(ways=2, shots=2)
    answers = [ask(model, model.processor, image, demos=demos) for image, _ in queries]
    names = [name for _, name in queries]
    print(f"AIM from {len(demos)} demonstrations, without training: {answers}; the names are {names}")


if __name__ == "__main__":
    main()
