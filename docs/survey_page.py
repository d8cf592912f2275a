"""The page docs/BACKBONES.md, from the results of docs/survey_backbones.py for each model type."""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers

from modeling_aim.checks import PROPERTIES

DTYPES = "float32", "bfloat16", "float16"
STATUS = {
    "works": "a tiny random model of the real class, with its processor, was tried on the properties of `aim check`",
    "answers text": "a small random model reads words and answers with fused tokens; images were not tried",
    "by construction": "the class has what AIM needs; nothing was run",
    "not known": "transformers cannot build it here",
    "cannot": "for the reason given",
}


@dataclass
class Row:
    """The result of a model type in one precision.

    Args:
        model_type: of transformers.
        status: a key of `STATUS`.
        untrained: whether it answers without training: `"yes"`, `"no"`, or `"not known"`.
        remark: what else is to be said, or why.
        tried: how many properties apply to it.
        failed: what went wrong, by the name of the property that does not hold.
        beside: what the backbone itself does otherwise, by the name of the property that does not apply.
        dtype: the precision.
        seconds: how long it took.
    """

    model_type: str
    status: str
    untrained: str
    remark: str = ""
    tried: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    dtype: str = DTYPES[0]
    seconds: float = 0.0

    @property
    def line(self) -> str:
        """The row as it is printed meanwhile."""
        held = f"{self.tried - len(self.failed)} of {self.tried} properties; " if self.tried else ""
        failed = "".join(f"\n    not {name}: {problem}" for name, problem in self.failed.items())
        failed += "".join(f"\n    n/a {name}: {reason}" for name, reason in self.beside.items())
        name = f"{self.model_type} in {self.dtype}"
        text = f"{name}: {self.status}; without training: {self.untrained}; {held}{self.remark}"
        return f"{text.rstrip(' ;')} ({self.seconds:.1f} s){failed}"


def page(rows: list[Row]) -> str:
    """The page docs/BACKBONES.md.

    Args:
        rows: of each model type in float32, and of those that work in the other precisions too.
    """
    low = {(row.model_type, row.dtype): row for row in rows if row.dtype != DTYPES[0]}
    rows = sorted((row for row in rows if row.dtype == DTYPES[0]), key=lambda row: row.model_type)
    of = {status: [row for row in rows if row.status == status] for status in STATUS}
    links = [f"[{status}](#{status.replace(' ', '-')})" for status in STATUS]
    counts = zip(links, of.values(), STATUS.values(), strict=True)
    lines = [
        "# Which backbones AIM works with",
        "",
        f"The {len(rows)} model types of AutoModelForImageTextToText in transformers {transformers.__version__}, "
        "tried by `python docs/survey_backbones.py`. `aim check BACKBONE` tries yours.",
        "",
        "| | model types | |",
        "|---|---|---|",
        *(f"| {link} | {len(some)} | {meaning} |" for link, some, meaning in counts),
        "",
        '**Without training** (`preset="untrained"`, the default): states put back at the depth where they were read '
        "change the answer, and so do the images of the demonstrations.",
        "",
        *works([[row, *(low[row.model_type, dtype] for dtype in DTYPES[1:])] for row in of["works"]]),
        *answers_text(of["answers text"]),
    ]
    for status in ("by construction", "not known"):
        lines += [f"## {status.capitalize()}", "", "| model type | remark |", "|---|---|"]
        lines += [*(f"| `{row.model_type}` | {cell(row.remark)} |" for row in of[status]), ""]
    reasons = dict.fromkeys(row.remark for row in of["cannot"])
    same = ([row for row in of["cannot"] if row.remark == reason] for reason in reasons)
    lines += ["## Cannot", "", *(f"- {listed(some)}: {reason}" for some, reason in zip(same, reasons, strict=True))]
    return "\n".join(lines) + "\n"


def works(types: list[list[Row]]) -> list[str]:
    """The section of the model types that work; of each the rows of all precisions."""
    names = {name for rows in types for row in rows for name in (*row.failed, *measured(rows, row))}
    table = [
        f"| `{rows[0].model_type}` | {rows[0].untrained} | "
        + "".join(f"{row.tried - len(row.failed)} of {row.tried} | " for row in rows)
        + f"{limits(rows)} |"
        for rows in types
    ]
    named = [f"- `{name}`: {PROPERTIES[name].sentence}" for name in PROPERTIES if name in names]
    return [
        "## Works",
        "",
        "How many of the properties that apply hold, by the precision of the backbone.",
        "",
        f"| model type | without training | {' | '.join(DTYPES)} | what does not hold, or does not apply |",
        "|---|---|---|---|---|---|",
        *table,
        "",
        "Where the backbone itself, without AIM, does not do what a property is about, the property is not counted. "
        "In low precision that is measured: where two orders of one computation differ by more than rounding, the "
        "inputs of plain prompts are rounded once more, and the property is not counted if that changes the backbone "
        "alone by as much.",
        *(["", "Those named above:", "", *named] if named else []),
        "",
    ]


def answers_text(rows: list[Row]) -> list[str]:
    """The section of the model types that answer text."""
    untrained = [row for row in rows if row.untrained == "yes"]
    others = [
        f"With a trained projector at the input alone: `{row.model_type}` ({row.remark})."
        for row in rows
        if row not in untrained
    ]
    return ["## Answers text", "", f"Without training, with words: {listed(untrained)}.", "", *others, ""]


def measured(rows: list[Row], row: Row) -> dict[str, str]:
    """What does not apply in the precision of `row` alone, with the reason; `rows[0]` is in float32."""
    return {name: reason for name, reason in row.beside.items() if name not in rows[0].beside}


def limits(rows: list[Row]) -> str:
    """What does not hold on a model type that works, for a cell of a table; `rows` are of its precisions."""
    parts = [rows[0].remark]
    for row in rows:
        parts += [f"{row.dtype}: `{name}`: {problem}" for name, problem in row.failed.items()]
        parts += [f"{row.dtype}: `{name}` is not counted: {reason}" for name, reason in measured(rows, row).items()]
    return cell("; ".join(part for part in parts if part))


def listed(rows: list[Row]) -> str:
    """The model types of rows, in a sentence."""
    return ", ".join(f"`{row.model_type}`" for row in rows)


def cell(text: str) -> str:
    """A text that a cell of a table can hold."""
    return text.replace("|", "\\|")
