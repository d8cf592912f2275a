"""Choosing from a bank: by the number of a demonstration, at random, or by what the backbone sees of a query."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..demonstrations_aim import FusedDemonstrations, Selection, check_source
from .contents import BankContents
from .select import (
    FAISS_FROM,
    KINDS,
    FaissUnavailable,
    Groups,
    SimilarityIndex,
    check_strategy,
    drawn,
    is_whole,
    mmices,
    near_duplicates,
    pick,
    shortlist,
    sketched,
)
from .shards import HAS_QUESTION, Shard, is_finite, mean_tokens

if TYPE_CHECKING:
    from ..registered import AimForConditionalGeneration

SELECT_OPTIONS = {"balanced", "near_duplicate", "search", "seed"}


@dataclass(frozen=True)
class BankChoice:
    """`shots` and `select` bound to a bank: what is chosen once the queries are known; goes where `demos=` is taken.

    Args:
        bank: the bank to choose from.
        shots: how many for each row; see `ChoosingBank.select_rows`.
        select: how they are selected.
    """

    aim_kind: ClassVar[str] = "choice"

    bank: ChoosingBank
    shots: int | None
    select: Selection

    def __len__(self) -> int:
        return len(self.bank)

    @property
    def fused(self) -> FusedDemonstrations:
        """Raise `ValueError`: nothing is chosen without a query."""
        raise ValueError(
            f"shots={self.shots} and select={self.select!r} choose for each query, which read() and prefill() do not "
            "have. Give them to generate(), or choose beforehand: bank.select(query, k, by=...)."
        )


class ChoosingBank(BankContents):
    """A bank that chooses demonstrations; see `DemonstrationBank`."""

    def _setup(self, shards: Sequence[Shard], source: Mapping[str, str], folder: Path | None = None) -> None:
        super()._setup(shards, source, folder)
        self._similarity: dict[str, SimilarityIndex] = {}
        self._groups: Groups | None = None
        self._lock = threading.RLock()
        self.model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the bank, in this process or another, takes along: no model and nothing that was computed."""
        dropped: dict[str, Any] = {"_lock": None, "_similarity": {}, "_groups": None, "model": None}
        return {**self.__dict__, **dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def select(
        self, query: object = None, k: int = 8, by: str | Sequence[int] | Sequence[str] = "random", **options: Any
    ) -> FusedDemonstrations:
        """Choose `k` demonstrations for a query; see `choose`, which has the `options`, and says which they are.

        Returns:
            The chosen demonstrations, most similar last, as `read` returns them.
        """
        return self[[number for number, _ in self.choose(query, k, by, **options)]]

    def choose(
        self,
        query: object = None,
        k: int = 8,
        by: str | Sequence[int] | Sequence[str] = "random",
        *,
        seed: int = 0,
        balanced: bool = True,
        near_duplicate: float | None = 0.98,
        search: str = "auto",
        model: AimForConditionalGeneration | None = None,
    ) -> list[tuple[int, float]]:
        """Choose `k` demonstrations for a query.

        Args:
            query: an image, a text, or a dict with `image` and `question` (or `text`); not needed at random or for a
                fixed list. Also what `model.query_features` gave for one query.
            k: how many.
            by: `"random"`; `"image"` (RICES: the backbone's own features of images); `"text"`; `"fused"` (fused
                tokens, averaged); `"mmices"` (of the `4 * k` most similar images those with the most similar
                questions; where questions are equally similar, and where nothing is asked, the images decide; arXiv
                2311.18021); or a list of numbers or keys of demonstrations, of which the first `k` are taken in order.
            seed: of `"random"`.
            balanced: take labels in turn, the best of each first, where demonstrations have labels.
            near_duplicate: a demonstration is left out, while others are left, when its cosine similarity to a chosen
                one is at least this in everything that is stored of it: image and text. `None` keeps all.
            search: `"torch"`; `"faiss"` (an exact index through `datasets`, for `by` image, text or fused where no
                labels are taken in turn); or `"auto"`: FAISS from 250 000 demonstrations on where it can be used.
            model: the model that compares, where the bank was opened without one.

        Returns:
            Number and score of each, most similar last.

        Raises:
            ValueError: `k` is larger than the bank, the query lacks what is compared, or FAISS was asked for and
                cannot be used.
        """
        check_strategy(by, search)
        self.check_count(k)
        if not is_whole(seed):
            raise ValueError(f"seed={seed!r:.40}: expected a whole number.")
        if not isinstance(balanced, bool):
            raise ValueError(f"balanced={balanced!r:.40}: expected True or False.")
        is_number = isinstance(near_duplicate, (int, float)) and not isinstance(near_duplicate, bool)
        if near_duplicate is not None and not (is_number and 0 < near_duplicate <= 1):
            raise ValueError(
                f"near_duplicate={near_duplicate!r:.40}: expected a cosine above 0 and up to 1, such as 0.98, or None."
            )
        if not isinstance(by, str):
            return [(number, 1.0) for number in self._listed(by, k)]
        groups = self._by_label() if balanced else None
        features = {} if by == "random" else self._features_of(query, by, model)
        if by == "random":
            scores = drawn(len(self), seed)
        elif by == "mmices":
            scores = mmices(self.similarity("image"), self.similarity("question"), features, k, groups)
        else:
            scores = self._scores(features[by], k, by, groups, search)
        limit = near_duplicate if k > 1 else None  # one alone repeats nothing: no features need be loaded
        kinds: list[str] = [kind for kind in ("image", "text") if kind in self.features] or ["fused"]
        repeats = near_duplicates([] if limit is None else [self.similarity(kind) for kind in kinds], limit)
        return [(number, float(scores[number])) for number in pick(scores, k, groups, repeats)]

    def check_count(self, k: int, given: str | None = None) -> None:
        """Raise `ValueError` unless `k` demonstrations can be chosen from this bank; `given` is how `k` was given."""
        given = given or f"k={k!r:.40}"
        if not is_whole(k):
            raise ValueError(f"{given} demonstrations were asked for; expected a whole number.")
        if not len(self):
            raise ValueError("This bank is empty: there is nothing to choose from.")
        if not 0 < k <= len(self):
            raise ValueError(
                f"{given} demonstrations were asked of a bank that has {len(self)}; expected 1..{len(self)}."
            )

    def _scores(self, query: torch.Tensor, k: int, by: str, groups: Groups | None, search: str) -> torch.Tensor:
        """Cosine of a query with each demonstration; of the nearest neighbours only, where FAISS searches."""
        if search == "faiss" and groups is not None:
            raise ValueError(
                "search='faiss' finds the nearest neighbours in the whole bank, but labels are to be taken in turn. "
                "Choose with balanced=False, or without search."
            )
        if search == "faiss" or (search == "auto" and groups is None and len(self) >= FAISS_FROM):
            try:
                return self.similarity(by).nearest(query, shortlist(len(self), k))
            except FaissUnavailable as error:
                if search == "faiss":
                    raise ValueError(f"search='faiss' cannot be used ({error}). Choose without search.") from error
        return self.similarity(by).scores(query)

    def _listed(self, by: Sequence[int] | Sequence[str], k: int) -> list[int]:
        """Numbers of a fixed list of numbers or keys."""
        if len(by) < k:
            raise ValueError(f"by lists {len(by)} demonstrations, but k={k}.")
        odd = [entry for entry in by if not (isinstance(entry, str) or is_whole(entry))]
        if odd:
            raise ValueError(f"by lists {odd[0]!r:.80}; expected numbers or keys of demonstrations.")
        places: dict[str, int] = {}
        if any(isinstance(entry, str) for entry in by):
            places = {key: number for number, key in enumerate(self.keys())}
        wrong = [
            entry
            for entry in by
            if (entry not in places if isinstance(entry, str) else not -len(self) <= entry < len(self))
        ]
        if wrong:
            raise ValueError(f"by lists {wrong[0]!r:.80}, which is not in this bank of {len(self)} demonstrations.")
        numbers = [places[entry] if isinstance(entry, str) else range(len(self))[entry] for entry in by]
        return numbers[:k]

    def _features_of(
        self, query: object, by: str, model: AimForConditionalGeneration | None
    ) -> dict[str, torch.Tensor]:
        """Features of one query, of the kinds that `by` compares."""
        if isinstance(query, Mapping) and query and all(isinstance(v, torch.Tensor) for v in query.values()):
            for kind in KINDS[by]:
                expected = (self.feature_width(kind),)
                if kind not in query or tuple(query[kind].shape) != expected or not is_finite(query[kind]):
                    raise ValueError(
                        f"by={by!r} compares {kind} features of the shape {expected}, all finite; the query has "
                        f"{ {name: tuple(value.shape) for name, value in query.items()} }."
                    )
            return dict(query)
        model = self._comparing(by, model)
        return {kind: rows[0] for kind, rows in self.query_features(model.query_inputs(query), by, model).items()}

    def _comparing(self, by: str, model: AimForConditionalGeneration | None) -> Any:
        """The model that compares."""
        model = self.model if model is None else model
        if model is None:
            raise ValueError(
                f"by={by!r} compares the query as the backbone sees it, but this bank knows no model. Open it with "
                "DemonstrationBank.from_pretrained(folder, model), or pass model=."
            )
        return model

    def query_features(
        self,
        inputs: Mapping[str, Any],
        by: str,
        model: AimForConditionalGeneration | None = None,
        rows: Sequence[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Features of each query of a batch, as this bank compares them; a row of each goes to `choose` as a query.

        Args:
            inputs: the backbone's inputs of the queries.
            by: a selection strategy that compares, see `choose`.
            model: the model that compares, where the bank was opened without one.
            rows: the queries of the batch that are compared; all where `None`.

        Returns:
            For each kind that is compared `(rows, width)`.

        Raises:
            ValueError: another model read this bank, it has no such features, or a query has no image, or no words,
                where these are compared.
        """
        model = self._comparing(by, model)
        check_source(self.source, model.source)
        widths = {kind: self.feature_width(kind) for kind in KINDS[by]}
        features = model.query_features(inputs, tuple(widths), **({} if rows is None else {"rows": rows}))
        for kind, values in features.items():
            if not is_finite(values):
                raise ValueError(
                    f"The {kind} features of the queries are not finite (NaN or infinite). Load the backbone in "
                    'bfloat16 or float32, or choose with by="random".'
                )
        return {kind: sketched(features[kind], width) for kind, width in widths.items()}

    def choice(self, shots: int | None = None, select: Selection = None) -> BankChoice:
        """This bank with `shots` and `select` bound to it, as `select_rows` takes them."""
        return BankChoice(self, shots, select)

    def select_rows(
        self,
        model: AimForConditionalGeneration,
        inputs: Mapping[str, Any],
        shots: int | None = None,
        select: Selection = None,
        rows: Sequence[int] | None = None,
    ) -> list[FusedDemonstrations]:
        """Choose demonstrations for each row of a batch: what `generate(demos=bank, shots=, select=)` asks.

        Args:
            model: the model that is to answer.
            inputs: the backbone's inputs of the queries.
            shots: how many for each row; where `None` all of a list, and 8 of a strategy.
            select: a selection strategy, a list of indices or keys, or a dict with `by` and options of `choose`.
            rows: the rows of the batch for which to choose; all where `None`.

        Returns:
            What was chosen for each of these rows, in order.
        """
        options: dict[str, Any] = (
            dict(select) if isinstance(select, Mapping) else {"by": "random" if select is None else select}
        )
        by = options.pop("by", "random")
        unknown = set(options) - SELECT_OPTIONS
        if unknown:
            raise ValueError(
                f"select has the keys {sorted(unknown)}; known are by, {', '.join(sorted(SELECT_OPTIONS))}. Set "
                "their number with shots=."
            )
        check_strategy(by, options.get("search", "auto"))
        k = shots if shots is not None else 8 if isinstance(by, str) else len(by)
        default = shots is None and isinstance(by, str)
        # before anything is computed
        self.check_count(k, f"shots={k!r:.40}" + (" (the default of a strategy)" if default else ""))
        count = len(inputs["input_ids"] if rows is None else rows)
        if not isinstance(by, str) or by == "random":
            return [self.select(None, k, by, **options)] * count
        features = self.query_features(inputs, by, model, rows)
        queries = [{kind: values[i] for kind, values in features.items()} for i in range(count)]
        return [self.select(query, k, by, **options) for query in queries]

    def feature_width(self, kind: str) -> int:
        """How wide the features of a kind are.

        Raises:
            ValueError: the bank has none of that kind.
        """
        if kind == "fused" and kind not in self.features:
            return self.width
        if kind not in self.features:
            raise ValueError(
                f"This bank has no {kind} features to choose by (it has {sorted(self.features) or 'none'}). Build it "
                'with DemonstrationBank.build(model, demos, folder), or choose by="fused" or "random".'
            )
        return self.features[kind]

    def similarity(self, kind: str) -> SimilarityIndex:
        """Features of a kind, checked when they are first used; `question` are texts of those that have one."""
        with self._lock:
            if kind == "question" and kind not in self._similarity:
                texts = self.similarity("text")
                has_question = torch.cat([shard.columns[HAS_QUESTION] for shard in self._shards]).bool()
                self._similarity[kind] = SimilarityIndex(texts.parts, only=has_question)
            elif kind not in self._similarity:
                width = self.feature_width(kind)
                if kind in self.features:
                    features = [shard.feature(kind) for shard in self._shards]
                else:
                    means = (mean_tokens(shard.vectors(range(len(shard))), self.width) for shard in self._shards)
                    features = [sketched(mean, width) for mean in means]
                self._similarity[kind] = SimilarityIndex(features)
            return self._similarity[kind]

    def _by_label(self) -> Groups | None:
        """The demonstrations by label, `None` where there are no labels."""
        with self._lock:
            if self._groups is None:
                numbers: dict[str | None, int] = {}
                codes = [numbers.setdefault(label, len(numbers)) for label in self.labels()]
                self._groups = Groups(torch.tensor(codes, dtype=torch.int32))
            return self._groups if len(self._groups.parts) > 1 else None
