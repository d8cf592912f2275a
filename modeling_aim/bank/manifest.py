"""The manifest of a demonstration bank: which shards belong to it, what read them, and whether it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files_aim import write_whole
from .shards import FORMAT, VERSION, BankDamaged, Shard, check_version, write_shard

BANK_MANIFEST = "aim_bank.json"
BANK_SHARDS = "aim_bank-*.safetensors"
MANIFEST_KINDS = {"source": dict, "settings": dict, "shards": list, "complete": bool, "parts": int, "duplicates": int}
SHARD_KINDS = {"file": str, "sha256": str, "header_sha256": str, "bytes": int, "demonstrations": int, "tokens": int}


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


def _digest_of(content: Any) -> str:
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
        if wrong or not all(isinstance(value, str) for value in manifest["source"].values()):
            raise ValueError(f"{wrong or 'source'} is {manifest[(wrong or ['source'])[0]]!r:.80}")
        for shard in manifest["shards"]:
            wrong = [name for name, kind in SHARD_KINDS.items() if not isinstance(shard[name], kind)]
            if wrong or Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"the shard {shard!r:.80}")
        if sum(shard["demonstrations"] for shard in manifest["shards"]) != manifest["demonstrations"]:
            raise ValueError(f"its shards do not hold {manifest['demonstrations']!r:.40} demonstrations")
        files = [shard["file"] for shard in manifest["shards"]]
        twice = sorted({file for file in files if files.count(file) > 1})
        if twice:
            raise ValueError(f"it lists {twice[0]} twice")
    except BankDamaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BankDamaged(
            f"{path} is no manifest of a demonstration bank ({error!r:.200}). Copy or build the bank again."
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
    """Write a shard under a name that holds its number and a digest of its content: no other is overwritten."""
    scratch = folder / f".aim_bank-{number:05d}.safetensors"
    listed = write_shard(shard, scratch)
    listed["file"] = f"aim_bank-{number:05d}-{listed['sha256'][:8]}.safetensors"
    os.replace(scratch, folder / listed["file"])
    return listed


def remove_unlisted(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Remove shards of an older bank, and what a killed process left behind."""
    kept = {listed["file"] for listed in manifest["shards"]}
    stale = [path for path in folder.glob(BANK_SHARDS) if path.name not in kept]
    for path in [*stale, *folder.glob(".aim_bank-*.safetensors"), *folder.glob(".writing-*")]:
        path.unlink(missing_ok=True)
