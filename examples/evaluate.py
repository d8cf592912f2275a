"""Few-shot evaluation of aim-tiny on five synthetic tasks with all methods: a table and two pictures.

    python examples/evaluate.py --output build/eval                     # minutes
    python examples/evaluate.py --output build/eval --limit 4           # a quick look
    python examples/evaluate.py --output build/published --methods published --shots 2,8,32,128 --episodes 7 \
        --tasks 2-way,5-way,8-way,16-way,operator,counting,attribute,captions,pairs,distractor,two_words    # an hour

A task named `5-way` is `link_context` with five names.

The tasks (`examples/aim_tiny/tasks.py`) are drawn from the test split of aim-tiny's world and written as episode
files, other ones for each seed; then `aim eval`'s own function runs over them. Rerun the same command to resume.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lesson import AIM_TINY

sys.path.insert(0, str(Path(__file__).resolve().parent / "aim_tiny"))
import tasks

from modeling_aim.baselines.methods import BASELINES
from modeling_aim.evaluation import EvalSettings, evaluate
from modeling_aim.evaluation.pareto import draw_front

PUBLISHED = (
    "zero", "text", "full", "aim", "aim-untrained", "aim-untrained-shuffled", "prefix-kv", "text-kv",
    "text-kv-together", "parallel-icl", "fastv", "catp", "snapkv:ratio=.5", "snapkv:ratio=.9", "emloc", "task-vector",
)  # fmt: skip


def write_tasks(folder: Path, names: list[str], count: int, shots: int, seeds: int) -> list[str]:
    """Write `count` episodes of each task for each seed.

    Returns:
        What `aim eval --tasks` takes for each.
    """
    for name in names:
        for seed in range(seeds):
            path = folder / name / f"episodes-{seed}.jsonl"
            if not path.exists():
                part = path.with_suffix(".part")
                task, ways = tasks.named(name)
                tasks.write_episodes(part, tasks.episodes(task, "test", count, shots, seed, ways))
                lines = [json.dumps(with_queries(json.loads(line))) + "\n" for line in part.read_text().splitlines()]
                part.write_text("".join(lines))
                part.rename(path)
    return [f"episodes:{folder / name}/episodes-{{seed}}.jsonl,name={name},match=vqa" for name in names]


def with_queries(episode: dict[str, Any]) -> dict[str, Any]:
    """An episode whose queries are questions with answers; of a caption nothing is asked."""
    queries = [{"question": "", "answer": query.get("text"), **query} for query in episode["queries"]]
    return {**episode, "queries": queries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default=AIM_TINY, help="AIM repository on aim-tiny's backbone")
    parser.add_argument("--output", type=Path, default=Path("build/eval"))
    parser.add_argument("--tasks", default=",".join(tasks.TASKS))
    parser.add_argument("--shots", default="0,2,4,8,16")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=40, help="episodes of a task for each seed")
    parser.add_argument("--limit", type=int, help="answer only as many of them")
    parser.add_argument("--picture", type=Path, help="draw by_cost.png for --picture-tasks alone, to this file")
    parser.add_argument("--picture-tasks", default="5-way,16-way", help="of --tasks")
    parser.add_argument("--methods", default="", help="with commas; AIM's and its controls by default; or 'published'")
    args = parser.parse_args()

    shots = tuple(int(count) for count in args.shots.split(","))
    folder = args.output.with_name(f"{args.output.name}-tasks")
    specs = write_tasks(folder, args.tasks.split(","), args.episodes, max(shots), args.seeds)
    methods = PUBLISHED if args.methods == "published" else tuple(filter(None, args.methods.split(",")))
    published = any(name.partition(":")[0] in BASELINES for name in methods)  # one at a time, so that times compare
    settings = EvalSettings(
        repo=args.repo, tasks=tuple(specs), output=str(args.output), shots=shots, seeds=args.seeds, limit=args.limit,
        batch_size=1 if published else 16, images_at_once=256, methods=methods, skip_too_long=published,
    )  # fmt: skip
    results = evaluate(settings)
    if args.picture is not None:
        kept = [task for task in results["tasks"] if task["task"] in args.picture_tasks.split(",")]
        draw_front({**results, "tasks": kept}, args.picture)
    means = {(cell["task"], cell["method"], cell["shots"]): cell["mean"] for cell in results["cells"]}
    best = "aim" if "aim" in settings.methods else settings.methods[-1]
    print(json.dumps({name: round(means[name, best, max(shots)], 3) for name in args.tasks.split(",")}))
    print(f"{args.output}: results.md, by_shots.png, by_tokens.png, by_cost.png, results.json, predictions.jsonl")


if __name__ == "__main__":
    main()
