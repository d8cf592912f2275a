"""A toy chat model of the small world: it turns captions into questions and answers, and it judges answers.

    python examples/aim_tiny/chat.py --output build/chat --steps 600

It stands where a real instruction model would: an ordinary Llama of transformers with a tokenizer and a chat template,
some hundred thousand parameters, trained for a minute or two on texts that are written here by rules. It knows nothing
but this world. `prompts` and `rules` are the short prompts that it was trained with.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import world
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_aim.llava.prompts import FOLDERS
from modeling_aim.llava.rules import SYSTEM

TASKS = {"conversation": "ask and answer", "detail": "describe it", "complex": "think"}
RULE = "give two scores ."
ASKED = ("colour", "shape", "count")
TURNS = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ("<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>")
Chat = list[dict[str, str]]


# --- what it is trained on


def row(name: str, scene: world.Scene, boxes: list[list[float]]) -> dict:
    """Caption and boxes of an image of the small world, as `aim data instruct --source` reads them."""
    instances = [{"category": scene.shape, "bbox": box} for box in boxes]
    return {"id": name, "image": f"{name}.png", "captions": [world.caption(scene)], "instances": instances}


def facts(scene: world.Scene) -> dict[str, tuple[str, str]]:
    """A question about each property, and its answer."""
    return {
        "colour": ("what is the colour ?", f"{scene.colour} ."),
        "shape": ("what is the shape ?", f"{world.plural(scene)} ."),
        "count": ("how many are there ?", f"{scene.count} ."),
    }


def written(kind: str, scene: world.Scene) -> str:
    """What the model is to write of a scene."""
    thing = f"{scene.colour} {world.plural(scene)}"
    if kind == "detail":
        return f"the image shows {scene.count} {scene.size} {thing} on {scene.texture} ."
    if kind == "complex":
        pairs = [("on which wall is it hard to see ?", f"on a {scene.colour} wall , since it is {scene.colour} .")]
    else:
        pairs = list(facts(scene).values())
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in pairs)


def asked(kind: str, captions: str) -> Chat:
    """The chat in which it is asked for instruction data."""
    return [{"role": "system", "content": TASKS[kind]}, {"role": "user", "content": captions}]


def judged(caption: str, question: str, first: str, second: str) -> Chat:
    """The chat in which it is asked to judge, as `aim eval judge` puts it for LLaVA-Bench (in the wild)."""
    answers = "".join(
        f"[Assistant {n}]\n{text}\n\n[End of Assistant {n}]\n\n" for n, text in ((1, first), (2, second))
    )
    content = f"[Context]\n{caption}\n\n[Question]\n{question}\n\n{answers}[System]\n{RULE}\n\n"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def judgement(rng: random.Random, scene: world.Scene) -> Chat:
    """A judgement to learn from: 9 for an answer that is right, 2 for one that is not."""
    name = rng.choice(ASKED)
    question, right = facts(scene)[name]
    others = [world.random_scene(rng, rng.choice(world.concepts("train"))) for _ in range(20)]
    wrong = [text for other in others if (text := facts(other)[name][1]) != right] or ["no ."]
    pair = [rng.choice([right, rng.choice(wrong)]) for _ in range(2)]
    scores = " ".join("9" if text == right else "2" for text in pair)
    return [
        *judged(world.caption(scene), question, *pair),
        {"role": "assistant", "content": f"{scores}\nright is {right}"},
    ]


def lesson(rng: random.Random, judgements: float = 0.5) -> Chat:
    """One chat to learn from; a share of them are judgements."""
    scene = world.random_scene(rng, rng.choice(world.concepts("train")))
    if rng.random() < judgements:
        return judgement(rng, scene)
    kind = rng.choice(list(TASKS))
    shown = world.caption(scene)
    if kind != "conversation" or rng.random() < 0.3:
        box = [round(rng.random(), 3) for _ in range(4)]
        shown += f"\n\n{scene.shape}: {box}"
    return [*asked(kind, shown), {"role": "assistant", "content": written(kind, scene)}]


# --- the model


def new_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with the space before them, and line breaks; numbers of boxes are all unknown."""
    split = pre_tokenizers.Split(Regex(r"\n| ?[^\s]+"), "isolated")
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text) if "0." not in word)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
        additional_special_tokens=list(SPECIAL[3:]),
    )  # fmt: skip
    fast.chat_template = TURNS
    return fast


def train(
    output: Path,
    draw: Callable[[random.Random], Chat],
    steps: int,
    width: int = 96,
    layers: int = 2,
    rows: int = 48,
    rate: float = 4e-3,
) -> None:
    """Train a chat model on its own answers in drawn chats, and save it with its tokenizer."""
    rng = random.Random("chat")
    torch.manual_seed(0)
    samples = [draw(rng) for _ in range(2000)]
    tokenizer = new_tokenizer([turn["content"] for chat in samples for turn in chat])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(steps):
        chats = [draw(rng) for _ in range(rows)]
        encoded = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        heads = [
            tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True) for chat in chats
        ]
        batch = tokenizer(encoded, return_tensors="pt", padding=True, padding_side="right")
        labels = batch.input_ids.clone()
        for number, head in enumerate(heads):
            labels[number, : len(tokenizer(head).input_ids)] = -100
        labels[batch.attention_mask == 0] = -100
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            print(
                f"chat model: step {step + 1} of {steps}, loss {loss.item():.4f}, {time.time() - start:.0f} s",
                flush=True,
            )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def prompts(folder: Path) -> Path:
    """The short prompts of the model, in the layout that `--prompts` reads."""
    for kind, task in TASKS.items():
        inner = folder / FOLDERS[kind]
        inner.mkdir(parents=True, exist_ok=True)
        (inner / "system_message.txt").write_text(task)
    return folder


def rules(path: Path) -> Path:
    """The short rule of the judge, in the form that `--rules` reads."""
    path.write_text(json.dumps({"llava_bench_conv": {"role": "Assistant", "prompt": RULE}}))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/chat"))
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()
    train(args.output, lesson, args.steps)


if __name__ == "__main__":
    main()
