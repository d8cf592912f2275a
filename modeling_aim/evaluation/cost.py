"""What an answer of `generate` cost: when its first token came, and the KV behind its prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FirstToken:
    """A streamer that notes when the first token comes, of a batch of any size.

    Args:
        now: gives the time in seconds, after the device is done.

    Attributes:
        time: of the first token; `None` before it.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.calls, self.cache = now, 0, None
        self.time: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then token after token."""
        self.calls += 1
        if self.calls == 2:
            self.time = self.now()

    def end(self) -> None:
        """No more tokens."""


def row_kv_bytes(cache: Any, tokens: int) -> int:
    """Bytes of keys and values of the first tokens of one row of a cache; 0 of a cache without layers.

    A layer with a sliding window holds no more than it; a layer with a recurrent state counts nothing.
    """
    total = 0.0
    for layer in getattr(cache, "layers", None) or []:
        for kv in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(kv, torch.Tensor) and kv.ndim == 4 and kv.shape[-2]:
                total += min(tokens, kv.shape[-2]) * kv.shape[1] * kv.shape[3] * kv.element_size()
    return round(total)
