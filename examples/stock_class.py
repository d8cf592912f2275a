"""Ask a stock class of transformers from demonstrations, without training and without the plug-in's class.

    python examples/stock_class.py

The model is a plain `LlavaForConditionalGeneration`; what is new is one argument of its `generate`. The demonstrations
are drawn shapes with made-up names that it did not meet in training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lesson import AIM_TINY, ask, shapes
from transformers import AutoModelForImageTextToText, AutoProcessor

AIM_GENERATE = str(Path(__file__).resolve().parents[1] / "hub_configs" / "aim-generate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=f"{AIM_TINY}/backbone", help="a vision-language model: folder or Hub id")
    parser.add_argument("--generate", default=AIM_GENERATE, help="the repository with custom_generate/")
    args = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(args.backbone)
    processor = AutoProcessor.from_pretrained(args.backbone)
    demos, queries = shapes(ways=5, shots=2)
    aim = {"custom_generate": args.generate, "trust_remote_code": True, "demos": demos, "processor": processor}
    right = 0
    print(f"{type(model).__name__}, {len(demos)} demonstrations\n  {'name':10} {'without':10} with demonstrations")
    for image, name in queries:
        without, answer = (ask(model, processor, image, **options) for options in ({}, aim))
        right += answer == name
        print(f"  {name:10} {without:10} {answer}")
    print(f"{right} of {len(queries)} right")


if __name__ == "__main__":
    main()
