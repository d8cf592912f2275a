"""Files of a demonstration bank: shards of safetensors that check themselves, mapped into memory, never unpickled.

A shard holds columns. Fixed columns have one row a demonstration: its key, its features, whether it has a question,
and how long it is in each ragged column. Ragged columns (fused tokens, hidden states, words, thumbnails) hold one
demonstration after another, with a digest each, so that what is used is checked when it is used, and nothing else need
be loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..demonstrations_aim import FusedDemonstrations
from ..files_aim import as_bytes, write_whole
from .select import sketched

FORMAT, VERSION = "aim_bank", 4
SEAL = "about_sha256"
KEY_BYTES, DIGEST_BYTES = 32, 16
HEADER_LIMIT = 100_000_000  # bytes: what safetensors itself refuses
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
HAS_QUESTION = "has_question"  # 1 where a demonstration answers a question; there with features of texts
STORAGES = ("auto", "float32", "bfloat16", "float16", "int8")
TYPES = {  # of columns, as safetensors calls them
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


class BankDamaged(ValueError):
    """A file of a bank is damaged, foreign, or not the one its manifest names."""


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
        about: what is said of all of them: `source` (what read them) and `dtype` (of fused tokens when they are used).
        name: the file, for messages.

    Raises:
        BankDamaged: columns are missing, unknown, or do not fit each other.
    """

    def __init__(self, columns: Mapping[str, torch.Tensor], about: Mapping[str, Any], name: str = "this bank") -> None:
        self.columns, self.about, self.name = columns, about, name
        self._checked: set[str] = set()
        problem = self._problem()
        if problem is not None:
            raise BankDamaged(f"{name} is no shard of a demonstration bank: {problem}. Copy or build it again.")
        sizes = {lengths: columns[lengths].numpy() for lengths in RAGGED.values() if lengths in columns}
        self.ends = {name: np.concatenate([[0], np.cumsum(size, dtype=np.int64)]) for name, size in sizes.items()}

    def __len__(self) -> int:
        return int(self.columns["keys"].shape[0])

    @property
    def tokens(self) -> int:
        """Fused tokens of all demonstrations here."""
        return int(self.columns["vectors"].shape[0])

    @property
    def width(self) -> int:
        """Hidden size."""
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
        """What is said of the demonstrations, without the digests of a file."""
        return {name: value for name, value in self.about.items() if name not in ("digests", SEAL)}

    @property
    def content(self) -> dict[str, torch.Tensor]:
        """The columns without their digests."""
        return {name: column for name, column in self.columns.items() if not name.endswith(".digest")}

    def _problem(self) -> str | None:
        """What is wrong with the shapes and types of the columns, if anything."""
        found = self.columns
        missing = [name for name in NEEDED if name not in found]
        if missing:
            return f"it has no {', '.join(missing)}"
        count = found["keys"].shape[0]
        expected: dict[str, tuple[Any, Any]] = {"keys": ((count, KEY_BYTES), torch.uint8)}
        for name, lengths in RAGGED.items():
            if name not in found:
                continue
            tail = tuple(found[name].shape[1:])
            if len(tail) != (name in ("vectors", "states")) or lengths not in found:
                return f"{name} has the shape {tuple(found[name].shape)}"
            if found[lengths].dtype != torch.int32 or found[lengths].ndim != 1 or bool((found[lengths] < 0).any()):
                return f"{lengths} are {found[lengths].dtype} {tuple(found[lengths].shape)}, or negative"
            expected[lengths] = ((count,), torch.int32)
            total = int(found[lengths].sum())
            kinds = {"texts": torch.uint8, "labels": torch.uint8, "thumbnails": torch.uint8, "scales": torch.float32}
            kinds["ids"] = torch.int32
            expected[name] = ((total, *tail), kinds.get(name))
            expected[name + ".digest"] = ((count, DIGEST_BYTES), torch.uint8)
        for name in found:
            if name.startswith(FEATURE):
                width = found[name].shape[1] if found[name].ndim == 2 else 0
                expected[name] = ((count, width), torch.float16)
        if FEATURE + "text" in found:
            expected[HAS_QUESTION] = ((count,), torch.uint8)
        if set(found) != set(expected):
            return f"it holds {sorted(found)}, expected {sorted(expected)}"
        for name, (shape, dtype) in expected.items():
            if tuple(found[name].shape) != shape or (dtype is not None and found[name].dtype != dtype):
                return f"{name} is {found[name].dtype} {tuple(found[name].shape)}, expected {dtype} {shape}"
        known = [*DTYPES.values(), *([torch.int8] if "scales" in found else [])]
        if found["vectors"].dtype not in known or self.about.get("dtype") not in DTYPES:
            return f"its fused tokens are {found['vectors'].dtype}, to be used as {self.about.get('dtype')!r:.40}"
        return None

    def rows(self, name: str, index: Iterable[int]) -> list[torch.Tensor]:
        """What the ragged column `name` holds of the demonstrations at `index`, checked against its digests.

        Raises:
            BankDamaged: the content is not what was written.
        """
        ends, column, digests = self.ends[RAGGED[name]], self.columns[name], self.columns[name + ".digest"]
        found = []
        for i in index:
            part = column[ends[i] : ends[i + 1]]
            if hashlib.blake2b(as_bytes(part), digest_size=DIGEST_BYTES).digest() != bytes(digests[i].tolist()):
                raise BankDamaged(
                    f"{name} of demonstration {i} of {self.name} are damaged; the others can still be used. Copy the "
                    "file again, or build the bank again."
                )
            found.append(part)
        return found

    def vectors(self, index: Sequence[int]) -> list[torch.Tensor]:
        """Fused tokens of the demonstrations at `index`, in the type in which they are used."""
        dtype = DTYPES[self.about["dtype"]]
        found = self.rows("vectors", index)
        if "scales" not in self.columns:
            return [part.to(dtype) for part in found]
        scales = self.rows("scales", index)
        return [(part.float() * scale[:, None]).to(dtype) for part, scale in zip(found, scales, strict=True)]

    def words(self, name: str, index: Iterable[int]) -> list[str]:
        """`texts` or `labels` of the demonstrations at `index`."""
        return [bytes(as_bytes(part)).decode() for part in self.rows(name, index)]

    def feature(self, kind: str) -> torch.Tensor:
        """Features of all demonstrations `(demonstrations, width)`, checked when they are first used."""
        name = FEATURE + kind
        if name not in self._checked and "digests" in self.about:
            _check_digest(as_bytes(self.columns[name]), name, self.about["digests"].get(name), self.name)
        self._checked.add(name)
        return self.columns[name]


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
    """Keys as bytes `(demonstrations, 32)`; what is no sha256 is hashed to one."""
    rows = []
    for key in keys:
        try:
            raw = bytes.fromhex(key)
        except ValueError:
            raw = b""
        rows.append(raw if len(raw) == KEY_BYTES else hashlib.sha256(key.encode()).digest())
    return blob(rows)[0].reshape(-1, KEY_BYTES)


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
        means = torch.stack([part.float().mean(dim=0) for part in vectors.split(columns["lengths"].tolist())])
        columns[FEATURE + "fused"] = sketched(means, columns[FEATURE + "fused"].shape[1]).half()
    storage = "int8" if columns.pop("scales", None) is not None else shard.about["dtype"]
    columns["vectors"] = vectors.to("cpu", DTYPES[shard.about["dtype"]])
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
    columns["vectors"] = vectors.to(DTYPES[storage])
    return make_shard(columns, {**shard.about, "dtype": storage})


# --- files


def write_shard(shard: Shard, path: Path) -> dict[str, Any]:
    """Write a shard, whole or not at all; equal shards give equal files.

    Returns:
        What the manifest says of it.
    """
    columns = {name: column.contiguous() for name, column in shard.columns.items()}
    small = [name for name in columns if name not in RAGGED]
    about = {**shard.facts, "format": FORMAT, "version": VERSION}
    about["digests"] = {name: hashlib.sha256(as_bytes(columns[name])).hexdigest() for name in sorted(small)}
    about[SEAL] = _seal(about, columns)
    payload = save(columns, metadata={FORMAT: json.dumps(about, sort_keys=True)})  # one entry: their order is random
    write_whole(path, payload)
    return {
        "file": path.name,
        "bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
        "header_sha256": hashlib.sha256(payload[: 8 + int.from_bytes(payload[:8], "little")]).hexdigest(),
        "demonstrations": len(shard),
        "tokens": shard.tokens,
    }


def open_shard(path: str | os.PathLike[str], listed: Mapping[str, Any] | None = None) -> Shard:
    """Map a shard into memory; fixed columns but features are checked now, the others when they are used.

    Args:
        path: the file.
        listed: what the manifest says of it, where there is a manifest.

    Raises:
        BankDamaged: the file is cut short, foreign, damaged, or another one than the manifest names.
    """
    path = Path(path)
    try:
        header = _header(path, listed)
        with safe_open(path, framework="pt") as tensors:  # checks that they fill the file, one after another
            about = json.loads((tensors.metadata() or {})[FORMAT])
        check_version(about, path)
        if listed is not None and hashlib.sha256(header).hexdigest() != listed["header_sha256"]:
            raise ValueError("its header has another sha256 than the manifest says")
        columns, starts = _mapped(path, header)
        if about.get(SEAL) != _seal(about, columns):
            raise ValueError("what it says of itself has another sha256")
        with path.open("rb") as file:  # what is read here is not kept, and leaves the mapping untouched
            for name in [name for name in columns if name not in RAGGED and not name.startswith(FEATURE)]:
                file.seek(starts[name])
                content = file.read(columns[name].numel() * columns[name].element_size())
                _check_digest(content, name, about["digests"].get(name), path.name)
                if name in RAGGED.values() and content:
                    columns[name] = torch.frombuffer(bytearray(content), dtype=columns[name].dtype)
        shard = Shard(columns, about, path.name)
    except BankDamaged:
        raise
    except FileNotFoundError:
        raise BankDamaged(f"{path} is missing. Copy the bank again, whole.") from None
    except (  # what a header written by somebody else can bring about
        SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        raise BankDamaged(
            f"{path} does not belong to a demonstration bank, or is damaged ({error!r:.200}). Copy or build it again."
        ) from error
    if listed is not None and (len(shard), shard.tokens) != (listed["demonstrations"], listed["tokens"]):
        raise BankDamaged(f"{path} has {len(shard)} demonstrations; its manifest says {listed['demonstrations']}.")
    return shard


def _seal(about: Mapping[str, Any], columns: Mapping[str, torch.Tensor]) -> str:
    """Digest of all that a shard says of itself, so that one whose manifest is lost can be trusted as well."""
    said = {name: value for name, value in about.items() if name != SEAL}
    layout = {name: [str(column.dtype), list(column.shape)] for name, column in columns.items()}
    return hashlib.sha256(json.dumps([said, layout], sort_keys=True).encode()).hexdigest()


def check_version(about: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise `BankDamaged` where a file is of another version of the format, `ValueError` where it is no bank's."""
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {about['format']!r:.40}")
    if about["version"] != VERSION:
        raise BankDamaged(
            f"{path} is of version {about['version']!r:.40} of demonstration banks; this release of modeling_aim "
            f"reads version {VERSION}. Build the bank again, or take the release that wrote it."
        )


def _header(path: Path, listed: Mapping[str, Any] | None) -> bytes:
    """The header of a safetensors file, with the file's size and the header's checked."""
    size = path.stat().st_size
    if listed is not None and size != listed["bytes"]:
        raise BankDamaged(
            f"{path} has {size} bytes, its manifest says {listed['bytes']}: it is cut short or another file. Copy it "
            "again, or build the bank again."
        )
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, HEADER_LIMIT):
            raise BankDamaged(f"{path} has {size} bytes, but its header claims {length}. Copy or build it again.")
        return start + file.read(length)


def _mapped(path: Path, header: bytes) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The tensors of a safetensors file as views of one mapping, of which no page is touched, and where they begin.

    `safe_open.get_tensor` touches the first page of each, for which Linux may map 2 MB.
    """
    size = path.stat().st_size
    mapping: Any = torch.UntypedStorage.from_file(os.fspath(path), shared=False, nbytes=size)
    content = torch.empty(0, dtype=torch.uint8).set_(mapping)
    entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
    places = {name: [len(header) + at for at in entry["data_offsets"]] for name, entry in entries.items()}
    columns = {
        name: content[start:end].view(TYPES[entries[name]["dtype"]]).reshape(entries[name]["shape"])
        for name, (start, end) in places.items()
    }
    return columns, {name: start for name, (start, _) in places.items()}


def _check_digest(content: bytes | memoryview, name: str, expected: Any, file: str) -> None:
    if hashlib.sha256(content).hexdigest() != expected:
        raise BankDamaged(f"{name} of {file} are damaged (their sha256 is another one). Copy or build it again.")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
