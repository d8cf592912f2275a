"""What the data of a training run costs each process: memory, images opened, and the time to resume.

    python -m modeling_aim.speed.training_data                       # on one rank and on two
    python -m modeling_aim.speed.training_data --before ../main      # another checkout, in the same run

Web pages of MMC4's form with large JPEGs train aim-tiny's backbone through `aim train`. Memory is the peak of a
process, and how far that is above the peak before training. An image counts as opened when Pillow opens it; a rank's
share is the images of the batches that it trained on. Resuming is measured from a loaded model to the first step,
behind so many episodes in all, in seconds and in CPU seconds; a checkout that opens what it skips is measured on
fewer, and the time is scaled up.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeling_aim import Demonstration

BACKBONE = str(Path(__file__).resolve().parents[2] / "hub_configs" / "aim-tiny" / "backbone")
PICTURES = 64  # files that the pages share
WORDS = ("a", "small", "large", "red", "green", "blue", "circle", "square", "triangle")  # aim-tiny knows them


class FirstStep(Exception):
    """The measurement is over."""


def make_pages(folder: Path, pages: int, size: tuple[int, int]) -> str:
    """A shard of web pages with four to eight images each, sentences and a matrix of similarities, as MMC4 has it."""
    from PIL import Image, ImageDraw

    rng = random.Random(0)
    for number in range(PICTURES):
        image = Image.new("RGB", size, (number, 90, 160))
        draw = ImageDraw.Draw(image)
        for _ in range(200):
            x, y, wide, high = (rng.randrange(size[i % 2]) // (1 + i) for i in range(4))
            draw.rectangle((x, y, x + wide, y + high), fill=tuple(rng.randrange(256) for _ in range(3)))
        image.save(folder / f"{number}.jpg", quality=90)
    shard = folder / "docs_shard_0_v2.jsonl"
    with shard.open("w") as file:
        for number in range(pages):
            texts = [" ".join(rng.choices(WORDS, k=30 if place % 3 else 6)) + " ." for place in range(24)]
            images = rng.randint(4, 8)
            image_info = [
                {
                    "image_name": f"{rng.randrange(PICTURES)}.jpg",
                    "raw_url": f"https://example.org/{number}/{place}.jpg",
                    "matched_text_index": place * 3,
                    "matched_sim": 0.3,
                    "face_detections": None,
                }
                for place in range(images)
            ]
            matrix = [[rng.random() for _ in texts] for _ in range(images)]
            page = {
                "text_list": texts,
                "image_info": image_info,
                "similarity_matrix": matrix,
                "url": "https://example.org",
            }
            file.write(json.dumps(page) + "\n")
    return f"mmc4:{shard},images={folder}"


def images_of(pair: Mapping[str, Any] | Demonstration) -> int:
    return len(pair["images"] if isinstance(pair, Mapping) else pair.images)


def measured(data: str, output: str, steps: int, batch_size: int, skipped: int) -> dict[str, float]:
    """Train in this process, one of a run's; then resume behind so many episodes in all."""
    from PIL import Image

    from modeling_aim.training import AimTrainer, EpisodeCollator, TrainSettings, train

    opened, batches, times = [0], [], {}  # type: ignore[var-annotated]
    open_, collate, step, run = Image.open, EpisodeCollator.__call__, AimTrainer.training_step, AimTrainer.train

    def counting_open(place: Any, *args: Any, **kwargs: Any) -> Any:
        opened[0] += isinstance(place, str) and place.endswith(".jpg")
        return open_(place, *args, **kwargs)

    def counting_collate(self: Any, episodes: Any) -> Any:
        some = [episode for episode in episodes if episode is not None]
        if some:
            batches.append(sum(images_of(pair) for episode in some for pair in episode.pairs))
        return collate(self, episodes)

    def noting_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        times.update(begin=time.perf_counter(), cpu=time.process_time(), memory=_peak(), opened=opened[0])
        return run(self, *args, **kwargs)

    def stopping_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == stop_at:
            times.update(end=time.perf_counter(), cpu=time.process_time() - times["cpu"])
            raise FirstStep
        return step(self, *args, **kwargs)

    for owner, name, counting in (
        (Image, "open", counting_open),
        (EpisodeCollator, "__call__", counting_collate),
        (AimTrainer, "train", noting_run),
        (AimTrainer, "training_step", stopping_step),
    ):
        setattr(owner, name, counting)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    behind = skipped // (batch_size * ranks)
    settings = TrainSettings(
        BACKBONE, (data,), output, steps=max(behind, steps) + 2, batch_size=batch_size, shots=8, dtype="float32",
        held_out=0.0, save_every=steps, log_every=10**6, memory=0.0, prompts="plain",
        arguments={"disable_tqdm": True},
    )  # fmt: skip
    stop_at = steps
    _until_stopped(lambda: train(settings))
    share, marks = sum(batches[:steps]), dict(times)
    result = {
        "peak MB": _peak() / 2**20,
        "MB of data": (_peak() - marks["memory"]) / 2**20,
        "images of its share": share,
        "opened / share": opened[0] / share,
        "images/s": share / (marks["end"] - marks["begin"]),
    }
    if os.environ.get("RANK", "0") == "0":
        _move_checkpoint(Path(output), steps, behind)
    _wait_for(Path(output) / f"checkpoint-{behind}" / "moved")
    stop_at, opened[0] = behind, 0
    _until_stopped(lambda: train(settings))
    result["resume s"] = times["end"] - times["begin"]
    result["resume CPU s"] = times["cpu"]
    result["opened to resume"] = opened[0] - times["opened"]
    return result


def _until_stopped(run: Callable[[], object]) -> None:
    try:
        run()
    except FirstStep:
        return
    raise RuntimeError("The run ended before it was measured.")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _move_checkpoint(output: Path, old: int, new: int) -> None:
    """Make the checkpoint one of a later step, as if the run had come so far."""
    folder = output / f"checkpoint-{new}"
    if old != new:
        shutil.move(output / f"checkpoint-{old}", folder)
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "global_step": new}))
    (folder / "moved").touch()


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def run_ranks(code: Path, ranks: int, data: str, output: str, arguments: list[str]) -> list[dict[str, float]]:
    """What each rank of a run measures, with the package of a checkout."""
    command = [sys.executable, __file__, "--child", data, output, *arguments]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [*launcher, *command[1:]]
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, measured first")
    parser.add_argument("--before-skipped", type=int, default=160, help="episodes that it skips to resume")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pages", type=int, default=20_000)
    parser.add_argument("--size", type=int, nargs=2, default=[2400, 1600], help="width and height of the images")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="episodes of one rank in a batch")
    parser.add_argument("--skipped", type=int, default=100_000, help="episodes that are skipped to resume")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.path = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
        data, output = args.child
        figures = measured(data, output, args.steps, args.batch_size, args.skipped)
        Path(f"{output}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(figures))
        os._exit(0)  # torch ends its threads in an order that now and then aborts the process
    here = Path(__file__).resolve().parents[2]
    codes = [("before", args.before.resolve(), args.before_skipped)] if args.before else []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = make_pages(Path(folder), args.pages, (args.size[0], args.size[1]))
        for name, code, skipped in [*codes, ("now", here, args.skipped)]:
            for ranks in args.ranks:
                output = os.path.join(folder, f"{name}-{ranks}")
                given = ["--steps", str(args.steps), "--batch-size", str(args.batch_size), "--skipped", str(skipped)]
                for rank, figures in enumerate(run_ranks(code, ranks, data, output, given)):
                    scaled = {key: figures[key] * args.skipped / skipped for key in ("resume s", "resume CPU s")}
                    rows.append({"code": name, "ranks": ranks, "rank": rank, **figures, **scaled})
    if args.json:
        print(json.dumps(rows))
        return
    note = f", before scaled up from {args.before_skipped}" if args.before else ""
    print(f"{args.steps} steps of {args.batch_size} episodes a rank, JPEGs of {args.size[0]} x {args.size[1]}")
    print(f"resumed behind {args.skipped} episodes{note}")
    print("  ".join(f"{name:>19}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>19.2f}" if isinstance(value, float) else f"{value:>19}" for value in row.values()))


if __name__ == "__main__":
    main()
