"""The rows of a batch: their demonstrations parsed, selected, read together and given room; their own logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence, Sized
from difflib import get_close_matches
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .backbone_aim import longest_prompt
from .demonstrations_aim import (
    Demos,
    FusedDemonstrations,
    Part,
    Selection,
    check_source,
    concatenated,
    kind_of,
    parse_demos,
)
from .encoding_aim import with_selection
from .injection_aim import FusedPrompt, check_mask, injected, shape_of
from .reading_aim import decoder_inputs

# our arguments, also by names that they are called in other libraries
ARGUMENTS = {
    **{name: name for name in ("demos", "chat_demos", "shots", "select")},
    **{"demonstrations": "demos", "examples": "demos", "num_shots": "shots", "selection": "select"},
}


class RowsMixin:
    """What `AimForConditionalGeneration` does with the rows of a batch; `self` is the model."""

    @torch.no_grad()
    def prompt_embeds(
        self: Any,
        inputs: Mapping[str, Any],
        demos: Demos = None,
        *,
        chat_demos: Demos = None,
        shots: int | None = None,
        select: Selection = None,
    ) -> list[torch.Tensor]:
        """The prompt as embeddings, fused tokens and images in it, for an engine that takes `prompt_embeds` (vLLM).

        It works where the decoder gets only embeddings at consecutive positions. It is refused where the decoder gets
        more: positions in the image grid, image features for several layers, cross-attention, attention in both
        directions (docs/BANK.md lists the families), or fused tokens that enter at depth.

        Args:
            inputs: the backbone's inputs of one query or of a padded batch, with the `demos` and `chat_demos` that the
                processor put there.
            demos, chat_demos, shots, select: as for `generate`.

        Returns:
            For each row `(tokens, hidden size)`, without padding.

        Raises:
            ValueError: the decoder needs more than embeddings (the message says what), or as for `forward`.
        """
        call_inputs = {**inputs}
        demos, chat_demos = given_once(call_inputs, demos=demos, chat_demos=chat_demos)
        check_names(self.backbone, call_inputs)
        if call_inputs.get("input_ids") is None:
            raise ValueError("prompt_embeds takes the input_ids of the queries, which inputs does not have.")
        rows = self._parts(call_inputs, demos, chat_demos, shots, select)
        check_mask(call_inputs)
        if call_inputs.get("attention_mask") is None:
            call_inputs["attention_mask"] = torch.ones_like(call_inputs["input_ids"])
        if any(rows) and self.config.entry_layers != [0]:
            raise ValueError(
                f"These fused tokens enter at the depths {self.config.entry_layers} of the decoder, and prompt "
                "embeddings reach its input alone. Use generate() here, or train a projector for the input: aim train "
                "--entry-layers 0."
            )
        length = call_inputs["input_ids"].shape[1]
        prompt = self._fused_prompt(call_inputs, self._fused_rows(rows, length)) if any(rows) else None
        whole = call_inputs if prompt is None else prompt.inputs
        with injected(prompt):
            embeddings = decoder_inputs(self.backbone, whole)
        return [row[mask.bool()] for row, mask in zip(embeddings, whole["attention_mask"], strict=True)]

    def _parts(
        self: Any,
        inputs: Mapping[str, Any],
        demos: Demos,
        chat_demos: Demos = None,
        shots: int | None = None,
        select: Selection = None,
    ) -> list[tuple[Part, ...]]:
        """The demonstrations of each row of the batch, in parts as `parse_demos` returns them; choices are made.

        A row has at most two parts: its own of `demos`, then its own of `chat_demos`.
        """
        ids: Any = inputs.get("input_ids")
        whole = isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.dtype in (torch.long, torch.int)
        if ids is not None and not (whole and ids.numel()):
            kind = f"{ids.dtype} of the shape " if isinstance(ids, torch.Tensor) else ""
            raise ValueError(
                f"input_ids are {kind}{shape_of(ids)}; expected a tensor of whole numbers (batch, length), one at "
                'least, as processor(images=..., text=..., return_tensors="pt") makes it.'
            )
        demos = with_selection(demos, shots, select)
        for value in () if ids is None else (demos, chat_demos):
            self._check_count(value, ids.shape[1])
        # the rules are the processor's: a call without demonstrations does without one
        parsed, parsed_chats = (
            parse_demos(value, None if is_empty(value) else self.image_rules) for value in (demos, chat_demos)
        )
        if ids is None:
            if parsed is None and parsed_chats is None:
                return []
            raise ValueError("demos are placed before input_ids; inputs_embeds cannot take them.")
        rows = self._select_from_banks(demos_by_row(parsed, len(ids)), inputs)
        chats = demos_by_row(parsed_chats, len(ids))
        return [tuple(part for part in pair if part is not None) for pair in zip(rows, chats, strict=True)]

    def _select_from_banks(self: Any, rows: list[Part | None], inputs: Mapping[str, Any]) -> list[Part | None]:
        """For each row of the batch its part, or what is selected for it where the part is a choice from a bank."""
        choices: dict[Any, list[int]] = {}  # rows with the same choice are compared with the bank together
        for row, part in enumerate(rows):
            if kind_of(part) == "choice":
                choice: Any = part
                choices.setdefault((id(choice.bank), repr(choice.shots), id(choice.select)), []).append(row)
        selected: list[Any] = list(rows)
        for choice_rows in choices.values():
            choice = rows[choice_rows[0]]
            fused_rows = choice.bank.select_rows(self, inputs, choice.shots, choice.select, choice_rows)
            for row, fused in zip(choice_rows, fused_rows, strict=True):
                selected[row] = fused
        return selected

    def _fused_rows(
        self: Any, rows: Sequence[tuple[Part, ...]], length: int, finite: bool = True
    ) -> list[FusedDemonstrations | None]:
        """The fused tokens of each row, for prompts of `length` tokens; raw parts are read together, each once.

        Raises:
            ValueError: they do not fit, or, where `finite` is asked for, some are NaN or infinite.
        """
        parts: dict[int, Any] = {id(part): part for row in rows for part in row}
        raw_parts = {part_id: part for part_id, part in parts.items() if kind_of(part) is None}
        for part in raw_parts.values():  # counted before anything is read
            self._check_room([len(ids) for ids in self.text_token_ids(part)], length)
        fused = {part_id: self._fused_of(part) for part_id, part in parts.items() if part_id not in raw_parts}
        # one part may serve several rows: read it once
        read = self._read_and_project([demo for part in raw_parts.values() for demo in part]) if raw_parts else None
        start = 0
        for part_id, part in raw_parts.items():
            assert read is not None
            fused[part_id] = read[start : start + len(part)]
            start += len(part)
        for part in fused.values() if finite else ():
            check_finite(part)
        return [concatenated([fused[id(part)] for part in row]) if row else None for row in rows]

    def _fused_of(self: Any, part: Any) -> FusedDemonstrations:
        """The fused tokens of a part that has been read: fused demonstrations themselves, a prefix or a whole bank.

        Raises:
            ValueError: another model read them, no prompt can hold the bank, or it is a choice, which needs a query.
        """
        if kind_of(part) == "bank":
            self._check_bank(part)
        fused = part if kind_of(part) == "fused" else part.fused
        check_source(fused.source, self.source)
        return fused

    def _fused_prompt(
        self: Any, inputs: Mapping[str, Any], rows: Sequence[FusedDemonstrations | None], prefix_first: bool = False
    ) -> FusedPrompt:
        """Room for each row's fused tokens in the prompt, checked against the backbone's positions."""
        if inputs.get("inputs_embeds") is not None:
            raise ValueError("demos are placed before input_ids; inputs_embeds cannot take them.")
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"demos stand at the start of a prompt, but past_key_values already hold {cache.get_seq_length()} "
                "tokens. Give demos with the whole prompt and an empty cache."
            )
        for row in rows:
            self._check_room([] if row is None else row.lengths, inputs["input_ids"].shape[1])
        return self._unchecked_prompt(inputs, rows, prefix_first)

    def _check_count(self: Any, demos: Demos, prompt_length: int) -> None:
        """Raise `ValueError` for more raw demonstrations than positions: then nothing is opened, counted or read."""
        longest = longest_prompt(self.backbone.config)
        if longest is None or kind_of(demos) is not None or not isinstance(demos, (list, tuple)):
            return
        for row in [demos, *demos]:
            raw = kind_of(row) is None and isinstance(row, (list, tuple)) and bool(row)
            if raw and kind_of(row[0]) == "demonstration" and len(row) + prompt_length > longest:
                raise ValueError(
                    f"{len(row)} demonstrations and a prompt of {prompt_length} tokens are too many for the "
                    f"backbone's {longest} positions, of which a demonstration takes at least one. Keep them in a "
                    'DemonstrationBank and select some: generate(..., demos=bank, shots=8, select="image").'
                )

    def _check_prefix(self: Any, tokens: int) -> None:
        """Raise `ValueError` where so many fused tokens leave no position for a query."""
        longest = longest_prompt(self.backbone.config)
        if longest is not None and tokens >= longest:
            raise ValueError(
                f"The demonstrations have {tokens} fused tokens, but the backbone has {longest} positions, of which "
                "the query needs some. Prefill fewer demonstrations: model.prefill(demos[:k])."
            )

    def _check_room(self: Any, lengths: Sequence[int], prompt_length: int) -> None:
        """Raise `ValueError` where demonstrations of these lengths and a prompt are longer than the backbone reads."""
        longest = longest_prompt(self.backbone.config)
        if longest is None or sum(lengths) + prompt_length <= longest or not lengths:
            return
        fitting = sum(total + prompt_length <= longest for total in accumulate(lengths))
        raise ValueError(
            f"The prompt has {prompt_length} tokens and the demonstrations {sum(lengths)} fused tokens, together "
            f"{sum(lengths) + prompt_length}, but the backbone has {longest} positions. The first {fitting} of "
            f"{len(lengths)} demonstrations fit: pass demos[:{fitting}]."
        )

    def _unchecked_prompt(
        self: Any, inputs: Mapping[str, Any], rows: Sequence[FusedDemonstrations | None], prefix_first: bool = False
    ) -> FusedPrompt:
        """The prompt with room for fused tokens, of whatever length."""
        bos = getattr(self.config.get_text_config(), "bos_token_id", None)
        return FusedPrompt(inputs, rows, bos, self.backbone, self.config.entry_layers, prefix_first)

    def _bos_of(self: Any, first_id: int) -> list[int]:
        """The ids before the fused tokens of a prompt that begins with `first_id`: BOS, or none."""
        return [first_id] if first_id == getattr(self.config.get_text_config(), "bos_token_id", None) else []

    def _check_bank(self: Any, bank: Sized) -> None:
        """Raise `ValueError` for a bank that no prompt can hold, before it is loaded."""
        longest = longest_prompt(self.backbone.config)
        tokens = getattr(bank, "num_tokens", 0)
        if longest is not None and tokens > longest and len(bank) > 1:
            raise ValueError(
                f"The bank's {len(bank)} demonstrations have {tokens} fused tokens, but the backbone has {longest} "
                'positions. Choose some: generate(..., demos=bank, shots=8, select="image"), or bank[:8].'
            )

    def _check_length(self: Any, length: int, texts: list[str]) -> None:
        longest = longest_prompt(self.backbone.config)
        if longest is not None and length > longest:
            raise ValueError(
                f"One of the demonstrations {[text[:40] for text in texts]} has {length} tokens with its images, but "
                f"the backbone has {longest} positions. Shorten its text, or give it fewer or smaller images."
            )


class KeptLogits:
    """The logits of the caller's own positions, and the loss, of a prompt with fused tokens.

    `logits_to_keep` counts the caller's own positions. In the widened prompt these are other columns in each row: the
    backbone computes the logits of all columns that some row needs.

    Args:
        prompt: the widened prompt. Its `labels` are taken out, and its `logits_to_keep` is made one of columns.
    """

    def __init__(self, prompt: FusedPrompt) -> None:
        self.prompt = prompt
        self.labels: torch.Tensor | None = prompt.inputs.pop("labels", None)
        keep = prompt.inputs.pop("logits_to_keep", None)
        self.columns: torch.Tensor | None = None  # those that the backbone computes, ascending; all where `None`
        if keep is None or (isinstance(keep, int) and not keep):
            return
        own = prompt.own_columns.cpu()
        positions = torch.arange(own.shape[1])
        kept = positions[keep.cpu()].reshape(-1) if isinstance(keep, torch.Tensor) else positions[-keep:]
        self.own_columns = own[:, kept]
        needed = [self.own_columns.flatten()]
        if self.labels is not None:
            # a label counts where the caller's position before it is kept; what predicts it may be a fused token
            labelled = own[:, torch.cat([kept[kept == 0], kept[kept < own.shape[1] - 1] + 1]).unique()].to(
                self.labels.device
            )
            counted = torch.full_like(self.labels, -100).scatter(1, labelled, self.labels.gather(1, labelled))
            self.labels = nn.functional.pad(counted, (0, 1), value=-100)[:, 1:]  # of the next column
            needed.append((self.labels != -100).nonzero()[:, 1].cpu())
        self.columns = torch.cat(needed).unique()
        prompt.inputs["logits_to_keep"] = self.columns.to(prompt.own_columns.device)

    def _computed(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits of `columns`, also from a backbone that has ignored `logits_to_keep`."""
        if self.columns is None or logits.shape[1] == len(self.columns):
            return logits
        return logits[:, self.columns.to(logits.device)]

    def loss(self, backbone: Any, logits: torch.Tensor, **options: Any) -> torch.Tensor:
        """The backbone's own loss function over what the backbone returned."""
        labels = self.labels
        if self.columns is not None and labels is not None:
            labels = labels[:, self.columns.to(labels.device)].contiguous()
            options["shift_labels"] = labels
        logits = self._computed(logits)
        # the configuration's vocabulary may be smaller
        return backbone.loss_function(logits, labels, vocab_size=logits.shape[-1], **options)

    def own(self, logits: torch.Tensor) -> torch.Tensor:
        """Those of the caller's own positions, of what the backbone returned."""
        if self.columns is None:
            return self.prompt.without_fused(logits) if logits.shape[1] == self.prompt.width else logits
        index = torch.searchsorted(self.columns, self.own_columns).to(logits.device)
        return self._computed(logits)[torch.arange(len(index), device=index.device)[:, None], index]


def demos_by_row(parsed: Part | list[Part | None] | None, batch: int) -> list[Part | None]:
    """The part, or `None`, of each of `batch` rows, from what `parse_demos` returns.

    Raises:
        ValueError: there are entries for another number of rows.
    """
    if not isinstance(parsed, list):
        return [parsed] * batch
    if len(parsed) != batch:
        raise ValueError(
            f"demos has demonstrations for {len(parsed)} rows, but the batch has {batch} rows. Give one list of "
            "demonstrations for all rows, or exactly one entry (a list, what read() returned, or None) a row."
        )
    return parsed


def is_empty(demos: Any) -> bool:
    """Whether there is no demonstration in what `generate` takes as `demos`, in any row."""
    if isinstance(demos, (list, tuple)):
        return all(is_empty(entry) for entry in demos)
    return demos is None or (kind_of(demos) in ("fused", "bank", "choice", "prefix") and not len(demos))


def given_once(inputs: dict[str, Any], **arguments: Demos) -> list[Demos]:
    """Each of the arguments, or what `inputs` has by its name, which is taken out of `inputs`.

    Raises:
        ValueError: there are both.
    """
    values = []
    for name, value in arguments.items():
        among_inputs = inputs.pop(name, None)
        if value is not None and among_inputs is not None:
            raise ValueError(f"{name} are given twice, as an argument and among the inputs; give them once.")
        values.append(among_inputs if value is None else value)
    return values


def check_names(backbone: Any, arguments: Iterable[str]) -> None:
    """Raise `ValueError` for an argument that resembles one of ours, which a backbone would ignore."""
    for name in arguments:
        resembled = get_close_matches(name, ARGUMENTS, 1, cutoff=0.7)
        if resembled and name not in inspect.signature(backbone.forward).parameters:
            raise ValueError(
                f"{name} is neither an argument nor an input of the backbone. Did you mean {ARGUMENTS[resembled[0]]}?"
            )


def check_finite(fused: FusedDemonstrations) -> None:
    """Raise `ValueError` for fused tokens that are NaN or infinite: answers from them would be empty or random."""
    finite = torch.isfinite(fused.vectors).all(dim=1)
    if not bool(finite.all()):
        number = next(i for i, part in enumerate(finite.split(fused.lengths)) if not bool(part.all()))
        words = f" ({fused.texts[number]!r:.60})" if fused.texts else ""
        raise ValueError(
            f"Fused tokens of demonstration {number}{words} are not finite (NaN or infinite). Check the weights of "
            "the projector, or load the backbone in bfloat16 or float32."
        )
