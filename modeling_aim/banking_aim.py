"""What a model does with banks and prefixes: build and open, choose for each query, keep the KV of fused tokens."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .backbone_aim import (
    goes_on_behind_kv,
    image_features,
    image_positions,
    preserved_state,
    read_hidden_states,
)
from .bank_aim import DemonstrationBank
from .build_aim import build_bank
from .demonstrations_aim import Demonstration, check_source
from .injection_aim import FusedPrompt, injected
from .prefix_aim import FusedPrefix, Recent, cache_bytes, grown_from, is_prefix, same_prefix, serves
from .pretrained_aim import AimPreTrainedModel
from .select_aim import KINDS, check_way, sketched

SELECT_OPTIONS = {"balanced", "near_duplicate", "search", "seed"}


class AimBankingModel(AimPreTrainedModel):
    """Banks and prefixes; `AimForConditionalGeneration` has the method itself."""

    prefix_cache: Recent
    read: Any
    read_states: Any
    project: Any
    _read_batches: Any
    _backbone_state: Any
    _fused_prompt: Any
    _widened: Any

    # --- banks

    def build_bank(
        self,
        demos: Iterable[Any],
        save_directory: str | os.PathLike[str],
        *,
        columns: Mapping[str, str] | None = None,
        batch_size: int = 8,
        storage: str = "auto",
        keep_states: bool = False,
        features: bool = True,
        feature_size: int = 512,
        thumbnails: int = 96,
        shard_bytes: int = 256 * 2**20,
        total: int | None = None,
    ) -> DemonstrationBank:
        """Read a stream of demonstrations into a bank on disk, each content once.

        What was read is on disk after each batch. Killed at any moment, the same call goes on where it stopped and
        ends in the same files; with more demonstrations it adds those that are new.

        Args:
            demos: any iterable of demonstrations, or a `datasets` data set (streamed ones too).
            save_directory: folder of the bank.
            columns: which column of a row is which part of a demonstration, `{"image": "img", "label": "fine_label"}`;
                of a `datasets` data set the columns named `image`, `text`, `label`, ... are taken when `None`. Numbers
                of classes become the classes' names.
            batch_size: demonstrations that are read and put on disk together. Large ones take several passes of the
                backbone.
            storage: how fused tokens are kept: `"auto"` (the backbone's precision), `"float32"`, `"bfloat16"`,
                `"float16"`, or `"int8"` with one scale a token.
            keep_states: keep the backbone's hidden states too, so that `bank.reproject(model)` puts a newly trained
                projector on them without reading anything again.
            features: keep features of images, texts and fused tokens, by which demonstrations can be chosen.
            feature_size: wider features are brought down to this width by a fixed random map.
            thumbnails: largest side in pixels of a small picture that is kept of each first image; 0 keeps none.
            shard_bytes: about how large a file may be.
            total: how many demonstrations come, for the progress bar, where `demos` does not say.

        Returns:
            The bank, opened.

        Raises:
            ValueError: a row is no demonstration, or the folder holds a bank of another model or other settings.
            OSError: the disk is full; what was read is safe.
        """
        return build_bank(
            self, demos, save_directory, columns=columns, batch_size=batch_size, storage=storage,
            keep_states=keep_states, features=features, feature_size=feature_size, thumbnails=thumbnails,
            shard_bytes=shard_bytes, total=total,
        )  # fmt: skip

    def load_bank(self, name_or_path: str | os.PathLike[str], **kwargs: Any) -> DemonstrationBank:
        """Open a bank that this plug-in read, from a folder or a Hub repository.

        Args:
            name_or_path: folder or repository id.
            **kwargs: as for `DemonstrationBank.from_pretrained`.

        Raises:
            ValueError: another plug-in read it (the message names what differs), or a file is damaged.
        """
        bank = DemonstrationBank.from_pretrained(name_or_path, **kwargs)
        check_source(bank.source, self.source)
        bank.model = self
        return bank

    @torch.no_grad()
    def read_fully(self, demos: Sequence[Demonstration], features: bool = True) -> dict[str, Any]:
        """Read demonstrations, with everything that a bank keeps of them.

        Returns:
            `fused` and `states`: a tensor a demonstration; `features`: a tensor `(demonstrations, width)` a kind.
        """
        read = sorted(self._read_batches(demos, images=features), key=lambda row: row[0])
        states = [row[1] for row in read]
        fused = [self.project(one) for one in states]
        found: dict[str, torch.Tensor] = {}
        if features:
            width = max((row[2].shape[-1] for row in read if row[2] is not None), default=0)
            images = [nn.functional.pad(row[2].cpu(), (0, width - row[2].shape[-1])) for row in read]  # type: ignore
            found["image"] = torch.stack(images)
            found["text"] = self.text_features(
                [Demonstration((), one.question or one.text, None, self.processor.is_label(one)) for one in demos]
            )
            found["fused"] = torch.stack([one.float().mean(dim=0) for one in fused])
        return {"fused": fused, "states": states, "features": found}

    def text_features(self, texts: Sequence[Demonstration]) -> torch.Tensor:
        """Hidden states of words alone, averaged: `(texts, joined layers x hidden size)`."""
        unique = {one.key: one for one in texts}  # the same words have the same features, to the last bit
        read = self.read_states(list(unique.values()))
        means = {key: states.float().mean(dim=0) for key, states in zip(unique, read, strict=True)}
        return torch.stack([means[one.key] for one in texts])

    def query_inputs(self, query: Any) -> dict[str, Any]:
        """The backbone's inputs of one query that is an image, a text, or a dict or pair of both."""
        if isinstance(query, str):
            fields: dict[str, Any] = {"question": query}
        elif isinstance(query, (list, tuple)) and len(query) == 2:
            fields = dict(zip(("image", "question"), query, strict=True))
        else:
            fields = dict(query) if isinstance(query, Mapping) else {"image": query}
        words = fields.get("question") or fields.get("text") or ""
        images = {k: v for k, v in fields.items() if k in ("image", "images")}
        pictures = list(Demonstration.of({**images, "text": "query"}).images)
        prompt = self.processor.prompt(words, images=len(pictures))
        inputs = self.processor(images=[pictures] if pictures else None, text=[prompt], return_tensors="pt")
        return dict(inputs.to(self.device, self.dtype))

    @torch.no_grad()
    def query_features(self, inputs: Mapping[str, Any], by: str, bank: DemonstrationBank) -> dict[str, torch.Tensor]:
        """Features of each query of a batch, as `bank` compares them.

        Args:
            inputs: the backbone's inputs of the queries.
            by: a way to choose that compares, see `DemonstrationBank.choose`.
            bank: says how wide its features are.

        Returns:
            `(batch, width)` for each kind that is compared.

        Raises:
            ValueError: a query has no image, or no words, where these are compared.
        """
        check_source(bank.source, self.source)
        given = {
            k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and k not in ("labels", "position_ids")
        }
        given = {k: v.to(self.device, self.dtype) if v.is_floating_point() else v for k, v in given.items()}
        ids = given["input_ids"]
        words = given.get("attention_mask", torch.ones_like(ids)).bool() & ~image_positions(self.backbone.config, ids)
        found = {}
        for kind in KINDS[by]:
            width = bank.feature_width(kind)
            if kind == "image":
                with injected(None):
                    seen = image_features(self.backbone, given)
                empty = [row for row, one in enumerate(seen) if not bool(one.any())]
            elif kind == "text":
                asked = [self.processor.words_of(row[mask].tolist()) for row, mask in zip(ids, words, strict=True)]
                empty = [row for row, text in enumerate(asked) if not text]
                seen = ids if empty else self.text_features([Demonstration((), text) for text in asked])
            else:
                with injected(None):
                    hidden = read_hidden_states(self.backbone, given, self.config.read_layers)
                seen = torch.stack(
                    [self.project(row[m]).float().mean(0) for row, m in zip(hidden, words, strict=True)]
                )
                empty = []
            if empty:
                what, them = ("image", "images") if kind == "image" else ("words", "words")
                raise ValueError(
                    f"Query {empty[0]} of {len(ids)} has no {what}, and {by!r} compares {them}. Give each query its "
                    f'{them}, or choose in another way ("random" compares nothing).'
                )
            found[kind] = sketched(seen, width)
        return found

    def _chosen(self, demos: Any, inputs: Mapping[str, Any], shots: int | None, select: Any) -> Any:
        """For each row of the batch what `select` chooses of the bank that the row is given."""
        if shots is None and select is None:
            return demos
        options = dict(select) if isinstance(select, Mapping) else {"by": "random" if select is None else select}
        by, k = options.pop("by", "random"), 8 if shots is None else shots
        unknown = set(options) - SELECT_OPTIONS
        if unknown:
            raise ValueError(
                f"select has the keys {sorted(unknown)}; known are by, {', '.join(sorted(SELECT_OPTIONS))}. How many "
                "are chosen is said by shots=."
            )
        check_way(by, options.get("search", "auto"))
        rows = list(demos) if isinstance(demos, (list, tuple)) else [demos] * len(inputs["input_ids"])
        banks = {id(one): one for one in rows if one is not None}
        if not banks or not all(hasattr(bank, "choose") for bank in banks.values()):
            raise ValueError(
                f"shots={shots} and select={select!r} choose from a DemonstrationBank, but demos is {demos!r:.80}. "
                "Build one with model.build_bank(demos, folder)."
            )
        if not isinstance(by, str) or by == "random":
            picked = {key: bank.select(None, k, by, **options) for key, bank in banks.items()}
            return [None if bank is None else picked[id(bank)] for bank in rows]
        for bank in banks.values():
            bank.check_count(k)  # before anything is computed
        found = {key: self.query_features(inputs, by, bank) for key, bank in banks.items()}
        return [
            None
            if bank is None
            else bank.select({kind: one[row] for kind, one in found[id(bank)].items()}, k, by, **options)
            for row, bank in enumerate(rows)
        ]

    # --- the KV of a prefix

    @torch.no_grad()
    def prefill(self, demos: Any) -> FusedPrefix:
        """Read demonstrations and compute the KV of their fused tokens, once for any number of calls of `generate`.

        The KV is kept in `model.prefix_cache`, at most `prefix_cache.max_bytes`; the least recently used leaves, and
        is computed again when it is needed. It serves greedy and sampled decoding and beams of prompts that all rows
        of a batch share; everything else (other demonstrations a row, a cache of the caller's own, `use_cache=False`,
        assisted decoding, cross-attention, a padded batch on a backbone with sliding windows or a recurrent state)
        takes the fused tokens as they are.
        The answers are the same within float tolerance.

        Args:
            demos: as for `read`; their order counts.

        Returns:
            A value that `generate` takes as `demos`.
        """
        prefix = demos if is_prefix(demos) else FusedPrefix(self.read(demos))
        check_source(prefix.fused.source, self.source)
        if len(prefix):
            self._prefix_kv(prefix)
        return prefix

    def _prefix_kv(self, prefix: FusedPrefix) -> tuple[Any, list[int]]:
        """KV of BOS and the fused tokens of a prefix, for one row, and the ids before these tokens (BOS or none)."""
        key = (prefix.prefix_key, str(self.device), self._backbone_state())
        kept = self.prefix_cache.get(key)
        if kept is None:
            inputs = dict(self.processor(text=["a"], return_tensors="pt").to(self.device, self.dtype))
            prompt = self._widened(inputs, [prefix.fused], first=True)
            bos = inputs["input_ids"][0, : int(prompt.columns[0])].tolist()
            full, prompt.width = prompt.width, len(bos) + prefix.num_tokens
            for name, value in prompt.inputs.items():
                if isinstance(value, torch.Tensor) and value.shape[:2] == (1, full) and name != "pixel_values":
                    prompt.inputs[name] = value[:, : prompt.width]
            with preserved_state(self.backbone), injected(prompt):
                cache = self.backbone.base_model(**prompt.inputs, use_cache=True, return_dict=True).past_key_values
            kept = cache, bos
            self.prefix_cache.put(key, kept, cache_bytes(cache))
        return kept

    def _prefilled(self, demos: Any, options: Mapping[str, Any]) -> tuple[FusedPrompt, Any] | None:
        """A prompt that begins with a prefix, and the KV of that for each row; `None` where KV cannot be used."""
        prefix = same_prefix(demos)
        ids, config = options["input_ids"], options.get("generation_config")

        def setting(name: str) -> Any:
            given = [options.get(name), getattr(config, name, None), getattr(self.generation_config, name, None)]
            return next((value for value in given if value is not None), None)

        unusual = [
            "past_key_values", "cache_implementation", "prefill_chunk_size", "assistant_model", "custom_generate",
            "prompt_lookup_num_tokens", "use_mtp", "penalty_alpha", "dola_layers",
        ]  # fmt: skip
        if prefix is None or not len(prefix) or ids is None or setting("use_cache") is False:
            return None
        mask = options.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        if not goes_on_behind_kv(self.backbone, padded):
            return None
        if any(setting(name) for name in unusual):
            return None
        cache, bos = self._prefix_kv(prefix)
        if not serves(cache, padded):
            return None
        prompt = self._fused_prompt(dict(options), [prefix] * len(ids), first=True)
        if not bool((prompt.columns.view(len(ids), -1)[:, 0] == len(bos)).all()):  # prompts that begin otherwise
            return None
        prompt.seen = len(bos) + prefix.num_tokens
        rows = len(ids) * max(int(setting("num_beams") or 1), int(setting("num_return_sequences") or 1))
        return prompt, grown_from(cache, rows)
