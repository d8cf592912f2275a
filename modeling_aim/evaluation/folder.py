"""The output folder of a run: whose it is, and whether a run may go on there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shards_aim import write_whole
from .results import PREDICTIONS, RESULTS, Kept, read_rows

if TYPE_CHECKING:
    from .runner import EvalSettings

RUN_FILE = "aim_eval.json"
# what may change between an interrupted run and the one that goes on
CHANGEABLE = {"output", "overwrite", "device_map", "batch_size", "images_at_once", "memory"}


def claim(settings: EvalSettings) -> None:
    """See whether the output folder is free for this run; nothing is written yet.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    output = Path(settings.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"The output {output} is a file; give a folder.")
    held = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if not held or settings.overwrite:
        return
    if not (output / RUN_FILE).exists():
        raise ValueError(
            f"The output folder {output} holds {held[0]} and more, but no run of `aim eval`. Choose an empty folder, "
            "or overwrite=True (--overwrite)."
        )
    now = comparable(settings)
    before = {**now, **read_run(output)["settings"]}
    other = [f"{name} was {before[name]!r}, is {now[name]!r}" for name in now if before[name] != now[name]]
    if other:
        raise ValueError(
            f"The output folder {output} holds another run: {'; '.join(other)}. Choose another folder, give the same "
            "settings to go on, or overwrite=True (--overwrite)."
        )


def begin(settings: EvalSettings, model: Mapping[str, str], examples: Mapping[str, str]) -> None:
    """Make the output folder this run's, or see that model and data are still those of the run that goes on.

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
    if settings.overwrite or not (output / RUN_FILE).exists():
        for name in ("unfinished", "demonstrations"):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in (PREDICTIONS, RESULTS):
            (output / name).unlink(missing_ok=True)
        write_run(output, {"settings": comparable(settings), **what, "finished": False})
        return
    before = read_run(output)
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


def comparable(settings: EvalSettings) -> dict[str, Any]:
    """What may not change while a run goes on, as JSON."""
    return json.loads(json.dumps({k: v for k, v in asdict(settings).items() if k not in CHANGEABLE}))


def read_run(output: Path) -> dict[str, Any]:
    """What a run says of itself."""
    return json.loads((output / RUN_FILE).read_text(encoding="utf-8"))


def write_run(output: Path, content: Mapping[str, Any]) -> None:
    """Write what a run says of itself."""
    write_whole(output / RUN_FILE, json.dumps(content, indent=1).encode())
