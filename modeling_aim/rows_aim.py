"""The demonstrations of each row of a batch: parsed, selected, read together, and given room in the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from itertools import accumulate
from typing import Any

import torch

from .backbone_aim import longest_prompt
from .demonstrations_aim import (
    Demos,
    FusedDemonstrations,
    Part,
    Selection,
    concatenated,
    kind_of,
    parse_demos,
    with_selection,
)
from .injection_aim import FusedPrompt, shape_of


class RowsMixin:
    """What `AimForConditionalGeneration` does with the rows of a batch; `self` is the model."""

    def _parts(
        self: Any,
        inputs: Mapping[str, Any],
        demos: Demos,
        chat_demos: Demos = None,
        shots: int | None = None,
        select: Selection = None,
    ) -> list[tuple[Part, ...]]:
        """The demonstrations of each row of the batch, in order, in parts as `parse_demos` returns them."""
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
        parsed, parsed_chats = (parse_demos(value, self.image_rules) for value in (demos, chat_demos))
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
                choices.setdefault((id(choice.bank), choice.shots, id(choice.select)), []).append(row)
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
        fused = {part_id: self.read(part) for part_id, part in parts.items() if part_id not in raw_parts}
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
        return self._widened(inputs, rows, prefix_first)

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

    def _widened(
        self: Any, inputs: Mapping[str, Any], rows: Sequence[FusedDemonstrations | None], prefix_first: bool = False
    ) -> FusedPrompt:
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
