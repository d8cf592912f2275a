"""Files of a demonstration bank: shards as safetensors, mapped into memory when they are opened, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files_aim import as_bytes
from .shards import FEATURE, FORMAT, RAGGED, SEAL, VERSION, BankDamaged, Shard, check_digest

HEADER_LIMIT = 100_000_000  # bytes: what safetensors itself refuses
TYPES = {  # of columns, as safetensors calls them
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I32": torch.int32, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip


def shard_content(shard: Shard, **more: Any) -> tuple[bytes, dict[str, Any]]:
    """The file of a shard; equal shards give equal files.

    Args:
        shard: the shard.
        **more: further metadata.

    Returns:
        Its bytes, and its entry in the manifest without its name.

    Raises:
        ValueError: a column holds NaN or an infinity.
    """
    shard.check_finite()
    columns = {name: column.contiguous() for name, column in shard.columns.items()}
    small = [name for name in columns if name not in RAGGED]
    about = {**shard.facts, **more, "format": FORMAT, "version": VERSION}
    about["digests"] = {name: hashlib.sha256(as_bytes(columns[name])).hexdigest() for name in sorted(small)}
    about[SEAL] = _seal(about, columns)
    payload = save(columns, metadata={FORMAT: json.dumps(about, sort_keys=True)})  # one entry: their order is random
    return payload, {
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
        listed: its entry in the manifest, where there is a manifest.

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
                check_digest(content, name, about["digests"].get(name), path.name)
                if name in RAGGED.values() and content:
                    columns[name] = torch.frombuffer(bytearray(content), dtype=columns[name].dtype)
        shard = Shard(columns, about, path.name)
        shard.reopen = open_shard, (path, listed)
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
    """Digest of a shard's metadata, so that it can be trusted also where its manifest is lost."""
    described = {name: value for name, value in about.items() if name != SEAL}
    layout = {name: [str(column.dtype), list(column.shape)] for name, column in columns.items()}
    return hashlib.sha256(json.dumps([described, layout], sort_keys=True).encode()).hexdigest()


def check_version(about: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise `BankDamaged` where a file is of another version of the format, `ValueError` where it is not a bank's."""
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


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
