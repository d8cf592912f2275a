"""Captions and conversations as tokens: what each stage reads, and which tokens the loss counts.

LLaVA's JSON is read by `LlavaConversations`, pairs in all their formats by `Pairs`, the sources of `aim train`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset, Sampler
from transformers.utils import logging

from ..data.pairs import opened_pair
from ..training.llava import LlavaConversations
from ..training.sources import Pairs, open_source
from .chat import ChatWriter, Turn, Written

logger = logging.get_logger(__name__)

IMAGE = "<image>"  # in LLaVA's JSON, whatever the token of the tokenizer is called
LOOKED_AT = 1000  # examples whose images are looked for before a run
MOST_MISSING = 0.1  # of these images
NO_ANSWER = "conversation without an answer"
CHARACTERS = 4  # of a token, about
TOO_LONG = "longer than max_length before its answer"
REFUSED = "conversation that the chat template refuses"
OTHER_IMAGES = "conversation with other images than image tokens"


@dataclass(frozen=True)
class Example:
    """A caption or a conversation with its images unopened.

    Args:
        images: where they are.
        turns: what is asked, `<image>` where an image stands, and answered.
    """

    images: tuple[Any, ...]
    turns: tuple[Turn, ...]


class Examples(Dataset):
    """Everything that one stage is trained on, by number.

    Args:
        specs: sources, `KIND:PATH[,name=value...]` with the kind llava or pairs; a `.json` alone is of the first.
        option: they are given by, for messages: `stage1` or `stage2`.
        seed: of the order in which pairs are read.

    Raises:
        ValueError: a source has another kind, or yields nothing; or too many of its images are not there.
    """

    def __init__(self, specs: Sequence[str], option: str, seed: int) -> None:
        self.option = option
        self.left_out: Counter[str] = Counter()
        self._parts: list[LlavaConversations | list[Any]] = []
        for spec in specs:
            self._parts.append(self._opened(spec, seed))
            if not self._length(self._parts[-1]):
                reasons = ", ".join(f"{reason}: {count}" for reason, count in self.left_out.items()) or "it is empty"
                raise ValueError(
                    f"{option} {spec!r} holds nothing to train on: no caption, or no conversation with an answer "
                    f"({reasons})."
                )
        self._check()

    def _opened(self, spec: str, seed: int) -> LlavaConversations | list[Any]:
        whole = spec if ":" in spec.split("/")[0] or not spec.split(",")[0].endswith(".json") else f"llava:{spec}"
        if self.option == "stage2" and whole.startswith("llava:") and "text_only=" not in whole:
            whole += ",text_only=true"
        source, _ = open_source(whole)
        if isinstance(source, LlavaConversations):
            self.left_out.update(source.left_out)
            return source
        if not isinstance(source, Pairs):
            raise ValueError(
                f"{self.option} {spec!r}: expected llava:FILE.json or pairs:PATH; see aim backbone --help."
            )
        pairs = [pair for document in source.documents(seed) for pair in document]
        self.left_out.update(source.skipped)
        return pairs

    @staticmethod
    def _length(part: LlavaConversations | list[Any]) -> int:
        return part.conversations if isinstance(part, LlavaConversations) else len(part)

    def __len__(self) -> int:
        return sum(map(self._length, self._parts))

    def __getitem__(self, number: int) -> Example:
        for part in self._parts:
            length = self._length(part)
            if number < length:
                return _conversation(part, number) if isinstance(part, LlavaConversations) else _pair(part[number])
            number -= length
        raise IndexError(number)

    def lengths(self, image_tokens: int) -> np.ndarray:
        """Tokens of each example, about.

        Args:
            image_tokens: of an image.
        """
        parts = [np.zeros(0)]
        for part in self._parts:
            if isinstance(part, LlavaConversations):
                characters, images = part.sizes()
                parts.append(characters / CHARACTERS + images * image_tokens)
            else:
                examples = map(_pair, part)
                parts.append(np.array([_characters(e) / CHARACTERS + len(e.images) * image_tokens for e in examples]))
        return np.concatenate(parts)

    def _check(self) -> None:
        """Look for answers and images of examples from the whole of the data, before any weights are loaded."""
        examples = [self[number] for number in range(0, len(self), max(1, len(self) // LOOKED_AT))]
        if not any(answer for example in examples for _, answer in example.turns):
            raise ValueError(
                f"{self.option}: no answer in {len(examples)} conversations that were looked at; the answers, which "
                'are trained on, stand in the turns {"from": "gpt"}.'
            )
        paths = [
            path for example in examples for path in example.images if isinstance(path, str) and "://" not in path
        ]
        paths = [path for path in paths if not path.startswith("data:")]
        missing = [path for path in paths if not os.path.exists(path)]
        if len(missing) > MOST_MISSING * len(paths):
            raise ValueError(
                f"{self.option}: {len(missing)} of {len(paths)} images that were looked for do not exist, such as "
                f"{missing[0]}. Name the folder that they are in: llava:FILE.json,images=FOLDER."
            )


def _conversation(source: LlavaConversations, number: int) -> Example:
    image, turns = source.conversation(number)
    images = () if image is None else tuple(image) if isinstance(image, list) else (image,)
    if images and not any(IMAGE in asked for asked, _ in turns):
        turns = [(f"{IMAGE}\n" * len(images) + turns[0][0], turns[0][1]), *turns[1:]]
    return Example(images, tuple(turns))


def _pair(pair: Mapping[str, Any]) -> Example:
    """A pair as a conversation of one turn; a caption has no question."""
    image = pair.get("images") or pair.get("image")
    images = tuple(image) if isinstance(image, (list, tuple)) else (image,)
    words = next((pair[name] for name in ("answer", "text", "label") if pair.get(name)), "")
    question = f"{IMAGE}\n" * len(images) + str(pair.get("question") or "")
    return Example(images, ((question.strip(), str(words).strip()),))


def _characters(example: Example) -> int:
    return sum(len(asked) + len(answer) for asked, answer in example.turns)


class ByLength(Sampler[int]):
    """A random order in which the examples of each optimizer step are sorted, the longest first.

    Forward passes of one step, and processes side by side, so get examples of about the same length and pad little;
    which examples a step has stays as random. It is LLaVA's sampler, but for its split into examples with and without
    images.

    Args:
        lengths: of the examples.
        step: examples of an optimizer step, on all processes together.
        seed: of the order.
    """

    def __init__(self, lengths: np.ndarray, step: int, seed: int) -> None:
        self.sizes, self.step, self.seed, self.epoch = lengths, step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The pass over the data that comes next; each has an order of its own."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.sizes))
        for begin in range(0, len(order), self.step):
            some = order[begin : begin + self.step]
            yield from some[np.argsort(-self.sizes[some], kind="stable")].tolist()


class Collator:
    """Makes batches of examples: tokens, labels, pixels; an example that cannot be used is left out and counted.

    Args:
        writer: of conversations.
        image_processor: of the backbone.
        captions: take the first answer as a caption, without its question, as stage 1 does.
        max_length: tokens of an example.
        plain: write conversations without the chat template, see `ChatWriter.plain`.
    """

    def __init__(
        self, writer: ChatWriter, image_processor: Any, captions: bool, max_length: int, plain: bool = False
    ) -> None:
        self.writer, self.image_processor = writer, image_processor
        self.captions, self.max_length, self.plain = captions, max_length, plain

    def written(self, example: Example) -> Written:
        """An example in words.

        Raises:
            ValueError: the chat template leaves a part of it out.
        """
        if self.captions:
            return self.writer.caption(len(example.images), example.turns[0][1])
        token = self.writer.image_token
        turns = [(asked.replace(IMAGE, token), answer) for asked, answer in example.turns]
        return self.writer.plain(turns) if self.plain else self.writer.conversation(turns)

    def _encoded(self, example: Example, skipped: Counter[str]) -> tuple[list[int], list[int], tuple[Any, ...]] | None:
        """Tokens, labels and opened images; `None` for what cannot be used."""
        token, answers = self.writer.image_token, [answer for _, answer in example.turns]
        image_count = sum(asked.count(IMAGE) for asked, _ in example.turns)
        if not all(answers):
            skipped[NO_ANSWER] += 1
        elif image_count != len(example.images) or any(IMAGE in a or token in a for a in answers):
            skipped[OTHER_IMAGES] += 1
        else:
            images: tuple[Any, ...] = ()
            if example.images:
                demo = opened_pair({"images": list(example.images), "text": answers[-1]}, skipped)
                if demo is None:
                    return None
                images = tuple(demo.images)
            try:
                written = self.written(example)
            except (ValueError, TemplateError):
                skipped[REFUSED] += 1
                return None
            ids, labels = self.writer.encoded(written, self.max_length)
            expected = len(images) * self.writer.image_tokens
            if any(label != -100 for label in labels) and ids.count(self.image_id) == expected:
                return ids, labels, images
            skipped[TOO_LONG] += 1
        return None

    @property
    def image_id(self) -> int:
        return self.writer.tokenizer.convert_tokens_to_ids(self.writer.image_token)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch, padded on the right: `input_ids`, `attention_mask`, `labels` `(batch, length)`, the pixels of its
        images in order, and `skipped`, what was left out."""
        skipped: Counter[str] = Counter()
        encoded = (self._encoded(example, skipped) for example in examples)
        rows = [row for row in encoded if row is not None]
        tokenizer = self.writer.tokenizer
        if not rows:  # two tokens without a label, so that there is a batch
            rows = [([tokenizer.pad_token_id] * 2, [-100] * 2, ())]
        length = max(len(ids) for ids, _, _ in rows)

        def padded(values: Iterable[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (length - len(row)) for row in values])

        batch: dict[str, Any] = {
            "input_ids": padded((ids for ids, _, _ in rows), tokenizer.pad_token_id),
            "attention_mask": padded(([1] * len(ids) for ids, _, _ in rows), 0),
            "labels": padded((labels for _, labels, _ in rows), -100),
            "skipped": skipped,
        }
        images = [image for row in rows for image in row[2]]
        if images:
            batch["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return batch
