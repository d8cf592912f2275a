"""Fused tokens stand in a prompt: placeholder ids in `input_ids`, fused vectors at the input embeddings.

The backbone gets ordinary ids and makes its own positions, masks and caches from them; only the output of its input
embedding is changed, by one hook that is registered once and does nothing outside a call (AIM, section 3.3).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList


class FusedPrompt:
    """The inputs of a batch with room for the fused tokens of each row, right after BOS.

    Args:
        inputs: the backbone's inputs; `input_ids` is `(batch, length)`, padded on either side.
        fused: for each row the fused tokens `(tokens, hidden size)`, or `None`.
        placeholder_id: the id that stands where a fused token goes.
        bos_id: id of the token after which fused tokens stand, where the prompt starts with it.
        embedding: the input embedding of the backbone that answers; any other one is left alone.
        first: put BOS and the fused tokens, as many in each row, before the padding of a row: they are the same in
            all rows then, and so is their KV.

    Attributes:
        inputs: the inputs of the widened prompt. Per-position tensors grow with it: masks with 1 where they are
            `attention_mask`, everything else with 0 (`labels`: -100), since fused tokens are text without images.
        width: length of the widened prompt.

    Raises:
        ValueError: an input fixes the place of every token, so that there is no room for more.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        fused: Sequence[torch.Tensor | None],
        placeholder_id: int,
        bos_id: int | None,
        embedding: nn.Module,
        first: bool = False,
    ) -> None:
        self.inputs = dict(inputs)
        self.embedding = embedding
        ids = inputs["input_ids"]
        batch, length = ids.shape
        mask = inputs.get("attention_mask")
        if inputs.get("position_ids") is not None or (mask is not None and mask.ndim != 2):
            raise ValueError(
                "demos make the prompt longer, so position_ids and attention masks other than (batch, length) "
                "cannot be given with them; the backbone makes its own."
            )
        if mask is None:
            mask = torch.ones_like(ids)
            self.inputs["attention_mask"] = mask
        counts = torch.tensor([0 if f is None else f.shape[0] for f in fused])
        self.width = length + int(counts.max())
        self.fused = [f for f in fused if f is not None and f.shape[0]]
        self.seen = 0

        # old[r, j]: the place in row r of the widened prompt where old position j goes; new[r]: places of its tokens
        left_padded = bool((mask[:, 0] == 0).any()) or not bool((mask[:, -1] == 0).any())
        begins = mask.long().argmax(dim=1).cpu()
        places = torch.arange(length)
        old: list[torch.Tensor] = []
        rows: list[int] = []
        columns: list[int] = []
        for row in range(batch):
            at, count = int(begins[row]), int(counts[row])
            bos = int(bos_id is not None and int(ids[row, at]) == bos_id)
            at += bos
            shift = self.width - length - count if left_padded else 0
            old.append(places + shift + count * (places >= at))
            if first:
                old[-1] = places + count + bos * (places < at)
                at, shift = bos, 0
                if bos:
                    old[-1][begins[row]] = 0
            rows += [row] * count
            columns += range(at + shift, at + shift + count)
        self.old = torch.stack(old).to(ids.device)
        self.rows = torch.tensor(rows, dtype=torch.long, device=ids.device)
        self.columns = torch.tensor(columns, dtype=torch.long, device=ids.device)
        self.placeholder_id = placeholder_id

        for name, value in self.inputs.items():
            per_position = isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[:2] == ids.shape
            if per_position and name not in ("pixel_values", "pixel_attention_mask", "image_sizes"):
                self.inputs[name] = self._widened(name, value)

    def _widened(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """`value` spread to the widened prompt, with this name's filler at the new places."""
        filler = {"labels": -100, "input_ids": self.placeholder_id}.get(name, 0)
        wide = value.new_full((value.shape[0], self.width, *value.shape[2:]), filler)
        index = self.old.to(value.device)
        wide[torch.arange(len(index), device=value.device)[:, None], index] = value
        if name == "attention_mask":
            wide[self.rows, self.columns] = 1
        return wide

    def without_placeholders(self, values: torch.Tensor) -> torch.Tensor:
        """Take values of the caller's own positions out of `values` `(batch, width, ...)`."""
        index = self.old.to(values.device)
        return values[torch.arange(len(index), device=values.device)[:, None], index]

    def inject(self, ids: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """Put the fused vectors into the embeddings of one forward pass.

        A pass may hold the whole prompt (again at each step, where there is no cache), the next chunk of it, or only
        new tokens. Beams and return sequences repeat each row next to itself.
        """
        whole = ids.shape[1] >= self.width
        if not whole and self.seen >= self.width:
            return embeddings
        start = 0 if whole else self.seen
        end = min(start + ids.shape[1], self.width)
        repeats = ids.shape[0] // len(self.old)
        here = (self.columns >= start) & (self.columns < end)
        rows = (self.rows[here, None] * repeats + torch.arange(repeats, device=here.device)).T.reshape(-1)
        columns = (self.columns[here] - start).repeat(repeats)
        vectors = torch.cat([f.to(embeddings) for f in self.fused])[here.to(embeddings.device)].repeat(repeats, 1)
        if not bool((ids[rows.to(ids.device), columns.to(ids.device)] == self.placeholder_id).all()):
            if self.seen >= self.width:  # many new tokens at once, as in assisted decoding
                return embeddings
            if not bool((ids == self.placeholder_id).any()):  # not the prompt, but images in words of the vocabulary
                return embeddings
            raise RuntimeError(
                "The backbone rearranged the prompt before its input embeddings, so the places of the fused tokens "
                "are lost. Please report this backbone."
            )
        self.seen = end
        return embeddings.index_put((rows.to(embeddings.device), columns.to(embeddings.device)), vectors)


_PROMPT: ContextVar[FusedPrompt | None] = ContextVar("aim_fused_prompt", default=None)


def watch_embeddings(embedding: nn.Module) -> None:
    """Register the one hook through which fused tokens reach `embedding`, the backbone's input embedding."""
    if _inject not in embedding._forward_hooks.values():  # another plug-in may share the backbone
        embedding.register_forward_hook(_inject)


def _inject(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    prompt = _PROMPT.get()
    if prompt is None or module is not prompt.embedding or not args or args[0].ndim != 2:
        return None
    return prompt.inject(args[0], output)


@contextmanager
def injected(prompt: FusedPrompt | None) -> Iterator[None]:
    """Let the fused tokens of `prompt` (or none) reach the backbone inside this block, in this thread only.

    Raises:
        RuntimeError: the backbone never embedded the prompt through its input embeddings.
    """
    token = _PROMPT.set(prompt)
    try:
        yield
    finally:
        _PROMPT.reset(token)
    if prompt is not None and prompt.seen < prompt.width:
        raise RuntimeError(
            "The backbone did not embed its prompt through get_input_embeddings(), so it never saw the fused tokens. "
            "This backbone cannot be used with AIM."
        )


def own_tokens_only(prompt: FusedPrompt, input_ids: torch.Tensor, defaults: GenerationConfig) -> dict[str, Any]:
    """Arguments for the backbone's `generate` in which the caller's own code and limits meet no placeholder.

    Args:
        prompt: the widened prompt; its inputs hold every argument of the call.
        input_ids: the caller's own prompt `(batch, length)`.
        defaults: the backbone's generation settings.
    """
    options, width = dict(prompt.inputs), prompt.width

    def own(ids: torch.Tensor) -> torch.Tensor:
        queries = input_ids.to(ids.device).repeat_interleave(len(ids) // len(input_ids), dim=0)
        return torch.cat([queries, ids[:, width:]], dim=1)

    if options.get("streamer") is not None:
        options["streamer"] = QueryStreamer(options["streamer"], input_ids)
    for name, kind in (("logits_processor", LogitsProcessorList), ("stopping_criteria", StoppingCriteriaList)):
        if options.get(name):
            options[name] = kind([_OwnTokens(call, own) for call in options[name]])
    if options.get("prefix_allowed_tokens_fn") is not None:
        allowed = options["prefix_allowed_tokens_fn"]
        copies = 1 if (options.get("num_beams") or 1) > 1 else options.get("num_return_sequences") or 1
        options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([input_ids[row // copies].to(ids.device), ids[width:]])
        )

    # max_length and min_length count the caller's own tokens: make room in them for the fused ones
    config = options.get("generation_config")
    settings = [c for c in (config, defaults) if c is not None]
    counted = options.get("max_new_tokens") or any(c.max_new_tokens for c in settings)  # outweighs max_length
    for name in ("min_length",) if counted else ("max_length", "min_length"):
        if options.get(name):
            options[name] += width - input_ids.shape[1]
        elif limit := next((value for c in settings if (value := getattr(c, name, None))), None):
            config = copy.deepcopy(config or defaults)
            setattr(config, name, limit + width - input_ids.shape[1])
            options["generation_config"] = config
            settings = [config]
    return options


class _OwnTokens:
    """A caller's logits processor or stopping criterion, shown its own prompt instead of the widened one."""

    def __init__(self, call: Any, own: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.call, self.own = call, own

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return self.call(self.own(ids), scores, **kwargs)


class QueryStreamer:
    """A streamer that shows the caller's own prompt, without placeholders, and then every new token."""

    def __init__(self, streamer: Any, input_ids: torch.Tensor) -> None:
        self.streamer = streamer
        self.prompt: torch.Tensor | None = input_ids

    def put(self, value: torch.Tensor) -> None:
        """Pass on new tokens; the first call carries the prompt."""
        if self.prompt is not None:
            value, self.prompt = self.prompt.to(value.device), None
        self.streamer.put(value)

    def end(self) -> None:
        """Pass on the end of the stream."""
        self.streamer.end()
