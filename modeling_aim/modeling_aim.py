"""AIM (arXiv 2406.07588): a frozen vision-language model answers from demonstrations that it has read one by one.

The story of the paper, in the order of this file: *read* each demonstration with the frozen backbone and keep the
hidden states on top of its text, *project* them to fused virtual tokens, *inject* these in front of a query, and let
the same frozen backbone *generate*. Loading and saving come after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, PreTrainedModel

from .backbone_aim import (
    answering,
    check_usable,
    decoder_inputs,
    embedding_weight,
    longest_prompt,
    never_repack,
    one_at_a_time,
    read_hidden_states,
    read_with_images,
    watch_layers,
    weights_state,
)
from .banking_aim import AimBankingModel
from .batching_aim import CPU_POSITIONS, PASS_POSITIONS, reading_batches
from .configuration_aim import AimConfig
from .demonstrations_aim import (
    Demonstration,
    FusedDemonstrations,
    check_demos,
    check_source,
    is_bank,
    is_demonstration,
    is_fused,
)
from .families_aim import family_of
from .injection_aim import FusedPrompt, injected, own_tokens_only, watch_embeddings
from .prefix_aim import (
    Recent,
    check_continued,
    note_fused,
)
from .processing_aim import AimProcessor
from .projector_aim import AimProjector

if TYPE_CHECKING:  # the rest of what a repository carries: transformers 5.5 copies only files that this one names
    from .bank_aim import DemonstrationBank  # noqa: F401
    from .build_aim import build_bank  # noqa: F401
    from .files_aim import locate_file  # noqa: F401
    from .manifest_aim import BANK_MANIFEST  # noqa: F401
    from .pretrained_aim import AimPreTrainedModel  # noqa: F401
    from .select_aim import check_way  # noqa: F401
    from .shards_aim import Shard  # noqa: F401


class AimForConditionalGeneration(AimBankingModel, GenerationMixin):
    """A frozen vision-language backbone with a projector that fuses demonstrations into virtual tokens.

    Everywhere, `demos` is one of:

    * a list of raw demonstrations: `(image, text)`, `(image, question, answer)`, or a dict with `image` (or
      `images`) and `text`, `label`, or `question` and `answer`; an image is a PIL image, a path, a URL or an array;
    * what `read` returned, or a `DemonstrationBank`: nothing is read again;
    * what `prefill` returned: the backbone does not even compute over the fused tokens again;
    * a list with one of these, or `None`, for each row of the batch;
    * `None` or empty: the call is the backbone's own, bit for bit.

    Args:
        config: the plug-in's settings.
        backbone: the backbone; built from `config.backbone_config` with random weights when `None`.
        processor: turns raw demonstrations into the backbone's inputs; loaded when it is first needed.
    """

    def __init__(
        self, config: AimConfig, backbone: PreTrainedModel | None = None, processor: AimProcessor | None = None
    ) -> None:
        if backbone is None and config.backbone_config is None:
            raise ValueError(
                "This configuration names no backbone to build (backbone_config is None). Use from_pretrained, or "
                "AimForConditionalGeneration.from_backbone(backbone)."
            )
        super().__init__(config)
        if backbone is None:
            backbone = AutoModelForImageTextToText.from_config(config.backbone_config)
        check_usable(backbone)
        self.backbone = backbone.requires_grad_(False).eval()
        self.projector = AimProjector(config)
        if not embedding_weight(
            backbone
        ).is_meta:  # float32 whatever the backbone's precision: it is small, and trains
            self.projector.to(device=embedding_weight(backbone).device, dtype=torch.float32)
        watch_embeddings(backbone.get_input_embeddings())
        watch_layers(backbone, config.read_layers)
        never_repack(backbone, only_odd=True)
        self._processor = processor
        self._loaded_from: tuple[str, dict[str, Any]] | None = None
        self._projector_id: tuple[Any, str] | None = None
        self.read_cache = Recent(256 * 2**20)  # hidden states of raw demonstrations; max_bytes = 0 turns it off
        self.prefix_cache = Recent(2**30)  # KV of prefixes, see `prefill`
        for name in ("hf_device_map", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if hasattr(backbone, name):
                setattr(self, name, getattr(backbone, name))
        self.post_init()

    # --- read, project

    @torch.no_grad()
    def read(self, demos: Any, batch_size: int | None = None) -> FusedDemonstrations:
        """Read demonstrations once, each alone, into fused tokens that any number of calls can use (section 3.2).

        Args:
            demos: raw demonstrations, in order. What has been read already passes through unchanged.
            batch_size: demonstrations in one forward pass of the backbone. Where `None`, as many as fit into 8192
                positions (1024 on a CPU) with hardly any padding.

        Returns:
            A frozen value with one fused token for each text token of each demonstration (at most
            `config.max_fused_tokens` a demonstration).

        Raises:
            ValueError: a demonstration is malformed, is longer than the backbone can read, or was read by another
                model.
        """
        if is_bank(demos):
            self._check_bank(demos)
            demos = demos.fused
        if is_fused(demos):
            check_source(demos.source, self.source)
            return demos
        if is_demonstration(demos) or not isinstance(demos, (list, tuple)):
            raise ValueError(f"read takes a list of demonstrations; got {demos!r:.80}. Put a single one in a list.")
        raw = [Demonstration.of(demo) for demo in demos]
        texts = tuple(self.processor.word(demo)[0] for demo in raw)
        return replace(self._project(raw, batch_size, keep=False), texts=texts, source=self.source)

    @torch.no_grad()
    def read_states(self, demos: Sequence[Demonstration], batch_size: int | None = None) -> list[torch.Tensor]:
        """Hidden states at the kept text positions, `(positions, joined layers x hidden size)` a demonstration.

        They depend on the frozen backbone alone, not on the projector, so they can be kept while it is trained.
        """
        states = {i: kept for i, kept, _ in self._read_batches(demos, batch_size)}
        return [states[i] for i in range(len(demos))]

    def _read_batches(
        self, demos: Sequence[Demonstration], batch_size: int | None = None, images: bool = False
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Number, hidden states and, where asked for, image features of each demonstration, as they are read."""
        lengths = self.processor.reading_lengths(demos)
        positions = CPU_POSITIONS if self.device.type == "cpu" else PASS_POSITIONS
        if family_of(self.backbone.config.model_type).read_alone:
            batch_size = 1
        for rows, alike in reading_batches(demos, lengths, batch_size, positions):
            inputs, kept = self.processor.encode_demonstrations([demos[i] for i in rows], self.config.read_span)
            self._check_length(inputs["input_ids"].shape[1], [demos[i].text for i in rows])
            inputs = inputs.to(self.device, self.dtype)
            seen: Any = [None] * len(rows)
            with injected(None):
                if images:
                    hidden, seen = read_with_images(self.backbone, inputs, self.config.read_layers, alike)
                else:
                    hidden = read_hidden_states(self.backbone, inputs, self.config.read_layers, alike)
            for i, row, mask, image in zip(rows, hidden, kept.to(hidden.device), seen, strict=True):
                yield i, self._within_budget(row[mask]), image

    def _within_budget(self, states: torch.Tensor) -> torch.Tensor:
        """Average neighbouring states down to `max_fused_tokens` of them, where there are more."""
        budget = self.config.max_fused_tokens
        if budget is None or len(states) <= budget:
            return states
        return nn.functional.adaptive_avg_pool1d(states.float().T[None], budget)[0].T.to(states.dtype)

    @torch.no_grad()
    def project(self, states: torch.Tensor) -> torch.Tensor:
        """Fused tokens `(tokens, hidden size)` of hidden states `(tokens, joined layers x hidden size)`."""
        return self.projector(states.to(next(self.projector.parameters()).device))

    def _project(
        self, demos: list[Demonstration], batch_size: int | None = None, keep: bool = True
    ) -> FusedDemonstrations:
        """Read, then project; equal demonstrations are read once. Gradient, where enabled, reaches the projector.

        Args:
            demos: what to read.
            batch_size: as for `read`.
            keep: use what `read_cache` has of them, and leave there what was read.
        """
        keys = tuple(demo.key for demo in demos)
        unique = dict(zip(keys, demos, strict=True))
        states: dict[str, torch.Tensor] = {}
        if keep:
            reader = (self._backbone_state(), *self.reader.values())
            states = {k: v.to(self.device) for k in unique if (v := self.read_cache.get((k, reader))) is not None}
        new = [key for key in unique if key not in states]
        for key, read in zip(new, self.read_states([unique[key] for key in new], batch_size), strict=True):
            states[key] = read
            if keep:
                self.read_cache.put((key, reader), read, read.numel() * read.element_size())
        lengths = tuple(len(states[key]) for key in keys)
        width = self.config.hidden_size * len(self.config.read_layers)
        joined = torch.cat([states[key] for key in keys]) if keys else torch.empty(0, width, device=self.device)
        vectors = self.projector(joined.to(next(self.projector.parameters()).device))
        return FusedDemonstrations(vectors, lengths, keys)

    def _backbone_state(self) -> int:
        """What changes with every weight of the backbone; it is asked for only where something is kept."""
        return hash(tuple(weights_state(self.backbone)))

    # --- inject, answer

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        demos: Any = None,
        chat_demos: Any = None,
        shots: int | None = None,
        select: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Answer queries from demonstrations with the backbone's own `generate`.

        Args:
            inputs: `input_ids` of the queries `(batch, length)`, when not given by name.
            generation_config: as for the backbone; `max_length` and `min_length` count no fused tokens.
            demos: demonstrations for all rows or for each row; see the class. Raw ones that were given before are not
                read again while `read_cache` has them.
            chat_demos: those that the processor found in the earlier turns of a chat; they come after `demos`.
            shots: how many demonstrations to choose from a bank for each row (8 where only `select` is given).
            select: how: `"random"`, `"image"`, `"text"`, `"fused"`, `"mmices"`, a list, or a dict with `by` and other
                arguments of `DemonstrationBank.select`.
            **kwargs: the backbone's inputs and everything its `generate` takes.

        Returns:
            What the backbone's `generate` returns: ids of the query and then the new tokens. Fused tokens never show,
            but where hidden states, attentions or the KV of all positions are asked for, theirs are among them.

        Raises:
            ValueError: bad demonstrations, demonstrations for another number of rows, or a prompt with fused tokens
                that is longer than the backbone's positions.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        demos = self._chosen(demos, {**kwargs, "input_ids": input_ids}, shots, select)
        demos = self._with_chat(demos, chat_demos, 1 if input_ids is None else len(input_ids))
        if not _any_demos(demos):
            if input_ids is not None:
                kwargs["input_ids"] = input_ids
            check_continued(kwargs, whole_prompt=True)
            with answering(self.backbone), injected(None):
                return self.backbone.generate(**kwargs)
        given = {**kwargs, "input_ids": input_ids}
        prefilled = self._prefilled(demos, given)
        prompt = self._fused_prompt(given, demos) if prefilled is None else prefilled[0]
        options = own_tokens_only(prompt, input_ids, self.backbone.generation_config)
        if prefilled is not None:
            options["past_key_values"] = prefilled[1]
        with answering(self.backbone), injected(prompt):
            output = self.backbone.generate(**options)
        note_fused(options.get("past_key_values"), getattr(output, "past_key_values", None))
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        queries = input_ids.to(sequences.device).repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences = torch.cat([queries, sequences[:, prompt.width :]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        demos: Any = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass of the backbone over queries with fused demonstrations in front of them.

        Args:
            input_ids: `(batch, length)`.
            demos: as for `generate`. Raw demonstrations are read without gradient and projected with it.
            labels: `(batch, length)`, -100 where no loss is wanted. The loss is the backbone's own loss function, over
                all of its logits; losses that some add for themselves (of a router, say) are left out.
            **kwargs: the backbone's other inputs.

        Returns:
            The backbone's output; `logits` and `hidden_states` are those of the caller's own positions, `attentions`
            and `past_key_values` are over the fused tokens too.
        """
        if torch.is_grad_enabled() and getattr(self.backbone, "is_quantized", False):
            never_repack(self.backbone)
        given = {"input_ids": input_ids, **({} if labels is None else {"labels": labels}), **kwargs}
        if not _any_demos(demos):
            check_continued(given, whole_prompt=False)
            with one_at_a_time(self.backbone), injected(None):
                return self.backbone(**given)
        return_dict = given.pop("return_dict", None)
        prompt = self._fused_prompt({**given, "return_dict": True}, demos)
        labels = prompt.inputs.pop("labels", None)
        with one_at_a_time(self.backbone), injected(prompt):
            output = self.backbone(**prompt.inputs)
        note_fused(getattr(output, "past_key_values", None))
        if labels is not None:
            labels = labels[:, -output.logits.shape[1] :]  # `logits_to_keep` leaves the first positions out
            normalize = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            vocab_size = output.logits.shape[-1]  # the configuration may count less
            loss = self.backbone.loss_function(output.logits, labels, vocab_size=vocab_size, **normalize)
            output = type(output)(**{**output, "loss": loss})
        if getattr(output, "logits", None) is not None and output.logits.shape[1] == prompt.width:
            output.logits = prompt.without_placeholders(output.logits)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                None if states is None else prompt.without_placeholders(states) for states in output.hidden_states
            )
        as_tuple = not (self.backbone.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output

    @torch.no_grad()
    def prompt_embeds(self, inputs: Mapping[str, Any], demos: Any = None) -> list[torch.Tensor]:
        """The prompt as embeddings, fused tokens and images in it, for an engine that takes `prompt_embeds` (vLLM).

        It works where the decoder gets nothing but embeddings at one position after another. It cannot work where the
        decoder gets more, and is refused there: positions in the image grid, image features for several layers,
        cross-attention, attention in both directions. docs/BANK.md lists the families.

        Args:
            inputs: the backbone's inputs of one query or of a padded batch.
            demos: as for `generate`.

        Returns:
            For each row `(tokens, hidden size)`, without padding.

        Raises:
            ValueError: the backbone's decoder needs more than embeddings; the message says what.
        """
        given = {**inputs}
        given["attention_mask"] = given.get("attention_mask", torch.ones_like(given["input_ids"]))
        prompt = self._fused_prompt(given, demos) if _any_demos(demos) else None
        whole = given if prompt is None else prompt.inputs
        with injected(prompt):
            embeddings = decoder_inputs(self.backbone, whole)
        return [row[mask.bool()] for row, mask in zip(embeddings, whole["attention_mask"], strict=True)]

    def _with_chat(self, demos: Any, chat_demos: Any, batch: int) -> Any:
        """`demos` followed by what the processor found in chats: one list, or one a row for a batch of chats."""
        if not _any_demos(chat_demos):
            return demos
        if not _any_demos(demos):
            return chat_demos
        rows: list[FusedDemonstrations | None] = []
        for pair in zip(self._fused_rows(demos, batch), self._fused_rows(chat_demos, batch), strict=True):
            parts = [part for part in pair if part is not None and len(part)]
            vectors = [part.vectors.to(parts[0].vectors) for part in parts]
            lengths = tuple(length for part in parts for length in part.lengths)
            rows.append(FusedDemonstrations(torch.cat(vectors), lengths, source=self.source) if parts else None)
        return rows

    def _fused_prompt(self, inputs: dict[str, Any], demos: Any, first: bool = False) -> FusedPrompt:
        """Room for each row's fused tokens in the prompt, checked against the backbone's positions."""
        input_ids = inputs["input_ids"]
        if input_ids is None or inputs.get("inputs_embeds") is not None:
            raise ValueError("demos stand in front of input_ids; inputs_embeds cannot take them.")
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"demos stand at the start of a prompt, but past_key_values already hold {cache.get_seq_length()} "
                "tokens. Give demos with the whole prompt and an empty cache."
            )
        rows = self._fused_rows(demos, len(input_ids))
        prompt = self._widened(inputs, rows, first)
        longest = longest_prompt(self.backbone.config)
        if longest is not None and prompt.width > longest:
            row = max((r for r in rows if r is not None), key=lambda r: r.num_tokens)
            room, fitting = longest - input_ids.shape[1], 0
            for length in row.lengths:
                room -= length
                fitting += room >= 0
            raise ValueError(
                f"The prompt has {input_ids.shape[1]} tokens and the demonstrations {row.num_tokens} fused tokens, "
                f"together {prompt.width}, but the backbone has {longest} positions. "
                f"The first {fitting} of {len(row)} demonstrations fit: pass demos[:{fitting}]."
            )
        return prompt

    def _widened(
        self, inputs: dict[str, Any], rows: Sequence[FusedDemonstrations | None], first: bool = False
    ) -> FusedPrompt:
        return FusedPrompt(
            inputs=inputs,
            fused=[None if row is None else row.vectors for row in rows],
            placeholder_id=self._placeholder_id(),
            bos_id=getattr(self.config.get_text_config(), "bos_token_id", None),
            embedding=self.get_input_embeddings(),
            first=first,
        )

    def _check_bank(self, bank: Any) -> None:
        """Raise `ValueError` for a bank that no prompt can hold, before it is loaded."""
        longest = longest_prompt(self.backbone.config)
        tokens = getattr(bank, "num_tokens", 0)
        if longest is not None and tokens > longest and len(bank) > 1:
            raise ValueError(
                f"The bank's {len(bank)} demonstrations have {tokens} fused tokens, but the backbone has {longest} "
                'positions. Choose some: generate(..., demos=bank, shots=8, select="image"), or bank[:8].'
            )

    def _fused_rows(self, demos: Any, batch: int) -> list[FusedDemonstrations | None]:
        """What each row of the batch is given, read where it is raw; each demonstration once."""
        if not isinstance(demos, (list, tuple)):
            return [self.read(demos)] * batch
        raw = [is_demonstration(demo) for demo in demos]
        if all(raw):
            return [self._project([Demonstration.of(demo) for demo in demos])] * batch
        if any(raw):
            raise ValueError(
                "demos mixes demonstrations with other things; give one list of demonstrations, or one a row."
            )
        if len(demos) != batch:
            raise ValueError(
                f"demos has demonstrations for {len(demos)} rows, but the batch has {batch} rows. Give one list of "
                "demonstrations for all rows, or exactly one entry (a list, what read() returned, or None) a row."
            )
        together = [Demonstration.of(demo) for row in demos if isinstance(row, (list, tuple)) for demo in row]
        read = self._project(together) if together else FusedDemonstrations(torch.empty(0, 0), ())
        given = {id(row): self.read(row) for row in demos if not isinstance(row, (list, tuple, NoneType))}
        rows: list[FusedDemonstrations | None] = []
        taken = 0
        for row in demos:
            if isinstance(row, (list, tuple)):
                rows.append(read[taken : taken + len(row)])
                taken += len(row)
            else:
                rows.append(given.get(id(row)))
        return rows

    def _placeholder_id(self) -> int:
        """An ordinary id that neither ends an answer nor stands for an image: BOS, padding, or the last one."""
        text, vocabulary = self.config.get_text_config(), embedding_weight(self.backbone).shape[0]
        given = self.config.placeholder_token_id
        taken: set[Any] = set()
        for eos in (getattr(text, "eos_token_id", None), self.backbone.generation_config.eos_token_id):
            taken.update(eos if isinstance(eos, (list, tuple)) else [eos])
        for name, value in vars(self.backbone.config).items():
            if name.endswith(("_token_id", "_token_index")) and name[:4] not in ("bos_", "pad_"):
                taken.add(value)
        if given is not None and (given in taken or not 0 <= given < vocabulary):
            raise ValueError(
                f"placeholder_token_id={given} ends answers, stands for images, or is not 0..{vocabulary}."
            )
        candidates = [given, getattr(text, "bos_token_id", None), getattr(text, "pad_token_id", None), vocabulary - 1]
        return next((i for i in candidates if isinstance(i, int) and 0 <= i < vocabulary and i not in taken), 0)

    def _check_length(self, length: int, texts: list[str]) -> None:
        longest = longest_prompt(self.backbone.config)
        if longest is not None and length > longest:
            raise ValueError(
                f"One of the demonstrations {[text[:40] for text in texts]} has {length} tokens with its images, but "
                f"the backbone has {longest} positions. Shorten its text, or give it fewer or smaller images."
            )


def _any_demos(demos: Any) -> bool:
    """Whether `demos` holds anything, for any row."""
    check_demos(demos)
    if isinstance(demos, (list, tuple)):
        return any(is_demonstration(demo) or _any_demos(demo) for demo in demos)
    return demos is not None and len(demos) > 0
