"""Draw accuracy by number of demonstrations from what evaluate.py wrote; one number of concepts a picture.

    python examples/aim_tiny/evaluate.py --episodes 200 --out build/by_shots.json \\
        --cells "16-way 16,16-way 32,16-way 64,16-way 128" \\
        --methods full,text_only,aim,aim_shuffled_images,aim_untrained,aim_untrained_shuffled_images
    python examples/aim_tiny/plot.py build/by_shots.json --out docs/aim_tiny_by_shots.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

LINES = {  # method: name, colour, line
    "full": ("full prompt: every image in context", "tab:blue", "-"),
    "full_interleaved": ("full prompt, backbone tuned on many images", "tab:cyan", "-"),
    "aim": ("AIM, trained projector", "tab:red", "-"),
    "aim_untrained": ("AIM without training", "tab:green", "-"),
    "aim_shuffled_images": ("trained, images shuffled", "tab:red", ":"),
    "aim_untrained_shuffled_images": ("without training, images shuffled", "tab:green", ":"),
    "text_only": ("words only", "tab:olive", "--"),
}


def cells_of(report: dict[str, Any], ways: int) -> list[tuple[int, dict[str, Any]]]:
    """Number of demonstrations and figures of every cell with so many concepts.

    Raises:
        ValueError: there is none.
    """
    cells = {cell.split("-way ")[1]: entry for cell, entry in report.items() if cell.startswith(f"{ways}-way ")}
    if not cells:
        raise ValueError(f"No cell has {ways} concepts; there are {', '.join(report)}.")
    return sorted((int(shots), entry) for shots, entry in cells.items())


def draw(report: dict[str, Any], ways: int, title: str) -> Figure:
    """A line for each method, with the range of its seeds; a line ends where its prompts become too long."""
    cells = cells_of(report, ways)
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for method, (name, colour, line) in LINES.items():
        own = [(shots, entry) for shots, entry in cells if entry.get(method) is not None]
        if not own:
            continue
        places = [shots for shots, _ in own]
        tokens = f" ({own[-1][1]['tokens'][method]:,.0f} prompt tokens at {places[-1]})" if line == "-" else ""
        axes.plot(places, [entry[method] for _, entry in own], line, color=colour, marker="o", label=name + tokens)
        low, high = ([edge(entry["by_seed"][method]) for _, entry in own] for edge in (min, max))
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(own) < len(cells):
            axes.annotate("longer: more tokens than\nthe backbone has positions", (places[-1], own[-1][1][method]),
                          (8, 16), textcoords="offset points", color=colour, fontsize=8)  # fmt: skip
    axes.axhline(1 / ways, color="0.4", linewidth=1, linestyle=(0, (1, 1)))
    axes.annotate(f"chance, 1 / {ways}", (cells[0][0], 1 / ways), (-4, 4), textcoords="offset points",
                  color="0.3", fontsize=8)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([shots for shots, _ in cells], [str(shots) for shots, _ in cells])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"demonstrations of {ways} concepts with made-up names")
    axes.set_ylabel("accuracy (exact name)")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="what `evaluate.py --out` wrote")
    parser.add_argument("--ways", type=int, default=16, help="concepts of an episode")
    parser.add_argument("--title", default="aim-tiny, held-out concepts and names; bands: range over seeds")
    parser.add_argument("--out", type=Path, default=Path("docs/aim_tiny_by_shots.png"))
    args = parser.parse_args()
    figure = draw(json.loads(args.report.read_text()), args.ways, args.title)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)
    print(args.out)


if __name__ == "__main__":
    main()
