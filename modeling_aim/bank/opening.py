"""Opening a bank, from a folder or the Hub: its shards, or those that are whole of a damaged or unfinished one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import logging

from ..files_aim import locate_file
from .manifest import BANK_MANIFEST, BANK_SHARDS, open_parts, read_manifest
from .shard_files import open_shard
from .shards import BankDamaged, Shard

logger = logging.get_logger(__name__)


class OpenedFiles(NamedTuple):
    """The shards of a bank, what read them, where they lie, and how many demonstrations came more than once."""

    shards: list[Shard]
    source: dict[str, str]
    folder: Path
    duplicates: int


def open_files(name_or_path: str | os.PathLike[str], damaged: str, hub_kwargs: Mapping[str, Any]) -> OpenedFiles:
    """Open the files of a bank; see `DemonstrationBank.from_pretrained`."""
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
        return _without_manifest(folder)
    shards = []
    for listed in manifest["shards"]:
        try:
            file = listed["file"]
            shards.append(
                open_shard(locate_file(name_or_path, file, **hub_kwargs) if folder is None else folder / file, listed)
            )
        except (BankDamaged, FileNotFoundError) as error:
            if damaged == "raise":
                note = " To use the rest of the bank: from_pretrained(..., damaged='skip')."
                raise BankDamaged(str(error) + note) from error
            logger.warning(f"Left out: {error}")
    if not manifest["complete"]:
        shards += _waiting(folder, manifest, damaged)
        logger.warning(
            f"{name_or_path} is a bank whose building was interrupted: {sum(map(len, shards))} demonstrations can be "
            "used. Build it again with the same demonstrations to finish it; nothing is read twice."
        )
    shards = _fitting(shards, manifest["source"], damaged)
    return OpenedFiles(shards, manifest["source"], folder or Path(path).parent, manifest["duplicates"])


def _waiting(folder: Path | None, manifest: Mapping[str, Any], damaged: str) -> list[Shard]:
    """What a build that was stopped had read, but not put into a shard yet."""
    try:
        parts, left_out = ([], {}) if folder is None else open_parts(folder, manifest)
        for path, error in left_out.items():
            if error is not None:
                logger.warning(f"Left out: {path.name}: {error}")
        return parts
    except BankDamaged as error:
        if damaged == "raise":
            raise
        logger.warning(f"Left out: {error}")
        return []


def _without_manifest(folder: Path) -> OpenedFiles:
    """The shards of a folder that are whole and belong together."""
    shards: list[Shard] = []
    for path in sorted(folder.glob(BANK_SHARDS)):
        try:
            shards.append(open_shard(path))
        except BankDamaged as error:
            logger.warning(f"Left out: {error}")
    if not shards:
        raise BankDamaged(f"No shard in {folder} can be opened. Copy or build the bank again.")
    source = shards[0].about["source"]
    return OpenedFiles(_fitting(shards, source, "skip"), source, folder, 0)


def _fitting(shards: Sequence[Shard], source: Mapping[str, str], damaged: str) -> list[Shard]:
    """Shards that belong to one bank: read by `source`, and of one width.

    Args:
        shards: what was opened.
        source: what read the bank.
        damaged: `"raise"`, or `"skip"` to leave the others out with a warning.

    Raises:
        BankDamaged: one does not belong to the others.
    """
    fitting: list[Shard] = []
    for shard in shards:
        if shard.about["source"] != source:
            problem = "was read by another model than the others"
        elif fitting and (shard.width, shard.about["dtype"]) != (fitting[0].width, fitting[0].about["dtype"]):
            problem = f"has fused tokens of another width or type than {fitting[0].name}"
        else:
            fitting.append(shard)
            continue
        if damaged == "raise":
            raise BankDamaged(f"{shard.name} {problem}. Copy or build the bank again.")
        logger.warning(f"Left out: {shard.name} {problem}.")
    return fitting
