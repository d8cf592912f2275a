"""Train a projector for a frozen backbone: naming episodes as a jsonl file, then `aim train`'s own function.

    python examples/train_projector.py --steps 20                                        # the whole path
    python examples/train_projector.py --steps 200 --episodes 1200 --batch-size 16       # learns naming, in minutes

The backbone is that of aim-tiny, the episodes are drawn from its world: a few concepts get made-up names, and a new
image is asked for its name. Any jsonl file of such lines will do (`episodes:` in docs/TRAINING.md).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from lesson import AIM_TINY, ask, shapes

sys.path.insert(0, str(Path(__file__).resolve().parent / "aim_tiny"))
import world

from modeling_aim.training import TrainSettings, train

PLAIN = [wording for wording in world.WORDINGS.values() if wording.question and not wording.head]


def write_episodes(folder: Path, count: int, most: int = 32, seed: str = "train") -> Path:
    """Write `count` naming episodes with up to `most` demonstrations, and their images, below `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    path = folder / "episodes.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps(_episode(folder, rng, most)) + "\n")
    return path


def _episode(folder: Path, rng: random.Random, most: int) -> dict[str, Any]:
    demos = rng.randint(2, most)
    plan = world.plan(rng, min(demos, rng.choice([2, 2, 3, 4, 5, 5, 6, 7, 8, 8])), 0, "train", demos=demos)
    told = [rng.choice(PLAIN)] * (demos + 1) if rng.random() < 0.7 else rng.choices(PLAIN, k=demos + 1)

    def image(pick: tuple[int, int]) -> str:
        concept, index = plan.concept_ids[pick[0]], pick[1]
        name = f"images/{concept}-{index}.png"
        if not (folder / name).exists():
            world.pool_image("train", concept, index).save(folder / name)
        return name

    def pair(pick: tuple[int, int], wording: world.Wording) -> dict[str, str]:
        return {"image": image(pick), "text": wording.demonstration(plan.bindings[pick[0]])}

    asked = {"image": image(plan.query), "question": told[-1].question}
    answer = told[-1].answer.format(plan.bindings[plan.query[0]])
    shown = [pair(pick, wording) for pick, wording in zip(plan.demos, told, strict=False)]
    return {"demos": shown, "queries": [{**asked, "answer": answer}]}


def right(model: Any, processor: Any, episodes: int) -> float:
    """Share of new images of held-out concepts that get their held-out name, 2-way with 8 demonstrations."""
    answers = []
    for number in range(episodes):
        demos, queries = shapes(2, shots=4, seed=f"trained {number}")
        answers += [ask(model, processor, image, demos=demos) == name for image, name in queries]
    return sum(answers) / len(answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=f"{AIM_TINY}/backbone", help="backbone: a folder or a Hub id")
    parser.add_argument("--output", default="build/trained", help="folder of the repository that comes out")
    parser.add_argument("--episodes", type=int, default=300, help="episodes that are written")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()

    path = write_episodes(Path(args.output).with_name(f"{Path(args.output).name}-data"), args.episodes)
    trainer = train(
        TrainSettings(
            backbone=args.backbone,
            data=(f"episodes:{path}",),
            output=args.output,
            steps=args.steps,
            batch_size=args.batch_size,
            shots=32,
            prompts="plain",
            learning_rate=3e-3,
            projector_form="mlp",
            projector_size=512,
            read_layers=(3,),
            dtype="float32",
            log_every=max(1, args.steps // 20),
        )
    )
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    print(f"right on held-out concepts, 2-way, 8 demonstrations: {right(model, model.processor, 20):.2f}")
    print(f"{args.output} is a Hub repository now; its README.md has the curves.")


if __name__ == "__main__":
    main()
