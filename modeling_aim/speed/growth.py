"""How cost grows: from 1 to 256 demonstrations in a prompt, and from 1 000 to 1 000 000 in a bank.

    python -m modeling_aim.speed.growth --shape llava-1.5-7b --output build/growth     # tables and a picture; minutes
    python -m modeling_aim.speed.growth --shape all --shots 16                         # all methods, all shapes
    python -m modeling_aim.speed.growth --shape tiny --bank 1000 --measured 1000       # seconds

All figures of prompts are counted (`counting.py`). A bank's size follows from what it stores, its reading cost from
the count; opening and selecting are measured on banks of random content of the sizes `--measured`, and beyond the
largest of them extended in proportion to it, which is marked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..backbone_aim import longest_prompt
from .bank import FEATURES, SHOTS, measure, write
from .baselines import COLD_NAMES, NAMES
from .counting import DEMO_TOKENS, Twin, analytic_kv, count
from .shapes import SHAPES, shape_config, shape_picture

GROWN = ("zero", "full", "prefix-kv", "text-kv", "parallel-icl", "fastv", "catp", "snapkv:ratio=.9", "task-vector",
         "cold", "bank", "bank-kv")  # fmt: skip
OTHERS = ("prefix-kv", *NAMES, *COLD_NAMES)  # emloc is counted as prefix-kv is: what it keeps follows from the data
LEFT_OUT = ("emloc", "emloc-cold")
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BANKS = (1_000, 10_000, 100_000, 1_000_000)
SELECTED = f"select {SHOTS} by image: median of the next 11, ms"


def twin_of(shape: str) -> Twin:
    """A shape without weights."""
    return Twin(shape_config(shape), picture=shape_picture(shape))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]) + "\n"


def number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def by_shots(twin: Twin, shots: Sequence[int], methods: Sequence[str]) -> list[dict[str, Any]]:
    """What each method costs with each number of demonstrations."""
    return [count(twin, name, n if name != "zero" else 0).as_dict() | {"shots": n} for name in methods for n in shots]


def grown_tables(rows: Sequence[dict[str, Any]], longest: int | None) -> str:
    """TFLOPs and MiB of KV, a row a method; `*`: more positions than the backbone has."""
    shots = sorted({row["shots"] for row in rows})
    parts = []
    for title, key, unit in (
        ("TFLOPs to the first token", "flops", 1e12),
        ("KV in MiB (bfloat16)", "kv_bytes", 2**20),
    ):
        lines = []
        for name in dict.fromkeys(row["method"] for row in rows):
            own = {row["shots"]: row for row in rows if row["method"] == name}
            marks = {n: "*" if longest and own[n]["prompt_tokens"] > longest else "" for n in shots}
            lines.append([f"`{name}`", *(number(own[n][key] / unit) + marks[n] for n in shots)])
        parts.append(table([title, *map(str, shots)], lines))
    return "\n".join(parts)


def shapes_tables(shapes: Sequence[str], shots: int) -> str:
    """All methods at each shape: TFLOPs and MiB of KV."""
    methods = [
        "zero",
        "full",
        *(name for name in OTHERS if name not in LEFT_OUT),
        "cold",
        "bank",
        "bank-kv",
        "depth-cold",
    ]
    by_shape = {shape: [count(twin_of(shape), m, 0 if m == "zero" else shots) for m in methods] for shape in shapes}
    heads = ["shape", *(f"`{m}`" for m in methods)]
    flops = [[f"`{shape}`", *(number(cost.flops / 1e12) for cost in row)] for shape, row in by_shape.items()]
    kept = [[f"`{shape}`", *(number(cost.kv_bytes / 2**20) for cost in row)] for shape, row in by_shape.items()]
    return f"TFLOPs\n\n{table(heads, flops)}\nKV, MiB\n\n{table(heads, kept)}"


def bank_rows(twin: Twin, sizes: Sequence[int], measured: Sequence[int], folder: Path | None) -> list[dict[str, Any]]:
    """What a bank of each size takes: disk, reading, opening, selecting; and the same demonstrations as KV.

    Args:
        twin: the backbone.
        sizes: demonstrations.
        measured: sizes that are written and measured.
        folder: where they are put meanwhile.
    """
    text = twin.config.get_text_config()
    token = text.hidden_size + 4 + 4  # int8, scale and id
    a_demo = DEMO_TOKENS * token + 3 * FEATURES * 2 + 32 + 32  # with features, key and words
    words, whole = (analytic_kv(text, tokens) for tokens in (DEMO_TOKENS, DEMO_TOKENS + twin.picture.tokens))
    read = count(twin, "depth-cold", 1).flops - count(twin, "depth-bank", 1).flops
    times = {size: _measured(size, folder) for size in measured}
    largest = max(measured)
    rows = []
    for size in sizes:
        own = times.get(size) or {name: value * size / largest for name, value in times[largest].items()}
        rows.append(
            {
                "demonstrations": size, "bank_gb": size * a_demo / 1e9, "word_kv_gb": size * words / 1e9,
                "whole_kv_gb": size * whole / 1e9, "read_pflops": size * read / 1e15, "open_ms": own["open ms"],
                "select_ms": own[SELECTED], "measured": size in times,
            }
        )  # fmt: skip
    return rows


def _measured(size: int, folder: Path | None) -> dict[str, float]:
    """Open and select from a bank of random content."""
    place = Path(tempfile.mkdtemp(prefix="aim-bank-", dir=folder))
    try:
        write(place, size, 1)
        return measure(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def bank_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ["demonstrations", "bank, GB", "KV of their words, GB", "KV of images and words, GB", "reading, PFLOPs",
             "open, ms", f"select {SHOTS} by image, ms"]  # fmt: skip
    names = ("bank_gb", "word_kv_gb", "whole_kv_gb", "read_pflops", "open_ms", "select_ms")
    lines = []
    for row in rows:
        extended = "" if row["measured"] else " (extended)"
        marks = [extended if name.endswith("_ms") else "" for name in names]
        values = [number(row[name]) + mark for name, mark in zip(names, marks, strict=True)]
        lines.append([f"{row['demonstrations']:,}", *values])
    return table(heads, lines)


def picture(rows: Sequence[dict[str, Any]], banks: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Three panels: FLOPs and KV against demonstrations, and bytes of a bank.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for place, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = [row for row in rows if row["method"] == name]
        style = {"marker": "osDv^<>"[place % 7], "markersize": 4, "color": f"C{place % 10}", "linewidth": 1.2}
        style["linestyle"] = "-" if place < 10 else "--"
        shots = [row["shots"] for row in own]
        left.plot(shots, [row["flops"] / 1e12 for row in own], label=name, **style)
        middle.plot(shots, [row["kv_bytes"] / 2**20 for row in own], **style)
    left.set(ylabel="TFLOPs to the first token", xlabel="demonstrations")
    middle.set(ylabel="KV of the prompt, MiB", xlabel="demonstrations")
    for name, label in (("whole_kv_gb", "KV of images and words"), ("word_kv_gb", "KV of words"), ("bank_gb", "bank")):
        right.plot([row["demonstrations"] for row in banks], [row[name] for row in banks], marker="o", label=label)
    right.set(ylabel="GB on disk", xlabel="demonstrations")
    for axes in (left, middle, right):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1.5-7b", help=f"all, or one of {', '.join(SHAPES)}")
    parser.add_argument("--shots", type=int, nargs="+", default=list(POWERS))
    parser.add_argument("--bank", type=int, nargs="*", default=list(BANKS), help="sizes of banks; none: no banks")
    parser.add_argument("--measured", type=int, nargs="+", default=[1_000, 10_000], help="banks that are written")
    parser.add_argument("--folder", type=Path, help="where these are put meanwhile")
    parser.add_argument("--output", type=Path, help="folder for growth.md, growth.json and growth.png")
    args = parser.parse_args()
    if args.shape == "all":
        print(shapes_tables([shape for shape in SHAPES if shape != "tiny"], args.shots[0]))
        return
    twin = twin_of(args.shape)
    rows = by_shots(twin, args.shots, GROWN)
    banks = bank_rows(twin, args.bank, args.measured, args.folder) if args.bank else []
    report = grown_tables(rows, longest_prompt(twin.config)) + ("\n" + bank_table(banks) if banks else "")
    print(report)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "growth.md").write_text(report)
        (args.output / "growth.json").write_text(json.dumps({"prompts": rows, "banks": banks}, indent=1) + "\n")
        picture(rows, banks, f"{args.shape}, {twin.picture.tokens} visual tokens an image", args.output / "growth.png")


if __name__ == "__main__":
    main()
