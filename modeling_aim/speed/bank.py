"""Open a bank of 100 000 demonstrations of LLaVA-1.5's shape, choose 16, and say what it costs; run by `make bench`.

    python -m modeling_aim.speed.bank                    # about 2.1 GB of disk, removed afterwards
    python -m modeling_aim.speed.bank --tokens 30 --demonstrations 10000

The content is random: fused tokens of width 4096 as int8, features of width 512, as `DemonstrationBank.build` makes.
Few tokens a demonstration keep the file small; opening and choosing do not look at them. Choosing starts from features
of the query: computing those is one pass of the backbone's vision tower and is not in the figures.

Memory is given as resident, and as the part of it that is the process's own: the rest are pages of libraries and of
the bank's files, which the system shares and drops as it likes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .. import DemonstrationBank
from ..bank.manifest import new_manifest, write_manifest, write_numbered
from ..bank.shards import Shard, blob, make_shard

WIDTH, FEATURES, A_SHARD, SHOTS = 4096, 512, 10_000, 16


def random_shard(start: int, count: int, tokens: int) -> Shard:
    """Random demonstrations; every third hundred has a label."""
    generator = torch.Generator().manual_seed(start)
    columns: dict[str, torch.Tensor] = {
        "vectors": torch.randint(-127, 128, (count * tokens, WIDTH), generator=generator, dtype=torch.int8),
        "ids": torch.randint(3, 30_000, (count * tokens,), generator=generator, dtype=torch.int32),
        "scales": torch.rand(count * tokens, generator=generator),
        "lengths": torch.full((count,), tokens, dtype=torch.int32),
        "keys": torch.randint(0, 256, (count, 32), generator=generator, dtype=torch.uint8),
    }
    columns["texts"], columns["text_lengths"] = blob([f"This is thing {start + i}.".encode() for i in range(count)])
    columns["labels"], columns["label_lengths"] = blob([f"name{(start + i) % 1000}".encode() for i in range(count)])
    columns["has_question"] = torch.ones(count, dtype=torch.uint8)
    for kind in ("image", "text", "fused"):
        rows = torch.randn(count, FEATURES, generator=generator)
        columns["feature." + kind] = torch.nn.functional.normalize(rows).half()
    return make_shard(columns, {"source": {"backbone": "random"}, "dtype": "bfloat16"})


def write(folder: Path, demonstrations: int, tokens: int) -> None:
    """Write the bank, a shard at a time."""
    listed: list[dict[str, Any]] = []
    for start in range(0, demonstrations, A_SHARD):
        shard = random_shard(start, min(A_SHARD, demonstrations - start), tokens)
        listed.append(write_numbered(shard, folder, len(listed) + 1))
    write_manifest(folder, new_manifest({"backbone": "random"}, shards=listed, complete=True, duplicates=0))


def note_memory(figures: dict[str, float], when: str) -> None:
    """Note the memory of this process in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    for name, what in (("VmRSS", "resident"), ("RssAnon", "of it the process's own")):
        figures[f"{when}: {what}, MB"] = int(lines[name].split()[0]) * 1024 / 1e6


def measure(folder: Path) -> dict[str, float]:
    """Open, choose and read, in this process."""
    figures: dict[str, float] = {}
    note_memory(figures, "libraries, no bank")
    start = time.perf_counter()
    bank = DemonstrationBank.from_pretrained(folder)
    figures["open ms"] = 1000 * (time.perf_counter() - start)
    note_memory(figures, "with the open bank, before use")
    generator = torch.Generator().manual_seed(1)
    for name, by, balanced in (
        ("image", "image", False),
        ("image, labels in turn", "image", True),
        ("mmices", "mmices", False),
        ("random", "random", True),
    ):
        times, work = [], []
        for run in range(12):
            query = {kind: torch.randn(FEATURES, generator=generator) for kind in ("image", "text")}
            start, used = time.perf_counter(), time.process_time()
            chosen = bank.select(query, SHOTS, by, balanced=balanced, seed=run)
            times.append(1000 * (time.perf_counter() - start))
            work.append(1000 * (time.process_time() - used))
            assert len(chosen) == SHOTS
        figures[f"select {SHOTS} by {name}: first, ms"] = times[0]
        figures[f"select {SHOTS} by {name}: median of the next 11, ms"] = statistics.median(times[1:])
        figures[f"select {SHOTS} by {name}: the same, ms of processor time"] = statistics.median(work[1:])
    note_memory(figures, "after all of these")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demonstrations", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=4, help="fused tokens a demonstration")
    parser.add_argument("--folder", type=Path, help="where the bank is put while it is measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return
    folder = Path(tempfile.mkdtemp(prefix="aim-bank-", dir=args.folder))
    try:
        write(folder, args.demonstrations, args.tokens)
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        print(f"{args.demonstrations} demonstrations of {args.tokens} tokens, {size:.2f} GB, {args.threads} threads")
        command = [
            sys.executable,
            "-m",
            "modeling_aim.speed.bank",
            "--measure",
            str(folder),
            "--threads",
            str(args.threads),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)  # a process that has seen nothing
        for name, value in json.loads(done.stdout.splitlines()[-1]).items():
            print(f"{name:60} {value:10.1f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
