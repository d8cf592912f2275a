"""The evaluation table of a repository's model card, and its results as metadata that the Hub reads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..files_aim import write_whole
from .report import COSTS, CURVES, FRONT, HEADING, eval_results, report
from .results import RESULTS


def put_on_card(run: Path, repository: Path) -> Path:
    """Write the table of a finished run, its pictures and its figures into a repository's model card.

    The section of an earlier evaluation is replaced; everything else on the card stays.

    Args:
        run: output folder of `aim eval`.
        repository: folder of the AIM repository that was evaluated.

    Returns:
        The card.

    Raises:
        ValueError: the run is not finished, or evaluated another model, or there is no card.
    """
    path = repository / "README.md"
    if not (run / RESULTS).is_file():
        raise ValueError(f"{run} holds no {RESULTS}: give the output folder of a finished `aim eval`.")
    if not path.is_file():
        raise ValueError(f"{repository} holds no README.md: give the folder of an AIM repository.")
    results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    evaluated = results["settings"]["repo"]
    if evaluated is None or not Path(evaluated).is_dir() or Path(evaluated).resolve() != repository.resolve():
        raise ValueError(
            f"{run} is an evaluation of {evaluated or results['settings']['backbone']}, not {repository}."
        )
    pictures = [name for name in (CURVES, COSTS, FRONT) if (run / name).is_file()]
    for name in pictures:
        shutil.copyfile(run / name, repository / f"eval_{name}")
    card = ModelCard(path.read_text(encoding="utf-8"))
    section = report({**results, "settings": {**results["settings"], "repo": None}}, [f"eval_{n}" for n in pictures])
    kept = re.sub(rf"{HEADING}\n.*?(?=^## |\Z)", "", card.text, flags=re.DOTALL | re.MULTILINE).rstrip()
    card.text = f"{kept}\n\n{section}"
    data: Any = card.data
    data.model_name = data.model_name or repository.resolve().name
    data.eval_results = eval_results(results)
    write_whole(path, str(card).encode())
    return path
