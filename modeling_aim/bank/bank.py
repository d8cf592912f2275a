"""The demonstration bank: what was read once, kept on disk or the Hub, and chosen from for each query (section 3.3).

A bank is a folder of shards (`shards.py`) and a manifest, `aim_bank.json`, that names them. The manifest is
written last, and shards are named by their content, so a folder holds the old bank or the new one, whole.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..demonstrations_aim import check_source
from ..files_aim import upload
from .build import build_bank
from .card import bank_card
from .choosing import ChoosingBank
from .manifest import BANK_MANIFEST, new_manifest, only_writer, read_manifest, remove_parts, write_bank, write_numbered
from .opening import open_files
from .rows import BadRow
from .shard_files import file_sha256
from .shards import BankDamaged, Shard, joined, slice_of, stored_as, with_vectors

if TYPE_CHECKING:
    from ..registered import AimForConditionalGeneration

SHARD_BYTES = 256 * 2**20


class DemonstrationBank(ChoosingBank):
    """Demonstrations that were read once and are used many times.

    A bank goes wherever `demos=` is taken: whole, as a slice, or with `shots` and `select` to choose for each row:
    `model.generate(**inputs, demos=bank, shots=8, select="image")`. Make one with `DemonstrationBank.build(model,
    demos, folder)`, open one with `DemonstrationBank.from_pretrained(folder, model)`.

    Args:
        fused: what `model.read(demos)` returned, to keep it. Such a bank has no features of images and texts; one
            from `build` has.
    """

    aim_kind: ClassVar[str] = "bank"  # by this a model recognises a bank, also a model loaded as remote code
    bad_rows: tuple[BadRow, ...] = ()

    @classmethod
    def build(
        cls,
        model: AimForConditionalGeneration,
        demos: Iterable[Any],
        save_directory: str | os.PathLike[str],
        **options: Any,
    ) -> DemonstrationBank:
        """Read a stream of demonstrations into a bank on disk, each content once.

        What was read is on disk after each batch. Rerun after a crash to resume: the files end the same, byte for
        byte. With more demonstrations, the new ones are added.

        Args:
            model: an AIM model, installed or loaded as remote code.
            demos: any iterable of demonstrations, or a `datasets` dataset (streamed ones too).
            save_directory: folder of the bank.
            **options: see `modeling_aim.bank.build.build_bank`.

        Returns:
            The bank, opened; its `bad_rows` are the rows of the stream that were left out, and why.

        Raises:
            ValueError: too many rows are bad, or the folder holds a bank of another model or other settings.
            OSError: the disk is full; what was read is safe.
        """
        bad_rows = build_bank(model, demos, save_directory, **options)
        bank = cls.from_pretrained(save_directory, model)
        bank.bad_rows = tuple(bad_rows)
        return bank

    # --- keep

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, storage: str = "auto", shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write the bank: shards, manifest and a card. A kill leaves the old bank or the new one, and nobody else can
        write there meanwhile.

        A card that is already there is kept if somebody wrote it, and rewritten if this method wrote it.

        Args:
            save_directory: the folder.
            storage: how fused tokens are kept: `"auto"` (as they are), `"float32"`, `"bfloat16"`, `"float16"`, or
                `"int8"` with one scale a token.
            shard_bytes: about how large a file may be.

        Raises:
            ValueError: somebody else is writing there, or values are not finite or too large for `storage`.
        """

        def parts() -> Iterator[Shard]:
            for shard in self._shards:
                step = max(1, len(shard) * shard_bytes // max(shard.nbytes, 1))
                for start in range(0, max(len(shard), 1), step):
                    yield stored_as(slice_of(shard, start, start + step), storage)

        self._write(Path(save_directory), parts(), self.source)

    def _write(self, folder: Path, shards: Iterable[Shard], source: Mapping[str, str]) -> None:
        """Write shards as a bank that takes the place of what is in `folder`."""
        if folder.is_file():
            raise ValueError(f"{folder} is a file; give a folder to save to.")
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            listed = [write_numbered(shard, folder, number) for number, shard in enumerate(shards, 1)]
            manifest = new_manifest(source, shards=listed, complete=True, duplicates=self.duplicates)
            write_bank(folder, manifest, bank_card(self, source))
            remove_parts(folder)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        model: AimForConditionalGeneration | None = None,
        *,
        damaged: str = "raise",
        **hub_kwargs: Any,
    ) -> DemonstrationBank:
        """Open a bank from a folder or a Hub repository. Files are mapped: memory is taken for what is used.

        Headers, keys and digests are checked now, fused tokens and words when they are used, and features when they
        are first compared; `verify` checks everything.

        Args:
            name_or_path: folder or repository id.
            model: the model that is to use it: the bank must have been read by it, and it is remembered for queries.
            damaged: `"raise"`, or `"skip"` to open the files that are whole and warn about the others; in a folder
                also without its manifest.
            **hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, ..., as for `from_pretrained`.

        Raises:
            FileNotFoundError: there is no bank.
            ValueError: a file is damaged or is not a bank (the message names the file), or another model read it (the
                message names what differs).
        """
        files = open_files(name_or_path, damaged, hub_kwargs)
        bank = cls.of_shards(files.shards, files.source, files.folder)
        bank.duplicates = files.duplicates
        if model is not None:
            check_source(bank.source, model.source)
            bank.model = model
        return bank

    def verify(self) -> None:
        """Read every file whole, compare it with the manifest, and look for values that are not finite.

        Raises:
            ValueError: a file is damaged (the message names each), or holds NaN or infinite values.
        """
        if self.folder is not None:
            listed = read_manifest(self.folder / BANK_MANIFEST)["shards"]
            wrong = [entry["file"] for entry in listed if file_sha256(self.folder / entry["file"]) != entry["sha256"]]
            if wrong:
                raise BankDamaged(
                    f"These files of {self.folder} are damaged: {', '.join(wrong)}. Copy or build them again."
                )
        for shard in self._shards:
            shard.check_finite()

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload the bank; a card that is already there is kept. Nothing is uploaded through a link: a bank that has
        links among its files is written to a folder of its own first.

        Args:
            repo_id: the repository, made when it does not exist.
            **kwargs: `token`, `private`, `revision`, `commit_message`, `commit_description`, `create_pr`.
        """
        kwargs.setdefault("commit_message", "Upload a demonstration bank")
        with tempfile.TemporaryDirectory() as scratch:
            folder, files = self.folder, []
            if folder is not None:
                files = self._files(folder)
            if folder is None or not files:
                folder = Path(scratch)
                self.save_pretrained(folder)
                files = self._files(folder)
            return upload(folder, repo_id, allow_patterns=files, **kwargs)

    @staticmethod
    def _files(folder: Path) -> list[str]:
        """The files of a bank's folder, if it can be uploaded as it is: complete, and no links."""
        manifest = read_manifest(folder / BANK_MANIFEST)
        files = [BANK_MANIFEST, "README.md", *(listed["file"] for listed in manifest["shards"])]
        return files if manifest["complete"] and not any((folder / name).is_symlink() for name in files) else []

    def reproject(
        self, model: AimForConditionalGeneration, save_directory: str | os.PathLike[str], batch_size: int = 256
    ) -> DemonstrationBank:
        """Put the hidden states of this bank through the projector of `model`: nothing is read again.

        Args:
            model: has the backbone, read layers and processor settings of this bank, and another projector.
            save_directory: folder of the new bank.
            batch_size: demonstrations at a time.

        Raises:
            ValueError: no hidden states were kept, or something else than the projector differs.
        """
        of_projector = {name: model.source[name] for name in ("fused", "projector")}  # the states are the backbone's
        check_source({**self.source, **of_projector}, model.source)
        self.states([])

        def projected() -> Iterator[Shard]:
            for shard in self._shards:
                parts = []
                for start in range(0, len(shard), batch_size):
                    part = slice_of(shard, start, start + batch_size)
                    fused = model.project(torch.cat(part.rows("states", range(len(part)))))
                    parts.append(with_vectors(part, fused, dict(model.source)))
                yield joined(parts)

        self._write(Path(save_directory), projected(), model.source)
        return type(self).from_pretrained(save_directory, model)

    def card(self) -> str:
        """What a repository that holds this bank says about itself."""
        return bank_card(self, self.source)
