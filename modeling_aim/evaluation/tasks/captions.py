"""Captions: Flickr30k, and any file of images with captions. Scored by CIDEr."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ...data.jsonl import read_json
from ...data.rows import existing
from ...data.tables import MissingSplit, Row, Table, file_rows, open_table, split_names
from ..metrics import Captions, openflamingo_caption
from ..task import Example, Prediction
from .splits import SplitTask, texts

PROMPT = "Output:"  # OpenFlamingo's
SPLITS = {"val": "validation", "dev": "validation", "restval": "train"}  # other names of splits
KARPATHY = ("nlphuji/flickr30k", "flickr_annotations_30k.csv")  # published with the split of each image


class CaptionsFile(SplitTask):
    """Images with captions in one file, demonstrations from another one or from a share of the same.

    Args:
        path: jsonl (or json, csv, parquet): rows with `image` and `captions` (or `caption`, one or several).
        support: rows of the same form to draw demonstrations from. When `None` they are a share of `path`.
        share: of the images of `path` that become demonstrations; half of them when `None`.
        image, caption: names of columns.
        tokenizer: of CIDEr, `"ptb"` or `"plain"`; the best there is when `None`.
        name: to show; that of the file when `None`.
        **settings: as for `SplitTask`.
    """

    max_new_tokens = 20
    metric = "cider"
    printed_times = 100
    shared: ClassVar[bool] = True  # demonstrations are a share of the file unless it is said where they are

    def __init__(
        self,
        path: str,
        *,
        support: str | None = None,
        share: float | None = None,
        image: str | None = None,
        caption: str | None = None,
        tokenizer: str | None = None,
        split: str = "test",
        name: str | None = None,
        **settings: Any,
    ) -> None:
        share = 0.5 if share is None and support is None and self.shared else share
        name = name or existing(path).name.split(".")[0]
        super().__init__(path, name=name, split=split, support=support, share=share, **settings)
        self.given, self.scorer = {"image": image, "caption": caption}, Captions(tokenizer)

    def check(self, table: Table) -> None:
        self._columns(table)

    def _columns(self, table: Table) -> tuple[str, str]:
        image, caption = self.given["image"], self.given["caption"]
        return (
            table.first_of(*([image] if image else ["image", "img", "file_name"])),
            table.first_of(*([caption] if caption else ["captions", "caption", "sentences", "text"])),
        )

    def name_of(self, row: Row) -> Any:
        return row.get("img_id", row.get("image_id", row.get("id", row.get("filename"))))

    def example(self, table: Table, row: Row, name: str, what: str) -> Example | None:
        image, caption = self._columns(table)
        captions = texts(row.get(caption))
        if not captions:
            self.left_out[f"{what} without a caption"] += 1
            return None
        images = self.found(table.folder, row.get(image), what)
        return None if images is None else Example(name, images, PROMPT, captions)

    def shown(self, example: Example) -> Mapping[str, Any]:
        return {"images": list(example.images), "question": PROMPT, "answer": example.answers[0]}

    def score(self, example: Example, prediction: Prediction) -> dict[str, float]:
        """Nothing: CIDEr weighs words by their frequency in all references."""
        return {}

    def terms(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[float]:
        """CIDEr of the answers up to a new line, or to the prompt of another image."""
        lines = [prediction.text.strip().split("\n")[0].split(PROMPT)[0] for prediction in predictions]
        return self.scorer.scores(lines, [example.answers for example in examples])

    def summary(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        """CIDEr, and that of captions cut as OpenFlamingo cuts them. Literature shows it times 100."""
        scores = self.terms(examples, predictions)
        if not scores:
            return {}
        captions = [openflamingo_caption(prediction.text) for prediction in predictions]
        published = self.scorer.scores(captions, [example.answers for example in examples])
        return {"cider": sum(scores) / len(scores), "cider_openflamingo": sum(published) / len(published)}

    def notes(self) -> list[str]:
        cut = "cider_openflamingo (in results.json): captions cut at the word Output alone, not at a new line."
        return [*super().notes(), self.scorer.note(), cut]


class Flickr30k(CaptionsFile):
    """Flickr30k with Karpathy's split: 1 000 images are asked, each with five references.

    The published dataset of `lmms-lab` has all 31 783 images in one split. Which belongs where is in a column
    `split`, or else in a file of its own.

    Args:
        path: the dataset: parquet files, a folder that `save_to_disk` wrote, a Hub id; or Karpathy's JSON or csv with
            `images=` the folder of the images. Columns `image` (or `filename`), `caption`, and `split` if there is.
        karpathy: the file that has the split of each image by `filename`, Karpathy's `dataset_flickr30k.json` or
            `flickr_annotations_30k.csv`; from the Hub when it is needed and `None`.
        **settings: as for `CaptionsFile`. `split` is `"test"`, `"validation"` or `"train"`.
    """

    shared = False
    has_splits = True  # of a single file too

    def __init__(
        self,
        path: str = "lmms-lab-encoder/flickr30k",
        *,
        karpathy: str | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        self.karpathy = karpathy if karpathy is None else str(existing(karpathy))
        super().__init__(path, name=name or "Flickr30k", **settings)

    def table(self, path: str, split: str, config: str | None, images: str | None) -> Table:
        if path != self.path or self._whole is None:
            return super().table(path, split, config, images)
        whole, split_of = self._whole
        rows = [row for row, belongs in zip(whole.rows, split_of, strict=True) if belongs == SPLITS.get(split, split)]
        if not rows:
            raise MissingSplit(
                f"{whole.where} has images of the splits {sorted(set(split_of))}, but not of {split!r}."
            )
        return Table(whole.where, whole.folder, whole.columns, rows)

    @cached_property
    def _whole(self) -> tuple[Table, list[str]] | None:
        """All images with the split of each; `None` where the dataset is in several splits already."""
        place = Path(self.path).expanduser()
        if place.is_file() and place.suffix.lower() in (".json", ".csv"):
            table = _karpathy_table(place, self.images)
        else:
            splits = split_names(self.path, self.config)
            if len(splits) > 1:
                return None
            table = open_table(self.path, splits[0] if splits else "", self.config, self.images)
        if "split" in table.columns:
            split_of_row = [str(row["split"]) for row in table.rows]
        else:
            table.need("filename")
            known = {row["filename"]: row["split"] for row in _karpathy_table(self._karpathy_file(), None).rows}
            missing = [row["filename"] for row in table.rows if row["filename"] not in known]
            if missing:
                raise ValueError(f"{table.where}: {len(missing)} images have no split, for example {missing[:3]}.")
            split_of_row = [str(known[row["filename"]]) for row in table.rows]
        return table, [SPLITS.get(split, split) for split in split_of_row]

    def _karpathy_file(self) -> Path:
        if self.karpathy is not None:
            return Path(self.karpathy)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(*KARPATHY, repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"{self.path} does not say which split an image is of, and {KARPATHY[1]} of {KARPATHY[0]} cannot be "
                f"fetched ({error}). Give Karpathy's dataset_flickr30k.json or that file: karpathy=..."
            ) from error


def _karpathy_table(path: Path, images: str | None) -> Table:
    """Rows of Karpathy's `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}`, or of a csv of the same."""
    folder = path.parent if images is None else existing(images)
    if path.suffix.lower() == ".csv":
        rows = file_rows(path)
        Table(str(path), folder, tuple(dict.fromkeys(name for row in rows for name in row)), rows).need(
            "filename", "split", "raw"
        )
        captions = [json.loads(row["raw"]) for row in rows]
    else:
        read = read_json(path)
        rows = list(read.get("images") or []) if isinstance(read, dict) else []
        needed = {"filename", "split", "sentences"}
        if not (isinstance(rows, list) and rows) or not all(
            isinstance(row, dict) and needed <= set(row) for row in rows
        ):
            raise ValueError(f"{path} is not a file of Karpathy's: expected images, each with {sorted(needed)}.")
        captions = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
    table_rows = [
        {"file_name": row["filename"], "filename": row["filename"], "split": row["split"], "captions": some}
        for row, some in zip(rows, captions, strict=True)
    ]
    return Table(str(path), folder, ("file_name", "filename", "split", "captions"), table_rows)
