"""Shards of a demonstration bank: columns that check themselves.
Fixed columns have one row a demonstration: its key, its features, whether it has a question,
and how long it is in each ragged column. Ragged columns (fused tokens, hidden states, words, thumbnails) hold one
demonstration after another, with a digest each, so that what is used is checked when it is used, and nothing else need
be loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..demonstrations_aim import FusedDemonstrations
from ..files_aim import as_bytes
from .select import sketched

FORMAT, VERSION = "aim_bank", 4
SEAL = "about_sha256"
KEY_BYTES, DIGEST_BYTES = 32, 16
RAGGED = {
    "vectors": "lengths",
    "ids": "lengths",
    "scales": "lengths",
    "states": "lengths",
    "texts": "text_lengths",
    "labels": "label_lengths",
    "thumbnails": "thumbnail_lengths",
}
NEEDED = ("keys", "lengths", "vectors", "ids", "texts", "text_lengths", "labels", "label_lengths")
FEATURE = "feature."
UNREADABLE = "unreadable"  # of a part: keys of rows that the model could not read, and why
HAS_QUESTION = "has_question"  # 1 where a demonstration answers a question; there with features of texts
STORAGES = ("auto", "float32", "bfloat16", "float16", "int8")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class BankDamaged(ValueError):
    """A file of a bank is damaged, foreign, or not the one its manifest names."""


class StorageOverflow(ValueError):
    """Values are too large for the precision in which they are to be kept."""


def is_finite(values: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity among `values`; no copy is made."""
    if not values.numel() or not values.is_floating_point():
        return True
    least, most = torch.aminmax(values)  # NaN where one value is NaN
    return bool(torch.isfinite(least) & torch.isfinite(most))


def is_words(value: object) -> bool:
    """Whether `value` is a dict of strings."""
    return isinstance(value, dict) and all(isinstance(word, str) for pair in value.items() for word in pair)


def blob(parts: Sequence[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """Byte strings one after another `(bytes,)`, and the length of each."""
    joined = b"".join(parts)
    data = torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    return data, torch.tensor([len(part) for part in parts], dtype=torch.int32)


def quantized(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`vectors` `(tokens, width)` as int8, and the scale of each token: its largest absolute value is 127."""
    scales = vectors.float().abs().amax(dim=1) / 127
    steps = vectors.float() / torch.where(scales > 0, scales, 1.0)[:, None]
    return steps.round().to(torch.int8), scales


class Shard:
    """Some demonstrations of a bank, in memory or mapped from a file.

    Args:
        columns: the tensors.
        about: metadata of all of them: `source` (what read them) and `dtype` (of fused tokens when they are used).
        name: the file, for messages.

    Raises:
        BankDamaged: columns are missing, unknown, or do not fit each other.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor], about: Mapping[str, Any], name: str = "this bank") -> None:
        self.columns, self.about, self.name = columns, about, name
        self._checked: set[str] = set()
        self.reopen: tuple[Any, ...] | None = None  # a function and its arguments, for a shard that was opened
        problem = self._problem()
        if problem is not None:
            raise BankDamaged(f"{name} is not a shard of a demonstration bank: {problem}. Copy or build it again.")
        sizes = {lengths: columns[lengths].numpy() for lengths in RAGGED.values() if lengths in columns}
        self.ends = {name: np.concatenate([[0], np.cumsum(size, dtype=np.int64)]) for name, size in sizes.items()}

    def __len__(self) -> int:
        return int(self.columns["keys"].shape[0])

    def __reduce__(self) -> Any:  # a copy opens the same file, and checks that it is the same
        if self.reopen is not None:
            return self.reopen
        return Shard, (self.columns, self.about, self.name)

    @property
    def tokens(self) -> int:
        """Fused tokens of all demonstrations here."""
        return int(self.columns["vectors"].shape[0])

    @property
    def width(self) -> int:
        """Width of a fused token."""
        return int(self.columns["vectors"].shape[1])

    @property
    def features(self) -> dict[str, int]:
        """Kinds of features, and how wide they are."""
        return {k.removeprefix(FEATURE): v.shape[1] for k, v in self.columns.items() if k.startswith(FEATURE)}

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(column.numel() * column.element_size() for column in self.columns.values())

    @property
    def facts(self) -> dict[str, Any]:
        """Metadata of the demonstrations, without the digests of a file."""
        return {name: value for name, value in self.about.items() if name not in ("digests", SEAL, UNREADABLE)}

    @property
    def content(self) -> dict[str, torch.Tensor]:
        """The columns without their digests."""
        return {name: column for name, column in self.columns.items() if not name.endswith(".digest")}

    def _problem(self) -> str | None:
        """What is wrong with the shapes and types of the columns, if anything."""
        columns = self.columns
        missing = [name for name in NEEDED if name not in columns]
        if missing:
            return f"it has no {', '.join(missing)}"
        count = columns["keys"].shape[0]
        expected: dict[str, tuple[Any, Any]] = {"keys": ((count, KEY_BYTES), torch.uint8)}
        for name, lengths in RAGGED.items():
            if name not in columns:
                continue
            tail = tuple(columns[name].shape[1:])
            if len(tail) != (name in ("vectors", "states")) or lengths not in columns:
                return f"{name} has the shape {tuple(columns[name].shape)}"
            if (
                columns[lengths].dtype != torch.int32
                or columns[lengths].ndim != 1
                or bool((columns[lengths] < 0).any())
            ):
                return f"{lengths} are {columns[lengths].dtype} {tuple(columns[lengths].shape)}, or negative"
            expected[lengths] = ((count,), torch.int32)
            total = int(columns[lengths].sum())
            kinds = {"texts": torch.uint8, "labels": torch.uint8, "thumbnails": torch.uint8, "scales": torch.float32}
            kinds["ids"] = torch.int32
            expected[name] = ((total, *tail), kinds.get(name))
            expected[name + ".digest"] = ((count, DIGEST_BYTES), torch.uint8)
        for name in columns:
            if name.startswith(FEATURE):
                width = columns[name].shape[1] if columns[name].ndim == 2 else 0
                expected[name] = ((count, width), torch.float16)
        if FEATURE + "text" in columns:
            expected[HAS_QUESTION] = ((count,), torch.uint8)
        if set(columns) != set(expected):
            return f"it holds {sorted(columns)}, expected {sorted(expected)}"
        for name, (shape, dtype) in expected.items():
            if tuple(columns[name].shape) != shape or (dtype is not None and columns[name].dtype != dtype):
                return f"{name} is {columns[name].dtype} {tuple(columns[name].shape)}, expected {dtype} {shape}"
        if columns["vectors"].numel() == 0 and columns["vectors"].shape[0]:
            return f"its fused tokens have the shape {tuple(columns['vectors'].shape)}"
        known = [*DTYPES.values(), *([torch.int8] if "scales" in columns else [])]
        if columns["vectors"].dtype not in known or self.about.get("dtype") not in DTYPES:
            return f"its fused tokens are {columns['vectors'].dtype}, to be used as {self.about.get('dtype')!r:.40}"
        if not is_words(self.about.get("source")) or not is_words(self.about.get(UNREADABLE, {})):
            return f"it was read by {self.about.get('source')!r:.80}"
        return None

    def rows(self, name: str, index: Iterable[int]) -> list[torch.Tensor]:
        """What the ragged column `name` holds of the demonstrations at `index`, checked against its digests.

        Raises:
            BankDamaged: the content is not what was written.
        """
        ends, column, digests = self.ends[RAGGED[name]], self.columns[name], self.columns[name + ".digest"]
        parts = []
        for i in index:
            part = column[ends[i] : ends[i + 1]]
            if hashlib.blake2b(as_bytes(part), digest_size=DIGEST_BYTES).digest() != bytes(digests[i].tolist()):
                raise BankDamaged(
                    f"{name} of demonstration {i} of {self.name} are damaged; the others can still be used. Copy the "
                    "file again, or build the bank again."
                )
            parts.append(part)
        return parts

    def vectors(self, index: Sequence[int]) -> list[torch.Tensor]:
        """Fused tokens of the demonstrations at `index`, in the type in which they are used."""
        dtype = DTYPES[self.about["dtype"]]
        parts = self.rows("vectors", index)
        if "scales" in self.columns:
            scales = self.rows("scales", index)
            parts = [part.float() * scale[:, None] for part, scale in zip(parts, scales, strict=True)]
        parts = [part.to(dtype) for part in parts]
        for i, part in zip(index, parts, strict=True):
            if not is_finite(part):
                raise BankDamaged(
                    f"Fused tokens of demonstration {i} of {self.name} are not finite; the others can still be used. "
                    "Build the bank again."
                )
        return parts

    def ids(self, index: Sequence[int]) -> list[torch.Tensor]:
        """The token id under each fused token of the demonstrations at `index`."""
        parts = [part.long() for part in self.rows("ids", index)]
        for i, part in zip(index, parts, strict=True):
            if bool((part < 0).any()):
                raise BankDamaged(
                    f"ids of demonstration {i} of {self.name} are negative. Copy or build the bank again."
                )
        return parts

    def words(self, name: str, index: Iterable[int]) -> list[str]:
        """`texts` or `labels` of the demonstrations at `index`."""
        index = list(index)
        texts = []
        for i, part in zip(index, self.rows(name, index), strict=True):
            try:
                texts.append(bytes(as_bytes(part)).decode())
            except UnicodeDecodeError as error:
                raise BankDamaged(
                    f"{name} of demonstration {i} of {self.name} are not UTF-8 ({error.reason})."
                ) from error
        return texts

    def feature(self, kind: str) -> torch.Tensor:
        """Features of all demonstrations `(demonstrations, width)`, checked when they are first used."""
        name = FEATURE + kind
        if name not in self._checked and "digests" in self.about:
            check_digest(as_bytes(self.columns[name]), name, self.about["digests"].get(name), self.name)
        if name not in self._checked and not is_finite(self.columns[name]):
            raise BankDamaged(
                f"{kind} features of {self.name} are not finite (NaN or infinite), so nothing can be chosen by them. "
                'Build the bank again, or choose with by="random" and near_duplicate=None.'
            )
        self._checked.add(name)
        return self.columns[name]

    def check_finite(self) -> None:
        """Raise `ValueError` where a column holds NaN or an infinity."""
        wrong = [name for name, column in self.columns.items() if not is_finite(column)]
        if wrong:
            raise BankDamaged(f"{', '.join(wrong)} of {self.name} hold NaN or infinite values. Build the bank again.")


def make_shard(columns: Mapping[str, torch.Tensor], about: Mapping[str, Any]) -> Shard:
    """A shard of columns without digests: they are added."""
    columns = {name: column.detach().cpu().contiguous() for name, column in columns.items()}
    for name, lengths in RAGGED.items():
        if name in columns:
            sizes = columns[lengths].tolist()
            parts = columns[name].split(sizes) if sizes else []
            digests = [hashlib.blake2b(as_bytes(part), digest_size=DIGEST_BYTES).digest() for part in parts]
            columns[name + ".digest"] = blob(digests)[0].reshape(-1, DIGEST_BYTES)
    return Shard(columns, about)


def joined(shards: Sequence[Shard]) -> Shard:
    """One shard with the demonstrations of several, in order."""
    names = shards[0].columns
    columns = {name: torch.cat([shard.columns[name] for shard in shards]) for name in names}
    return Shard(columns, shards[0].facts)


def check_digest(content: bytes | memoryview, name: str, expected: object, file: str) -> None:
    if hashlib.sha256(content).hexdigest() != expected:
        raise BankDamaged(f"{name} of {file} are damaged (their sha256 is another one). Copy or build it again.")


# --- what is made of shards


def fused_columns(fused: FusedDemonstrations) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a shard holds of demonstrations that were read, and what it says about them."""
    vectors = fused.vectors.detach().cpu()
    parts = vectors.split(fused.lengths) if fused.lengths else []
    keys = fused.keys or [hashlib.sha256(as_bytes(part)).hexdigest() for part in parts]
    columns: dict[str, torch.Tensor] = {
        "vectors": vectors,
        "lengths": torch.tensor(fused.lengths, dtype=torch.int32),
        "ids": fused.ids.to("cpu", torch.int32),
        "keys": key_column(keys),
    }
    columns["texts"], columns["text_lengths"] = blob([t.encode() for t in fused.texts or [""] * len(fused)])
    columns["labels"], columns["label_lengths"] = blob([b""] * len(fused))
    return columns, {"source": dict(fused.source), "dtype": str(vectors.dtype).removeprefix("torch.")}


def key_column(keys: Iterable[str]) -> torch.Tensor:
    """Keys as bytes `(demonstrations, 32)`; keys that are not sha256 digests are hashed."""
    rows = []
    for key in keys:
        try:
            raw = bytes.fromhex(key)
        except ValueError:
            raw = b""
        rows.append(raw if len(raw) == KEY_BYTES else hashlib.sha256(key.encode()).digest())
    return blob(rows)[0].reshape(-1, KEY_BYTES)


def mean_tokens(parts: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """The mean fused token of each demonstration, `(demonstrations, width)`; zeros where one has none."""
    means = [part.float().sum(dim=0) / max(len(part), 1) for part in parts]
    return torch.stack(means) if means else torch.empty(0, width)


def slice_of(shard: Shard, start: int, stop: int) -> Shard:
    """The demonstrations `start` to `stop` of a shard."""
    columns = {}
    for name, column in shard.columns.items():
        if name in RAGGED:
            ends = shard.ends[RAGGED[name]]
            columns[name] = column[ends[min(start, len(shard))] : ends[min(stop, len(shard))]]
        else:
            columns[name] = column[start:stop]
    return Shard(columns, shard.facts, shard.name)


def with_vectors(shard: Shard, vectors: torch.Tensor, source: Mapping[str, str]) -> Shard:
    """A shard with other fused tokens, kept in the way in which the old ones are."""
    columns = shard.content
    if FEATURE + "fused" in columns:
        means = mean_tokens(vectors.split(columns["lengths"].tolist()), vectors.shape[1])
        columns[FEATURE + "fused"] = sketched(means, columns[FEATURE + "fused"].shape[1]).half()
    storage = "int8" if columns.pop("scales", None) is not None else shard.about["dtype"]
    columns["vectors"] = cast(vectors.cpu(), shard.about["dtype"])
    return stored_as(make_shard(columns, {**shard.about, "source": dict(source)}), storage)


def stored_as(shard: Shard, storage: str) -> Shard:
    """A shard with its fused tokens kept in another precision; int8 is used in the precision from before."""
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r}: expected one of {', '.join(STORAGES)}.")
    now = "int8" if "scales" in shard.columns else shard.about["dtype"]
    if storage in ("auto", now):
        return shard
    parts = shard.vectors(range(len(shard)))
    vectors = torch.cat(parts) if parts else torch.empty(0, shard.width)
    columns = shard.content
    columns.pop("scales", None)
    if storage == "int8":
        columns["vectors"], columns["scales"] = quantized(vectors)
        return make_shard(columns, shard.about)
    columns["vectors"] = cast(vectors, storage)
    return make_shard(columns, {**shard.about, "dtype": storage})


def cast(vectors: torch.Tensor, dtype: str) -> torch.Tensor:
    """Fused tokens in another precision.

    Raises:
        StorageOverflow: a value is larger than this precision can hold.
    """
    stored = vectors.to(DTYPES[dtype])
    if not is_finite(stored) and is_finite(vectors):
        raise StorageOverflow(
            f"Fused tokens reach {float(vectors.float().abs().max()):.4g}, but {dtype} holds no more than "
            f"{torch.finfo(DTYPES[dtype]).max:.4g}. Keep them with storage='bfloat16' or 'float32' (int8 is used in "
            "the precision of the backbone: load that in bfloat16)."
        )
    return stored
