"""KV rows of demonstrations are dropped by the attention that they get: SnapKV and EMLoC."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from ..backbone_aim import decoder_layers
from .reading import Context, Reading, Ready, copied, forward, layers_of
from .watching import watched_attention


def snapkv(reading: Reading, ratio: float = 0.5, window: int = 32, kernel: int = 5) -> Ready:
    """KV rows that the last tokens of the demonstrations attend to the least are dropped, head by head.

    SnapKV (arXiv 2404.14469), as kvpress has it: the window is the end of the context, and the query comes to what was
    kept. kvpress itself needs transformers before 5.3 (its 0.5.5), and this package needs 5.5.

    Args:
        reading: the prompt.
        ratio: share of the rows that is dropped.
        window: last tokens that look, and stay.
        kernel: width over which scores are averaged; odd.
    """
    with watched_attention(reading.backbone, window) as seen:
        context = reading.context(reading.numbers)
    heads = [layer.keys.shape[1] for layer in layers_of(context.cache)]
    rows = [
        _snapped(seen[i], kv, int(seen[i].shape[-1] * (1 - ratio)), kernel) for i, kv in enumerate(heads) if i in seen
    ]
    context = context.keep(rows) if rows else context
    return lambda: [reading.behind(context)]


def _snapped(weights: torch.Tensor, heads: int, count: int, kernel: int) -> torch.Tensor:
    """Rows that each KV head keeps, of attention `(heads, window, rows)` of the last tokens."""
    window = weights.shape[1]
    scores = _pooled(weights.float().mean(1)[:, :-window], heads, kernel)
    top = float(scores.max()) + 1 if scores.numel() else 1.0
    return F.pad(scores, (0, window), value=top).topk(count, dim=-1).indices


def _pooled(scores: torch.Tensor, heads: int, kernel: int) -> torch.Tensor:
    """Scores `(heads, rows)` smoothed along the rows, mean over the heads that share KV."""
    if scores.shape[-1]:
        scores = F.avg_pool1d(scores[None], kernel, stride=1, padding=kernel // 2)[0]
    return scores.unflatten(0, (heads, -1)).mean(1)


def emloc(reading: Reading, chunk: int = 5, delta: float = 0.005) -> Ready:
    """Chunks of demonstrations, one behind another; each layer keeps as few rows of a chunk as the answers allow.

    EMLoC (arXiv 2505.19812), after its code for Qwen2-VL: a chunk is shown once more behind itself; rows that the
    answers in it attend to the least leave, layer by layer from the last one, down to a tenth, a fifth or a half, as
    long as the Jensen-Shannon divergence of the answers' tokens stays within a bound. The answers' own rows stay.

    Args:
        reading: the prompt.
        chunk: demonstrations in one.
        delta: the bound; with 0 everything is kept.
    """
    context: Context | None = None
    for start in range(0, reading.count, chunk):
        context = _pruned(reading, reading.numbers[start : start + chunk], context, delta)
    whole = reading.context([]) if context is None else context
    return lambda: [reading.behind(whole)]


KEPT = (0.1, 0.2, 0.5)


def _pruned(reading: Reading, part: Sequence[int], past: Context | None, delta: float) -> Context:
    """A chunk behind others, with as few rows in each layer as the bound allows."""
    before = [0] * len(decoder_layers(reading.backbone)) if past is None else _lengths(past.cache)
    full = reading.context(part, past)
    if delta <= 0:
        return full
    inputs = dict(reading.encode(part, False))
    places = reading.places(inputs, full.next_place)
    answers = _answers(reading, part).to(places.device)
    length = inputs["input_ids"].shape[1]

    def answer_log_probabilities(context: Context) -> torch.Tensor:
        logits = forward(reading.backbone, inputs, places, copied(context.cache), logits=length)
        return logits[0, answers].float().log_softmax(-1)

    with watched_attention(reading.backbone, length) as seen:
        wanted = answer_log_probabilities(full)
    rows: list[torch.Tensor] = [torch.arange(n, device=places.device) for n in _lengths(full.cache)]
    mine = answers + reading.head if past is None else answers
    for number in reversed(range(len(rows))):
        heads = layers_of(full.cache)[number].keys.shape[1]
        scores = seen[number][:, answers, before[number] : -length].float().sum(1)
        scores = _pooled(scores, heads, 5)
        scores[:, mine] = torch.inf
        for share in KEPT:
            best = scores.topk(max(int(share * scores.shape[-1]), 1), dim=-1).indices + before[number]
            old = rows[number][: before[number]].expand(heads, -1)
            trial = [*rows[:number], torch.cat([old, best], -1), *rows[number + 1 :]]
            if _divergence(answer_log_probabilities(full.keep(trial)), wanted) <= delta:
                rows = trial
                break
    return full.keep(rows)


def _lengths(cache: DynamicCache) -> list[int]:
    return [layer.keys.shape[-2] for layer in layers_of(cache)]


def _answers(reading: Reading, part: Sequence[int]) -> torch.Tensor:
    """Places of the answers' tokens in some demonstrations that are shown without BOS."""
    places, end = [], 0
    for number in part:
        end += reading.encode([number], False)["input_ids"].shape[1]
        places += list(range(end - reading.answer_lengths[number], end))
    return torch.tensor(places)


def _divergence(first: torch.Tensor, second: torch.Tensor) -> float:
    """Jensen-Shannon divergence of log-probabilities, mean over rows."""
    middle = torch.logaddexp(first, second) - torch.log(torch.tensor(2.0))
    parts = [F.kl_div(middle, side, log_target=True, reduction="batchmean") for side in (first, second)]
    return float(sum(parts)) / 2
