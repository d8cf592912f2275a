"""The demonstration bank: what was read once, kept on disk or the Hub, and chosen from for each query (section 3.3).

A bank is a folder of shards (`shards.py`) and a manifest, `aim_bank.json`, that names them. The manifest is
written last, and shards are named by their content, so a folder holds the old bank or the new one, whole.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..demonstrations_aim import FusedDemonstrations, check_source
from ..files_aim import locate_file, upload
from .build import build_bank
from .card import bank_card
from .contents import BankContents
from .manifest import (
    BANK_MANIFEST,
    BANK_SHARDS,
    new_manifest,
    read_manifest,
    write_bank,
    write_numbered,
)
from .select import (
    FAISS_FROM,
    KINDS,
    FaissUnavailable,
    Groups,
    SimilarityIndex,
    check_strategy,
    drawn,
    mmices,
    near_duplicates,
    pick,
    shortlist,
    sketched,
)
from .shards import (
    HAS_QUESTION,
    BankDamaged,
    Shard,
    file_sha256,
    joined,
    open_shard,
    slice_of,
    stored_as,
    with_vectors,
)

logger = logging.get_logger(__name__)

SHARD_BYTES = 256 * 2**20
SELECT_OPTIONS = {"balanced", "near_duplicate", "search", "seed"}


class DemonstrationBank(BankContents):
    """Demonstrations that were read once and are used many times.

    A bank goes wherever `demos=` is taken: whole, as a slice, or with `shots` and `select` to choose for each row:
    `model.generate(**inputs, demos=bank, shots=8, select="image")`. Make one with `DemonstrationBank.build(model,
    demos, folder)`, open one with `DemonstrationBank.from_pretrained(folder, model)`.

    Args:
        fused: what `model.read(demos)` returned, to keep it. Such a bank has no features of images and texts; one
            from `build` has.
    """

    aim_kind = "bank"  # by this a model recognises a bank, also a model loaded as remote code

    @classmethod
    def build(
        cls, model: Any, demos: Iterable[Any], save_directory: str | os.PathLike[str], **options: Any
    ) -> DemonstrationBank:
        """Read a stream of demonstrations into a bank on disk, each content once.

        What was read is on disk after each batch. Rerun after a crash to resume: the files end the same, byte for
        byte. With more demonstrations, the new ones are added.

        Args:
            model: an AIM model, installed or loaded as remote code.
            demos: any iterable of demonstrations, or a `datasets` dataset (streamed ones too).
            save_directory: folder of the bank.
            **options: see `modeling_aim.bank.build.build_bank`.

        Returns:
            The bank, opened.

        Raises:
            ValueError: a row is no demonstration, or the folder holds a bank of another model or other settings.
            OSError: the disk is full; what was read is safe.
        """
        build_bank(model, demos, save_directory, **options)
        return cls.from_pretrained(save_directory, model)

    def _setup(self, shards: Sequence[Shard], source: Mapping[str, str], folder: Path | None = None) -> None:
        super()._setup(shards, source, folder)
        self._similarity: dict[str, SimilarityIndex] = {}
        self._groups: Groups | None = None
        self._lock = threading.RLock()
        self.model: Any = None

    # --- choose

    def select(
        self, query: Any = None, k: int = 8, by: str | Sequence[int] | Sequence[str] = "random", **options: Any
    ) -> FusedDemonstrations:
        """Choose `k` demonstrations for a query; see `choose`, which has the `options`, and says which they are.

        Returns:
            The chosen demonstrations, most alike last, as `read` returns them.
        """
        return self[[number for number, _ in self.choose(query, k, by, **options)]]

    def choose(
        self,
        query: Any = None,
        k: int = 8,
        by: str | Sequence[int] | Sequence[str] = "random",
        *,
        seed: int = 0,
        balanced: bool = True,
        near_duplicate: float | None = 0.98,
        search: str = "auto",
        model: Any = None,
    ) -> list[tuple[int, float]]:
        """Choose `k` demonstrations for a query.

        Args:
            query: an image, a text, or a dict with `image` and `question` (or `text`); not needed at random or for a
                fixed list. Also what `model.query_features` gave for one query.
            k: how many.
            by: `"random"`; `"image"` (RICES: the backbone's own features of images); `"text"`; `"fused"` (fused
                tokens, averaged); `"mmices"` (of the `4 * k` most alike images those with the most alike questions;
                where questions are as alike, and where nothing is asked, the images decide; arXiv 2311.18021); or a
                list of numbers or keys of demonstrations, of which the first `k` are taken as they come.
            seed: of `"random"`.
            balanced: take labels in turn, the best of each first, where demonstrations have labels.
            near_duplicate: a demonstration is left out while others are left when it is at least as alike (cosine) as
                this to a chosen one in everything that is stored of it: image and text. `None` keeps all.
            search: `"torch"`; `"faiss"` (an exact index through `datasets`, for `by` image, text or fused where no
                labels are taken in turn); or `"auto"`: FAISS from 250 000 demonstrations on where it can be used.
            model: the model that compares, where the bank was opened without one.

        Returns:
            Number and score of each, most alike last.

        Raises:
            ValueError: `k` is larger than the bank, the query lacks what is compared, or FAISS was asked for and
                cannot be used.
        """
        check_strategy(by, search)
        self.check_count(k)
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

    def check_count(self, k: int) -> None:
        """Raise `ValueError` unless `k` demonstrations can be chosen from this bank."""
        if not len(self):
            raise ValueError("This bank is empty: there is nothing to choose from.")
        if not 0 < k <= len(self):
            raise ValueError(
                f"k={k} demonstrations were asked of a bank that has {len(self)}; expected 1..{len(self)}."
            )

    def _scores(self, query: torch.Tensor, k: int, by: str, groups: Groups | None, search: str) -> torch.Tensor:
        """Cosine of a query with each demonstration; of the most alike only, where FAISS searches."""
        if search == "faiss" and groups is not None:
            raise ValueError(
                "search='faiss' finds the most alike of the whole bank, but labels are to be taken in turn. Choose "
                "with balanced=False, or without search."
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
        places: dict[str, int] = {}
        if any(isinstance(one, str) for one in by):
            places = {key: number for number, key in enumerate(self.keys())}
        wrong = [
            one for one in by if (one not in places if isinstance(one, str) else not -len(self) <= one < len(self))
        ]
        if wrong:
            raise ValueError(f"by lists {wrong[0]!r:.80}, which is not in this bank of {len(self)} demonstrations.")
        numbers = [places[one] if isinstance(one, str) else range(len(self))[one] for one in by]
        return numbers[:k]

    def _features_of(self, query: Any, by: str, model: Any) -> dict[str, torch.Tensor]:
        """Features of one query, of the kinds that `by` compares."""
        if isinstance(query, Mapping) and query and all(isinstance(v, torch.Tensor) for v in query.values()):
            return dict(query)
        model = self._comparing(by, model)
        return {kind: rows[0] for kind, rows in self.query_features(model.query_inputs(query), by, model).items()}

    def _comparing(self, by: str, model: Any) -> Any:
        """The model that compares."""
        model = self.model if model is None else model
        if model is None:
            raise ValueError(
                f"by={by!r} compares the query as the backbone sees it, but this bank knows no model. Open it with "
                "DemonstrationBank.from_pretrained(folder, model), or pass model=."
            )
        return model

    def query_features(self, inputs: Mapping[str, Any], by: str, model: Any = None) -> dict[str, torch.Tensor]:
        """Features of each query of a batch, as this bank compares them; a row of each goes to `choose` as a query.

        Args:
            inputs: the backbone's inputs of the queries.
            by: a selection strategy that compares, see `choose`.
            model: the model that compares, where the bank was opened without one.

        Returns:
            For each kind that is compared `(batch, width)`.

        Raises:
            ValueError: another model read this bank, it has no such features, or a query has no image, or no words,
                where these are compared.
        """
        model = self._comparing(by, model)
        check_source(self.source, model.source)
        widths = {kind: self.feature_width(kind) for kind in KINDS[by]}
        features = model.query_features(inputs, tuple(widths))
        return {kind: sketched(features[kind], width) for kind, width in widths.items()}

    def select_rows(
        self, model: Any, inputs: Mapping[str, Any], shots: int | None = None, select: Any = None
    ) -> list[FusedDemonstrations]:
        """Choose demonstrations for each row of a batch: what `generate(demos=bank, shots=, select=)` asks.

        Args:
            model: the model that is to answer.
            inputs: the backbone's inputs of the queries.
            shots: how many for each row; 8 where `None`.
            select: a selection strategy, a list of numbers or keys, or a dict with `by` and options of `choose`.

        Returns:
            What was chosen for each row, in order.
        """
        options = dict(select) if isinstance(select, Mapping) else {"by": "random" if select is None else select}
        by, k = options.pop("by", "random"), 8 if shots is None else shots
        unknown = set(options) - SELECT_OPTIONS
        if unknown:
            raise ValueError(
                f"select has the keys {sorted(unknown)}; known are by, {', '.join(sorted(SELECT_OPTIONS))}. How many "
                "are chosen is said by shots=."
            )
        check_strategy(by, options.get("search", "auto"))
        self.check_count(k)  # before anything is computed
        rows = range(len(inputs["input_ids"]))
        if not isinstance(by, str) or by == "random":
            chosen = self.select(None, k, by, **options)
            return [chosen for _ in rows]
        features = self.query_features(inputs, by, model)
        queries = [{kind: one[row] for kind, one in features.items()} for row in rows]
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
                asked = torch.cat([shard.columns[HAS_QUESTION] for shard in self._shards]).bool()
                self._similarity[kind] = SimilarityIndex(texts.parts, only=asked)
            elif kind not in self._similarity:
                width = self.feature_width(kind)
                if kind in self.features:
                    features = [shard.feature(kind) for shard in self._shards]
                else:
                    parts = (v.float().mean(dim=0) for s in self._shards for v in s.vectors(range(len(s))))
                    features = [sketched(torch.stack([p.nan_to_num() for p in parts]), width)]
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

    # --- keep

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, storage: str = "auto", shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write the bank: shards, manifest and a card. A kill leaves the old bank or the new one.

        A card that is already there is kept if somebody wrote it, and written anew if it was made by this.

        Args:
            save_directory: the folder.
            storage: how fused tokens are kept: `"auto"` (as they are), `"float32"`, `"bfloat16"`, `"float16"`, or
                `"int8"` with one scale a token.
            shard_bytes: about how large a file may be.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; give a folder to save to.")
        folder.mkdir(parents=True, exist_ok=True)
        listed: list[dict[str, Any]] = []
        for shard in self._shards:
            step = max(1, len(shard) * shard_bytes // max(shard.nbytes, 1))
            for start in range(0, max(len(shard), 1), step):
                part = stored_as(slice_of(shard, start, start + step), storage)
                listed.append(write_numbered(part, folder, len(listed) + 1))
        manifest = new_manifest(self.source, shards=listed, complete=True, duplicates=self.duplicates)
        write_bank(folder, manifest, self.card())

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], model: Any = None, *, damaged: str = "raise", **hub_kwargs: Any
    ) -> DemonstrationBank:
        """Open a bank from a folder or a Hub repository. Files are mapped: memory is taken for what is used.

        Headers, keys and digests are checked now, fused tokens and words when they are used, and features when they
        are first compared; `verify` checks everything.

        Args:
            name_or_path: folder or repository id.
            model: the model that is to use it: the bank must have been read by it, and it is remembered for queries.
            damaged: `"raise"`, or `"skip"` to open the files that are whole and warn about the others; in a folder
                also without its manifest.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, ..., as for `from_pretrained`.

        Raises:
            FileNotFoundError: there is no bank.
            ValueError: a file is damaged or is no bank (the message names the file), or another model read it (the
                message names what differs).
        """
        if damaged not in ("raise", "skip"):
            raise ValueError(f"damaged={damaged!r}: expected 'raise' or 'skip'.")
        bank = cls._opened(name_or_path, damaged, hub_kwargs)
        if model is not None:
            check_source(bank.source, model.source)
            bank.model = model
        return bank

    @classmethod
    def _opened(
        cls, name_or_path: str | os.PathLike[str], damaged: str, hub_kwargs: Mapping[str, Any]
    ) -> DemonstrationBank:
        folder = Path(name_or_path) if os.path.isdir(name_or_path) else None
        try:
            path = locate_file(name_or_path, BANK_MANIFEST, **hub_kwargs)
            manifest = read_manifest(path)
        except (FileNotFoundError, ValueError) as error:
            if damaged == "raise" or folder is None or not list(folder.glob(BANK_SHARDS)):
                raise
            logger.warning(f"{error} Opening the shards in {folder} that are whole, in order of their names.")
            return cls._without_manifest(folder)
        shards = []
        for listed in manifest["shards"]:
            try:
                file = _located(name_or_path, listed["file"], folder, hub_kwargs)
                shards.append(open_shard(file, listed))
            except (BankDamaged, FileNotFoundError) as error:
                if damaged == "raise":
                    note = " To use the rest of the bank: from_pretrained(..., damaged='skip')."
                    raise BankDamaged(str(error) + note) from error
                logger.warning(f"Left out: {error}")
        if not manifest["complete"]:
            logger.warning(
                f"{name_or_path} is a bank whose building was interrupted: {sum(map(len, shards))} demonstrations can "
                "be used. Build it again with the same demonstrations to finish it; nothing is read twice."
            )
        bank = cls.of_shards(shards, manifest["source"], folder or Path(path).parent)
        bank.duplicates = manifest["duplicates"]
        return bank

    @classmethod
    def _without_manifest(cls, folder: Path) -> DemonstrationBank:
        """The shards of a folder that are whole and belong together."""
        shards: list[Shard] = []
        for path in sorted(folder.glob(BANK_SHARDS)):
            try:
                shard = open_shard(path)
                if shards and shard.about["source"] != shards[0].about["source"]:
                    raise BankDamaged(f"{path} was read by another model than {shards[0].name}.")
                shards.append(shard)
            except BankDamaged as error:
                logger.warning(f"Left out: {error}")
        if not shards:
            raise BankDamaged(f"No shard in {folder} can be opened. Copy or build the bank again.")
        return cls.of_shards(shards, shards[0].about["source"], folder)

    def verify(self) -> None:
        """Read every file whole and compare it with the manifest.

        Raises:
            ValueError: a file is damaged; the message names each.
        """
        if self.folder is None:
            return
        listed = read_manifest(self.folder / BANK_MANIFEST)["shards"]
        wrong = [one["file"] for one in listed if file_sha256(self.folder / one["file"]) != one["sha256"]]
        if wrong:
            raise BankDamaged(
                f"These files of {self.folder} are damaged: {', '.join(wrong)}. Copy or build them again."
            )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the bank; a card that is already there is kept.

        Args:
            repo_id: the repository, made when it does not exist.
            **kwargs: `token`, `private`, `revision`, `commit_message`, `commit_description`, `create_pr`.
        """
        kwargs.setdefault("commit_message", "Upload a demonstration bank")
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.folder
            if folder is None:
                folder = Path(scratch)
                self.save_pretrained(folder)
            files = [one["file"] for one in read_manifest(folder / BANK_MANIFEST)["shards"]]
            return upload(folder, repo_id, allow_patterns=[BANK_MANIFEST, "README.md", *files], **kwargs)

    def reproject(
        self, model: Any, save_directory: str | os.PathLike[str], batch_size: int = 256
    ) -> DemonstrationBank:
        """Put the hidden states of this bank through the projector of `model`: nothing is read again.

        Args:
            model: has the backbone, read layers and processor settings of this bank, and another projector.
            save_directory: folder of the new bank.
            batch_size: demonstrations at a time.

        Raises:
            ValueError: no hidden states were kept, or something else than the projector differs.
        """
        check_source({**self.source, "projector": model.source["projector"]}, model.source)
        self.states([])
        folder, listed = Path(save_directory), list[dict[str, Any]]()
        folder.mkdir(parents=True, exist_ok=True)
        for shard in self._shards:
            parts = []
            for start in range(0, len(shard), batch_size):
                part = slice_of(shard, start, start + batch_size)
                fused = model.project(torch.cat(part.rows("states", range(len(part)))))
                parts.append(with_vectors(part, fused, dict(model.source)))
            listed.append(write_numbered(joined(parts), folder, len(listed) + 1))
        manifest = new_manifest(model.source, shards=listed, complete=True, duplicates=self.duplicates)
        write_bank(folder, manifest, bank_card(self, model.source))
        return type(self).from_pretrained(folder, model)

    def card(self) -> str:
        """What a repository that holds this bank says about itself."""
        return bank_card(self, self.source)


def _located(name: Any, file: str, folder: Path | None, hub_kwargs: Mapping[str, Any]) -> str | Path:
    return folder / file if folder is not None else locate_file(name, file, **hub_kwargs)
