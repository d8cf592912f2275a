"""What a demonstration bank holds: shards of columns, looked up by the number of a demonstration."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..demonstrations_aim import FusedDemonstrations, numbers_of
from ..files_aim import as_bytes
from .shards import DTYPES, Shard, fused_columns, make_shard

if TYPE_CHECKING:
    from typing import Self


class BankContents:
    """Demonstrations by number; `DemonstrationBank` chooses among them and keeps them.

    Args:
        fused: what `model.read(demos)` returned.
    """

    def __init__(self, fused: FusedDemonstrations) -> None:
        columns, about = fused_columns(fused)
        self._setup([make_shard(columns, about)], dict(fused.source))
        self._fused: FusedDemonstrations | None = fused

    def _setup(self, shards: Sequence[Shard], source: Mapping[str, str], folder: Path | None = None) -> None:
        self._shards, self.source, self.folder = list(shards), dict(source), folder
        self._starts = [0]
        for shard in shards:
            self._starts.append(self._starts[-1] + len(shard))
        self._fused = None
        self.duplicates = 0

    @classmethod
    def of_shards(cls, shards: Sequence[Shard], source: Mapping[str, str], folder: Path | None = None) -> Self:
        bank = cls.__new__(cls)
        bank._setup(shards, source, folder)
        return bank

    # --- what is in it

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int | slice | Sequence[int]) -> FusedDemonstrations:
        """The demonstrations at `index` (a number, a slice, or a list of numbers), in that order; only they are read.

        Raises:
            IndexError: there is no such demonstration.
            ValueError: `index` is a mask, or what is stored of one of them is damaged; the message names file and
                demonstration.
        """
        if self._fused is not None:
            return self._fused[index]
        numbers = numbers_of(index, len(self))
        vectors = self._gather(numbers, lambda shard, rows: shard.vectors(rows))
        ids = self._gather(numbers, lambda shard, rows: shard.ids(rows))
        dtype = DTYPES[self._shards[0].about["dtype"]] if self._shards else torch.float32
        return FusedDemonstrations(
            vectors=torch.cat(vectors) if vectors else torch.empty(0, self.width, dtype=dtype),
            lengths=tuple(len(part) for part in vectors),
            ids=torch.cat(ids) if ids else torch.empty(0, dtype=torch.long),
            keys=tuple(self.keys(numbers)),
            texts=tuple(self.texts(numbers)),
            source=self.source,
        )

    def __iter__(self) -> Iterator[FusedDemonstrations]:
        return (self[i] for i in range(len(self)))

    def _gather(self, numbers: Sequence[int], look_up: Callable[[Shard, list[int]], Sequence[Any]]) -> list[Any]:
        """What `look_up(shard, rows)` gives for each of `numbers`, asked of each shard once."""
        by_shard: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            by_shard.setdefault(bisect.bisect_right(self._starts, number) - 1, []).append(place)
        gathered: list[Any] = [None] * len(numbers)
        for at, places in by_shard.items():
            values = look_up(self._shards[at], [numbers[place] - self._starts[at] for place in places])
            for place, value in zip(places, values, strict=True):
                gathered[place] = value
        return gathered

    @property
    def fused(self) -> FusedDemonstrations:
        """All demonstrations as what `read` returns: this loads the whole bank."""
        return self[:] if self._fused is None else self._fused

    @property
    def num_tokens(self) -> int:
        """Fused tokens of all demonstrations together."""
        return sum(shard.tokens for shard in self._shards)

    @property
    def width(self) -> int:
        """Width of a fused token: the backbone's hidden size, once for each depth that states enter."""
        return self._shards[0].width if self._shards else 0

    def keys(self, index: Sequence[int] | None = None) -> list[str]:
        """Content identity of the demonstrations at `index`, or of all (`Demonstration.key`)."""
        return self._gather(
            self._numbers(index),
            lambda shard, rows: [bytes(row).hex() for row in shard.columns["keys"][rows].tolist()],
        )

    def texts(self, index: Sequence[int] | None = None) -> list[str]:
        """What the demonstrations at `index`, or all, say."""
        return self._gather(self._numbers(index), lambda shard, rows: shard.words("texts", rows))

    def labels(self, index: Sequence[int] | None = None) -> list[str | None]:
        """Labels of the demonstrations at `index`, or of all; `None` where one has none."""
        words = self._gather(self._numbers(index), lambda shard, rows: shard.words("labels", rows))
        return [word or None for word in words]

    def thumbnails(self, index: Sequence[int] | None = None) -> list[bytes]:
        """Small JPEGs of the first image of the demonstrations at `index`, or of all; empty where there is none."""
        return self._gather(
            self._numbers(index),
            lambda shard, rows: (
                [bytes(as_bytes(part)) for part in shard.rows("thumbnails", rows)]
                if "thumbnails" in shard.columns
                else [b""] * len(rows)
            ),
        )

    def states(self, index: Sequence[int] | None = None) -> list[torch.Tensor]:
        """Hidden states `(positions, read width)` of the demonstrations at `index`, or of all.

        Raises:
            ValueError: the bank was built without `keep_states=True`.
        """
        if not self.has_states:
            raise ValueError(
                "This bank keeps no hidden states, so no other projector can be put on it. Build it again with "
                "keep_states=True."
            )
        return self._gather(self._numbers(index), lambda shard, rows: shard.rows("states", rows))

    def _numbers(self, index: Sequence[int] | None) -> Sequence[int]:
        return range(len(self)) if index is None else [range(len(self))[number] for number in index]

    @property
    def has_states(self) -> bool:
        """Whether hidden states are kept, so that another projector can be put on them."""
        return bool(self._shards) and all("states" in shard.columns for shard in self._shards)

    @property
    def features(self) -> dict[str, int]:
        """Kinds of features by which demonstrations can be chosen, and how wide they are."""
        shared = [shard.features for shard in self._shards]
        return {k: v for k, v in shared[0].items() if all(other.get(k) == v for other in shared)} if shared else {}

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored, without headers and manifest."""
        return sum(shard.nbytes for shard in self._shards)

    def info(self) -> dict[str, Any]:
        """What is in the bank, for people and programs."""
        counts: dict[str, int] = {}
        for label in self.labels():
            if label is not None:
                counts[label] = counts.get(label, 0) + 1
        stored = sorted({str(s.columns["vectors"].dtype).removeprefix("torch.") for s in self._shards})
        return {
            "demonstrations": len(self),
            "fused_tokens": self.num_tokens,
            "hidden_size": self.width,
            "bytes": self.nbytes,
            "stored_as": ", ".join(stored),
            "shards": len(self._shards),
            "merged_duplicates": self.duplicates,
            "features": self.features,
            "hidden_states": self.has_states,
            "labels": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
            "source": dict(self.source),
        }
