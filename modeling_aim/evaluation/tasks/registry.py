"""Tasks by name.

task = open_task("okvqa")                                        # the published dataset, from the Hub
task = open_task("okvqa:/data/OK-VQA,name=OK-VQA (local)")
task = open_task("episodes:data/counting.jsonl,match=digits")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from ...data.specs import spec_named, split_spec
from ..task import Task
from .captions import CaptionsFile, Flickr30k
from .link_context import ClassFolder, Isekai10, IsekaiPair, LclPairs
from .plain import Episodes, QuestionsFile
from .science_qa import ScienceQA
from .vl_icl import Clevr, InterleavedOperatorInduction, MatchingMi, OpenMi, OperatorInduction, TextOcr
from .vqa import HatefulMemes, OkVqa, VizWiz

TASKS: dict[str, Callable[..., Task]] = {
    "flickr30k": Flickr30k,
    "okvqa": OkVqa,
    "vizwiz": VizWiz,
    "hateful_memes": HatefulMemes,
    "scienceqa": ScienceQA,
    "isekai-10": Isekai10,
    "isekai-pair": IsekaiPair,
    "lcl": LclPairs,
    "open_mi": OpenMi,
    "operator_induction": OperatorInduction,
    "operator_induction_interleaved": InterleavedOperatorInduction,
    "clevr": Clevr,
    "matching_mi": MatchingMi,
    "textocr": TextOcr,
    "folder": ClassFolder,
    "captions": CaptionsFile,
    "jsonl": QuestionsFile,
    "episodes": Episodes,
}


@dataclass(frozen=True)
class TaskEntry:
    """What `aim eval --list` and docs/EVALUATION.md say of a task.

    Args:
        format: of the data.
        source: where to get it: a Hub id, or a page; empty for data of your own.
        metric: the main one first.
        paper: empty if it has none.
    """

    format: str
    source: str
    metric: str
    paper: str = ""


LMMS = "parquet of lmms-lab, or the official JSON files with images"
LCL = "accuracy, normalised; as published"
ISEKAI = "JSON (lines) of queries with lists of images, and the images"
LCL_PAPER = "arXiv 2308.07891"
VL_ICL = "query.json, support.json, images or their archives"
VL_ICL_PAPER = "arXiv 2403.13164"
ENTRIES: dict[str, TaskEntry] = {
    "flickr30k": TaskEntry(
        "parquet, or Karpathy's JSON or csv with images",
        "lmms-lab-encoder/flickr30k",
        "CIDEr x 100",
        "Young et al., TACL 2014; split: arXiv 1412.2306",
    ),
    "okvqa": TaskEntry(
        LMMS, "lmms-lab-encoder/OK-VQA", "VQA accuracy; always normalised; OpenFlamingo's", "arXiv 1906.00067"
    ),
    "vizwiz": TaskEntry(
        LMMS, "lmms-lab-encoder/VizWiz-VQA", "VQA accuracy; always normalised; OpenFlamingo's", "arXiv 1802.08218"
    ),
    "hateful_memes": TaskEntry(
        "parquet, or the official jsonl with images",
        "Ahren09/MMSoc_HatefulMemes",
        "ROC-AUC; accuracy",
        "arXiv 2005.04790",
    ),
    "scienceqa": TaskEntry(
        "parquet of lmms-lab, or the official problems.json, pid_splits.json and images",
        "lmms-lab-encoder/ScienceQA",
        "accuracy; failed; by subject, context, grade",
        "arXiv 2209.09513",
    ),
    "isekai-10": TaskEntry(ISEKAI, "ISEKAI-Portal/ISEKAI-10", LCL, LCL_PAPER),
    "isekai-pair": TaskEntry(ISEKAI, "ISEKAI-Portal/ISEKAI-pair", LCL, LCL_PAPER),
    "lcl": TaskEntry(
        "test100_pairs.jsonl, ImageNet's images", "github.com/isekai-portal/Link-Context-Learning", LCL, LCL_PAPER
    ),
    "open_mi": TaskEntry(VL_ICL, "ys-zong/VL-ICL", "exact match after the cut", VL_ICL_PAPER),
    "operator_induction": TaskEntry(VL_ICL, "ys-zong/VL-ICL", "first run of digits", VL_ICL_PAPER),
    "operator_induction_interleaved": TaskEntry(VL_ICL, "ys-zong/VL-ICL", "first run of digits", VL_ICL_PAPER),
    "clevr": TaskEntry(VL_ICL, "ys-zong/VL-ICL", "first run of digits; as published: whole answer", VL_ICL_PAPER),
    "matching_mi": TaskEntry(VL_ICL, "ys-zong/VL-ICL", '"yes" in it or not; first yes or no', VL_ICL_PAPER),
    "textocr": TaskEntry(VL_ICL, "ys-zong/VL-ICL", "exact match after the cut", VL_ICL_PAPER),
    "folder": TaskEntry("a folder a class", "", "accuracy: the made-up name and no other"),
    "captions": TaskEntry("jsonl, json, csv or parquet: image, captions", "", "CIDEr x 100"),
    "jsonl": TaskEntry("jsonl: image(s), question, answer(s)", "", "match=exact, digits or vqa"),
    "episodes": TaskEntry("jsonl: demos, queries, as for training", "", "match=exact, digits or vqa"),
}
HEADS = ("task", "format", "where to get it", "metric (main first)", "paper")


def task_rows() -> list[tuple[str, ...]]:
    """What there is to evaluate on, a row for each kind of task, as `HEADS` names its cells.

    A kind that was added to `TASKS` alone has the first line of its docstring as its format.
    """
    rows: list[tuple[str, ...]] = []
    for kind, make in TASKS.items():
        summary = (inspect.getdoc(make) or "").partition("\n")[0]
        entry = ENTRIES.get(kind, TaskEntry(summary, "", getattr(make, "metric", "")))
        rows.append((kind, entry.format, entry.source or "your own", entry.metric, entry.paper or "–"))
    return rows


def task_table() -> str:
    """The same as a markdown table; docs/EVALUATION.md has it."""
    rows = [HEADS, ("---",) * len(HEADS), *((f"`{kind}`", *cells) for kind, *cells in task_rows())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def open_task(spec: str) -> Task:
    """A task from one line of text.

    Args:
        spec: `KIND[:PATH][,name=value...]`. The names are the settings of the kind; without a path a published data
            set is read from the Hub, where there is one.

    Raises:
        ValueError: the kind, a setting or a value is wrong; the message has those there are.
        FileNotFoundError: there is nothing at the path.
        ImportError: a library is missing; the message says how to install it.
    """
    kind, path, values = split_spec(spec, TASKS, {})
    if kind not in TASKS:
        raise ValueError(
            f"{spec!r} is not a task. Expected KIND[:PATH][,name=value...] with a kind of {sorted(TASKS)}, such as "
            "okvqa or episodes:data/test.jsonl."
        )
    make = TASKS[kind]
    needed = inspect.signature(make).parameters.get("path")
    if not path and needed is not None and needed.default is inspect.Parameter.empty:
        raise ValueError(f"{spec!r}: {kind} has no published dataset to read; give a path, {kind}:PATH.")
    with spec_named(spec):
        return make(path, **values) if path else make(**values)
