"""Tasks by name.

task = open_task("okvqa")                                        # the published dataset, from the Hub
task = open_task("okvqa:/data/OK-VQA,name=OK-VQA (local)")
task = open_task("episodes:data/counting.jsonl,match=digits")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

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
