"""The output folder of an evaluation run: which run it holds, and whether a run can be resumed there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ..runs import RunRecord
from .results import PREDICTIONS, RESULTS, Kept, read_rows
from .settings import EvalSettings

RECORD = RunRecord(
    "aim eval",
    "aim_eval.json",
    frozenset({"output", "overwrite", "device_map", "batch_size", "images_at_once", "memory"}),
)


def claim(settings: EvalSettings) -> None:
    """See whether the output folder is free for this run; nothing is written yet.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    earlier = RECORD.earlier(settings)
    if earlier is not None:
        RECORD.check_same(settings, earlier)


def begin(settings: EvalSettings, model: Mapping[str, str], examples: Mapping[str, str]) -> None:
    """Claim the output folder for this run, or check that model and data are those of the run that is resumed.

    Args:
        settings: of the run.
        model: identity of what answers.
        examples: identity of the examples of each task.

    Raises:
        ValueError: they are not.
    """
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    what = {"model": dict(model), "examples": dict(examples)}
    if settings.overwrite or not (output / RECORD.file).exists():
        for name in ("unfinished", "demonstrations"):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in (PREDICTIONS, RESULTS):
            (output / name).unlink(missing_ok=True)
        RECORD.write(output, {"settings": RECORD.comparable(settings), **what, "finished": False})
        return
    before = RECORD.read(output)
    other = [name for name in what if before[name] != what[name]]
    if other:
        raise ValueError(
            f"The {' and the '.join(other)} of the run in {output} changed since it began: {before[other[0]]} then, "
            f"{what[other[0]]} now. Choose another folder, or overwrite=True (--overwrite)."
        )
    kept = Kept(output / "unfinished")
    kept.repair()
    if before["finished"] and (output / PREDICTIONS).exists() and not kept.rows():
        kept.add(read_rows(output / PREDICTIONS))
