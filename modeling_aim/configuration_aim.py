"""The configuration of an AIM repository: the backbone, what is read from it, and the form of the projector."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import transformers
from packaging.version import Version

MINIMUM_VERSIONS = {"transformers": "5.5", "torch": "2.10"}
LARGEST_SIZE = 2**17  # inner width of a projector
PROJECTOR_FORMS = ("identity", "linear", "linear_norm", "mlp", "residual", "residual_mlp")
DEPTH_FORMS = ("identity", "residual", "residual_mlp")  # forms for states that enter where they were read
OWN_SETTINGS = (
    "read_layers",
    "entry_layers",
    "read_span",
    "max_fused_tokens",
    "projector_form",
    "projector_intermediate_size",
)
PRESETS: dict[str, dict[str, Any]] = {  # every command and class takes its defaults from here
    "untrained": {"read_layers": None, "entry_layers": None, "projector_form": "identity"},
    "trained": {"read_layers": None, "entry_layers": None, "projector_form": "residual_mlp"},
    "paper": {"read_layers": [-1], "entry_layers": [0], "projector_form": "linear_norm"},
}
DEFAULT_DEPTH_FRACTION = 0.4  # of the decoder's layers: the default depth where states are read and put back
READ_SPANS = ("text", "answer")
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
AUTO_MAP = {
    "AutoConfig": "configuration_aim.AimConfig",
    "AutoModel": "modeling_aim.AimForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_aim.AimForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_aim.AimForConditionalGeneration",
}


def check_versions() -> None:
    """Raise `ImportError` when transformers or torch is older than the oldest supported release."""
    for name, installed in (("transformers", transformers.__version__), ("torch", torch.__version__)):
        if Version(installed).release < Version(MINIMUM_VERSIONS[name]).release:
            raise ImportError(
                f"AIM needs {name}>={MINIMUM_VERSIONS[name]}, but {name} {installed} is installed. "
                f'Run: pip install --upgrade "{name}>={MINIMUM_VERSIONS[name]}"'
            )


check_versions()  # before names that old releases lack are imported


from transformers import AutoConfig, PreTrainedConfig  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES  # noqa: E402


def by_part(requested: str | dict[str, Any] | None) -> Any:
    """Convert an `attn_implementation` or `experts_implementation` to the keys of the plug-in's configuration.

    Args:
        requested: one name for all parts, or a dictionary by part, whose keys may be the backbone's own.
    """
    if not isinstance(requested, dict) or requested.keys() <= {"", "backbone_config"}:
        return requested
    return {**({"": requested[""]} if "" in requested else {}), "backbone_config": requested}


def implementation(config: PreTrainedConfig, option: str) -> Any:
    """The value of `option` (see `IMPLEMENTATIONS`): one name, or a dictionary by part where the parts differ."""
    own = getattr(config, f"_{option}")
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    by_part_name = {name: implementation(part, option) for name, part in parts.items()}
    return own if all(value == own for value in by_part_name.values()) else {"": own, **by_part_name}


def preset_settings(
    preset: str,
    read_layers: Sequence[int] | None = None,
    entry_layers: Sequence[int] | None = None,
    projector_form: str | None = None,
) -> dict[str, Any]:
    """The settings of a preset, with given settings in place of its own.

    With `read_layers=[12]` alone, states enter at the input for the preset `"paper"`, and at depth 12 for the others.

    Raises:
        ValueError: there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: expected one of {', '.join(PRESETS)}.")
    overrides = {"read_layers": read_layers, "entry_layers": entry_layers, "projector_form": projector_form}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    return {**PRESETS[preset], **{k: list(v) if isinstance(v, tuple) else v for k, v in overrides.items()}}


def deepest_entry(text: PreTrainedConfig) -> int:
    """The deepest place at which states can enter: the last layer, or the last one with keys and values of its own.

    After it, layers reuse the keys and values of earlier layers (Gemma 4), so other tokens would not see the states.

    Args:
        text: the configuration of a text decoder.
    """
    return text.num_hidden_layers - 1 - (getattr(text, "num_kv_shared_layers", 0) or 0)


def default_depth(text: PreTrainedConfig) -> int:
    """The default depth: after 2 of 5 layers, after 13 of 32 (docs/LOG.md says how it was chosen).

    It lies after the first cross-attention layer, before which text has seen no image (Mllama), and no later than the
    layers whose keys and values later layers reuse (Gemma 4).

    Args:
        text: the configuration of a text decoder.
    """
    layers, deepest = text.num_hidden_layers, deepest_entry(text)
    depth = max(round(DEFAULT_DEPTH_FRACTION * layers), min(getattr(text, "cross_attention_layers", None) or [-1]) + 1)
    if deepest < layers - 1:  # of each kind of layers, the last one's keys and values are used
        last = {kind: number for number, kind in enumerate(text.layer_types[: deepest + 1])}
        depth = min(depth, *last.values())
    return max(1, depth)


@contextmanager
def usable(what: str) -> Iterator[None]:
    """Raise any error but `OSError` and `ImportError` as a `ValueError`; `what` names the damaged file."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        raise ValueError(
            f"{what} cannot be used ({type(error).__name__}: {error!s:.200}). It is damaged, or was written by "
            f"another version than transformers {transformers.__version__}."
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


class AimConfig(PreTrainedConfig):
    """The settings of an AIM plug-in (arXiv 2406.07588): everything needed to rebuild it around its backbone.

    Args:
        backbone_config: configuration (or its dict) of the vision-language backbone. Filled in when a backbone is
            attached, and enough to build a randomly initialised model with `from_config`.
        backbone_name_or_path: Hub id or folder of the frozen backbone. `None` when it lies in `backbone_subfolder`.
        backbone_revision: revision of the backbone's repository; it is not the revision of this repository.
        backbone_subfolder: folder, in this repository or in the backbone's, that holds the backbone.
        backbone_fingerprint: a few weights that identify the backbone of the projector, to refuse another one.
        read_layers: which hidden states of a demonstration are kept: `k >= 1` is the state after `k` decoder layers,
            `0` the input embedding, `-1` the last state, after the final norm (the paper's). Several are concatenated
            along the feature axis. `None` is two fifths of the layers; with a projector at depth it is that depth and
            0: the map at the input changes the word, which steers the query, and the map at depth changes the state,
            which has seen the image.
        entry_layers: where fused tokens enter when a query is answered. `[0]` is the input embeddings (the paper's),
            `k` the input of decoder layer `k` (counted from 0). `None`, the default, puts each state back at the depth
            where it was read (entry_layers equals read_layers), which needs no training; for the forms that can only
            map to the input, it is `[0]`.
        read_span: `"text"` keeps all text positions of a demonstration, `"answer"` those of its answer only.
        max_fused_tokens: the most fused tokens of a demonstration; more are averaged down to that number. `None`: one
            for each text token.
        projector_form: `"identity"` (no weights; only where states enter at the depth where they were read),
            `"residual"`, `"residual_mlp"`, and for the input alone `"linear"`, `"linear_norm"` (the paper's) and
            `"mlp"`; see `AimProjector`.
        projector_intermediate_size: inner width of the `mlp` forms; when `None`, twice the backbone's width, or less
            where that is over 2**24 weights.
        projector_norm: norm of a fused token at the input when training starts: the mean norm of the backbone's input
            embeddings, measured when a backbone is attached.

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
        entry_layers: list[int] | None = None,
        read_span: str = "text",
        max_fused_tokens: int | None = None,
        projector_form: str = "identity",
        projector_intermediate_size: int | None = None,
        projector_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            with usable("backbone_config"):
                backbone_config = AutoConfig.for_model(**backbone_config)
        elif not isinstance(backbone_config, PreTrainedConfig | None):
            raise ValueError(f"backbone_config={backbone_config!r:.80}: expected the configuration of a backbone.")
        self.backbone_config = copy.deepcopy(backbone_config)  # the parent class writes into the parts of a config
        self.backbone_name_or_path = backbone_name_or_path
        self.backbone_revision = backbone_revision
        self.backbone_subfolder = backbone_subfolder
        self.backbone_fingerprint = backbone_fingerprint
        for name, layers in (("read_layers", read_layers), ("entry_layers", entry_layers)):
            if not isinstance(layers, (list, tuple, range, None.__class__)):
                raise ValueError(f"{name}={layers!r:.80}: expected a list of whole numbers, or None.")
        self.read_layers: Any = None if read_layers is None else list(read_layers)
        self.entry_layers: Any = None if entry_layers is None else list(entry_layers)
        self.read_span = read_span
        self.max_fused_tokens = max_fused_tokens
        self.projector_form = projector_form
        self.projector_intermediate_size = projector_intermediate_size
        self.projector_norm = projector_norm
        for option in IMPLEMENTATIONS:
            if option in kwargs:  # from the library's loader
                kwargs[option] = by_part(kwargs[option])
        kwargs["auto_map"] = dict(AUTO_MAP)
        kwargs["architectures"] = ["AimForConditionalGeneration"]
        super().__init__(**kwargs)
        self.check()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As for every configuration of transformers; raises `ValueError` for one that cannot be used."""
        with usable(f"The config.json of {pretrained_model_name_or_path}"):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for every configuration of transformers; raises `ValueError` for one that cannot be used."""
        with usable("This configuration"):
            return super().from_dict(config_dict, **kwargs)

    def check(self) -> None:
        """Fill in layers that are `None`, and raise `ValueError` for a setting out of its range.

        Layers are filled in, and compared with the number of decoder layers, only when the backbone is known.
        """
        if self.projector_form not in PROJECTOR_FORMS:
            raise ValueError(f"projector_form={self.projector_form!r}: expected one of {', '.join(PROJECTOR_FORMS)}.")
        if self.read_span not in READ_SPANS:
            raise ValueError(f"read_span={self.read_span!r}: expected one of {', '.join(READ_SPANS)}.")
        for name, most in (("max_fused_tokens", 2**31), ("projector_intermediate_size", LARGEST_SIZE)):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise ValueError(
                    f"{name}={value!r:.80}: expected a whole number, at least 1, at most {most}, or None."
                )
        if not (_is_number(self.projector_norm) and self.projector_norm > 0):
            raise ValueError(f"projector_norm={self.projector_norm!r:.80}: expected a positive number.")
        for name in ("backbone_name_or_path", "backbone_revision", "backbone_subfolder"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.isprintable()):
                raise ValueError(f"{name}={value!r:.80}: expected text, or None.")
        prints = self.backbone_fingerprint
        if prints is not None and not (isinstance(prints, (list, tuple)) and all(map(_is_number, prints))):
            raise ValueError(f"backbone_fingerprint={prints!r:.80}: expected a list of finite numbers, or None.")
        layers = self.num_layers
        if self.read_layers is None and layers is not None:
            self.read_layers = self._default_layers()
        if self.read_layers is not None:
            self._check_layers(layers)

    def _default_layers(self) -> list[int]:
        """The default read layers: one depth, and the input too for a projector at depth."""
        if self.entry_layers not in (None, [0]):
            return list(self.entry_layers)
        both = self.entry_layers is None and self.projector_form in DEPTH_FORMS and self.projector_form != "identity"
        depth = default_depth(self.get_text_config())
        return [0, depth] if both else [depth]

    def _check_layers(self, layers: int | None) -> None:
        """Raise `ValueError` for layers that do not exist, or that states cannot enter."""
        read: list[Any] = self.read_layers
        whole = all(isinstance(k, int) and not isinstance(k, bool) for k in read)
        if not read or not whole or len(set(read)) < len(read) or not all(-1 <= k <= (layers or k) for k in read):
            limit = f"-1 or 0..{layers}" if layers else "-1 or 0, 1, 2, ..."
            raise ValueError(
                f"read_layers={read}: expected different whole numbers, each {limit} (-1 is the last state, after the "
                "norm; 0 the input embedding)."
            )
        if self.entry_layers is None:
            self.entry_layers = list(read) if self.projector_form in DEPTH_FORMS else [0]
        if self.entry_layers == [0] and read != [0]:
            if self.projector_form == "identity":
                raise ValueError(
                    f"projector_form='identity' puts states back where they were read, at {read}; entry_layers=[0] "
                    "needs a projector. Leave entry_layers out, or choose a form such as 'residual_mlp'."
                )
            return
        if self.entry_layers != read:
            raise ValueError(
                f"entry_layers={self.entry_layers} with read_layers={read}: states enter either where they were read "
                "(entry_layers=None) or, through a projector, at the input embeddings (entry_layers=[0])."
            )
        deepest = None if layers is None else deepest_entry(self.get_text_config())
        outside = [k for k in read if k == -1 or (deepest is not None and k > deepest)]
        if outside:
            limit = "0, 1, 2, ..." if deepest is None else f"0..{deepest}"
            last = layers is None or deepest == layers - 1
            place = "after the last layer" if last else "after the last layer that has keys and values of its own"
            raise ValueError(
                f"read_layers={read}: states can be put back at {limit}, but not at {outside[0]}, {place}. Read at a "
                "smaller depth, or use entry_layers=[0] with a projector (preset 'paper')."
            )
        if self.projector_form not in DEPTH_FORMS:
            raise ValueError(
                f"projector_form={self.projector_form!r} maps to input embeddings: it needs entry_layers=[0]. At the "
                f"depth where states were read use one of {', '.join(DEPTH_FORMS)}."
            )

    @property
    def form(self) -> dict[str, Any]:
        """The settings that the projector's weights depend on, besides the backbone."""
        names = ("projector_form", "read_layers", "entry_layers", "projector_intermediate_size")
        return {name: getattr(self, name) for name in names}

    @property
    def enters_at_depth(self) -> bool:
        """Whether states are put back where they were read, rather than mapped to the input embeddings."""
        return self.entry_layers == self.read_layers

    @property
    def num_layers(self) -> int | None:
        """Decoder layers of the backbone, `None` while no backbone is known."""
        return None if self.backbone_config is None else self.get_text_config().num_hidden_layers

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's input embeddings, and of a fused token at each depth that it enters."""
        if self.backbone_config is None:
            raise ValueError("This configuration knows no backbone yet (backbone_config is None).")
        return self.get_text_config().hidden_size

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The backbone's text configuration, which is what generation and pipelines ask for."""
        if self.backbone_config is None:
            return self
        return self.backbone_config.get_text_config(*args, **kwargs)


# `transformers serve` and the any-to-any pipeline look here for what a model type takes and how it is loaded; no list
# of transformers that is made from it has configurations of other packages in it.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault(AimConfig.model_type, "AimForConditionalGeneration")
