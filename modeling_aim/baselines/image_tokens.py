"""Image tokens of demonstrations leave a prompt on its way through the decoder: FastV and CATP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from ..backbone_aim import decoder_layers, image_positions
from .reading import Expert, Reading, Ready, checked_depth
from .watching import dropping


def fastv(reading: Reading, ratio: float = 0.5, depth: int = 2) -> Ready:
    """Image tokens of demonstrations leave behind layer K: those that get the least attention from the last token.

    FastV (arXiv 2403.06764), which has one image and drops of that; here the query's own images stay whole.

    Args:
        reading: the prompt.
        ratio: share of the demonstrations' image tokens that is dropped.
        depth: behind how many layers.

    Raises:
        ValueError: the backbone has not as many layers.
    """
    depth = checked_depth(reading, depth, "fastv")

    def answer() -> list[Expert]:
        expert = reading.whole()
        images = _demo_images(reading, expert)

        def choose(states: torch.Tensor, places: torch.Tensor, attention: Mapping[int, torch.Tensor]) -> torch.Tensor:
            return _best(attention[depth - 1].mean(0), images[places], 1 - ratio)

        return [replace(expert, during=partial(dropping, reading.backbone, {depth: choose}, [depth - 1]))]

    return answer


def catp(reading: Reading, ratio: float = 0.778, depth: int | None = None) -> Ready:
    """Image tokens of demonstrations leave in two stages: before the decoder, and behind a shallow layer.

    CATP (arXiv 2508.07871): first those that are diverse and fit the demonstration's words stay, then those to which
    the last token pays more attention from layer to layer and that resemble it; it also prunes the query's image. No
    code is published. Open are the weights of the terms, the layers, and how many leave at each stage: here terms
    are standardised and added, a quarter of the layers is shallow, both stages keep the same share, and the query's
    images stay whole.

    Args:
        reading: the prompt.
        ratio: share of the demonstrations' image tokens that is dropped, both stages together.
        depth: behind how many layers the second stage is; a quarter of them, and at least 2, when `None`.

    Raises:
        ValueError: the backbone has not as many layers.
    """
    layers = len(decoder_layers(reading.backbone))
    depth = checked_depth(reading, max(layers // 4, 2) if depth is None else depth, "catp", least=2)
    share, early = (1 - ratio) ** 0.5, depth // 2 - 1

    def answer() -> list[Expert]:
        expert = reading.whole()
        images = _demo_images(reading, expert)
        spans = _spans(reading)

        def first(states: torch.Tensor, places: torch.Tensor, attention: Any) -> torch.Tensor:
            kept = ~images
            for start, end in spans:
                own = images[start:end].nonzero()[:, 0] + start
                words = states[start:end][~images[start:end]].float().mean(0)
                kept[own[_diverse(states[own].float(), words, round(share * len(own)))]] = True
            return kept.nonzero()[:, 0]

        def second(states: torch.Tensor, places: torch.Tensor, attention: Mapping[int, torch.Tensor]) -> torch.Tensor:
            growth = attention[depth - 1].mean(0) - attention[early].mean(0)
            likeness = F.cosine_similarity(states.float(), states[-1:].float(), dim=-1)
            here = images[places]
            return _best(_standard(growth, here) + _standard(likeness, here), here, share)

        stages = {0: first, depth: second}
        return [replace(expert, during=partial(dropping, reading.backbone, stages, [early, depth - 1]))]

    return answer


def _spans(reading: Reading) -> list[tuple[int, int]]:
    """The positions of each demonstration in the whole prompt."""
    lengths = [reading.encode([number], False)["input_ids"].shape[1] for number in reading.numbers]
    ends = torch.tensor([reading.head, *lengths]).cumsum(0).tolist()
    return list(pairwise(ends))


def _demo_images(reading: Reading, expert: Expert) -> torch.Tensor:
    """Which tokens of the whole prompt are of demonstrations' images, `(length,)`."""
    ids = expert.inputs["input_ids"][0]
    is_image = image_positions(reading.backbone.config, ids)
    is_image[len(ids) - reading.encode([reading.count], False)["input_ids"].shape[1] :] = False
    return is_image


def _best(scores: torch.Tensor, of: torch.Tensor, share: float) -> torch.Tensor:
    """Indices of all tokens but those `of` which only a share stays, by its scores."""
    count = round(share * int(of.sum()))
    kept = ~of
    kept[scores.float().masked_fill(~of, -torch.inf).topk(count).indices] = True
    return kept.nonzero()[:, 0]


def _standard(values: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Values with mean 0 and deviation 1 among some."""
    own = values[of].float()
    return (values.float() - own.mean()) / own.std().clamp(min=1e-6) if len(own) > 1 else values.float()


def _diverse(states: torch.Tensor, words: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens that are far from one another and like the words, one after another."""
    states = F.normalize(states, dim=-1)
    fit, far = states @ F.normalize(words, dim=0), torch.full((len(states),), 2.0)
    far = far.to(states.device)
    chosen: list[int] = []
    for _ in range(count):
        score = fit + far
        score[chosen] = -torch.inf
        chosen.append(int(score.argmax()))
        far = torch.minimum(far, 1 - states @ states[chosen[-1]])
    return torch.tensor(chosen, dtype=torch.long, device=states.device)
