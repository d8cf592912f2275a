"""Fused tokens in a prompt: their words as ids, their vectors at the depths where they enter (AIM, section 3.3).

The backbone gets ordinary ids, those of the demonstrations' own words, and computes its positions, masks and caches
from them. Hooks on the input embeddings and on the inputs of the decoder layers replace the vectors at these
positions. They are registered once and do nothing outside a call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from .backbone_aim import decoder_layers, image_positions
from .demonstrations_aim import FusedDemonstrations
from .reading_aim import layer_input

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


NOT_PER_TOKEN = ("pixel_values", "pixel_attention_mask", "image_sizes")  # may have the shape of a prompt by chance


@dataclass
class _InjectionPass:
    """The fused tokens that one forward pass holds.

    Args:
        shape: rows and length of the pass.
        rows, columns: the position of each fused token in it.
        chosen: which of the prompt's fused tokens they are, one entry a place.
        seen_before: how much of the prompt earlier passes have held.
        entered_at: for each depth the decoder layer before which its states have entered.
    """

    shape: tuple[int, int]
    rows: torch.Tensor
    columns: torch.Tensor
    chosen: torch.Tensor
    seen_before: int
    entered_at: dict[int, int] = field(default_factory=dict)

    def repeat(self, copies: int) -> None:
        """Follow the pass where each of its rows has been repeated next to itself."""
        self.rows = (self.rows[:, None] * copies + torch.arange(copies, device=self.rows.device)).T.reshape(-1)
        self.columns, self.chosen = self.columns.repeat(copies), self.chosen.repeat(copies)
        self.shape = (self.shape[0] * copies, self.shape[1])


class FusedPrompt:
    """The inputs of a batch with room for the fused tokens of each row, right after BOS.

    Args:
        inputs: the backbone's inputs; `input_ids` is `(batch, length)`, padded on either side.
        fused: for each row its demonstrations, or `None`.
        bos_id: id of the token after which fused tokens stand, where the prompt starts with it.
        backbone: the one that answers; the modules of any other one are left alone.
        entry_layers: where vectors enter: 0 is the input embeddings, k the input of decoder layer k. A fused token has
            one vector for each, concatenated.
        prefix_first: put BOS and the fused tokens, as many in each row, before the padding of a row: they are the
            same in all rows then, and so is their KV.

    Attributes:
        inputs: the inputs of the widened prompt. At fused tokens, `input_ids` holds the demonstrations' token ids,
            `attention_mask` holds 1, `labels` -100, and every other per-token input 0 (text without images).
        width: length of the widened prompt: that of every per-token input, and more than any of `own_columns`.
            `prefix_kv` sets it to that of the prefix alone, once it has cut `inputs` there.
        own_columns: the column of each of the caller's tokens in it, `(batch, length)`, ascending in a row, except
            that with `prefix_first` BOS stands before the padding.
        filler: the id of each row's new padding, `(batch, 1)`.
        tokens_seen: columns that passes of the backbone have held. KV that is given holds as many from the start.

    Raises:
        ValueError: `position_ids` are given; or a fused token has a token id that the backbone does not know.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        fused: Sequence[FusedDemonstrations | None],
        bos_id: int | None,
        backbone: PreTrainedModel,
        entry_layers: Sequence[int] = (0,),
        prefix_first: bool = False,
    ) -> None:
        self.inputs = dict(inputs)
        self.embedding = backbone.get_input_embeddings()
        self.entry_layers = tuple(entry_layers)
        self.layers = decoder_layers(backbone) if any(self.entry_layers) else None
        ids = inputs["input_ids"]
        batch, length = ids.shape
        mask = inputs.get("attention_mask")
        check_mask(inputs)
        if inputs.get("position_ids") is not None:
            raise ValueError(
                "demos make the prompt longer, so position_ids cannot be given with them; the backbone makes its own."
            )
        if mask is None:
            mask = torch.ones_like(ids)
            self.inputs["attention_mask"] = mask
        counts = torch.tensor([0 if row is None else row.num_tokens for row in fused])
        self.width = length + int(counts.max())
        nonempty = [row for row in fused if row is not None and row.num_tokens]
        for fused_row in nonempty:
            _check_ids(fused_row.ids, self.embedding)
        self.vectors = [row.vectors.unflatten(-1, (len(self.entry_layers), -1)) for row in nonempty]
        self.fused_ids = torch.cat([row.ids.to(ids) for row in nonempty]) if nonempty else ids.new_empty(0)
        self.tokens_seen = 0
        self._pass: _InjectionPass | None = None

        # own_columns[r, j]: the column of the caller's token (r, j) in the widened prompt
        # rows, columns: the places of the fused tokens there
        left_padded = bool((mask[:, 0] == 0).any()) or not bool((mask[:, -1] == 0).any())
        begins = mask.long().argmax(dim=1).cpu()
        places = torch.arange(length)
        own_columns: list[torch.Tensor] = []
        rows: list[int] = []
        columns: list[int] = []
        for row in range(batch):
            insert_at, count = int(begins[row]), int(counts[row])
            bos = int(bos_id is not None and int(ids[row, insert_at]) == bos_id)
            insert_at += bos
            shift = self.width - length - count if left_padded else 0
            own_columns.append(places + shift + count * (places >= insert_at))
            if prefix_first:
                own_columns[-1] = places + count + bos * (places < insert_at)
                insert_at, shift = bos, 0
                if bos:
                    own_columns[-1][begins[row]] = 0
            rows += [row] * count
            columns += range(insert_at + shift, insert_at + shift + count)
        self.own_columns = torch.stack(own_columns).to(ids.device)
        self.rows = torch.tensor(rows, dtype=torch.long, device=ids.device)
        self.columns = torch.tensor(columns, dtype=torch.long, device=ids.device)

        images, own = image_positions(backbone.config, ids), mask.to(ids.device).bool()
        self.filler = torch.stack([_filler(*row) for row in zip(ids, own, images, fused, strict=True)])[:, None]
        for name, value in self.inputs.items():
            if is_per_token(name, value, (batch, length)):
                self.inputs[name] = self._widened(name, value)

    def _widened(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """`value` for the widened prompt, with the filler of this input at the new positions."""
        wide = value.new_full((value.shape[0], self.width, *value.shape[2:]), -100 if name == "labels" else 0)
        if name == "input_ids":
            wide[:] = self.filler.to(wide)  # new padding, masked out
            wide[self.rows, self.columns] = self.fused_ids
        index = self.own_columns.to(value.device)
        wide[torch.arange(len(index), device=value.device)[:, None], index] = value
        if name == "attention_mask":
            wide[self.rows, self.columns] = 1
        return wide

    def without_fused(self, values: torch.Tensor) -> torch.Tensor:
        """Take values of the caller's own positions out of `values` `(batch, width, ...)`."""
        index = self.own_columns.to(values.device)
        return values[torch.arange(len(index), device=values.device)[:, None], index]

    def begin_pass(self, ids: torch.Tensor) -> bool:
        """Find the fused tokens that a forward pass over `ids` holds; returns whether it holds any.

        A pass may hold the whole prompt (again at each step, where there is no cache), the next chunk of it, or only
        new tokens. Beams and return sequences repeat each row next to itself.
        """
        layers_pending = self._pass is not None and not self._pass.entered_at and any(self.entry_layers)
        seen_before = self._pass.seen_before if self._pass is not None and layers_pending else self.tokens_seen
        # while pending, the layers have not run yet: some backbones embed the prompt twice, or embed images after it
        if not layers_pending:
            self._check_entered()
            self._pass = None
        whole = ids.shape[1] >= self.width
        if not whole and seen_before >= self.width:
            return False
        start = 0 if whole else seen_before
        end = min(start + ids.shape[1], self.width)
        repeats = ids.shape[0] // len(self.own_columns)
        in_pass = (self.columns >= start) & (self.columns < end)
        rows = (self.rows[in_pass, None] * repeats + torch.arange(repeats, device=in_pass.device)).T.reshape(-1)
        columns = (self.columns[in_pass] - start).repeat(repeats)
        fused_ids = self.fused_ids[in_pass].repeat(repeats)
        # not our prompt: candidate tokens of assisted decoding, or image tokens embedded by the same module
        if not bool((ids[rows.to(ids.device), columns.to(ids.device)] == fused_ids.to(ids.device)).all()):
            return False
        if layers_pending and not len(rows):
            return False
        self.tokens_seen = end
        if len(rows):
            chosen = in_pass.nonzero()[:, 0].repeat(repeats)
            self._pass = _InjectionPass((ids.shape[0], ids.shape[1]), rows, columns, chosen, seen_before)
        return bool(len(rows))

    def enter_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Put the vectors of depth 0 into the input embeddings of the pass."""
        if self._pass is None or 0 not in self.entry_layers:
            return embeddings
        return self._put(self.entry_layers.index(0), embeddings)

    def enter_layer(self, number: int, layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Put the vectors of depths up to `number` that no earlier layer took into a layer's input, at each run."""
        if self._pass is None or self.layers is None or self.layers[number] is not layer:
            return states
        entered_at = self._pass.entered_at
        entering = [k for k in self.entry_layers if 0 < k <= number and entered_at.setdefault(k, number) == number]
        copies = states.shape[0] // self._pass.shape[0]
        if entering and copies > 1:  # a backbone that embeds its prompt before it repeats rows for beams
            self._pass.repeat(copies)
        if entering and tuple(states.shape[:2]) != self._pass.shape:
            raise RuntimeError(
                f"Decoder layer {number} gets hidden states of the shape {tuple(states.shape)} for a prompt of the "
                f"shape {self._pass.shape}, so the places of the fused tokens are lost. Please report this backbone."
            )
        for depth in entering:
            states = self._put(self.entry_layers.index(depth), states)
        return states

    def _put(self, place: int, states: torch.Tensor) -> torch.Tensor:
        assert self._pass is not None
        vectors = torch.cat([vectors[:, place].to(states) for vectors in self.vectors])
        index = self._pass.rows.to(states.device), self._pass.columns.to(states.device)
        return states.index_put(index, vectors[self._pass.chosen.to(states.device)])

    def _check_entered(self) -> None:
        """Raise `RuntimeError` where a pass has ended before all of its fused tokens entered."""
        if self._pass is not None and set(self.entry_layers) - {0} - set(self._pass.entered_at):
            raise RuntimeError(
                f"The backbone did not run the decoder layers at whose inputs states enter ({self.entry_layers}). "
                "This backbone cannot be used with AIM at that depth; entry_layers=[0] may work."
            )

    def check_seen(self) -> None:
        """Raise `RuntimeError` unless the backbone has seen all fused tokens."""
        self._check_entered()
        if self.tokens_seen < self.width:
            raise RuntimeError(
                "The backbone did not embed its prompt, as it is, through get_input_embeddings(), so it never saw the "
                "fused tokens. This backbone cannot be used with AIM."
            )


def _filler(
    ids: torch.Tensor, mask: torch.Tensor, images: torch.Tensor, fused: FusedDemonstrations | None
) -> torch.Tensor:
    """The id of a row's new padding: an ordinary one that logits processors see in that row anyway.

    It is the row's own padding, its first fused token, or its first token beside images.
    """
    words = ids[mask & ~images]
    candidates = [ids[~mask], ids.new_empty(0) if fused is None else fused.ids.to(ids), words, ids]
    return next(part[0] for part in candidates if len(part))


def is_per_token(name: str, value: object, shape: tuple[int, int]) -> bool:
    """Whether an input of a backbone has a value for each token of a prompt of `shape` (batch, length)."""
    return isinstance(value, torch.Tensor) and value.shape[:2] == shape and name not in NOT_PER_TOKEN


def shape_of(value: object) -> Any:
    """The shape of a tensor; of anything else the name of its type."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def check_mask(inputs: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an `attention_mask` that is not `(batch, length)`, as `input_ids` are."""
    mask_shape, expected = (shape_of(inputs.get(name)) for name in ("attention_mask", "input_ids"))
    if inputs.get("attention_mask") is not None and mask_shape != expected:
        raise ValueError(
            f"attention_mask is {mask_shape}; expected (batch, length) like input_ids, {expected}. Leave it out where "
            "nothing is padded."
        )


def _check_ids(ids: torch.Tensor, embedding: Any) -> None:
    """Raise `ValueError` for ids that the input embeddings do not have: on a GPU they would end the process."""
    known = getattr(embedding, "num_embeddings", None) or len(embedding.weight)
    known += getattr(embedding, "num_additional_embeddings", 0)
    least, most = (int(value) for value in torch.aminmax(ids))
    if least < 0 or most >= known:
        raise ValueError(
            f"Fused demonstrations have the token id {least if least < 0 else most}, but the backbone knows the ids "
            f"0..{known - 1}: they are damaged, or another backbone's. Read the demonstrations again: "
            "model.read(demos)."
        )


_PROMPT: ContextVar[FusedPrompt | None] = ContextVar("aim_fused_prompt", default=None)


def watch_embeddings(embedding: nn.Module) -> None:
    """Register the hook through which fused tokens reach `embedding`, the backbone's input embedding."""
    if _enter_embeddings not in embedding._forward_hooks.values():  # another plug-in may share the backbone
        embedding.register_forward_hook(_enter_embeddings)


def watch_entries(backbone: PreTrainedModel) -> None:
    """Register the hooks through which fused tokens reach a backbone: its input embedding and its decoder layers."""
    watch_embeddings(backbone.get_input_embeddings())
    with suppress(ValueError):  # without a stack of layers, tokens enter at the input only
        for number, layer in enumerate(decoder_layers(backbone)):
            hooks = layer._forward_pre_hooks.values()
            if not any(isinstance(hook, partial) and hook.func is _enter_layer for hook in hooks):
                layer.register_forward_pre_hook(partial(_enter_layer, number), with_kwargs=True)


def _enter_embeddings(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
    prompt = _PROMPT.get()
    if prompt is None or module is not prompt.embedding or not args or args[0].ndim != 2:
        return None
    return prompt.enter_embeddings(output) if prompt.begin_pass(args[0]) else None


def _enter_layer(number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    prompt = _PROMPT.get()
    if prompt is None or prompt.layers is None:
        return None
    place, states = layer_input(args, kwargs)
    entered = prompt.enter_layer(number, layer, states)
    if entered is states:
        return None
    if isinstance(place, int):
        return (*args[:place], entered, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: entered}


@contextmanager
def injected(prompt: FusedPrompt | None) -> Iterator[None]:
    """Let the fused tokens of `prompt` (or none) reach the backbone inside this block, in this thread only.

    Raises:
        RuntimeError: the backbone never embedded the prompt through its input embeddings, or did not run the layers
            at whose inputs fused tokens enter.
    """
    with _prompt_set(prompt):
        yield
    if prompt is not None:
        prompt.check_seen()


@contextmanager
def _prompt_set(prompt: FusedPrompt | None) -> Iterator[None]:
    """Have the hooks serve `prompt` inside this block."""
    token = _PROMPT.set(prompt)
    try:
        yield
    finally:
        _PROMPT.reset(token)


def recomputed() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` of `torch.utils.checkpoint`: a layer that is recomputed gets the same fused tokens."""
    return nullcontext(), _prompt_set(_PROMPT.get())


def own_tokens_only(prompt: FusedPrompt, input_ids: torch.Tensor, defaults: GenerationConfig) -> dict[str, Any]:
    """Arguments for the backbone's `generate` that hide fused tokens from the caller's code and length limits.

    Args:
        prompt: the widened prompt; its inputs hold every argument of the call.
        input_ids: the caller's own prompt `(batch, length)`.
        defaults: the backbone's generation settings.
    """
    options, width = dict(prompt.inputs), prompt.width
    config = options.get("generation_config")
    settings = [c for c in (config, defaults) if c is not None]

    def setting(name: str) -> Any:
        return options.get(name) or next((value for c in settings if (value := getattr(c, name, None))), None)

    def own(ids: torch.Tensor) -> torch.Tensor:
        queries = input_ids.to(ids.device).repeat_interleave(len(ids) // len(input_ids), dim=0)
        return torch.cat([queries, ids[:, width:]], dim=1)

    if options.get("streamer") is not None:
        options["streamer"] = QueryStreamer(options["streamer"], input_ids)
    if options.get("logits_processor"):
        processors = [_OwnTokensProcessor(call, own) for call in options["logits_processor"]]
        options["logits_processor"] = LogitsProcessorList(processors)
    if options.get("stopping_criteria"):
        criteria = [_OwnTokensCriterion(call, own) for call in options["stopping_criteria"]]
        options["stopping_criteria"] = StoppingCriteriaList(criteria)
    if options.get("prefix_allowed_tokens_fn") is not None:
        allowed = options["prefix_allowed_tokens_fn"]
        copies = 1 if (setting("num_beams") or 1) > 1 else setting("num_return_sequences") or 1
        options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([input_ids[row // copies].to(ids.device), ids[width:]])
        )

    # max_length and min_length count the caller's own tokens: extend them by the fused ones
    counted = options.get("max_new_tokens") or any(c.max_new_tokens for c in settings)  # overrides max_length
    for name in ("min_length",) if counted else ("max_length", "min_length"):
        if options.get(name):
            options[name] += width - input_ids.shape[1]
        elif limit := next((value for c in settings if (value := getattr(c, name, None)) is not None), None):
            config = copy.deepcopy(config or defaults)
            setattr(config, name, limit + width - input_ids.shape[1])
            options["generation_config"] = config
            settings = [config, defaults]
    return options


class _OwnTokensProcessor:
    """Calls the caller's logits processor with the caller's prompt instead of the widened one.

    transformers inspects the arguments of `__call__`: there must be exactly these two.
    """

    def __init__(self, call: Callable[..., Any], own: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.call, self.own = call, own

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return self.call(self.own(input_ids), scores)


class _OwnTokensCriterion:
    """Calls the caller's stopping criterion with the caller's prompt instead of the widened one."""

    def __init__(self, call: Callable[..., Any], own: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.call, self.own = call, own

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return self.call(self.own(input_ids), scores, **kwargs)


class QueryStreamer:
    """A streamer that shows the caller's own prompt, without fused tokens, and then every new token."""

    def __init__(self, streamer: BaseStreamer, input_ids: torch.Tensor) -> None:
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
