"""What was counted and measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

MARKS = {
    "zero": "k:",
    "full": "C3-",
    "prefix-kv": "C1-",
    "cold": "C0--",
    "cold-half": "C9--",
    "bank": "C2-",
    "bank-kv": "C4-",
    "depth-cold": "C0:",
    "depth-bank": "C2:",
    "depth-bank-kv": "C4:",
}


def mark(method: str, place: int) -> str:
    """The line of a method; methods of others are dashed, in a colour by their place."""
    return MARKS.get(method, f"C{place % 10}" + ("--", "-.")[place // 10 % 2])


def with_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with what they cost beside `zero` and `full` of the same run: counted, and measured where that was done.

    Args:
        rows: of `Counted.as_dict` or `Measurement.as_dict`.

    Returns:
        The rows with `counted_times_zero`, `counted_full_over`, `times_zero`, `full_over`, and, in rows of
        `overhead`, `overhead_ms` and `overhead_share`.
    """
    extended = []
    for row in rows:
        same = {other_row["method"]: other_row for other_row in rows if other_row["shots"] == row["shots"]}
        zero = same.get("zero") or next((other_row for other_row in rows if other_row["method"] == "zero"), None)
        full = same.get("full")
        new = dict(row)
        for name, value in (("", _time), ("counted_", _flops)):
            own, floor, ceiling = (None if compared is None else value(compared) for compared in (row, zero, full))
            new[name + "times_zero"] = own / floor if own and floor else None
            new[name + "full_over"] = ceiling / own if own and ceiling else None
        if row["method"] == "overhead" and zero is not None and _time(row) and _time(zero):
            new["overhead_ms"] = row["around_ms"]["median"]
            new["overhead_share"] = new["overhead_ms"] / _time(zero)
        extended.append(new)
    return extended


def _time(row: dict[str, Any]) -> Any:
    return (row.get("ttft_ms") or {}).get("median")


def _flops(row: dict[str, Any]) -> Any:
    return row["flops"]


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, under `HEADINGS` (of a count alone, `COUNTED_HEADINGS`)."""
    beyond = "*" if row.get("beyond_positions") else ""
    counted = [
        row["method"], str(row["shots"]), f"{row['prompt_tokens']:,}{beyond}", _figure(row["flops"] / 1e12),
        _ratio(row["counted_times_zero"]), _ratio(row["counted_full_over"]),
    ]  # fmt: skip
    if "ttft_ms" not in row:
        return [*counted, _figure(row["kv_bytes"] / 2**20)]
    if row["failed"]:
        return [*counted, row["failed"], "", "", "", "", ""]
    first, token = row["ttft_ms"], row["decode_ms"]
    peak = row["peak_bytes"]
    measured = [
        f"{_figure(first['median'])} ({_figure(first['low'])}-{_figure(first['high'])})",
        _ratio(row["times_zero"]), _ratio(row["full_over"]), "" if token is None else _figure(token["median"]),
        "" if peak is None else _figure(peak / 2**20), _figure(row["measured_kv_bytes"] / 2**20),
    ]  # fmt: skip
    return [*counted, *measured]


_COUNTED = ("method", "shots", "prompt", "TFLOPs", "x zero", "full / x")
COUNTED_HEADINGS = (*_COUNTED, "KV MiB (bf16)")
HEADINGS = (
    *_COUNTED, "first token, ms (quartiles)", "time x zero", "time full / x", "ms a token", "peak MiB", "KV MiB",
)  # fmt: skip


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the table does not say: cost of a call without demonstrations, and prompts that are too long."""
    lines = [
        f"Without demonstrations, the plug-in adds {row['overhead_ms']:.3f} ms to a call whose first token takes "
        f"{_figure(_time(row))} ms ({100 * row['overhead_share']:.3f} %)."
        for row in rows
        if row.get("overhead_ms") is not None
    ]
    beyond = {row["beyond_positions"] for row in rows if row.get("beyond_positions")}
    return [*lines, *(f"* more than the backbone's {positions} positions" for positions in beyond)]


def headings(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The headings that these rows need."""
    return HEADINGS if any("ttft_ms" in row for row in rows) else COUNTED_HEADINGS


def rich_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """For a terminal."""
    table = Table(title=title)
    for number, name in enumerate(headings(rows)):
        table.add_column(name, justify="left" if number == 0 else "right")
    shots = None
    for row in rows:
        if shots is not None and row["shots"] != shots:
            table.add_section()
        shots = row["shots"]
        table.add_row(*cells(row))
    return table


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """For a file."""
    lines = ["| " + " | ".join(headings(rows)) + " |", "|---" * len(headings(rows)) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)]) + "\n"


def picture(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Cost against demonstrations: the first token (FLOPs where nothing was measured), KV, and peak memory.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('A picture needs matplotlib: pip install "modeling-aim[demo]"') from error
    timed = any("ttft_ms" in row for row in rows)
    figure, axes = plt.subplots(1, 3 if timed else 2, figsize=(14 if timed else 11, 5), layout="constrained")
    for place, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == method and not row.get("failed")]
        values = [_time(row) / 1000 if timed else row["flops"] / 1e12 for row in own]
        shots, line, sign = [row["shots"] for row in own], mark(method, place), "osDv^<>PX"[place % 9]
        axes[0].plot(shots, values, line, marker=sign, markersize=4, label=method)
        if timed:
            low, high = ([row["ttft_ms"][name] / 1000 for row in own] for name in ("low", "high"))
            axes[0].fill_between(shots, low, high, color=axes[0].lines[-1].get_color(), alpha=0.2, linewidth=0)
            peaks = [row["peak_bytes"] / 2**20 if row["peak_bytes"] else float("nan") for row in own]
            axes[2].plot(shots, peaks, line, marker=sign, markersize=4)
            axes[2].set_ylabel("peak memory above the models, MiB")
        axes[1].plot(shots, [row["kv_bytes"] / 2**20 for row in own], line, marker=sign, markersize=4)
    axes[0].set_ylabel("first token, seconds" if timed else "first token, TFLOPs")
    axes[1].set_ylabel("KV in bfloat16, MiB")
    for axis in axes:
        axis.set_xlabel("demonstrations")
        axis.set_xticks(sorted({row["shots"] for row in rows}))
        axis.set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save(folder: Path, about: dict[str, Any], rows: Sequence[dict[str, Any]], title: str) -> None:
    """Write `bench.json`, `bench.md` and `bench.png` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps({**about, "rows": list(rows)}, indent=2) + "\n")
    (folder / "bench.md").write_text("\n".join([f"# {title}\n", markdown(rows), *notes(rows)]) + "\n")
    picture(rows, title, folder / "bench.png")
