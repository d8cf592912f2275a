"""Which demonstrations go with which example: the same for all methods, written down before anything is answered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from ..bank.select import STRATEGIES, Groups, drawn, pick
from ..data.jsonl import read_json
from ..files_aim import write_whole
from .methods import ShownShot
from .reads import Unusable, open_images, open_pair
from .task import Example, Shot, Task

logger = logging.get_logger(__name__)

FIXED = "fixed:"
ALIKE_BITS = 2  # of 64 in which the difference hashes of two pictures that count as the same may differ
Chosen = dict[tuple[int, int, str], list[Shot]]  # by seed, number of demonstrations, and example


@dataclass(frozen=True)
class Choice:
    """How demonstrations are chosen from the pool of a task that does not bring its own.

    Args:
        by: `"random"` (drawn for each example), `"image"` (RICES), `"text"`, `"fused"`, `"mmices"`, or
            `"fixed:FILE"`: the first ones of a list of ids, one a line, or JSON: a list, or one for each task by name.
        balanced: take labels in turn.
        drop_duplicates: leave out demonstrations whose picture is nearly that of the query or of another one, since
            their words would just be copied.

    Raises:
        ValueError: there is no such way.
    """

    by: str = "random"
    balanced: bool = False
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        if self.by not in STRATEGIES and not self.by.startswith(FIXED):
            raise ValueError(f"select={self.by!r} is unknown; choose one of {', '.join(STRATEGIES)}, or fixed:FILE.")

    @property
    def compares(self) -> bool:
        """Whether a model has to compare demonstrations with the query."""
        return self.by != "random" and not self.by.startswith(FIXED)


def own_shots(task: Task, examples: Mapping[int, Sequence[Example]], counts: Sequence[int]) -> Chosen:
    """Demonstrations that the examples of a task bring themselves."""
    return {
        (seed, count, example.id): list(task.shots(example, count, seed))
        for seed, queries in examples.items()
        for count in counts
        for example in queries
    }


def check_pool(task: Task, counts: Sequence[int], choice: Choice) -> None:
    """Raise `ValueError` unless a task's pool has as many demonstrations as are asked for, each under its own id."""
    pool = task.pool()
    if counts and len(pool) < max(counts):
        short = f"{max(counts)} demonstrations are asked for, but {task.name} has {len(pool)} to choose from."
        raise ValueError(" ".join([short, *task.notes()]))
    if len({shot.id for shot in pool}) < len(pool):
        raise ValueError(f"{task.name} gives several demonstrations the same id.")
    if choice.by.startswith(FIXED) and counts:
        _listed(task, max(counts), choice)


def choose_all(
    task: Task,
    examples: Mapping[int, Sequence[Example]],
    counts: Sequence[int],
    choice: Choice,
    path: Path,
    bank_of: Callable[[Iterator[Any]], Any],
    report: Callable[[int], None] | None = None,
) -> None:
    """Choose for every example, seed and number of demonstrations, and write ids to `path`, a line each.

    Args:
        task: has a pool.
        examples: by seed.
        counts: numbers of demonstrations.
        choice: how.
        path: of the file; what is there already is kept.
        bank_of: makes an opened bank of a stream of demonstrations, where they are compared.
        told: called with the number of examples finished since its last call.
    """
    if path.exists():
        return
    finder = _Finder(task, choice, bank_of)
    lines, known = [], dict[tuple[int, int, str], list[str]]()
    first = next(iter(examples.values()))
    for seed, queries in examples.items():
        draws_each_time = choice.by == "random" or queries != first
        for example in queries:
            for count in counts:
                key = (seed if draws_each_time else 0, count, example.id)
                if key not in known:
                    try:
                        places = finder.find(example, count, seed)
                    except Unusable:  # its own image: it is left out when it is to be answered
                        places = list(range(count))
                    known[key] = [task.pool()[place].id for place in places]
                chosen = known[key]
                lines.append({"seed": seed, "shots": count, "example": example.id, "demonstrations": chosen})
            if report is not None:
                report(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_chosen(task: Task, path: Path) -> Chosen:
    """What `choose_all` wrote."""
    pool = {shot.id: shot for shot in task.pool()}
    chosen: Chosen = {}
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            missing = [name for name in row["demonstrations"] if name not in pool]
            if missing:
                raise ValueError(f"{path} names the demonstration {missing[0]!r}, which {task.name} no longer has.")
            chosen[row["seed"], row["shots"], row["example"]] = [pool[name] for name in row["demonstrations"]]
    return chosen


class _Finder:
    """Places in the pool for one example after another."""

    def __init__(self, task: Task, choice: Choice, bank_of: Callable[[Iterator[Any]], Any]) -> None:
        self.task, self.choice, self.pool = task, choice, task.pool()
        self.bank: Any = None
        self.groups: Groups | None = None
        self._hashes: dict[str, list[int]] = {}
        if choice.compares:
            self.bank, self.places = self._compared(bank_of)
        elif choice.balanced:
            numbers: dict[str | None, int] = {}
            codes = [numbers.setdefault(shot.label, len(numbers)) for shot in self.pool]
            self.groups = Groups(torch.tensor(codes, dtype=torch.int32)) if len(numbers) > 1 else None

    def _compared(self, bank_of: Callable[[Iterator[Any]], Any]) -> tuple[Any, list[int]]:
        """A bank of the pool, and the place in the pool of each of its demonstrations (equal ones are one there)."""
        keys: dict[str, int] = {}

        def stream() -> Iterator[Any]:
            for place, shot in enumerate(self.pool):
                try:
                    demo = open_pair(shot.pair, f"Demonstration {shot.id!r} of {self.task.name}")
                except Unusable as error:
                    logger.warning(f"Never chosen: {error}")
                    continue
                keys.setdefault(demo.key, place)
                yield demo

        bank = bank_of(stream())
        names: list[str] = bank.keys()
        return bank, [keys[name] for name in names]

    def find(self, example: Example, count: int, seed: int) -> list[int]:
        """Places in the pool, most similar last."""
        if self.choice.by.startswith(FIXED):
            return _listed(self.task, count, self.choice)
        wanted, most = count, len(self.pool if self.bank is None else self.places)
        if count > most:
            raise ValueError(f"{self.task.name} has {most} different demonstrations to choose from, not {count}.")
        while True:
            ranked = self._ranked(example, wanted, seed)
            repeats = self._repeated(example, ranked) if self.choice.drop_duplicates else []
            if wanted - len(repeats) >= count or wanted >= most:
                kept = [place for place in ranked if place not in repeats]
                return (kept if len(kept) >= count else ranked)[-count:]
            wanted = min(most, count + len(repeats))

    def _ranked(self, example: Example, count: int, seed: int) -> list[int]:
        if self.bank is None:
            number = int(hashlib.sha256(f"{self.task.name} {seed} {example.id}".encode()).hexdigest()[:8], 16)
            return pick(drawn(len(self.pool), number), count, self.groups, lambda place, others: False)
        query: Any = {"question": example.question}
        if example.images:
            query["images"] = open_images(example.images, f"Example {example.id!r} of {self.task.name}")
        near = 0.98 if self.choice.drop_duplicates else None
        chosen = self.bank.choose(query, count, self.choice.by, balanced=self.choice.balanced, near_duplicate=near)
        return [self.places[number] for number, _ in chosen]

    def _repeated(self, example: Example, ranked: Sequence[int]) -> list[int]:
        """Near-duplicates of an earlier image; the most similar to the query stay."""
        seen = list(self._hashed(f"query {example.id}", example.images))
        repeats = []
        for place in reversed(ranked):
            shot = self.pool[place]
            try:
                own = self._hashed(f"shot {shot.id}", ShownShot(shot, shot).images)
            except Unusable:
                own = []
            if any((a ^ b).bit_count() <= ALIKE_BITS for a in own for b in seen):
                repeats.append(place)
            else:
                seen += own
        return repeats

    def _hashed(self, name: str, images: Sequence[object]) -> list[int]:
        if name not in self._hashes:
            self._hashes[name] = [
                difference_hash(image) for image in open_images(list(images), f"{self.task.name}, {name}")
            ]
        return self._hashes[name]


def difference_hash(image: Image.Image) -> int:
    """64 bits that say in which direction brightness changes over a picture; the same for one resized or recoded."""
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    bits = (small[:, 1:] > small[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def _listed(task: Task, count: int, choice: Choice) -> list[int]:
    """Places in the pool of the first ids of a list.

    Raises:
        ValueError: there is no such file, it has too few ids, or one is not in the pool.
    """
    path = Path(choice.by.removeprefix(FIXED))
    if not path.is_file():
        raise ValueError(f"select={choice.by!r}: there is no file {path}.")
    listed: Any = read_json(path) if path.suffix == ".json" else path.read_text("utf-8", "replace").split("\n")
    if isinstance(listed, dict):
        listed = listed.get(task.name, [])
    if not isinstance(listed, list):
        raise ValueError(
            f"{path} holds {listed!r:.60}; expected a JSON list of ids, or an object with one for each task."
        )
    ids = [str(entry).strip() for entry in listed if str(entry).strip()]
    places = {shot.id: place for place, shot in enumerate(task.pool())}
    wrong = [entry for entry in ids[:count] if entry not in places]
    if wrong or len(ids) < count:
        what = f"{wrong[0]!r}, which is not a demonstration of {task.name}" if wrong else f"{len(ids)} for {task.name}"
        raise ValueError(
            f"{path} lists {what}; {count} ids of its pool are needed, such as {next(iter(places), None)!r}."
        )
    return [places[entry] for entry in ids[:count]]
