"""What a folder of a published dataset holds: which of its files have pairs, of which split, and which are refused.

A folder is never guessed into labels: images without a text are a labelled dataset only where they lie in two class
folders or more and no annotations lie beside them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .pairs import IMAGE_SUFFIXES
from .rows import COLUMNS, LINES, METADATA, files_of

logger = logging.get_logger(__name__)

SPLIT = re.compile(r"(train(ing|val)?|restval|val(id|idation)?|dev|test(ing)?)(\d{4})?", re.IGNORECASE)
ANNOTATIONS = (".json", ".csv", ".tsv")
PEEK = 2**20  # bytes of an annotation file that show its format


def data_files(folder: Path, split: str | None = None) -> list[Path]:
    """The files (or folders of images with captions) in a folder that hold its pairs, by the kind of folder it is.

    Args:
        folder: any layout that `Pairs` names.
        split: of the dataset, where the folder holds several in files of their own.

    Raises:
        ValueError: it holds no pairs, annotations that have to be named, images without labels, or several splits of
            which none was chosen; the message says what to give.
    """
    files = files_of(folder)

    def ending(*ends: str) -> list[Path]:
        return [file for file in files if file.name.lower().endswith(ends)]

    metadata = next((candidates for name in METADATA if (candidates := ending(name))), [])
    parquet = [file for file in ending(".parquet") if not _is_index(file)]
    if parquet and not metadata:
        return parquet  # their splits are told apart where they are opened
    candidates = metadata or ending(".tar") or ending(*LINES)
    if candidates:
        return of_split(folder, candidates, split)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    captioned = sorted({file.parent for file in images if file.with_suffix(".txt").is_file()})
    return captioned or _class_images(folder, images, files, split)


def _is_index(path: Path) -> bool:
    """Whether a parquet file only lists the images that img2dataset wrote beside it, to a tar or a folder."""
    wrote_folder = path.with_suffix("").is_dir() and path.with_name(f"{path.stem}_stats.json").is_file()
    return wrote_folder or path.with_suffix(".tar").is_file()


def of_split(folder: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """The files that belong to a split, judged by the names of files and folders.

    Raises:
        ValueError: the files belong to several splits and none was chosen, or no file belongs to that split.
    """
    named = {file: _words(file.relative_to(folder)) for file in files}
    known = {file: next((word for word in words if SPLIT.fullmatch(word)), None) for file, words in named.items()}
    several = {_same(word) for word in known.values() if word is not None}
    stems = sorted({_stem(file) if file.name not in METADATA else file.parent.name for file in files})
    if split is None and len(several) > 1:
        example = next((stem for stem in stems if "train" in stem), stems[0])
        raise ValueError(
            f"{folder} holds {_listed(stems)}: all of them together would mix training and test data. Say which is "
            f"meant: split={example}.{_columns_to_choose(files[0])}"
        )
    if split is None or not several:
        return list(files)
    chosen = [file for file in files if split == _stem(file)] or [file for file in files if split in named[file]]
    if not chosen:
        raise ValueError(f"{folder} holds {_listed(stems)}, but nothing of split={split}.")
    return chosen


def _columns_to_choose(path: Path) -> str:
    """The settings that the files of a folder still need, so that one message names all of them."""
    if not path.name.lower().endswith(".jsonl"):
        return ""
    with path.open("rb") as file:
        try:
            row = json.loads(next(file, b"{}"))
        except (ValueError, RecursionError):
            return ""
    columns = text_or_label(row) if isinstance(row, dict) else None
    return "" if columns is None else f" {which_column(*columns)}"


def text_or_label(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a row that has both a text and a label, either of which a demonstration may show."""
    text, label = (
        next((name for name in COLUMNS[part] if row.get(name) is not None), None) for part in ("text", "label")
    )
    return None if text is None or label is None else (text, label)


def which_column(text: str, label: str) -> str:
    """The question for such rows."""
    return (
        f"Its rows have a text ({text!r}) and a label ({label!r}): say what a demonstration shows, text={text} or "
        f"label={label}, or both: question={text},answer={label}."
    )


def _class_images(folder: Path, images: Sequence[Path], files: Sequence[Path], split: str | None) -> list[Path]:
    """Images in folders that are named by their labels."""
    beside = [
        file for file in files
        if file.suffix.lower() in ANNOTATIONS and not file.name.endswith("_stats.json")  # img2dataset's
        and file.parent.relative_to(folder).as_posix().lower() in (".", "annotations")
    ]  # fmt: skip
    if beside:
        raise ValueError(
            f"{folder} holds annotations, and the names of its folders are not labels. Give the file that has the "
            f"texts: {_listed([suggested(file) for file in beside])}."
        )
    inner = [image for image in images if image.parent != folder]
    parts = {image: image.relative_to(folder).parts for image in inner}
    if inner and all(len(some) > 2 and SPLIT.fullmatch(some[0]) for some in parts.values()):
        splits = sorted({some[0] for some in parts.values()})
        if split is None and len(splits) > 1:
            raise ValueError(
                f"{folder} holds the splits {_listed(splits)}, each with class folders. Say which: split={splits[0]}."
            )
        inner = [image for image in inner if parts[image][0] == (split or splits[0])]
    described = {file.with_suffix("") for file in files if file.suffix.lower() == ".json"}  # one by one: no labels
    labels = Counter(image.parent.name for image in inner if image.with_suffix("") not in described)
    if not images:
        raise ValueError(
            f"{folder} holds no pairs: expected metadata.jsonl or metadata.csv beside images, .parquet, .tar or "
            ".jsonl files, what datasets' save_to_disk wrote, images with a .txt each (img2dataset), or a folder of "
            "images for each label."
        )
    if len(labels) < 2 or all(map(SPLIT.fullmatch, labels)):
        where = f"in {_listed(sorted(labels))}" if labels else "beside one another"
        raise ValueError(
            f"{folder} holds {len(images)} images {where}, with no text and no label: labels take two class folders "
            "at least (FOLDER/cat/1.jpg, FOLDER/dog/1.jpg). Give the file of their texts with "
            f"images={folder}, such as pairs:captions.json or llava:chat.json."
        )
    label_counts = ", ".join(f"{label} ({count})" for label, count in labels.most_common(5))
    more = f", ... ({len(labels)} labels)" if len(labels) > 5 else ""
    logger.warning(f"{folder}: {len(inner)} images with the names of their folders as labels: {label_counts}{more}.")
    return inner


def suggested(path: Path) -> str:
    """The source that reads an annotation file, by its first bytes."""
    with path.open("rb") as file:
        kind = "llava" if b'"conversations"' in file.read(PEEK) else "pairs"
    return f"{kind}:{path}"


def llava_file(path: Path) -> Path:
    """The JSON file of LLaVA's conversations.

    Raises:
        ValueError: it is a folder; the message names the files in it.
    """
    if path.is_dir():
        inside = [file for file in sorted(path.glob("*.json")) if suggested(file).startswith("llava:")]
        named = f" Give one of {_listed([f'llava:{file}' for file in inside])}." if inside else " It holds none."
        raise ValueError(
            f"{path} is a folder; llava takes LLaVA's JSON file, with images= the folder of its images.{named}"
        )
    return path


def captioned_images(folder: Path) -> Iterator[dict[str, Any]]:
    """Images of a folder with the text in the `.txt` of the same name, as img2dataset writes them.

    Image paths are relative to the parent of the folder.
    """
    for image in sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        beside = image.with_suffix(".txt")
        text = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else None
        yield {"image": f"{folder.name}/{image.name}", "text": text}


def fetched_images(folder: Path) -> dict[str, str]:
    """Where img2dataset put the image of each URL, relative to its output folder; empty for another folder.

    It writes `00000/000000000.jpg`, and `00000.parquet` with the URL, the key and the status of each.
    """
    by_url: dict[str, str] = {}
    for table in sorted(folder.glob("*.parquet")):
        if _is_index(table) and table.with_suffix("").is_dir():
            from pyarrow import parquet

            columns = parquet.read_table(table, columns=["url", "key", "status"]).to_pydict()
            names = (entry.suffix for entry in table.with_suffix("").iterdir())
            suffix = next((ending for ending in names if ending in IMAGE_SUFFIXES), ".jpg")
            rows = zip(columns["url"], columns["key"], columns["status"], strict=True)
            by_url.update({url: f"{table.stem}/{key}{suffix}" for url, key, status in rows if status == "success"})
    return by_url


def _stem(path: Path) -> str:
    name = path.name.lower()
    ending = next((end for end in (*LINES, ".tar") if name.endswith(end)), path.suffix)
    return path.name[: len(path.name) - len(ending)]


def _words(path: Path) -> list[str]:
    """The words in a name and, after them, the folders it lies in."""
    folders = path.parts[:-1]
    return [*(word for word in re.split(r"[-_.\s]", _stem(path)) if word), *reversed(folders)]


def _same(split: str) -> str:
    """Names of one split as one word."""
    name = split.lower()
    return "train" if name.startswith(("train", "rest")) else "test" if name.startswith("test") else "validation"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f", ... ({len(names)})" if len(names) > 6 else "")
