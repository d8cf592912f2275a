"""Images of published datasets, found but not opened: in files, in datasets on disk, in zip archives."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..images_aim import is_address, is_readable
from .pairs import Unopened, located


class DatasetImage(Unopened):
    """An image in a dataset on disk.

    Args:
        data: a dataset of `datasets` whose images are not decoded.
        row: number of the row.
        column: of the image.
        folder: what paths are relative to.
    """

    def __init__(self, data: Any, row: int, column: str, folder: Path) -> None:
        self.data, self.row, self.column, self.folder = data, row, column, folder
        self.place = (id(data), row, column)

    def under(self, folder: Path) -> DatasetImage:
        return DatasetImage(self.data, self.row, self.column, folder)

    def __getitem__(self, key: str) -> Any:
        image = self.data[self.row][self.column] or {}
        return {"bytes": image.get("bytes"), "path": located(self.folder, image.get("path"))}[key]

    def __repr__(self) -> str:
        return f"<{self.column} of row {self.row}>"


class Member(Unopened):
    """An image in a zip archive.

    Args:
        archive: the file.
        name: of the image in it.
    """

    def __init__(self, archive: Path, name: str) -> None:
        self.archive, self.name = archive, name
        self.place = (archive, name)

    def __getitem__(self, key: str) -> Any:
        if key == "path":
            return None
        try:
            with zipfile.ZipFile(self.archive) as archive:
                return {"bytes": archive.read(self.name)}[key]
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise ValueError(f"Cannot read the image {self.name} in {self.archive} ({error}).") from error

    def __repr__(self) -> str:
        return f"<{self.name} in {self.archive}>"


class Stretch(Unopened):
    """An image in a stretch of a file, such as a member of a tar that is not compressed.

    Args:
        path: the file.
        offset, size: of the image in it, in bytes.
    """

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self.path, self.offset, self.size = path, offset, size
        self.place = (path, offset)

    def __getitem__(self, key: str) -> Any:
        if key == "path":
            return None
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return {"bytes": file.read(self.size)}[key]

    def __repr__(self) -> str:
        return f"<image at byte {self.offset} of {self.path}>"


class Encoded(Unopened):
    """An image in base64 in a JSON member of a tar, as OpenFlamingo keeps MMC4: read and decoded when it is asked for.

    Args:
        archive: the tar, not compressed.
        offset, size: of the member, in bytes.
        number: of the image in its `image_info`.
    """

    def __init__(self, archive: Path, offset: int, size: int, number: int) -> None:
        self.archive, self.offset, self.size, self.number = archive, offset, size, number
        self.place = (archive, offset, number)

    def __getitem__(self, key: str) -> Any:
        if key == "path":
            return None
        try:
            with self.archive.open("rb") as file:
                file.seek(self.offset)
                encoded = json.loads(file.read(self.size))["image_info"][self.number]["image_base64"]
            # str(bytes) in convert_mmc4_to_wds.py left b'...' around it
            return {"bytes": base64.b64decode(encoded.removeprefix("b'").removesuffix("'"), validate=True)}[key]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"Cannot read the image {self!r} ({error}).") from error

    def __repr__(self) -> str:
        return f"<image {self.number} of the document at byte {self.offset} of {self.archive}>"


def is_image(image: object) -> bool:
    """Whether an image that is unopened is there and begins as an image does; its pixels are not read.

    URLs are taken on trust: they are fetched when they are shown.
    """
    try:
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
    except (OSError, ValueError):
        return False
    if isinstance(image, Image.Image) or is_address(image) or (isinstance(image, str) and image.startswith("data:")):
        return True
    return bool(image) and isinstance(image, (bytes, str, os.PathLike)) and is_readable(image)


def image_key(image: Any) -> str:
    """What tells images apart: where a file lies, or else the digest of the content."""
    if isinstance(image, Member):
        return f"{image.archive}:{image.name}"
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, Image.Image):
        image = image.tobytes()
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else os.fspath(image)


class Pictures:
    """The images of a dataset that is published as JSON and archives, whether these are unpacked or not.

    Args:
        folder: has the archives, or what was in them.
        root: folder that names of images are relative to, where it is another one.
        known: names of the folder; one that an image's name has in it ends what need not be there of that name.
    """

    def __init__(self, folder: Path, root: Path | None = None, known: Sequence[str] = ()) -> None:
        self.folder, self.root, self.known = folder, root, {folder.name, *known}

    @cached_property
    def archived(self) -> dict[str, list[tuple[Path, str]]]:
        """Members of all archives in the folder, by the last part of their names.

        Raises:
            ValueError: an archive is damaged.
        """
        by_name: dict[str, list[tuple[Path, str]]] = {}
        for archive in sorted(self.folder.rglob("*.zip")):
            try:
                with zipfile.ZipFile(archive) as opened:
                    names = opened.namelist()
            except zipfile.BadZipFile as error:
                raise ValueError(f"{archive} is damaged ({error}). Fetch it again.") from error
            for name in names:
                by_name.setdefault(name.rpartition("/")[2], []).append((archive, name))
        return by_name

    def find(self, name: str) -> str | Member | None:
        """Where an image is; `None` if it is nowhere. Files go before archives.

        Raises:
            ValueError: it may be one of several.
        """
        parts = [part for part in name.split("/") if part not in ("", ".")]
        kept = [parts, *(parts[place + 1 :] for place, part in enumerate(parts[:-1]) if part in self.known)]
        places = [self.folder.joinpath(*some) for some in kept]
        for place in places if self.root is None else [self.root.joinpath(*parts), *places]:
            if place.is_file():
                return os.fspath(place)
        for some in kept:  # an archive may have been packed with its own name as a folder, or without
            members = [
                (archive, member)
                for archive, member in self.archived.get(parts[-1], [])
                if [archive.stem, *member.split("/")][-len(some) :] == some
            ]
            if len(members) > 1:
                raise ValueError(f"{self.folder}: {name!r} may be any of {[Member(*pair) for pair in members]}.")
            if members:
                return Member(*members[0])
        return None
