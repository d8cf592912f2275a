"""Prompts in pieces, for the methods of `modeling_aim/baselines`: one prompt at a time, each with its own caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from ..baselines.methods import Baseline
from ..baselines.reading import Answering, CannotServe, Reading, check_backbone, check_cache
from ..processing_aim import TOKENIZING, AimProcessor
from .methods import Part, Prompt
from .task import Prediction


class Pieces:
    """The pieces of one prompt as a backbone takes them: demonstrations, and last the query.

    Args:
        processor: of the backbone.
        parts: of a plain prompt.
        images: of each part, opened.
    """

    def __init__(self, processor: AimProcessor, parts: Sequence[Part], images: Sequence[Sequence[Any]]) -> None:
        self.processor, self.parts, self.images = processor, list(parts), [list(row) for row in images]
        self._kept: dict[tuple[tuple[int, ...], bool], dict[str, Any]] = {}
        with TOKENIZING:
            self.head = len(processor.tokenizer("")["input_ids"])
        self.answer_lengths = [self._answer_length(part) for part in self.parts[:-1]]

    @classmethod
    def of(cls, processor: AimProcessor, prompt: Prompt, images: Sequence[Any]) -> Pieces:
        """Those of a prompt, with its images in their order; everything is encoded once, to find what cannot be."""
        remaining = iter(images)
        rows = [[next(remaining) for _ in part.images] for part in prompt.parts]
        pieces = cls(processor, prompt.parts, rows)
        pieces.encode(range(len(pieces.parts)), True)
        return pieces

    def _answer_length(self, part: Part) -> int:
        with TOKENIZING:
            tokens = self.processor.tokenizer(part.text, return_offsets_mapping=True)["offset_mapping"]
        return max(sum(end > part.answer_start for _, end in tokens), 1)

    def encode(self, numbers: Sequence[int], begins: bool) -> Mapping[str, Any]:
        """The backbone's inputs of some pieces that follow one another, with BOS where they begin a prompt.

        Raises:
            ValueError: the processor does not begin a prompt with what it gives for no text.
        """
        key = tuple(numbers), begins
        if key not in self._kept:
            text = "".join(self.parts[number].text for number in numbers)
            images = [image for number in numbers for image in self.images[number]]
            inputs: BatchFeature = self.processor(
                images=[images] if images else None, text=[text], return_tensors="pt"
            )
            inputs_of_rows = dict(inputs)
            length = inputs_of_rows["input_ids"].shape[1]
            if not begins and self.head:
                inputs_of_rows = {
                    n: v[:, self.head :] if _by_token(n, v, length) else v for n, v in inputs_of_rows.items()
                }
            self._kept[key] = inputs_of_rows
        return self._kept[key]

    def reading(self, backbone: Any, device: torch.device, dtype: torch.dtype) -> Reading:
        """For the methods."""

        def encode(numbers: Sequence[int], begins: bool) -> Mapping[str, Any]:
            return BatchFeature(dict(self.encode(numbers, begins))).to(device, dtype)

        return Reading(backbone, encode, len(self.parts) - 1, self.answer_lengths, self.head)


def _by_token(name: str, value: Any, length: int) -> bool:
    """Whether an input has one entry for each token."""
    return isinstance(value, torch.Tensor) and value.shape[:2] == (1, length) and not name.startswith("pixel")


@dataclass(frozen=True)
class BaselineAnswer:
    """The result of one prompt; times in milliseconds, `first` from the query on."""

    prediction: Prediction
    tokens: int
    kv_bytes: int
    reading: float
    first: float
    total: float


def answer(pieces: Pieces, prompt: Prompt, options: Sequence[str], new: int, subject: Any) -> BaselineAnswer:
    """Answer one prompt, greedily or by the likelihood of options.

    Args:
        pieces: of the prompt.
        prompt: the whole of it, with its method.
        options: to choose from; empty where the answer is written.
        new: most tokens of a written answer.
        subject: what answers.
    """
    now: Callable[[], float] = subject.now
    started = now()
    assert prompt.baseline is not None
    baseline, reading = prompt.baseline, pieces.reading(subject.backbone, subject.device, subject.model.dtype)
    ready = baseline(reading)
    read = now()
    answering = Answering(subject.backbone, ready())
    kv_bytes, tokens, first = answering.kv_bytes, answering.tokens, now()
    if options:
        behind = [subject.prompt_builder.option(prompt.text, option) for option in options]
        means = [_mean(answering.score(_ids_behind(pieces.processor, prompt.text, words))) for words in behind]
        scores = tuple(round(mean, 6) for mean in means)
        prediction = Prediction(options[max(range(len(scores)), key=means.__getitem__)], scores)
    else:
        ids = answering.write(new, *_ends(subject.backbone))
        prediction = Prediction(pieces.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    done = now()
    times = (1000 * (read - started), 1000 * (first - read), 1000 * (done - read))
    return BaselineAnswer(prediction, round(tokens), kv_bytes, *times)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ids_behind(processor: AimProcessor, prompt: str, option: str) -> list[int]:
    """The tokens of an option behind a prompt.

    Raises:
        ValueError: the tokenizer joins it with the prompt, or finds no token in it.
    """
    with TOKENIZING:
        own, both = (processor.tokenizer(text)["input_ids"] for text in (prompt, prompt + option))
    if both[: len(own)] != own or len(both) == len(own):
        raise ValueError(
            f"The tokenizer joins the option {option!r} with the end of the prompt {prompt[-20:]!r}, so it cannot "
            "stand behind KV. Begin options with a space, or choose another separator."
        )
    return both[len(own) :]


def _ends(backbone: Any) -> tuple[list[int], list[int]]:
    """Ids that end an answer, and ids that are not written."""
    config = backbone.generation_config
    ends = config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return ends, list(config.suppress_tokens or ())


# --- which backbones it serves

CLOSE = {torch.float32: 1e-3}  # of the logits' spread, between a prompt at once and in pieces; else `ROUGH`
ROUGH = 0.25


@torch.no_grad()
def refuses(baseline: Baseline, subject: Any) -> str:
    """Why a method cannot be run on a backbone; empty where it can. Found by trying a short prompt.

    The logits of a prompt that is read in pieces must be those of the whole prompt. A backbone fails that if it reads
    an image alone otherwise than among others, counts positions by its cache, or sees later tokens.
    """
    grey, black = (Image.new("RGB", (64, 64), (light,) * 3) for light in (127, 0))
    image = subject.processor.image_text
    parts = [Part(f"{image}This is {name}.\n", len(image)) for name in ("one", "two")]
    if subject.prompt_builder.prompts != "plain":
        return "demonstrations are cut out of a prompt, which a chat template does not allow: use prompts='plain'"
    try:
        check_backbone(subject.backbone)
        pieces = Pieces(subject.processor, [*parts, Part(f"{image}This is", 0)], [[grey], [black], [grey]])
        reading = pieces.reading(subject.backbone, subject.device, subject.model.dtype)
        if not bool(reading.context([0]).is_image.any()):
            return "its configuration names no token that stands for an image"
        if baseline.many_images and baseline.splits:
            whole = Answering(subject.backbone, [reading.whole()]).logits
            split = Answering(subject.backbone, [reading.behind(reading.context(reading.numbers))]).logits
            apart = float((whole - split).abs().max() / whole.std().clamp(min=1e-6))
            if not apart <= CLOSE.get(subject.model.dtype, ROUGH):
                return f"a prompt in two passes gives other logits than in one, by {apart:.2g} of their spread"
        answering = Answering(subject.backbone, baseline(reading)())
        answering.push([int(answering.logits.argmax())])
        for cache in answering.caches:
            check_cache(cache)
    except CannotServe as error:
        return str(error)
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return ""
