"""Choosing demonstrations: by likeness or at random, spread over labels, without near-duplicates, most alike last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

WAYS = ("random", "image", "text", "fused", "mmices")
KINDS = {"image": ("image",), "text": ("text",), "fused": ("fused",), "mmices": ("image", "text")}
FAISS_FROM = 50_000  # demonstrations; below it a matrix product is as fast
INNER_PRODUCT = 0  # faiss.METRIC_INNER_PRODUCT
MMICES_POOL = 200  # demonstrations with the most alike images, of which the most alike texts are taken
ABSENT = -2.0  # below every cosine: a demonstration without an image, when it is images that are compared


def check_way(by: Any) -> None:
    """Raise `ValueError` unless `by` is a way to choose."""
    if isinstance(by, str) and by not in WAYS:
        raise ValueError(f"by={by!r}: expected one of {', '.join(WAYS)}, or a list of numbers or keys.")


@lru_cache(maxsize=4)
def _sketching(width: int, to: int) -> torch.Tensor:
    """A fixed random matrix `(width, to)`: numpy keeps this stream the same in every version."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal((width, to)).astype(np.float32))


def sketched(features: torch.Tensor, width: int) -> torch.Tensor:
    """Features `(rows, any)` as unit vectors `(rows, width)`; cosines stay within about `1 / sqrt(width)`.

    Wider ones are multiplied by a fixed random matrix, narrower ones padded; a row of zeros stays one.
    """
    features = features.detach().float().cpu()
    features = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    if features.shape[1] > width:
        features = features @ _sketching(features.shape[1], width)
    features = torch.nn.functional.pad(features, (0, width - features.shape[1]))
    return features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)


class Likeness:
    """The features of a bank, ready to be compared: cosine of unit vectors, each less the mean of the bank.

    Taking the mean away keeps what tells demonstrations apart; what all have in common is most of a feature.

    Args:
        features: unit vectors `(demonstrations, width)`; zeros where a demonstration has none.
    """

    def __init__(self, features: torch.Tensor) -> None:
        self.unit = features.float()
        self.there = self.unit.any(dim=1)
        count = int(self.there.sum())
        self.mean = self.unit.sum(dim=0) / max(count, 1)
        if count < 2:  # nothing to tell apart
            self.mean = torch.zeros_like(self.mean)
        self.unit = self._centred(self.unit)
        self.all_there = count == len(self.unit)
        self.index: Any = None

    def _centred(self, rows: torch.Tensor) -> torch.Tensor:
        centred = torch.where(rows.any(dim=1, keepdim=True), rows - self.mean, 0.0)
        return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """Cosine of each query with each demonstration, `(queries, demonstrations)`."""
        found = torch.stack([self.unit @ query for query in self._centred(queries)])
        return found if self.all_there else torch.where(self.there, found, ABSENT)

    def nearest(self, query: torch.Tensor, count: int) -> tuple[list[int], list[float]] | None:
        """The `count` most alike, by FAISS through `datasets`; `None` where these are not installed."""
        if self.index is None:
            self.index = _faiss_index(self.unit)
        if not self.index:
            return None
        scores, found = self.index.search("features", self._centred(query[None])[0].numpy(), k=count)
        return [int(i) for i in found], [float(score) for score in scores]

    def alike(self, one: int, others: Sequence[int]) -> torch.Tensor:
        """Cosine of one demonstration with others; 1 where neither has the feature."""
        found = self.unit[list(others)] @ self.unit[one]
        return torch.where(self.there[list(others)] | self.there[one], found, 1.0)


def _faiss_index(features: torch.Tensor) -> Any:
    """A `datasets` data set with an exact FAISS index over `features`, or `False`."""
    try:
        import_module("faiss")
        data = import_module("datasets").Dataset.from_dict({"number": list(range(len(features)))})
    except ImportError:
        return False
    data.add_faiss_index_from_external_arrays(features.numpy(), index_name="features", metric_type=INNER_PRODUCT)
    return data


class Groups:
    """Demonstrations by label, so that the best of each label is found without sorting all.

    Args:
        labels: a number for each demonstration's label `(demonstrations,)`.
    """

    def __init__(self, labels: torch.Tensor) -> None:
        numbers = labels.numpy()
        self.order = np.argsort(numbers, kind="stable")
        self.starts = np.flatnonzero(np.r_[True, numbers[self.order][1:] != numbers[self.order][:-1]])
        self.parts = np.split(self.order, self.starts[1:])

    def in_turn(self, scores: np.ndarray) -> Iterator[int]:
        """The best of each label, best first; then the second best of each; and so on."""
        best = np.maximum.reduceat(scores[self.order], self.starts)
        ranked: list[np.ndarray] = []
        for label in np.argsort(-best, kind="stable"):
            part = self.parts[label]
            ranked.append(part[np.argsort(-scores[part], kind="stable")])
            yield int(ranked[-1][0])
        for turn in range(1, max(map(len, ranked))):
            here = [int(part[turn]) for part in ranked if len(part) > turn]
            yield from sorted(here, key=lambda i: -scores[i])


def pick(
    scores: torch.Tensor, k: int, groups: Groups | None, repeats: Callable[[int, Sequence[int]], bool]
) -> list[int]:
    """Choose `k` by score, the best of each label first, then the second best of each, without near-duplicates.

    Args:
        scores: `(demonstrations,)`.
        k: how many; there are at least as many.
        groups: the demonstrations by label, or `None` to take no account of labels.
        repeats: whether a demonstration is a near-duplicate of one of those chosen. Near-duplicates are chosen only
            when nothing else is left, or hundreds of them came first.

    Returns:
        Their numbers, highest score last.
    """
    chosen: list[int] = []
    left_out: list[int] = []
    for number in _best_first(scores, k) if groups is None else groups.in_turn(scores.numpy()):
        (left_out if repeats(number, chosen) else chosen).append(number)
        if len(chosen) == k or len(left_out) > 64 * k:
            break
    if len(chosen) < k:
        taken = {*chosen, *left_out}
        rest = (i for i in scores.argsort(descending=True, stable=True).tolist() if i not in taken)
        chosen += list(islice(chain(left_out, rest), k - len(chosen)))
    return sorted(chosen, key=lambda i: (float(scores[i]), -i))


def _best_first(scores: torch.Tensor, k: int) -> Iterator[int]:
    """Numbers from the highest score down; all are sorted only when the first few do not do."""
    first = min(len(scores), 4 * k + 64)
    seen = scores.topk(first).indices.tolist()
    yield from seen
    if first < len(scores):
        taken = set(seen)
        yield from (i for i in scores.argsort(descending=True, stable=True).tolist() if i not in taken)


def drawn(count: int, seed: int) -> torch.Tensor:
    """Random scores, the same for the same seed."""
    order = np.random.RandomState(seed % 2**32).permutation(count)
    return torch.from_numpy(order.astype(np.float32))
