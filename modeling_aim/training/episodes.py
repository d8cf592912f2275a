"""Episodes, the unit of training: some pairs of image and text, of which later ones are answered from earlier ones.

A *source* (one dataset) gives episodes for ever, in an order that follows from the seed alone; a `Mixture` draws from
several sources by weight. Documents hold *pairs* as raw demonstrations, images unopened; an episode holds them opened,
and says how many could not be.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from ..data.pairs import Pair, is_refused, opened
from ..demonstrations_aim import Demonstration

MOST_REFUSED = 0.1  # of a source's pairs, from the first hundred that were refused on
LAWS = ("uniform", "exponential", "fixed")


@dataclass(frozen=True)
class Episode:
    """Pairs in order, and which of them are targets: each is answered from the pairs before it.

    Args:
        pairs: opened demonstrations.
        targets: places in `pairs`, none of them 0 unless it is to be answered from nothing.
        source: the dataset it comes from.
        skipped: what was left out on the way, by reason, and how often.
    """

    pairs: tuple[Demonstration, ...]
    targets: tuple[int, ...]
    source: str = ""
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ShotLaw:
    """How many demonstrations an episode has: 1 to `most`.

    Args:
        most: the largest number.
        law: `"uniform"`; `"exponential"`, which favours many (each number is `e ** (1 / 4)` times as likely as the one
            below it, Link-Context Learning's 2-way-weight); or `"fixed"`, always `most`.
    """

    most: int = 8
    law: str = "uniform"

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"shots={self.most}: an episode needs at least one demonstration.")
        if self.law not in LAWS:
            raise ValueError(f"shot law {self.law!r} is unknown; choose one of {LAWS}.")

    def draw(self, rng: random.Random) -> int:
        """One number of demonstrations."""
        if self.law == "fixed":
            return self.most
        weights = [2.718281828 ** (k / 4) if self.law == "exponential" else 1.0 for k in range(self.most)]
        return rng.choices(range(1, self.most + 1), weights)[0]


class Source:
    """One dataset, as a stream of episodes. Subclasses give `documents`, and say whether their order has a meaning.

    What `documents` itself leaves out (a broken line) it counts in `skipped`, which the next episode takes along.

    Attributes:
        name: for messages, logs and the model card.
        interleaved: a document is a whole whose order has a meaning (a web page): it is cut into episodes, and every
            pair after the first is a target. Otherwise pairs are independent, and an episode takes the next few.
        unusable: says why the model that is trained cannot read a demonstration, if it cannot; `None` before there is
            a model.
        part: a share of the documents that is held out, and whether this source gives that or the others; `None` for
            all documents.
    """

    name: str = ""
    interleaved: bool = False
    part: tuple[float, bool] | None = None
    unusable: Callable[[Demonstration], str | None] | None = None

    @cached_property
    def skipped(self) -> Counter[str]:
        """What was left out since the last episode, by reason."""
        return Counter()

    @cached_property
    def counted(self) -> Counter[bool]:
        """Pairs so far: those refused (`is_refused`), and those given."""
        return Counter()

    def opened(self, pairs: Iterable[Pair]) -> Iterator[Demonstration]:
        """Pairs with their images opened, without those that cannot be used."""
        return opened(pairs, self.skipped, self.unusable)

    def documents(self, seed: int) -> Iterator[Sequence[Pair]]:
        """One pass over the dataset, in an order that depends on `seed` alone."""
        raise NotImplementedError

    def split(self, share: float) -> tuple[Source, Source]:
        """This source without a share of its documents, and with these alone; a document's content decides."""
        parts = []
        for held_out in (False, True):
            part = copy.copy(self)
            for name in ("skipped", "counted"):
                part.__dict__.pop(name, None)
            part.part = (share, held_out)
            parts.append(part)
        return parts[0], parts[1]

    def gives(self, document: Any) -> bool:
        """Whether a document (or what identifies it) is of this part of the source."""
        if self.part is None:
            return True
        share, held_out = self.part
        digest = hashlib.sha256(_identity(document).encode("utf-8", "replace")).digest()
        return (int.from_bytes(digest[:8], "big") < share * 2**64) == held_out

    def episodes(self, law: ShotLaw, seed: int) -> Iterator[Episode]:
        """One pass over the dataset, cut into episodes.

        Args:
            law: draws the number of demonstrations of each episode.
            seed: decides order and numbers.
        """
        rng = random.Random(f"{self.name} {seed}")
        pairs: list[Demonstration] = []
        shots = law.draw(rng)
        for document in self.documents(seed):
            if not self.gives(document):
                continue
            if self.interleaved:
                pairs = []
            usable = 0
            for pair in self.opened(document):
                usable += 1
                pairs.append(pair)
                if len(pairs) == shots + 1:
                    yield self._episode(pairs)
                    pairs, shots = [], law.draw(rng)
            if self.interleaved and len(pairs) > 1:
                yield self._episode(pairs)
                shots = law.draw(rng)
            elif self.interleaved and usable < 2:
                self.skipped["document with fewer than two pairs"] += 1
        if not self.interleaved and len(pairs) > 1:
            yield self._episode(pairs)

    def _episode(self, pairs: Sequence[Demonstration], targets: Sequence[int] | None = None) -> Episode:
        """An episode that takes along what was left out before it; every pair but the first is a target by default."""
        taken = Counter(self.skipped)
        self.skipped.clear()
        self.counted[False] += len(pairs)
        self.counted[True] += sum(count for reason, count in taken.items() if is_refused(reason))
        if self.counted[True] > max(100, MOST_REFUSED * self.counted.total()):
            raise ValueError(
                f"{self.counted[True]} of the first {self.counted.total()} pairs of {self.name} cannot be read by "
                f"this model, such as {next(filter(is_refused, taken), 'those in the log')}. Mend the data."
            )
        return Episode(tuple(pairs), tuple(range(1, len(pairs)) if targets is None else targets), self.name, taken)


def _identity(document: Any) -> str:
    """What a document is known by: its words, and its images where they are named or are bytes."""
    if isinstance(document, Mapping):
        return "{" + ",".join(f"{name}:{_identity(value)}" for name, value in sorted(document.items())) + "}"
    if isinstance(document, bytes):
        return hashlib.sha256(document).hexdigest()
    if isinstance(document, (list, tuple)):
        return "[" + ",".join(_identity(part) for part in document) + "]"
    return str(document) if isinstance(document, (str, os.PathLike)) else ""


class Mixture(IterableDataset):
    """Episodes of several sources, drawn by weight, without end.

    Each worker of a `DataLoader` goes through the data in an order of its own, from a seed of its own. Each process of
    a distributed run goes through the same episodes and takes its share, as one process with their joint batch would;
    so each opens all images, which workers can do beside the training.

    Args:
        sources: at least one.
        weights: how often each is drawn, relative to the others.
        law: the number of demonstrations.
        seed: the same seed gives the same episodes.

    Raises:
        ValueError: no source, a weight that is not above 0, or, while it is read, a source without one usable episode.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], law: ShotLaw, seed: int = 0) -> None:
        if not sources:
            raise ValueError("There is nothing to train on: give at least one source of data.")
        bad = [weight for weight in weights if not weight > 0]
        if bad or len(weights) != len(sources):
            raise ValueError(f"{len(sources)} sources need as many weights, each above 0; got {list(weights)}.")
        self.sources, self.weights, self.law, self.seed = list(sources), list(weights), law, seed

    def check_with(self, unusable: Callable[[Demonstration], str | None]) -> None:
        """Leave out demonstrations for which `unusable` gives a reason: those that a model cannot read."""
        for source in self.sources:
            source.unusable = unusable

    def __iter__(self) -> Iterator[Episode]:
        worker = get_worker_info()
        seed = self.seed + (0 if worker is None else 1_000_003 * worker.id)
        rng = random.Random(f"mixture {seed}")
        streams = [self._endless(source, seed) for source in self.sources]
        while True:
            yield next(rng.choices(streams, self.weights)[0])

    def split(self, share: float) -> tuple[Mixture, Mixture]:
        """This mixture without a share of the documents of each source, and with these alone."""
        parts = [source.split(share) for source in self.sources]
        return (
            Mixture([train for train, _ in parts], self.weights, self.law, self.seed),
            Mixture([held for _, held in parts], self.weights, self.law, self.seed + 10**6),
        )

    def _endless(self, source: Source, seed: int) -> Iterator[Episode]:
        passes = 0
        source.skipped.clear()
        while True:
            episode = None
            for episode in source.episodes(self.law, seed + passes):
                yield episode
            if episode is None:
                left_out = ", ".join(f"{reason}: {count}" for reason, count in sorted(source.skipped.items()))
                raise ValueError(
                    f"{source.name} gave no episode: it is empty, or none of its documents has two pairs of a "
                    f"readable image and a text. Left out: {left_out or 'nothing'}. Check its path, the folder of "
                    "its images, and its similarity floor."
                )
            passes += 1
