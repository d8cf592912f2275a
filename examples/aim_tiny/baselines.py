"""Published training-free methods on aim-tiny's backbone, for its evaluation: `modeling_aim/baselines`.

Not run by itself; `python examples/aim_tiny/evaluate.py --methods full,aim,text-kv,snapkv:ratio=.9` runs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from support import ROOT
from words import BOS, token_id

sys.path.insert(0, str(ROOT))
from modeling_aim.baselines.methods import BASELINES, baseline_of
from modeling_aim.baselines.reading import Answering, Reading


@dataclass(frozen=True)
class Piece:
    """A demonstration or the query.

    Args:
        ids: its tokens, without BOS.
        image: its image in a pool.
        answer_length: how many tokens at its end are a demonstration's answer.
    """

    ids: list[int]
    image: tuple[int, int]
    answer_length: int = 0


def is_baseline(method: str) -> bool:
    return method.partition(":")[0] in BASELINES


@torch.no_grad()
def answered(
    method: str, model, pieces: Sequence[Piece], embed: Callable[[torch.Tensor, list], torch.Tensor], count: int
) -> tuple[list[int] | None, float, int]:
    """Greedy decoding of `count` tokens.

    Args:
        method: with its settings.
        model: the backbone.
        pieces: demonstrations, and last the query.
        embed: makes input embeddings of ids `(1, length)` and their images.
        count: how many.

    Returns:
        The tokens, `None` where positions of the prompt are beyond the backbone's; rows of KV, mean over layers; and
        bytes of KV.
    """

    def encode(numbers: Sequence[int], begins: bool) -> dict[str, torch.Tensor]:
        demo_pieces = [pieces[number] for number in numbers]
        ids = torch.tensor([[*([token_id(BOS)] if begins else []), *(i for piece in demo_pieces for i in piece.ids)]])
        return {"input_ids": ids, "inputs_embeds": embed(ids, [piece.image for piece in demo_pieces])}

    reading = Reading(model, encode, len(pieces) - 1, [piece.answer_length for piece in pieces[:-1]], 1)
    longest = model.config.text_config.max_position_embeddings
    experts = baseline_of(method)(reading)()
    answering = Answering(model, experts)
    beyond = any(int(expert.places.max()) + count >= longest for expert in experts)
    return None if beyond else answering.write(count), answering.tokens, answering.kv_bytes
