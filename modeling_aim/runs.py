"""The record in the output folder of a long run, from which the same command resumes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .files_aim import LOCK_FILE, write_whole

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RunRecord:
    """The file in an output folder that says whose it is.

    Args:
        command: that makes such runs, for messages.
        file: its name.
        changeable: settings that may differ between an interrupted run and the run that resumes it.
    """

    command: str
    file: str
    changeable: frozenset[str]

    def comparable(self, settings: Any) -> dict[str, Any]:
        """The settings of a dataclass that must stay the same when a run is resumed, as JSON."""
        return json.loads(json.dumps({k: v for k, v in asdict(settings).items() if k not in self.changeable}))

    def read(self, output: Path) -> dict[str, Any]:
        """The record of the run in a folder.

        Raises:
            ValueError: its record is damaged.
        """
        path = output / self.file
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}). {self._mend(output)}") from error
        if not (isinstance(record, dict) and isinstance(record.get("settings"), dict) and "finished" in record):
            raise ValueError(f"{path} is not a record of a run of `{self.command}`. {self._mend(output)}")
        return record

    def _mend(self, output: Path) -> str:
        return f"Choose another folder than {output}, or overwrite=True (--overwrite)."

    def write(self, output: Path, content: Mapping[str, Any]) -> None:
        """Write the record of a run."""
        write_whole(output / self.file, json.dumps(content, indent=1).encode())

    def earlier(self, settings: Any) -> dict[str, Any] | None:
        """The record of the run in `settings.output`; `None` where that is free, or to be overwritten.

        Raises:
            ValueError: the folder is a file, or holds something else.
        """
        output = Path(settings.output)
        if output.exists() and not output.is_dir():
            raise ValueError(f"The output {output} is a file; give a folder.")
        held = sorted({path.name for path in output.iterdir()} - {LOCK_FILE}) if output.exists() else []
        if not held or settings.overwrite:
            return None
        if not (output / self.file).exists():
            raise ValueError(
                f"The output folder {output} holds {held[0]} and more, but no run of `{self.command}`. Choose an "
                "empty folder, or overwrite=True (--overwrite)."
            )
        return self.read(output)

    def check_same(self, settings: Any, earlier: Mapping[str, Any]) -> None:
        """Raise `ValueError` unless the settings are those of the earlier run."""
        now = self.comparable(settings)
        before = {**now, **earlier["settings"]}
        other = [f"{name} was {before[name]!r}, is {now[name]!r}" for name in now if before[name] != now[name]]
        if other:
            raise ValueError(
                f"The output folder {settings.output} holds another run: {'; '.join(other)}. Choose another folder, "
                "give the same settings to resume it, or overwrite=True (--overwrite)."
            )
