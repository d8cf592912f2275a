"""What the methods of `modeling_aim/baselines` cost, and calls of them that can be timed.

Under its own name a method has done what it can before the query comes, as `prefix-kv` and `bank-kv` have; with
`-cold` in its name (`snapkv-cold:ratio=.9`) reading is part of the call. `fastv` and `catp` can do nothing before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from ..backbone_aim import decoder_layers
from ..baselines.methods import BASELINES, Baseline, baseline_of
from ..baselines.reading import Answering, Reading
from ..baselines.watching import attention_of
from ..configuration_aim import default_depth
from .prompts import RandomPrompts
from .shapes import Picture

COLD = "-cold"
SAID = 5  # tokens of the answer at the end of a demonstration
AT_QUERY = ("fastv", "catp")
NAMES = tuple(name for name in BASELINES if name != "prefix-kv")  # that one is measured at its best
COLD_NAMES = tuple(name + COLD for name in NAMES if name not in AT_QUERY)


def is_baseline(name: str) -> bool:
    """Whether a name, with settings or without, is that of one of these methods."""
    return name.partition(":")[0] in (*NAMES, *COLD_NAMES)


def split(name: str) -> tuple[Baseline, str, bool]:
    """The method with its settings, its plain name, and whether reading is part of the call."""
    plain, colon, settings = name.partition(":")
    own = plain.removesuffix(COLD)
    return baseline_of(own + colon + settings), own, plain != own


# --- counted


class Counts(Protocol):
    """The interface of a backbone without weights; `Twin` in `counting.py`."""

    config: Any
    backbone: Any
    picture: Picture

    @property
    def image(self) -> float: ...

    def decoder(self, new: int, past: int = 0) -> tuple[float, int]: ...


def baseline_counts(
    twin: Counts, name: str, shots: int, demo_tokens: int, query_tokens: int
) -> tuple[int, int, float, int]:
    """Rows of KV after the prompt (mean over layers), tokens that are computed in the call, FLOPs, and bytes of KV.

    Args:
        twin: the backbone.
        name: one of these methods. `emloc` is counted with all rows: what it keeps follows from the data.
        shots: demonstrations.
        demo_tokens: text tokens of a demonstration.
        query_tokens: text tokens of the query, BOS among them.

    Raises:
        ValueError: there is no demonstration, or a setting does not fit the backbone.
    """
    if shots < 1:
        raise ValueError(f"{name} with {shots} demonstrations: expected 1 or more.")
    baseline, plain, cold = split(name)
    return _Count(twin, _settings(baseline), shots, demo_tokens, query_tokens).of(plain, cold)


def _settings(baseline: Baseline) -> dict[str, Any]:
    defaults = {n: p.default for n, p in inspect.signature(baseline.make).parameters.items()}
    return defaults | dict(baseline.settings)


def baseline_positions(twin: Counts, name: str, shots: int, demo_tokens: int, query_tokens: int) -> int:
    """Positions that a prompt of one of these methods takes, dropped rows among them; arguments as above."""
    baseline, plain, _ = split(name)
    length = _Count(twin, _settings(baseline), shots, demo_tokens, query_tokens)
    if plain == "text-kv":  # demonstrations lie side by side
        shots = min(shots, 1)
    elif plain == "parallel-icl":
        shots = -(-shots // min(_settings(baseline)["chunks"], shots))
    return length.bos + shots * length.demo + length.query


class _Count:
    """Lengths of a prompt, and what its passes cost."""

    def __init__(
        self, twin: Counts, settings: dict[str, Any], shots: int, demo_tokens: int, query_tokens: int
    ) -> None:
        text = twin.config.get_text_config()
        self.twin, self.settings, self.shots, self.text = twin, settings, shots, demo_tokens
        self.layers, self.images = int(text.num_hidden_layers), twin.picture.tokens
        self.bos = int(getattr(text, "bos_token_id", None) is not None)
        self.demo, self.query = self.images + demo_tokens, self.images + query_tokens - self.bos
        self.context = self.bos + shots * self.demo

    def of(self, plain: str, cold: bool) -> tuple[int, int, float, int]:
        name = plain.replace("-", "_")
        count = getattr(self, name, None)
        if count is None:
            raise ValueError(
                f"What {plain} costs is not counted: add {name}(self, cold) to _Count in "
                "modeling_aim/speed/baselines.py."
            )
        return count(cold)

    def _behind(self, past: int, reading: float) -> tuple[int, int, float, int]:
        """The query behind so many rows."""
        flops, kv = self.twin.decoder(self.query, past)
        return past + self.query, self.query, reading + self.twin.image + flops, kv

    def _together(self, tokens: int, images: int) -> float:
        return images * self.twin.image + self.twin.decoder(tokens)[0]

    def _depth(self, depth: int) -> int:
        if depth >= self.layers:
            raise ValueError(f"depth={depth}: expected less than the {self.layers} layers of this backbone.")
        return depth

    def _kept_images(self, count: int, share: float) -> int:
        return round(count * share)

    def text_kv(self, cold: bool) -> tuple[int, int, float, int]:
        kept = self._kept_images(self.images, 1 - self.settings["ratio"])
        reading = self.shots * self._together(self.bos + self.demo, 1) if cold else 0.0
        return self._behind(self.bos + self.shots * (self.text + kept), reading)

    def text_kv_together(self, cold: bool) -> tuple[int, int, float, int]:
        kept = self._kept_images(self.shots * self.images, 1 - self.settings["ratio"])
        reading = self._together(self.context, self.shots) if cold else 0.0
        return self._behind(self.bos + self.shots * self.text + kept, reading)

    def snapkv(self, cold: bool) -> tuple[int, int, float, int]:
        reading = self._together(self.context, self.shots) + self._watched(self.settings["window"], self.context)
        return self._behind(int(self.context * (1 - self.settings["ratio"])), reading if cold else 0.0)

    def emloc(self, cold: bool) -> tuple[int, int, float, int]:
        return self._behind(self.context, self._together(self.context, self.shots) if cold else 0.0)

    def parallel_icl(self, cold: bool) -> tuple[int, int, float, int]:
        count = max(min(self.settings["chunks"], self.shots), 1)
        sizes = [self.bos + len(part) * self.demo for part in torch.arange(self.shots).tensor_split(count)]
        like = count > 1 and self.settings["by"] == "likeness"
        parts = [self._behind(size, 0.0) for size in sizes]
        rows, new, flops, kv = (sum(values) for values in zip(*parts, strict=True))
        if like:  # features of a piece are what enters the decoder, so its image is seen once more
            flops += self.twin.image * (1 + (self.shots if cold else 0))
        reading = sum(self._together(size, (size - self.bos) // self.demo) for size in sizes) if cold else 0.0
        return int(rows), int(new), flops + reading, int(kv)

    def _stages(self, stages: Sequence[tuple[int, int]], watched: float) -> tuple[int, int, float, int]:
        """One pass over everything, `(tokens, layers)` one after another."""
        flops, kv, rows = watched + (self.shots + 1) * self.twin.image, 0.0, 0.0
        for tokens, layers in stages:
            own, bytes_ = self.twin.decoder(tokens)
            flops += own * layers / self.layers
            kv += bytes_ * layers / self.layers
            rows += tokens * layers / self.layers
        return round(rows), self.context + self.query, flops, round(kv)

    def fastv(self, cold: bool) -> tuple[int, int, float, int]:
        depth, total = self._depth(self.settings["depth"]), self.context + self.query
        images = self.shots * self.images
        kept = total - images + self._kept_images(images, 1 - self.settings["ratio"])
        return self._stages([(total, depth), (kept, self.layers - depth)], self._watched(1, total, 1))

    def catp(self, cold: bool) -> tuple[int, int, float, int]:
        depth = self._depth(self.settings["depth"] or max(self.layers // 4, 2))
        share, words = (1 - self.settings["ratio"]) ** 0.5, self.context + self.query - self.shots * self.images
        first = self.shots * self._kept_images(self.images, share)
        second = self._kept_images(first, share)
        watched = self._watched(1, words + first, len({depth // 2 - 1, depth - 1}))
        return self._stages([(words + first, depth), (words + second, self.layers - depth)], watched)

    def task_vector(self, cold: bool) -> tuple[int, int, float, int]:
        depth, demos_read = (
            self._depth(self.settings["depth"] or default_depth(self.twin.config.get_text_config(decoder=True))),
            min(self.shots, self.settings["reads"]),
        )
        part = self.twin.decoder(self.context - SAID)[0] * depth / self.layers
        reading = demos_read * (self.shots * self.twin.image + part) if cold else 0.0
        flops, kv = self.twin.decoder(self.bos + self.query)
        return self.bos + self.query, self.bos + self.query, reading + self.twin.image + flops, kv

    def _watched(self, window: int, rows: int, layers: int | None = None) -> float:
        """Attention of the last tokens, computed once more for its weights."""
        window, text, flops = min(window, rows), self.twin.config.get_text_config(), 0.0
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        for layer in list(decoder_layers(self.twin.backbone))[:layers]:
            flops += 2 * window * sum(p.numel() for p in attention_of(layer).parameters() if p.ndim == 2)
            flops += 4 * window * rows * text.num_attention_heads * width
        return flops


# --- measured


def reading_of(backbone: Any, prompts: RandomPrompts, shots: int, device: Any) -> Reading:
    """The pieces of a random prompt."""

    def encode(numbers: Sequence[int], begins: bool) -> dict[str, torch.Tensor]:
        inputs = prompts.pieces([-1 if number == shots else number for number in numbers], begins)
        return {name: value.to(device) for name, value in inputs.items()}

    return Reading(backbone, encode, shots, [SAID] * shots, len(prompts.bos))


def baseline_call(name: str, reading: Reading) -> Any:
    """A call that answers with so many tokens and gives the KV caches it ends with, as one."""
    baseline, _, cold = split(name)
    ready = None if cold else baseline(reading)

    def call(clock: Any, tokens: int) -> Any:
        clock.put(reading.encode([reading.count], True)["input_ids"].cpu())
        answering = Answering(reading.backbone, (baseline(reading) if ready is None else ready)())
        for step in range(tokens):
            best = answering.logits.argmax()
            clock.put(best.reshape(1, 1).cpu())
            if step + 1 < tokens:
                answering.push([int(best)])
        return SimpleNamespace(layers=[layer for cache in answering.caches for layer in cache.layers])

    return call
