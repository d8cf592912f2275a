"""How cost grows: from 1 to 256 demonstrations in a prompt, and from 1 000 to 1 000 000 in a bank.

    python -m modeling_aim.speed.growth --shape llava-1.5-7b --output build/growth   # tables and a picture; a minute
    python -m modeling_aim.speed.growth --shape all --shots 16 --output build/growth  # all methods and shapes; minutes
    python -m modeling_aim.speed.growth --shape tiny --bank 1000 --measured 1000       # seconds

All figures of prompts are counted (`counting.py`). A bank's size follows from what it stores, its reading cost from
the count; opening and selecting are measured on banks of random content of the sizes `--measured`, and beyond the
largest of them extended in proportion to it, which is marked. With `--bench FOLDER/bench.json`, a file of `aim bench`,
the table has the share of selecting in a first token.
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

AIM_READY, AIM_COLD = ("bank", "bank-kv"), ("cold", "depth-cold")
READY = ("zero", "full", "prefix-kv", *NAMES, *AIM_READY)  # emloc with all rows: it keeps what the data say
GROWN = (*(name.replace("snapkv", "snapkv:ratio=.9") for name in READY), *AIM_COLD)
READ = tuple(name for name in COLD_NAMES if name != "emloc-cold")  # how often that one tries follows from the data
READING = ("full", *READ, *AIM_COLD)
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BANKS = (1_000, 10_000, 100_000, 1_000_000)
WHOLE = 10_000  # demonstrations of a bank that is written with all of their tokens
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
            marks = {n: "*" if longest and own[n]["positions"] > longest else "" for n in shots}
            lines.append([f"`{name}`", *(number(own[n][key] / unit) + marks[n] for n in shots)])
        parts.append(table([title, *map(str, shots)], lines))
    return "\n".join(parts)


def by_shape(shapes: Sequence[str], shots: int) -> list[dict[str, Any]]:
    """What each method costs at each shape, with what can be read before the query and without."""
    rows = []
    for shape in shapes:
        twin = twin_of(shape)
        for name in dict.fromkeys((*READY, *READING)):
            cost = count(twin, name, 0 if name == "zero" else shots)
            rows.append({"shape": shape, "visual_tokens": twin.picture.tokens, **cost.as_dict()})
    return rows


def shapes_tables(rows: Sequence[dict[str, Any]]) -> str:
    """A row a shape, a column a method: TFLOPs, with demonstrations that were read before or not, and MiB of KV."""
    parts = []
    for title, methods, key, unit in (
        ("TFLOPs to the first token", READY, "flops", 1e12),
        ("the same, reading included", READING, "flops", 1e12),
        ("KV in MiB (bfloat16)", READY, "kv_bytes", 2**20),
    ):
        lines = []
        for shape, tokens in dict.fromkeys((row["shape"], row["visual_tokens"]) for row in rows):
            own = {row["method"]: row[key] / unit for row in rows if row["shape"] == shape}
            lines.append([f"`{shape}` ({tokens:,})", *(number(own[name]) for name in methods)])
        parts.append(table([title, *(f"`{name}`" for name in methods)], lines))
    return "\n".join(parts)


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
    """Open and select from a bank of random content; large ones have a token a demonstration, to save disk."""
    place = Path(tempfile.mkdtemp(prefix="aim-bank-", dir=folder))
    try:
        write(place, size, DEMO_TOKENS if size <= WHOLE else 1)
        return measure(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def bank_table(rows: Sequence[dict[str, Any]], answer_ms: float | None = None) -> str:
    """Markdown.

    Args:
        rows: of `bank_rows`.
        answer_ms: of a first token from demonstrations that are chosen, to say how much selecting adds.
    """
    heads = ["demonstrations", "bank, GB", "KV of their words, GB", "KV of images and words, GB", "reading, PFLOPs",
             "open, ms", f"select {SHOTS} by image, ms"]  # fmt: skip
    names = ("bank_gb", "word_kv_gb", "whole_kv_gb", "read_pflops", "open_ms", "select_ms")
    lines = []
    for row in rows:
        extended = "" if row["measured"] else " (extended)"
        marks = [extended if name.endswith("_ms") else "" for name in names]
        values = [number(row[name]) + mark for name, mark in zip(names, marks, strict=True)]
        lines.append([f"{row['demonstrations']:,}", *values])
        if answer_ms is not None:
            share = row["select_ms"] / (row["select_ms"] + answer_ms)
            lines[-1].append(f"{100 * share:.1f} %{extended}")
    if answer_ms is not None:
        heads.append(f"selecting, of a first token ({number(answer_ms)} ms more)")
    return table(heads, lines)


def answer_time(path: Path) -> float:
    """Milliseconds to the first token of `depth-bank` with the most demonstrations, in a file of `aim bench`.

    Raises:
        ValueError: it was not measured.
    """
    rows = [
        row for row in json.loads(path.read_text())["rows"] if row["method"] == "depth-bank" and row.get("ttft_ms")
    ]
    if not rows:
        raise ValueError(f"{path} has no measured depth-bank: run aim bench --methods zero,depth-bank first.")
    return float(max(rows, key=lambda row: row["shots"])["ttft_ms"]["median"])


def picture(rows: Sequence[dict[str, Any]], banks: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """FLOPs and KV against demonstrations; and bytes of a bank, where banks were asked for.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14 if banks else 10, 5), layout="constrained")
    panels = figure.subplots(1, 3 if banks else 2)
    left, middle = panels[:2]
    curves: dict[Any, list[str]] = {}  # methods of the same cost are one line
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        points = tuple((row["shots"], float(f"{row['flops']:.3g}"), row["kv_bytes"]) for row in own)
        curves.setdefault(points, []).append(name)
    for place, (points, names) in enumerate(curves.items()):
        shots, flops, kept = zip(*points, strict=True)
        style = {"marker": "osDv^<>"[place % 7], "markersize": 4, "color": f"C{place % 10}", "linewidth": 1.2}
        style["linestyle"] = "-" if place < 10 else "--"
        left.plot(shots, [value / 1e12 for value in flops], label=", ".join(names), **style)
        middle.plot(shots, [value / 2**20 for value in kept], **style)
    left.set(ylabel="TFLOPs to the first token", xlabel="demonstrations")
    middle.set(ylabel="KV of the prompt, MiB", xlabel="demonstrations")
    if banks:
        right = panels[2]
        for name, label in (("whole_kv_gb", "KV, images and words"), ("word_kv_gb", "KV, words"), ("bank_gb", "bank")):
            right.plot([row["demonstrations"] for row in banks], [row[name] for row in banks], marker="o", label=label)
        right.set(ylabel="GB on disk", xlabel="demonstrations")
        right.legend(fontsize=8)
    for axes in panels:
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llava-1.5-7b", help=f"all, or one of {', '.join(SHAPES)}")
    parser.add_argument("--shots", type=int, nargs="+", default=list(POWERS))
    parser.add_argument("--bank", type=int, nargs="*", default=list(BANKS), help="sizes of banks; none: no banks")
    parser.add_argument("--measured", type=int, nargs="+", default=[1_000, 10_000], help="banks that are written")
    parser.add_argument("--folder", type=Path, help="where these are put meanwhile")
    parser.add_argument("--bench", type=Path, help="bench.json of aim bench, with depth-bank measured")
    parser.add_argument("--output", type=Path, help="folder for growth.md, growth.json and growth.png; or shapes.*")
    args = parser.parse_args()
    name, rows = "growth", []
    if args.shape == "all":
        name, rows = "shapes", by_shape([shape for shape in SHAPES if shape != "tiny"], args.shots[0])
        report, found = shapes_tables(rows), {"shapes": rows}
    else:
        twin = twin_of(args.shape)
        rows = by_shots(twin, args.shots, GROWN)
        banks = bank_rows(twin, args.bank, args.measured, args.folder) if args.bank else []
        answer_ms = None if args.bench is None else answer_time(args.bench)
        report = grown_tables(rows, longest_prompt(twin.config))
        report += "\n" + bank_table(banks, answer_ms) if banks else ""
        found = {"prompts": rows, "banks": banks}
    print(report)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{name}.md").write_text(report)
        (args.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        if name == "growth":
            title = f"{args.shape}, {twin.picture.tokens} visual tokens an image"
            picture(rows, banks, title, args.output / "growth.png")


if __name__ == "__main__":
    main()
