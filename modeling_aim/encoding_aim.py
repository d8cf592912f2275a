"""Demonstrations as the backbone reads them: taken from a chat, templated, tokenized with a mask of kept tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import RLock
from typing import Any

import torch
from transformers import BatchFeature

from .demonstrations_aim import Demonstration, Demos, Selection, kind_of
from .images_aim import ImageRules, block_images

UNKNOWN_IMAGE = 1024  # positions of an image whose number of tokens is not known before it is encoded
SENTINEL = "aimtextgoeshere"
TOKENIZING = RLock()  # a fast tokenizer keeps its padding as state and refuses two threads at once


class EncodingMixin:
    """What `AimProcessor` does with demonstrations; `self` is the processor."""

    def apply_template(self: Any, demonstration: Demonstration) -> tuple[str, int, int]:
        """The templated text of a demonstration, and where its answer starts and ends in it (in characters)."""
        text = demonstration.text
        if demonstration.question is not None:
            before, after = self.question_template.split("{answer}", 1)
            before = before.replace("{question}", demonstration.question)
        elif demonstration.is_label or self._is_bare_label(text):
            before, after = self.label_template.split("{label}", 1)
        else:
            before = after = ""
        return before + text + after, len(before), len(before) + len(text)

    def is_label(self: Any, demonstration: Demonstration) -> bool:
        """Whether the text of a demonstration is a bare name."""
        return demonstration.question is None and (demonstration.is_label or self._is_bare_label(demonstration.text))

    def query_text(self: Any, ids: Sequence[int]) -> str:
        """The text of a query, from the ids of its prompt without images, without what the chat template adds."""
        words = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        with TOKENIZING:
            frame = self.tokenizer(self.prompt(SENTINEL, images=0))["input_ids"]
        before, _, after = self.tokenizer.decode(frame, skip_special_tokens=True).partition(SENTINEL)
        return words.removeprefix(before.strip()).removesuffix(after.strip()).strip()

    def _is_bare_label(self: Any, text: str) -> bool:
        """Whether a text is a bare name: one or two words, no punctuation at the end, not yet in the label template.

        Only in ASCII: in other scripts a sentence may be one word, and `label=` marks a name.
        """
        worded = self.label_template.split("{label}", 1)[0].strip().lower()
        name = len(text.split()) <= 2 and text.isascii() and text[-1].isalnum()
        return name and not (worded and text.lower().startswith(worded))

    def why_unreadable(self: Any, demonstration: Demonstration, images: bool = True) -> str | None:
        """Why a backbone cannot read a demonstration, in a few words; `None` where it can.

        Args:
            demonstration: with open images.
            images: also ask the processor whether it takes images of their size, which costs most of the time.
        """
        words = self.apply_template(demonstration)[0]
        for token in {self._image_token, self.image_text.strip(), getattr(self.processor, "video_token", None)}:
            if isinstance(token, str) and token and token in words:
                return f"text that holds the placeholder {token}"
        try:
            if images:
                self.reading_lengths([demonstration])
        except Exception as error:  # of the backbone's processor, for an image of an extreme shape
            return f"image that the processor refuses ({type(error).__name__})"
        return None

    def check_readable(self: Any, demonstration: Demonstration, images: bool = True) -> None:
        """Raise ValueError where `why_unreadable` gives a reason."""
        reason = self.why_unreadable(demonstration, images)
        if reason is not None:
            raise ValueError(f"A demonstration cannot be read: {reason}. Its text is {demonstration.text!r:.80}.")

    def reading_lengths(self: Any, demonstrations: Sequence[Demonstration]) -> list[int]:
        """An estimate of the positions that each demonstration takes when it is read, rather too high than too low.

        A character counts as one position. An image counts what the backbone's processor expects for its size, or
        `UNKNOWN_IMAGE` where that is not known.
        """
        images = [image for demonstration in demonstrations for image in demonstration.images]
        counts = [UNKNOWN_IMAGE] * len(images)
        if images and hasattr(self.processor, "_get_num_multimodal_tokens"):
            sizes = [(image.height, image.width) for image in images]
            with suppress(TypeError):  # LLaVA's looks for a crop size, which SigLIP's image processor has not
                counts = self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens or counts
        remaining = iter(counts)
        return [len(self.apply_template(d)[0]) + sum(next(remaining) for _ in d.images) for d in demonstrations]

    def encode_demonstrations(
        self: Any, demonstrations: Sequence[Demonstration], read_span: str = "text"
    ) -> tuple[BatchFeature, torch.Tensor]:
        """Make one padded batch of demonstrations for the backbone to read.

        Args:
            demonstrations: all with images, or all without.
            read_span: which positions are kept: `"text"` or `"answer"`.

        Returns:
            The backbone's inputs, and a mask `(batch, length)` that is true at the positions to keep: words of the
            demonstration, without image positions, special tokens and padding.
        """
        prompts, spans = self._reading_prompts(demonstrations, read_span)
        inputs, mask = self.encode_spans([list(d.images) for d in demonstrations], prompts, spans)
        empty = [d.text for d, kept in zip(demonstrations, mask.any(dim=1).tolist(), strict=True) if not kept]
        if empty:
            raise ValueError(f"The tokenizer finds no token in the words of these demonstrations: {empty[:3]}.")
        return inputs, mask

    def _reading_prompts(
        self: Any, demonstrations: Sequence[Demonstration], read_span: str, images: bool = True
    ) -> tuple[list[str], list[tuple[int, int]]]:
        """The prompt of each demonstration when it is read, and the characters of it that are kept.

        Without `images`, the words alone are checked: the images have been read before, or are read elsewhere.
        """
        prompts, spans = [], []
        for demonstration in demonstrations:
            self.check_readable(demonstration, images)
            front = self.front(len(demonstration.images))
            words, *answer = self.apply_template(demonstration)
            prompts.append(front + words)
            start, end = answer if read_span == "answer" else (0, len(words))
            spans.append((len(front) + start, len(front) + end))
        return prompts, spans

    def kept_ids(self: Any, demonstrations: Sequence[Demonstration], read_span: str = "text") -> list[torch.Tensor]:
        """Ids `(tokens,)` of the words that are kept of each demonstration; images are not encoded."""
        prompts, spans = self._reading_prompts(demonstrations, read_span, images=False)
        plain = self._tokenized(prompts) if prompts else {"input_ids": []}
        kept = [self._kept_places(plain, row, span) for row, span in enumerate(spans)]
        return [torch.tensor(ids)[places] for ids, places in zip(plain["input_ids"], kept, strict=True)]

    def encode_spans(
        self: Any, images: Sequence[Sequence[Any]], prompts: Sequence[str], spans: Sequence[tuple[int, int]]
    ) -> tuple[BatchFeature, torch.Tensor]:
        """Make one padded batch of prompts, with a mask of the tokens of a part of each.

        Args:
            images: the images of each prompt, which has their placeholders.
            prompts: one a row.
            spans: first character of the part and the one after its last; it follows the last placeholder.

        Returns:
            The backbone's inputs, and a mask `(batch, length)` that is true at the tokens of the part.

        Raises:
            ValueError: the tokens of a part are not among those that the processor makes.
        """
        image_rows = [list(row) for row in images] if any(images) else None
        with TOKENIZING:
            inputs = self._encode(image_rows, list(prompts), padding=True, padding_side="left", return_tensors="pt")
        plain, ids = self._tokenized(prompts), inputs["input_ids"]
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        # The processor expands image placeholders, so count from the end. Some processors append tokens: shift left
        # until the ids match.
        for row, span in enumerate(spans):
            part = self._kept_places(plain, row, span)
            if not part:
                continue
            words = torch.tensor(plain["input_ids"][row])
            places = ids.shape[1] - len(words) + torch.tensor(part)
            shifts = (n for n in range(int(places[0]) + 1) if torch.equal(ids[row, places - n], words[part]))
            shift = next(shifts, None)
            if shift is None:
                raise ValueError(
                    f"The processor tokenizes {prompts[row]!r:.80} differently from its tokenizer, so the kept tokens "
                    "cannot be found. Load both from one repository: AutoProcessor.from_pretrained(BACKBONE)."
                )
            mask[row, places - shift] = True
        return inputs, mask

    def _tokenized(self: Any, prompts: Sequence[str]) -> Any:
        with TOKENIZING:
            return self.tokenizer(list(prompts), return_offsets_mapping=True, return_special_tokens_mask=True)

    @staticmethod
    def _kept_places(plain: Mapping[str, Any], row: int, span: tuple[int, int]) -> list[int]:
        """Positions of the tokens that lie in a span of characters, in a prompt whose images are not expanded."""
        tokens = zip(plain["offset_mapping"][row], plain["special_tokens_mask"][row], strict=True)
        start, end = span
        return [i for i, ((a, b), special) in enumerate(tokens) if b > start and a < end and b > a and not special]


def split_few_shot_chat(
    chat: Sequence[Mapping[str, Any]], rules: ImageRules | None = None
) -> tuple[list[Demonstration], list[Mapping[str, Any]]]:
    """Split a few-shot chat into demonstrations, with their images opened, and the chat that is to be answered.

    Returns:
        The demonstrations (none for an ordinary chat), and the system turns with the last user turn and, when the
        chat ends in one, the assistant turn it begins.
    """
    raw, rest = raw_few_shot_chat(chat)
    return [Demonstration.of(fields, rules) for fields in raw], rest


def raw_few_shot_chat(
    chat: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """The same as `split_few_shot_chat`, with raw demonstrations: no image is opened."""
    chat = list(chat)
    system = [turn for turn in chat if turn["role"] == "system"]
    turns = [turn for turn in chat if turn["role"] != "system"]
    last = len(turns) - 1 if turns and turns[-1]["role"] == "user" else len(turns) - 2
    earlier, query = turns[: max(last, 0)], turns[max(last, 0) :]
    users, answers = earlier[::2], earlier[1::2]
    few_shot = (
        len(users) == len(answers) > 0
        and query[0]["role"] == "user"
        and all(turn["role"] == "user" and _chat_images(turn) for turn in [*users, query[0]])
        and not any(map(_has_more, earlier))
        and all(turn["role"] == "assistant" and _chat_text(turn) and not _chat_images(turn) for turn in answers)
    )
    if not few_shot:
        return [], chat
    demonstrations = []
    for user, answer in zip(users, answers, strict=True):
        question = _chat_text(user)
        fields = {"question": question, "answer": _chat_text(answer)} if question else {"text": _chat_text(answer)}
        demonstrations.append({"images": _chat_images(user), **fields})
    return demonstrations, [*system, *query]


def _blocks(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = turn.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _has_more(turn: Mapping[str, Any]) -> bool:
    """Whether a turn has more than words and images, which a demonstration does not keep: a video, or tool calls."""
    blocks = _blocks(turn)
    return any(value for name, value in turn.items() if name not in ("role", "content")) or any(
        block["type"] != "text" and not block_images(block) for block in blocks
    )


def _chat_text(turn: Mapping[str, Any]) -> str:
    return " ".join(block["text"] for block in _blocks(turn) if block["type"] == "text").strip()


def _chat_images(turn: Mapping[str, Any]) -> list[Any]:
    return [image for block in _blocks(turn) for image in block_images(block)]


def with_selection(demos: Demos, shots: int | None, select: Selection) -> Any:
    """`demos` with `shots` and `select` bound to each bank in it; `demos` itself where both are `None`.

    Raises:
        ValueError: `demos` holds something else than banks, or an empty one.
    """
    if shots is None and select is None:
        return demos
    parts: list[Any] = list(demos) if isinstance(demos, (list, tuple)) else [demos]
    banks = [part for part in parts if part is not None]
    if not banks or any(kind_of(bank) != "bank" for bank in banks):
        count = len(parts) if parts and kind_of(parts[0]) == "demonstration" else 0
        described = f"a list of {count} demonstrations" if count else f"{demos!r:.80}"
        raise ValueError(
            f"shots={shots} and select={select!r} choose from a DemonstrationBank, but demos is {described}. "
            "Build one with DemonstrationBank.build(model, demos, folder)."
        )
    if any(not len(bank) for bank in banks):
        raise ValueError(
            f"shots={shots} and select={select!r} choose from a DemonstrationBank that is empty. Add demonstrations "
            "to it, or give no demos."
        )
    choices = [None if part is None else part.choice(shots, select) for part in parts]
    return choices if isinstance(demos, (list, tuple)) else choices[0]
