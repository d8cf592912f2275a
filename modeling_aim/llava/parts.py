"""A stock LLaVA from a vision tower and a causal language model that were never together.

The attributes of a class are not trusted where a value can be measured: a pass of the vision tower counts its tokens,
one of the language model shows whether it is causal, and one of both together whether LLaVA's class computes the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import logging

from ..backbone_aim import laptop_quantization_config, never_repack
from ..files_aim import check_place
from ..runs import PRECISIONS
from .chat import ChatWriter, accept_images, chosen_template
from .settings import BackboneSettings

logger = logging.get_logger(__name__)

UNUSED = ("pooler", "head", "classifier")  # weights of a tower that LLaVA never runs
MOST_EXTRA_TOKENS = 16  # of a tower beside its patches: a class token, a distillation token, registers
VOCABULARY_STEP = 64  # the rows of the embeddings are a multiple of it


@dataclass
class Joined:
    """A LLaVA with its processor.

    Args:
        model: vision tower and language model with a connector of random weights.
        processor: its processor, whose chat template takes images.
        writer: of conversations for it.
    """

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    writer: ChatWriter

    @property
    def connector(self) -> torch.nn.Module:
        return self.model.model.multi_modal_projector

    @property
    def vision_tower(self) -> torch.nn.Module:
        return self.model.model.vision_tower

    @property
    def language_model(self) -> torch.nn.Module:
        """The decoder, without its head."""
        return self.model.model.language_model


def join(settings: BackboneSettings, load_in_4bit: bool = False) -> Joined:
    """Load both parts and join them; the same weights each time.

    Args:
        settings: name the parts.
        load_in_4bit: hold the language model in 4-bit.

    Raises:
        ValueError: a part is not of its kind, image processor and tower disagree, or there is no chat template.
        FileNotFoundError: a part does not exist.
    """
    dtype = PRECISIONS[settings.dtype]
    tower_config = _tower_config(settings)
    language_config = _language_config(settings)
    tokenizer = AutoTokenizer.from_pretrained(settings.language_model, revision=settings.language_revision)
    template = chosen_template(tokenizer, settings.chat_template, settings.language_model)
    image_id = _add_tokens(tokenizer, settings.image_token)
    tokenizer.chat_template = accept_images(tokenizer, template, settings.image_token)
    images = _image_processor(settings)
    tower = _load_tower(settings, tower_config, dtype)
    shape = _measured(settings, tower, images)
    language: Any = _load_language_model(settings, language_config, dtype, load_in_4bit)
    torch.manual_seed(settings.seed)
    if len(tokenizer) > language.get_input_embeddings().weight.shape[0]:
        language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_STEP)
    model = _joined(settings, tower, language, shape, image_id)
    tokenizer.padding_side = "left"  # for answers; batches of training are padded on the right
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=shape.patch_size,
        vision_feature_select_strategy=shape.strategy,
        chat_template=tokenizer.chat_template,
        image_token=settings.image_token,
        num_additional_image_tokens=shape.extra,
    )
    writer = ChatWriter(tokenizer, settings.image_token, shape.image_tokens)
    _set_generation(model, language, tokenizer, writer.end_id, image_id)
    return Joined(model, processor, writer)


# --- vision tower


@dataclass(frozen=True)
class TowerShape:
    """What a pass of a vision tower shows: its patch size in pixels, patches of an image, and tokens beside them."""

    patch_size: int
    patches: int
    extra: int

    @property
    def strategy(self) -> Literal["default", "full"]:
        """LLaVA's: the first token is left out where the tower has one beside its patches."""
        return "default" if self.extra else "full"

    @property
    def image_tokens(self) -> int:
        """Features of an image that reach the language model."""
        return self.patches + max(self.extra - 1, 0)


def _tower_config(settings: BackboneSettings) -> PreTrainedConfig:
    """The configuration of the vision tower alone.

    Raises:
        ValueError: the model has no image encoder.
    """
    name = settings.vision_tower
    check_place(name)
    whole = AutoConfig.from_pretrained(name, revision=settings.vision_revision)
    config = getattr(whole, "vision_config", None) or whole
    known = type(config) in MODEL_MAPPING
    if not known or getattr(MODEL_MAPPING[type(config)], "main_input_name", "") != "pixel_values":
        raise ValueError(
            f"The vision tower {name} has no image encoder: it is a {whole.model_type} model. Give a vision model of "
            "transformers (CLIP, SigLIP, ViT, DINOv2), or a checkpoint of which one is a part."
        )
    return config


def _load_tower(settings: BackboneSettings, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    name, verbosity = settings.vision_tower, logging.get_verbosity()
    logging.set_verbosity_error()  # of a whole CLIP checkpoint, it would list the text half as unexpected
    try:
        tower_class: Any = MODEL_MAPPING[type(config)]
        tower, info = tower_class.from_pretrained(
            name, config=config, dtype=dtype, revision=settings.vision_revision, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if not set(key.split(".")) & set(UNUSED))
    if missing:
        raise ValueError(
            f"{len(missing)} weights of {type(tower).__name__} are missing in {name}: {', '.join(missing[:3])}. Give "
            "a vision tower, or a checkpoint of the CLIP or SigLIP kind."
        )
    return tower.eval().requires_grad_(False)


def _image_processor(settings: BackboneSettings) -> Any:
    name = settings.image_processor or settings.vision_tower
    revision = settings.vision_revision if settings.image_processor is None else None
    try:
        return AutoImageProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no image processor ({str(error).splitlines()[0]:.200}). Name one that fits the vision tower "
            "with image_processor (--image-processor)."
        ) from error


@torch.no_grad()
def _measured(settings: BackboneSettings, tower: PreTrainedModel, images: Any) -> TowerShape:
    """How many tokens the tower returns for an image as the processor prepares it.

    Args:
        settings: name both.
        tower: the vision tower.
        images: its image processor, which gets the size of its images as `crop_size` where it has none.

    Raises:
        ValueError: processor and tower disagree, or LLaVA cannot use what the tower gives.
    """
    who = f"The image processor {settings.image_processor or settings.vision_tower}"
    blank = [Image.new("RGB", size, "grey") for size in ((96, 64), (64, 96))]
    pixels = images(blank, return_tensors="pt").get("pixel_values")
    if pixels is None or pixels.ndim != 4 or len(pixels) != len(blank):
        raise ValueError(
            f"{who} gives pixels of the shape {None if pixels is None else tuple(pixels.shape)} for two images; LLaVA "
            "takes (images, 3, height, width), one size for all. Towers of tiles or free sizes cannot be used."
        )
    height, width = pixels.shape[2:]
    config: Any = tower.config
    if not getattr(images, "crop_size", None):  # LLaVA's processor reads the size of an image there
        images.crop_size = {"height": height, "width": width}
    patch, size = (_number(getattr(config, name, None)) for name in ("patch_size", "image_size"))
    other = _number(getattr(images, "patch_size", None))
    if patch is None or (other is not None and other != patch):
        raise ValueError(
            f"{who} has patches of {other} pixels, the vision tower {settings.vision_tower} of {patch}. Give the "
            "processor of the tower (--image-processor)."
        )
    try:
        states = tower(pixels.to(tower.device, tower.dtype), output_hidden_states=True).hidden_states
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{who} makes images of {height} x {width} pixels, but the vision tower {settings.vision_tower} takes "
            f"{size} x {size} ({str(error).splitlines()[0]:.150}). Give the processor of the tower "
            "(--image-processor)."
        ) from error
    if not states or not -len(states) <= settings.vision_feature_layer < len(states):
        raise ValueError(
            f"vision_feature_layer={settings.vision_feature_layer}: {settings.vision_tower} gives the states of "
            f"{len(states or ())} layers, the embeddings among them."
        )
    features = states[settings.vision_feature_layer]
    shape = TowerShape(patch, (height // patch) * (width // patch), 0)
    extra = features.shape[1] - shape.patches if features.ndim == 3 else -1
    if not 0 <= extra <= MOST_EXTRA_TOKENS or features.shape[-1] != config.hidden_size:
        raise ValueError(
            f"The vision tower {settings.vision_tower} makes features of the shape {tuple(features.shape[1:])} of an "
            f"image of {height} x {width} pixels; expected {shape.patches} patches of {patch} pixels with at most "
            f"{MOST_EXTRA_TOKENS} tokens beside them, {config.hidden_size} wide. LLaVA takes flat vision transformers."
        )
    return TowerShape(patch, shape.patches, extra)


def _number(value: Any) -> int | None:
    """A side in pixels, of settings that may have two equal ones."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        return int(value[0])
    return value if isinstance(value, int) else None


# --- language model


def _language_config(settings: BackboneSettings) -> PreTrainedConfig:
    """The configuration of the language model.

    Raises:
        ValueError: it is no causal language model, or has image input already.
    """
    name = settings.language_model
    check_place(name)
    config = AutoConfig.from_pretrained(name, revision=settings.language_revision)
    if getattr(config, "vision_config", None) is not None:
        raise ValueError(
            f"{name} is a vision-language model ({config.model_type}) already: AIM takes it as a backbone as it is. "
            "Give a language model of text alone."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_MAPPING:
        raise ValueError(_not_causal(name, config))
    return config


def _not_causal(name: str, config: PreTrainedConfig) -> str:
    return (
        f"{name} is no causal language model: it is a {config.model_type} model. Give one that AutoModelForCausalLM "
        "loads, such as a Llama, Qwen or Mistral checkpoint."
    )


def _load_language_model(
    settings: BackboneSettings, config: PreTrainedConfig, dtype: torch.dtype, load_in_4bit: bool
) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if load_in_4bit:
        options["quantization_config"] = laptop_quantization_config()
        if torch.cuda.is_available():
            options["device_map"] = {"": torch.cuda.current_device()}
    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(
        settings.language_model, config=config, dtype=dtype, revision=settings.language_revision,
        output_loading_info=True, **options,
    )  # fmt: skip
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{len(missing)} weights of {type(model).__name__} are missing in {settings.language_model}: "
            f"{', '.join(missing[:3])}. It is incomplete, or was saved without its language-modelling head."
        )
    if load_in_4bit:
        never_repack(model)
    model.eval().requires_grad_(False)
    if not _is_causal(model):
        raise ValueError(_not_causal(settings.language_model, config) + " Its tokens see those that come later.")
    return model


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether another last token leaves the logits before it as they are."""
    ids = torch.arange(8, device=model.device).unsqueeze(0)
    other = ids.clone()
    other[0, -1] += 1
    before, after = (model(input_ids=tokens).logits[:, :-1].float() for tokens in (ids, other))
    return _same(before, after)


def _same(expected: torch.Tensor, logits: torch.Tensor) -> bool:
    scale = float(expected.abs().max().clamp(min=1e-6))
    return expected.shape == logits.shape and float((expected - logits).abs().max()) <= 0.02 * scale


# --- both together


def _add_tokens(tokenizer: Any, image_token: str) -> int:
    """Give the tokenizer an image token and a padding token, where it lacks them; the id of the first."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} says not which characters a token is of. Give a language model with a "
            "tokenizer.json."
        )
    if tokenizer.convert_tokens_to_ids(image_token) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens(_special(image_token), special_tokens=True)
    if tokenizer.pad_token is None:
        logger.warning("The tokenizer has no padding token: <pad> is added.")
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer.convert_tokens_to_ids(image_token)


def _special(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, special=True, normalized=False)


@torch.no_grad()
def _joined(
    settings: BackboneSettings, tower: PreTrainedModel, language: Any, shape: TowerShape, image_id: int
) -> LlavaForConditionalGeneration:
    """LLaVA's class around the two models, which are not copied.

    Raises:
        ValueError: LLaVA's class computes something else than the language model's own.
    """
    text_config = language.config
    text_config.vocab_size = language.get_input_embeddings().weight.shape[0]
    config = LlavaConfig(
        vision_config=tower.config, text_config=text_config, image_token_index=image_id,
        image_seq_length=shape.image_tokens, vision_feature_layer=settings.vision_feature_layer,
        vision_feature_select_strategy=shape.strategy, tie_word_embeddings=bool(text_config.tie_word_embeddings),
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    ids = torch.arange(8, device=language.device).unsqueeze(0)
    expected = language(input_ids=ids).logits.float()
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    model.eval()
    same = type(language.base_model) is MODEL_MAPPING[type(text_config)] and not any(
        weight.is_meta for weight in (*model.parameters(), *model.buffers())
    )
    if not same or model.lm_head.bias is not None or not _same(expected, model(input_ids=ids).logits.float()):
        raise ValueError(
            f"LLaVA's class does not compute what {type(language).__name__} does: its head is more than a linear map "
            "of the last layer's states (a bias, a scale or a cap of the logits). Choose another language model."
        )
    return model


def _set_generation(
    model: LlavaForConditionalGeneration, language: Any, tokenizer: Any, end_id: int, image_id: int
) -> None:
    """How answers end: as the language model's do, and by the token that ends an answer in its chat template."""
    generation = copy.deepcopy(language.generation_config or GenerationConfig())
    ends = generation.eos_token_id
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, end_id]
    generation.eos_token_id = sorted({end for end in ends if end is not None})
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), image_id})  # it is no answer
    model.generation_config = generation
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
