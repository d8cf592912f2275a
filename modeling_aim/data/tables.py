"""Published datasets by rows: one split of a file, a folder or a Hub repository, with its images unopened."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import DatasetImage
from .jsonl import numbered_json, read_json
from .rows import LINES, csv_rows, existing, is_hub_id, is_saved, json_rows

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]
INSTALL = "pip install modeling-aim[eval]"
FILES = (".jsonl", ".json", ".csv")
SAME_SPLITS = (("train", "train2014", "training"), ("validation", "val", "val2014", "dev"))


class MissingSplit(ValueError):
    """A dataset has no split of that name."""


def fetched(path: str, patterns: Sequence[str]) -> Path:
    """A folder of files: a local one, or those of a dataset on the Hub.

    Args:
        path: folder, or Hub id.
        patterns: of the files to fetch from the Hub.

    Raises:
        FileNotFoundError: there is neither.
    """
    place = Path(path).expanduser()
    if place.is_dir() or not is_hub_id(path):
        if not place.is_dir():
            raise FileNotFoundError(f"There is no folder {path}. Give the folder of the dataset, or its Hub id.")
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, repo_type="dataset", allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{path} is not a folder here, and from the Hub: {error}") from error


@dataclass(frozen=True)
class Table:
    """One split of a dataset.

    Args:
        where: it comes from, for messages.
        folder: what paths of images are relative to.
        columns: names of all columns.
        rows: images in them unopened.
    """

    where: str
    folder: Path
    columns: tuple[str, ...]
    rows: Sequence[Row]

    def need(self, *columns: str) -> None:
        """Say which columns are missing.

        Raises:
            ValueError: one is not there; the message has those found and those needed.
        """
        missing = [column for column in columns if column not in self.columns]
        if missing:
            raise ValueError(
                f"{self.where} has the columns {sorted(self.columns)}, but not {missing}; needed are {list(columns)}."
            )

    def first_of(self, *columns: str) -> str:
        """The first of these columns that is there.

        Raises:
            ValueError: none is.
        """
        present = next((column for column in columns if column in self.columns), None)
        if present is None:
            raise ValueError(f"{self.where} has the columns {sorted(self.columns)}; needed is one of {list(columns)}.")
        return present


def open_table(path: str, split: str, config: str | None = None, images: str | None = None) -> Table:
    """A split of a dataset.

    Args:
        path: a jsonl, json (a list of objects), csv or parquet file, which is the split whatever its name; a folder
            with such a file that is called like the split, or with parquet files as on the Hub; a folder that
            `save_to_disk` wrote; or a Hub id.
        split: of the dataset.
        config: its configuration.
        images: folder that paths of images are relative to, instead of that of the files.

    Raises:
        FileNotFoundError: there is no such file, folder or dataset.
        MissingSplit: there is no such split.
        ValueError: a file is damaged or has another format.
        ImportError: `datasets` is missing.
    """
    place = Path(path).expanduser()
    folder = None if images is None else existing(images)
    if not place.exists() and not is_hub_id(path):
        raise FileNotFoundError(f"{path} was not found. Give a file, a folder or the id of a dataset on the Hub.")
    named = [place / f"{split}{end}" for end in FILES] if place.is_dir() else []
    file = next((file for file in named if file.is_file()), place)
    if file.is_file() and file.suffix.lower() != ".parquet":
        rows = file_rows(file)
        columns = tuple(dict.fromkeys(name for row in rows for name in row))
        return Table(os.fspath(file), folder or file.parent, columns, rows)
    data = _data_set(place if place.exists() else path, split, config)
    return _of_data_set(data, f"{path} ({split})", folder or (place if place.is_dir() else place.parent))


def file_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl, json or csv file, all of which must be whole.

    Raises:
        ValueError: a line is not a JSON object, or the file has another format.
    """
    name, broken = path.name.lower(), Counter[str]()
    if name.endswith(".jsonl"):
        rows = []
        for number, row in numbered_json(path):
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found {row!r:.60}.")
            rows.append(row)
    elif name.endswith(LINES):
        rows = list(json_rows(path, broken))
    elif name.endswith(".csv"):
        rows = list(csv_rows(path, broken))
    elif name.endswith(".json"):
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is not a JSON list of objects.")
    else:
        raise ValueError(f"{path} is not a file of rows: expected .jsonl, .json, .csv or .parquet.")
    if broken:
        raise ValueError(f"{path} cannot be read whole: {counted(broken)}. Fetch it again.")
    return rows


def _data_set(place: Path | str, split: str, config: str | None) -> Any:
    """A split, kept in files that `datasets` maps into memory, images not decoded."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{place} needs the datasets library: {INSTALL}") from error
    if isinstance(place, Path) and is_saved(place):
        data = datasets.load_from_disk(str(place))
        if isinstance(data, datasets.DatasetDict):
            data = data[_known_split(place, split, list(data))]
    elif isinstance(place, Path) and place.is_file():
        data = datasets.load_dataset("parquet", data_files=str(place), split="train")
    else:
        try:
            named = _known_split(place, split, datasets.get_dataset_split_names(str(place), config))
            data = datasets.load_dataset(str(place), config, split=named)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(f"{place} is not a dataset here, and on the Hub: {error}") from error
    for name, kind in data.features.items():
        if isinstance(kind, datasets.Image):
            data = data.cast_column(name, datasets.Image(decode=False))
    return data


def split_names(path: str, config: str | None = None) -> list[str]:
    """The splits of a dataset as `open_table` takes it; empty where it is one that has no name (a file).

    Raises:
        FileNotFoundError: there is no such dataset.
        ImportError: `datasets` is missing.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return []
    try:
        import datasets

        if is_saved(place):
            data = datasets.load_from_disk(str(place))
            return list(data) if isinstance(data, datasets.DatasetDict) else []
        return list(datasets.get_dataset_split_names(str(place) if place.exists() else path, config))
    except ImportError as error:
        raise ImportError(f"{path} needs the datasets library: {INSTALL}") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{path} is not a dataset here, and on the Hub: {error}") from error


def _known_split(place: Path | str, split: str, splits: Sequence[str]) -> str:
    """A split by the name that it has, which `datasets` may have made "validation" of "val2014".

    Raises:
        MissingSplit: there is no such split.
    """
    same = next((names for names in SAME_SPLITS if split in names), (split,))
    others = [name for name in splits if name in same]
    if split not in splits and len(others) != 1:
        raise MissingSplit(f"{place} has the splits {sorted(splits)}, but not {split!r}.")
    return split if split in splits else others[0]


def _of_data_set(data: datasets.Dataset, where: str, folder: Path) -> Table:
    import datasets

    pictures = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    labels = {name: kind for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)}
    words = [name for name in data.features if name not in pictures]
    read = data.select_columns(words) if words else ({} for _ in range(len(data)))
    rows = []
    for number, row in enumerate(read):
        numbers = {name: row[name] for name, kind in labels.items() if row[name] in range(kind.num_classes)}
        named = {name: labels[name].int2str(number) for name, number in numbers.items()}
        rows.append({**row, **named, **{name: DatasetImage(data, number, name, folder) for name in pictures}})
    return Table(where, folder, tuple(data.features), rows)


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(counts.items()))
