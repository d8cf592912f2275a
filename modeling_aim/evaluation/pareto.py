"""Accuracy against what it costs: tokens, KV and the time to the first token, with the Pareto front of all methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
COSTS_SHOWN = {
    "prompt_tokens": "prompt tokens",
    "kv_bytes": "KV of the prompt, KiB",
    "first_token_milliseconds": "first token after reading, ms",
}
UNITS = {"kv_bytes": 1024}
CONTROLS = ("aim-random", "-shuffled")  # methods that must fail are on no front
MARKERS = "oosDv^<>pPX*hd"


def is_control(method: str) -> bool:
    """Whether a method is there to fail."""
    plain = method.partition(":")[0]
    return plain == CONTROLS[0] or plain.endswith(CONTROLS[1])


def front(cells: Sequence[Figures], cost: str) -> list[Figures]:
    """The cells of a task that no other beats: none is as good and cheaper, or better and as cheap.

    Args:
        cells: of one task, one a method and number of demonstrations. Controls are left out.
        cost: a key of `COSTS_SHOWN`.

    Returns:
        The cheapest first; of equal ones all.
    """
    known = [cell for cell in cells if cell["mean"] is not None and not is_control(cell["method"])]

    def beaten(cell: Figures) -> bool:
        own = (-cell["mean"], cell[cost])
        others = ((-other["mean"], other[cost]) for other in known)
        return any(a <= own[0] and b <= own[1] and (a, b) != own for a, b in others)

    return sorted((cell for cell in known if not beaten(cell)), key=lambda cell: (cell[cost], cell["mean"]))


def printed(cell: Figures, value: float | None = None, sign: str = "") -> str:
    """A mean, or another figure of a cell, as papers print it: CIDEr times 100, with a digit; else three digits.

    Args:
        cell: of a run, or a row of a comparison.
        value: the figure; the mean when `None`.
        sign: "+" to show it of positive figures too.
    """
    times = cell.get("printed_times", 1)
    return f"{times * (cell['mean'] if value is None else value):{sign}.{3 if times == 1 else 1}f}"


def print_times(axes: Any, task: Figures) -> None:
    """Label the vertical axis of a task as its metric is printed."""
    times = task.get("printed_times", 1)
    if times != 1:
        axes.yaxis.set_major_formatter(lambda value, place: f"{times * value:g}")


def front_table(results: Figures) -> str:
    """Who is on the front of each task, as a markdown table."""
    rows = [["task", "cost", "Pareto front: method, demonstrations (cost, score)"], ["---"] * 3]
    for task in results["tasks"]:
        cells = [cell for cell in results["cells"] if cell["task"] == task["task"]]
        for cost, label in COSTS_SHOWN.items():
            if any(cost not in cell for cell in cells):  # a run of an earlier version
                continue
            unit = UNITS.get(cost, 1)
            names = [f"`{c['method']}` {c['shots']} ({c[cost] / unit:,.0f}, {printed(c)})" for c in front(cells, cost)]
            rows.append([task["task"], label, "; ".join(names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_front(results: Figures, path: Path) -> None:
    """Draw a row for each task and a column for each cost; a line for each method, and the front in black.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    tasks, methods = results["tasks"], list(dict.fromkeys(cell["method"] for cell in results["cells"]))
    order = [*range(0, 20, 2), *range(1, 20, 2)]  # the strong colours first
    colours = {method: colormaps["tab20"](order[number % 20]) for number, method in enumerate(methods)}
    figure = Figure(figsize=(14, 3.3 * len(tasks) + 0.25 * len(methods) / 4 + 0.6), layout="constrained")
    grid = figure.subplots(len(tasks), len(COSTS_SHOWN), squeeze=False)
    lines: dict[str, Any] = {}
    for row, task in enumerate(tasks):
        cells = [c for c in results["cells"] if c["task"] == task["task"] and c["mean"] is not None]
        for column, (cost, label) in enumerate(COSTS_SHOWN.items()):
            axes, unit = grid[row][column], UNITS.get(cost, 1)
            for number, method in enumerate(methods):
                own = sorted((c for c in cells if c["method"] == method), key=lambda c: c["shots"])
                style = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 0.8}
                style |= {"linestyle": ":" if is_control(method) else "-", "color": colours[method], "alpha": 0.85}
                (lines[method],) = axes.plot([c[cost] / unit for c in own], [c["mean"] for c in own], **style)
            best = front(cells, cost)
            (lines["Pareto front"],) = axes.plot(
                [c[cost] / unit for c in best], [c["mean"] for c in best], color="black", linewidth=1.6, marker="o",
                markersize=10, markerfacecolor="none", drawstyle="steps-post", zorder=5,
            )  # fmt: skip
            axes.set(xscale="log", xlabel=label, ylabel=task["metric"], title=task["task"])
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3)
            print_times(axes, task)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
