"""Builds of a bank that are killed at a counted event, each in a child of a process without threads.

A test starts this file once and writes a line of JSON for each build, `[folder, log, event]`; the child kills itself
at that event and this process answers whether it did. Events are the beginning and the end of every read of
demonstrations, and the moments before and after a file is moved to its final name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from backbones import DEMOS, picture, plugin

from modeling_aim import DemonstrationBank

MANY: list[Any] = [(picture(seed), f"the thing number {seed}") for seed in range(40)]
MANY += [MANY[3], *DEMOS, {"image": picture(0), "text": "dax"}, MANY[7]]  # three of them are there already
UNIQUE = 45
OPTIONS: dict[str, Any] = {"batch_size": 2, "shard_bytes": 60_000, "keep_states": True}


class KilledBuilds:
    """The process that builds; used as a context manager."""

    def __enter__(self) -> KilledBuilds:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], **pipes)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate()

    def killed(self, folder: Path, log: Path, event: int) -> bool:
        """Build into a folder until an event; whether it came to it.

        Args:
            folder: of the bank.
            log: gets a line with the number of demonstrations of each read that was begun.
            event: its number, from 1.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(folder), str(log), event]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def build_until(aim: Any, folder: Path, log: Path, event: int) -> None:
    """Build, and kill this process at an event."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Callable[..., Any], before: Callable[..., None] = lambda *_: None) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            count()
            before(*arguments)
            result = function(*arguments, **named)
            count()
            return result

        return counted

    def note(demos: Any, *_: Any) -> None:
        with log.open("a") as file:
            file.write(f"{len(demos)}\n")

    aim.model.read_fully = around(aim.model.read_fully, note)
    os.replace = around(os.replace)
    DemonstrationBank.build(aim.model, MANY, folder, **OPTIONS)


def main() -> None:
    torch.set_num_threads(1)
    aim = plugin("llava")
    for line in sys.stdin:
        folder, log, event = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                build_until(aim, Path(folder), Path(log), event)
            finally:
                os._exit(0)
        print(json.dumps(os.waitpid(child, 0)[1] == signal.SIGKILL), flush=True)


if __name__ == "__main__":
    main()
