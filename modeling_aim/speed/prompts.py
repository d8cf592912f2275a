"""Prompts of random ids and random images in the form that a backbone takes: no tokenizer and no picture is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedConfig

from ..demonstrations_aim import Demonstration
from .shapes import Picture, picture_of

Part = tuple[int | None, list[int]]  # number of an image, and the words behind it


class RandomPrompts:
    """Demonstrations and a query, as a plug-in's processor gives them.

    Args:
        config: the backbone's configuration.
        shots: most demonstrations of a prompt.
        demo_tokens: text tokens of a demonstration.
        query_tokens: text tokens of the query, BOS among them where the backbone has one.
        device, dtype: of the images, which are made once.
        picture: how an image enters; by the backbone's family when `None`.

    Raises:
        ValueError: it is not known how an image enters this backbone.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        shots: int,
        demo_tokens: int,
        query_tokens: int,
        device: str,
        dtype: torch.dtype,
        picture: Picture | None = None,
    ) -> None:
        self.picture, self.device = picture_of(config) if picture is None else picture, device
        text = config.get_text_config()
        names = {name: value for part in (config, text) for name, value in part.to_dict().items()}
        taken = {value for name, value in names.items() if name.endswith(("_token_id", "_token_index"))}
        words = torch.tensor([i for i in range(3, min(text.vocab_size, 1000)) if i not in taken])
        self.image_id: int = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
        bos = getattr(text, "bos_token_id", None)
        self.bos = [] if bos is None else [bos]
        generator = torch.Generator().manual_seed(0)

        def some(count: int) -> list[int]:
            return words[torch.randint(len(words), (count,), generator=generator)].tolist()

        demos: list[Part] = [(number, some(demo_tokens)) for number in range(shots)]
        self._parts: list[Part] = [*demos, (shots, some(query_tokens - len(self.bos)))]
        seeds = torch.Generator(device).manual_seed(0)
        self._pixels = [
            torch.randn(self.picture.pixels, generator=seeds, device=device, dtype=dtype) for _ in self._parts
        ]

    # --- what is measured

    def query(self) -> dict[str, Any]:
        """The query alone."""
        return dict(self._inputs([[self._parts[-1]]]))

    def full(self, shots: int) -> dict[str, Any]:
        """The query behind so many demonstrations, all images among them."""
        return dict(self._inputs([[*self._parts[:shots], self._parts[-1]]]))

    def before(self, shots: int) -> dict[str, Any]:
        """What stands before the query in `full`."""
        return dict(self._inputs([self._parts[:shots]]))

    def behind(self) -> dict[str, Any]:
        """The part of `full` after `before`: the query without BOS."""
        return dict(self._inputs([[self._parts[-1]]], bos=[]))

    def pieces(self, numbers: Sequence[int], begins: bool) -> dict[str, Any]:
        """Some of the demonstrations and, as -1, the query, in this order; with BOS where they begin a prompt."""
        return dict(self._inputs([[self._parts[number] for number in numbers]], None if begins else []))

    def demos(self, shots: int) -> list[Demonstration]:
        """So many demonstrations; the number in the text says which image and words are meant."""
        return [
            Demonstration((Image.new("RGB", (1, 1), (number % 256, number // 256, 0)),), str(number))
            for number in range(shots)
        ]

    # --- what a plug-in asks of its processor

    reading_settings: dict[str, str] = {}  # noqa: RUF012

    def reading_lengths(self, demos: Sequence[Demonstration]) -> list[int]:
        """How many positions each demonstration takes when it is read."""
        return [len(self.bos) + self.picture.tokens + len(self._parts[int(demo.text)][1]) for demo in demos]

    def encode_demonstrations(self, demos: Sequence[Demonstration], span: str) -> tuple[BatchFeature, torch.Tensor]:
        """Demonstrations as one batch, and at which places their words stand."""
        inputs = self._inputs([[self._parts[int(demo.text)]] for demo in demos])
        words = inputs["input_ids"] != self.image_id
        words[:, : len(self.bos)] = False
        return inputs, words

    def kept_ids(self, demos: Sequence[Demonstration], span: str) -> list[torch.Tensor]:
        """The words of each demonstration."""
        return [torch.tensor(self._parts[int(demo.text)][1]) for demo in demos]

    def prompt(self, question: str, images: int = 0) -> str:
        """A prompt is made of ids, whatever is asked."""
        return question

    def apply_template(self, demo: Demonstration) -> tuple[str, int]:
        """The words of a demonstration, and where its answer begins."""
        return demo.text, 0

    def __call__(self, text: Sequence[str] = (), **kwargs: Any) -> BatchFeature:
        """Some words without an image, one row a text."""
        return self._inputs([[(None, self._parts[-1][1][:1])] for _ in text])

    def _inputs(self, rows: list[list[Part]], bos: list[int] | None = None) -> BatchFeature:
        """The backbone's inputs of rows that are equally long."""
        ids, images = [], []
        for row in rows:
            ids.append(list(self.bos if bos is None else bos))
            for image, words in row:
                ids[-1] += ([] if image is None else [self.image_id] * self.picture.tokens) + words
            images.append([self._pixels[image] for image, _ in row if image is not None])
        made: dict[str, Any] = {"input_ids": torch.tensor(ids)}
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        if self.picture.typed:
            made["mm_token_type_ids"] = (made["input_ids"] == self.image_id).int()
        if any(images):
            if self.picture.rows:
                made["pixel_values"] = torch.stack([torch.cat(row) for row in images])
            else:
                made["pixel_values"] = torch.cat([image for row in images for image in row])
            for name, value in self.picture.more.items():
                made[name] = torch.tensor([value for row in images for _ in row])
        return BatchFeature(made)
