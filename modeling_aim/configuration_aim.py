"""What an AIM repository says about itself: which backbone, what is read of it, and the form of the projector."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version

MINIMUM_VERSIONS = {"transformers": "5.5", "torch": "2.10"}
PROJECTOR_FORMS = ("linear", "linear_norm", "mlp", "residual", "residual_mlp")
OWN_SETTINGS = (
    "read_layers",
    "read_span",
    "max_fused_tokens",
    "projector_form",
    "projector_intermediate_size",
    "placeholder_token_id",
)
READ_SPANS = ("text", "answer")
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
AUTO_MAP = {
    "AutoConfig": "configuration_aim.AimConfig",
    "AutoModel": "modeling_aim.AimForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_aim.AimForConditionalGeneration",
}


def check_versions() -> None:
    """Raise `ImportError` when transformers or torch is older than the oldest release AIM works and is safe on."""
    for name, found in (("transformers", transformers.__version__), ("torch", torch.__version__)):
        if Version(found).release < Version(MINIMUM_VERSIONS[name]).release:
            raise ImportError(
                f"AIM needs {name}>={MINIMUM_VERSIONS[name]}, but {name} {found} is installed. "
                f'Run: pip install --upgrade "{name}>={MINIMUM_VERSIONS[name]}"'
            )


check_versions()  # before anything that an old release does not have is imported

from transformers import AutoConfig, PreTrainedConfig  # noqa: E402


def by_part(asked: Any) -> Any:
    """An `attn_implementation` or `experts_implementation` with the keys of the plug-in's configuration.

    Args:
        asked: a name for all parts, or a dictionary by part; its keys may be those that the backbone itself takes.
    """
    if not isinstance(asked, dict) or asked.keys() <= {"", "backbone_config"}:
        return asked
    return {**({"": asked[""]} if "" in asked else {}), "backbone_config": asked}


def implementation(config: PreTrainedConfig, option: str) -> Any:
    """What a configuration says under `option` (see `IMPLEMENTATIONS`) of itself and its parts, in one value."""
    own = getattr(config, f"_{option}")
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    said = {name: implementation(part, option) for name, part in parts.items()}
    return own if all(value == own for value in said.values()) else {"": own, **said}


class AimConfig(PreTrainedConfig):
    """The settings of an AIM plug-in (arXiv 2406.07588): everything needed to rebuild it around its backbone.

    Args:
        backbone_config: configuration (or its dict) of the vision-language backbone. Filled in when a backbone is
            attached, and enough to build a randomly initialised model with `from_config`.
        backbone_name_or_path: Hub id or folder of the frozen backbone. `None` when it lies in `backbone_subfolder`.
        backbone_revision: revision of the backbone's repository; it is not the revision of this repository.
        backbone_subfolder: folder, in this repository or in the backbone's, that holds the backbone.
        backbone_fingerprint: some weights of the backbone the projector was made for, to refuse another one.
        read_layers: which hidden states are kept of a demonstration: `-1` is the last one, after the final norm
            (the paper's), `k >= 1` the output of decoder layer `k`. Several are joined along the feature axis.
        read_span: `"text"` keeps all text positions of a demonstration, `"answer"` those of its answer only.
        max_fused_tokens: most fused tokens a demonstration; longer ones are averaged down. `None`: one a text token.
        projector_form: `"linear"`, `"linear_norm"` (the paper's), `"mlp"`, `"residual"` or `"residual_mlp"`; see
            `AimProjector`.
        projector_intermediate_size: inner width of the `mlp` forms; twice the backbone's width when `None`.
        projector_norm: norm of a fused token at the start of training: the mean norm of the backbone's input
            embeddings, measured when a backbone is attached.
        placeholder_token_id: the ordinary token id that holds the places of fused tokens in a prompt.

    Raises:
        ValueError: a setting is out of its range; the message names the setting and what was given.
    """

    model_type = "aim_icl"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        backbone_name_or_path: str | None = None,
        backbone_revision: str | None = None,
        backbone_subfolder: str | None = None,
        backbone_fingerprint: list[float] | None = None,
        read_layers: list[int] | None = None,
        read_span: str = "text",
        max_fused_tokens: int | None = None,
        projector_form: str = "linear_norm",
        projector_intermediate_size: int | None = None,
        projector_norm: float = 1.0,
        placeholder_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = copy.deepcopy(backbone_config)  # the parent class writes into the parts of a config
        self.backbone_name_or_path = backbone_name_or_path
        self.backbone_revision = backbone_revision
        self.backbone_subfolder = backbone_subfolder
        self.backbone_fingerprint = backbone_fingerprint
        self.read_layers = [-1] if read_layers is None else list(read_layers)
        self.read_span = read_span
        self.max_fused_tokens = max_fused_tokens
        self.projector_form = projector_form
        self.projector_intermediate_size = projector_intermediate_size
        self.projector_norm = projector_norm
        self.placeholder_token_id = placeholder_token_id
        for option in IMPLEMENTATIONS:
            if option in kwargs:  # from the library's loader
                kwargs[option] = by_part(kwargs[option])
        kwargs["auto_map"] = dict(AUTO_MAP)
        kwargs["architectures"] = ["AimForConditionalGeneration"]
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise `ValueError` for a setting out of its range; the layers' range is known once a backbone is."""
        layers = self.num_layers
        bad = [k for k in self.read_layers if k != -1 and not 1 <= k <= (layers or k)]
        if bad or not self.read_layers:
            limit = f"-1 or 1..{layers}" if layers else "-1 or 1, 2, ..."
            raise ValueError(f"read_layers={self.read_layers}: each must be {limit} (-1 is the last, after the norm).")
        if self.projector_form not in PROJECTOR_FORMS:
            raise ValueError(f"projector_form={self.projector_form!r}: expected one of {', '.join(PROJECTOR_FORMS)}.")
        if self.read_span not in READ_SPANS:
            raise ValueError(f"read_span={self.read_span!r}: expected one of {', '.join(READ_SPANS)}.")
        if self.max_fused_tokens is not None and self.max_fused_tokens < 1:
            raise ValueError(f"max_fused_tokens={self.max_fused_tokens}: expected at least 1, or None for no limit.")
        if not self.projector_norm > 0:
            raise ValueError(f"projector_norm={self.projector_norm}: expected a positive number.")

    @property
    def num_layers(self) -> int | None:
        """Decoder layers of the backbone, `None` while no backbone is known."""
        return None if self.backbone_config is None else self.get_text_config().num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's input embeddings, and so of a fused token."""
        if self.backbone_config is None:
            raise ValueError("This configuration knows no backbone yet (backbone_config is None).")
        return self.get_text_config().hidden_size

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The backbone's text configuration, which is what generation and pipelines ask for."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(*args, **kwargs)
