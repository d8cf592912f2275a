"""An `aim` command that ends itself at a counted event: `python killed_commands.py EVENT NUMBER SIGNAL ARGUMENTS...`.

Events are the end of an optimizer's step, and the end of writing answers to disk.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forked import run_python


def killed_command(
    event: str, number: int, how: int, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `aim` with `arguments` until the `number`-th event, where the process sends itself the signal `how`.

    Args:
        event: "step" or "answers".
        number: from 1.
        how: the signal.
        arguments: of the command.
        environment: variables of the process; by default those of this one.
    """
    return run_python([__file__, event, str(number), str(int(how)), *arguments], env=environment)


def main() -> None:
    event, number, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.argv = ["aim", *sys.argv[4:]]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), how)

    if event == "step":
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(count)
    else:
        from modeling_aim.evaluation.results import Kept

        Kept.add = _then(Kept.add, count)  # type: ignore[method-assign]
    from modeling_aim.cli import app

    app()


def _then(function: Callable[..., Any], event: Callable[..., None]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        result = function(*arguments)
        event()
        return result

    return called


if __name__ == "__main__":
    main()
