"""Episodes for a `DataLoader`: distributed over processes and workers, grouped by length, skipped on resume.

Every process goes through the same light episodes, whose images are unopened, and takes its share by their numbers. So
what is learned does not depend on how many processes and workers share the work, and no image is opened twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .episodes import Episode

WINDOW = 4  # blocks that are sorted together


class EpisodeStream(IterableDataset):
    """A stream of episodes in blocks of one batch over all processes.

    Each worker of a `DataLoader` gives its own blocks: the first of two has blocks 0, 2, 4, ... Of a block, accelerate
    gives each process its part (`IterableDatasetShard`).

    Args:
        episodes: gives the same ones in the same order in every process, such as a `Mixture`.
        block: episodes in one batch over all processes.
        group_by_length: sort the episodes of `WINDOW` blocks by length, so that less of a batch is padding, and give
            these blocks in random order.
        seed: of that order.

    Attributes:
        skip: blocks that a resumed run has done. `None` takes the place of each of their episodes.
    """

    def __init__(self, episodes: Iterable[Episode], block: int, group_by_length: bool = True, seed: int = 0) -> None:
        if block < 1:
            raise ValueError(f"block={block}: expected the number of episodes in a batch, 1 or more.")
        self.episodes, self.block, self.group_by_length, self.seed = episodes, block, group_by_length, seed
        self.skip = 0

    def __iter__(self) -> Iterator[Episode | None]:
        worker = get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        order = torch.Generator().manual_seed(self.seed)
        episodes, number = iter(self.episodes), 0
        while held := list(islice(episodes, self.block * (WINDOW if self.group_by_length else 1))):
            if self.group_by_length and number + WINDOW > self.skip:  # of those that are skipped none is looked at
                held.sort(key=lambda episode: episode.length)
            blocks = [held[start : start + self.block] for start in range(0, len(held), self.block)]
            for place in torch.randperm(len(blocks), generator=order).tolist():
                if number % workers == own:
                    yield from [None] * len(blocks[place]) if number < self.skip else blocks[place]
                number += 1
