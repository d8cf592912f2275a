"""The demonstration bank: what was read once, kept on disk or the Hub, and chosen from for each query (section 3.3).

A bank is a folder of shards (`shards_aim.py`) and a manifest, `aim_bank.json`, that names them. The manifest is
written last, and shards are named by their content, so a folder holds the old bank or the new one, whole.
"""

from __future__ import annotations

import bisect
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from .demonstrations_aim import FusedDemonstrations, as_bytes, check_source
from .files_aim import locate_file, upload
from .manifest_aim import (
    BANK_MANIFEST,
    BANK_SHARDS,
    new_manifest,
    read_manifest,
    write_bank,
    write_numbered,
)
from .select_aim import (
    FAISS_FROM,
    FaissUnavailable,
    Groups,
    Likeness,
    check_way,
    drawn,
    mmices,
    near_duplicates,
    pick,
    shortlist,
    sketched,
)
from .shards_aim import (
    DTYPES,
    HAS_QUESTION,
    BankDamaged,
    Shard,
    file_sha256,
    fused_columns,
    joined,
    make_shard,
    open_shard,
    slice_of,
    stored_as,
    with_vectors,
)

logger = logging.get_logger(__name__)

SHARD_BYTES = 256 * 2**20


class DemonstrationBank:
    """Demonstrations that were read once and are used many times.

    A bank goes wherever `demos=` is taken: whole, as a slice, or with `shots` and `select` to choose for each row:
    `model.generate(**inputs, demos=bank, shots=8, select="image")`. Make one with `model.build_bank(...)`, open one
    with `model.load_bank(...)`; a bank from `from_pretrained` knows no model until it is used with one.

    Args:
        fused: what `model.read(demos)` returned, to keep it. Such a bank has no features of images and texts; one
            from `model.build_bank` has.
    """

    aim_kind = "bank"

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
        self._likeness: dict[str, Likeness] = {}
        self._groups: Groups | None = None
        self._lock = threading.RLock()
        self.model: Any = None
        self.duplicates = 0

    @classmethod
    def _of(cls, shards: Sequence[Shard], source: Mapping[str, str], folder: Path | None = None) -> DemonstrationBank:
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
            ValueError: what is stored of one of them is damaged; the message names file and demonstration.
        """
        if self._fused is not None:
            return self._fused[index]
        chosen = range(len(self))[index] if isinstance(index, (int, slice)) else [range(len(self))[i] for i in index]
        numbers = [chosen] if isinstance(chosen, int) else list(chosen)
        vectors = self._gather(numbers, lambda shard, rows: shard.vectors(rows))
        dtype = DTYPES[self._shards[0].about["dtype"]] if self._shards else torch.float32
        return FusedDemonstrations(
            vectors=torch.cat(vectors) if vectors else torch.empty(0, self.width, dtype=dtype),
            lengths=tuple(len(part) for part in vectors),
            keys=tuple(self.keys(numbers)),
            texts=tuple(self.texts(numbers)),
            source=self.source,
        )

    def __iter__(self) -> Iterator[FusedDemonstrations]:
        return (self[i] for i in range(len(self)))

    def _gather(self, numbers: Sequence[int], look_up: Any) -> list[Any]:
        """What `look_up(shard, rows)` gives for each of `numbers`, asked of each shard once."""
        by_shard: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            by_shard.setdefault(bisect.bisect_right(self._starts, number) - 1, []).append(place)
        found: list[Any] = [None] * len(numbers)
        for at, places in by_shard.items():
            values = look_up(self._shards[at], [numbers[place] - self._starts[at] for place in places])
            for place, value in zip(places, values, strict=True):
                found[place] = value
        return found

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
        """Hidden size of the backbone."""
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
        return {k: v for k, v in shared[0].items() if all(k in other for other in shared)} if shared else {}

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
            model: the model that compares, for a bank that was not opened through `model.load_bank`.

        Returns:
            Number and score of each, most alike last.

        Raises:
            ValueError: `k` is larger than the bank, the query lacks what is compared, or FAISS was asked for and
                cannot be used.
        """
        check_way(by, search)
        self.check_count(k)
        if not isinstance(by, str):
            return [(number, 1.0) for number in self._listed(by, k)]
        groups = self._by_label() if balanced else None
        features = {} if by == "random" else self._features_of(query, by, model)
        if by == "random":
            scores = drawn(len(self), seed)
        elif by == "mmices":
            scores = mmices(self._like("image"), self._like("question"), features, k, groups)
        else:
            scores = self._scores(features[by], k, by, groups, search)
        limit = near_duplicate if k > 1 else None  # one alone repeats nothing: no features need be loaded
        kinds: list[str] = [kind for kind in ("image", "text") if kind in self.features] or ["fused"]
        repeats = near_duplicates([] if limit is None else [self._like(kind) for kind in kinds], limit)
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
                return self._like(by).nearest(query, shortlist(len(self), k))
            except FaissUnavailable as error:
                if search == "faiss":
                    raise ValueError(f"search='faiss' cannot be used ({error}). Choose without search.") from error
        return self._like(by).scores(query)

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
        model = self.model if model is None else model
        if model is None:
            raise ValueError(
                f"by={by!r} compares the query as the backbone sees it, but this bank knows no model. Open it with "
                "model.load_bank(...), or pass model=."
            )
        found = model.query_features(model.query_inputs(query), by, bank=self)
        return {kind: features[0] for kind, features in found.items()}

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
                'with model.build_bank(demos, folder), or choose by="fused" or "random".'
            )
        return self.features[kind]

    def _like(self, kind: str) -> Likeness:
        """Features of a kind, checked when they are first used; `question` are texts of those that have one."""
        with self._lock:
            if kind == "question" and kind not in self._likeness:
                texts = self._like("text")
                asked = torch.cat([shard.columns[HAS_QUESTION] for shard in self._shards]).bool()
                self._likeness[kind] = Likeness(texts.parts, only=asked)
            elif kind not in self._likeness:
                width = self.feature_width(kind)
                if kind in self.features:
                    features = [shard.feature(kind) for shard in self._shards]
                else:
                    parts = (v.float().mean(dim=0) for s in self._shards for v in s.vectors(range(len(s))))
                    features = [sketched(torch.stack([p.nan_to_num() for p in parts]), width)]
                self._likeness[kind] = Likeness(features)
            return self._likeness[kind]

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
        cls, name_or_path: str | os.PathLike[str], *, damaged: str = "raise", **hub_kwargs: Any
    ) -> DemonstrationBank:
        """Open a bank from a folder or a Hub repository. Files are mapped: memory is taken for what is used.

        Headers, keys and digests are checked now, fused tokens and words when they are used, and features when they
        are first compared; `verify` checks everything.

        Args:
            name_or_path: folder or repository id.
            damaged: `"raise"`, or `"skip"` to open the files that are whole and warn about the others; in a folder
                also without its manifest.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, ..., as for `from_pretrained`.

        Raises:
            FileNotFoundError: there is no bank.
            ValueError: a file is damaged or is no bank; the message names the file.
        """
        if damaged not in ("raise", "skip"):
            raise ValueError(f"damaged={damaged!r}: expected 'raise' or 'skip'.")
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
        bank = cls._of(shards, manifest["source"], folder or Path(path).parent)
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
        return cls._of(shards, shards[0].about["source"], folder)

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
        write_bank(folder, manifest, self._card_for(model.source))
        return model.load_bank(folder)

    def card(self) -> str:
        """What a repository that holds this bank says about itself."""
        return self._card_for(self.source)

    def _card_for(self, source: Mapping[str, str]) -> str:
        rows = "".join(f"| {name} | {value} |\n" for name, value in sorted(source.items()))
        labels = [label for label in dict.fromkeys(self.labels()) if label is not None]
        says = f"\n\nLabels: {', '.join(labels[:30])}{' and more' if len(labels) > 30 else ''}." if labels else ""
        return f"""---
library_name: transformers
tags: [aim, demonstration-bank, few-shot]
---

# Demonstration bank

{len(self)} demonstrations, read once by an [AIM](https://arxiv.org/abs/2406.07588) plug-in and kept as
{self.num_tokens} fused virtual tokens of width {self.width}. Their words, and small pictures of their images where the
bank was built with them, are in the files too.{says}

Only the plug-in that read them can use them:

| | |
|---|---|
{rows}
```python
bank = model.load_bank("this/repository")
model.generate(**inputs, demos=bank, shots=8, select="image")
```

Files are safetensors and JSON; nothing is unpickled.
"""


def _located(name: Any, file: str, folder: Path | None, hub_kwargs: Mapping[str, Any]) -> str | Path:
    return folder / file if folder is not None else locate_file(name, file, **hub_kwargs)
