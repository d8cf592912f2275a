"""Read demonstrations once into a bank, then ask many questions; the next run opens the bank and reads nothing.

    python examples/bank_ask_many.py --bank my-bank

The demonstrations are drawn shapes with made-up names that neither backbone nor projector of aim-tiny met in training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lesson import AIM_TINY, ask, load, shapes

from modeling_aim import DemonstrationBank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default=AIM_TINY, help="AIM repository: a folder or a Hub id")
    parser.add_argument("--bank", type=Path, required=True, help="folder of the bank")
    args = parser.parse_args()

    model, processor = load(args.repo)
    demos, queries = shapes(ways=5, shots=4)
    start = time.perf_counter()
    bank = DemonstrationBank.build(model, demos, args.bank)  # resumes after an interrupt; a finished bank is opened
    print(f"bank: {len(bank)} demonstrations, {bank.num_tokens} fused tokens in {time.perf_counter() - start:.2f} s")

    prefix = model.prefill(bank)  # the keys and values of the fused tokens, too, are computed once
    right = 0
    start = time.perf_counter()
    for image, name in queries:
        answer = ask(model, processor, image, demos=prefix)
        right += answer == name
        print(f"  {name:10} {answer}")
    print(f"{right} of {len(queries)} right, {1000 * (time.perf_counter() - start) / len(queries):.0f} ms a question")


if __name__ == "__main__":
    main()
