"""LLaVA's whole pipeline as a toy: instruction data, a backbone, a judge, and AIM on top without training.

    python examples/llava_pipeline.py --output build/pipeline

1. captions and boxes of images of the small world (`examples/aim_tiny/world.py`);
2. a local chat model writes instruction data from them (`aim data instruct`);
3. `aim backbone` joins a vision tower and a language model and trains both of LLaVA's stages on the data;
4. the backbone answers questions about new images, and a local judge compares its answers with right ones
   (`aim eval judge`);
5. AIM on that backbone answers from demonstrations, without training.

Every step is the code that large models take, and the script says how good each is. What is a toy: the chat model
that writes and judges has a million parameters. It begins as aim-tiny's language model and is trained here, on texts
of this world made by rules (a minute or two of one core). What it writes and how it judges are checked against what
the images show. Vision tower and language model of the backbone are those of aim-tiny, and the connector between them
is new. `report.json` has the figures.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lesson import AIM_TINY, ask, shapes
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from modeling_aim import AimForConditionalGeneration
from modeling_aim.llava import BackboneSettings, build_backbone
from modeling_aim.llava.answers import write_answers
from modeling_aim.llava.instructions import InstructSettings, make_instructions
from modeling_aim.llava.judge import JudgeSettings, judge

sys.path.insert(0, str(Path(__file__).resolve().parent / "aim_tiny"))
import chat
import world

CAPTION = "<image>\nDescribe the image concisely."
SCORE = 5  # from which on a score says that an answer is right
Figures = dict[str, list[int]]  # what is right, of how many


def said(figures: Figures, stage: str, right: Sequence[bool], what: str) -> None:
    """Print how much of a stage is right, and keep it."""
    figures[stage] = [sum(right), len(right)]
    print(f"{stage}: {sum(right)} of {len(right)} {what}", flush=True)


def wrote_chat(output: Path, steps: int, figures: Figures) -> None:
    """Train the toy chat model, and test it on scenes of concepts that it has not seen."""
    chat.train(output, chat.lesson, steps)
    model: Any = AutoModelForCausalLM.from_pretrained(output)
    tokenizer: Any = AutoTokenizer.from_pretrained(output)
    rng, concepts = random.Random("test"), world.concepts("test")
    scenes = [world.random_scene(rng, rng.choice(concepts)) for _ in range(100)]
    tasks = {kind: [chat.writing(rng, kind, scene) for scene in scenes] for kind in chat.TASKS}
    for task, chats in {**tasks, "judgement": [chat.judgement(rng, scene) for scene in scenes]}.items():
        right = chat.answered(model, tokenizer, chats)
        said(figures, f"chat model, {task}", right, "texts about unseen scenes are right to the last word")


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


def instruction_data(
    output: Path, images: Path, seen: list[tuple[dict[str, Any], world.Scene]], chat_model: Path, figures: Figures
) -> Path:
    """Instruction data from captions and boxes, written by the chat model and compared with the scenes."""
    rows = [row for row, _ in seen]
    made = make_instructions(
        InstructSettings(
            source=write_lines(output / "captions_and_boxes.jsonl", rows), images=images,
            output=output / "instructions", prompts=chat.prompts(output / "prompts"), model=str(chat_model),
            temperature=0.0, answer_tokens=80,
        )
    )  # fmt: skip
    assert made is not None
    print(f"instruction data: {made.counts}, {made.pairs} questions, {len(made.unparsable)} answers did not parse")
    right = []
    for kind in chat.TASKS:
        records = {row["id"]: row for row in json.loads((output / "instructions" / f"{kind}.json").read_text())}
        for row, scene in seen:
            turns = records.get(row["id"], {"conversations": []})["conversations"]
            values = [turn["value"].replace("<image>", "").strip() for turn in turns]
            pairs = list(zip(values[::2], values[1::2], strict=True))
            if kind == "detail":  # its question is drawn from a list
                right.append([answer for _, answer in pairs] == [chat.written(kind, scene)])
            else:
                right += [pair in pairs for pair in chat.pairs(kind, scene)]
    said(figures, "instruction data", right, "answers that were asked for are there and agree with the scenes")
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


def judged(output: Path, images: Path, model: Any, chat_model: Path, count: int, figures: Figures) -> None:
    """Let the chat model compare the backbone's answers with right ones, and say how far it can be trusted.

    Most of the backbone's answers are right, so a judge that praises everything would seem good: answers that were
    given about other images, most of them wrong here, are judged too.
    """
    questions, context, right = [], [], []
    for row, scene in drawn(images, "new", count, "test"):
        context.append({"image": row["image"], "caption": row["captions"][0]})
        for question, answer in chat.facts(scene).values():
            number = len(questions)
            questions.append({"question_id": number, "image": row["image"], "text": question, "category": "conv"})
            right.append({"question_id": number, "text": answer, "answer_id": f"right-{number}", "model_id": "facts"})
    write_answers(model, questions, images, output / "answers.jsonl", max_new_tokens=4, model_id="backbone")
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    is_right = [row["text"] == answer["text"] for row, answer in zip(answers, right, strict=True)]
    said(figures, "backbone", is_right, "answers about new images are right (colour, shape, count; by chance a fifth)")
    texts = [row["text"] for row in answers]
    files = {
        "questions": write_lines(output / "questions.jsonl", questions),
        "reference": write_lines(output / "right.jsonl", right),
        "context": write_lines(output / "context.jsonl", context),
        "rules": chat.rules(output / "rule.json"),
    }
    for name, judged_texts in (("judge", texts), ("judge of moved answers", texts[3:] + texts[:3])):
        rows = [{**row, "text": text} for row, text in zip(answers, judged_texts, strict=True)]
        summary = judge(
            JudgeSettings(
                **files, candidate=write_lines(output / f"{name}.jsonl", rows), output=output / name,
                model=str(chat_model), swap=True, answer_tokens=32, temperature=0.0,
            )
        )  # fmt: skip
        assert summary is not None
        print(f"{name}, published summary: {summary['published']['first']['all']}")
        print(f"{name}, honest summary, both orders: {summary['both_orders']['all']}")
        fine = [text == answer["text"] for text, answer in zip(judged_texts, right, strict=True)]
        for order, file, place in (("first", "reviews.jsonl", 1), ("swapped", "reviews_swapped.jsonl", 0)):
            reviews = [json.loads(line) for line in (output / name / file).read_text().splitlines()]
            agrees = [(row["tuple"][place] > SCORE) == good for row, good in zip(reviews, fine, strict=True)]
            what = f"judgements agree with the facts ({sum(fine)} answers are right)"
            said(figures, f"{name}, {order}", agrees, what)


def aim_answers(model: Any, figures: Figures) -> None:
    """AIM on the backbone: names of new images from demonstrations, and without them."""
    demos, queries = shapes(ways=2, shots=2, asked=5)
    names = [name for _, name in queries]
    for stage, options in (("AIM", {"demos": demos}), ("without demonstrations", {})):
        answers = [ask(model, model.processor, image, **options) for image, _ in queries]
        right = [answer == name for answer, name in zip(answers, names, strict=True)]
        said(figures, stage, right, f"names of new images are right: {answers[:2]} ... for {names[:2]} ...")
    print(f"AIM from {len(demos)} demonstrations, without training: see above; by chance half")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/pipeline"))
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--asked", type=int, default=40, help="images of which instruction data is made")
    parser.add_argument("--chat-steps", type=int, default=250)
    parser.add_argument("--steps", type=int, nargs=2, default=(120, 80), help="of stages 1 and 2")
    parser.add_argument("--judged", type=int, default=12, help="new images about which the backbone is asked")
    args = parser.parse_args()
    torch.manual_seed(0)
    output, images, chat_model = args.output, args.output / "images", args.output / "chat"
    figures: Figures = {}
    start = time.time()

    def stage(name: str) -> None:
        print(f"\n--- {name} ({time.time() - start:.0f} s)", flush=True)

    seen = drawn(images, "seen", args.images, "train")
    stage("the toy chat model")
    if not (chat_model / "config.json").exists():
        wrote_chat(chat_model, args.chat_steps, figures)
    stage("instruction data")
    data = instruction_data(output, images, seen[: args.asked], chat_model, figures)
    stage("backbone")
    backbone = trained_backbone(output, images, [row for row, _ in seen], data, args.steps)
    model = AimForConditionalGeneration.from_backbone(str(backbone))
    stage("answers, and the judge")
    judged(output, images, model, chat_model, args.judged, figures)
    stage("AIM")
    aim_answers(model, figures)
    stage("end")
    (output / "report.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
