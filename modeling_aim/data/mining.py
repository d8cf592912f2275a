"""Classes that look alike, for hard negatives: the neighbour mining of Link-Context Learning (arXiv 2308.07891).

Each class has a text feature (CLIP's of its bare name) and an image feature (the mean of CLIP's of its images).
Classes are ranked by a similarity of both, the ranking is cut into equal bins, and one class of each bin becomes a
neighbour.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import logging

from ..files_aim import write_whole
from ..images_aim import open_image

logger = logging.get_logger(__name__)

BINS = 36
IMAGES_PER_CLASS = 100
MEANS = ("unit", "raw")
TEXT_WEIGHT, CROSS_WEIGHT, IMAGE_WEIGHT = 0.5, 0.8, 0.5


@dataclass(frozen=True)
class ImageClass:
    """A class of a labelled image folder.

    Args:
        key: what identifies it (the name of its folder).
        name: what it is called.
        images: paths of its images.
    """

    key: str
    name: str
    images: tuple[str, ...]


@dataclass(frozen=True)
class ClassFeatures:
    """Features of the classes of one dataset, of a model in which texts and images can be compared.

    Args:
        classes: keys of the classes (names of their folders), one for each row.
        text: `(classes, d)`, of the bare class names.
        images: `(classes, d)`, the mean over images of a class.
    """

    classes: tuple[str, ...]
    text: torch.Tensor
    images: torch.Tensor

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassFeatures:
        """Read a safetensors file with tensors `text` and `images`.

        The classes are a JSON list in its metadata under `classes`, or in a `.json` file of the same name beside it.

        Raises:
            ValueError: the file is damaged, holds other tensors, or says nothing of its classes.
            FileNotFoundError: there is no such file.
        """
        return _read(Path(path))[0]

    def save(self, path: str | os.PathLike[str], key: str = "") -> None:
        """Write a file that `load` reads, whole or not at all.

        Args:
            path: of the file.
            key: identity of what the features were computed from, where they are a cache.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"text": self.text.clone().contiguous(), "images": self.images.clone().contiguous()}
        write_whole(target, save(tensors, metadata={"classes": json.dumps(list(self.classes)), "key": key}))

    def of(self, classes: Sequence[ImageClass], source: str = "The features") -> ClassFeatures:
        """The rows of `classes`, in their order.

        Raises:
            ValueError: there are features of other classes than these; the message names them.
        """
        keys = [image_class.key for image_class in classes]
        missing, unknown = sorted(set(keys) - set(self.classes)), sorted(set(self.classes) - set(keys))
        if missing or unknown:
            parts = [("without features", missing), ("with features but without a folder", unknown)]
            what = "; ".join(f"{len(some)} {how}: {_listing(some)}" for how, some in parts if some)
            raise ValueError(
                f"{source} are of other classes than the {len(keys)} of the folder. Classes {what}. Compute the "
                "features of these very class folders."
            )
        rows = {key: row for row, key in enumerate(self.classes)}
        order = [rows[key] for key in keys]
        return ClassFeatures(tuple(keys), self.text[order], self.images[order])


def similarity(text: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """How alike classes are: 0.5 T Tᵀ + 0.8 (I Tᵀ + T Iᵀ) + 0.5 I Iᵀ (arXiv 2308.07891, neighbour mining).

    Args:
        text: T, `(classes, d)`, features of the class names.
        images: I, `(classes, d)`, mean features of images. Rows of both are L2-normalised here, so that every product
            is a cosine.

    Returns:
        `(classes, classes)`, symmetric.
    """
    text, images = (torch.nn.functional.normalize(rows.float(), dim=1) for rows in (text, images))
    cross = images @ text.T
    return TEXT_WEIGHT * text @ text.T + CROSS_WEIGHT * (cross + cross.T) + IMAGE_WEIGHT * images @ images.T


def mined_neighbours(alike: torch.Tensor, seed: int = 0, bins: int = BINS) -> list[list[int]]:
    """Neighbours of each class, nearest first: one out of each of `bins` equal parts of the ranking of the others.

    Args:
        alike: `(classes, classes)`, how alike they are.
        seed: decides which class of a bin it is.
        bins: number of bins; as many as there are other classes, where these are fewer.

    Returns:
        For each class the numbers of its neighbours.
    """
    rng = random.Random(f"neighbours {seed}")
    drawn = []
    for own, row in enumerate(alike):
        ranked = [other for other in row.argsort(descending=True, stable=True).tolist() if other != own]
        count = min(bins, len(ranked))
        edges = [place * len(ranked) // count for place in range(count + 1)]
        drawn.append([rng.choice(ranked[a:b]) for a, b in pairwise(edges)])
    return drawn


# --- features by CLIP


def clip_features(
    classes: Sequence[ImageClass],
    clip: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    *,
    images_per_class: int = IMAGES_PER_CLASS,
    means: str = "unit",
    batch_size: int = 32,
    device: str | torch.device | None = None,
) -> ClassFeatures:
    """Features of classes by a CLIP, taken from `cache` when they are of the same model, names and images.

    The text feature is that of the bare name, L2-normalised. The image feature is the mean of the features of up to
    `images_per_class` images, L2-normalised.

    Args:
        classes: with unique keys.
        clip: Hub id or folder of a CLIP (any model with `get_text_features` and `get_image_features`). The paper:
            `openai/clip-vit-base-patch16`.
        cache: safetensors file to keep them in; one below the Hugging Face cache when `None`. A stale one is
            recomputed: its key is made of the model's files (or Hub commit), the names, and paths and sizes of the
            images.
        images_per_class: chosen at random, always the same ones.
        means: `"unit"`, of L2-normalised features, so that all images weigh the same; `"raw"`, of features as they
            are, as in Link-Context Learning's code (`tool/imagenet/cls_similarity.py`).
        batch_size: images, or names, in one pass.
        device: CUDA where there is one, when `None`.

    Raises:
        ValueError: the model is not a CLIP, a class has no readable image, or there are no such means.
        OSError: the model is not found.
    """
    if means not in MEANS:
        raise ValueError(f"means={means!r} is unknown; choose one of {MEANS}.")
    chosen = [_chosen(image_class) for image_class in classes]
    key = _content_key(classes, chosen, clip, images_per_class, means)
    path = Path(constants.HF_HOME) / "aim" / f"class-features-{key[:16]}.safetensors" if cache is None else Path(cache)
    if path.exists():
        kept, stored = _read(path)
        if stored == key:
            return kept.of(classes)
        logger.warning(f"{path} belongs to another model, other names or other images; its features are recomputed.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encoder = _Encoder(clip, device, means)
    names = [image_class.name for image_class in classes]
    text = torch.cat([encoder.text(names[start : start + batch_size]) for start in range(0, len(names), batch_size)])
    progress = logging.tqdm(list(zip(classes, chosen, strict=True)), desc="CLIP features", unit="class")
    images = torch.stack(
        [encoder.mean(image_class, paths, images_per_class, batch_size) for image_class, paths in progress]
    )
    features = ClassFeatures(tuple(image_class.key for image_class in classes), text, images)
    features.save(path, key)
    return features


class _Encoder:
    """A CLIP and its processor, giving vectors on the CPU."""

    def __init__(self, clip: str | os.PathLike[str], device: torch.device, means: str) -> None:
        self.means = means
        self.model = AutoModel.from_pretrained(clip, dtype=torch.float32).eval().to(device)
        if not hasattr(self.model, "get_text_features") or not hasattr(self.model, "get_image_features"):
            raise ValueError(
                f"{clip} is a {type(self.model).__name__}, which does not put texts and images in one space. Give a "
                "CLIP, for example openai/clip-vit-base-patch16."
            )
        self.processor = AutoProcessor.from_pretrained(clip)
        self.device = device

    @torch.inference_mode()
    def text(self, names: Sequence[str]) -> torch.Tensor:
        """`(names, d)`."""
        inputs = self.processor(text=list(names), padding=True, truncation=True, return_tensors="pt")
        features = _features(self.model.get_text_features(**inputs.to(self.device)))
        return torch.nn.functional.normalize(features, dim=1)

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """`(images, d)`, unit vectors or as they are."""
        inputs = self.processor(images=list(images), return_tensors="pt")
        features = _features(self.model.get_image_features(**inputs.to(self.device)))
        return features if self.means == "raw" else torch.nn.functional.normalize(features, dim=1)

    def mean(self, image_class: ImageClass, paths: Sequence[str], count: int, batch_size: int) -> torch.Tensor:
        """`(d,)`, over the first `count` readable images of a class."""
        readable = islice(_readable(paths), count)
        rows = []
        while batch := list(islice(readable, batch_size)):
            rows.append(self.images(batch))
        if not rows:
            raise ValueError(
                f"None of the {len(paths)} images of the class {image_class.key!r} can be read; remove it or fix it."
            )
        return torch.nn.functional.normalize(torch.cat(rows).mean(dim=0), dim=0)


def _features(outputs: Any) -> torch.Tensor:
    features = getattr(outputs, "pooler_output", outputs)  # a plain tensor in earlier versions of transformers
    return features.float().cpu()


def _readable(paths: Sequence[str]) -> Iterator[Image.Image]:
    for path in paths:
        try:
            yield open_image(path)
        except ValueError as error:
            logger.warning(f"Left out of the class features: {path} ({error})")


def _chosen(image_class: ImageClass) -> list[str]:
    """The images of a class in the order in which they are taken: the same in whatever folder they lie."""
    return random.Random(f"images of {image_class.key}").sample(image_class.images, len(image_class.images))


def _content_key(
    classes: Sequence[ImageClass],
    chosen: Sequence[Sequence[str]],
    clip: str | os.PathLike[str],
    count: int,
    means: str,
) -> str:
    """Identity of what features are computed from."""
    raw = " raw" if means == "raw" else ""
    digest = hashlib.sha256(f"{_model_key(clip)} {count}{raw}".encode())
    for image_class, paths in zip(classes, chosen, strict=True):
        digest.update(json.dumps([image_class.key, image_class.name]).encode())
        for path in paths[:count]:
            digest.update(f"{Path(path).name} {os.path.getsize(path)}\n".encode())
    return digest.hexdigest()


def _model_key(clip: str | os.PathLike[str]) -> str:
    """Of a folder the digest of its files, of a Hub repository its commit."""
    if not os.path.isdir(clip):
        return f"{clip} {getattr(AutoConfig.from_pretrained(clip), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted(Path(clip).glob("*")):
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


# --- files


def _read(path: Path) -> tuple[ClassFeatures, str]:
    """Features, and the key they were stored under."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of class features at {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}). Remove it, or compute it again.") from error
    beside = path.with_suffix(".json")
    if "classes" not in metadata and not beside.is_file():
        raise ValueError(
            f"{path} does not say which classes its rows are of. Store a JSON list of class folders as its metadata "
            f"'classes', or as {beside.name} beside it."
        )
    words = metadata["classes"] if "classes" in metadata else beside.read_text(encoding="utf-8")
    try:
        classes = json.loads(words)
    except json.JSONDecodeError as error:
        raise ValueError(f"The classes of {path} are not JSON ({error}).") from error
    _check(path, classes, tensors)
    return ClassFeatures(tuple(classes), tensors["text"], tensors["images"]), metadata.get("key", "")


def _check(path: Path, classes: object, tensors: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` unless a file holds one row of finite numbers of each tensor for each class."""
    if not isinstance(classes, list) or not all(isinstance(class_name, str) for class_name in classes):
        raise ValueError(f"The classes of {path} are {classes!r:.60}; expected a JSON list of class folders.")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{path} names the class {max(classes, key=classes.count)!r} twice.")
    if set(tensors) != {"text", "images"}:
        raise ValueError(f"{path} holds the tensors {sorted(tensors)}; expected 'text' and 'images'.")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rows = tensors["text"].shape
    if len(rows) != 2 or rows[0] != len(classes) or shapes["text"] != shapes["images"]:
        raise ValueError(f"{path} holds {shapes} for {len(classes)} classes; expected (classes, d) for both.")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds values of {broken[0]!r} that are not finite numbers.")


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
