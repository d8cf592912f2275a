"""Selection strategies: by similarity or at random, spread over labels, without near-duplicates, most similar last."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch

STRATEGIES = ("random", "image", "text", "fused", "mmices")
KINDS = {"image": ("image",), "text": ("text",), "fused": ("fused",), "mmices": ("image", "text")}
SEARCHED = ("image", "text", "fused")  # strategies that rank the whole bank by one kind of features
SEARCHES = ("auto", "torch", "faiss")
FAISS_FROM = 250_000  # demonstrations; of 100 000 a product in blocks is as fast, and copies no features
INNER_PRODUCT = 0  # faiss.METRIC_INNER_PRODUCT
MMICES_POOL = (
    4  # times k: demonstrations with the most similar images, of which those with the most similar texts are taken
)
ABSENT = -2.0  # below every cosine: a demonstration without an image, when it is images that are compared
NOT_COMPARED = -3.0  # below that: a demonstration outside of a shortlist
ALL_ALIKE = 1e-3  # a feature that differs from the mean of the bank by less differs in rounding alone
BLOCK = 2**17  # numbers that are compared at a time: in float32 they stay in the processor's cache


def check_strategy(by: object, search: str = "auto") -> None:
    """Raise `ValueError` unless `by` is a selection strategy that `search` can search for."""
    listed = all(hasattr(by, name) for name in ("__len__", "__getitem__")) and not isinstance(by, (bytes, Mapping))
    if by not in STRATEGIES if isinstance(by, str) else not listed:
        raise ValueError(f"by={by!r:.80}: expected one of {', '.join(STRATEGIES)}, or a list of numbers or keys.")
    if search not in SEARCHES:
        raise ValueError(f"search={search!r:.80}: expected one of {', '.join(SEARCHES)}.")
    if search == "faiss" and not (isinstance(by, str) and by in SEARCHED):
        raise ValueError(
            f"search='faiss' finds nearest neighbours by one of {', '.join(SEARCHED)}; got by={by!r:.80}."
        )


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number and not a bool, of Python or an array."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    try:
        return not is_bool and operator.index(value) is not None
    except TypeError:
        return False


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


class SimilarityIndex:
    """The features of a bank, ready to be compared: cosine of unit vectors, each less the mean of the bank.

    Taking the mean away keeps what tells demonstrations apart; what all have in common is most of a feature. The
    features stay where they are, mapped from files as a rule, and are gone through a block at a time.

    Args:
        parts: unit vectors `(demonstrations, width)` of each shard, of any type; zeros where one has none.
        only: which demonstrations are compared `(demonstrations,)`; `None` for all that have the feature.
    """

    def __init__(self, parts: Sequence[torch.Tensor], only: torch.Tensor | None = None) -> None:
        self.parts = list(parts)
        self.starts = [0, *accumulate(len(part) for part in parts)]
        total = torch.zeros(parts[0].shape[1], dtype=torch.float64)
        self.there = torch.empty(self.starts[-1], dtype=torch.bool)
        for here, rows in self._blocks():
            there = rows.any(dim=1) if only is None else rows.any(dim=1) & only[here]
            self.there[here] = there
            total += rows.mul_(there[:, None]).sum(dim=0, dtype=torch.float64)
        count = int(self.there.sum())
        self.mean = (total / count if count > 1 else torch.zeros_like(total)).float()  # of one: nothing to tell apart
        self.norms = torch.empty(self.starts[-1])
        for here, rows in self._blocks():
            self.norms[here] = rows.sub_(self.mean).norm(dim=1)
        self.norms[self.norms < ALL_ALIKE] = torch.inf
        self.index: Any = None

    def _blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in float32, some at a time, and which they are; the next ones take the same memory."""
        width = self.parts[0].shape[1]
        buffer = torch.empty(max(1, BLOCK // max(width, 1)), width)
        for part, start in zip(self.parts, self.starts[:-1], strict=True):
            for at in range(0, len(part), len(buffer)):
                block = part[at : at + len(buffer)]
                yield slice(start + at, start + at + len(block)), buffer[: len(block)].copy_(block)

    def _centred(self, rows: torch.Tensor) -> torch.Tensor:
        """Unit vectors of rows less the mean; zeros where a row has no feature, or is the mean."""
        centred = torch.where(rows.any(dim=1, keepdim=True), rows - self.mean, 0.0)
        norms = centred.norm(dim=1, keepdim=True)
        return torch.where(norms < ALL_ALIKE, 0.0, centred / norms)

    def rows(self, numbers: Sequence[int]) -> torch.Tensor:
        """Centred unit vectors of some demonstrations, `(demonstrations, width)`."""
        places = [(bisect.bisect_right(self.starts, number) - 1, number) for number in numbers]
        return self._centred(torch.stack([self.parts[at][number - self.starts[at]] for at, number in places]).float())

    def scores(self, query: torch.Tensor, among: Sequence[int] | None = None) -> torch.Tensor:
        """Cosine of a query `(width,)` with each demonstration, or with those `among` these numbers."""
        query = self._centred(query[None])[0]
        if among is not None:
            return torch.where(self.there[list(among)], self.rows(among) @ query, ABSENT)
        products = torch.empty(self.starts[-1])
        for here, rows in self._blocks():
            torch.mv(rows, query, out=products[here])
        return torch.where(self.there, ((products - self.mean @ query) / self.norms).clamp(-1, 1), ABSENT)

    def nearest(self, query: torch.Tensor, count: int) -> torch.Tensor:
        """`scores` of the `count` nearest neighbours, found by FAISS through `datasets`; the others are not compared.

        Raises:
            FaissUnavailable: one of both is not installed, or a demonstration has no feature.
        """
        if self.index is None:
            if not bool(self.there.all()):
                raise FaissUnavailable("some demonstrations of the bank have no such feature")
            self.index = _faiss_index(self)
        neighbours = self.index.search("features", self._centred(query[None])[0].numpy(), k=count)
        scores = torch.full((len(self.there),), NOT_COMPARED)
        scores[torch.from_numpy(neighbours.indices)] = torch.from_numpy(neighbours.scores)
        return scores

    def alike(self, number: int, others: Sequence[int]) -> torch.Tensor:
        """Cosine of one demonstration with others; 1 where neither has the feature, or both have that of all."""
        rows = self.rows([number, *others])
        plain = ~rows.any(dim=1)
        same = plain[1:] & plain[0] & (self.there[list(others)] == self.there[number])
        return torch.where(same, 1.0, rows[1:] @ rows[0])


class FaissUnavailable(ValueError):
    """FAISS cannot search these features."""


def _faiss_index(similarity: SimilarityIndex) -> Any:
    """A `datasets` dataset with an exact FAISS index over all features."""
    try:
        import_module("faiss")
        datasets = import_module("datasets")
    except ImportError as error:
        raise FaissUnavailable(f'{error}; to install both: pip install "modeling-aim[bank]"') from error
    features = torch.empty(similarity.starts[-1], similarity.parts[0].shape[1])
    for here, rows in similarity._blocks():
        features[here] = similarity._centred(rows)
    data = datasets.Dataset.from_dict({"number": list(range(similarity.starts[-1]))})
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        data.add_faiss_index_from_external_arrays(features.numpy(), index_name="features", metric_type=INNER_PRODUCT)
    finally:
        if had_bars:
            datasets.enable_progress_bars()
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


def shortlist(count: int, k: int) -> int:
    """How many of the best of `count` are looked at for `k`, with some to spare for near-duplicates."""
    return min(count, 4 * k + 64)


def _best_first(scores: torch.Tensor, k: int) -> Iterator[int]:
    """Numbers from the highest score down; all are sorted only when the first few do not do."""
    first = shortlist(len(scores), k)
    seen = scores.topk(first).indices.tolist()
    yield from seen
    if first < len(scores):
        taken = set(seen)
        yield from (i for i in scores.argsort(descending=True, stable=True).tolist() if i not in taken)


def drawn(count: int, seed: int) -> torch.Tensor:
    """Random scores, the same for the same seed."""
    order = np.random.RandomState(seed % 2**32).permutation(count)
    return torch.from_numpy(order.astype(np.float32))


def near_duplicates(kinds: Sequence[SimilarityIndex], limit: float | None) -> Callable[[int, Sequence[int]], bool]:
    """Whether a demonstration is at least as alike as `limit` to a chosen one in all `kinds`; never for `None`."""

    def repeats(number: int, chosen: Sequence[int]) -> bool:
        if limit is None or not chosen:
            return False
        alike = torch.stack([kind.alike(number, chosen) for kind in kinds])
        return bool((alike.amin(dim=0) >= limit).any())

    return repeats


def mmices(
    images: SimilarityIndex,
    questions: SimilarityIndex,
    query: Mapping[str, torch.Tensor],
    k: int,
    groups: Groups | None,
) -> torch.Tensor:
    """Scores of MMICES (arXiv 2311.18021): the most similar images are shortlisted, then ranked by their texts.

    The query's question is compared with questions alone: names and captions would be ranked by how much they sound
    like a question. Cosines are taken to two digits, and between equals the images decide.

    Args:
        images: of all demonstrations.
        questions: texts of those that have a question; the others get 0, the cosine of what is unrelated.
        query: features `(width,)` of `image` and `text`.
        k: how many are to be chosen.
        groups: as for `pick`; labels are taken in turn for the shortlist, too.

    Returns:
        `(demonstrations,)`; those that are not shortlisted come after the others, by their images.
    """
    seen = images.scores(query["image"])
    first = pick(seen, min(len(seen), MMICES_POOL * k), groups, lambda number, chosen: False)
    question_scores = torch.where(questions.there[first], questions.scores(query["text"], among=first), 0.0)
    scores = seen.clamp(min=-1) + NOT_COMPARED - 1
    scores[first] = question_scores.mul(100).round() / 100 + 0.004 * seen[first].clamp(
        min=-1
    )  # less than half a digit
    return scores
