"""Web documents with images and text interleaved, as sources of episodes: MMC4 and OBELICS."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..data.images import Encoded
from ..data.layouts import fetched_images
from ..data.pairs import Pair, located
from ..data.rows import (
    LINES,
    NO_IMAGE,
    columns_of,
    dataset_rows,
    existing,
    file_names,
    find_files,
    json_members,
    json_rows,
    open_dataset,
)
from .shuffled import ShuffledSource


class Mmc4(ShuffledSource):
    """Multimodal C4 (arXiv 2304.06939): web pages with images matched to sentences. Images are apart, URLs rot.

    Images matched to the same sentence make one pair; pairs are in the order of the sentences.

    Args:
        path: jsonl shards (`.jsonl`, `.jsonl.gz`, `.jsonl.zip`), or OpenFlamingo's (`.tar` of a `.json` for each
            document, its images as `image_base64`): a file, a folder or a pattern.
        images: folder of the images of jsonl shards, that of the shard when `None`. In it they lie by `image_name`, or
            where MMC4's own download_images.py puts them: in `<shard>_images`, or in a folder for each shard, which
            is found by the names of its images.
        min_similarity: images whose CLIP ViT-L/14 similarity to their sentence is lower are left out. 0.24 is what
            OpenFlamingo trains with (`--mmc4_textsim_threshold 0.24` in the README of mlfoundations/open_flamingo).
        shuffle_buffer: documents held in memory to be shuffled.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file has another format, or a tar holds no documents.
    """

    interleaved = True

    def __init__(
        self, path: str, *, images: str | None = None, min_similarity: float = 0.24, shuffle_buffer: int = 1000
    ) -> None:
        super().__init__(f"mmc4 {Path(path).name}", shuffle_buffer)
        tars = Path(path).expanduser().is_dir() and not find_files(path, LINES, missing_ok=True)
        self.shards = find_files(path, (".tar",) if tars else LINES, missing_ok=bool(tars))
        if not self.shards:
            raise FileNotFoundError(f"{path} holds no file that ends in one of {(*LINES, '.tar')}. Check the folder.")
        self.min_similarity, self.images = min_similarity, None if images is None else existing(images)
        self.image_folders = ShardFolders(self.shards, self.images)
        other = [shard for shard in self.shards if not shard.name.lower().endswith((*LINES, ".tar"))]
        if other:
            raise ValueError(f"{other[0]} is not a shard of MMC4: expected one that ends in {(*LINES, '.tar')}.")
        tar = next((shard for shard in self.shards if shard.suffix.lower() == ".tar"), None)
        if tar is not None and not any(_is_document(row) for row, _, _ in islice(json_members(tar, Counter()), 20)):
            raise ValueError(
                f"{tar} holds no documents of MMC4: OpenFlamingo's shards have .json members with text_list and "
                "image_info. Of a tar of images alone, unpack them and give the documents and the folder: "
                "mmc4:docs_no_face_shard_0_v2.jsonl.zip,images=FOLDER"
            )

    def _read(self, rng: random.Random) -> Iterator[Sequence[Pair]]:
        for shard in rng.sample(self.shards, len(self.shards)):
            for row, images in self._documents(shard):
                if _is_document(row):
                    yield self._pairs(row["text_list"], row["image_info"], images)
                else:
                    self.skipped["line without text_list and image_info"] += 1

    def _documents(self, shard: Path) -> Iterator[tuple[dict[str, Any], Callable[[int, Any], Any]]]:
        """Documents of a shard, each with what gives its images, unopened, by number and `image_info`."""
        if shard.suffix.lower() == ".tar":
            for row, offset, size in json_members(shard, self.skipped):
                yield row, partial(_encoded, shard, offset, size)
            return
        folder = self.image_folders.of(shard)
        images = partial(_image_file, os.fspath(folder), file_names(folder))
        for row in json_rows(shard, self.skipped):
            yield row, images

    def _pairs(self, texts: Sequence[Any], infos: Sequence[Any], images: Callable[[int, Any], Any]) -> list[Pair]:
        matched: dict[int, list[Any]] = {}
        for number, info in enumerate(infos):
            try:
                image, place = images(number, info), range(len(texts))[info["matched_text_index"]]
                similar = float(info["matched_sim"]) >= self.min_similarity
            except (TypeError, AttributeError, KeyError, IndexError, ValueError):
                self.skipped["image that is matched to no sentence"] += 1
                continue
            if not similar:
                self.skipped["image below the similarity floor"] += 1
            elif image is None:  # here, so that the other images of its sentence stay
                self.skipped[NO_IMAGE] += 1
            else:
                matched.setdefault(place, []).append(image)
        return [{"images": matched[place], "text": texts[place]} for place in sorted(matched)]


def _is_document(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("text_list"), list) and isinstance(row.get("image_info"), list)


def _image_file(folder: str, names: Collection[str] | None, number: int, info: Any) -> str | None:
    name = info["image_name"]
    if names is None or "/" in name:
        path = os.path.join(folder, name)
        return path if os.path.isfile(path) else None
    return f"{folder}/{name}" if name in names else None


def _encoded(shard: Path, offset: int, size: int, number: int, info: Any) -> Encoded | None:
    return Encoded(shard, offset, size, number) if info.get("image_base64") else None


class ShardFolders:
    """Which folder has the images of which shard of MMC4, for each layout of its download_images.py.

    `--input_jsonl` writes to `./<shard>_images/`, or straight to the folder that is given. `--input_shards` writes to
    `FOLDER/<index>/`, where the index is the shard's place in the list that was given to it, which need not be its
    number: a folder counts as that of a shard if it has images by the names in the shard.

    Args:
        shards: in order.
        root: folder of the images; that of each shard when `None`.
    """

    ASKED = 64  # names of a shard that are looked for
    ENOUGH = 0.2  # of them are there in the right folder, though many URLs are gone and some images are in two shards

    def __init__(self, shards: Sequence[Path], root: Path | None) -> None:
        self.shards, self.root, self.shift = list(shards), root, 0
        self.found: dict[Path, Path] = {}

    def of(self, shard: Path) -> Path:
        """The folder of a shard's images."""
        if shard not in self.found:
            self.found[shard] = self._search(shard)
        return self.found[shard]

    def _search(self, shard: Path) -> Path:
        root = self.root or shard.parent
        for stem in (shard.name.partition(".")[0], Path(shard.name).stem):  # the second: of --input_zipped_jsonl
            if (root / f"{stem}_images").is_dir():
                return root / f"{stem}_images"
        numbered = [int(entry.name) for entry in root.iterdir() if entry.name.isdecimal() and entry.is_dir()]
        if not numbered:
            return root
        names = self._names(shard)
        own, place = self._number(shard), self.shards.index(shard)
        likely = [number for number in (own + self.shift, own, place) if number in numbered]
        best, most = root, sum((root / name).is_file() for name in names)
        for number in dict.fromkeys([*likely, *sorted(numbered)]):
            folder = root / str(number)
            there = sum((folder / name).is_file() for name in names)
            if there > most:
                best, most = folder, there
            if most >= max(1, self.ENOUGH * len(names)):
                break
        if best != root:
            self.shift = int(best.name) - own
        return best

    def _names(self, shard: Path) -> list[str]:
        rows = islice(json_rows(shard, Counter()), self.ASKED)
        infos = (info for row in rows if _is_document(row) for info in row["image_info"] if isinstance(info, Mapping))
        names = (info["image_name"] for info in infos if isinstance(info.get("image_name"), str))
        return list(islice(names, self.ASKED))

    def _number(self, shard: Path) -> int:
        numbers = re.findall(r"shard_(\d+)", shard.name) or re.findall(r"\d+", shard.name)
        return int(numbers[0]) if numbers else self.shards.index(shard)


class Obelics(ShuffledSource):
    """OBELICS (arXiv 2306.16527): web pages as lists `images` and `texts`, with gaps where the other has an entry.

    Images in a row and the text after them make a pair; a text with no image before it is in none. The published
    rows hold URLs, local ones may hold paths or bytes.

    Args:
        path: parquet shards (a file, a folder, a pattern), a folder that `datasets` saved, or a Hub id
            (`HuggingFaceM4/OBELICS`).
        images: folder of the images, as img2dataset wrote it (`--output_format files`), or named as the last part of
            the URL or by the URL's sha256 (with the URL's suffix, with `.jpg`, or bare). Paths are relative to it, or
            else to the folder of the data.
        download: fetch images that are not there. Slow: download them once instead, where you can.
        split: of the dataset.
        config: its configuration, where it has several.
        shuffle_buffer: documents held in memory to be shuffled.

    Raises:
        ValueError: there are no columns `images` and `texts`.
        FileNotFoundError: there is no such file or folder.
    """

    interleaved = True

    def __init__(
        self,
        path: str,
        *,
        images: str | None = None,
        download: bool = False,
        split: str = "train",
        config: str | None = None,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(f"obelics {Path(path).name}", shuffle_buffer)
        self.download = download
        self.data, self.folder = open_dataset(path, split, config)
        self.images = None if images is None else existing(images)
        self.fetched = {} if self.images is None else fetched_images(self.images)
        columns = columns_of(self.data)
        if not {"images", "texts"} <= set(columns):
            raise ValueError(f"{path} has the columns {sorted(columns)}; OBELICS has 'images' and 'texts'.")

    def _read(self, rng: random.Random) -> Iterator[Sequence[Pair]]:
        for row in dataset_rows(self.data, rng):
            yield list(self._pairs(row["images"] or [], row["texts"] or []))

    def _pairs(self, images: Sequence[Any], texts: Sequence[Any]) -> Iterator[Pair]:
        if len(images) != len(texts):
            self.skipped["document with lists of different lengths"] += 1
            return
        run: list[Any] = []
        for image, text in zip(images, texts, strict=True):
            if image:
                there = self._there(image)
                if there is None:
                    self.skipped[NO_IMAGE] += 1
                else:
                    run.append(there)
            if isinstance(text, str) and text.strip() and run:
                yield {"images": run, "text": text}
                run = []
        self.skipped.update({"image without a text after it": len(run)} if run else {})

    def _there(self, image: Any) -> Any:
        """An image as it can be opened; `None` if it is not there."""
        folder = self.images or self.folder
        if not (isinstance(image, str) and image.startswith(("http://", "https://"))):
            return located(folder, image)
        if image in self.fetched:
            return os.path.join(folder, self.fetched[image])
        last, digest = Path(urlsplit(image).path).name, hashlib.sha256(image.encode()).hexdigest()
        for name in (last, digest + Path(last).suffix, digest + ".jpg", digest) if self.images else ():
            if name and os.path.isfile(os.path.join(folder, name)):
                return os.path.join(folder, name)
        return image if self.download else None
