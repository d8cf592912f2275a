"""FLOPs and KV of each way to answer from demonstrations, counted by torch on the real modules without weights.

A `Twin` is a backbone on the meta device. Its vision tower and connector run on one image (`get_image_features`), its
decoder runs on embeddings, and torch's `FlopCounterMode` counts both. What a method costs is the sum of the passes
that it makes: an image is seen alone, so n images cost n times one. A decoder is counted at two lengths, from which
all others follow (`DecoderCost`); where they do not, each length is counted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import AutoModelForImageTextToText, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from ..backbone_aim import decoder_layers
from ..configuration_aim import PRESETS, AimConfig, default_depth
from ..projector_aim import AimProjector
from .baselines import COLD_NAMES, NAMES, baseline_counts, baseline_positions, is_baseline
from .shapes import Picture, picture_of

aten = torch.ops.aten
ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu
UNCOUNTED: dict[Any, Any] = {}
if ON_CPU not in flop_registry:  # in older releases of torch
    UNCOUNTED[ON_CPU] = lambda query, key, *_, **__: 4 * math.prod(query) * key[-2]
DEMO_TOKENS, QUERY_TOKENS = 30, 40


class Weightless(TorchDispatchMode):
    """Let meta tensors meet real ones: images and positions are real, weights are not, and so is no result of both.

    A mask that is not there masks nothing: the prompts that are counted have no padding.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if func is aten._local_scalar_dense.default and given[0].is_meta and given[0].dtype == torch.bool:
            return True
        mixed = any(value.is_meta for value in given) and not all(value.is_meta for value in given)
        if mixed and func not in (aten.index.Tensor, aten.copy_.default):
            args, kwargs = tree_map_only(torch.Tensor, lambda value: value.to("meta"), (args, kwargs))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations: two for each product that is added up.

    Args:
        other: of linear layers and convolutions.
        attention: of queries with keys and of weights with values, the whole matrix where nothing else is said.
    """

    other: float
    attention: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.other + self.attention


def count_flops(call: Callable[[], Any]) -> Flops:
    """What torch counts while `call` runs; a causal matrix as if it were full."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.no_grad():
        call()
    by_operation = counter.get_flop_counts().get("Global", {})
    attention = sum(n for op, n in by_operation.items() if "bmm" in str(op) or "attention" in str(op))
    return Flops(sum(by_operation.values()) - attention, attention)


def analytic(backbone: PreTrainedModel, new: int, past: int = 0) -> Flops:
    """FLOPs of one pass of a text decoder, from the shapes of its weights: what torch should count.

    Each matrix costs two operations a weight and token, of experts only those that a token goes through; attention
    costs four a layer, head, width of a head, new token and token that this may look at.

    Args:
        backbone: with weights that are not quantized, or on the meta device.
        new: tokens that are computed.
        past: tokens whose KV is there.

    Raises:
        ValueError: some of its layers have no softmax attention.
    """
    text = backbone.config.get_text_config(decoder=True)
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        raise ValueError(f"{text.model_type} has layers with linear attention; there is no formula for these here.")
    weights = 0.0
    for layer in decoder_layers(backbone):
        weights += sum(p.numel() for p in layer.parameters() if p.ndim == 2)
        experts = sum(p.numel() / len(p) for p in layer.parameters() if p.ndim == 3)
        weights += experts * (getattr(text, "num_experts_per_tok", None) or 0)
    attention = 4 * text.num_hidden_layers * text.num_attention_heads * _head_width(text) * new * (past + new)
    return Flops(2 * weights * new, attention)


def analytic_kv(text: PreTrainedConfig, tokens: int, itemsize: int = 2) -> int:
    """Bytes of keys and values of so many tokens, from the configuration of a text decoder."""
    kinds = getattr(text, "layer_types", None)
    layers = text.num_hidden_layers if kinds is None else sum(kind != "linear_attention" for kind in kinds)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * layers * heads * _head_width(text) * tokens * itemsize


def _head_width(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def kv_bytes(cache: Cache) -> int:
    """Bytes of keys and values in a cache, of meta tensors too."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


@dataclass(frozen=True)
class DecoderCost:
    """What passes of a decoder cost by their lengths, where all that it computes is linear in them but attention.

    Args:
        other: FLOPs of linear layers, a new token.
        attention: FLOPs, a new token and token that it may look at.
        kv: bytes of keys and values, a token.
    """

    other: float
    attention: float
    kv: float

    @classmethod
    def of(cls, counted: Callable[[int, int], tuple[Flops, int]]) -> DecoderCost | None:
        """From the count of one pass, checked by a second one behind a million tokens.

        Args:
            counted: FLOPs of one pass and bytes of KV after it, by new tokens and tokens before them.

        Returns:
            The costs; `None` where the second count is another one, as with layers that look at a window.
        """
        flops, kept = counted(64, 0)
        cost = cls(flops.other / 64, flops.attention / 64**2, kept / 64)
        flops, kept = counted(96, 10**6)
        law, law_kept = cost.at(96, 10**6)
        pairs = ((flops.other, law.other), (flops.attention, law.attention), (kept, law_kept))
        return cost if all(math.isclose(*pair, rel_tol=1e-9) for pair in pairs) else None

    def at(self, new: int, past: int) -> tuple[Flops, int]:
        """FLOPs of a pass, with the whole matrix of attention, and bytes of KV after it."""
        return Flops(self.other * new, self.attention * new * (past + new)), round(self.kv * (past + new))


class Twin:
    """A backbone without weights, in bfloat16.

    Args:
        config: the backbone's configuration.
        causal: count what attention needs, half of the matrix of the new tokens, and not what torch counts.
        picture: how an image enters; by the backbone's family when `None`.

    Raises:
        ValueError: it is not known how an image enters this backbone.
    """

    def __init__(self, config: PreTrainedConfig, causal: bool = True, picture: Picture | None = None) -> None:
        self.config, self.causal = copy.deepcopy(config), causal  # what is built on it writes to it
        self.picture = picture_of(config) if picture is None else picture
        with torch.device("meta"):
            self.backbone = AutoModelForImageTextToText.from_config(self.config, dtype=torch.bfloat16).eval()
            self.projector = AimProjector(AimConfig(backbone_config=copy.deepcopy(config), **PRESETS["paper"]))
        self.counted = lru_cache(self._counted)

    @cached_property
    def image(self) -> float:
        """FLOPs of one image through vision tower and connector.

        Raises:
            ValueError: this release of transformers cannot run them on meta tensors.
        """
        more = {name: torch.tensor([value]) for name, value in self.picture.more.items()}
        pixels = torch.ones(self.picture.pixels, dtype=torch.bfloat16)
        pixels = pixels[None] if self.picture.rows else pixels

        def see() -> None:
            with Weightless():
                self.backbone.base_model.get_image_features(pixel_values=pixels, **more)

        try:
            return count_flops(see).total
        except NotImplementedError as error:
            raise ValueError(
                f"transformers {transformers.__version__} cannot run the vision tower of {self.config.model_type} "
                f"without weights, to count it ({str(error).partition(':')[0]}...). A newer release can."
            ) from error

    @cached_property
    def cost(self) -> DecoderCost | None:
        """What passes of the decoder cost by their lengths; `None` where each length has to be counted."""
        return DecoderCost.of(self._counted)

    def decoder(self, new: int, past: int = 0) -> tuple[float, int]:
        """One pass of the text decoder: FLOPs, and bytes of KV after it.

        Args:
            new: tokens that are computed.
            past: tokens whose KV is there.
        """
        flops, kept = self.counted(new, past) if self.cost is None else self.cost.at(new, past)
        part = (past + new / 2) / (past + new) if self.causal else 1.0
        return flops.other + flops.attention * part, kept

    def _counted(self, new: int, past: int = 0) -> tuple[Flops, int]:
        """FLOPs of one pass that torch counts, and bytes of KV after it."""
        text, decoder = self.config.get_text_config(), self.backbone.get_decoder()
        cache = DynamicCache(config=text)

        def run(tokens: int) -> None:
            embeddings = torch.empty(1, tokens, text.hidden_size, dtype=torch.bfloat16, device="meta")
            decoder(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)

        with torch.no_grad():
            if past:
                run(past)
            return count_flops(lambda: run(new)), kv_bytes(cache)

    def fuse(self, tokens: int) -> float:
        """FLOPs of the paper's projector for so many fused tokens."""
        states = torch.empty(tokens, self.config.get_text_config().hidden_size, device="meta")
        return count_flops(lambda: self.projector(states)).total


@dataclass(frozen=True)
class Counted:
    """What a method costs up to the first token, LM head left out.

    Args:
        method, shots: of what.
        prompt_tokens: positions that the first token is answered from.
        new_tokens: of them, those that the decoder computes in this call; demonstrations that are read come on top.
        flops: of vision tower, connector, decoder and projector.
        kv_bytes: keys and values of the prompt.
        positions: of the backbone that the prompt takes: rows of KV that were dropped count, and demonstrations that
            share their positions count once.
    """

    method: str
    shots: int
    prompt_tokens: int
    new_tokens: int
    flops: float
    kv_bytes: int
    positions: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def count(
    twin: Twin, method: str, shots: int, demo_tokens: int = DEMO_TOKENS, query_tokens: int = QUERY_TOKENS
) -> Counted:
    """What a method costs.

    Args:
        twin: the backbone.
        method: one of `COUNTED`, or of `NAMES` or `COLD_NAMES` of `baselines.py` with settings (`snapkv:ratio=.9`).
        shots: demonstrations.
        demo_tokens: text tokens of a demonstration, and so fused tokens of it.
        query_tokens: text tokens of the query.
    """
    if is_baseline(method):
        lengths = shots, demo_tokens, query_tokens
        costs, positions = baseline_counts(twin, method, *lengths), baseline_positions(twin, method, *lengths)
        return Counted(method, shots, *costs, positions)
    if method not in COUNTED:
        raise ValueError(f"There is no method {method!r}; counted are {', '.join((*COUNTED, *NAMES, *COLD_NAMES))}.")
    kind, text = method.removeprefix("depth-"), twin.config.get_text_config()
    demo, query = twin.picture.tokens + demo_tokens, twin.picture.tokens + query_tokens
    bos, fused = int(getattr(text, "bos_token_id", None) is not None), shots * demo_tokens
    images, reads, past, new = 1, 0.0, 0, query
    if method == "full":
        images, new = shots + 1, shots * demo + query
    elif kind in ("prefix-kv", "bank-kv"):  # BOS is in the prefix
        past = bos + (fused if kind == "bank-kv" else shots * demo)
        new = query - bos
    elif method != "zero":
        new = fused + query
    if kind.startswith("cold") and shots:
        layers = text.num_hidden_layers
        read = {"cold": layers, "cold-half": max(layers // 2, 1), "depth-cold": default_depth(text)}[method]
        part = read / layers  # layers that are not read do not run
        reads = shots * (twin.image + part * twin.decoder(bos + demo)[0])
        reads += 0 if method == "depth-cold" else twin.fuse(fused)
    flops, kept = twin.decoder(new, past)
    return Counted(method, shots, new + past, new, reads + images * twin.image + flops, kept, new + past)


COUNTED = ("zero", "full", "prefix-kv", "cold", "cold-half", "bank", "bank-kv", "depth-cold", "depth-bank",
           "depth-bank-kv")  # fmt: skip
