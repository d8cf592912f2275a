"""Demonstrations as they are read in an evaluation.

What reading leaves of a demonstration is kept by its name, so each is read once while memory lasts, for all methods,
seeds and numbers of demonstrations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..cache_aim import LRUCache
from ..data.pairs import opened
from ..demonstrations_aim import Demonstration
from .methods import ShownShot

if TYPE_CHECKING:
    from .. import AimForConditionalGeneration

Read = tuple[torch.Tensor, torch.Tensor]  # hidden states and ids of the kept words of a demonstration


def open_images(images: Sequence[Any], what: str) -> list[Any]:
    """Images opened as the backbone takes them.

    Raises:
        Unusable: one cannot be read; the message begins with `what`.
    """
    return list(open_pair({"images": list(images), "text": "its images"}, what).images) if images else []


def open_pair(pair: Mapping[str, Any], what: str) -> Demonstration:
    """A raw demonstration opened.

    Raises:
        Unusable: it cannot be used; the message begins with `what`.
    """
    skipped: Counter[str] = Counter()
    demos = list(opened([pair], skipped))
    if not demos:
        raise Unusable(f"{what} cannot be used: {', '.join(skipped)} in {str(dict(pair))[:200]}.")
    return demos[0]


class Unusable(ValueError):
    """An image or a text that is there, and cannot be shown to the model: a bad example, not the end of a run."""


class Reads:
    """Hidden states of demonstrations by their names, read in batches that follow from the run's plan alone.

    A batch is read whole when one of its demonstrations is needed, so what is read together, and so the last bits of
    the states, does not depend on where a run was interrupted, nor on how many processes share it.

    Args:
        model: the plug-in.
        plan: all demonstrations of a task in the order in which they are needed.
        batch_size: demonstrations in one forward pass.
        kept: where states are kept, bounded in bytes; tasks and plug-ins share it.
        task: name of the task, for messages and, with the read layers, as a part of the key.
    """

    def __init__(
        self, model: AimForConditionalGeneration, plan: Sequence[ShownShot], batch_size: int, kept: LRUCache, task: str
    ) -> None:
        self.model, self.kept, self.task = model, kept, task
        self.layers = tuple(model.config.read_layers)
        unique = list({demo.key: demo for demo in plan}.values())
        self.batches = [unique[start : start + batch_size] for start in range(0, len(unique), batch_size)]
        self.place = {demo.key: number for number, batch in enumerate(self.batches) for demo in batch}
        self.unusable: dict[tuple[str, str], str] = {}

    def states(self, demos: Sequence[ShownShot]) -> list[Read]:
        """Hidden states `(tokens, read layers x hidden size)` and ids `(tokens,)` of the kept words of each.

        Raises:
            Unusable: one cannot be read; `unusable` says which and why.
        """
        reads: dict[tuple[str, str], Read] = {}
        for demo in demos:
            if demo.key not in reads:
                read = self.kept.get((self.task, self.layers, *demo.key))
                reads |= self._read(self.place[demo.key]) if read is None else {demo.key: read}
            if demo.key not in reads:
                raise Unusable(self.unusable[demo.key])
        return [reads[demo.key] for demo in demos]

    def _read(self, number: int) -> dict[tuple[str, str], Read]:
        batch, demos = [], []
        for shown_demo in self.batches[number]:
            what = f"Demonstration {shown_demo.words_of.id!r} of {self.task}"
            words = {k: v for k, v in shown_demo.words_of.pair.items() if "image" not in k}
            try:
                demo = open_pair({**words, "images": list(shown_demo.images)}, what)
                reason = self.model.processor.why_unreadable(demo)
                if reason is not None:
                    raise Unusable(f"{what} cannot be used: {reason}.")
            except Unusable as error:
                self.unusable[shown_demo.key] = str(error)
                continue
            batch.append(shown_demo)
            demos.append(demo)
        states = [states_of_demo.cpu() for states_of_demo in self.model.read_states(demos, max(len(batch), 1))]
        reads = {
            shown_demo.key: read
            for shown_demo, *read in zip(batch, states, self.model.text_token_ids(demos), strict=True)
        }
        for key, (kept, ids) in reads.items():
            self.kept.put((self.task, self.layers, *key), (kept, ids), kept.numel() * kept.element_size())
        return {key: (kept, ids) for key, (kept, ids) in reads.items()}


def check_names(plan: Sequence[ShownShot], task: str) -> None:
    """Raise `ValueError` where two different demonstrations have one id: what was read of one would serve for both."""
    known: dict[str, Any] = {}
    for demo in plan:
        for shot in (demo.words_of, demo.images_of):
            first = known.setdefault(shot.id, shot)
            if first is not shot and dict(first.pair) != dict(shot.pair):
                raise ValueError(f"{task} gives two different demonstrations the id {shot.id!r}.")
