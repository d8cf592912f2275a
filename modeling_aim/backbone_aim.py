"""Read, identify and load any backbone through the names that all families share, and leave its state unchanged.

No family is named here. A backbone has `base_model` (no LM head), `get_decoder`,
`get_input_embeddings` and `config.get_text_config()`.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoQuantizationConfig

from .batching_aim import repeat_images, shared_images
from .families_aim import family_of
from .files_aim import HUB_KWARGS

INPUT, VISION, DECODER = -2, -3, -4  # what enters the first layer, leaves the vision tower, enters the decoder
SHARED = -5  # asked for where images of a batch are equal: the call of the vision tower with each of them once
INPUT_ALONE = (
    "What works is the input: from_backbone(..., preset='paper'), read_layers=[-1] and entry_layers=[0], with a "
    "projector that is trained."
)
STATE_NAMES = ("rope_deltas",)  # what some backbones remember of the last prompt, as attributes of their modules

_TURNS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_RESTS: WeakKeyDictionary[PreTrainedModel, _Rest] = WeakKeyDictionary()
_READING: ContextVar[dict[int, Any] | None] = ContextVar("aim_reading", default=None)


class _ReadFinished(Exception):
    """Raised after the last layer that is read, so that later layers do not run."""


def why_not(backbone: PreTrainedModel) -> str | None:
    """Why AIM cannot work with a backbone, in one sentence; `None` where it can."""
    if backbone.config.is_encoder_decoder:
        return "it is an encoder-decoder, whose answer does not continue the prompt that fused tokens stand in."
    if not backbone.can_generate():
        return "it does not generate text."
    if not {"input_ids", "attention_mask"} <= set(inspect.signature(backbone.forward).parameters):
        return "it does not take its prompt as input_ids and attention_mask."
    try:
        embedding_weight(backbone)
    except (AssertionError, AttributeError, NotImplementedError):
        return "it does not say through get_input_embeddings() how it embeds its prompt."
    if backbone.base_model is backbone and _lm_head(backbone) is None:
        return "it has neither a model below its LM head nor says through get_output_embeddings() where that is."
    return None


def check_usable(backbone: PreTrainedModel) -> None:
    """Raise `ValueError` for a backbone that AIM cannot work with; the message says why."""
    reason = why_not(backbone)
    if reason is not None:
        raise ValueError(f"AIM cannot use {type(backbone).__name__}: {reason}")


def decoder_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The stack of text decoder layers, in order.

    Raises:
        ValueError: the backbone has no stack of `num_hidden_layers` layers in its decoder.
    """
    count = backbone.config.get_text_config(decoder=True).num_hidden_layers
    decoder = backbone.get_decoder()
    own = getattr(decoder, "layers", None)
    stacks = [own] if own is not None else [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    for stack in stacks:
        if isinstance(stack, nn.ModuleList) and len(stack) == count:
            return stack
    raise ValueError(
        f"{type(backbone).__name__} has no stack of {count} decoder layers where AIM looks for it "
        f"(get_decoder() is {type(decoder).__name__}), so states cannot enter at depth. {INPUT_ALONE}"
    )


def check_depth(backbone: PreTrainedModel) -> None:
    """Raise `ValueError` for a backbone in which no state can be read or enter at depth; the message has the way out.

    Where a family's layers hand on something else is known in `families_aim.py`; of others, `layer_input` says so.
    """
    decoder_layers(backbone)
    if not family_of(backbone.config.model_type).states_at_depth:
        raise ValueError(
            f"The decoder layers of {type(backbone).__name__} hand on several streams of states at once, of which "
            f"none is the state of a word, so states cannot enter at depth. {INPUT_ALONE}"
        )


def watch_layers(backbone: PreTrainedModel) -> None:
    """Register the hooks through which `read_hidden_states` sees layers and images.

    The hooks do nothing outside a read, so several plug-ins can share a backbone, and a read in one thread is
    invisible to the others (`ContextVar`).
    """
    decoder = backbone.get_decoder()
    if _keep_decoder in decoder._forward_pre_hooks.values():  # another plug-in has registered them
        return
    decoder.register_forward_pre_hook(_keep_decoder, with_kwargs=True)
    head = _lm_head(backbone)
    if backbone.base_model is backbone and head is not None:
        head.register_forward_pre_hook(_keep_last)
    tower = backbone.get_encoder("image") if hasattr(backbone, "get_encoder") else backbone
    if tower is not None and tower is not backbone:
        tower.register_forward_pre_hook(_share_images, with_kwargs=True)
        tower.register_forward_hook(_keep_vision)
    with suppress(ValueError):  # without a stack of layers only the last state can be read, and no image features
        layers = decoder_layers(backbone)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(_keep_layer_input, number), with_kwargs=True)
        layers[-1].register_forward_hook(partial(_keep_layer_output, len(layers)))


def layer_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | str, torch.Tensor]:
    """The hidden states `(batch, length, width)` that a decoder layer is called with, and the argument they are.

    Raises:
        ValueError: what it is called with has another shape.
    """
    named = [("hidden_states", kwargs["hidden_states"])] if "hidden_states" in kwargs else []
    given: list[tuple[int | str, Any]] = [*named, *enumerate(args), *kwargs.items()]
    states = [(place, value) for place, value in given if isinstance(value, torch.Tensor) and value.ndim >= 3]
    states = [(place, value) for place, value in states if value.is_floating_point()]
    if states and states[0][1].ndim == 3:
        return states[0]
    shape = f"with states of the shape {tuple(states[0][1].shape)}" if states else f"with {sorted(kwargs)}"
    raise ValueError(
        f"A decoder layer is called {shape} where (batch, length, width) is expected, so states cannot be read or "
        f"enter at depth. {INPUT_ALONE}"
    )


def _keep_layer_input(number: int, layer: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Keep the state after `number` layers, also for earlier layers that this pass skipped (cross-attention)."""
    kept = _READING.get()
    if kept is None:
        return
    wanted = [depth for depth in kept if kept[depth] is None and (depth == INPUT or 0 < depth <= number)]
    with suppress(ValueError) if wanted == [INPUT] else nullcontext():  # images may be seen in the tower instead
        kept.update(dict.fromkeys(wanted, layer_input(args, kwargs)[1]) if wanted else {})
    if -1 not in kept and max(kept) <= number:
        raise _ReadFinished


def _keep_layer_output(number: int, layer: nn.Module, args: Any, output: Any) -> None:
    kept = _READING.get()
    if kept is not None and number in kept:
        kept[number] = output[0] if isinstance(output, tuple) else output
        if -1 not in kept:
            raise _ReadFinished


def _lm_head(backbone: PreTrainedModel) -> nn.Module | None:
    """The LM head, of the backbone or of its decoder."""
    for module in (backbone, backbone.get_decoder()):
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        if head is not None:
            return head
    return None


def _keep_last(head: nn.Module, args: Any) -> None:
    """Read a backbone that has no separate model below its LM head from the input of the head."""
    kept = _READING.get()
    if kept is not None and -1 in kept:
        kept[-1] = args[0]
        raise _ReadFinished


def _share_images(tower: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    kept = _READING.get()
    if kept is None or SHARED not in kept:
        return None
    kept[SHARED] = shared = shared_images(args, kwargs)
    return None if shared is None else (shared.args, shared.kwargs)


def _keep_vision(tower: nn.Module, args: Any, output: Any) -> Any:
    kept = _READING.get()
    if kept is None:
        return None
    if kept.get(SHARED) is not None:
        output = repeat_images(tower, kept[SHARED], output)
    if VISION in kept:
        first = output if isinstance(output, torch.Tensor) else getattr(output, "last_hidden_state", None)
        kept[VISION] = output[0] if first is None else first
    return output


def _keep_decoder(decoder: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    kept = _READING.get()
    if kept is not None and DECODER in kept:
        kept[DECODER] = dict(kwargs)
        raise _ReadFinished


ALONE = {"inputs_embeds", "attention_mask", "position_ids", "input_ids", "cache_position", "past_key_values"}


@torch.no_grad()
def decoder_inputs(backbone: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The embeddings `(batch, length, width)` that the text decoder gets for a prompt.

    Raises:
        ValueError: it gets more than embeddings at consecutive positions.
    """
    kept: dict[int, Any] = {DECODER: None}
    token = _READING.set(kept)
    try:
        with preserved_state(backbone):
            backbone.base_model(**inputs, use_cache=False, return_dict=True)
    except _ReadFinished:
        pass
    finally:
        _READING.reset(token)
    found = kept[DECODER] or {}
    embeddings, mask, places = (found.get(name) for name in ("inputs_embeds", "attention_mask", "position_ids"))
    more = sorted(name for name, value in found.items() if name not in ALONE and _holds_tensors(value))
    if not isinstance(embeddings, torch.Tensor):
        embeddings, more = torch.empty(0), ["images by cross-attention, or ids instead of embeddings"]
    elif isinstance(places, torch.Tensor) and places.ndim == 3:
        more.append("positions in the image grid (M-RoPE)")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        more.append("an attention mask of its own")
    if more:
        raise ValueError(
            f"{type(backbone).__name__} cannot answer from prompt embeddings alone: its decoder also gets "
            f"{', '.join(more)}. Use generate() here; docs/BANK.md says which backbones embeddings serve."
        )
    return embeddings


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(one) for one in value)
    return isinstance(value, torch.Tensor)


def _captured(backbone: PreTrainedModel, inputs: Mapping[str, Any], wanted: Sequence[int]) -> dict[int, Any]:
    """Run the backbone only as far as needed for what is `wanted`: depths, -1, `INPUT`, `VISION` and `SHARED`."""
    kept: dict[int, Any] = dict.fromkeys(depth for depth in wanted if depth != 0)
    if not kept.keys() - {SHARED}:  # the embeddings alone
        return kept
    token = _READING.set(kept)
    try:
        with preserved_state(backbone):
            kept[-1] = backbone.base_model(**inputs, use_cache=False, return_dict=True).last_hidden_state
    except _ReadFinished:
        pass
    finally:
        _READING.reset(token)
    return kept


@torch.no_grad()
def read_with_images(
    backbone: PreTrainedModel, inputs: Mapping[str, Any], read_layers: Sequence[int], share_images: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results of `read_hidden_states` and `image_features` from one pass."""
    kept = _captured(backbone, inputs, [*read_layers, INPUT, VISION, *([SHARED] if share_images else [])])
    return _joined(backbone, inputs, kept, read_layers), _pooled_images(backbone, inputs, kept)


def _joined(
    backbone: PreTrainedModel, inputs: Mapping[str, Any], kept: Mapping[int, Any], read_layers: Sequence[int]
) -> torch.Tensor:
    """The states of several depths side by side; depth 0 is the embedding of the words."""
    states = [kept[k] if k else backbone.get_input_embeddings()(inputs["input_ids"]) for k in read_layers]
    return torch.cat([state.to(states[0].device) for state in states], dim=-1)


@torch.no_grad()
def image_features(backbone: PreTrainedModel, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The images of each row as the backbone's decoder gets them, averaged over their positions.

    Vision tower and connector run, the decoder does not. Where images have no positions in the prompt
    (cross-attention), the output of the vision tower is averaged instead.

    Args:
        backbone: prepared by `watch_layers`.
        inputs: a padded batch of the backbone's own inputs.

    Returns:
        `(batch, width)` in float32, zeros in rows without an image.
    """
    return _pooled_images(backbone, inputs, _captured(backbone, inputs, [INPUT, VISION]))


def image_positions(config: PreTrainedConfig, ids: torch.Tensor) -> torch.Tensor:
    """Where in `ids` an image stands."""
    for name in ("image_token_id", "image_token_index"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return ids == token
    return torch.zeros_like(ids, dtype=torch.bool)


def _pooled_images(backbone: PreTrainedModel, inputs: Mapping[str, Any], kept: Mapping[int, Any]) -> torch.Tensor:
    ids = inputs["input_ids"]
    shown, entered = image_positions(backbone.config, ids), kept[INPUT]
    if entered is not None and entered.ndim == 3 and bool(shown.any()):
        one = shown.nonzero()[0]
        plain = backbone.get_input_embeddings()(ids[one[0], one[1]][None])[0]
        if not torch.allclose(entered[one[0], one[1]].to(plain), plain):  # else images come by another way
            weights = shown.to(entered.device)[..., None]
            total = torch.where(weights, entered.float(), 0.0).sum(dim=1)
            return total / weights.sum(dim=1).clamp(min=1)
    seen, pixels = kept[VISION], inputs.get("pixel_values")
    if seen is None or pixels is None or seen.shape[0] % len(ids) or pixels.shape[0] != len(ids):
        return torch.zeros(len(ids), embedding_weight(backbone).shape[1])
    there = pixels.reshape(len(ids), -1).abs().amax(dim=1) > 0
    pooled = seen.float().reshape(len(ids), -1, seen.shape[-1]).mean(dim=1)
    return torch.where(there.to(pooled.device)[:, None], pooled, 0.0)


@torch.no_grad()
def read_hidden_states(
    backbone: PreTrainedModel, inputs: Mapping[str, Any], read_layers: Sequence[int], share_images: bool = False
) -> torch.Tensor:
    """One forward pass without LM head, KV cache or gradient.

    Args:
        backbone: the frozen backbone, prepared by `watch_layers`.
        inputs: a padded batch of the backbone's own inputs.
        read_layers: as in `AimConfig`; layers after the last of them are not run.
        share_images: look for equal images, so that the vision tower sees each of them once.

    Returns:
        Hidden states `(batch, length, len(read_layers) * hidden size)`.
    """
    kept = _captured(backbone, inputs, [*read_layers, *([SHARED] if share_images else [])])
    return _joined(backbone, inputs, kept, read_layers)


def all_modules(backbone: nn.Module) -> list[nn.Module]:
    """`backbone.modules()`, several times faster: it makes no names, and lists a shared module twice."""
    found = [backbone]
    for module in found:  # grows on the way
        if module._modules:
            found += [child for child in module._modules.values() if child is not None]
    return found


def weights_state(module: nn.Module) -> list[Any]:
    """A value that changes when a weight of a module changes or moves, except by writing to its `.data`."""
    weights = [weight for part in all_modules(module) for weight in part._parameters.values() if weight is not None]
    return [(w.data_ptr(), w.dtype, -1 if w.is_inference() else w._version) for w in weights]


def _remembered(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """What modules keep of their last prompt: module, name and value."""
    return [(module, name, vars(module)[name]) for module in modules for name in STATE_NAMES if name in vars(module)]


def remembers(backbone: PreTrainedModel) -> bool:
    """Whether a backbone keeps something of its last prompt (`STATE_NAMES`)."""
    return bool(_remembered(all_modules(backbone)))


def goes_on_behind_kv(backbone: PreTrainedModel, padded: bool = False) -> bool:
    """Whether `generate` can continue given KV by a prompt, `padded` or not.

    Not on every family, nor with positions in the image grid on transformers before 5.23, the oldest release on which
    this was tried and works.
    """
    if family_of(backbone.config.model_type).prefix_kv not in ("always", "always" if padded else "unpadded"):
        return False
    return not remembers(backbone) or Version(Version(transformers.__version__).base_version) >= Version("5.23")


@contextmanager
def one_at_a_time(backbone: PreTrainedModel) -> Iterator[None]:
    """Serialize calls of a backbone that remembers its last prompt (`STATE_NAMES`); others run in parallel."""
    with _turn(backbone, all_modules(backbone)):
        yield


def _turn(backbone: PreTrainedModel, modules: Sequence[nn.Module]) -> AbstractContextManager[Any]:
    return _TURNS.setdefault(backbone, RLock()) if _remembered(modules) else nullcontext()


@contextmanager
def preserved_state(backbone: PreTrainedModel) -> Iterator[None]:
    """`one_at_a_time`, restoring afterwards what the backbone remembers, so that a read does not change an answer."""
    modules = all_modules(backbone)
    with _turn(backbone, modules):
        before = _remembered(modules)
        try:
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


class _Rest:
    """Layers that recompute in training mode drop the KV cache: they are in evaluation mode while any thread answers.

    All threads share their flag: the first answer that begins switches it off, and the last one that ends switches it
    on again. A loss computed in another thread meanwhile is the same, without recomputing.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.answers = 0
        self.resting: WeakSet[nn.Module] = WeakSet()  # weak: a value here must not keep its backbone alive

    def set_training(self, training: set[nn.Module], modules: Sequence[nn.Module]) -> None:
        """Put `training`, some of `modules`, in training mode: now, or when the last answer has ended."""
        with self.lock:
            self.resting = WeakSet(training if self.answers else ())
            for module in modules:
                wanted = module in training and not self.answers
                if module.training != wanted:  # never switched back and forth, which another thread would see
                    module.training = wanted

    @contextmanager
    def __call__(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        with self.lock:
            if not self.answers:
                self.resting = WeakSet(module for module in modules if module.training)
                for module in self.resting:
                    module.training = False
            self.answers += 1
        try:
            yield
        finally:
            with self.lock:
                self.answers -= 1
                if not self.answers:
                    for module in self.resting:
                        module.training = True


def set_recomputing(backbone: PreTrainedModel, mode: bool) -> None:
    """Put a frozen backbone in evaluation mode, except layers that recompute their activations.

    Args:
        backbone: its layers recompute where gradient checkpointing is on; their own parts keep evaluating.
        mode: whether the projector is trained.
    """
    modules = all_modules(backbone)
    training = {module for module in modules if mode and getattr(module, "gradient_checkpointing", False)}
    _RESTS.setdefault(backbone, _Rest()).set_training(training, modules)


@contextmanager
def answering(backbone: PreTrainedModel) -> Iterator[None]:
    """`one_at_a_time`, in inference mode: dropout would change the answer, and recomputed layers drop the KV cache.

    Calls in several threads share the mode; the last of them to end restores what the first one found.
    """
    modules = all_modules(backbone)
    with _turn(backbone, modules), _RESTS.setdefault(backbone, _Rest())(modules):
        yield


def embedding_weight(backbone: PreTrainedModel) -> torch.Tensor:
    """The rows of the input embeddings, `(vocabulary, hidden size)`."""
    weight = backbone.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _spread(count: int, total: int) -> list[int]:
    """`count` indices from the first to the last of `total`; in integers, since float32 cannot count that far."""
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


@torch.no_grad()
def _embedded(backbone: PreTrainedModel, count: int) -> torch.Tensor | None:
    """Input embeddings of `count` ids `(count, hidden size)`, as the model sees them; `None` without weights."""
    embedding, weight = backbone.get_input_embeddings(), embedding_weight(backbone)
    if weight.is_meta and not hasattr(embedding, "_hf_hook"):
        return None
    ids = torch.tensor([_spread(count, weight.shape[0])], device=module_device(backbone))
    return embedding(ids)[0].detach().float().cpu()


def module_device(backbone: PreTrainedModel) -> torch.device:
    """Where the inputs of a backbone go, also when parts of it are offloaded."""
    weight = embedding_weight(backbone)
    if not weight.is_meta:
        return weight.device
    hook = getattr(backbone.get_input_embeddings(), "_hf_hook", None)
    return torch.device("meta" if hook is None else hook.execution_device)


def embedding_norm(backbone: PreTrainedModel) -> float:
    """Mean norm of the input embeddings, padding rows left out: the scale of fused tokens at the input."""
    rows = _embedded(backbone, 4096)
    if rows is None:
        return 1.0
    norms = rows.norm(dim=-1)
    return float(norms[norms > 0].mean()) if bool((norms > 0).any()) else 1.0


def fingerprint(backbone: PreTrainedModel) -> list[float] | None:
    """A few weights that identify a backbone, whatever its precision or quantization.

    They are taken from what is never quantized: input embeddings, final norm and LM head. A backbone whose decoder
    layers alone were tuned (a merged LoRA, say) has the same fingerprint. `None` where there are no weights.
    """
    rows = _embedded(backbone, 24)
    if rows is None:
        return None
    norms = [p for p in backbone.get_decoder().parameters() if p.ndim == 1 and p.is_floating_point() and not p.is_meta]
    head = backbone.get_output_embeddings()
    samples = [float(row[i % len(row)]) for i, row in enumerate(rows)]
    for weight in (norms[-1] if norms else None, getattr(head, "weight", None)):
        if weight is not None and not weight.is_meta and weight.is_floating_point():
            flat = weight.detach().reshape(-1)
            samples += flat[torch.tensor(_spread(8, flat.numel()), device=flat.device)].float().tolist()
    return [float(f"{value:.4g}") for value in samples]


def has_fingerprint(backbone: PreTrainedModel, known: list[float] | None) -> bool:
    """Whether `backbone` may be the one whose fingerprint is `known`; `True` where either is unknown."""
    found = fingerprint(backbone)
    if known is None or found is None or len(found) != len(known):  # parts of it may be offloaded
        return True
    return torch.allclose(torch.tensor(found), torch.tensor(known), rtol=2e-2, atol=1e-4)


def check_backbone(backbone: PreTrainedModel, expected: PreTrainedConfig | None, known: list[float] | None) -> None:
    """Raise `ValueError` unless `backbone` is the one a projector was made for.

    Args:
        backbone: what was loaded or given.
        expected: the configuration stored with the projector.
        known: the fingerprint stored with the projector.
    """
    if expected is None:
        return
    pairs: list[tuple[str, Any, Any]] = [("model type", backbone.config.model_type, expected.model_type)]
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        found, stored = (getattr(c.get_text_config(), name, None) for c in (backbone.config, expected))
        pairs.append((name, found, stored))
    wrong = [f"{name} {found} (the projector's: {stored})" for name, found, stored in pairs if found != stored]
    if not wrong and not has_fingerprint(backbone, known):
        wrong = ["the same shape, but other weights"]
    if wrong:
        name = backbone.config.name_or_path or type(backbone).__name__
        raise ValueError(
            f"This projector was trained for another backbone than {name}: {'; '.join(wrong)}. Load the backbone "
            "named in its config.json, or make a new projector with AimForConditionalGeneration.from_backbone(...)."
        )


def modules_kept_unquantized(backbone: PreTrainedModel) -> list[str]:
    """Every module besides the text decoder layers: LM head, vision tower, connector, embeddings, norms.

    bitsandbytes drops its own default list where a user gives one, so these are added to the user's list.
    """
    stack = decoder_layers(backbone)
    path = next(name for name, module in backbone.named_modules() if module is stack)
    kept, prefix, module = [], "", backbone
    for part in path.split("."):
        kept += [prefix + name for name, _ in module.named_children() if name != part]
        prefix, module = f"{prefix}{part}.", getattr(module, part)
    return kept


def longest_prompt(config: PreTrainedConfig) -> int | None:
    """The most positions of the backbone's text decoder; `None` where its configuration has no such number."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


# --- loading, and 4-bit weights


def load_backbone(name: str, **kwargs: Any) -> Any:
    """Load a backbone with the user's own arguments; only its text decoder layers are quantized.

    Returns:
        The backbone; where `output_loading_info=True` is among the arguments, the library's report of its files too.

    Raises:
        ValueError: its files are damaged; or weights are missing in them. The library draws these at random and
            prints a report, but answers of such a backbone mean nothing.
    """
    kwargs.setdefault("trust_remote_code", False)  # trusting this repository does not imply trusting the backbone's
    quantization = kwargs.get("quantization_config")
    if quantization is not None:
        place = {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}
        kwargs["quantization_config"] = _with_modules_kept(quantization, AutoConfig.from_pretrained(name, **place))
    told = kwargs.pop("output_loading_info", False)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True, **kwargs)
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"The backbone {os.path.join(name, kwargs.get('subfolder') or '')} cannot be loaded "
            f"({type(error).__name__}: {error!s:.300}). Its files may be damaged or incomplete, or of another version "
            f"than transformers {transformers.__version__}. Download or save them again."
        ) from error
    backbone, info = loaded
    if told:
        return backbone, info
    missing = sorted(info["missing_keys"])
    if missing:
        folder = os.path.join(name, *filter(None, [kwargs.get("subfolder")]))
        raise ValueError(
            f"{len(missing)} weights of {type(backbone).__name__} are missing in {folder}: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}. Its files are incomplete, or another version of transformers "
            f"than {transformers.__version__} wrote them (config.json says {backbone.config.transformers_version}). "
            "To use random weights in their place, load it with transformers and pass it as backbone=model."
        )
    return backbone


def _with_modules_kept(quantization: Any, config: PreTrainedConfig) -> Any:
    """Add LM head, vision tower and connector to the modules that are not quantized, whatever the user listed."""
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    quantization = copy.copy(quantization)
    with torch.device("meta"):
        kept = modules_kept_unquantized(AutoModelForImageTextToText.from_config(config))
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(quantization, name):
            setattr(quantization, name, sorted({*(getattr(quantization, name) or []), *kept}))
    return quantization


def never_repack(backbone: PreTrainedModel, only_odd: bool = False) -> None:
    """Keep 4-bit weights as they were loaded, from now on.

    On a CPU with AVX512-BF16, bitsandbytes repacks the weights of a layer in its first inference. The backward pass
    through a repacked layer does not give its gradient, and a layer can be repacked only if its output width is a
    multiple of 32 and its input width one of 64.

    Args:
        backbone: may be quantized or not.
        only_odd: only the layers that cannot be repacked.
    """
    module: Any
    for module in backbone.modules():
        even = getattr(module, "out_features", 0) % 32 == 0 and getattr(module, "in_features", 0) % 64 == 0
        if not getattr(module, "support_avx512bf16_for_cpu", False) or (only_odd and even):
            continue
        module.support_avx512bf16_for_cpu = False
        weight, state = module.weight, getattr(module.weight, "quant_state", None)
        if state is not None and getattr(state, "packing_format_for_cpu", False):
            unpack = import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse
            weight.data, weight.quant_state = unpack(weight.data, state)


def laptop_quantization_config() -> BitsAndBytesConfig:
    """4-bit weights (NF4, doubly quantized): a 7B backbone takes about 5 GB; the projector stays in full precision.

    Pass it as `quantization_config=` to `from_pretrained`. It saves memory, not time.
    """
    low = torch.bfloat16 if not torch.cuda.is_available() or torch.cuda.is_bf16_supported() else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=low
    )
