"""AIM (arXiv 2406.07588): a frozen vision-language model answers from demonstrations that it has read one by one.

The story of the paper, in the order of this file: *read* each demonstration with the frozen backbone and keep the
hidden states on top of its text, *project* them to fused virtual tokens, *inject* these in front of a query, and let
the same frozen backbone *generate*. Loading and saving come after.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.utils import logging

from .backbone_aim import (
    answering,
    check_backbone,
    embedding_norm,
    embedding_weight,
    fingerprint,
    load_backbone,
    longest_prompt,
    one_at_a_time,
    read_hidden_states,
    watch_layers,
)
from .configuration_aim import AimConfig
from .demonstrations_aim import (
    Demonstration,
    FusedDemonstrations,
    check_demos,
    check_source,
    is_demonstration,
    is_fused,
)
from .files_aim import HUB_KWARGS, locate_file, model_card, read_safetensors, shipped_files, staged_folder
from .injection_aim import FusedPrompt, QueryStreamer, injected, watch_embeddings
from .processing_aim import AimProcessor
from .projector_aim import AimProjector, projector_digest

logger = logging.get_logger(__name__)

PROJECTOR_WEIGHTS = "aim_projector.safetensors"
BACKBONE_FOLDER = "backbone"
LENGTH_LIMITS = ("max_length", "min_length")


class AimForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A frozen vision-language backbone with a projector that fuses demonstrations into virtual tokens.

    Everywhere, `demos` is one of:

    * a list of raw demonstrations: `(image, text)`, `(image, question, answer)`, or a dict with `image` (or
      `images`) and `text`, `label`, or `question` and `answer`; an image is a PIL image, a path, a URL or an array;
    * what `read` returned, or a `DemonstrationBank`: nothing is read again;
    * a list with one of these, or `None`, for each row of the batch;
    * `None` or empty: the call is the backbone's own, bit for bit.

    Args:
        config: the plug-in's settings.
        backbone: the backbone; built from `config.backbone_config` with random weights when `None`.
        processor: turns raw demonstrations into the backbone's inputs; loaded when it is first needed.
    """

    config_class = AimConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

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
        self.backbone = backbone.requires_grad_(False).eval()
        self.projector = AimProjector(config)
        embedded = embedding_weight(backbone)
        if not embedded.is_meta:
            self.projector.to(device=embedded.device, dtype=embedded.dtype)
        watch_embeddings(backbone.get_input_embeddings())
        watch_layers(backbone, config.read_layers)
        self._processor = processor
        self._loaded_from: tuple[str, dict[str, Any]] | None = None
        self._projector_id: tuple[list[int], str] | None = None
        for name in ("hf_device_map", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
            if hasattr(backbone, name):
                setattr(self, name, getattr(backbone, name))
        self.post_init()

    # --- read, project

    @torch.no_grad()
    def read(self, demos: Any, batch_size: int = 8) -> FusedDemonstrations:
        """Read demonstrations once, each alone, into fused tokens that any number of calls can use (section 3.2).

        Args:
            demos: raw demonstrations, in order. What has been read already passes through unchanged.
            batch_size: demonstrations in one forward pass of the backbone.

        Returns:
            A frozen value with one fused token for each text token of each demonstration (at most
            `config.max_fused_tokens` a demonstration).

        Raises:
            ValueError: a demonstration is malformed, is longer than the backbone can read, or was read by another
                model.
        """
        if hasattr(demos, "fused"):
            demos = demos.fused
        if is_fused(demos):
            check_source(demos.source, self.source)
            return demos
        if is_demonstration(demos) or not isinstance(demos, (list, tuple)):
            raise ValueError(f"read takes a list of demonstrations; got {demos!r:.80}. Put a single one in a list.")
        return self._fuse([Demonstration.of(demo) for demo in demos], batch_size)

    @torch.no_grad()
    def read_states(self, demos: Sequence[Demonstration], batch_size: int = 8) -> list[torch.Tensor]:
        """Hidden states at the kept text positions, `(positions, joined layers x hidden size)` a demonstration.

        They depend on the frozen backbone alone, not on the projector, so they can be kept while it is trained.
        """
        states: dict[int, torch.Tensor] = {}
        order = sorted(range(len(demos)), key=lambda i: (bool(demos[i].images), len(self.processor.word(demos[i])[0])))
        groups = [[i for i in order if bool(demos[i].images) == with_image] for with_image in (False, True)]
        for group in groups:
            for start in range(0, len(group), batch_size):
                rows = group[start : start + batch_size]
                inputs, kept = self.processor.encode_demonstrations([demos[i] for i in rows], self.config.read_span)
                self._check_length(inputs["input_ids"].shape[1], "A demonstration")
                hidden = read_hidden_states(self.backbone, inputs.to(self.device, self.dtype), self.config.read_layers)
                for i, row, mask in zip(rows, hidden, kept.to(hidden.device), strict=True):
                    states[i] = self._within_budget(row[mask])
        return [states[i] for i in range(len(demos))]

    def _within_budget(self, states: torch.Tensor) -> torch.Tensor:
        """Average neighbouring states down to `max_fused_tokens` of them, where there are more."""
        budget = self.config.max_fused_tokens
        if budget is None or len(states) <= budget:
            return states
        return nn.functional.adaptive_avg_pool1d(states.float().T[None], budget)[0].T.to(states.dtype)

    def _fuse(self, demos: list[Demonstration], batch_size: int = 8) -> FusedDemonstrations:
        """Read, then project; equal demonstrations are read once. Gradient, where enabled, reaches the projector."""
        keys = [demo.key for demo in demos]
        unique = dict(zip(keys, demos, strict=True))
        states = dict(zip(unique, self.read_states(list(unique.values()), batch_size), strict=True))
        lengths = tuple(len(states[key]) for key in keys)
        width = self.config.hidden_size * len(self.config.read_layers)
        joined = torch.cat([states[key] for key in keys]) if keys else torch.empty(0, width, device=self.device)
        return FusedDemonstrations(
            vectors=self.projector(joined.to(next(self.projector.parameters()).device)),
            lengths=lengths,
            keys=tuple(keys),
            texts=tuple(self.processor.word(demo)[0] for demo in demos),
            source=self.source,
        )

    # --- inject, answer

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, demos: Any = None, **kwargs: Any) -> Any:
        """Answer queries from demonstrations with the backbone's own `generate`.

        Args:
            inputs: `input_ids` of the queries `(batch, length)`, when not given by name.
            demos: demonstrations for all rows or for each row; see the class.
            **kwargs: the backbone's inputs and everything its `generate` takes.

        Returns:
            What the backbone's `generate` returns: ids of the query and then the new tokens. Fused tokens never show.

        Raises:
            ValueError: bad demonstrations, demonstrations for another number of rows, or a prompt with fused tokens
                that is longer than the backbone's positions.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        if not _any_demos(demos):
            if input_ids is not None:
                kwargs["input_ids"] = input_ids
            with one_at_a_time(self.backbone), answering(self.backbone):
                return self.backbone.generate(**kwargs)
        prompt = self._fused_prompt({**kwargs, "input_ids": input_ids}, demos)
        options = prompt.inputs
        if options.get("streamer") is not None:
            options["streamer"] = QueryStreamer(options["streamer"], input_ids)
        self._lengthen_limits(options, prompt.width - input_ids.shape[1])
        with one_at_a_time(self.backbone), answering(self.backbone), injected(prompt):
            output = self.backbone.generate(**options)
        if self.backbone.config.is_encoder_decoder:
            return output
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
            The backbone's output; `logits` are those of the caller's own positions.
        """
        given = {"input_ids": input_ids, **({} if labels is None else {"labels": labels}), **kwargs}
        if not _any_demos(demos):
            return self.backbone(**given)
        prompt = self._fused_prompt(given, demos)
        labels = prompt.inputs.pop("labels", None)
        with one_at_a_time(self.backbone), injected(prompt):
            output = self.backbone(**prompt.inputs)
        if labels is not None:
            normalize = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            vocab_size = output.logits.shape[-1]  # the configuration may count less
            loss = self.backbone.loss_function(output.logits, labels, vocab_size=vocab_size, **normalize)
            output = type(output)(**{**output, "loss": loss})
        if getattr(output, "logits", None) is not None and output.logits.shape[1] == prompt.width:
            output.logits = prompt.without_placeholders(output.logits)
        return output

    def _fused_prompt(self, inputs: dict[str, Any], demos: Any) -> FusedPrompt:
        """Room for each row's fused tokens in the prompt, checked against the backbone's positions."""
        input_ids = inputs["input_ids"]
        if input_ids is None:
            raise ValueError(
                "demos stand in front of input_ids, but none were given (inputs_embeds cannot take them)."
            )
        rows = self._fused_rows(demos, len(input_ids))
        text_config = self.config.get_text_config()
        prompt = FusedPrompt(
            inputs=inputs,
            fused=[None if row is None else row.vectors for row in rows],
            placeholder_id=self._placeholder_id(),
            bos_id=getattr(text_config, "bos_token_id", None),
        )
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

    def _fused_rows(self, demos: Any, batch: int) -> list[FusedDemonstrations | None]:
        """What each row of the batch is given, read where it is raw; each demonstration once."""
        if not isinstance(demos, (list, tuple)):
            return [self.read(demos)] * batch
        raw = [is_demonstration(demo) for demo in demos]
        if all(raw):
            return [self._fuse([Demonstration.of(demo) for demo in demos])] * batch
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
        read = self._fuse(together)
        rows: list[FusedDemonstrations | None] = []
        taken = 0
        for row in demos:
            if isinstance(row, (list, tuple)):
                rows.append(read[taken : taken + len(row)])
                taken += len(row)
            else:
                rows.append(None if row is None else self.read(row))
        return rows

    def _placeholder_id(self) -> int:
        """An ordinary id that is never generated, nor stands for an image."""
        if self.config.placeholder_token_id is not None:
            return self.config.placeholder_token_id
        text = self.config.get_text_config()
        eos = getattr(text, "eos_token_id", None)
        taken = {getattr(self.backbone.config, "image_token_id", None), *(eos if isinstance(eos, list) else [eos])}
        candidates = [getattr(text, "bos_token_id", None), getattr(text, "pad_token_id", None), 0, 1, 2, 3]
        return next(i for i in candidates if isinstance(i, int) and 0 <= i < text.vocab_size and i not in taken)

    def _lengthen_limits(self, options: dict[str, Any], extra: int) -> None:
        """`max_length` and `min_length` count the caller's own tokens; make room in them for the fused ones."""
        settings = [c for c in (options.get("generation_config"), self.backbone.generation_config) if c is not None]
        counted = options.get("max_new_tokens") or any(c.max_new_tokens for c in settings)  # outweighs max_length
        for name in LENGTH_LIMITS[1:] if counted else LENGTH_LIMITS:
            values = [options.get(name), *(getattr(c, name, None) for c in settings)]
            limit = next((value for value in values if value), None)
            if limit is not None:
                options[name] = limit + extra

    def _check_length(self, length: int, what: str) -> None:
        longest = longest_prompt(self.backbone.config)
        if longest is not None and length > longest:
            raise ValueError(f"{what} has {length} tokens, but the backbone has {longest} positions.")

    # --- the backbone shows through

    @property
    def generation_config(self) -> Any:
        """The backbone's generation settings."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if "backbone" in self._modules:
            self.backbone.generation_config = value

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the backbone."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone's floating-point weights."""
        return self.backbone.dtype

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's input embeddings."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The backbone's LM head."""
        return self.backbone.get_output_embeddings()

    def init_weights(self) -> None:
        """Nothing to do: backbone and projector draw or load their weights where they are made."""

    def train(self, mode: bool = True) -> AimForConditionalGeneration:
        """Set the projector's mode; the frozen backbone stays as in inference, without dropout."""
        super().train(mode)
        self.backbone.eval()
        for module in self.backbone.modules():
            if mode and getattr(module, "gradient_checkpointing", False):
                module.training = True  # layers recompute only in training mode; their own parts keep evaluating
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Recompute the backbone's layers in the backward pass instead of keeping their activations."""
        _renamed(self.backbone, "checkpointing_enable")(activation_checkpointing_kwargs, **kwargs)
        self.train(self.training)

    def activation_checkpointing_disable(self) -> None:
        """Keep the backbone's activations for the backward pass."""
        _renamed(self.backbone, "checkpointing_disable")()
        self.train(self.training)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """The name of `activation_checkpointing_enable` before transformers 6."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The name of `activation_checkpointing_disable` before transformers 6."""
        self.activation_checkpointing_disable()

    @property
    def processor(self) -> AimProcessor:
        """The processor that raw demonstrations go through."""
        if self._processor is None:
            if self._loaded_from is None:
                raise ValueError(
                    "This model has no processor for raw demonstrations. Set model.processor = "
                    "AimProcessor.from_pretrained(...), or pass processor= when you make the model."
                )
            name, options = self._loaded_from
            self._processor = AimProcessor.from_pretrained(name, **options)
        return self._processor

    @processor.setter
    def processor(self, processor: Any) -> None:
        self._processor = processor if hasattr(processor, "encode_demonstrations") else AimProcessor(processor)

    @property
    def source(self) -> dict[str, str]:
        """Identity of what reads here: fused demonstrations are good for this alone."""
        prints = str(self.config.backbone_fingerprint).encode()
        return {
            "backbone": f"{self.backbone.config.model_type} {hashlib.sha256(prints).hexdigest()[:12]}",
            "projector": self._projector_digest()[:12],
            "read": f"layers {self.config.read_layers}, {self.config.read_span}, "
            f"at most {self.config.max_fused_tokens} tokens",
        }

    def _projector_digest(self) -> str:
        """Identity of the projector's weights, computed anew only after they were changed."""
        versions = [p._version for p in self.projector.parameters()]
        if self._projector_id is None or self._projector_id[0] != versions:
            self._projector_id = (versions, projector_digest(self.projector.state_dict()))
        return self._projector_id[1]

    # --- make, load, save

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike[str] | PreTrainedModel,
        processor: Any = None,
        *,
        read_layers: Sequence[int] = (-1,),
        read_span: str = "text",
        max_fused_tokens: int | None = None,
        projector_form: str = "linear_norm",
        projector_intermediate_size: int | None = None,
        **kwargs: Any,
    ) -> AimForConditionalGeneration:
        """Put a new, untrained projector on a backbone.

        Args:
            backbone: Hub id or folder, or a loaded model.
            processor: the backbone's processor (or an `AimProcessor`); loaded with the backbone when `None`.
            read_layers, read_span, max_fused_tokens, projector_form, projector_intermediate_size: see `AimConfig`.
            **kwargs: passed on when the backbone is loaded (`dtype`, `device_map`, `quantization_config`, ...).
        """
        hub = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        loaded = backbone if isinstance(backbone, PreTrainedModel) else load_backbone(str(backbone), **kwargs)
        name = loaded.config.name_or_path or None
        if processor is None and name is not None:
            processor = AimProcessor.from_pretrained(name, **hub)
        elif processor is not None and not hasattr(processor, "encode_demonstrations"):
            processor = AimProcessor(processor)
        config = AimConfig(
            backbone_config=copy.deepcopy(loaded.config),
            backbone_name_or_path=name,
            backbone_revision=hub.get("revision"),
            backbone_fingerprint=fingerprint(loaded),
            read_layers=list(read_layers),
            read_span=read_span,
            max_fused_tokens=max_fused_tokens,
            projector_form=projector_form,
            projector_intermediate_size=projector_intermediate_size,
            projector_norm=embedding_norm(loaded),
        )
        return cls(config, backbone=loaded, processor=processor)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: AimConfig | None = None,
        backbone: PreTrainedModel | None = None,
        processor: AimProcessor | None = None,
        **kwargs: Any,
    ) -> AimForConditionalGeneration:
        """Load a plug-in and its backbone.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the AIM repository.
            config: use this configuration instead of the repository's.
            backbone: use this loaded backbone; it must be the one the projector was made for.
            processor: use this processor instead of the repository's.
            **kwargs: `revision` means this repository (the backbone's own is in the config); `token`, `cache_dir`,
                `local_files_only`, ... are used for both; everything else (`dtype`, `device_map`,
                `quantization_config`, `attn_implementation`, ...) reaches the backbone.

        Raises:
            ValueError: the projector belongs to another backbone, or its file is damaged or another kind of file.
            FileNotFoundError: the repository has no projector.
        """
        name = str(pretrained_model_name_or_path)
        trusted = kwargs.pop("trust_remote_code", None)
        for handled in ("_from_auto", "_from_pipeline", "adapter_kwargs", "_commit_hash"):
            kwargs.pop(handled, None)
        hub = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        if config is None:  # a configuration takes every argument that it has a setting for, dtype among them
            precision = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
            config, kwargs = AimConfig.from_pretrained(name, return_unused_kwargs=True, **hub, **kwargs)
            kwargs |= precision
        if config._attn_implementation is not None:  # AutoConfig has taken it out of the arguments
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        weights = read_safetensors(locate_file(name, PROJECTOR_WEIGHTS, **hub))
        if backbone is None:
            elsewhere = config.backbone_name_or_path is not None
            place = {**hub, "revision": config.backbone_revision} if elsewhere else hub
            if not elsewhere and config.backbone_subfolder is None:
                raise ValueError(f"The config.json of {name} names no backbone. Pass a loaded one: backbone=model.")
            backbone = load_backbone(
                config.backbone_name_or_path or name, subfolder=config.backbone_subfolder or "", **place, **kwargs
            )
        check_backbone(backbone, config.backbone_config, config.backbone_fingerprint)
        config.backbone_config = copy.deepcopy(backbone.config)
        model = cls(config, backbone=backbone, processor=processor)
        model._loaded_from = (name, {**hub, "trust_remote_code": trusted})
        model._load_projector(weights, name)
        return model

    def _load_projector(self, weights: dict[str, torch.Tensor], name: str) -> None:
        """Take over the projector's weights, or say what does not fit."""
        weights = {key.removeprefix("projector."): value for key, value in weights.items()}
        own = {key: tuple(value.shape) for key, value in self.projector.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in weights.items()}
        if found != own:
            raise ValueError(
                f"The {PROJECTOR_WEIGHTS} of {name} holds {found}, but its config.json "
                f"(projector_form={self.config.projector_form!r}, hidden size {self.config.hidden_size}, "
                f"read_layers={self.config.read_layers}) asks for {own}. Files of two repositories may be mixed."
            )
        self.projector.load_state_dict(weights)
        self._projector_id = ([p._version for p in self.projector.parameters()], projector_digest(weights))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        include_backbone: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a repository: config, projector, processor, the code that loads it, and a model card.

        Args:
            save_directory: folder to write to; files are replaced together, after all of them were made.
            include_backbone: write the backbone too, into a subfolder, for a repository that needs no other.
            push_to_hub: upload the folder as well, to `repo_id` (the folder's name by default).
            **kwargs: for `push_to_hub`.
        """
        config = copy.deepcopy(self.config)
        if include_backbone:
            config.backbone_name_or_path, config.backbone_revision = None, None
            config.backbone_subfolder = BACKBONE_FOLDER
        elif config.backbone_name_or_path is None and self._loaded_from is not None:
            name, hub = self._loaded_from
            config.backbone_name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
            config.backbone_revision = hub.get("revision")
        elif config.backbone_name_or_path is None:
            logger.warning(
                "The backbone has no name to load it by: pass include_backbone=True, or give it again when loading "
                "(from_pretrained(folder, backbone=model))."
            )
        config.backbone_config.name_or_path = ""
        with staged_folder(save_directory) as folder:
            config.save_pretrained(folder)
            tensors = {f"projector.{key}": value.contiguous() for key, value in self.projector.state_dict().items()}
            (folder / PROJECTOR_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
            self.generation_config.save_pretrained(folder)
            if self._processor is not None or self._loaded_from is not None:
                self.processor.save_pretrained(folder)
            for path in shipped_files():
                (folder / path.name).write_bytes(path.read_bytes())
            if not (Path(save_directory) / "README.md").exists():
                (folder / "README.md").write_text(model_card(config, self.projector), encoding="utf-8")
            if include_backbone:
                self.backbone.save_pretrained(folder / BACKBONE_FOLDER)
        if push_to_hub:
            self._upload(save_directory, repo_id or Path(save_directory).name, **kwargs)

    def push_to_hub(self, repo_id: str, *, include_backbone: bool = False, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes.

        Args:
            repo_id: the repository, made when it does not exist.
            include_backbone: as for `save_pretrained`.
            **kwargs: `token`, `private`, `revision`, `commit_message`, `commit_description`, `create_pr`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_backbone=include_backbone)
            return self._upload(folder, repo_id, **kwargs)

    def _upload(self, folder: str | os.PathLike[str], repo_id: str, **kwargs: Any) -> Any:
        api = HfApi(token=kwargs.pop("token", None))
        repo_id = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
        kwargs.setdefault("commit_message", "Upload an AIM plug-in")
        if api.file_exists(repo_id, "README.md", revision=kwargs.get("revision")):
            kwargs["ignore_patterns"] = "README.md"  # a card somebody wrote is kept
        return api.upload_folder(repo_id=repo_id, folder_path=Path(folder), **kwargs)


def _renamed(backbone: PreTrainedModel, name: str) -> Any:
    """The backbone's `activation_{name}`, or `gradient_{name}` as older releases of transformers call it."""
    return getattr(backbone, f"activation_{name}", None) or getattr(backbone, f"gradient_{name}")


def _any_demos(demos: Any) -> bool:
    """Whether `demos` holds anything, for any row."""
    check_demos(demos)
    if isinstance(demos, (list, tuple)):
        return any(is_demonstration(demo) or _any_demos(demo) for demo in demos)
    return demos is not None and len(demos) > 0
