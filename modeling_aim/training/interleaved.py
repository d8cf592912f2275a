"""Web documents with images and text interleaved, as sources of episodes: MMC4 and OBELICS."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..data.pairs import Pair, located
from ..data.rows import LINES, NO_IMAGE, columns_of, dataset_rows, existing, find_files, json_rows, open_dataset
from .shuffled import ShuffledSource


class Mmc4(ShuffledSource):
    """Multimodal C4 (arXiv 2304.06939): web pages with images matched to sentences. Images are apart, URLs rot.

    Images matched to the same sentence make one pair; pairs are in the order of the sentences.

    Args:
        path: jsonl shards (`.jsonl`, `.jsonl.gz`, `.jsonl.zip`): a file, a folder or a pattern.
        images: folder of the images by `image_name`. When `None` it is `<shard>_images` beside the shard, where the
            download script of MMC4 puts them, or, if there is none, the folder of the shard.
        min_similarity: images whose CLIP ViT-L/14 similarity to their sentence is lower are left out. 0.24 is what
            OpenFlamingo trains with (`--mmc4_textsim_threshold 0.24` in the README of mlfoundations/open_flamingo).
        shuffle_buffer: documents held in memory to be shuffled.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """

    interleaved = True

    def __init__(
        self, path: str, *, images: str | None = None, min_similarity: float = 0.24, shuffle_buffer: int = 1000
    ) -> None:
        super().__init__(f"mmc4 {Path(path).name}", shuffle_buffer)
        self.shards, self.min_similarity = find_files(path, LINES), min_similarity
        self.images = None if images is None else existing(images)

    def _read(self, rng: random.Random) -> Iterator[Sequence[Pair]]:
        for shard in rng.sample(self.shards, len(self.shards)):
            beside = shard.parent / f"{shard.name.partition('.')[0]}_images"
            folder = self.images or (beside if beside.is_dir() else shard.parent)
            for row in json_rows(shard, self.skipped):
                texts, found = row.get("text_list"), row.get("image_info")
                if isinstance(texts, list) and isinstance(found, list):
                    yield self._pairs(texts, found, folder)
                else:
                    self.skipped["line without text_list and image_info"] += 1

    def _pairs(self, texts: Sequence[Any], found: Sequence[Any], folder: Path) -> list[Pair]:
        images: dict[int, list[str]] = {}
        for info in found:
            try:
                image, place = os.path.join(folder, info["image_name"]), range(len(texts))[info["matched_text_index"]]
                similar = float(info["matched_sim"]) >= self.min_similarity
            except (TypeError, KeyError, IndexError, ValueError):
                self.skipped["image that is matched to no sentence"] += 1
                continue
            if not similar:
                self.skipped["image below the similarity floor"] += 1
            elif not os.path.isfile(image):  # here, so that the other images of its sentence stay
                self.skipped[NO_IMAGE] += 1
            else:
                images.setdefault(place, []).append(image)
        return [{"images": images[place], "text": texts[place]} for place in sorted(images)]


class Obelics(ShuffledSource):
    """OBELICS (arXiv 2306.16527): web pages as two lists, `images` and `texts`, with gaps where the other goes on.

    Images in a row and the text after them make a pair; a text with no image before it is in none. The published
    rows hold URLs, local ones may hold paths or bytes.

    Args:
        path: parquet shards (a file, a folder, a pattern), a folder that `datasets` saved, or a Hub id
            (`HuggingFaceM4/OBELICS`).
        images: folder of the images, named as the last part of the URL or by the URL's sha256 (with the URL's suffix,
            with `.jpg`, or bare). Paths are relative to it, or else to the folder of the data.
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
        last, digest = Path(urlsplit(image).path).name, hashlib.sha256(image.encode()).hexdigest()
        for name in (last, digest + Path(last).suffix, digest + ".jpg", digest) if self.images else ():
            if name and os.path.isfile(os.path.join(folder, name)):
                return os.path.join(folder, name)
        return image if self.download else None
