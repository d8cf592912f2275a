"""Building a bank: any stream of demonstrations, read once in batches, kept batch by batch, and taken up after a kill.

What is read lies in the bank's folder at once, as a small part a batch; parts become a shard when there are enough of
them. A part is written whole or not at all, its name is its number, and the manifest says how many have gone into
shards: so a bank that was killed at any moment goes on from there and ends in the same files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from ..demonstrations_aim import DEMONSTRATION_KEYS, Demonstration
from .card import bank_card
from .contents import BankContents
from .manifest import (
    BANK_MANIFEST,
    BANK_SHARDS,
    new_manifest,
    read_manifest,
    remove_unlisted,
    write_bank,
    write_manifest,
    write_numbered,
)
from .select import sketched
from .shards import (
    FEATURE,
    HAS_QUESTION,
    STORAGES,
    BankDamaged,
    Shard,
    blob,
    joined,
    key_column,
    make_shard,
    open_shard,
    stored_as,
    write_shard,
)

try:
    import fcntl
except ImportError:  # not on Windows: two processes that build one bank are not noticed there
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

PARTS_FOLDER = ".aim_bank_parts"


def build_bank(
    model: Any,
    demos: Iterable[Any],
    save_directory: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 8,
    storage: str = "auto",
    keep_states: bool = False,
    features: bool = True,
    feature_size: int = 512,
    thumbnails: int = 96,
    shard_bytes: int = 256 * 2**20,
    total: int | None = None,
) -> None:
    """Read a stream of demonstrations into a bank on disk; see `DemonstrationBank.build`.

    Args:
        model: an AIM model, installed or loaded as remote code.
        demos: any iterable of demonstrations, or a `datasets` dataset (streamed ones too).
        save_directory: folder of the bank.
        columns: which column of a row is which part of a demonstration, `{"image": "img", "label": "fine_label"}`;
            of a `datasets` dataset the columns named `image`, `text`, `label`, ... are taken when `None`. Numbers
            of classes become the classes' names.
        batch_size: demonstrations that are read and put on disk together. Large ones take several passes of the
            backbone.
        storage: how fused tokens are kept: `"auto"` (the backbone's precision), `"float32"`, `"bfloat16"`,
            `"float16"`, or `"int8"` with one scale a token.
        keep_states: keep the backbone's hidden states too, so that `bank.reproject(model)` puts a newly trained
            projector on them without reading anything again.
        features: keep features of images, texts and fused tokens, by which demonstrations can be chosen.
        feature_size: wider features are brought down to this width by a fixed random map.
        thumbnails: largest side in pixels of a small picture that is kept of each first image; 0 keeps none.
        shard_bytes: about how large a file may be.
        total: how many demonstrations come, for the progress bar, where `demos` does not say.

    Raises:
        ValueError: a row is no demonstration, or the folder holds a bank of another model or other settings.
        OSError: the disk is full; what was read is safe.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder to build the bank in.")
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r}: expected one of {', '.join(STORAGES)}.")
    for name, value, least in (
        ("batch_size", batch_size, 1), ("feature_size", feature_size, 1), ("thumbnails", thumbnails, 0),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}={value}: expected {least} or more.")
    folder.mkdir(parents=True, exist_ok=True)
    if storage == "auto":
        storage = str(model.dtype).removeprefix("torch.")
    settings = {"storage": storage, "keep_states": keep_states, "thumbnails": thumbnails}
    settings["features"] = feature_size if features else 0
    with _alone(folder):
        builder = _Builder(model, folder, settings, shard_bytes)
        for batch in _batches(_progress(open_rows(demos, columns), demos, total), builder, batch_size):
            builder.add(batch)
        builder.finish()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep another process from building in the same folder; a killed process keeps nobody out."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"Another process is building a bank in {folder}. Wait for it, or give another folder."
            ) from error
        yield
    finally:
        os.close(handle)


def open_rows(demos: Iterable[Any], columns: Mapping[str, str] | None) -> Iterator[Demonstration]:
    """Demonstrations of a stream, opened one at a time.

    Of a row of a `datasets` dataset (or any row, where `columns` are given) the named columns are taken, numbers of
    classes as the classes' names.

    Raises:
        ValueError: a row is no demonstration, or a dataset has no column that is part of one; the message says
            which.
    """
    if isinstance(demos, (str, bytes, Mapping)):
        raise ValueError(f"A bank is built from a stream of demonstrations; got {demos!r:.80}.")
    kinds = getattr(demos, "features", None)
    kinds = kinds if isinstance(kinds, Mapping) else {}
    if columns is None and kinds:
        columns = {name: name for name in kinds if name in DEMONSTRATION_KEYS}
        if not columns:
            raise ValueError(
                f"The dataset has the columns {sorted(kinds)}, none of {sorted(DEMONSTRATION_KEYS)}. Say which is "
                'which, e.g. columns={"image": "img", "label": "fine_label"}.'
            )
    for number, row in enumerate(demos):
        try:
            if columns is not None and isinstance(row, Mapping):
                row = {to: _named(kinds.get(name), row[name]) for to, name in columns.items()}
            demo = Demonstration.of(row)
        except KeyError as error:
            raise ValueError(f"Row {number} has no column {error}; it has {sorted(row)}. Check columns=.") from error
        except ValueError as error:
            taken = f" Of each row {columns} were taken; columns= takes others." if columns is not None else ""
            raise ValueError(f"Row {number}: {error}{taken} What came before it is kept in the bank.") from error
        yield demo


def _named(kind: Any, value: Any) -> Any:
    """The name of a class where a column holds its number."""
    return kind.int2str(value) if hasattr(kind, "int2str") and isinstance(value, int) else value


def _progress(demos: Iterator[Demonstration], given: Any, total: int | None) -> Iterable[Demonstration]:
    if total is None and hasattr(given, "__len__"):
        total = len(given)
    return logging.tqdm(demos, total=total, desc="Reading demonstrations", unit="demo")


def _batches(
    demos: Iterable[Demonstration], builder: _Builder, batch_size: int
) -> Iterator[list[tuple[str, Demonstration]]]:
    """Those that are new to the bank, in batches, in the order in which they first come."""
    batch: list[tuple[str, Demonstration]] = []
    walked: set[str] = set()
    for demo in demos:
        key = demo.key
        builder.duplicates += key in walked
        if key not in walked and key not in builder.known:
            batch.append((key, demo))
        walked.add(key)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


class _Builder:
    """A bank on its way: finished shards, parts that wait to become one, and what is known of both."""

    def __init__(self, model: Any, folder: Path, settings: dict[str, Any], shard_bytes: int) -> None:
        self.model, self.folder, self.settings, self.shard_bytes = model, folder, settings, shard_bytes
        self.parts_folder = folder / PARTS_FOLDER
        self.duplicates = 0
        self.manifest = self._begun()
        shards = [open_shard(folder / listed["file"], listed) for listed in self.manifest["shards"]]
        self.parts = self._open_parts()
        self.known = {bytes(row).hex() for one in [*shards, *self.parts] for row in one.columns["keys"].tolist()}
        self._make_full_shard()  # it was killed before it came to that

    def _begun(self) -> dict[str, Any]:
        """The manifest of what was begun in this folder, or of a new bank."""
        source = dict(self.model.source)
        path = self.folder / BANK_MANIFEST
        if not path.exists():
            if list(self.folder.glob(BANK_SHARDS)):
                raise BankDamaged(
                    f"{self.folder} holds shards of a bank but no {BANK_MANIFEST}. Open them with DemonstrationBank"
                    ".from_pretrained(folder, damaged='skip') and save that elsewhere, or give another folder."
                )
            manifest = new_manifest(source, shards=[], complete=False, duplicates=0)
            manifest["settings"] = self.settings
            self.parts_folder.mkdir(exist_ok=True)
            write_manifest(self.folder, manifest)
            return manifest
        manifest = read_manifest(path)
        begun = {**manifest["source"], **manifest["settings"]}
        now = {**source, **self.settings}
        wrong = [
            f"{name} {begun.get(name)!r:.60} (now: {now[name]!r:.60})" for name in now if begun.get(name) != now[name]
        ]
        if wrong:
            raise ValueError(
                f"The bank in {self.folder} was begun with {'; '.join(wrong)}. Go on with the same model and "
                "settings, or give another folder."
            )
        self.parts_folder.mkdir(exist_ok=True)
        remove_unlisted(self.folder, manifest)
        return manifest

    def _part(self, number: int) -> Path:
        return self.parts_folder / f"part-{number:07d}.safetensors"

    def _open_parts(self) -> list[Shard]:
        """Parts that are in no shard yet. Behind a damaged one everything is read again, in the same order."""
        found: list[Shard] = []
        for stale in self.parts_folder.glob(".writing-*"):
            stale.unlink()
        for path in sorted(self.parts_folder.glob("part-*.safetensors")):
            number = int(path.stem.removeprefix("part-"))
            if number < self.manifest["parts"]:
                path.unlink()
                continue
            try:
                if number != self.manifest["parts"] + len(found):
                    raise BankDamaged(f"a part before {path} is missing")
                part = open_shard(path)
                for name in ("vectors", "texts", "labels"):
                    part.rows(name, range(len(part)))
                found.append(in_memory(part))
            except BankDamaged as error:
                logger.warning(f"Reading again what was in {path.name}: {error}")
                path.unlink()
        return found

    def add(self, batch: list[tuple[str, Demonstration]]) -> None:
        """Read a batch and keep it on disk."""
        part = self._read(batch)
        try:
            write_shard(part, self._part(self.manifest["parts"] + len(self.parts)))
            self.parts.append(part)
            self._make_full_shard()
        except OSError as error:
            count = len(self.known)
            raise OSError(
                error.errno,
                f"{error.strerror or error} in {self.folder}. {count} demonstrations are safe there; make room and "
                "build again with the same demonstrations to go on",
            ) from error
        self.known.update(key for key, _ in batch)

    def _make_full_shard(self) -> None:
        if self.parts and sum(one.nbytes for one in self.parts) >= self.shard_bytes:
            self._make_shard()

    def _make_shard(self) -> None:
        """Put the waiting parts into one shard, say so in the manifest, and only then forget them."""
        listed = write_numbered(joined(self.parts), self.folder, len(self.manifest["shards"]) + 1)
        self._commit(shards=[*self.manifest["shards"], listed], parts=self.manifest["parts"] + len(self.parts))
        self.parts = []
        for path in self.parts_folder.glob("part-*.safetensors"):
            path.unlink()

    def _commit(self, **changes: Any) -> None:
        self.manifest = {**self.manifest, "complete": False, **changes}
        write_manifest(self.folder, self.manifest)

    def finish(self) -> None:
        """Make the last shard and say that the bank is complete."""
        if self.parts:
            self._make_shard()
        shards = [open_shard(self.folder / listed["file"], listed) for listed in self.manifest["shards"]]
        card = bank_card(BankContents.of_shards(shards, self.manifest["source"]), self.manifest["source"])
        write_bank(self.folder, {**self.manifest, "complete": True, "duplicates": self.duplicates}, card)
        if not any(self.parts_folder.iterdir()):
            self.parts_folder.rmdir()

    def _read(self, batch: list[tuple[str, Demonstration]]) -> Shard:
        """Read some demonstrations into a part."""
        model, demos = self.model, [demo for _, demo in batch]
        reading = model.read_fully(demos, features=bool(self.settings["features"]))
        columns: dict[str, torch.Tensor] = {
            "vectors": torch.cat(reading["fused"]),
            "lengths": torch.tensor([len(part) for part in reading["fused"]], dtype=torch.int32),
            "ids": torch.cat(model.word_ids(demos)).int(),
            "keys": key_column(key for key, _ in batch),
        }
        words = [model.processor.word(demo)[0] for demo in demos]
        columns["texts"], columns["text_lengths"] = blob([text.encode() for text in words])
        labels = [demo.text if model.processor.is_label(demo) else "" for demo in demos]
        columns["labels"], columns["label_lengths"] = blob([label.encode() for label in labels])
        if self.settings["keep_states"]:
            columns["states"] = torch.cat(reading["states"])
        if self.settings["thumbnails"]:
            pictures = [thumbnail(demo, self.settings["thumbnails"]) for demo in demos]
            columns["thumbnails"], columns["thumbnail_lengths"] = blob(pictures)
        if self.settings["features"]:
            columns[HAS_QUESTION] = torch.tensor([demo.question is not None for demo in demos], dtype=torch.uint8)
        for kind, found in reading["features"].items():
            columns[FEATURE + kind] = sketched(found, min(self.settings["features"], model.config.hidden_size)).half()
        dtype = str(columns["vectors"].dtype).removeprefix("torch.")
        part = make_shard(columns, {"source": self.manifest["source"], "dtype": dtype})
        storage = self.settings["storage"]
        if storage == "int8":  # used in the precision in which the backbone takes them
            part = stored_as(part, str(model.dtype).removeprefix("torch."))
        return stored_as(part, storage)


def in_memory(shard: Shard) -> Shard:
    """A shard that does not depend on its file any more."""
    return Shard({name: column.clone() for name, column in shard.columns.items()}, shard.facts)


def thumbnail(demo: Demonstration, size: int) -> bytes:
    """A JPEG of the first image, at most `size` pixels wide and high; empty where there is no image."""
    if not demo.images:
        return b""
    small = demo.images[0].convert("RGB")
    small.thumbnail((size, size), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()
