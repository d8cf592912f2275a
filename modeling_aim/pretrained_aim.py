"""An AIM model as a `PreTrainedModel`: what it delegates to its backbone, and how it is made, loaded and saved."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .backbone_aim import (
    check_backbone,
    check_given,
    embedding_norm,
    fingerprint,
    has_fingerprint,
    load_backbone,
    module_device,
)
from .cache_aim import LRUCache
from .configuration_aim import (
    IMPLEMENTATIONS,
    OWN_SETTINGS,
    AimConfig,
    by_part,
    implementation,
    preset_settings,
    usable,
)
from .files_aim import (
    HUB_KWARGS,
    backbone_place,
    check_place,
    copy_shipped_files,
    file_digest,
    locate_file,
    model_card,
    staged_folder,
    upload,
)
from .images_aim import ImageRules
from .injection_aim import recomputed, watch_embeddings
from .processing_aim import AimProcessor
from .projector_aim import (
    DIGEST_KEY,
    PROJECTOR_WEIGHTS,
    AimProjector,
    load_projector,
    projector_file,
    without_digest,
)
from .state_aim import recomputing_switch, set_recomputing

if TYPE_CHECKING:
    from typing import Self

logger = logging.get_logger(__name__)

BACKBONE_FOLDER = "backbone"


class AimPreTrainedModel(PreTrainedModel):
    """Loading, saving and what transformers expects of a model; `AimForConditionalGeneration` has the method."""

    config_class = AimConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    config: AimConfig
    backbone: Any  # a PreTrainedModel that generates
    projector: AimProjector
    _processor: AimProcessor | None
    _loaded_from: tuple[str, dict[str, Any]] | None
    read_cache: LRUCache
    prefix_cache: LRUCache

    # --- delegated to the backbone

    @property
    def generation_config(self) -> Any:
        """The backbone's generation settings."""
        return self.backbone.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig | None) -> None:
        if "backbone" in self._modules:
            self.backbone.generation_config = value

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the backbone."""
        return module_device(self.backbone)

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

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's input embeddings."""
        self.backbone.set_input_embeddings(value)
        watch_embeddings(self.backbone.get_input_embeddings())

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the backbone's LM head."""
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Give the backbone another number of token ids; from then on it must be saved with the plug-in."""
        return self.backbone.resize_token_embeddings(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Set the attention implementation of the backbone, for all of its parts or by part."""
        requested = by_part(attn_implementation)
        inner = requested.get("backbone_config") if isinstance(requested, dict) else requested
        if inner is not None:
            self.backbone.set_attn_implementation(inner, *args, **kwargs)
        own = requested.get("") if isinstance(requested, dict) else self.backbone.config._attn_implementation
        if own is not None:
            self.config._attn_implementation_internal = self.get_correct_attn_implementation(own)

    def post_init(self) -> None:
        """Finish the model: from here on, `config.backbone_config` is the backbone's own configuration."""
        super().post_init()
        self.config.backbone_config = self.backbone.config
        for option in IMPLEMENTATIONS:  # the internal names: the others set the parts too
            setattr(self.config, f"_{option}_internal", getattr(self.backbone.config, f"_{option}"))

    def init_weights(self) -> None:
        """Do nothing: backbone and projector initialize or load their weights themselves."""

    def train(self, mode: bool = True) -> Self:
        """Set the projector's mode; the frozen backbone stays in evaluation mode, also while a thread answers."""
        self.training = mode
        for part in self.children():
            if part is not self.backbone:
                part.train(mode)
        set_recomputing(self.backbone, mode)
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute the backbone's layers in the backward pass instead of keeping their activations."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if not options["use_reentrant"]:
            options.setdefault("context_fn", recomputed)
        elif self.config.entry_layers != [0]:
            raise ValueError(
                "use_reentrant=True gives no gradient to fused tokens that enter at depth, inside a layer that is "
                "recomputed. Leave it out, or give use_reentrant=False."
            )
        recomputing_switch(self.backbone, "checkpointing_enable")(options, **kwargs)
        self.train(self.training)

    def activation_checkpointing_disable(self) -> None:
        """Keep the backbone's activations for the backward pass."""
        recomputing_switch(self.backbone, "checkpointing_disable")()
        self.train(self.training)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
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
                    "AimProcessor.from_pretrained(...), or pass processor= when you make the model. With "
                    "custom_generate, pass processor= to generate."
                )
            name, options = self._loaded_from
            self._processor = AimProcessor.from_pretrained(name, **options)
        return self._processor

    @processor.setter
    def processor(self, processor: Any) -> None:
        self._processor = processor if hasattr(processor, "encode_demonstrations") else AimProcessor(processor)

    @property
    def image_rules(self) -> ImageRules:
        """Which images of raw demonstrations may be opened: the processor's settings."""
        if self._processor is None and self._loaded_from is None:
            return ImageRules()
        return getattr(self.processor, "image_rules", None) or ImageRules()

    @property
    def source(self) -> dict[str, str]:
        """Identity of this model as a reader: only a model with an equal one can use its fused demonstrations."""
        form = f"{self.config.projector_form}, entering at {self.config.entry_layers}"
        return {**self.reader, "fused": form, "projector": self.projector.digest()[:12]}

    @property
    def reader(self) -> dict[str, str]:
        """Identity of all that decides the hidden states of a demonstration: `source` without the projector."""
        prints = str(self.config.backbone_fingerprint).encode()
        knows_processor = self._processor is not None or self._loaded_from is not None
        return {
            "backbone": f"{self.backbone.config.model_type} {hashlib.sha256(prints).hexdigest()[:12]}",
            "read": f"layers {self.config.read_layers}, {self.config.read_span}, "
            f"at most {self.config.max_fused_tokens} tokens",
            **(self.processor.reading_settings if knows_processor else {}),
        }

    # --- make, load, save

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike[str] | PreTrainedModel,
        processor: Any = None,
        *,
        preset: str = "untrained",
        read_layers: Sequence[int] | None = None,
        entry_layers: Sequence[int] | None = None,
        read_span: str = "text",
        max_fused_tokens: int | None = None,
        projector_form: str | None = None,
        projector_intermediate_size: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Put AIM on a backbone; with the default preset it answers from demonstrations without training.

        Args:
            backbone: Hub id or folder, or a loaded model.
            processor: the backbone's processor (or an `AimProcessor`); loaded with the backbone when `None`.
            preset: `"untrained"` puts states back at the depth where they were read (no weights), `"trained"` adds a
                projector there that begins as the identity, `"paper"` is the paper's projector for the input, which
                must be trained; see `PRESETS`.
            read_layers, entry_layers, projector_form: in place of the preset's.
            read_span, max_fused_tokens, projector_intermediate_size: see `AimConfig`.
            **kwargs: passed on when the backbone is loaded (`dtype`, `device_map`, `quantization_config`, ...).
        """
        hub = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        settings = preset_settings(preset, read_layers, entry_layers, projector_form)
        if isinstance(backbone, (str, os.PathLike)):
            check_place(backbone)
            backbone_place = str(backbone)
            backbone = loaded = load_backbone(backbone_place, **kwargs)
            if loaded.config.model_type == AimConfig.model_type:
                raise ValueError(
                    f"{backbone_place} is an AIM repository already. Load it with from_pretrained, train it further "
                    "with `aim train --backbone`, or give the backbone itself for a new one."
                )
        loaded = check_given(backbone)
        name = loaded.config.name_or_path or None
        if processor is None and name is not None:
            processor = AimProcessor.from_pretrained(name, **hub)
        elif processor is not None and not hasattr(processor, "encode_demonstrations"):
            processor = AimProcessor(processor)
        config = AimConfig(
            backbone_config=copy.deepcopy(loaded.config),
            backbone_name_or_path=name,
            backbone_revision=hub.get("revision") or getattr(loaded.config, "_commit_hash", None),
            backbone_fingerprint=fingerprint(loaded),
            read_span=read_span,
            max_fused_tokens=max_fused_tokens,
            **settings,
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
    ) -> Self:
        """Load a plug-in and its backbone.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the AIM repository.
            config: use this configuration instead of the repository's.
            backbone: use this loaded backbone; it must be the one the projector was made for.
            processor: use this processor instead of the repository's.
            **kwargs: `revision` means this repository (the backbone's own is in the config); `token`, `cache_dir`,
                `local_files_only`, ... are used for both; everything else (`dtype`, `device_map`,
                `quantization_config`, `attn_implementation`, ...) reaches the backbone.

        Returns:
            The plug-in; with `output_loading_info=True` also what was missing or unexpected in the backbone's files.

        Raises:
            ValueError: the projector belongs to another backbone, or its file is damaged or another kind of file; or
                weights are missing in the backbone's files (not with `output_loading_info=True`, which returns them).
            FileNotFoundError: the repository has no projector.
        """
        name = str(pretrained_model_name_or_path)
        check_place(name)
        trusted = kwargs.pop("trust_remote_code", None)
        for handled in ("_from_auto", "_from_pipeline", "adapter_kwargs", "_commit_hash"):
            kwargs.pop(handled, None)
        hub = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        settings = {key: kwargs.pop(key) for key in OWN_SETTINGS if key in kwargs}
        config = AimConfig.from_pretrained(name, **hub, **settings) if config is None else copy.deepcopy(config)
        config, digest = without_digest(config)
        requested_config = config if config.backbone_config is None else config.backbone_config
        implementations = {option: implementation(requested_config, option) for option in IMPLEMENTATIONS}
        options = {"dtype": config.dtype, **implementations}
        for option, taken in options.items():
            if taken is not None:  # AutoConfig has taken it out of the arguments
                kwargs.setdefault(option, taken)
        for option in IMPLEMENTATIONS:
            if isinstance(kwargs.get(option), dict):
                kwargs[option] = by_part(kwargs[option]).get("backbone_config", kwargs[option])
        identity = config.projector_form == "identity"
        file = None if identity else locate_file(name, PROJECTOR_WEIGHTS, **hub)
        if backbone is None:
            place, located = backbone_place(config, name, hub)
            backbone = load_backbone(place, **located, **kwargs)
        backbone, info = backbone if isinstance(backbone, tuple) else (backbone, None)
        check_backbone(backbone, config.backbone_config, config.backbone_fingerprint)
        config.backbone_config = copy.deepcopy(backbone.config)
        config.check()
        model = cls(config, backbone=backbone, processor=processor)
        if cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub) is not None:
            with usable(f"The generation_config.json of {name}"):
                model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        model._loaded_from = (name, {**hub, "trust_remote_code": trusted})
        if file is not None:
            load_projector(model.projector, config, file, name, digest)
        return model if info is None else (model, info)  # type: ignore[return-value]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *,
        include_backbone: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        max_shard_size: int | str | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write a repository: config, projector, processor, the code that loads it, and a model card.

        Args:
            save_directory: folder to write to; files are replaced together, after all of them were written.
            is_main_process: only the main process of a distributed run writes.
            state_dict: weights to save in place of the model's own, as gathered in a distributed run.
            include_backbone: write the backbone too, into a subfolder, for a repository that needs no other.
            push_to_hub: upload the folder as well, to `repo_id` (the folder's name by default) with `token`.
            repo_id, token: for `push_to_hub`.
            max_shard_size: for the backbone's files.
            safe_serialization: must stay `True`; nothing is pickled.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would pickle the weights; AIM repositories are safetensors.")
        if not is_main_process:
            return
        config = self._config_to_save(save_directory, include_backbone)
        weights = self.projector.state_dict(prefix="projector.") if state_dict is None else state_dict
        tensors = {key: value.cpu().contiguous() for key, value in weights.items() if key.startswith("projector.")}
        with staged_folder(save_directory) as folder:
            if tensors:
                (folder / PROJECTOR_WEIGHTS).write_bytes(projector_file(tensors, config))
                setattr(config, DIGEST_KEY, file_digest(folder / PROJECTOR_WEIGHTS))
            config.save_pretrained(folder)
            self.generation_config.save_pretrained(folder)
            if self._processor is not None or self._loaded_from is not None:
                self.processor.save_pretrained(folder)
            copy_shipped_files(folder)  # last: the processor may come from another version of this code
            if not (Path(save_directory) / "README.md").exists():
                (folder / "README.md").write_text(model_card(config, self.projector), encoding="utf-8")
            if include_backbone:
                shards: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
                self.backbone.save_pretrained(folder / BACKBONE_FOLDER, **shards)
        if push_to_hub:
            upload(save_directory, repo_id or Path(save_directory).name, token=token)

    def _config_to_save(self, target: str | os.PathLike[str], include_backbone: bool) -> AimConfig:
        """The configuration of a repository at `target`, naming a backbone that can be found from there."""
        config: AimConfig = copy.deepcopy(self.config)  # type: ignore[assignment]
        config.dtype = None  # projector and backbone have their own, in their own files
        backbone: Any = config.backbone_config
        backbone.name_or_path = ""
        if hasattr(backbone, "quantization_config"):
            del backbone.quantization_config
        if include_backbone:
            config.backbone_name_or_path, config.backbone_revision = None, None
            config.backbone_subfolder = BACKBONE_FOLDER
            if not has_fingerprint(self.backbone, config.backbone_fingerprint):  # initialized, tuned or resized since
                config.backbone_fingerprint = fingerprint(self.backbone)
        elif config.backbone_name_or_path is None and self._loaded_from is not None:
            name, hub = self._loaded_from
            if not (os.path.isdir(name) and os.path.isdir(target) and os.path.samefile(name, target)):
                config.backbone_name_or_path = os.path.abspath(name) if os.path.isdir(name) else name
                config.backbone_revision = hub.get("revision")
        elif config.backbone_name_or_path is None:
            logger.warning(
                "The backbone has no name to load it by: pass include_backbone=True, or give it again when loading "
                "(from_pretrained(folder, backbone=model))."
            )
        return config

    def push_to_hub(self, repo_id: str, *, include_backbone: bool = False, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes; a model card that is already there is kept.

        Args:
            repo_id: the repository, created if it does not exist.
            include_backbone: as for `save_pretrained`.
            **kwargs: `token`, `private`, `revision`, `commit_message`, `commit_description`, `create_pr`.

        Raises:
            ValueError: the backbone is a local folder, which nobody else could load.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_backbone=include_backbone)
            named = AimConfig.from_pretrained(folder).backbone_name_or_path
            if named is not None and os.path.isdir(named):
                raise ValueError(
                    f"The backbone is the local folder {named}, which others do not have. Push with "
                    "include_backbone=True, or load the plug-in with a backbone from the Hub."
                )
            return upload(folder, repo_id, **kwargs)
