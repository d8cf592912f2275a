"""Episodes, the unit of training: some pairs of image and text, of which later ones are answered from earlier ones.

A *source* (one dataset) gives episodes for ever, in an order that follows from the seed alone; a `Mixture` draws from
several sources by weight. An episode is light: its pairs are raw demonstrations with their images unopened, so every
process can go through all of them, take its share (`EpisodeStream`), and open the images of that share alone
(`EpisodeCollator`).
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, islice
from typing import Any

from ..data.pairs import Pair, Shrink, Unopened, is_refused, opened_pair, size_of
from ..demonstrations_aim import Demonstration

MOST_REFUSED = 0.1  # of a source's pairs, from the first hundred that were refused on
FAILED_IN_A_ROW = 1000  # pairs of a source
LOOKED_AT = 1000  # episodes of a source, before a run
IMAGE_TOKENS = 256  # of an image that is unopened, to group episodes of similar length
LAWS = ("uniform", "exponential", "fixed")


@dataclass(frozen=True)
class Episode:
    """Pairs in order, and which of them are targets: each is answered from the pairs before it.

    Args:
        pairs: raw demonstrations with their images unopened, or opened ones.
        targets: places in `pairs`, none of them 0 unless it is to be answered from nothing.
        source: the dataset it comes from.
        skipped: what was left out on the way, by reason, and how often.
        whole: it is left out if one of its demonstrations cannot be read, since that may have shown what is asked for.
    """

    pairs: tuple[Pair | Demonstration, ...]
    targets: tuple[int, ...]
    source: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    whole: bool = False

    @property
    def length(self) -> tuple[int, int]:
        """Targets, and an estimate of the tokens of all pairs: a quarter of the characters, and so many an image."""
        sizes = [size_of(pair) for pair in self.pairs]
        return len(self.targets), sum(words // 4 + IMAGE_TOKENS * images for words, images in sizes)

    def opened(
        self, unusable: Callable[[Demonstration], str | None] | None = None, shrink: Shrink | None = None
    ) -> Episode:
        """This episode with its images opened, without the pairs that cannot be used; these are counted in `skipped`.

        Args:
            unusable: says why a model cannot read a demonstration, if it cannot (`AimProcessor.why_unreadable`).
            shrink: by how much a large image may be shrunk, see `open_image`.

        Returns:
            An episode of `Demonstration`s; it has no pairs and no targets where nothing is left to learn from.
        """
        skipped, target_places = Counter(self.skipped), set(self.targets)
        demos = [opened_pair(pair, skipped, unusable, shrink) for pair in self.pairs]
        kept = [(place, demo) for place, demo in enumerate(demos) if demo is not None]
        targets = [new for new, (place, _) in enumerate(kept) if place in target_places and (new or not place)]
        if self.whole and any(demo is None for place, demo in enumerate(demos) if place not in target_places):
            skipped["episode with a demonstration that cannot be read"] += 1
            targets = []
        elif target_places and not targets and not self.whole:
            skipped["episode with fewer than two pairs that can be read"] += 1
        pairs = tuple(demo for _, demo in kept) if targets else ()
        return replace(self, pairs=pairs, targets=tuple(targets), skipped=skipped)


@dataclass(frozen=True)
class ShotLaw:
    """How many demonstrations an episode has: 1 to `most`.

    Args:
        most: the largest number.
        law: `"uniform"`; `"exponential"`, which favours many (each number is `e ** (1 / 4)` times as likely as the one
            below it, Link-Context Learning's 2way_random_shot over two classes); or `"fixed"`, always `most`.
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
        return rng.choices(range(1, self.most + 1), self._weights)[0]

    @cached_property
    def _weights(self) -> list[float]:
        return [2.718281828 ** (k / 4) if self.law == "exponential" else 1.0 for k in range(self.most)]


class Source:
    """One dataset, as a stream of episodes. Subclasses give `documents`, and say whether their order has a meaning.

    What `documents` itself leaves out (a broken line) it counts in `skipped`, which the next episode takes along.

    Attributes:
        name: for messages, logs and the model card.
        interleaved: a document is a whole whose order has a meaning (a web page): it is cut into episodes, and every
            pair after the first is a target. Otherwise pairs are independent, and an episode takes the next few.
        part: a share of the documents that is held out, and whether this source gives that or the others; `None` for
            all documents.
    """

    name: str = ""
    interleaved: bool = False
    part: tuple[float, bool] | None = None

    @cached_property
    def skipped(self) -> Counter[str]:
        """What was left out since the last episode, by reason."""
        return Counter()

    def documents(self, seed: int) -> Iterator[Sequence[Pair]]:
        """One pass over the dataset, in an order that depends on `seed` alone; no image is opened."""
        raise NotImplementedError

    def split(self, share: float) -> tuple[Source, Source]:
        """This source without a share of its documents, and with these alone; a document's content decides."""
        parts = []
        for held_out in (False, True):
            part = copy.copy(self)
            part.__dict__.pop("skipped", None)
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
        pairs: list[Pair] = []
        shots = law.draw(rng)
        for document in self.documents(seed):
            if not self.gives(document):
                continue
            if self.interleaved:
                pairs = []
            count = 0
            for pair in document:
                count += 1
                pairs.append(pair)
                if len(pairs) == shots + 1:
                    yield self._episode(pairs)
                    pairs, shots = [], law.draw(rng)
            if self.interleaved and len(pairs) > 1:
                yield self._episode(pairs)
                shots = law.draw(rng)
            elif self.interleaved and count < 2:
                self.skipped["document with fewer than two pairs"] += 1
        if not self.interleaved and len(pairs) > 1:
            yield self._episode(pairs)

    def _episode(self, pairs: Sequence[Pair], targets: Sequence[int] | None = None, whole: bool = False) -> Episode:
        """An episode that takes along what was left out before it; every pair but the first is a target by default."""
        taken = Counter(self.skipped)
        self.skipped.clear()
        targets = range(1, len(pairs)) if targets is None else targets
        return Episode(tuple(pairs), tuple(targets), self.name, taken, whole)


def _identity(document: object) -> str:
    """What a document is known by: its words, and its images where they are named or are bytes; nothing is opened."""
    if isinstance(document, Unopened):
        return repr(document)
    if isinstance(document, Mapping):
        return "{" + ",".join(f"{name}:{_identity(value)}" for name, value in sorted(document.items())) + "}"
    if isinstance(document, bytes):
        return hashlib.sha256(document).hexdigest()
    if isinstance(document, (list, tuple)):
        return "[" + ",".join(_identity(part) for part in document) + "]"
    return str(document) if isinstance(document, (str, os.PathLike)) else ""


class Mixture:
    """Episodes of several sources, drawn by weight, without end, and the same in every process; no image is opened.

    `EpisodeStream` deals them to processes and to workers of a `DataLoader`.

    Args:
        sources: at least one.
        weights: how often each is drawn, relative to the others.
        law: the number of demonstrations.
        seed: the same seed gives the same episodes.

    Raises:
        ValueError: no source, a weight that is not above 0, or, while it is read, a source without one episode.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], law: ShotLaw, seed: int = 0) -> None:
        if not sources:
            raise ValueError("There is nothing to train on: give at least one source of data.")
        bad = [weight for weight in weights if not weight > 0]
        if bad or len(weights) != len(sources):
            raise ValueError(f"{len(sources)} sources need as many weights, each above 0; got {list(weights)}.")
        self.sources, self.weights, self.law, self.seed = list(sources), list(weights), law, seed

    def __iter__(self) -> Iterator[Episode]:
        rng = random.Random(f"mixture {self.seed}")
        streams = [self._endless(source) for source in self.sources]
        while True:
            yield next(rng.choices(streams, self.weights)[0])

    def check(self) -> None:
        """Open one episode of every source.

        Raises:
            ValueError: of a source, none of the first `LOOKED_AT` can be learned from.
        """
        for source in self.sources:
            source.skipped.clear()
            skipped: Counter[str] = Counter()
            for episode in islice(source.episodes(self.law, self.seed), LOOKED_AT):
                opened = episode.opened()
                skipped += opened.skipped
                if opened.targets:
                    break
            else:
                raise _nothing_in(source, skipped + source.skipped)

    def split(self, share: float) -> tuple[Mixture, Mixture]:
        """This mixture without a share of the documents of each source, and with these alone."""
        parts = [source.split(share) for source in self.sources]
        return (
            Mixture([train for train, _ in parts], self.weights, self.law, self.seed),
            Mixture([held for _, held in parts], self.weights, self.law, self.seed + 10**6),
        )

    def _endless(self, source: Source) -> Iterator[Episode]:
        source.skipped.clear()
        for passes in count():
            episode = None
            for episode in source.episodes(self.law, self.seed + passes):
                yield episode
            if episode is None:
                raise _nothing_in(source, source.skipped)


def _nothing_in(source: Source, skipped: Counter[str]) -> ValueError:
    left_out = ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items()))
    return ValueError(
        f"{source.name} gave no episode: it is empty, or none of its documents has two pairs of a readable image and "
        f"a text. Left out: {left_out or 'nothing'}. Check its path, the folder of its images, and its similarity "
        "floor."
    )


class Opener:
    """Opens the images of episodes for one model, and ends a run whose data is of no use.

    Args:
        unusable: says why the model cannot read a demonstration, if it cannot.
        shrink: by how much a large image may be shrunk, see `open_image`.

    Raises:
        ValueError: when it is called: too many pairs of a source cannot be read by the model, or none of the last
            `FAILED_IN_A_ROW` could be opened.
    """

    def __init__(
        self, unusable: Callable[[Demonstration], str | None] | None = None, shrink: Shrink | None = None
    ) -> None:
        self.unusable, self.shrink = unusable, shrink
        self._given: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()  # since the last one that could be opened

    def __call__(self, episode: Episode) -> Episode:
        opened = episode.opened(self.unusable, self.shrink)
        name, left_out = episode.source, opened.skipped - episode.skipped
        self._given[name] += len(episode.pairs)
        self._refused[name] += sum(count for reason, count in left_out.items() if is_refused(reason))
        if self._refused[name] > max(100, MOST_REFUSED * self._given[name]):
            raise ValueError(
                f"{self._refused[name]} of the first {self._given[name]} pairs of {name} cannot be read by this "
                f"model, such as {next(filter(is_refused, left_out), 'those in the log')}. Fix the data."
            )
        self._failed[name] = 0 if opened.targets else self._failed[name] + len(episode.pairs)
        if self._failed[name] >= FAILED_IN_A_ROW:
            raise ValueError(
                f"None of the last {self._failed[name]} pairs of {name} can be learned from ({dict(left_out)} in the "
                "last episode). Check that its images can be reached."
            )
        return opened
