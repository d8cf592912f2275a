"""What a run shows: a table ready for a model card, results as model card metadata, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.repocard_data import EvalResult

from ..files_aim import write_whole
from .pareto import draw_front, front_table, print_times, printed

REPORT = "results.md"
CURVES = "by_shots.png"
COSTS = "by_tokens.png"
FRONT = "by_cost.png"
HEADING = "## Few-shot evaluation"
SHOWN = (
    "repo", "backbone", "revision", "dtype", "load_in_4bit", "prompts", "select", "balanced", "drop_duplicates",
    "skip_too_long", "seeds", "limit",
)  # fmt: skip
COLOURS = {
    "zero": "0.55", "text": "tab:olive", "full": "tab:blue", "aim": "tab:red", "aim-shuffled": "tab:orange",
    "aim-random": "tab:brown", "aim-untrained": "tab:green", "aim-untrained-shuffled": "tab:cyan",
}  # fmt: skip
Figures = Mapping[str, Any]


def write_report(results: Figures, output: Path) -> None:
    """Write the table, and the pictures where matplotlib is installed, into the output folder."""
    drawn = draw(results, output)
    write_whole(output / REPORT, report(results, drawn).encode())


def report(results: Figures, pictures: Sequence[str] = ()) -> str:
    """Markdown: the table, what it was measured with, and what a reader must know."""
    lines = [HEADING, "", table(results), ""]
    lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures]
    settings = {k: v for k, v in results["settings"].items() if k in SHOWN and v not in (None, False)}
    lines += ["", "Measured by `aim eval` with " + ", ".join(f"{k} `{v}`" for k, v in settings.items()) + "."]
    lines += [
        "Means over seeds ± their standard deviation; of one seed, the 95 % bootstrap interval over examples (all of "
        "them are in results.json). All methods see the same examples with the same demonstrations.",
        "",
    ]
    lines += [parts_table(results, task) + "\n" for task in results["tasks"] if task.get("parts")]
    lines += [curve_table(results), ""] if results["curves"] else []
    lines += [front_table(results), ""] if any(cell["shots"] for cell in results["cells"]) else []
    for task in results["tasks"]:
        metric = task["metric"] + (f" times {task['printed_times']}" if task.get("printed_times", 1) != 1 else "")
        lines.append(f"- {task['task']}: {metric}, {task['examples']} examples a seed; demonstrations "
                     f"{task['demonstrations']}.")  # fmt: skip
        lines += [f"  - {count} demonstrations: {note}" for count, note in task["shots_notes"].items()]
        lines += [f"  - {note}" for note in task["notes"]]
    methods = {cell["method"] for cell in results["cells"]}
    lines += [f"- {name}: {what}." for name, what in results["model"].items() if name in methods]
    lines += [f"- {note}" for note in results["notes"]]
    return "\n".join(lines) + "\n"


def table(results: Figures) -> str:
    """Task x shots x method, with what prompts cost, as a markdown table."""
    methods, lines = cells_by_row(results)
    aim = "aim" if "aim" in methods else "aim-untrained"
    costed = [method for method in ("text", "full", aim) if method in methods]
    fused = [method for method in costed if method == aim]
    heads = ["task", "shots", *(f"`{method}`" for method in methods), *(f"tokens: {method}" for method in costed)]
    heads += ["of them fused" for _ in fused]
    rows = [heads, ["---"] * len(heads)]
    for task, count, cells in lines:
        row = [task, shots_label(results, task, count), *map(_figure, cells.values())]
        row += [_cost(cells[method], "prompt_tokens") for method in costed]
        row += [_cost(cells[method], "fused_tokens") for method in fused]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells_by_row(results: Figures) -> tuple[list[str], list[tuple[str, int, dict[str, Figures | None]]]]:
    """The methods of a run, and for each task and number of demonstrations the cell of each method.

    What is answered without demonstrations stands in every row; it has one of its own if there is no other.
    """
    cells = {(cell["task"], cell["method"], cell["shots"]): cell for cell in results["cells"]}
    methods = list(dict.fromkeys(method for _, method, _ in cells))
    rows = []
    for task in [described["task"] for described in results["tasks"]]:
        counts = sorted({shots for name, _, shots in cells if name == task})
        for count in [count for count in counts if count] or counts:
            rows.append((task, count, {m: cells.get((task, m, count), cells.get((task, m, 0))) for m in methods}))
    return methods, rows


def shots_label(results: Figures, task: str, count: int) -> str:
    """A number of demonstrations, and how many of them are of each class where a task shows as many of each."""
    described = next(described for described in results["tasks"] if described["task"] == task)
    each = described.get("per_class", {}).get(str(count))
    return str(count) if each is None else f"{count} ({each} a class)"


def _cost(cell: Figures | None, name: str) -> str:
    return "–" if cell is None else f"{cell[name]:.0f}"


def curve_table(results: Figures) -> str:
    """VL-ICL's summary of every method over numbers of demonstrations, as a markdown table."""
    rows = [["task", "method", "zero-shot", "peak", "ICL efficiency"], ["---"] * 5]
    names = ("zero_shot", "peak", "icl_efficiency")
    rows += [
        [curve["task"], f"`{curve['method']}`", *(f"{curve[n]:.3f}" for n in names)] for curve in results["curves"]
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parts_table(results: Figures, task: Figures) -> str:
    """The main metric over parts of a task's examples, times 100 as papers print it, as a markdown table."""
    heads = [part.removeprefix(f"{task['metric']}_") for part in task["parts"]]
    rows = [[f"{task['task']}, %", "shots", *heads, "all"], ["---"] * (len(heads) + 3)]
    for cell in results["cells"]:
        if cell["task"] == task["task"]:
            figures = [cell["metrics"].get(name) for name in (*task["parts"], task["metric"])]
            printed_figures = ["–" if figure is None else f"{100 * figure:.2f}" for figure in figures]
            rows.append([f"`{cell['method']}`", str(cell["shots"]), *printed_figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figure(cell: Figures | None) -> str:
    """A mean with its spread over seeds; of one seed, with the interval over examples."""
    if cell is None or cell["mean"] is None:
        return "–"
    if cell["spread"] is not None:
        return f"{printed(cell)} ± {printed(cell, cell['spread'])}"
    between = "" if cell["interval"] is None else " [{}, {}]".format(*(printed(cell, end) for end in cell["interval"]))
    return printed(cell) + between


def eval_results(results: Figures, method: str = "aim") -> list[EvalResult]:
    """The results of one method as model card metadata: `card.data.eval_results = eval_results(results)`."""
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=cell["task"],
            dataset_name=cell["task"],
            dataset_args={"shots": cell["shots"]},
            metric_type=cell["metric"],
            metric_name=f"{cell['metric']}, {cell['shots']} demonstrations",
            metric_value=round(cell["mean"] * cell.get("printed_times", 1), 4),
        )
        for cell in results["cells"]
        if cell["method"] == method and cell["mean"] is not None
    ]


# --- pictures


def draw(results: Figures, output: Path) -> list[str]:
    """Draw the pictures; none where matplotlib is not installed or no demonstrations were shown.

    Returns:
        The names of the files.
    """
    if not any(cell["shots"] for cell in results["cells"]):
        return []
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return []
    _panels(results, output / CURVES, "shots", "demonstrations")
    _panels(results, output / COSTS, "prompt_tokens", "prompt tokens, mean")
    draw_front(results, output / FRONT)
    return [CURVES, COSTS, FRONT]


def _panels(results: Figures, path: Path, across: str, label: str) -> None:
    """A panel for each task, a line for each method."""
    from matplotlib.figure import Figure

    tasks = results["tasks"]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    labelled: dict[str, Any] = {}
    for number, task in enumerate(tasks):
        axes = grid[number // columns][number % columns]
        for name, line in _drawn(axes, results, task, across).items():
            labelled.setdefault(name, line)
        axes.set_title(task["task"], fontsize=10)
        axes.set_ylabel(task["metric"])
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        print_times(axes, task)
    for number in range(len(tasks), lines * columns):
        grid[number // columns][number % columns].axis("off")
    names = min(len(labelled), 2 * columns)  # in a line
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=names, frameon=False)
    figure.savefig(path, dpi=130)


def _drawn(axes: Any, results: Figures, task: Figures, across: str) -> dict[str, Any]:
    """The lines of one panel by method; those with demonstrations begin at the zero-shot point."""
    from matplotlib.ticker import LogLocator, NullLocator

    cells_of_task = [cell for cell in results["cells"] if cell["task"] == task["task"] and cell["mean"] is not None]
    start = [cell for cell in cells_of_task if cell["method"] == "zero"]
    lines = {}
    for method in dict.fromkeys(cell["method"] for cell in cells_of_task):
        cells = sorted((cell for cell in cells_of_task if cell["method"] == method), key=lambda cell: cell["shots"])
        if method == "zero":
            lines[method] = axes.axhline(cells[0]["mean"], color=COLOURS["zero"], linestyle="--", linewidth=1)
            continue
        cells = [*start, *cells]
        places, means = [cell[across] for cell in cells], [cell["mean"] for cell in cells]
        (lines[method],) = axes.plot(places, means, color=COLOURS.get(method), marker="o", markersize=3)
        if all(cell["interval"] for cell in cells):
            low, high = zip(*(cell["interval"] for cell in cells), strict=True)
            axes.fill_between(places, low, high, color=lines[method].get_color(), alpha=0.12, linewidth=0)
    if across == "shots":
        axes.set_xticks(sorted({cell["shots"] for cell in cells_of_task}))
    else:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
    if all(cell["is_mean"] and 0 <= cell["mean"] <= 1 for cell in cells_of_task):
        axes.set_ylim(-0.03, 1.03)
    return lines
