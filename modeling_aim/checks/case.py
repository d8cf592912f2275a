"""What the properties of `aim check` are made of: a case to try, how close is close enough, and the register."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from .. import AimForConditionalGeneration, AimProcessor, FusedDemonstrations
from ..demonstrations_aim import Demos

NEW = 5  # new tokens of a test answer
QUESTION = "What is this?"
LONG_QUESTION = "Which of the names that you were told goes with this?"

# How far two ways of computing the same may differ, measured as |found - expected| / |expected|, in units of
# `torch.finfo(dtype).eps`. In low precision each result is rounded; on all families of the tests up to 6 eps were
# seen, and up to 22 in float32, whose sums round too.
ROUNDINGS = {torch.bfloat16: 16, torch.float16: 16, torch.float32: 2**10, torch.float64: 2**10}
TF32_EPS = 2.0**-10  # in which a GPU may compute float32
MASKED = float(torch.finfo(torch.float16).min)  # what is not above it is not a logit, in any precision


class NotApplicable(Exception):
    """The backbone itself does not do what a property is about."""


def require(condition: object, sentence: str) -> None:
    """Raise `AssertionError` with `sentence` unless `condition` holds, also under `python -O`."""
    if not condition:
        raise AssertionError(sentence)


# --- the register


@dataclass(frozen=True)
class Property:
    """Something that holds on every backbone that AIM works with.

    Args:
        name: short name.
        sentence: the line a user reads.
        check: takes a `Case` and raises where the property does not hold, `NotApplicable` where the backbone itself
            does not do what it is about.
    """

    name: str
    sentence: str
    check: Callable[[Case], None]

    def __call__(self, case: Case) -> None:
        self.check(case)


PROPERTIES: dict[str, Property] = {}


def holds(sentence: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a function as the property that `sentence` states."""

    def register(check: Callable[[Case], None]) -> Callable[[Case], None]:
        PROPERTIES[check.__name__] = Property(check.__name__, sentence, check)
        return check

    return register


# --- a case


def noise(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """An image of coloured noise, the same for the same seed."""
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@dataclass(frozen=True)
class Answer:
    """New tokens, and what they were chosen by.

    Args:
        ids: new tokens `(rows, length)`.
        logits: of each step, `(rows, vocabulary)`; with beams those of the first step alone can be compared.
        scores: with beams, the mean log-likelihood of each sequence `(rows,)`.
    """

    ids: torch.Tensor
    logits: tuple[torch.Tensor, ...]
    scores: torch.Tensor | None = None


@dataclass
class Case:
    """A model with demonstrations and a query to try it on."""

    model: AimForConditionalGeneration
    demos: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"image": noise(1), "label": "dax"},
            {"image": noise(2, 60, 120), "question": QUESTION, "answer": "It is a small wug."},
            {"image": noise(3, 130, 50), "text": "Here we see a blicket."},
        ]
    )

    @property
    def processor(self) -> AimProcessor:
        """The model's processor."""
        return self.model.processor

    @cached_property
    def tolerance(self) -> float:
        """How far two ways of computing the same may differ, relative to their size; see `ROUNDINGS`."""
        dtypes = [self.model.dtype]
        quantization = getattr(self.model.backbone.config, "quantization_config", None)
        compute = getattr(quantization, "bnb_4bit_compute_dtype", None)
        dtypes += [compute] if isinstance(compute, torch.dtype) else []
        tolerances = [ROUNDINGS[dtype] * torch.finfo(dtype).eps for dtype in dtypes]
        if self.model.device.type == "cuda":
            tolerances.append(ROUNDINGS[torch.float16] * TF32_EPS)
        return max(tolerances)

    @cached_property
    def fused(self) -> FusedDemonstrations:
        """The demonstrations, read once for all properties that are not about reading."""
        return self.model.read(self.demos)

    def query(self, *questions: str, images: int = 1) -> Any:
        """Inputs of one query, or of a padded batch of them, with `images` images each."""
        questions = questions or (QUESTION,)
        pictures = [[noise(10 * (row + 1) + i) for i in range(images)] for row in range(len(questions))]
        return self.processor(
            images=pictures if images else None,
            text=[self.processor.prompt(question, images=images) for question in questions],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)

    def answer(self, inputs: Mapping[str, Any], demos: Demos = None, **options: Any) -> torch.Tensor:
        """New tokens of a greedy answer, as many in each row."""
        return self.answered(inputs, demos, **options).ids

    def answered(self, inputs: Mapping[str, Any], demos: Demos = None, **options: Any) -> Answer:
        """A greedy answer with its logits, as many new tokens in each row."""
        return self._answered(self.model, inputs, {"demos": demos, **options})

    def answered_alone(self, inputs: Mapping[str, Any], **options: Any) -> Answer:
        """The same of the backbone itself, without AIM."""
        return self._answered(self.model.backbone, inputs, options)

    def _answered(self, model: Any, inputs: Mapping[str, Any], options: dict[str, Any]) -> Answer:
        options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        options |= {"output_scores": True} if options.get("num_beams", 1) > 1 else {}  # else beams have no scores
        output, length = model.generate(**inputs, **options), inputs["input_ids"].shape[1]
        if model is self.model:
            queries = inputs["input_ids"].repeat_interleave(len(output.sequences) // len(inputs["input_ids"]), 0)
            require(torch.equal(output.sequences[:, :length], queries), "the query's ids are lost")
        return Answer(output.sequences[:, length:], output.logits, getattr(output, "sequences_scores", None))

    def logits(self, inputs: Mapping[str, Any], demos: Demos = None) -> torch.Tensor:
        """Logits at the last position of each query, `(batch, vocabulary)`."""
        with torch.no_grad():
            return self.model(**inputs, demos=demos).logits[:, -1].float()

    def require_close(
        self, actual: torch.Tensor, expected: torch.Tensor, alone: Callable[[], float] | None = None
    ) -> None:
        """Require equality within `tolerance`, where the backbone itself keeps to it.

        Args:
            actual: rows of numbers.
            expected: the same, computed in another order.
            alone: measures how far the backbone itself, without AIM, goes when its inputs are rounded once more. It is
                called where the two differ by more than `tolerance`; see `alone.py`.

        Raises:
            AssertionError: they differ by more than `tolerance` and than the backbone itself, or are no numbers.
            NotApplicable: they differ by more than `tolerance`, but by no more than the backbone itself.
        """
        gap = difference(actual, expected)
        if gap <= self.tolerance:
            return
        measured, own = f"they differ by {gap:.1e} of their size; rounding is {self.tolerance:.1e}", 0.0
        if alone is not None:
            own, precision = alone(), str(self.model.dtype).removeprefix("torch.")
            measured += f"; inputs rounded once more in {precision} change the backbone alone by {own:.1e}"
        require(gap <= own < float("inf"), measured)
        raise NotApplicable(measured)

    def require_same(self, actual: Answer, expected: Answer) -> None:
        """Require the same answer; see `why_other`."""
        reason = self.why_other(actual, expected)
        require(reason is None, f"the answers differ: {reason}")

    def why_other(self, actual: Answer, expected: Answer) -> str | None:
        """In what two answers differ by more than rounding, `None` where they do not.

        Logits are compared at each step, as far as the tokens before it are the same. Where rows go apart, the token
        that was chosen must be within rounding of the other one; beams, where their scores are.
        """
        if actual.ids.shape != expected.ids.shape:
            return f"they have the shapes {tuple(actual.ids.shape)} and {tuple(expected.ids.shape)}"
        if expected.scores is not None and actual.scores is not None:
            return self._why_other_beams(actual, expected, (actual.scores - expected.scores).abs())
        together = torch.ones(len(actual.ids), dtype=torch.bool, device=actual.ids.device)
        for step, (ours, theirs) in enumerate(zip(actual.logits, expected.logits, strict=True)):
            rows = together.nonzero()[:, 0]
            if not len(rows):
                break
            ours, theirs = ours[rows.to(ours.device)].float(), theirs[rows.to(theirs.device)].float()
            gap = difference(ours, theirs)
            if not gap <= self.tolerance:
                return f"at step {step} the logits differ by {gap:.1e} of their size"
            our_ids, their_ids = (ids[rows, step, None].to(theirs.device) for ids in (actual.ids, expected.ids))
            lead = (theirs.gather(1, their_ids) - theirs.gather(1, our_ids)).abs()[:, 0]
            if not bool((lead <= self.tolerance * size_of(theirs)).all()):
                return f"at step {step} another token is chosen, whose logit is lower by {float(lead.max()):.1e}"
            together[rows] = actual.ids[rows, step] == expected.ids[rows, step]
        return None

    def _why_other_beams(self, actual: Answer, expected: Answer, apart: torch.Tensor) -> str | None:
        gap = difference(actual.logits[0].float(), expected.logits[0].float())
        if not gap <= self.tolerance:
            return f"at the first step the logits differ by {gap:.1e} of their size"
        rows = (actual.ids != expected.ids).any(dim=1)
        lead = apart[rows.to(apart.device)]
        size = float(size_of(expected.logits[0].float()).max())
        if not bool((lead <= self.tolerance * size).all()):
            return f"other beams are returned, whose scores differ by {float(lead.max()):.1e}"
        return None


def size_of(values: torch.Tensor) -> torch.Tensor:
    """The size of each row: its largest deviation from the mean; what a model has masked out does not count."""
    values = values.float()
    there = values > MASKED
    mean = torch.where(there, values, 0.0).sum(dim=-1, keepdim=True) / there.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(there, values - mean, 0.0).abs().amax(dim=-1)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest |found - expected| / |expected| of the rows; infinite where one is masked alone, or no number."""
    actual, expected = actual.float(), expected.float().to(actual.device)
    there = expected > MASKED
    if bool((actual.isnan() | expected.isnan()).any()) or not torch.equal(there, actual > MASKED):
        return float("inf")
    actual, expected = torch.where(there, actual, 0.0), torch.where(there, expected, 0.0)
    size = expected.norm(dim=-1)
    if not size.numel():
        return 0.0
    floor = max(1e-6 * float(size.max()), torch.finfo(torch.float32).tiny)
    return float(((actual - expected).norm(dim=-1) / size.clamp(min=floor)).max())
