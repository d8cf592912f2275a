"""Demonstrations before and after the backbone has read them."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .files_aim import as_bytes, locate_file, write_whole
from .images_aim import ImageRules, file_named, open_image

FUSED_FILE = "aim_fused.safetensors"
FUSED_FORMAT = "aim_fused 1"
READ_LINES = "To read a file of one JSON object a line: demos = [json.loads(line) for line in open({!r:.80})]"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
PROCESSOR_SETTING = "label template"  # in the `source` of every model that has a processor
DEMONSTRATION_KEYS = {"image", "images", "text", "label", "question", "answer"}


@dataclass(frozen=True)
class Demonstration:
    """One worked example: images with a text, a label, or a question and its answer.

    Args:
        images: RGB images, in the order in which the backbone sees them; may be empty.
        text: a caption or statement, or the answer where there is a question.
        question: the question that `text` answers; `None` for a caption.
        is_label: `text` is a bare name ("dax"), which is read in the processor's label template ("This is dax.").

    Raises:
        ValueError: the images are no tuple of RGB images, or the text or a given question is no string with words.
    """

    aim_kind: ClassVar[str] = "demonstration"

    images: tuple[Image.Image, ...]
    text: str
    question: str | None = None
    is_label: bool = False

    def __post_init__(self) -> None:
        advice = "Demonstration.of opens and checks any raw form: Demonstration.of((image, text))."
        if not isinstance(self.images, tuple) or not all(
            isinstance(image, Image.Image) and image.mode == "RGB" for image in self.images
        ):
            raise ValueError(f"Demonstration takes a tuple of RGB images; got images={self.images!r:.120}. {advice}")
        if not _has_words(self.text):
            raise ValueError(f"Demonstration takes a text with words; got text={self.text!r:.60}. {advice}")
        if self.question is not None and not _has_words(self.question):
            raise ValueError(f"A question is a string with words, or None; got question={self.question!r:.60}.")
        words = f"{self.question or ''} {self.text}".strip()
        if LONE_SURROGATE.search(words):
            raise ValueError(
                f"The words of a demonstration hold a lone surrogate, which no tokenizer takes: {words!r:.80}."
            )

    @classmethod
    def of(cls, value: Any, rules: ImageRules | None = None, number: int | None = None) -> Demonstration:
        """Make a demonstration from any of the raw forms.

        Args:
            value: a `Demonstration`, a tuple `(image, text)` or `(image, question, answer)`, or a dict with `image`
                (or `images`) and `text`, `label`, or `question` and `answer`. An image is a PIL image, a path, a URL
                or an array `(height, width[, 3])`, uint8 or float in 0..1. Text alone is a dict without `image`.
            rules: which images may be opened; those of the processor in the model's own calls.
            number: its position in a list, from 0, for messages.

        Raises:
            ValueError: the example has no text or has unknown keys, its words are not valid Unicode, or an image
                is `None`, cannot be read or is larger than `rules` allow.
        """
        name = "A demonstration" if number is None else f"Demonstration {number}"
        if kind_of(value) == "demonstration" and hasattr(value, "is_label"):
            demo = value
            if not isinstance(value, cls):  # the same class, loaded from another repository's code
                demo = cls(tuple(value.images), value.text, value.question, value.is_label)
            try:
                for image in demo.images:
                    (rules or ImageRules()).check_size(image.size)
            except ValueError as error:
                raise ValueError(f"{name} has an image larger than expected: {error}.") from None
            return demo
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
                f"{name} has the unknown keys {sorted(unknown, key=str)}; known are {sorted(DEMONSTRATION_KEYS)}."
                f"{_closest_keys(unknown)}"
            )
        image_fields = [fields[key] for key in ("image", "images") if fields.get(key) is not None]
        if len(image_fields) > 1:
            raise ValueError(f"{name} has both 'image' and 'images'; give one of them.")
        images = image_fields[0] if image_fields else []
        images = images if isinstance(images, (list, tuple)) else [images]
        text_keys = [key for key in ("text", "label", "answer") if _has_words(fields.get(key))]
        if not text_keys:
            raise ValueError(f"{name}{file_named(images)} {_without_words(fields)}")
        if len(text_keys) > 1:
            raise ValueError(f"{name} has {' and '.join(text_keys)}; give one of text, label and answer.")
        if not image_fields and not {"image", "images"}.isdisjoint(fields):
            raise ValueError(
                f"{name} ({fields[text_keys[0]]!r:.60}) has None for its image. Give its image, or make it a "
                "dict without 'image' (or with images=[]) if it is text alone."
            )
        question = fields.get("question")
        if not isinstance(question, str | None):
            raise ValueError(f"{name}: question is {_described(question)}; expected a string.")
        return cls(
            images=tuple(open_image(image, rules) for image in images),
            text=fields[text_keys[0]].strip(),
            question=question.strip() if isinstance(question, str) and question.strip() else None,
            is_label=text_keys[0] == "label",
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


class ReadDemonstrations(Protocol):
    """Demonstrations that were read: fused ones, a prefix, a bank or a choice from one; `kind_of` has which.

    A choice is a bank with `shots` and `select` bound to it (`with_selection`); what it holds is selected for each
    query, once the queries are known.
    """

    aim_kind: ClassVar[str]

    def __len__(self) -> int: ...


RawDemonstration = Demonstration | Mapping[str, Any] | Sequence[Any]
Demos = Sequence[Any] | ReadDemonstrations | None  # what `generate` takes as `demos`: `parse_demos` checks it
Part = tuple[Demonstration, ...] | ReadDemonstrations  # what one row, or all rows, are given
Selection = str | Sequence[int] | Sequence[str] | Mapping[str, Any] | None  # what it takes as `select`


def _closest_keys(unknown: set[Any]) -> str:
    """A question for each misspelt key, such as " Did you mean 'label'?"."""
    closest = [difflib.get_close_matches(str(key), sorted(DEMONSTRATION_KEYS), 1) for key in sorted(unknown, key=str)]
    return "".join(f" Did you mean {keys[0]!r}?" for keys in closest if keys)


def _without_words(fields: Mapping[str, Any]) -> str:
    """What is wrong with a demonstration that has no words."""
    for key in ("text", "label", "answer"):
        if fields.get(key) is not None and not isinstance(fields[key], str):
            return f"has no words: {key} is {_described(fields[key])}; expected a string."
    if _has_words(fields.get("question")):
        return f"has the question {fields['question']!r:.60} but no words to answer it; give answer too."
    return "has no words; give text, label, or question and answer."


def _described(value: object) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"the number {value}" if is_number else f"{value!r:.60}"


def _has_words(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def kind_of(value: object) -> str | None:
    """What `value` is in `demos`: `"demonstration"`, `"fused"`, `"bank"`, `"choice"`, `"prefix"`, or `None`.

    `None` is anything else; of a part that `parse_demos` has checked it means a tuple of raw demonstrations.
    Classes have it as an attribute (`aim_kind`), since a class loaded as remote code is not the installed one.
    """
    kind = getattr(type(value), "aim_kind", None)
    if kind is None and (isinstance(value, Mapping) or _is_pair(value)):
        return "demonstration"
    return kind


def _is_pair(value: object) -> bool:
    """Whether `value` is (image, text) or (image, question, answer), and not the demonstrations of a row."""
    return isinstance(value, (list, tuple)) and len(value) in (2, 3) and isinstance(value[-1], str)


def parse_demos(demos: Demos, rules: ImageRules | None = None) -> Part | list[Part | None] | None:
    """Check what `generate` takes as `demos`, and open its raw demonstrations within `rules`.

    Returns:
        One part for all rows of a batch, or a list with a part (or `None`) for each row. A part is a tuple of
        `Demonstration`s, fused demonstrations, a bank, a choice or a prefix. `None` where there are no demonstrations.

    Raises:
        ValueError: `demos` holds something else, or a demonstration is malformed.
    """
    kind = kind_of(demos)
    if kind == "demonstration":
        if isinstance(demos, (list, tuple)):  # demonstrations with a text behind them look like (image, text)
            _check_no_text(demos)
        raise ValueError("demos takes a list of demonstrations; put the single one in a list.")
    if demos is None:
        return None
    if kind is not None:
        return cast(ReadDemonstrations, demos) if len(demos) else None
    if not isinstance(demos, (list, tuple)):
        raise _unknown(demos)
    raw = [kind_of(entry) == "demonstration" for entry in demos]
    if all(raw):
        return tuple(Demonstration.of(entry, rules, number) for number, entry in enumerate(demos)) or None
    if any(raw):
        _check_no_text(demos)
        _parse_row(demos[raw.index(False)], rules)  # raises for an unknown kind
        raise ValueError(
            "demos mixes demonstrations with other things; give one list of demonstrations, or one a row."
        )
    return [_parse_row(entry, rules) for entry in demos]


def _check_no_text(demos: Sequence[Any]) -> None:
    """Raise `ValueError` for a bare text among demonstrations."""
    if any(kind_of(entry) == "demonstration" for entry in demos):
        for number, entry in enumerate(demos):
            if isinstance(entry, str):
                raise ValueError(f"Entry {number} of demos is {entry!r:.80}; expected (image, text) or a dict.")


def _parse_row(entry: Any, rules: ImageRules | None) -> Part | None:
    if isinstance(entry, (list, tuple)) and not all(kind_of(part) == "demonstration" for part in entry):
        raise _unknown(entry, " in its list")
    if entry is not None and kind_of(entry) is None and not isinstance(entry, (list, tuple)):
        raise _unknown(entry, " in its list")
    return cast("Part | None", parse_demos(entry, rules))  # in its list are demonstrations alone, no rows


def _unknown(value: object, where: str = "") -> ValueError:
    if isinstance(value, (str, os.PathLike)) and not where:
        return ValueError(
            f"demos is {value!r:.80}; expected a list of demonstrations. {READ_LINES.format(os.fspath(value))}"
        )
    return ValueError(
        f"demos has {value!r:.80}{where}. It takes a list of demonstrations, each (image, text), (image, question, "
        "answer) or a dict with these; what read() or prefill() returned; a DemonstrationBank; or a list with one of "
        "these for each row."
    )


def numbers_of(index: Any, count: int) -> list[int]:
    """Which of `count` demonstrations `index` takes: a number, a slice, or numbers in any sequence or array.

    `IndexError` where there is no such demonstration, `ValueError` for a mask.
    """
    entries = range(count)[index] if isinstance(index, slice) else getattr(index, "tolist", lambda: index)()
    entries = [entries] if hasattr(entries, "__index__") else list(entries)
    if any(isinstance(entry, bool) or str(getattr(entry, "dtype", "")).endswith("bool") for entry in entries):
        raise ValueError(f"Demonstrations are taken by number; got the truth values {index!r:.80}.")
    return [range(count)[entry] for entry in entries]


@dataclass(frozen=True, eq=False, repr=False)
class FusedDemonstrations:
    """The result of reading: the fused virtual tokens of demonstrations, in order. An immutable value.

    Args:
        vectors: fused tokens of all demonstrations, one after another, `(tokens, entry layers x hidden size)`.
        lengths: fused tokens of each demonstration.
        ids: the token id under each fused token, `(tokens,)`. The prompt holds these ids: below the depth where fused
            tokens enter, the layers run over them as text, which the query attends to; above it, the states have seen
            the image.
        keys: content identity of each demonstration (`Demonstration.key`).
        texts: the words of each demonstration, for display.
        source: identity of what read them: backbone, projector, read layers. Only the same plug-in can use them.
    """

    aim_kind: ClassVar[str] = "fused"

    vectors: torch.Tensor
    lengths: tuple[int, ...]
    ids: torch.Tensor
    keys: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.vectors.shape[0] != sum(self.lengths):
            raise ValueError(
                f"Fused tokens have the shape {tuple(self.vectors.shape)}, "
                f"expected ({sum(self.lengths)}, entry layers x hidden size)."
            )
        if self.ids.shape != self.vectors.shape[:1] or self.ids.is_floating_point():
            raise ValueError(
                f"The token ids of fused tokens are {self.ids.dtype} of the shape {tuple(self.ids.shape)}, expected "
                f"whole numbers ({len(self.vectors)},)."
            )
        counts = {name: len(getattr(self, name)) for name in ("keys", "texts") if getattr(self, name)}
        if min(self.lengths, default=0) < 0 or any(count != len(self.lengths) for count in counts.values()):
            raise ValueError(f"Fused demonstrations have the lengths {self.lengths}, but as many as {counts}.")

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        width = self.vectors.shape[1]
        return f"FusedDemonstrations({len(self)} demonstrations, {self.num_tokens} tokens, width {width})"

    @property
    def num_tokens(self) -> int:
        """Fused tokens of all demonstrations together: what they cost in the prompt."""
        return int(self.vectors.shape[0])

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.lengths))

    def __getitem__(self, index: int | slice | Sequence[int]) -> FusedDemonstrations:
        """The demonstrations at `index` (a number, a slice or a list of numbers, not a mask), in that order."""
        chosen = numbers_of(index, len(self))
        spans = [slice(self._ends[i] - self.lengths[i], self._ends[i]) for i in chosen]
        return FusedDemonstrations(
            vectors=torch.cat([self.vectors[span] for span in spans]) if spans else self.vectors[:0],
            lengths=tuple(self.lengths[i] for i in chosen),
            ids=torch.cat([self.ids[span] for span in spans]) if spans else self.ids[:0],
            keys=tuple(self.keys[i] for i in chosen) if self.keys else (),
            texts=tuple(self.texts[i] for i in chosen) if self.texts else (),
            source=self.source,
        )

    def __iter__(self) -> Iterator[FusedDemonstrations]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: FusedDemonstrations) -> FusedDemonstrations:
        """These demonstrations, then the others; both must come from the same plug-in."""
        check_source(other.source, self.source)
        return concatenated([self, other])

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
        tensors = {"vectors": self.vectors.detach().cpu().contiguous(), "ids": self.ids.cpu().contiguous()}
        about = {name: list(getattr(self, name)) for name in ("lengths", "keys", "texts")}
        about_json = json.dumps({**about, "source": dict(self.source)}, sort_keys=True)
        metadata = {"format": FUSED_FORMAT, "about": about_json, "sha256": _digest(about_json, tensors)}
        write_whole(folder / FUSED_FILE, save(tensors, metadata=metadata))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **hub_kwargs: Any) -> FusedDemonstrations:
        """Load what `save_pretrained` wrote. The model that uses it checks that the same plug-in read it.

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
                tensors = {name: file.get_tensor(name) for name in ("vectors", "ids")}
            if metadata["sha256"] != _digest(metadata["about"], tensors):
                raise ValueError("its sha256 does not match")
            if not bool(torch.isfinite(tensors["vectors"]).all()):
                raise ValueError("its fused tokens are not finite (NaN or infinite)")
            about = json.loads(metadata["about"])
            lists: dict[str, Any] = {name: tuple(about[name]) for name in ("lengths", "keys", "texts")}
            return cls(**tensors, **lists, source=dict(about["source"]))
        except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"{path} holds no fused demonstrations, or is damaged ({error!r:.200}). Copy it again, or read the "
                "demonstrations again: model.read(demos)."
            ) from error


def _digest(about: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def concatenated(parts: Sequence[FusedDemonstrations]) -> FusedDemonstrations:
    """Join several values in order.

    Keys and texts are kept where all have them; the source is the first one's, unchecked.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    keys, texts = (tuple(item for part in parts for item in getattr(part, name)) for name in ("keys", "texts"))
    count = sum(len(part) for part in parts)
    return FusedDemonstrations(
        vectors=torch.cat([part.vectors.to(first.vectors) for part in parts]),
        lengths=tuple(length for part in parts for length in part.lengths),
        ids=torch.cat([part.ids.to(first.ids) for part in parts]),
        keys=keys if len(keys) == count else (),
        texts=texts if len(texts) == count else (),
        source=first.source,
    )


def check_source(source: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise `ValueError` naming every difference between the plug-in that read and the one that is to answer."""
    # a model without a processor knows none of its settings, and compares what it knows
    compares_all = PROCESSOR_SETTING in expected or PROCESSOR_SETTING not in source
    wrong = [
        f"{k} {source.get(k, 'unknown'):.60} (this model: {expected.get(k, 'none'):.60})"
        for k in dict.fromkeys([*expected, *(source if compares_all else ())])
        if source.get(k) != expected.get(k)
    ]
    if wrong:
        raise ValueError(
            "These fused demonstrations were read by another model: "
            + "; ".join(wrong)
            + ". Read the demonstrations again with this model: model.read(demos); a bank: DemonstrationBank.build."
        )
