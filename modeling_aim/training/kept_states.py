"""Hidden states of demonstrations, kept for a whole training run: in memory, and on disk where a folder is given.

The backbone is frozen and the projector comes after it, so the hidden states of a demonstration never change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..cache_aim import LRUCache

FREE_AT_LEAST = 2**30  # bytes that stay free on the disk


class KeptStates(LRUCache):
    """Hidden states by demonstration: recent ones in memory, all of them on disk, both bounded in bytes.

    Takes the place of a model's `read_cache`. On disk an entry is a safetensors file under the hash of what was read
    and what read it (backbone fingerprint, precision, layers, processor settings), so several runs, and several
    processes of one run, share a folder. Where the bound is reached, entries used longest ago leave.

    Args:
        max_bytes: bound in memory.
        folder: where entries are kept beyond memory; nowhere when `None`.
        max_disk_bytes: bound on disk.
        reader: what reads, as JSON values.
        width: numbers in a state; entries of another shape, or that are not finite, are removed and read again.
    """

    def __init__(
        self,
        max_bytes: int,
        folder: str | os.PathLike[str] | None = None,
        max_disk_bytes: int = 20 * 2**30,
        reader: Mapping[str, Any] | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__(max_bytes)
        self.folder = None if folder is None else Path(folder)
        self.max_disk_bytes = max_disk_bytes
        self.hits = self.misses = 0
        self.reading_seconds = 0.0  # from a state that was not kept to the first one that was read in its place
        self._missed: float | None = None
        self.width = width
        self._reader = hashlib.sha256(json.dumps(reader, sort_keys=True, default=str).encode()).hexdigest()
        self._on_disk = 0
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._on_disk = sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))

    def __reduce__(self) -> Any:
        return LRUCache, (self.max_bytes,)

    def get(self, key: Hashable) -> Any:
        """States of a demonstration; `None` where they are not kept."""
        value = super().get(key)
        if value is None and self.folder is not None:
            value = self._load(self._path(key))
            if value is not None:
                super().put(key, value, value.numel() * value.element_size())
        self.hits += value is not None
        self.misses += value is None
        if value is None:
            self._missed = time.perf_counter()
        return value

    def put(self, key: Hashable, value: torch.Tensor, size: int) -> None:
        """Keep states, off the accelerator."""
        value = value.detach().cpu()  # which waits for the accelerator
        if self._missed is not None:
            self.reading_seconds += time.perf_counter() - self._missed
            self._missed = None
        super().put(key, value, size)
        if self.folder is not None:
            self._store(self._path(key), value, size)

    def _path(self, key: Any) -> Path:
        assert self.folder is not None
        name = hashlib.sha256(f"{key[0]} {self._reader}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _load(self, path: Path) -> torch.Tensor | None:
        try:
            value = load_file(path)["states"]
            self._check(value)
            os.utime(path)  # it was used now
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, OSError, ValueError):  # half-written by a crash, or foreign: read again
            path.unlink(missing_ok=True)
            return None
        return value

    def _check(self, value: torch.Tensor) -> None:
        """Raise `ValueError` for what cannot be states of this backbone."""
        shaped = value.ndim == 2 and len(value) > 0 and value.is_floating_point()
        if not shaped or (self.width is not None and value.shape[1] != self.width):
            raise ValueError(f"Kept states have the shape {tuple(value.shape)}; expected (tokens, {self.width}).")
        if not bool(torch.isfinite(value).all()):
            raise ValueError("Kept states hold numbers that are not finite.")

    def _store(self, path: Path, value: torch.Tensor, size: int) -> None:
        """Write an entry under a temporary name and rename it; a full disk is no reason to stop."""
        if path.exists() or shutil.disk_usage(self.folder or ".").free < FREE_AT_LEAST + size:
            return
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file({"states": value.contiguous()}, name)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
        self._on_disk += path.stat().st_size
        if self._on_disk > self.max_disk_bytes:
            self._shrink()

    def _shrink(self) -> None:
        """Remove the entries used longest ago until nine tenths of the bound are left."""
        assert self.folder is not None
        files = []
        for path in self.folder.glob("*/*.safetensors"):
            try:
                files.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:  # another process of the run was first
                continue
        self._on_disk = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self._on_disk <= 0.9 * self.max_disk_bytes:
                break
            path.unlink(missing_ok=True)
            self._on_disk -= size
