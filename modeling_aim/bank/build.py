"""Building a bank: any stream of demonstrations, read once in batches, kept batch by batch, and taken up after a kill.

What is read lies in the bank's folder at once, as a small part a batch; parts become a shard when there are enough of
them. A part is written whole or not at all, its name is its number, and the manifest says how many have gone into
shards. So a build that is killed at any moment is resumed from there and ends with the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from ..demonstrations_aim import Demonstration
from ..files_aim import write_whole
from ..progress import has_bars, tracked
from .card import bank_card
from .contents import BankContents
from .manifest import (
    BANK_MANIFEST,
    BANK_SHARDS,
    new_manifest,
    only_writer,
    open_parts,
    part_path,
    parts_folder,
    read_manifest,
    remove_unlisted,
    write_bank,
    write_manifest,
    write_numbered,
)
from .pictures import thumbnail
from .rows import BadRow, BadRows, open_rows
from .select import sketched
from .shard_files import open_shard, shard_content
from .shards import (
    FEATURE,
    HAS_QUESTION,
    STORAGES,
    UNREADABLE,
    BankDamaged,
    Shard,
    StorageOverflow,
    blob,
    is_finite,
    joined,
    key_column,
    make_shard,
    stored_as,
)

if TYPE_CHECKING:
    from ..registered import AimForConditionalGeneration

logger = logging.get_logger(__name__)

Row = tuple[int, str, Demonstration]  # number in the stream, key, and what it is


def build_bank(
    model: AimForConditionalGeneration,
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
    on_bad_row: str = "skip",
    max_bad_rows: int = 100,
) -> list[BadRow]:
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
        on_bad_row: what to do with a row that is not a demonstration, or that the model cannot read: `"skip"` leaves
            it out with a warning that names it, `"raise"` makes it an error. What was read is kept in either case.
        max_bad_rows: with more bad rows than this, the build stops with an error; so it does when all rows are bad.

    Returns:
        The bad rows that were left out.

    Raises:
        ValueError: there are too many bad rows, or the folder holds a bank of another model or other settings.
        OSError: the disk is full; what was read is safe.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give a folder to build the bank in.")
    if storage not in STORAGES:
        raise ValueError(f"storage={storage!r}: expected one of {', '.join(STORAGES)}.")
    for name, value, least in (
        ("batch_size", batch_size, 1), ("feature_size", feature_size, 1), ("thumbnails", thumbnails, 0),
        ("shard_bytes", shard_bytes, 1), ("max_bad_rows", max_bad_rows, 0),
    ):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r:.40}: expected a whole number, {least} or more.")
    bad = BadRows(on_bad_row, max_bad_rows)
    folder.mkdir(parents=True, exist_ok=True)
    if storage == "auto":
        storage = str(model.dtype).removeprefix("torch.")
    settings = {"storage": storage, "keep_states": keep_states, "thumbnails": thumbnails}
    settings["features"] = feature_size if features else 0
    with only_writer(folder):
        builder = _Builder(model, folder, settings, shard_bytes, bad)
        rows = open_rows(demos, columns, bad, model.image_rules)
        for batch in _batches(_progress(rows, demos, total), builder, batch_size):
            builder.add(batch)
        builder.finish()
    return sorted(bad.rows)


def _progress(
    demos: Iterator[tuple[int, Demonstration]], stream: Iterable[Any], total: int | None
) -> Iterable[tuple[int, Demonstration]]:
    if total is None and isinstance(stream, Sized):
        total = len(stream)
    if not has_bars() and logging.is_progress_bar_enabled():
        return tracked(demos, "read", "demonstrations", total)
    return logging.tqdm(demos, total=total, desc="Reading demonstrations", unit="demo")


def _batches(demos: Iterable[tuple[int, Demonstration]], builder: _Builder, batch_size: int) -> Iterator[list[Row]]:
    """Those that are new to the bank, in batches, in the order in which they first come."""
    batch: list[Row] = []
    walked: set[str] = set()
    for number, demo in demos:
        key = demo.key
        builder.duplicates += key in walked
        if key not in walked and key in builder.unreadable:
            builder.bad.add(number, builder.unreadable[key])
        elif key not in walked and key not in builder.known:
            batch.append((number, key, demo))
        walked.add(key)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


class _Builder:
    """A bank in progress: finished shards, parts not yet in a shard, and the record of both."""

    def __init__(
        self,
        model: AimForConditionalGeneration,
        folder: Path,
        settings: dict[str, Any],
        shard_bytes: int,
        bad: BadRows,
    ) -> None:
        self.model, self.folder, self.settings, self.shard_bytes, self.bad = model, folder, settings, shard_bytes, bad
        self.parts_folder = parts_folder(folder)
        self.duplicates = 0
        self.manifest = self._begun()
        shards = [open_shard(folder / listed["file"], listed) for listed in self.manifest["shards"]]
        self.parts = self._open_parts()
        self.known = {bytes(row).hex() for shard in [*shards, *self.parts] for row in shard.columns["keys"].tolist()}
        # rows that the model cannot read: kept with each part and shard, so that a resumed build has the same batches
        self.unreadable: dict[str, str] = dict(self.manifest.get(UNREADABLE, {}))
        for part in self.parts:
            self.unreadable.update(part.about.get(UNREADABLE, {}))
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
                f"The bank in {self.folder} was begun with {'; '.join(wrong)}. Resume with the same model and "
                "settings, or give another folder."
            )
        self.parts_folder.mkdir(exist_ok=True)
        remove_unlisted(self.folder, manifest)
        return manifest

    def _open_parts(self) -> list[Shard]:
        """Parts that are in no shard yet. Behind a damaged one everything is read again, in the same order."""
        for stale in self.parts_folder.glob(".writing-*"):
            stale.unlink()
        parts, left_out = open_parts(self.folder, self.manifest)
        for path, error in left_out.items():
            if error is not None:
                logger.warning(f"Reading again what was in {path.name}: {error}")
            path.unlink()
        return [in_memory(part) for part in parts]

    def add(self, batch: list[Row]) -> None:
        """Read a batch and keep it on disk."""
        part = self._read_good(batch)
        if part is None:
            return
        try:
            if self.manifest["complete"]:
                self._commit()  # from here on it is not: parts belong to it
            number = self.manifest["parts"] + len(self.parts)
            payload, _ = shard_content(part, **{UNREADABLE: self.unreadable})
            write_whole(part_path(self.folder, number), payload)
            self.parts.append(part)
            self._make_full_shard()
        except OSError as error:
            count = len(self.known)
            raise OSError(
                error.errno,
                f"{error.strerror or error} in {self.folder}. {count} demonstrations are safe there; make room and "
                "build again with the same demonstrations to resume",
            ) from error
        self.known.update(bytes(row).hex() for row in part.columns["keys"].tolist())

    def _read_good(self, batch: list[Row]) -> Shard | None:
        """Read a batch; where that fails, read one at a time and leave out those that the model cannot read."""
        try:
            return self._read(batch)
        except StorageOverflow:
            raise
        except (ValueError, TypeError, LookupError) as error:
            if len(batch) == 1:
                number, key, _ = batch[0]
                self.bad.add(number, str(error), error)
                self.unreadable[key] = str(error)
                return None
        parts = [part for part in (self._read_good([row]) for row in batch) if part is not None]
        return joined(parts) if parts else None

    def _make_full_shard(self) -> None:
        if self.parts and sum(part.nbytes for part in self.parts) >= self.shard_bytes:
            self._make_shard()

    def _make_shard(self) -> None:
        """Put the waiting parts into one shard, say so in the manifest, and only then forget them."""
        listed = write_numbered(joined(self.parts), self.folder, len(self.manifest["shards"]) + 1)
        shards = [*self.manifest["shards"], listed]
        self._commit(shards=shards, parts=self.manifest["parts"] + len(self.parts), unreadable=self.unreadable)
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
        self.bad.finish(good=any(len(shard) for shard in shards))
        source = self.manifest["source"]
        card = bank_card(BankContents.of_shards(shards, source), source)
        self.manifest.pop(UNREADABLE, None)  # tried again when more is added
        write_bank(self.folder, {**self.manifest, "complete": True, "duplicates": self.duplicates}, card)
        if not any(self.parts_folder.iterdir()):
            self.parts_folder.rmdir()

    def _read(self, batch: Sequence[Row]) -> Shard:
        """Read some demonstrations into a part."""
        model, demos = self.model, [demo for _, _, demo in batch]
        reading = model.read_fully(demos, features=bool(self.settings["features"]))
        _check_read(reading)
        columns: dict[str, torch.Tensor] = {
            "vectors": torch.cat(reading["fused"]),
            "lengths": torch.tensor([len(part) for part in reading["fused"]], dtype=torch.int32),
            "ids": torch.cat(model.text_token_ids(demos)).int(),
            "keys": key_column(key for _, key, _ in batch),
        }
        words = [model.processor.apply_template(demo)[0] for demo in demos]
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
        for kind, rows in reading["features"].items():
            columns[FEATURE + kind] = sketched(rows, min(self.settings["features"], model.config.hidden_size)).half()
        dtype = str(columns["vectors"].dtype).removeprefix("torch.")
        part = make_shard(columns, {"source": self.manifest["source"], "dtype": dtype})
        storage = self.settings["storage"]
        if storage == "int8":  # used in the precision in which the backbone takes them
            part = stored_as(part, str(model.dtype).removeprefix("torch."))
        return stored_as(part, storage)


def _check_read(reading: Mapping[str, Any]) -> None:
    """Raise `ValueError` where what the model gave is not finite."""
    for what, parts in (("hidden states", reading["states"]), ("fused tokens", reading["fused"])):
        if not all(is_finite(part) for part in parts):
            raise ValueError(
                f"Its {what} are not finite (NaN or infinite). Check the weights of the projector, or load the "
                "backbone in bfloat16 or float32."
            )
    for kind, features in reading["features"].items():
        if not is_finite(features):
            raise ValueError(f"Its {kind} features are not finite (NaN or infinite): the backbone overflows.")


def in_memory(shard: Shard) -> Shard:
    """A shard that does not depend on its file any more."""
    return Shard({name: column.clone() for name, column in shard.columns.items()}, shard.facts)
