"""A toy chat model of the small world: it turns captions into questions and answers, and it judges answers.

    python examples/aim_tiny/chat.py --output build/chat --steps 250

It stands where a real instruction model would: a causal model of transformers with a tokenizer and a chat template,
a million parameters, trained for a minute on texts that are written here by rules. It begins as aim-tiny's language
model, which can copy; from random weights it does not learn to judge. It knows nothing but this world. `prompts` and
`rules` are the short prompts that it was trained with.

As a judge it thinks before it answers, in special tokens that decoding drops: `<red> <good>`, the right answer, then
each answer again and its score. A score is so read off the latest thought of the same word, which is copying.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import world
from support import OUT, ROOT
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(ROOT))
from modeling_aim.llava.prompts import FOLDERS
from modeling_aim.llava.rules import SYSTEM

TASKS = {"conversation": "ask and answer", "detail": "describe it", "complex": "think"}
RULE = "give two scores ."
ASKED = ("colour", "shape", "count")
TURNS = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
COUNTS = {word: number for number, word in enumerate(world.COUNTS, 1)}
SPECIAL = ("<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>")
LAYERS, ROWS, RATE = 5, 32, 2e-3
ANSWERED = [
    *world.COLOURS,
    *world.SHAPES,
    *(f"{shape}s" for shape in world.SHAPES),
    "crosses",
    *world.COUNTS,
    "no",
    ".",
]
GOOD = "<good>"  # a thought: the word before it is the right answer
THOUGHTS = [*(f"<{word}>" for word in ANSWERED), GOOD]
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


def pairs(kind: str, scene: world.Scene) -> list[tuple[str, str]]:
    """Questions and answers of a kind but detail."""
    if kind == "complex":
        return [("on which wall is it hard to see ?", f"on a {scene.colour} wall , since it is {scene.colour} .")]
    return list(facts(scene).values())


def written(kind: str, scene: world.Scene) -> str:
    """What the model is to write of a scene."""
    thing = f"{scene.colour} {world.plural(scene)}"
    if kind == "detail":
        return f"the image shows {scene.count} {scene.size} {thing} on {scene.texture} ."
    return "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in pairs(kind, scene))


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


def writing(rng: random.Random, kind: str, scene: world.Scene) -> Chat:
    """Instruction data of a kind to learn from; the boxes are anywhere, since nothing is asked of them."""
    shown = world.caption(scene)
    if kind != "conversation":
        boxes = [[round(rng.uniform(0.01, 0.99), 3) for _ in range(4)] for _ in range(COUNTS[scene.count])]
        shown += "\n\n" + "\n".join(f"{scene.shape}: {box}" for box in boxes)
    return [*asked(kind, shown), {"role": "assistant", "content": written(kind, scene)}]


def judgement(rng: random.Random, scene: world.Scene) -> Chat:
    """A judgement to learn from: 9 for an answer that is right, 2 for one that is not."""
    name = rng.choice(ASKED)
    question, right = facts(scene)[name]
    others = [world.random_scene(rng, rng.choice(world.concepts("train"))) for _ in range(20)]
    wrong = [text for other in others if (text := facts(other)[name][1]) != right] or ["no ."]
    pair = [rng.choice([right, rng.choice(wrong)]) for _ in range(2)]
    scores = " ".join(f"{thought(text)} {9 if text == right else 2}" for text in pair)
    return [
        *judged(world.caption(scene), question, *pair),
        {"role": "assistant", "content": f"{thought(right)} {GOOD} {scores}"},
    ]


def thought(text: str) -> str:
    """The first word of an answer as a special token."""
    return f"<{text.split()[0]}>"


def lesson(rng: random.Random, judgements: float = 0.5) -> Chat:
    """One chat to learn from; a share of them are judgements."""
    scene = world.random_scene(rng, rng.choice(world.concepts("train")))
    if rng.random() < judgements:
        return judgement(rng, scene)
    return writing(rng, rng.choice(list(TASKS)), scene)


# --- the model


def new_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and line breaks; a word is the same token wherever it stands. Numbers of boxes are
    all unknown."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text) if "0." not in word)
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([*SPECIAL, *words, *THOUGHTS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(  # spaces between words, none beside a line break
        [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(), decoders.Replace(Regex(r" ?\n ?"), "\n")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
        additional_special_tokens=[*SPECIAL[3:], *THOUGHTS], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = TURNS
    return fast


@torch.no_grad()
def new_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> PreTrainedModel:
    """aim-tiny's language model, its first layers, with the words of another tokenizer: those that it knows keep their
    vectors, a thought begins as the word of which it is, and all others are drawn at random."""
    whole: Any = AutoModelForImageTextToText.from_pretrained(OUT / "backbone")
    known = AutoTokenizer.from_pretrained(OUT / "backbone")
    config = whole.config.text_config
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    config.num_hidden_layers = layers
    config.layer_types, config.no_rope_layers = config.layer_types[:layers], config.no_rope_layers[:layers]
    model: Any = AutoModelForCausalLM.from_config(config)
    weights = whole.model.language_model.state_dict()
    kept = {name: weights[name] for name in model.base_model.state_dict() if "embed_tokens" not in name}
    model.base_model.load_state_dict(kept, strict=False)
    pairs = ((model.get_input_embeddings().weight, whole.get_input_embeddings().weight),
             (model.get_output_embeddings().weight, whole.get_output_embeddings().weight))  # fmt: skip
    for new, old in pairs:
        torch.nn.init.normal_(new, std=old.std().item())
        for word, row in tokenizer.get_vocab().items():
            pieces = known(word, add_special_tokens=False).input_ids
            plural = len(pieces) == 2 and known.convert_ids_to_tokens(pieces[1]) in ("##s", "##es")
            if word.isalpha() and (len(pieces) == 1 or plural) and pieces[0] != known.unk_token_id:
                new[row] = old[pieces[0]] + (0.3 * old[pieces[1]] if plural else 0)
        for word in THOUGHTS:
            if word[1:-1] in tokenizer.get_vocab():
                new[tokenizer.get_vocab()[word]] = new[tokenizer.get_vocab()[word[1:-1]]]
    return model


def encoded(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels of chats, all `(chats, length)`; labels are -100 but on the last turns."""
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    heads = [tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for row, head in zip(labels, tokenizer(heads).input_ids, strict=True):
        row[: len(head)] = -100
    return batch.input_ids, batch.attention_mask, labels


@torch.no_grad()
def answered(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat]) -> list[bool]:
    """Whether greedy decoding gives the last turn of each chat, every token of it."""
    ids, mask, labels = encoded(tokenizer, chats)
    predicted = model(input_ids=ids, attention_mask=mask).logits[:, :-1].argmax(-1)
    return ((predicted == labels[:, 1:]) | (labels[:, 1:] == -100)).all(-1).tolist()


def train(
    output: Path, draw: Callable[[random.Random], Chat], steps: int, layers: int = LAYERS, rows: int = ROWS
) -> None:
    """Train a chat model on its own answers in drawn chats, and save it with its tokenizer."""
    rng = random.Random("chat")
    torch.manual_seed(0)
    tokenizer = new_tokenizer([turn["content"] for chat in (draw(rng) for _ in range(2000)) for turn in chat])
    model = new_model(tokenizer, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    start = time.time()
    for step in range(steps):
        ids, mask, labels = encoded(tokenizer, [draw(rng) for _ in range(rows)])
        with torch.autocast("cpu", torch.bfloat16):
            logits, target = model(input_ids=ids, attention_mask=mask).logits[:, :-1], labels[:, 1:]
        loss = F.cross_entropy(logits[target != -100].float(), target[target != -100])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            right = answered(model, tokenizer, [draw(rng) for _ in range(64)])
            print(
                f"chat model: step {step + 1} of {steps}, loss {loss.item():.4f}, {sum(right)} of {len(right)} right "
                f"to the last word, {time.time() - start:.0f} s",
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
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    train(args.output, lesson, args.steps)


if __name__ == "__main__":
    main()
