"""Demonstrations of a visitor: images that were uploaded, and banks as ZIP files. Nothing else is opened."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_aim import DemonstrationBank
from modeling_aim.bank.pictures import open_thumbnail
from modeling_aim.demonstrations_aim import FusedDemonstrations, concatenated
from modeling_aim.images_aim import ImageRules, open_image

MOST_DEMONSTRATIONS = 64
LONGEST_LABEL = 80
LARGEST_SIDE = 1024  # pixels; larger images are reduced to it, so that a visitor takes little memory
RULES = ImageRules(max_pixels=50_000_000, sources="given")  # bytes only: no URL and no path of this machine
BANK_BYTES = 128 * 2**20
BANK_FILES = re.compile(r"aim_bank\.json|README\.md|[\w.-]+\.safetensors")


@dataclass(frozen=True)
class Labelled:
    """A labelled image.

    Args:
        label: what it is.
        image: what the backbone reads; `None` of a demonstration from a bank.
        thumbnail: what is shown; `None` where the bank has no picture.
        fused: what was read of it, where it has been read.
        is_label: `label` is a bare name; otherwise a text that a bank holds.
    """

    label: str
    image: Image.Image | None
    thumbnail: Image.Image | None
    fused: FusedDemonstrations | None = None
    is_label: bool = True

    @property
    def raw(self) -> dict[str, Any]:
        """As `model.read` takes it."""
        return {"image": self.image, "label" if self.is_label else "text": self.label}


def opened(path: str | Path) -> Image.Image:
    """An image that was uploaded.

    Raises:
        ValueError: it is not an image, is damaged or has too many pixels.
    """
    try:
        image = open_image(Path(path).read_bytes(), RULES)
    except (ValueError, OSError) as error:
        size = re.search(r"\d+ x \d+ pixels", str(error))
        why = f"has {size[0]}, more than {RULES.max_pixels:,}" if size else "is not an image, or is damaged"
        raise ValueError(f"{Path(path).name[:60]} {why}: give a PNG, JPEG or WebP file.") from error
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return image


def checked_label(label: str) -> str:
    """A label as it is used.

    Raises:
        ValueError: it is empty or too long.
    """
    label = " ".join(label.split())
    if not label:
        raise ValueError("The label is empty: write what the image shows, such as dax.")
    if len(label) > LONGEST_LABEL:
        raise ValueError(f"The label has {len(label)} characters: write at most {LONGEST_LABEL}.")
    return label


def added(demos: Sequence[Labelled], paths: Sequence[str], label: str) -> tuple[Labelled, ...]:
    """The demonstrations with more images, all or none of them.

    Args:
        demos: those that are there.
        paths: of the files that were uploaded.
        label: of all of them; where empty, the file's name without its number is the label (`dax-1.png`: dax).

    Raises:
        ValueError: one cannot be used, or there are too many.
    """
    if len(demos) + len(paths) > MOST_DEMONSTRATIONS:
        raise ValueError(
            f"That would be {len(demos) + len(paths)} demonstrations, and this Space takes {MOST_DEMONSTRATIONS}."
        )
    new = []
    for path in paths:
        name = label.strip() or re.sub(r"[\s_-]*\(?\d*\)?$", "", Path(path).stem).replace("_", " ").strip()
        if not name:
            raise ValueError(f"{Path(path).name[:60]} has no name to take a label from: write a label first.")
        image = opened(path)
        new.append(Labelled(checked_label(name), image, image))
    return (*demos, *new)


# --- banks


def saved_bank(model: Any, demos: Sequence[Labelled], path: Path) -> None:
    """Write demonstrations that were read as a bank, in a ZIP file.

    Args:
        model: the model that has read them.
        demos: at least one. Small pictures are kept where all images are there.
        path: of the ZIP file.
    """
    with tempfile.TemporaryDirectory(prefix="aim-bank-") as scratch:
        folder = Path(scratch)
        if all(demo.image is not None for demo in demos):
            DemonstrationBank.build(model, [demo.raw for demo in demos], folder)
        else:
            fused = concatenated([demo.fused for demo in demos if demo.fused is not None])
            DemonstrationBank(fused).save_pretrained(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.iterdir()):
                if file.is_file() and BANK_FILES.fullmatch(file.name):
                    archive.write(file, file.name)


def opened_bank(path: str | Path, model: Any) -> tuple[Labelled, ...]:
    """The demonstrations of a bank in a ZIP file.

    Raises:
        ValueError: it is not a bank, is damaged or too large, or another model has read it.
    """
    with tempfile.TemporaryDirectory(prefix="aim-bank-") as scratch:
        folder = Path(scratch)
        try:
            with zipfile.ZipFile(path) as archive:
                _extract(archive, folder)
            bank = DemonstrationBank.from_pretrained(folder, model)
        except (zipfile.BadZipFile, FileNotFoundError, OSError) as error:
            raise ValueError(f"{Path(path).name[:60]} is not a bank: give a ZIP file that was saved here.") from error
        except ValueError as error:
            if "read by another model" in str(error):
                raise ValueError(
                    "Another backbone, projector or depth has read this bank: choose that one, then load it again."
                ) from error
            raise
        if len(bank) > MOST_DEMONSTRATIONS:
            raise ValueError(
                f"This bank has {len(bank):,} demonstrations, and this Space takes {MOST_DEMONSTRATIONS}."
            )
        bank.verify()
        fused, labels, texts, pictures = bank.fused, bank.labels(), bank.texts(), bank.thumbnails()
        return tuple(
            Labelled(
                texts[number] if label is None else label,
                None,
                open_thumbnail(pictures[number]) if pictures[number] else None,
                fused[number],
                is_label=label is not None,
            )
            for number, label in enumerate(labels)
        )


def _extract(archive: zipfile.ZipFile, folder: Path) -> None:
    """Extract the files of a bank and no others; their names have no folder, and their sizes are bounded."""
    entries = archive.infolist()
    if sum(entry.file_size for entry in entries) > BANK_BYTES:
        raise ValueError(f"This bank has more than {BANK_BYTES // 2**20} MB: this Space does not take it.")
    for entry in entries:
        if not BANK_FILES.fullmatch(entry.filename):
            raise zipfile.BadZipFile(entry.filename)
        with archive.open(entry) as source, open(folder / entry.filename, "wb") as target:
            target.write(source.read(BANK_BYTES))
