"""Python processes that start with torch imported, which takes most of the time of a short script.

They are forked from a process that has imported torch and torchvision and has no other thread: nothing of this
package, of transformers or of huggingface_hub, which read their settings from the environment when imported.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LATER = {"modeling_aim", "transformers", "huggingface_hub", "accelerate", "datasets"}  # each process imports its own


def run_python(
    arguments: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | str | None = None, words: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS...`: `subprocess.run`, with its output captured as text.

    Args:
        arguments: of Python: `-c CODE`, `-m MODULE` or the path of a script, and what it gets in `sys.argv`.
        env: its environment; by default that of this process.
        cwd: its working directory; by default that of this process.
        words: its input.
    """
    [done] = run_together(arguments, [dict(os.environ if env is None else env)], cwd, words)
    return done


def run_together(
    arguments: Sequence[str], envs: Sequence[Mapping[str, str]], cwd: Path | str | None = None, words: str = ""
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS...` in several processes at once, one for each environment, until the last one ends."""
    with tempfile.TemporaryDirectory() as scratch:
        requests: list[dict[str, Any]] = []
        for number, env in enumerate(envs):
            streams = {name: os.path.join(scratch, f"{name}-{number}") for name in ("stdin", "stdout", "stderr")}
            Path(streams["stdin"]).write_text(words)
            requests.append(
                {"arguments": list(arguments), "env": dict(env), "cwd": str(cwd or os.getcwd()), "streams": streams}
            )
        codes = _answered(requests) if hasattr(os, "fork") else _started(requests)
        return [
            subprocess.CompletedProcess(
                [sys.executable, *arguments],
                code,
                *(Path(request["streams"][name]).read_text(errors="replace") for name in ("stdout", "stderr")),
            )
            for code, request in zip(codes, requests, strict=True)
        ]


def _answered(requests: list[dict[str, Any]]) -> list[int]:
    """The return codes of processes that the forking process starts."""
    pipes = _server()
    assert pipes.stdin is not None and pipes.stdout is not None
    answer = ""
    try:
        pipes.stdin.write(json.dumps(requests) + "\n")
        pipes.stdin.flush()
        answer = pipes.stdout.readline()
    finally:
        if not answer:  # it ended, or the test has run out of time: the next one starts another
            pipes.kill()
            _server.cache_clear()
    assert answer, "the process that forks has ended; its error is above"
    return json.loads(answer)


def _started(requests: list[dict[str, Any]]) -> list[int]:
    """The same where a process cannot fork."""
    with contextlib.ExitStack() as files:
        processes = []
        for request in requests:
            opened = {
                name: files.enter_context(open(path, "r" if name == "stdin" else "w"))
                for name, path in request["streams"].items()
            }
            command = [sys.executable, *request["arguments"]]
            processes.append(subprocess.Popen(command, env=request["env"], cwd=request["cwd"], **opened))
        return [process.wait() for process in processes]


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks, started once; it ends with this one."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process


def _serve() -> dict[str, Any] | None:
    """Fork for every request, and answer with the return code of `subprocess`; what a forked process is to run."""
    import scipy.optimize
    import torch
    import torchvision

    assert torch and torchvision and scipy
    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401
    assert not LATER & set(sys.modules), LATER & set(sys.modules)
    tasks = Path("/proc/self/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a process with threads must not fork"
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            child = os.fork()
            if child == 0:
                return request
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    return None


def _become(arguments: list[str], env: dict[str, str], cwd: str, streams: dict[str, str]) -> None:
    """Run what `python ARGUMENTS...` runs, in this process."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path in enumerate(streams.values()):  # input, output, errors
        os.dup2(os.open(path, flags if number else os.O_RDONLY), number)
    sys.stdin = open(0)  # noqa: SIM115
    old_path = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    rest = [path for path in sys.path[1:] if path not in old_path]
    new_path = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, *after = arguments
    first = {"-c": "", "-m": cwd}.get(kind, str(Path(kind).parent))
    sys.path[:] = [first, *new_path, *rest]
    if kind == "-m":
        sys.argv = after
        runpy.run_module(after[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-c":
        sys.argv = ["-c", *after[1:]]
        exec(compile(after[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = [kind, *after]
        vars(main)["__file__"] = kind
        exec(compile(Path(kind).read_bytes(), kind, "exec"), vars(main))


if __name__ == "__main__":
    request = _serve()
    if request is not None:
        _become(**request)
