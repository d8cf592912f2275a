"""Does leaving demonstrations out find the right depth? On aim-tiny's backbone, against the accuracy at every depth.

    python examples/aim_tiny/tune.py                                     # three cells, minutes on two cores
    python examples/aim_tiny/tune.py --cells "5-way 10" --episodes 5 --queries 20 --json

    python examples/aim_tiny/tune.py --write build/tune                  # demonstrations of one episode, for aim tune
    aim tune --backbone hub_configs/aim-tiny/backbone --demos build/tune/demos.jsonl --picture build/tune/depth.png

A depth is chosen from the demonstrations alone: from those of one episode, and from those of all episodes of a cell,
each a task of its own. What is right is measured on the queries of other episodes: greedy decoding must give the name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import world
from support import OUT, ROOT, progress

sys.path.insert(0, str(ROOT))
from modeling_aim import AimForConditionalGeneration

CELLS = {"2-way 8": (2, 4), "5-way 10": (5, 2), "8-way 16": (8, 2)}
ROWS = 20  # episodes answered together


def episodes(cell: str, first: int, count: int, split: str, wording: str) -> list[world.Episode]:
    """Episodes of a cell, from seed `first` on."""
    return [world.episode(f"tune.{first + e}", *CELLS[cell], split, wording) for e in range(count)]


def right_by_depth(backbone: Any, asked: Sequence[world.Episode]) -> dict[int, list[bool]]:
    """For each depth which episodes' queries are answered right. Demonstrations are read once, for all depths."""
    whole, one = (
        AimForConditionalGeneration.from_backbone(backbone.backbone, backbone.processor, read_layers=layers)
        for layers in (list(range(1, backbone.config.num_layers)), [1])
    )
    depths = whole.config.read_layers
    processor, right = whole.processor, {depth: [] for depth in depths}
    for start in progress(range(0, len(asked), ROWS), "accuracy at every depth", leave=False):
        rows = asked[start : start + ROWS]
        read = [whole.read(row.demos) for row in rows]
        prompts = [processor.image_text + row.question for row in rows]
        inputs = processor(images=[[row.image] for row in rows], text=prompts, padding=True, return_tensors="pt")
        for place, depth in enumerate(depths):
            one.set_depth(depth)
            fused = [
                replace(f, vectors=f.vectors.unflatten(-1, (len(depths), -1))[:, place], source=one.source)
                for f in read
            ]
            new = one.generate(**inputs, demos=fused, max_new_tokens=3, do_sample=False)[
                :, inputs["input_ids"].shape[1] :
            ]
            answers = processor.batch_decode(new, skip_special_tokens=True)
            right[depth] += [text.split()[:1] == [row.name] for text, row in zip(answers, rows, strict=True)]
    return right


def write_demonstrations(folder: Path, cell: str, split: str) -> None:
    """The demonstrations of one episode as `aim tune` reads them: images, and a label each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, demo in enumerate(episodes(cell, 0, 1, split, "this")[0].demos):
        demo["image"].save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "label": demo["text"].split()[2]}) + "\n")
    (folder / "demos.jsonl").write_text("".join(lines))
    print(f"{folder / 'demos.jsonl'}: {len(lines)} demonstrations")


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def study(model: Any, cell: str, count: int, queries: int, split: str, wording: str) -> dict[str, Any]:
    """What is chosen in a cell, and how right each depth is there."""
    own = episodes(cell, 0, count, split, wording)
    right = right_by_depth(model, episodes(cell, count, queries, split, wording))
    accuracy = {depth: mean(row) for depth, row in right.items()}
    pooled = model.choose_depth([episode.demos for episode in own], most=max(CELLS[cell][0] * CELLS[cell][1], 2))
    each = [model.choose_depth(episode.demos) for episode in progress(own, "choose by episode", leave=False)]
    return {
        "accuracy_by_depth": accuracy,
        "best": max(accuracy.values()),
        "pooled": {"depth": pooled.depth, "accuracy": accuracy[pooled.depth], "verdict": pooled.verdict},
        "log_likelihood_by_depth": {row.name: round(row.log_likelihood, 4) for row in pooled.rows},
        "by_episode": {
            "depths": dict(sorted(Counter(choice.depth for choice in each).items())),
            "beats_words": sum(choice.beats_words for choice in each),
            "accuracy": mean([accuracy[choice.depth] for choice in each]),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=",".join(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--episodes", type=int, default=20, help="episodes whose demonstrations choose")
    parser.add_argument("--queries", type=int, default=100, help="other episodes, on which accuracy is measured")
    parser.add_argument("--split", choices=world.SPLITS, default="test")
    parser.add_argument("--wording", choices=world.WORDINGS, default="this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--write", type=Path, help="only write the demonstrations of the last cell's first episode here"
    )
    args = parser.parse_args()
    if args.write is not None:
        write_demonstrations(args.write, args.cells.split(",")[-1], args.split)
        return
    torch.manual_seed(0)
    model = AimForConditionalGeneration.from_backbone(OUT / "backbone")
    report = {
        cell: study(model, cell, args.episodes, args.queries, args.split, args.wording)
        for cell in args.cells.split(",")
    }
    if args.json:
        print(json.dumps(report, indent=1))
        return
    depths = next(iter(report.values()))["accuracy_by_depth"]
    lines = [["demonstrations", *(f"depth {k}" for k in depths), "chosen, pooled", "chosen by episode"]]
    lines.append(["---"] * len(lines[0]))
    for cell, figures in report.items():
        pooled, each = figures["pooled"], figures["by_episode"]
        chosen = ", ".join(f"{depth}: {count}" for depth, count in each["depths"].items())
        lines.append(
            [cell, *(f"{value:.3f}" for value in figures["accuracy_by_depth"].values()),
             f"{pooled['depth']} ({pooled['accuracy']:.3f})", f"{chosen} ({each['accuracy']:.3f})"]
        )  # fmt: skip
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
