"""Datasets as sources of episodes, in the formats they are published in.

    source, weight = open_source("mmc4:/data/mmc4/docs_shard_*_v2.jsonl.zip,min_similarity=0.28,weight=2")

Files are read as streams and shuffled in a bounded buffer, so a dataset may be larger than memory. What cannot be
used is left out and counted by reason in `Source.skipped`: some of any data from the web is missing or broken.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.captions import caption_rows, images_folder, is_results, result_rows
from ..data.layouts import captioned_images, data_files, text_or_label, which_column
from ..data.pairs import IMAGE_SUFFIXES, Pair, located
from ..data.rows import (
    LINES,
    NO_IMAGE,
    NO_TEXT,
    choose_columns,
    columns_of,
    csv_rows,
    dataset_rows,
    existing,
    find_files,
    fitting_columns,
    is_hub_id,
    is_saved,
    json_rows,
    open_dataset,
    pair_of,
    tar_rows,
    words_in,
)
from ..data.specs import spec_named, split_spec
from .episodes import Episode, ShotLaw, Source
from .interleaved import Mmc4, Obelics
from .link_context import LclRows, LinkContext
from .llava import LlavaConversations
from .shuffled import ShuffledSource, shuffled

# --- independent pairs


class Pairs(ShuffledSource):
    """Pairs of an image and a text, a label, or a question and its answer.

    Args:
        path: one of
            - jsonl files (also `.gz`, `.zip`), as of `aim bank build`; images are relative to the file;
            - a folder of images with `metadata.jsonl` or `metadata.csv` (`file_name` and a text);
            - a folder with a folder of images for each label, two at least, and no annotations beside them;
            - COCO's captions (`captions_train2014.json`), Karpathy's JSON, Flickr30k's `results.csv`, or a JSON list
              of objects: a pair for each caption;
            - webdataset shards (`.tar`): members of the same name are a pair, such as `7.jpg` and `7.txt` or `7.json`;
            - what img2dataset wrote: files, tar or parquet;
            - parquet files, a folder that `datasets` saved, or a Hub id.
          Files may be given as a folder or as a pattern.
        images: folder that paths of images are relative to. That of the file when `None`; of captions in JSON or
            `results.csv` also a folder beside it that has them.
        image, text, label, question, answer: which columns (keys, members) are which part; usual names are found
            by themselves. Of several answers or captions the most frequent is taken, or else the first.
        split: of a dataset, `"train"` by default. A folder with files of several splits asks for it.
        config: its configuration, where it has several.
        shuffle_buffer: pairs held in memory to be shuffled.

    Raises:
        ValueError: there is no column for an image, or for a text, or rows have both a text and a label and neither
            was chosen; or the folder holds images without a text, or several splits of which none was chosen.
        FileNotFoundError: there is no such file or folder.
    """

    def __init__(
        self,
        path: str,
        *,
        images: str | None = None,
        image: str | None = None,
        text: str | None = None,
        label: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        split: str | None = None,
        config: str | None = None,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(f"pairs {Path(path).name}", shuffle_buffer)
        self.given = {"image": image, "text": text, "label": label, "question": question, "answer": answer}
        self.images = None if images is None else existing(images)
        self.chosen_split = split
        self.shards: list[Path] = []
        self.data: Any = None
        place = Path(path).expanduser()
        if place.is_dir() and not is_saved(place):
            self.shards = data_files(place, split)
        elif not place.is_dir():
            self.shards = find_files(path, (), missing_ok=is_hub_id(path))
            known = (*LINES, ".json", ".csv", ".tar", ".parquet", *IMAGE_SUFFIXES)
            if any(not shard.name.lower().endswith(known) for shard in self.shards):
                raise ValueError(
                    f"{path} is not a file of pairs: expected one that ends in {LINES}, .json, .csv, .tar or .parquet."
                )
        if not self.shards or self.shards[0].suffix == ".parquet":
            self.data, self.folder = open_dataset(path, split or "train", config)
            self.columns = fitting_columns(columns_of(self.data), self.given, path)
        else:
            self._check_columns(path)

    def _check_columns(self, path: str) -> None:
        """Say at once, not in the middle of a training, that no row looks like a pair."""
        rows = [_given(row) for row in islice(self._rows(self.shards[0]), 20)]
        self.skipped.clear()
        chosen = [choose_columns(row, self.given) for row in rows]
        if rows and not any("image" in columns and words_in(columns) for columns in chosen):
            fitting_columns(list(rows[0]), self.given, path)
        both = next((pair for row in rows if (pair := text_or_label(row))), None)
        if (
            both
            and self.shards[0].suffix != ".tar"
            and "question" not in chosen[0]
            and not any(name for part, name in self.given.items() if part != "image")
        ):
            raise ValueError(f"{path}: {which_column(*both)}")

    def _read(self, rng: random.Random) -> Iterator[Sequence[Pair]]:
        if self.data is not None:
            names = {name: getattr(kind, "int2str", None) for name, kind in columns_of(self.data).items()}
            for whole in dataset_rows(self.data, rng):
                yield [pair_of(whole, self.columns, self.images or self.folder, names)]
            return
        for shard in rng.sample(self.shards, len(self.shards)):  # single images of class folders are shards too
            rows: Iterable[dict[str, Any]] = self._rows(shard)
            folder = self.images or shard.parent
            if shard.suffix.lower() == ".json" or is_results(shard):  # captions of one image lie side by side
                rows = list(rows)
                some = [row.get(choose_columns(_given(row), self.given).get("image", "")) for row in rows[:50]]
                folder = self.images or images_folder(shard, [image for image in some if isinstance(image, str)])
                rng.shuffle(rows)
            for row in rows:
                columns = choose_columns(_given(row), self.given)
                if "image" not in columns:
                    self.skipped[NO_IMAGE] += 1
                elif not words_in(columns):
                    self.skipped[NO_TEXT] += 1
                else:
                    yield [pair_of(row, columns, folder)]

    def _rows(self, shard: Path) -> Iterator[dict[str, Any]]:
        # `read_demonstrations` of the other commands reads a file whole and stops at a broken line; and `datasets`
        # gives up on a jsonl file or a tar of which one line or member is broken, or has other keys than the first.
        if shard.suffix == ".tar":
            return tar_rows(shard, self.skipped)
        if shard.is_dir():
            return captioned_images(shard)
        if shard.suffix.lower() == ".json":
            return iter(caption_rows(shard, self.chosen_split))
        if shard.suffix == ".csv":
            return result_rows(shard) if is_results(shard) else csv_rows(shard, self.skipped)
        if shard.suffix.lower() in IMAGE_SUFFIXES:
            return iter([{"image": shard.name, "label": shard.parent.name}])
        return json_rows(shard, self.skipped)


def _given(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


# --- ready-made episodes


class EpisodeFile(ShuffledSource):
    """Episodes that are made already: jsonl, a line `{"demos": [...], "queries": [...]}` of demonstrations as dicts.

    Each query is a target of its own, answered from the demonstrations of its line and never from another query. The
    shot law draws nothing here; but of more than `law.most` demonstrations only the last are kept, since that many
    are what memory was meant for, and the most similar come last. A line with a demonstration that cannot be read is
    left out whole: what its queries ask for may have been shown there.

    Args:
        path: jsonl files (also `.gz`, `.zip`): a file, a folder or a pattern; images are relative to the file.
        images: folder that paths of images are relative to, instead.
        shuffle_buffer: lines held in memory to be shuffled.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """

    def __init__(self, path: str, *, images: str | None = None, shuffle_buffer: int = 1000) -> None:
        super().__init__(f"episodes {Path(path).name}", shuffle_buffer)
        self.shards, self.images = find_files(path, LINES), None if images is None else existing(images)

    def documents(self, seed: int) -> Iterator[Sequence[Pair]]:
        return ([*demos, *queries] for demos, queries in self._lines(seed))

    def episodes(self, law: ShotLaw, seed: int) -> Iterator[Episode]:
        for demos, queries in self._lines(seed):
            if not self.gives([*demos, *queries]):
                continue
            if len(demos) > law.most:
                self.skipped["demonstration beyond the largest number of shots"] += len(demos) - law.most
                demos = demos[-law.most :]
            for query in queries:
                yield self._episode([*demos, query], targets=(len(demos),), whole=True)

    def _lines(self, seed: int) -> Iterator[tuple[list[Pair], list[Pair]]]:
        rng = random.Random(f"order {seed}")
        return shuffled(self._made(rng), self.shuffle_buffer, rng)

    def _made(self, rng: random.Random) -> Iterator[tuple[list[Pair], list[Pair]]]:
        for shard in rng.sample(self.shards, len(self.shards)):
            for row in json_rows(shard, self.skipped):
                demos, queries = (self._located(row.get(part), shard.parent) for part in ("demos", "queries"))
                if demos and queries:
                    yield demos, queries
                else:
                    self.skipped["line without demos and queries"] += 1

    def _located(self, demos: Any, beside: Path) -> list[Pair]:
        """Demonstrations with their images where they lie; none if these are not demonstrations."""
        if not isinstance(demos, list) or not all(isinstance(demo, dict) for demo in demos):
            return []
        folder = self.images or beside
        return [{k: located(folder, v) if "image" in k else v for k, v in demo.items()} for demo in demos]


# --- sources by name


KINDS: dict[str, Callable[..., Source]] = {
    "mmc4": Mmc4,
    "obelics": Obelics,
    "pairs": Pairs,
    "llava": LlavaConversations,
    "episodes": EpisodeFile,
    "link-context": LinkContext,
    "lcl": LclRows,
}


def open_source(spec: str) -> tuple[Source, float]:
    """A source and its weight, from one line of text.

    Args:
        spec: `KIND:PATH[,name=value...]`. The names are the settings of the kind, and `weight` (1 by default).

    Raises:
        ValueError: the kind, a setting or a value is wrong; the message has those there are.
        FileNotFoundError: there is nothing at the path.
        ImportError: a library is missing; the message says how to install it.
    """
    kind, path, values = split_spec(spec, KINDS, {"weight": float}, omitted=("name",))
    if kind not in KINDS or not path:
        raise ValueError(
            f"{spec!r} is not a source of data. Expected KIND:PATH[,name=value...] with a kind of {sorted(KINDS)}, "
            "such as pairs:data/train.jsonl,weight=2."
        )
    weight = values.pop("weight", 1.0)
    with spec_named(spec):
        return KINDS[kind](path, **values), weight
