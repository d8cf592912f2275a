"""Choose demonstrations for each query: at random, by image, by fused tokens, and both image and text (MMICES).

    python examples/bank_retrieval.py

The bank holds many concepts; only a few demonstrations fit a prompt. Those that show the query's own concept help, and
the backbone's own features find them: no second model.
"""

from __future__ import annotations

import argparse
import tempfile

from lesson import ask, load, shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default="hub_configs/aim-tiny", help="AIM repository: a folder or a Hub id")
    parser.add_argument("--lessons", type=int, default=4, help="lessons of 8 concepts each, all in one bank")
    parser.add_argument("--shots", type=int, default=8, help="demonstrations chosen for a query")
    args = parser.parse_args()

    model, processor = load(args.repo)
    lessons = [shapes(ways=8, shots=4, seed=f"retrieval {i}") for i in range(args.lessons)]
    queries = [query for _, asked in lessons for query in asked]
    with tempfile.TemporaryDirectory() as folder:
        bank = model.build_bank((demo for demos, _ in lessons for demo in demos), folder)
        print(f"{len(bank)} demonstrations, {len(queries)} queries, {args.shots} shots")
        for by in ("random", "image", "fused", "mmices"):
            shown = right = 0
            for image, name in queries:
                chosen = bank.select({"image": image, "question": "this is"}, args.shots, by)
                shown += any(name in text.split() for text in chosen.texts)
                right += ask(model, processor, image, demos=bank, shots=args.shots, select=by) == name
            count = len(queries)
            print(f"  {by:7} right {right / count:.2f}   a demonstration has the name {shown / count:.2f}")


if __name__ == "__main__":
    main()
