"""Build hub_configs/aim-tiny from nothing: images, backbone, AIM projector, controls.

    python examples/aim_tiny/build.py                 # everything; rerun to resume
    python examples/aim_tiny/build.py --only aim      # one stage
    python examples/aim_tiny/build.py --list

A stage is done when its result lies in build/aim-tiny/; remove that file to do it again. Long stages keep a checkpoint
every two minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from support import BUILD

HERE = Path(__file__).resolve().parent
STAGES = {  # name: (script and argument, result, what it does)
    "vision": (["vision.py"], "vision.pt", "vision tower: CLIP ViT, five attributes"),
    "llm": (["backbone.py", "llm"], "llm.pt", "language model: text only, copying first"),
    "llava": (["llava.py"], "llava/README.md", "LLaVA stages 1 and 2 by `aim backbone`; then frozen"),
    "aim": (["projector.py", "aim"], "aim/README.md", "AIM projector, the shipped one, by `aim train`"),
    "aim_paper": (["projector.py", "aim_paper"], "aim_paper/README.md", "control: the paper's form"),
    "aim_generic": (["projector.py", "aim_generic"], "aim_generic/README.md", "control: captioned documents only"),
    "interleaved": (["backbone.py", "interleaved"], "interleaved.pt", "control: backbone tuned on many images"),
    "ship": (["ship.py"], "shipped.txt", "write hub_configs/aim-tiny and the controls"),
}
SIDE_BY_SIDE = [["vision"], ["llm"], ["llava"], ["aim"], ["interleaved", "aim_paper"], ["aim_generic"], ["ship"]]
TOGETHER = {"llm"}  # two processes, one core each; llava.py starts its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=STAGES, help="run this stage alone")
    parser.add_argument("--list", action="store_true", help="say what is done")
    args = parser.parse_args()
    console = Console()
    if args.list:
        for name, (_, result, what) in STAGES.items():
            console.print(f"{'done' if (BUILD / result).exists() else 'open':5} {name:12} {what}")
        return
    for group in [[args.only]] if args.only else SIDE_BY_SIDE:
        start = time.time()
        missing = [name for name in group if not (BUILD / STAGES[name][1]).exists()]
        threads = max(1, (os.cpu_count() or 1) // max(1, len(missing)))
        running = []
        for place, name in enumerate(missing):
            console.print(f"[bold]{name}[/]: {STAGES[name][2]}; log in {BUILD / name}.log")
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "AIM_TINY_BAR": str(place)}
            together = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if name in TOGETHER else []
            command = [sys.executable, *together, str(HERE / STAGES[name][0][0]), *STAGES[name][0][1:]]
            if together:
                environment["OMP_NUM_THREADS"] = "1"
            log = (BUILD / f"{name}.log").open("a")
            running.append((name, subprocess.Popen(command, stdout=log, env=environment)))
        for name, process in running:
            if process.wait():
                raise SystemExit(f"stage {name} failed with code {process.returncode}; see {BUILD / name}.log")
        if missing:
            console.print(f"{', '.join(missing)}: {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
