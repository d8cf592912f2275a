"""The folder of a demonstration bank: the manifest says which shards belong to it; one process writes at a time.

While a bank is built, each batch lies in the folder as a part of its own, numbered; parts become a shard when there
are enough of them. The manifest says how many have, so a build that was killed resumes from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files_aim import folder_lock, write_whole
from .shard_files import check_version, open_shard, shard_content
from .shards import FORMAT, RAGGED, UNREADABLE, VERSION, BankDamaged, Shard, is_words

BANK_MANIFEST = "aim_bank.json"
BANK_SHARDS = "aim_bank-*.safetensors"
SHARD_NAME = re.compile(r"aim_bank-\d{5,}-[0-9a-f]{8}\.safetensors")
PARTS_FOLDER = ".aim_bank_parts"
MANIFEST_KINDS = {"source": dict, "settings": dict, "shards": list, "complete": bool, "parts": int, "duplicates": int}
SHARD_KINDS = {"file": str, "sha256": str, "header_sha256": str, "bytes": int, "demonstrations": int, "tokens": int}


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep every other writer out of a bank's folder; a killed process keeps nobody out.

    Raises:
        ValueError: somebody else is writing there.
    """
    with folder_lock(folder) as locked:
        if not locked:
            raise ValueError(f"Another process is writing a bank in {folder}. Wait for it, or give another folder.")
        yield


def new_manifest(source: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """A manifest of a bank that `source` read."""
    return {"format": FORMAT, "version": VERSION, "source": dict(source), "settings": {}, "parts": 0, **more}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest with its own sha256; the bank is what this file says from now on."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    if isinstance(content.get("shards"), list):
        content["demonstrations"] = sum(listed["demonstrations"] for listed in content["shards"])
    text = json.dumps({**content, "sha256": _digest_of(content)}, ensure_ascii=False, indent=1, sort_keys=True)
    write_whole(folder / BANK_MANIFEST, text.encode())


def _digest_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        BankDamaged: it is cut short, was edited, lists a shard twice, or belongs to something else.
    """
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
        check_version(manifest, path)
        if manifest.pop("sha256") != _digest_of(manifest):
            raise ValueError("it was changed after it was written: its own sha256 is another one")
        wrong = [name for name, kind in MANIFEST_KINDS.items() if not isinstance(manifest[name], kind)]
        if wrong or not is_words(manifest["source"]):
            raise ValueError(f"{wrong or 'source'} is {manifest[(wrong or ['source'])[0]]!r:.80}")
        if not is_words(manifest.get(UNREADABLE, {})):
            raise ValueError(f"{UNREADABLE} is {manifest[UNREADABLE]!r:.80}")
        for shard in manifest["shards"]:
            wrong = [name for name, kind in SHARD_KINDS.items() if not isinstance(shard[name], kind)]
            if wrong or not SHARD_NAME.fullmatch(shard["file"]):
                raise ValueError(f"the shard {shard!r:.80}")
        if sum(shard["demonstrations"] for shard in manifest["shards"]) != manifest["demonstrations"]:
            raise ValueError(f"its shards do not hold {manifest['demonstrations']!r:.40} demonstrations")
        files = Counter(shard["file"] for shard in manifest["shards"])
        twice = sorted(file for file, count in files.items() if count > 1)
        if twice:
            raise ValueError(f"it lists {twice[0]} twice")
    except BankDamaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BankDamaged(
            f"{path} is not a manifest of a demonstration bank ({error!r:.200}). Copy or build the bank again."
        ) from error
    return manifest


def write_bank(folder: Path, manifest: Mapping[str, Any], card: str) -> None:
    """Write manifest and card, and remove what is not listed any more; a card that somebody wrote is kept."""
    path, written = folder / "README.md", None
    with suppress(OSError, ValueError):
        written = read_manifest(folder / BANK_MANIFEST).get("card")
    own = not path.exists() or written == hashlib.sha256(path.read_bytes()).hexdigest()
    write_manifest(folder, {**manifest, "card": hashlib.sha256(card.encode()).hexdigest()})
    remove_unlisted(folder, manifest)
    if own:
        write_whole(path, card.encode())


def write_numbered(shard: Shard, folder: Path, number: int) -> dict[str, Any]:
    """Write a shard under a name that holds its number and a digest of its content: no other is overwritten.

    Returns:
        Its entry in the manifest.
    """
    payload, listed = shard_content(shard)
    listed["file"] = f"aim_bank-{number:05d}-{listed['sha256'][:8]}.safetensors"
    write_whole(folder / listed["file"], payload)
    return listed


def remove_unlisted(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove shards of an older bank, and what a killed process left behind. Only for the one writer."""
    kept = {listed["file"] for listed in manifest["shards"]}
    stale = [path for path in folder.glob(BANK_SHARDS) if path.name not in kept]
    for path in [*stale, *folder.glob(".aim_bank-*.safetensors"), *folder.glob(".writing-*")]:
        path.unlink(missing_ok=True)


# --- parts of a build


def parts_folder(folder: Path) -> Path:
    """Where the parts of a build lie.

    Raises:
        BankDamaged: it is a link or a file: nothing behind it is read, written or removed.
    """
    path = folder / PARTS_FOLDER
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise BankDamaged(f"{path} is a link or a file, not the folder of a build. Remove it, or give another folder.")
    return path


def part_path(folder: Path, number: int) -> Path:
    """The file of a part."""
    return parts_folder(folder) / f"part-{number:07d}.safetensors"


def open_parts(folder: Path, manifest: Mapping[str, Any]) -> tuple[list[Shard], dict[Path, BankDamaged | None]]:
    """Parts that are in no shard yet, checked whole.

    Returns:
        The parts in order, and the files that are left out: because of damage, or since a shard has them (`None`).
    """
    parts: list[Shard] = []
    left_out: dict[Path, BankDamaged | None] = {}
    for path in sorted(parts_folder(folder).glob("part-*.safetensors")):
        number = path.stem.removeprefix("part-")
        try:
            if number.isdecimal() and int(number) < manifest["parts"]:
                left_out[path] = None
                continue
            if not number.isdecimal() or int(number) != manifest["parts"] + len(parts):
                raise BankDamaged(f"a part before {path} is missing")
            part = open_shard(path)
            if part.about["source"] != manifest["source"]:
                raise BankDamaged(f"{path} was read by another model")
            for name in RAGGED:
                if name in part.columns:
                    part.rows(name, range(len(part)))
            for kind in part.features:
                part.feature(kind)
            parts.append(part)
        except BankDamaged as error:
            left_out[path] = error
    return parts, left_out


def remove_parts(folder: Path) -> None:
    """Remove what a build left behind, where another bank takes its place; a link is left alone."""
    with suppress(BankDamaged):
        shutil.rmtree(parts_folder(folder), ignore_errors=True)
