"""AIM (arXiv 2406.07588): a frozen vision-language model answers from demonstrations that it has read one by one.

The method of the paper, in the order of this file: *read* each demonstration with the frozen backbone and keep the
hidden states of its text, *project* them to fused virtual tokens, *inject* these before a query, and let
the same frozen backbone *generate*. States that are put back at the depth where they were read need no projector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, PreTrainedModel

from .backbone_aim import check_depth, check_usable, embedding_weight, never_repack
from .batching_aim import CPU_PASS_TOKENS, PASS_TOKENS, reading_batches
from .cache_aim import LRUCache
from .configuration_aim import AimConfig
from .demonstrations_aim import (
    Demonstration,
    Demos,
    FusedDemonstrations,
    Selection,
    check_source,
    kind_of,
    parse_demos,
)
from .depth_aim import DepthMixin
from .families_aim import family_of
from .features_aim import FeaturesMixin
from .injection_aim import check_mask, injected, own_tokens_only, watch_entries
from .prefix_aim import FusedPrefix, check_continued, note_fused, prefilled, prefix_kv
from .pretrained_aim import AimPreTrainedModel
from .processing_aim import AimProcessor
from .projector_aim import AimProjector
from .reading_aim import read_hidden_states, read_with_images, watch_layers
from .rows_aim import KeptLogits, RowsMixin, check_finite, check_names
from .state_aim import answering, continues_after_kv, one_at_a_time, weights_state

if TYPE_CHECKING:  # never imported here: transformers 5.5 copies only files that this file's import lines name
    from .choice_aim import DepthChoice  # noqa: F401
    from .encoding_aim import EncodingMixin  # noqa: F401
    from .files_aim import locate_file  # noqa: F401
    from .images_aim import open_image  # noqa: F401


class AimForConditionalGeneration(RowsMixin, DepthMixin, FeaturesMixin, AimPreTrainedModel, GenerationMixin):
    """A frozen vision-language backbone with a projector that fuses demonstrations into virtual tokens.

    Everywhere, `demos` is one of:

    * a list of raw demonstrations: `(image, text)`, `(image, question, answer)`, or a dict with `image` (or
      `images`) and `text`, `label`, or `question` and `answer`; an image is a PIL image, a path, a URL or an array;
    * what `read` returned, or a `DemonstrationBank`: nothing is read again;
    * what `prefill` returned: `generate` does not compute the KV of its fused tokens again either;
    * a list with one of these, or `None`, for each row of the batch;
    * `None` or empty: the call is the backbone's own, bit for bit.

    Args:
        config: the plug-in's settings.
        backbone: the backbone; built from `config.backbone_config` with random weights when `None`.
        processor: turns raw demonstrations into the backbone's inputs; loaded when it is first needed.
        freeze: put the backbone in evaluation mode and turn off the gradients of its weights. With `False` its flags
            stay as they are, for a caller who may train it.
    """

    def __init__(
        self,
        config: AimConfig,
        backbone: PreTrainedModel | None = None,
        processor: AimProcessor | None = None,
        freeze: bool = True,
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
        if config.backbone_config is None:
            config.backbone_config = backbone.config
            config.check()
        if set(config.read_layers) - {-1, 0}:
            check_depth(backbone)
        self.backbone = backbone.requires_grad_(False).eval() if freeze else backbone
        self.projector = AimProjector(config)
        weight = embedding_weight(backbone)
        if not weight.is_meta:  # float32 whatever the backbone's precision: it is small, and trains
            self.projector.to(device=weight.device, dtype=torch.float32)
        watch_entries(backbone)
        watch_layers(backbone)
        never_repack(backbone, only_odd=True)
        self._processor = processor
        self._loaded_from: tuple[str, dict[str, Any]] | None = None
        self.read_cache = LRUCache(256 * 2**20)  # hidden states of raw demonstrations; max_bytes = 0 turns it off
        self.prefix_cache = LRUCache(2**30)  # KV of prefixes, see `prefill`
        for name in ("hf_device_map", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if hasattr(backbone, name):
                setattr(self, name, getattr(backbone, name))
        self.post_init()

    # --- read, project

    @torch.no_grad()
    def read(self, demos: Demos, batch_size: int | None = None) -> FusedDemonstrations:
        """Read demonstrations once, each alone, into fused tokens that any number of calls can use (section 3.2).

        It neither looks in `read_cache` nor fills it.

        Args:
            demos: raw demonstrations, in order. What has been read already is returned as its fused tokens.
            batch_size: demonstrations in one forward pass of the backbone. Where `None`, as many as fit into 8192
                tokens (1024 on a CPU) with little padding.

        Returns:
            An immutable value with one fused token for each text token of each demonstration, or of its answer alone
            for `config.read_span="answer"`; at most `config.max_fused_tokens` a demonstration.

        Raises:
            ValueError: a demonstration is malformed, is longer than the backbone can read, or was read by another
                model.
        """
        parsed = parse_demos(demos, self.image_rules)
        if isinstance(parsed, list):
            raise ValueError(f"read takes one list of demonstrations; got one for each of {len(parsed)} rows.")
        if parsed is not None and not isinstance(parsed, tuple):
            return self._fused_of(parsed)
        raw = list(parsed or ())
        texts = tuple(self.processor.apply_template(demo)[0] for demo in raw)
        return replace(self._read_and_project(raw, batch_size, use_cache=False), texts=texts, source=self.source)

    @torch.no_grad()
    def read_states(self, demos: Sequence[Demonstration], batch_size: int | None = None) -> list[torch.Tensor]:
        """Hidden states of each demonstration, `(tokens, read layers x hidden size)`.

        They are those of its kept tokens, averaged down to `max_fused_tokens`. They depend only on the frozen
        backbone, so they can be cached while the projector is trained.
        """
        states = {i: demo_states for i, demo_states, _ in self._read_batches(demos, batch_size)}
        return [states[i] for i in range(len(demos))]

    def _read_batches(
        self,
        demos: Sequence[Demonstration],
        batch_size: int | None = None,
        with_image_features: bool = False,
        layers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Yield the index, hidden states and, where asked for, image features of each demonstration, in reading order.

        `layers` replaces `config.read_layers`.
        """
        layers = self.config.read_layers if layers is None else layers
        try:
            lengths = self.processor.reading_lengths(demos)
        except Exception:  # of the backbone's processor
            for demo in demos:
                self.processor.check_readable(demo)
            raise
        max_tokens = CPU_PASS_TOKENS if self.device.type == "cpu" else PASS_TOKENS
        if family_of(self.backbone.config.model_type).read_alone:
            batch_size = 1
        for rows, may_repeat_images in reading_batches(demos, lengths, batch_size, max_tokens):
            inputs, kept_mask = self.processor.encode_demonstrations([demos[i] for i in rows], self.config.read_span)
            self._check_length(inputs["input_ids"].shape[1], [demos[i].text for i in rows])
            inputs = inputs.to(self.device, self.dtype)
            seen: Any = [None] * len(rows)
            with injected(None):  # no fused tokens in a reading pass, even inside a generate call
                if with_image_features:
                    hidden, seen = read_with_images(self.backbone, inputs, layers, may_repeat_images)
                else:
                    hidden = read_hidden_states(self.backbone, inputs, layers, may_repeat_images)
            for i, row, mask, image in zip(rows, hidden, kept_mask.to(hidden.device), seen, strict=True):
                yield i, self._within_budget(row[mask]), image

    def _within_budget(self, states: torch.Tensor) -> torch.Tensor:
        """Average neighbouring states down to `max_fused_tokens` of them, where there are more."""
        budget = self.config.max_fused_tokens
        if budget is None or len(states) <= budget:
            return states
        return nn.functional.adaptive_avg_pool1d(states.float().T[None], budget)[0].T.to(states.dtype)

    @torch.no_grad()
    def project(self, states: torch.Tensor) -> torch.Tensor:
        """Fused tokens `(tokens, entry layers x hidden size)` of states `(tokens, read layers x hidden size)`."""
        return self.projector(states)

    def text_token_ids(self, demos: Sequence[Demonstration]) -> list[torch.Tensor]:
        """Ids of the text tokens that each demonstration keeps, `(tokens,)`; of averaged ones the last."""
        budget, kept_ids = self.config.max_fused_tokens, []
        for ids in self.processor.kept_ids(demos, self.config.read_span):
            if budget is not None and len(ids) > budget:
                ids = ids[[-(-(i + 1) * len(ids) // budget) - 1 for i in range(budget)]]
            kept_ids.append(ids)
        return kept_ids

    def _read_and_project(
        self, demos: list[Demonstration], batch_size: int | None = None, use_cache: bool = True
    ) -> FusedDemonstrations:
        """Read, then project; equal demonstrations are read once. Gradient, where enabled, reaches the projector.

        Args:
            demos: what to read.
            batch_size: as for `read`.
            use_cache: look hidden states up in `read_cache`, and store new ones.
        """
        keys = tuple(demo.key for demo in demos)
        unique = dict(zip(keys, demos, strict=True))
        states: dict[str, torch.Tensor] = {}
        if use_cache:
            reader = (self._backbone_state(), *self.reader.values())
            states = {k: v.to(self.device) for k in unique if (v := self.read_cache.get((k, reader))) is not None}
        new = [key for key in unique if key not in states]
        for key, read in zip(new, self.read_states([unique[key] for key in new], batch_size), strict=True):
            states[key] = read
            if use_cache:
                self.read_cache.put((key, reader), read, read.numel() * read.element_size())
        token_ids = dict(zip(unique, self.text_token_ids(list(unique.values())), strict=True))
        return self.fuse([states[key] for key in keys], [token_ids[key] for key in keys], keys)

    def fuse(
        self, states: Sequence[torch.Tensor], token_ids: Sequence[torch.Tensor], keys: tuple[str, ...] = ()
    ) -> FusedDemonstrations:
        """Fused demonstrations from the results of `read_states` and `text_token_ids`; gradient reaches the projector.

        They have no source: only `read` binds its result to this model.
        """
        width = self.config.hidden_size * len(self.config.read_layers)
        joined = torch.cat(list(states)) if states else torch.empty(0, width, device=self.device, dtype=self.dtype)
        ids = torch.cat(list(token_ids)) if token_ids else torch.empty(0, dtype=torch.long)
        return FusedDemonstrations(self.projector(joined), tuple(len(state) for state in states), ids, keys)

    def _backbone_state(self) -> int:
        """A value that changes with every weight of the backbone: part of the keys of both caches."""
        return hash(tuple(weights_state(self.backbone)))

    # --- inject, answer

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        demos: Demos = None,
        chat_demos: Demos = None,
        shots: int | None = None,
        select: Selection = None,
        **kwargs: Any,
    ) -> Any:
        """Answer queries from demonstrations with the backbone's own `generate`.

        Below the depth where fused tokens enter, the layers run over the demonstrations' token ids as text, which the
        query attends to; above it, the states have seen the demonstrations' images.

        Args:
            inputs: `input_ids` of the queries `(batch, length)`, where they are not given by name.
            generation_config: as for the backbone; `max_length` and `min_length` count no fused tokens.
            demos: demonstrations for all rows or for each row; see the class. Raw ones that were given before are not
                read again while `read_cache` has them.
            chat_demos: those that the processor found in the earlier turns of a chat; they come after `demos`.
            shots: how many demonstrations to select from a bank for each row (8 where only a strategy is given).
            select: a strategy (`"random"`, `"image"`, `"text"`, `"fused"`, `"mmices"`), a list of indices or keys (all
                are used unless `shots` is given), or a dict with `by` and any of `balanced`, `near_duplicate`,
                `search`, `seed` (see `DemonstrationBank.choose`).
            **kwargs: the backbone's inputs and everything its `generate` takes. `repetition_penalty` and
                `no_repeat_ngram_size` count the words of the demonstrations too, as in a prompt of text.

        Returns:
            What the backbone's `generate` returns: ids of the query and then the new tokens. The ids hold no fused
            tokens; hidden states, attentions and KV, where requested, include their positions.

        Raises:
            ValueError: bad demonstrations, demonstrations for another number of rows or of another model, ids that are
                given twice or in another form, or a prompt with fused tokens that is longer than the backbone's
                positions.
        """
        input_ids = kwargs.pop("input_ids", None)
        if inputs is not None and input_ids is not None:
            raise ValueError("generate got ids twice, by position and as input_ids; give them once.")
        input_ids = inputs if input_ids is None else input_ids
        if generation_config is not None:
            kwargs["generation_config"] = generation_config
        call_inputs = {**kwargs, "input_ids": input_ids}
        rows = self._parts(call_inputs, demos, chat_demos, shots, select)
        if input_ids is not None and kwargs.get("past_key_values") is None:  # else the mask counts their tokens too
            check_mask(call_inputs)
        if not any(rows):
            if input_ids is not None:
                kwargs["input_ids"] = input_ids
            check_continued(kwargs, whole_prompt=True)
            with answering(self.backbone), injected(None):
                return self.backbone.generate(**kwargs)
        has_prefix = any(kind_of(part) == "prefix" for row in rows for part in row)
        reused = prefilled(self, rows, call_inputs) if has_prefix else None
        prompt, kv = reused or (self._fused_prompt(call_inputs, self._fused_rows(rows, input_ids.shape[1])), None)
        options = own_tokens_only(prompt, input_ids, self.backbone.generation_config)
        if kv is not None:
            options["past_key_values"] = kv
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
        demos: Demos = None,
        labels: torch.Tensor | None = None,
        *,
        chat_demos: Demos = None,
        shots: int | None = None,
        select: Selection = None,
        **kwargs: Any,
    ) -> Any:
        """One pass of the backbone over queries with fused demonstrations before them.

        Args:
            input_ids: `(batch, length)`.
            demos: as for `generate`. Raw demonstrations are read without gradient and projected with it.
            labels: `(batch, length)`, -100 where no loss is wanted. The loss is the backbone's own loss function;
                auxiliary losses of some backbones (of a router, for example) are left out.
            chat_demos, shots, select: as for `generate`.
            **kwargs: the backbone's other inputs. `logits_to_keep` counts the caller's own positions: a number of the
                last ones, or a tensor of their indices; the loss is then of the labels that these predict.

        Returns:
            The backbone's output; `logits` and `hidden_states` are those of the caller's own positions, `attentions`
            and `past_key_values` include the fused tokens.

        Raises:
            ValueError: as for `generate`; or an argument that the backbone does not know resembles one of these.
        """
        check_names(self.backbone, kwargs)
        if torch.is_grad_enabled() and getattr(self.backbone, "is_quantized", False):
            never_repack(self.backbone)
        call_inputs = {"input_ids": input_ids, **({} if labels is None else {"labels": labels}), **kwargs}
        rows = self._parts(call_inputs, demos, chat_demos, shots, select)
        if not any(rows):
            check_continued(call_inputs, whole_prompt=False)
            with one_at_a_time(self.backbone), injected(None):
                return self.backbone(**call_inputs)
        return_dict = call_inputs.pop("return_dict", None)
        finite = labels is None  # with labels, training stops at a loss that is not finite and names the batch
        fused = self._fused_rows(rows, call_inputs["input_ids"].shape[1], finite)
        prompt = self._fused_prompt({**call_inputs, "return_dict": True}, fused)
        kept = KeptLogits(prompt)
        with one_at_a_time(self.backbone), injected(prompt):
            output = self.backbone(**prompt.inputs)
        note_fused(getattr(output, "past_key_values", None))
        if labels is not None:
            normalize = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            output = type(output)(**{**output, "loss": kept.loss(self.backbone, output.logits, **normalize)})
        if getattr(output, "logits", None) is not None:
            output.logits = kept.own(output.logits)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                None if states is None else prompt.without_fused(states) for states in output.hidden_states
            )
        as_tuple = not (self.backbone.config.return_dict if return_dict is None else return_dict)
        return output.to_tuple() if as_tuple else output

    @torch.no_grad()
    def prefill(self, demos: Demos) -> FusedPrefix:
        """Read demonstrations and compute the KV of their fused tokens, once for any number of calls of `generate`.

        The KV is kept in `model.prefix_cache`, an LRU cache of at most `prefix_cache.max_bytes`; evicted KV is
        computed again when it is needed. It is used for greedy and sampled decoding and beams where all rows of a
        batch share the prefix. Elsewhere (other demonstrations in each row, a cache of the caller's own,
        `use_cache=False`, assisted decoding, cross-attention, a padded batch with `repetition_penalty` or on a
        backbone with sliding windows or a recurrent state, other ways to decode, families that cannot continue after
        KV, and `forward`) the fused tokens are used without it, and the log gives each reason once. The answers are
        the same within float tolerance.

        Args:
            demos: as for `read`; their order counts.

        Returns:
            A value that `generate` takes as `demos`.

        Raises:
            ValueError: there is a list for each row, a demonstration is malformed or was read by another model, fused
                tokens are not finite, or the demonstrations alone are longer than the backbone's positions.
        """
        self._check_count(demos, 1)
        parsed = parse_demos(demos, self.image_rules)
        if isinstance(parsed, list):
            raise ValueError(f"prefill takes one list of demonstrations; got one for each of {len(parsed)} rows.")
        if isinstance(parsed, tuple):  # counted before anything is read
            self._check_prefix(sum(len(ids) for ids in self.text_token_ids(parsed)))
        prefix: Any = parsed if kind_of(parsed) == "prefix" else FusedPrefix(self.read(parsed))
        check_source(prefix.fused.source, self.source)
        check_finite(prefix.fused)
        self._check_prefix(prefix.num_tokens)
        has_processor = self._processor is not None or self._loaded_from is not None  # else the first answer does it
        if len(prefix) and has_processor and continues_after_kv(self.backbone):
            # a prompt as queries are likely to be: whether it begins with BOS is part of the KV's key
            sample_ids = self.processor(text=[self.processor.prompt("a", images=0)], return_tensors="pt")["input_ids"]
            prefix_kv(self, prefix, self._bos_of(int(sample_ids[0, 0])))
        return prefix
