"""Train a projector for a frozen backbone: naming episodes as a jsonl file, then `aim train`'s own function.

    python examples/train_projector.py --steps 20                                        # the whole path
    python examples/train_projector.py --steps 200 --episodes 1200 --batch-size 16       # learns naming, in minutes

The backbone is that of aim-tiny, the episodes are drawn from its world: a few concepts get made-up names, and a new
image is asked for its name. Any jsonl file of such lines will do (`episodes:` in docs/TRAINING.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lesson import AIM_TINY, ask, shapes

sys.path.insert(0, str(Path(__file__).resolve().parent / "aim_tiny"))
from tasks import few_or_many, training_episodes, write_episodes

from modeling_aim.training import TrainSettings, train


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
    parser.add_argument("--episodes", type=int, default=300, help="episodes that are written, of two queries each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--asked", type=int, default=20, help="episodes that are answered at the end")
    args = parser.parse_args()

    data = Path(args.output).with_name(f"{Path(args.output).name}-data")
    made = training_episodes("link_context", args.episodes, few_or_many(32))
    trainer = train(
        TrainSettings(
            backbone=args.backbone,
            data=(f"episodes:{write_episodes(data / 'episodes.jsonl', made)}",),
            output=args.output,
            steps=args.steps,
            batch_size=args.batch_size,
            shots=32,
            prompts="mixed",
            log_every=max(1, args.steps // 20),
        )
    )
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    print(f"right on held-out concepts, 2-way, 8 demonstrations: {right(model, model.processor, args.asked):.2f}")
    print(f"{args.output} is a Hub repository now; its README.md has the curves.")


if __name__ == "__main__":
    main()
