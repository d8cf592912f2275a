"""Files of datasets: finding them, their rows, and which columns of a row make a pair of image and text."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import random
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .images import DatasetImage, Stretch
from .pairs import IMAGE_SUFFIXES, Pair, located
from .pairs import NO_IMAGE as NO_IMAGE

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

try:
    import orjson
except ImportError:  # of the extra `train`
    orjson = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zip")
METADATA = ("metadata.jsonl", "metadata.csv")
# Names that published datasets use. A webdataset's members are columns by the ends of their names.
COLUMNS = {
    "image": ("image", "images", "img", *(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES)), "image_path", "file_name"),
    "text": ("text", "caption", "txt", "captions", "sentence"),
    "label": ("label", "labels", "class", "cls"),
    "question": ("question",),
    "answer": ("answer", "answers"),
}
NO_TEXT = "no text"


def find_files(path: str, suffixes: tuple[str, ...], missing_ok: bool = False) -> list[Path]:
    """The files at `path` (a file, a folder, which is searched for names that end in `suffixes`, or a pattern).

    Raises:
        FileNotFoundError: there are none, unless `missing_ok`.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = [file for file in files_of(place) if file.name.lower().endswith(suffixes)]
        if not files and not missing_ok:
            raise FileNotFoundError(f"{path} holds no file that ends in one of {suffixes}. Check the folder.")
        return files
    files = sorted(file for file in map(Path, glob.glob(str(place), recursive=True)) if file.is_file())
    if not files and not missing_ok:
        raise FileNotFoundError(f"{path} was not found. Give a file, a folder, or a pattern such as 'data/*.jsonl'.")
    return files


def files_of(folder: Path) -> list[Path]:
    """All files under a folder by name, hidden ones left out."""
    return sorted(file for file in folder.rglob("*") if not file.name.startswith(".") and file.is_file())


def file_names(folder: Path, most: int = 2**20) -> frozenset[str] | None:
    """Names in a folder, which are faster to look up than files are; `None` where there are more than `most`."""
    with os.scandir(folder) as entries:
        names = frozenset(entry.name for entry in islice(entries, most + 1))
    return names if len(names) <= most else None


def existing(path: str) -> Path:
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{path} was not found. Check the path.")
    return place


def is_saved(place: Path) -> bool:
    return (place / "dataset_dict.json").is_file() or (place / "state.json").is_file()


def is_hub_id(path: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not path.lower().endswith(
        (*LINES, ".json", ".tar", ".csv", ".parquet")
    )


def open_dataset(path: str, split: str, config: str | None) -> tuple[Any, Path]:
    """A dataset of `datasets`, streamed, or mapped into memory with its images unopened, and the folder of its paths.

    Args:
        path: parquet files (of a folder those named for the split, where there are such), a folder that
            `save_to_disk` wrote, or a Hub id.
        split: of the dataset.
        config: its configuration.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: there is no such file or folder.
        ImportError: `datasets` is not installed.
    """
    place = Path(path).expanduser()
    saved = is_saved(place)
    shards = [] if saved else find_files(path, (".parquet",), missing_ok=is_hub_id(path))
    try:
        import datasets
    except ImportError as error:
        what = path if saved or shards else f"{path} is not a file or folder here; to stream it from the Hub one"
        raise ImportError(f"{what} needs the datasets library: pip install modeling-aim[train]") from error
    if saved:
        data = datasets.load_from_disk(str(place))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(f"{path} has the splits {sorted(data)}, but not {split!r}. Choose one with split=.")
            data = data[split]
        return SavedRows(
            data, [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
        ), place
    if not shards:
        try:
            return datasets.load_dataset(path, config, split=split, streaming=True).decode(False), Path()
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"{path} is not a file or folder here, and from the Hub: {error}") from error
    named = [shard for shard in shards if split == shard.parent.name or split in re.split(r"[-_.]", shard.name)]
    names = [str(shard) for shard in named or shards]
    data = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True)
    return data.decode(False), place if place.is_dir() else shards[0].parent


class SavedRows:
    """Rows of a dataset that is mapped into memory, as a streamed dataset gives them, but with its images unopened.

    Args:
        data: as `datasets` loads it from disk.
        images: columns of images.
    """

    def __init__(self, data: Dataset, images: list[str]) -> None:
        self.features, self.images, self.data = data.features, images, data
        for name in images:
            self.data = self.data.cast_column(name, type(data.features[name])(decode=False))
        self.num_shards = max(
            1, min(64, len(data))
        )  # so that rows in the order of their classes are mixed all the same
        words = data.select_columns([name for name in data.features if name not in images])
        self.words = words.to_iterable_dataset(num_shards=self.num_shards).decode(False)

    def shard(self, num_shards: int, index: int) -> Iterator[dict[str, Any]]:
        """Rows of one of as many parts as there are shards."""
        each, more = divmod(len(self.data), num_shards)
        start = each * index + min(index, more)
        for number, row in enumerate(self.words.shard(num_shards=num_shards, index=index), start):
            yield {**row, **{name: DatasetImage(self.data, number, name, Path()) for name in self.images}}


def dataset_rows(data: IterableDataset, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows of a streamed dataset, shard by shard in random order."""
    # Not by the dataset's own `shuffle`, which from datasets 5 on reads shards in threads and sleeps after each pass.
    for index in rng.sample(range(data.num_shards), data.num_shards):
        yield from data.shard(num_shards=data.num_shards, index=index)


def columns_of(data: IterableDataset) -> Mapping[str, Any]:
    """Columns of a streamed dataset with their kinds, or, where these are not declared, those of its first row."""
    return data.features or next(iter(data), {})


def _lines(path: Path, skipped: Counter[str]) -> Iterator[bytes]:
    """Lines of a file that may be compressed; a damaged one ends early and is counted."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in sorted(archive.namelist()):
                    with archive.open(name) as file:
                        yield from file
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                yield from file
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        _damaged(path, error, skipped)


def _damaged(path: Path, error: Exception, skipped: Counter[str]) -> None:
    logger.warning(f"{path} is damaged ({type(error).__name__}: {error}); what came before is used.")
    skipped["damaged file"] += 1


def json_rows(path: Path, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file, one a line; lines that hold none are counted."""
    for line in _lines(path, skipped):
        if not line.strip():
            continue
        row = _json(line)
        if isinstance(row, dict):
            yield row
        else:
            skipped["line that is not a JSON object"] += 1


def _json(line: bytes) -> Any:
    """A JSON value, by the faster parser where that takes it (no NaN, no lone surrogate); `None` where none is."""
    for loads in (json.loads,) if orjson is None else (orjson.loads, json.loads):
        try:
            return loads(line)
        except (ValueError, RecursionError):
            continue
    return None


def csv_rows(path: Path, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows of a csv file with a header; empty cells are `None`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                yield {name: value or None for name, value in row.items() if name is not None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        _damaged(path, error, skipped)


def tar_rows(path: Path, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    """Samples of a webdataset shard: members whose names agree up to the first dot, by what comes after it.

    The image is there as `image` too, and of a `.json` member each key. Images of a tar that is not compressed are
    not read.
    """
    row: dict[str, Any] = {}
    sample = None
    try:
        tar, seekable = _open_tar(path)
        with tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                folder, name = os.path.split(member.name)
                stem, _, end = name.partition(".")
                if sample != (folder, stem) and row:
                    yield row
                    row = {}
                sample = (folder, stem)
                file = tar.extractfile(member) if member.isreg() else None
                if file is not None and seekable and f".{end.lower()}" in IMAGE_SUFFIXES:
                    row[end.lower()] = row["image"] = Stretch(path, member.offset_data, member.size)
                elif file is not None:
                    _add_member(row, end.lower(), file.read(), skipped)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        _damaged(path, error, skipped)
        return
    if row:
        yield row


def _open_tar(path: Path) -> tuple[tarfile.TarFile, bool]:
    """A tar, and whether what is in it has a place of its own in the file: not where it is compressed."""
    try:
        return tarfile.open(path, "r:"), True
    except tarfile.ReadError:
        return tarfile.open(path, "r|*"), False


def json_members(path: Path, skipped: Counter[str]) -> Iterator[tuple[dict[str, Any], int, int]]:
    """The JSON members of a tar that is not compressed: what each holds, and where its bytes begin and how many."""
    try:
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.name.lower().endswith(".json") else None
                if file is None:
                    continue
                try:
                    fields = json.loads(file.read())
                except (ValueError, RecursionError):
                    fields = None
                if isinstance(fields, dict):
                    yield fields, member.offset_data, member.size
                else:
                    skipped["member that is not a JSON object"] += 1
    except (OSError, EOFError, tarfile.TarError) as error:
        _damaged(path, error, skipped)


def _add_member(row: dict[str, Any], end: str, content: bytes, skipped: Counter[str]) -> None:
    row[end] = content
    if f".{end}" in IMAGE_SUFFIXES:
        row["image"] = content
    elif end == "json":
        try:
            fields = dict(json.loads(content))
        except (ValueError, TypeError, RecursionError):
            skipped["member that is not a JSON object"] += 1
            return
        row.update({name: value for name, value in fields.items() if name not in row})


def words_in(columns: Collection[str]) -> set[str]:
    return {"text", "label", "answer"} & set(columns)


def choose_columns(columns: Collection[str], given: Mapping[str, str | None]) -> dict[str, str]:
    """Which column is which part of a pair: those `given`, and else those with a usual name, as far as `found`."""
    usual = {part: (given[part],) if given.get(part) else names for part, names in COLUMNS.items()}
    names = {part: next((name for name in some if name in columns), None) for part, some in usual.items()}
    requested = {part for part, name in given.items() if name and part != "image"}
    forms = [form for form in (("question", "answer"), ("text",), ("label",), ("answer",)) if requested <= set(form)]
    form = next((form for form in forms if all(names[part] for part in form)), ())
    return {part: name for part in ("image", *form) if (name := names[part])}


def fitting_columns(columns: Collection[str], given: Mapping[str, str | None], path: str) -> dict[str, str]:
    """As `choose_columns`.

    Raises:
        ValueError: there is no column for an image or for a text; the message has those found and those needed.
    """
    chosen = choose_columns(columns, given)
    if "image" not in chosen or not words_in(chosen):
        named = ", ".join(f"{part}={name}" for part, name in given.items() if name)
        requested = f" and you asked for {named}" if named else ""
        raise ValueError(
            f"{path} has the columns {sorted(columns)}{requested}. A pair needs an "
            f"image (such as {COLUMNS['image'][:3]}) and a text {COLUMNS['text']}, a label {COLUMNS['label']}, or a "
            "question and an answer. Say which columns these are: image=..., text=..."
        )
    return chosen


def pair_of(
    row: Mapping[str, Any], columns: Mapping[str, str], folder: Path, names: Mapping[str, Any] | None = None
) -> Pair:
    """The raw demonstration of a row; `names` gives the names of numbered classes."""
    words = {part: _words(row.get(name), (names or {}).get(name)) for part, name in columns.items() if part != "image"}
    return {"image": located(folder, row.get(columns["image"])), **words}


def _words(value: object, name_of: Callable[[int], str] | None = None) -> str | None:
    """What a cell says: text, the name of a class, or the most frequent of several texts (answers of VQA)."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, (list, tuple)):
        answers = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in value]
        counts = Counter(answer for answer in answers if isinstance(answer, str) and answer.strip())
        return counts.most_common(1)[0][0] if counts else None
    if isinstance(value, int):
        return str(value) if name_of is None else name_of(value) if value >= 0 else None
    return value if isinstance(value, str) else None
