"""The main job, with a picture: images get made-up names in demonstrations; who can use the names afterwards?

    python examples/demo.py --output demo.png

Loads `hub_configs/aim-tiny` as remote code through the stock pipeline, leaves its projector out, shows it
demonstrations of concepts and names that the backbone never met in training, and asks for one of each. Beside AIM
without training it answers without demonstrations, from their text alone, and from all of their images in one prompt.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from transformers import logging as transformers_logging
from transformers import pipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "aim_tiny")]
import world  # noqa: E402
from lesson import shapes  # noqa: E402

METHODS = {
    "zero-shot": "no demonstrations",
    "text only": "the demonstrations' words, no images",
    "full": "every image in the prompt",
    "AIM, untrained": "fused tokens, read once",
}


def prompts(demos: list[dict[str, Any]], query: Any, question: str, fused: Any) -> dict[str, dict[str, Any]]:
    """What each method puts into the pipeline for one query."""
    words = [demo["text"] for demo in demos]
    ask = f"<image> {question}"
    return {
        "zero-shot": {"images": query, "text": ask},
        "text only": {"images": query, "text": " ".join([*words, ask])},
        "full": {
            "images": [*(demo["image"] for demo in demos), query],
            "text": " ".join([*(f"<image> {text}" for text in words), ask]),
        },
        "AIM, untrained": {"images": query, "text": ask, "demos": fused},
    }


def ask(pipe: Any, inputs: dict[str, Any]) -> tuple[str, int, float]:
    """Answer, prompt tokens and milliseconds (image processing included)."""
    fused = inputs.get("demos")
    query = {name: inputs[name] for name in ("images", "text")}
    tokens = pipe.processor(**query, return_tensors="pt")["input_ids"].shape[1]
    start = time.perf_counter()
    result = pipe(**inputs, max_new_tokens=4, return_full_text=False, generate_kwargs={"do_sample": False})
    milliseconds = 1000 * (time.perf_counter() - start)
    answer = result[0]["generated_text"].split(".")[0].strip()
    return answer, tokens + (0 if fused is None else fused.num_tokens), milliseconds


def draw(demos: list[dict[str, Any]], rows: list[dict[str, Any]], read_ms: float, output: Path) -> None:
    """The demonstrations on top, then a line for each query: image, name, and what each method said."""
    columns = max(len(demos), 6)
    figure = plt.figure(figsize=(1.15 * columns, 2.6 + 1.1 * len(rows)), dpi=110)
    grid = figure.add_gridspec(
        len(rows) + 2,
        columns,
        height_ratios=[1.25, 0.55, *[1] * len(rows)],
        left=0.02,
        right=0.98,
        top=0.9,
        bottom=0.02,
    )
    figure.suptitle("Made-up names for image concepts that were never seen in training", fontsize=13)
    for i, demo in enumerate(demos):
        axes = figure.add_subplot(grid[0, i])
        axes.imshow(demo["image"])
        axes.set_title(demo["text"], fontsize=8)
        axes.axis("off")
    widths = [0.03, 0.2, *[0.32 + 0.175 * i for i in range(len(METHODS))]]

    def line(row: int, cells: list[tuple[str, str, str]]) -> None:
        axes = figure.add_subplot(grid[row, :])
        axes.axis("off")
        for x, (text, colour, weight) in zip(widths, cells, strict=True):
            axes.text(x, 0.5, text, color=colour, weight=weight, fontsize=10, va="center", transform=axes.transAxes)

    tokens = {name: round(sum(row[name][1] for row in rows) / len(rows)) for name in METHODS}
    times = {name: sorted(row[name][2] for row in rows)[len(rows) // 2] for name in METHODS}
    heads = [(f"{name}\n{tokens[name]} tokens, {times[name]:.0f} ms", "black", "bold") for name in METHODS]
    line(1, [("query", "black", "bold"), ("name", "black", "bold"), *heads])
    for number, row in enumerate(rows, 2):
        axes = figure.add_subplot(grid[number, 0])
        axes.imshow(row["image"])
        axes.axis("off")
        answers = [(row[name][0] or "(nothing)", "green" if row[name][0] == row["name"] else "firebrick", "normal")
                for name in METHODS]  # fmt: skip
        line(number, [("", "black", "normal"), (row["name"], "black", "bold"), *answers])
    figure.text(
        0.02, 0.005, f"AIM read the {len(demos)} demonstrations once, in {read_ms:.0f} ms. aim-tiny, on a CPU.",
        fontsize=8, color="dimgray",
    )  # fmt: skip
    figure.savefig(output)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default=str(ROOT / "hub_configs" / "aim-tiny"))
    parser.add_argument("--ways", type=int, default=5, help="concepts that get a name")
    parser.add_argument("--shots", type=int, default=2, help="demonstrations of each")
    parser.add_argument("--seed", default="demo")
    parser.add_argument("--output", type=Path, default=Path("demo.png"))
    args = parser.parse_args()
    matplotlib.use("agg")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    console = Console()

    pipe = pipeline("image-text-to-text", model=args.repo, trust_remote_code=True)
    untrained = type(pipe.model).from_backbone(pipe.model.backbone, pipe.processor)
    pipe = pipeline("image-text-to-text", model=untrained, processor=pipe.processor)
    demos, queries = shapes(args.ways, args.shots, args.seed)
    question = world.WORDINGS["this"].question
    pipe.model.read(demos)  # warm up, so that the times below are those of a running program
    start = time.perf_counter()
    fused = pipe.model.read(demos)
    read_ms = 1000 * (time.perf_counter() - start)
    for inputs in prompts(demos, queries[0][0], question, fused).values():
        ask(pipe, inputs)

    console.print("Demonstrations: " + " ".join(f"({i + 1}) {d['text']}" for i, d in enumerate(demos)))
    console.print(f"Read once, into {fused.num_tokens} fused tokens, in {read_ms:.0f} ms.\n")
    table = Table("name", *METHODS, title="What is this? Answer, prompt tokens, milliseconds")
    rows = []
    for image, name in queries:
        answers = {method: ask(pipe, inputs) for method, inputs in prompts(demos, image, question, fused).items()}
        cells = [
            f"[{'green' if text == name else 'red'}]{text or '(nothing)'}[/]\n[dim]{tokens} tok, {ms:.0f} ms[/]"
            for text, tokens, ms in answers.values()
        ]
        table.add_row(name, *cells)
        rows.append({"image": image, "name": name, **answers})
    table.add_section()
    right = {method: sum(row[method][0] == row["name"] for row in rows) for method in METHODS}
    table.add_row("right", *(f"{right[method]} of {len(rows)}" for method in METHODS))
    console.print(table)
    draw(demos, rows, read_ms, args.output)
    console.print(f"The same as a picture: {args.output}")


if __name__ == "__main__":
    main()
