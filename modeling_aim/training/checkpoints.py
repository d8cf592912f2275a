"""Checkpoints of an interrupted run: which one to resume from. No code in them is run."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..files_aim import file_digest, read_safetensors
from ..projector_aim import DIGEST_KEY, PROJECTOR_WEIGHTS, SCALE_KEY

logger = logging.get_logger(__name__)

TENSORS = ("optimizer.pt", "scheduler.pt", "scaler.pt")  # which Trainer loads as tensors and numbers alone


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that is whole; one that is damaged is named in the log.

    Returns:
        Its folder; `None` where none was written to its end (Trainer writes `trainer_state.json` last).

    Raises:
        ValueError: all that were written to their end are damaged.
    """
    by_step = {int(path.name.rpartition("-")[2]): path for path in output.glob("checkpoint-*[0-9]")}
    damaged = []
    for _, path in sorted(by_step.items(), reverse=True):
        if not _is_finished(path):
            continue
        reason = why_damaged(path)
        if reason is None:
            return str(path)
        damaged.append(f"{path.name}: {reason}")
        logger.warning(f"The checkpoint {path} is damaged ({reason}); the one before it is taken.")
    if damaged:
        raise ValueError(
            f"No checkpoint in {output} can be used ({'; '.join(damaged)}). Remove them to start over, or give "
            "overwrite=True (--overwrite)."
        )
    return None


def stored_scale(checkpoint: str) -> torch.Tensor | None:
    """The scales that the projector of a checkpoint is calibrated with; `None` where it has none."""
    weights = Path(checkpoint) / PROJECTOR_WEIGHTS
    return read_safetensors(str(weights)).get(f"projector.{SCALE_KEY}") if weights.exists() else None


def _is_finished(path: Path) -> bool:
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(state, dict)


def why_damaged(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; `None` where they are whole, as far as they are there."""
    try:
        for name in ("config.json", "trainer_state.json"):
            if (path / name).exists() and not isinstance(_json(path / name), dict):
                return f"{name} holds no JSON object"
        weights, config = path / PROJECTOR_WEIGHTS, path / "config.json"
        if weights.exists():
            read_safetensors(str(weights))
            digest = _json(config).get(DIGEST_KEY) if config.exists() else None
            if digest is not None and file_digest(weights) != digest:
                return f"{PROJECTOR_WEIGHTS} is not the file that config.json names"
        for file in sorted([*path.glob("*.pt"), *path.glob("*.pth")]):
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return f"{file.name} is damaged"
            if file.name in TENSORS:
                torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return f"{file.name} holds something else than tensors and numbers, which is not loaded"
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, RecursionError, zipfile.BadZipFile) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
