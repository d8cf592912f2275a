"""Sources that read files in order, shuffled in a bounded buffer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from ..data.pairs import Pair
from .episodes import Source

T = TypeVar("T")


def shuffled(items: Iterable[T], size: int, rng: random.Random) -> Iterator[T]:
    """A stream in random order, with at most `size` items held in memory."""
    held: list[T] = []
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        place = rng.randrange(size)
        item, held[place] = held[place], item
        yield item
    rng.shuffle(held)
    yield from held


class ShuffledSource(Source):
    """A source that gives its documents in the order of its files, and has them shuffled here.

    Args:
        name: of the source.
        shuffle_buffer: documents that are held in memory to be shuffled, images unopened.
    """

    def __init__(self, name: str, shuffle_buffer: int) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={shuffle_buffer}: expected at least 1, which leaves files in order.")
        self.name, self.shuffle_buffer = name, shuffle_buffer

    def documents(self, seed: int) -> Iterator[Sequence[Pair]]:
        rng = random.Random(f"order {seed}")
        return shuffled(self._read(rng), self.shuffle_buffer, rng)

    def _read(self, rng: random.Random) -> Iterator[Sequence[Pair]]:
        """Documents shard by shard, shards in an order drawn from `rng`."""
        raise NotImplementedError
