"""Where fused tokens go in a chat prompt, and which template a demonstration is read in: measured on aim-tiny.

    python examples/aim_tiny/placement.py                # validation split, 2-way 8, 5-way 10, 8-way 16; a table

Fused tokens stand after `<s>` (before the query's turn) or inside the query's turn, between its role and its image.
A demonstration is read as plain words ("<image> this is dax .") or as a turn of the chat template
("USER: <image> what is this ? ASSISTANT: this is dax .").
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace

import torch
from evaluate import CELLS, Bench, Demo, Task, insert, pad, task
from quick import run
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration
from words import BOS, IMAGE, PAD, ids, token_id
from world import WORDINGS

PLACES = ("after <s>", "in the turn")
READINGS = {"plain": WORDINGS["this"], "chat template": WORDINGS["chat"]}


@torch.no_grad()
def read(
    model: LlavaForConditionalGeneration, demos: list[Demo], features: torch.Tensor, layers: tuple[int, ...]
) -> tuple[torch.Tensor, list[int]]:
    """States of the text positions of all demonstrations, one after the other, `(fused tokens, layers x width)`, and
    the words there."""
    tokens = pad([demo.ids for demo in demos])
    vectors = insert(model.get_input_embeddings()(tokens), tokens, model, [demo.image for demo in demos], features)
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    last = None if -1 in layers else max(layers)
    states = run(model.model.language_model, vectors, positions, layers=last, kept=layers)
    text = (tokens != token_id(IMAGE)) & (tokens != token_id(PAD)) & (tokens != token_id(BOS))
    return torch.cat([s[text] for s in states], -1).float(), tokens[text].tolist()


@torch.no_grad()
def accuracy(bench: Bench, tasks: list[Task], place: str, reading: str) -> float:
    """Part of the tasks answered right in one variant."""
    model, form = bench.backbone, READINGS[reading]
    plugin = bench.plugins["aim"]
    right = 0
    for t in tasks:
        names = [demo.text for demo in t.demos]
        pairs = zip(t.demos, names, strict=True)
        demos = [replace(demo, head=form.head, text=form.demonstration(name)) for demo, name in pairs]
        states, words = read(model, demos, bench.features, plugin.read_layers)
        head = ids(t.query.head) if place == "in the turn" else []
        rest = t.query.prompt[len(head) :]
        gold = ids(t.query.answer)
        tokens = pad([[token_id(BOS), *head, *words, *rest, *gold]])
        vectors = insert(model.get_input_embeddings()(tokens), tokens, model, [t.query.image], bench.features)
        positions, start = torch.arange(tokens.shape[1]).expand(tokens.shape), 1 + len(head)
        places = (positions >= start) & (positions < start + len(words))
        hidden = run(model.model.language_model, vectors, positions, places=places, entering=plugin.entering(states))
        predicted_ids = model.lm_head(hidden[0, -len(gold) - 1 : -1]).argmax(-1).tolist()
        right += predicted_ids == gold
    return right / len(tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--cells", default="2-way 8,5-way 10,8-way 16")
    args = parser.parse_args()
    cells = args.cells.split(",")
    bench = Bench(args.split, methods=("aim",))
    table = Table("query", "fused tokens", "read as", *cells)
    for wording, (place, reading) in itertools.product(("this", "chat"), itertools.product(PLACES, READINGS)):
        if place == "in the turn" and not WORDINGS[wording].head:
            continue
        scores = []
        for cell in cells:
            tasks = [task(f"0.{e}", *CELLS[cell], args.split, wording) for e in range(args.episodes)]
            tasks = [named(t, args.split, f"0.{e}", cell) for e, t in enumerate(tasks)]
            scores.append(f"{accuracy(bench, tasks, place, reading):.3f}")
        table.add_row(wording, place, reading, *scores)
    Console().print(table)


def named(t: Task, split: str, seed: str, cell: str) -> Task:
    """The task with the bare names in place of the words of its demonstrations."""
    import world

    p = world.plan_of(seed, *CELLS[cell], split)
    return replace(t, demos=[replace(d, text=p.bindings[way]) for d, (way, _) in zip(t.demos, p.demos, strict=True)])


if __name__ == "__main__":
    main()
