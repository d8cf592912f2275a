"""Demonstrations before and after the backbone has read them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.image_utils import load_image

from .files_aim import as_bytes, locate_file, write_whole

FUSED_FILE = "aim_fused.safetensors"
FUSED_FORMAT = "aim_fused 1"
DEMONSTRATION_KEYS = {"image", "images", "text", "label", "question", "answer"}


@dataclass(frozen=True)
class Demonstration:
    """One worked example: images with a text, a label, or a question and its answer.

    Args:
        images: RGB images, in the order in which the backbone sees them; may be empty.
        text: what is read of the example: a caption or statement, or the answer when there is a question.
        question: the question that `text` answers; `None` for a caption.
        is_label: `text` is a bare name ("dax"), which the processor words ("This is dax.") before it is read.
    """

    images: tuple[Image.Image, ...]
    text: str
    question: str | None = None
    is_label: bool = False

    @classmethod
    def of(cls, value: Any) -> Demonstration:
        """Make a demonstration of what a user has at hand.

        Args:
            value: a `Demonstration`, a tuple `(image, text)` or `(image, question, answer)`, or a dict with `image`
                (or `images`) and `text`, `label`, or `question` and `answer`. An image is a PIL image, a path, a URL
                or an array `(height, width[, 3])`, uint8 or float in 0..1.

        Raises:
            ValueError: the example has no text or has unknown keys, or an image cannot be read.
        """
        if isinstance(value, cls):
            return value
        if type(value).__name__ == cls.__name__:  # the same class, loaded from another repository's code
            return cls(tuple(value.images), value.text, value.question, value.is_label)
        if isinstance(value, Mapping):
            fields = dict(value)
        elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) in (2, 3):
            names = ("image", "text") if len(value) == 2 else ("image", "question", "answer")
            fields = dict(zip(names, value, strict=True))
        else:
            raise ValueError(
                f"A demonstration is (image, text), (image, question, answer) or a dict with these; got {value!r:.80}."
            )
        unknown = set(fields) - DEMONSTRATION_KEYS
        if unknown:
            raise ValueError(
                f"A demonstration has the unknown keys {sorted(unknown)}; known are {sorted(DEMONSTRATION_KEYS)}."
            )
        if fields.get("image") is not None and fields.get("images") is not None:
            raise ValueError("A demonstration takes 'image' or 'images', not both.")
        images = fields.get("image") if fields.get("images") is None else fields["images"]
        if images is None:
            images = []
        elif not isinstance(images, (list, tuple)):
            images = [images]
        given = [key for key in ("text", "label", "answer") if _has_words(fields.get(key))]
        if not given:
            raise ValueError(
                "A demonstration needs words: give it 'text', 'label', or 'question' and 'answer'. "
                f"Got { ({k: v for k, v in fields.items() if k not in ('image', 'images')}) }."
            )
        if len(given) > 1:
            raise ValueError(f"A demonstration takes one of 'text', 'label' and 'answer'; got {given}.")
        question = fields.get("question")
        if not isinstance(question, str | None):
            raise ValueError(f"The question of a demonstration is {question!r:.60}; expected text.")
        return cls(
            images=tuple(_open_image(image) for image in images),
            text=fields[given[0]].strip(),
            question=question.strip() if isinstance(question, str) and question.strip() else None,
            is_label=given[0] == "label",
        )

    @property
    def key(self) -> str:
        """Identity of the content: sha256 over pixels and words."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(f"{image.mode}{image.size}".encode())
            digest.update(image.tobytes())
        digest.update(json.dumps([self.text, self.question, self.is_label]).encode())
        return digest.hexdigest()


def _has_words(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _open_image(image: Any) -> Image.Image:
    """Load one image as RGB, or say which one could not be read and why."""
    try:
        if isinstance(image, np.ndarray | torch.Tensor):
            pixels = np.asarray(image)
            if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
                pixels = np.moveaxis(pixels, 0, -1)
            top = 1 if pixels.dtype.kind in "fb" else 255
            if pixels.size == 0 or pixels.min() < 0 or pixels.max() > top:
                raise ValueError(
                    f"pixels of type {pixels.dtype} must lie in 0..{top}, found {pixels.min()}..{pixels.max()}"
                )
            pixels = (pixels * (255 // top)).round().astype(np.uint8) if top == 1 else pixels.astype(np.uint8)
            return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
        if isinstance(image, os.PathLike):
            image = os.fspath(image)
        return load_image(image).convert("RGB")
    except Exception as error:
        raise ValueError(
            f"Cannot read the image {image!r:.120} of a demonstration ({type(error).__name__}: {error}). "
            "Give a PIL image, an image file, a URL or an array (height, width, 3)."
        ) from error


def is_demonstration(value: Any) -> bool:
    """Whether `value` is one raw demonstration (and not, say, the demonstrations of one row of a batch)."""
    if isinstance(value, Mapping) or type(value).__name__ == "Demonstration":
        return True
    return isinstance(value, (list, tuple)) and len(value) in (2, 3) and isinstance(value[-1], str)


def _is_read(value: Any) -> bool:
    return is_fused(value) or is_bank(value) or is_prefix(value)


def check_demos(demos: Any) -> None:
    """Raise `ValueError` unless `demos` is something that `generate` takes: what it holds may still be wrong."""
    if is_demonstration(demos):
        raise ValueError("demos takes a list of demonstrations; put the single one in a list.")
    wrong = []
    if isinstance(demos, (list, tuple)):
        for demo in demos:
            row = isinstance(demo, (list, tuple)) and all(is_demonstration(one) for one in demo)
            if not (demo is None or row or is_demonstration(demo) or _is_read(demo)):
                wrong.append(f"{demo!r:.80} in its list")
    elif not (demos is None or _is_read(demos)):
        wrong.append(f"{demos!r:.80}")
    if wrong:
        raise ValueError(
            f"demos has {wrong[0]}. It takes a list of demonstrations, each (image, text), (image, question, "
            "answer) or a dict with these; what read() returned; a DemonstrationBank; or a list with one of these "
            "for each row."
        )


@dataclass(frozen=True, eq=False, repr=False)
class FusedDemonstrations:
    """What reading gives: the fused virtual tokens of some demonstrations, in order. A frozen value.

    Args:
        vectors: fused tokens of all demonstrations, one after another, `(tokens, hidden size)`.
        lengths: fused tokens of each demonstration.
        keys: content identity of each demonstration (`Demonstration.key`).
        texts: what each demonstration says, for people.
        source: what read them: backbone, projector, read layers. Only the same plug-in can use them.
    """

    vectors: torch.Tensor
    lengths: tuple[int, ...]
    keys: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.vectors.shape[0] != sum(self.lengths):
            raise ValueError(
                f"Fused tokens have the shape {tuple(self.vectors.shape)}, "
                f"expected ({sum(self.lengths)}, hidden size)."
            )
        counts = {name: len(getattr(self, name)) for name in ("keys", "texts") if getattr(self, name)}
        if min(self.lengths, default=0) < 0 or any(count != len(self.lengths) for count in counts.values()):
            raise ValueError(f"Fused demonstrations have the lengths {self.lengths}, but as many as {counts}.")

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return (
            f"FusedDemonstrations({len(self)} demonstrations, {self.num_tokens} tokens, width {self.vectors.shape[1]})"
        )

    @property
    def num_tokens(self) -> int:
        """Fused tokens of all demonstrations together: what they cost in the prompt."""
        return int(self.vectors.shape[0])

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.lengths))

    def __getitem__(self, index: int | slice | Sequence[int]) -> FusedDemonstrations:
        """The demonstrations at `index` (a number, a slice or a list of numbers), in that order."""
        chosen = range(len(self))[index] if isinstance(index, (int, slice)) else [range(len(self))[i] for i in index]
        chosen = [chosen] if isinstance(chosen, int) else list(chosen)
        parts = [self.vectors[self._ends[i] - self.lengths[i] : self._ends[i]] for i in chosen]
        return FusedDemonstrations(
            vectors=torch.cat(parts) if parts else self.vectors[:0],
            lengths=tuple(self.lengths[i] for i in chosen),
            keys=tuple(self.keys[i] for i in chosen) if self.keys else (),
            texts=tuple(self.texts[i] for i in chosen) if self.texts else (),
            source=self.source,
        )

    def __iter__(self) -> Iterator[FusedDemonstrations]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: FusedDemonstrations) -> FusedDemonstrations:
        """These demonstrations, then the others; both must come from the same plug-in."""
        check_source(other.source, self.source)
        return FusedDemonstrations(
            vectors=torch.cat([self.vectors, other.vectors.to(self.vectors)]),
            lengths=self.lengths + tuple(other.lengths),
            keys=self.keys + tuple(other.keys),
            texts=self.texts + tuple(other.texts),
            source=self.source,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write what was read to one file, `aim_fused.safetensors`. A kill leaves the old file or the new one.

        Args:
            save_directory: the folder, made when it does not exist.

        Raises:
            ValueError: `save_directory` is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; give a folder to save to.")
        folder.mkdir(parents=True, exist_ok=True)
        vectors = self.vectors.detach().cpu().contiguous()
        about = {name: list(getattr(self, name)) for name in ("lengths", "keys", "texts")}
        said = json.dumps({**about, "source": dict(self.source)}, sort_keys=True)
        metadata = {"format": FUSED_FORMAT, "about": said, "sha256": _digest(said, vectors)}
        write_whole(folder / FUSED_FILE, save({"vectors": vectors}, metadata=metadata))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **hub_kwargs: Any) -> FusedDemonstrations:
        """Open what `save_pretrained` wrote. The model that is to use it checks that it read it.

        Args:
            name_or_path: folder or Hub repository.
            **hub_kwargs: `revision`, `token`, `cache_dir`, ..., as for a model.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or is something else.
        """
        path = locate_file(name_or_path, FUSED_FILE, **hub_kwargs)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata["format"] != FUSED_FORMAT:
                    raise ValueError(f"its format is {metadata['format']!r:.40}, expected {FUSED_FORMAT!r}")
                vectors = file.get_tensor("vectors")
            if metadata["sha256"] != _digest(metadata["about"], vectors):
                raise ValueError("its sha256 is another one")
            about = json.loads(metadata["about"])
            counts = {name: tuple(about[name]) for name in ("lengths", "keys", "texts")}
            return cls(vectors, counts["lengths"], counts["keys"], counts["texts"], dict(about["source"]))
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{path} holds no fused demonstrations, or is damaged ({error!r:.200}). Copy it again, or read the "
                "demonstrations again: model.read(demos)."
            ) from error


def _digest(about: str, vectors: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{about} {vectors.dtype} {tuple(vectors.shape)} ".encode())
    digest.update(as_bytes(vectors))
    return digest.hexdigest()


def is_fused(value: Any) -> bool:
    """Whether `value` is what reading gave. By its parts, since remote code has a class of its own."""
    return hasattr(value, "vectors") and hasattr(value, "lengths")


def is_bank(value: Any) -> bool:
    """Whether `value` is a demonstration bank. By a mark of its class, since banks are not part of the remote code."""
    return getattr(type(value), "is_demonstration_bank", False) is True


def is_prefix(value: Any) -> bool:
    """Whether `value` is what `prefill` gave. By its parts, since remote code has a class of its own."""
    return hasattr(value, "prefix_key")


def check_source(given: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise `ValueError` naming every difference between the plug-in that read and the one that is to answer."""
    wrong = [
        f"{k} {given.get(k, 'unknown'):.60} (this model: {expected[k]:.60})"
        for k in expected
        if given.get(k) != expected[k]
    ]
    if wrong:
        raise ValueError(
            "These fused demonstrations were read by another model: "
            + "; ".join(wrong)
            + ". Read the demonstrations again with this model: model.read(demos)."
        )
