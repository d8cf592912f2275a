"""The demonstrations of a request: earlier turns of its chat, read once and cached, and those of a bank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from ..backbone_aim import longest_prompt
from ..cache_aim import LRUCache
from ..demonstrations_aim import Demonstration, FusedDemonstrations, concatenated
from ..encoding_aim import raw_few_shot_chat
from ..images_aim import open_image
from .requests import IMAGES_AT_ONCE, ChatRequest, Refused

if TYPE_CHECKING:
    from .. import AimForConditionalGeneration
    from ..bank import DemonstrationBank

CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Prompt:
    """What is given to `generate`, and what its demonstrations cost.

    Args:
        inputs: the backbone's inputs of the query, and `demos` where there are some.
        demonstrations: how many there are.
        fused: their tokens.
        cached: their tokens that were read before this request.
        read: how many were read for this request.
        saved: tokens of their images, which are not in the prompt; `None` where the processor does not count them.
    """

    inputs: dict[str, Any]
    demonstrations: int = 0
    fused: int = 0
    cached: int = 0
    read: int = 0
    saved: int | None = 0

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, fused ones included."""
        return int(self.inputs["input_ids"].shape[-1]) + self.fused


@dataclass(frozen=True)
class ReadOnce:
    """One demonstration that was read: its fused tokens, and the tokens of its images in a full prompt."""

    fused: FusedDemonstrations
    image_tokens: int | None


class PromptBuilder:
    """Makes prompts for one model; its calls do not overlap.

    Args:
        model: the plug-in, with its processor.
        banks: banks by name.
    """

    def __init__(self, model: AimForConditionalGeneration, banks: Mapping[str, DemonstrationBank]) -> None:
        self.model, self.processor, self.banks = model, model.processor, dict(banks)
        self.cache = LRUCache(CACHE_BYTES)
        self._whole: dict[str, Any] = {}

    @torch.no_grad()
    def build(self, request: ChatRequest) -> Prompt:
        """Open the images of a request, read the demonstrations that are new, and encode the query.

        Raises:
            Refused: an image cannot be opened, or the prompt is too long.
            ValueError: something else in the request is of no use; the message says what.
        """
        raw, rest = raw_few_shot_chat(request.messages)
        image_count = sum(part["type"] == "image_url" for turn in rest for part in turn["content"])
        if image_count > IMAGES_AT_ONCE:
            raise Refused(
                f"{image_count} images are in the prompt; this server takes {IMAGES_AT_ONCE}. Pairs of an image and "
                "its answer, before a last message with an image, are demonstrations and stand outside of it."
            )
        chat = [{**turn, "content": [self._opened(part) for part in turn["content"]]} for turn in rest]
        inputs = self._encoded(chat)
        of_bank = None if request.demos is None else self._of_bank(request.demos, request, inputs)
        of_chat = self._of_chat(raw)
        parts = [] if of_bank is None else [getattr(of_bank, "fused", of_bank)]
        parts += [read_demo.fused for read_demo, _ in of_chat]
        if not parts:
            return self._checked(Prompt(inputs))
        fused = concatenated(parts)
        inputs["demos"] = of_bank if of_bank is not None and not of_chat else fused
        sizes = [part["image"].size for turn in chat for part in turn["content"] if part["type"] == "image"]
        saved = [read_demo.image_tokens for read_demo, _ in of_chat]
        if of_bank is not None:  # a bank does not know how large its images were: as large as the query's
            saved += [self._image_tokens(sizes[:1]) if sizes else None] * len(of_bank)
        read = [read_demo.fused.num_tokens for read_demo, new in of_chat if new]
        total = None if None in saved else sum(count for count in saved if count is not None)
        return self._checked(
            Prompt(inputs, len(fused), fused.num_tokens, fused.num_tokens - sum(read), len(read), total)
        )

    def _opened(self, part: Mapping[str, Any]) -> Mapping[str, Any]:
        """A part of a message, with its image opened."""
        if part["type"] != "image_url":
            return part
        try:
            return {"type": "image", "image": open_image(part["image_url"]["url"], self.processor.image_rules)}
        except ValueError as error:
            raise unreadable(error) from error

    def _encoded(self, chat: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The backbone's inputs of a chat whose images are open."""
        try:
            inputs = self.processor.apply_chat_template(
                chat,
                few_shot_chats=False,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except TemplateError as error:
            raise Refused(f"The model's chat template does not take these messages: {error}.") from error
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _of_chat(self, raw: Sequence[Mapping[str, Any]]) -> list[tuple[ReadOnce, bool]]:
        """Earlier turns as they were read, and whether each was read now; equal ones are read once."""
        keys = [_key(fields) for fields in raw]
        kept = {key: self.cache.get(key) for key in keys}
        new = [key for key, read_demo in kept.items() if read_demo is None]
        by_key = dict(zip(keys, raw, strict=True))
        for some in _groups(new, [len(by_key[key]["images"]) for key in new]):
            for key, read_demo in zip(some, self._read([by_key[key] for key in some]), strict=True):
                kept[key] = read_demo
                if _is_content(by_key[key]):
                    vectors = read_demo.fused.vectors
                    self.cache.put(key, read_demo, vectors.numel() * vectors.element_size())
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        return [(kept[key], key in new and first[key] == place) for place, key in enumerate(keys)]

    def _read(self, raw: Sequence[Mapping[str, Any]]) -> list[ReadOnce]:
        """Open and read demonstrations."""
        try:
            demos = [Demonstration.of(fields, self.processor.image_rules) for fields in raw]
        except ValueError as error:
            raise unreadable(error) from error
        read = self.model.read(demos)
        return [
            ReadOnce(read[place], self._image_tokens([image.size for image in demo.images]))
            for place, demo in enumerate(demos)
        ]

    def _of_bank(self, name: str, request: ChatRequest, inputs: Mapping[str, Any]) -> Any:
        """Demonstrations of a bank: those selected for the query; or all, with the KV of their prefix."""
        bank, longest = self.banks[name], longest_prompt(self.model.backbone.config)
        if request.shots is None and request.select is None:
            if name not in self._whole:
                self._whole[name] = self.model.prefill(bank)
            return self._whole[name]
        by = request.select.get("by") if isinstance(request.select, Mapping) else request.select
        listed = len(by) if isinstance(by, list) else 8
        shots = listed if request.shots is None else request.shots
        if longest is not None and shots > longest:
            raise Refused(f"shots={shots}: the model has {longest} positions, and each demonstration needs some.")
        try:
            return bank.select_rows(self.model, inputs, shots, request.select)[0]
        except (TypeError, KeyError, IndexError) as error:
            raise Refused(f"select={request.select!r:.60} cannot be used ({type(error).__name__}).") from error

    def _image_tokens(self, sizes: Sequence[tuple[int, int]]) -> int | None:
        """Tokens of images `(width, height)` in a prompt; `None` where the processor does not count them."""
        if not sizes:
            return 0
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)  # what vLLM asks of a processor, too
        if count is None:
            return None
        counted = count(image_sizes=[(height, width) for width, height in sizes]).num_image_tokens
        return None if counted is None else sum(counted)

    def _checked(self, prompt: Prompt) -> Prompt:
        """Raise `Refused` for a prompt that leaves no room for an answer."""
        longest = longest_prompt(self.model.backbone.config)
        if longest is not None and prompt.tokens >= longest:
            of_them = f", {prompt.fused} of them of {prompt.demonstrations} demonstrations" if prompt.fused else ""
            raise Refused(
                f"The prompt has {prompt.tokens} tokens{of_them}, but the model has {longest} positions, of which the "
                "answer needs some: send fewer demonstrations or images."
            )
        return prompt

    def room(self, prompt: Prompt) -> int | None:
        """New tokens that fit behind a prompt; `None` where the backbone has no bound."""
        longest = longest_prompt(self.model.backbone.config)
        return None if longest is None else longest - prompt.tokens


def unreadable(error: ValueError) -> Refused:
    """The error that a client gets for an image that cannot be opened: the reason, without the image."""
    cause = error.__cause__
    if cause is None:
        return Refused(str(error))
    reason = str(cause) if type(cause) is ValueError else "it is not an image file, or it is damaged"
    return Refused(f"An image of the request cannot be read: {reason}.")


def _groups(keys: Sequence[str], images: Sequence[int]) -> list[list[str]]:
    """Keys in groups that have at most `IMAGES_AT_ONCE` images together."""
    groups: list[list[str]] = []
    count = 0
    for key, more in zip(keys, images, strict=True):
        count += more
        if not groups or count > IMAGES_AT_ONCE:
            groups.append([])
            count = more
        groups[-1].append(key)
    return groups


def _key(fields: Mapping[str, Any]) -> str:
    """Identity of a demonstration as a client sent it."""
    return hashlib.sha256(json.dumps(dict(fields), sort_keys=True).encode()).hexdigest()


def _is_content(fields: Mapping[str, Any]) -> bool:
    """Whether the images of a demonstration are in the request, so that their text says what they are."""
    return all(image.startswith("data:") for image in fields["images"])
