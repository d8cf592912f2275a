"""The methods, each a short function with its paper. A new one is a function, a line of `BASELINES`, and what it costs
(`speed/baselines.py`).

A method gets the pieces of a prompt (`Reading`) and its settings. It does what can be done before the query is known,
and returns what is left to do then: a call that gives what answers, one expert or several. All of them work on the
backbone's own KV in ordinary caches, so their cost is that of these caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

from ..backbone_aim import decoder_layers
from ..reading_aim import layer_input
from .image_tokens import catp, fastv
from .kv_rows import emloc, snapkv
from .reading import Context, Expert, Reading, Ready, SeenError, forward, joined
from .task_vectors import task_vector


def prefix_kv(reading: Reading) -> Ready:
    """The exact KV of all demonstrations, read together. Its answers are those of `full`."""
    context = reading.context(reading.numbers)
    return lambda: [reading.behind(context)]


def text_kv(reading: Reading, ratio: float = 1.0) -> Ready:
    """Demonstrations read one by one; KV of their words side by side, at the positions where they were read.

    After MPIC (arXiv 2502.01960) and APE (arXiv 2502.05431), which join KV that was computed apart; without APE's
    temperature and scale. Positions overlap, and the query continues after the longest demonstration.

    Args:
        reading: the prompt.
        ratio: share of the image tokens that is dropped, evenly.
    """
    if not reading.count:
        return prefix_kv(reading)
    read = reading.alone()
    parts = [part.keep(_thinned(part, ratio, part.head if number else 0)) for number, part in enumerate(read)]
    ids, places, is_image = (torch.cat([getattr(x, n) for x in read], -1) for n in ("ids", "places", "is_image"))
    context = Context(joined([part.cache for part in parts]), ids, places, is_image, read[0].head)
    return lambda: [reading.behind(context)]


def text_kv_together(reading: Reading, ratio: float = 1.0) -> Ready:
    """Demonstrations read together; then KV of image tokens is dropped, and all else stays at its position.

    What TGV-KV (arXiv 2606.03075) and LOOK-M (arXiv 2406.18139), which prefer words to image tokens, come to where no
    image token is kept.

    Args:
        reading: the prompt.
        ratio: share of the image tokens that is dropped, evenly.
    """
    context = reading.context(reading.numbers)
    context = context.keep(_thinned(context, ratio))
    return lambda: [reading.behind(context)]


def _thinned(context: Context, ratio: float, start: int = 0) -> torch.Tensor:
    """Rows from `start` on without a share of the image tokens, evenly."""
    images = context.is_image.nonzero()[:, 0]
    words = (~context.is_image).nonzero()[:, 0]
    count = round(len(images) * (1 - ratio))
    kept = images[[i * len(images) // max(count, 1) for i in range(count)]]
    return torch.cat([kept, words[words >= start]])


def parallel_icl(reading: Reading, chunks: int = 4, by: str = "likeness", temperature: float = 1.0) -> Ready:
    """Chunks of demonstrations in parallel; a weighted product of experts on the logits.

    Parallel-ICL (arXiv 2603.16092) clusters demonstrations into chunks and weights a chunk by its similarity to the
    query; no code is published. Open are the features and the clustering: here a feature is the mean of what enters
    the decoder for a piece, similar demonstrations are cut into chunks of one size, and weights are a softmax of
    cosines.

    Args:
        reading: the prompt.
        chunks: how many, at most one a demonstration.
        by: `likeness`; or `order`: chunks as the demonstrations come, all with one weight.
        temperature: of the softmax.

    Raises:
        ValueError: `by` is unknown.
    """
    if by not in ("likeness", "order"):
        raise ValueError(f"parallel-icl:by={by}: expected likeness or order.")
    numbers, count = reading.numbers, max(min(chunks, reading.count), 1)
    like = by == "likeness" and count > 1
    features = [_feature(reading, number) for number in numbers] if like else []
    if like:
        numbers = _by_likeness(torch.stack(features))
    parts = [sorted(part.tolist()) for part in torch.tensor(numbers).tensor_split(count)]
    contexts = [reading.context(part) for part in parts]

    def answer() -> list[Expert]:
        weights = torch.full((count,), 1 / count)
        if like:
            query, means = (
                _feature(reading, reading.count),
                [torch.stack([features[i] for i in p]).mean(0) for p in parts],
            )
            cosines = torch.stack([F.cosine_similarity(mean, query, dim=0) for mean in means])
            weights = (cosines / temperature).softmax(0)
        return [reading.behind(*pair) for pair in zip(contexts, weights.tolist(), strict=True)]

    return answer


def _feature(reading: Reading, number: int) -> torch.Tensor:
    """Mean of what enters the decoder for a piece, its images among it."""
    inputs, states = dict(reading.encode([number], True)), []

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        states.append(layer_input(args, kwargs)[1][0].float().mean(0))
        raise SeenError

    hook = decoder_layers(reading.backbone)[0].register_forward_pre_hook(see, with_kwargs=True)
    try:
        with suppress(SeenError):
            forward(reading.backbone, inputs, reading.places(inputs, 0), DynamicCache())
    finally:
        hook.remove()
    return states[0]


def _by_likeness(features: torch.Tensor) -> list[int]:
    """An order in which each is followed by the most similar one that is left."""
    features = F.normalize(features, dim=-1)
    order, left = [0], set(range(1, len(features)))
    while left:
        order.append(max(left, key=lambda i: float(features[order[-1]] @ features[i])))
        left.remove(order[-1])
    return order


# --- their names


@dataclass(frozen=True)
class Baseline:
    """A method as a value.

    Args:
        make: the function.
        many_images: it puts several images into one prompt.
        splits: the query is answered after KV that was kept; refused where a prompt in two passes has other logits.
        whole: all demonstrations are in one prompt, whose length is checked against the backbone's positions.
        settings: its settings; the function's own defaults where one is not given.
    """

    make: Callable[..., Ready]
    many_images: bool = True
    splits: bool = True
    whole: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, reading: Reading) -> Ready:
        """What is left to do when the query comes, after all that can be done before."""
        return self.make(reading, **self.settings)


BASELINES: dict[str, Baseline] = {
    "prefix-kv": Baseline(prefix_kv),
    "text-kv": Baseline(text_kv, many_images=False, whole=False),
    "text-kv-together": Baseline(text_kv_together),
    "parallel-icl": Baseline(parallel_icl, whole=False),
    "fastv": Baseline(fastv, splits=False),
    "catp": Baseline(catp, splits=False),
    "snapkv": Baseline(snapkv),
    "emloc": Baseline(emloc),
    "task-vector": Baseline(task_vector, splits=False),
}


def baseline_of(name: str) -> Baseline:
    """A method by its name with its settings, as in `snapkv:ratio=.5:window=16`.

    Raises:
        ValueError: there is no such method, or it has no such setting, or that has another type or bounds.
    """
    plain, *setting_parts = name.split(":")
    if plain not in BASELINES:
        raise ValueError(f"There is no method {plain}; choose of {', '.join(BASELINES)}.")
    baseline = BASELINES[plain]
    known = {n: p.default for n, p in inspect.signature(baseline.make).parameters.items() if n != "reading"}
    settings: dict[str, Any] = {}
    for part in setting_parts:
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            has = ", ".join(f"{n}={v}" for n, v in known.items()) or "none"
            raise ValueError(f"Method {name!r}: {part!r} is not a setting of {plain}; it has {has}.")
        settings[key] = _setting(name, key, value, known[key])
    return replace(baseline, settings=settings)


def _setting(name: str, key: str, value: str, default: Any) -> Any:
    """A setting as its default's type (of a bool `true` or `false`); depths without a default are whole numbers."""
    kind = int if default is None else type(default)
    if kind is bool:
        if value not in ("true", "false"):
            raise ValueError(f"Method {name!r}: {key}={value}, expected true or false.")
        return value == "true"
    try:
        number = kind(value)
    except ValueError as error:
        raise ValueError(f"Method {name!r}: {key}={value}, expected {kind.__name__}.") from error
    if (
        (key == "ratio" and not 0 <= number <= 1)
        or (kind is int and number < 1)
        or (kind is float and not number >= 0)
    ):
        expected = "0 to 1" if key == "ratio" else "1 or more" if kind is int else "0 or more"
        raise ValueError(f"Method {name!r}: {key}={value}, expected {expected}.")
    if (key == "temperature" and not number > 0) or (key == "kernel" and number % 2 == 0):
        raise ValueError(f"Method {name!r}: {key}={value}, expected {'above 0' if key == 'temperature' else 'odd'}.")
    return number
