"""Choose demonstrations for each query: at random, by image, or by fused tokens.

    python examples/bank_retrieval.py

The bank holds many concepts; only a few demonstrations fit a prompt. Those that show the query's own concept help, and
the backbone's own features find them: no second model.
"""

from __future__ import annotations

import argparse
import tempfile

from lesson import AIM_TINY, ask, load, shapes

from modeling_aim import DemonstrationBank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default=AIM_TINY, help="AIM repository: a folder or a Hub id")
    parser.add_argument("--concepts", type=int, default=16, help="concepts in the bank, 8 demonstrations of each")
    parser.add_argument("--queries", type=int, default=4, help="new images of each concept that are asked about")
    parser.add_argument("--shots", type=int, default=8, help="demonstrations chosen for a query")
    args = parser.parse_args()

    model, processor = load(args.repo)
    demos, queries = shapes(args.concepts, shots=8, seed="retrieval", asked=args.queries)
    with tempfile.TemporaryDirectory() as folder:
        bank = DemonstrationBank.build(model, demos, folder)
        print(f"{len(bank)} demonstrations, {len(queries)} queries, {args.shots} shots")
        for by in ("random", "image", "fused"):  # "text" and "mmices" need questions that differ
            named_in_selection = right = 0
            for image, name in queries:
                chosen = bank.select({"image": image, "question": "this is"}, args.shots, by)
                named_in_selection += any(name in text.split() for text in chosen.texts)
                right += ask(model, processor, image, demos=bank, shots=args.shots, select=by) == name
            count = len(queries)
            print(
                f"  {by:7} right {right / count:.2f}   a demonstration has the name {named_in_selection / count:.2f}"
            )


if __name__ == "__main__":
    main()
