"""The ways to answer from demonstrations, each as a call that can be timed.

* `zero`: no demonstrations, the backbone alone: the floor.
* `overhead`: the same through the plug-in.
* `full`: all demonstrations with their images in the prompt.
* `prefix-kv`: the same, but the exact KV of the demonstrations is kept: the baseline for `bank-kv`.
* `cold`: the plug-in reads the demonstrations, then answers; `cold-half`: it reads them up to half of the layers.
* `bank`: fused tokens are ready.
* `bank-kv`: the KV of the fused tokens is ready.
* `depth-cold`, `depth-bank`, `depth-bank-kv`: the same without training: states are put back at the depth where they
  were read, the default one.

What the others have of AIM is the paper's form: a projector, and fused tokens at the input embeddings. The methods of
`modeling_aim/baselines` are in `baselines.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from .. import AimForConditionalGeneration
from ..demonstrations_aim import Demos, FusedDemonstrations
from ..state_aim import preserved_state
from .baselines import baseline_call, reading_of
from .prompts import RandomPrompts


class Clock:
    """Notes when tokens come; a streamer for `generate`.

    Attributes:
        ids: the prompt, then each token.
        inside: milliseconds of the call that were the backbone's own `generate`, where that was noted.
    """

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.times: list[float] = []
        self.inside: float | None = None
        self.started = self.returned = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then token after token; they are on the CPU, so the device is done with them."""
        self.times.append(time.perf_counter())
        self.ids.append(value)

    def end(self) -> None:
        """No more tokens."""

    @property
    def first_token(self) -> float:
        """Milliseconds to the first token."""
        return 1000 * (self.times[1] - self.started)

    @property
    def each_token(self) -> float | None:
        """Milliseconds for each further token; `None` where there is none."""
        more = len(self.times) - 2
        return 1000 * (self.times[-1] - self.times[1]) / more if more else None

    @property
    def around(self) -> float | None:
        """Milliseconds of the call before and after the backbone's own `generate`."""
        return None if self.inside is None else 1000 * (self.returned - self.started) - self.inside


Call = Callable[[Clock, int], Any]  # answers with so many tokens; gives the KV cache


class Bench:
    """A backbone, a plug-in on it, and prompts.

    Args:
        backbone: the backbone, with random weights or its own.
        prompts: what is asked.
    """

    def __init__(self, backbone: Any, prompts: RandomPrompts) -> None:
        self.backbone, self.prompts = backbone, prompts
        self.model = self._plugin("paper")
        self.query = self._placed(prompts.query())
        self._fused: dict[int, FusedDemonstrations] = {}

    def _plugin(self, preset: str, read_layers: Sequence[int] | None = None) -> AimForConditionalGeneration:
        return AimForConditionalGeneration.from_backbone(
            self.backbone, self.prompts, preset=preset, read_layers=read_layers
        )

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def fused(self, shots: int, model: AimForConditionalGeneration | None = None) -> FusedDemonstrations:
        """What a plug-in (the paper's when `None`) read of so many demonstrations, each read once."""
        model = self.model if model is None else model
        fused = self._fused.get(id(model))
        if fused is None or len(fused) < shots:
            fused = self._fused[id(model)] = model.read(self.prompts.demos(shots))
        return fused[:shots]

    @cached_property
    def half(self) -> AimForConditionalGeneration:
        """A plug-in that reads up to half of the layers."""
        return self._plugin("paper", [max(self.backbone.config.get_text_config().num_hidden_layers // 2, 1)])

    @cached_property
    def depth(self) -> AimForConditionalGeneration:
        """A plug-in without weights, which puts states back at the default depth."""
        return self._plugin("untrained")

    def release(self) -> None:
        """Forget what the plug-ins keep to answer sooner."""
        self.model.prefix_cache.clear()
        if "depth" in vars(self):
            self.depth.prefix_cache.clear()

    def answer(
        self, generate: Callable[..., Any], inputs: dict[str, Any], clock: Clock, tokens: int, **options: Any
    ) -> Any:
        """Greedy decoding of exactly so many tokens; the KV that it ends with."""
        output = generate(
            **inputs, **options, streamer=clock, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        clock.returned = time.perf_counter()
        return output.past_key_values

    # --- the methods: each makes ready what it may, and gives the call

    def zero(self, shots: int) -> Call:
        return lambda clock, tokens: self.answer(self.backbone.generate, self.query, clock, tokens)

    def overhead(self, shots: int) -> Call:
        """The plug-in's `generate`, and how much of it is the backbone's: the difference of two calls is noise."""
        own = self.backbone.generate

        def call(clock: Clock, tokens: int) -> Any:
            def timed(**kwargs: Any) -> Any:
                entered = time.perf_counter()
                output = own(**kwargs)
                clock.inside = 1000 * (time.perf_counter() - entered)
                return output

            self.backbone.generate = timed
            try:
                return self.answer(self.model.generate, self.query, clock, tokens)
            finally:
                del self.backbone.generate

        return call

    def full(self, shots: int) -> Call:
        inputs = self._placed(self.prompts.full(shots))
        return lambda clock, tokens: self.answer(self.backbone.generate, inputs, clock, tokens)

    def _reading(self, model: AimForConditionalGeneration, shots: int) -> Call:
        demos = self.prompts.demos(shots)
        return lambda clock, tokens: self.answer(model.generate, self.query, clock, tokens, demos=model.read(demos))

    def _ready(self, model: AimForConditionalGeneration, demos: Demos) -> Call:
        return lambda clock, tokens: self.answer(model.generate, self.query, clock, tokens, demos=demos)

    def cold(self, shots: int) -> Call:
        return self._reading(self.model, shots)

    def cold_half(self, shots: int) -> Call:
        return self._reading(self.half, shots)

    def depth_cold(self, shots: int) -> Call:
        return self._reading(self.depth, shots)

    def bank(self, shots: int) -> Call:
        return self._ready(self.model, self.fused(shots))

    def depth_bank(self, shots: int) -> Call:
        return self._ready(self.depth, self.fused(shots, self.depth))

    def bank_kv(self, shots: int) -> Call:
        return self._ready(self.model, self.model.prefill(self.fused(shots)))

    def depth_bank_kv(self, shots: int) -> Call:
        return self._ready(self.depth, self.depth.prefill(self.fused(shots, self.depth)))

    @torch.no_grad()
    def prefix_kv(self, shots: int) -> Call:
        """The baseline at its best: its KV is not copied but cut back after each answer, without a generation loop."""
        before, behind = self._placed(self.prompts.before(shots)), self._placed(self.prompts.behind())
        whole = self._placed(self.prompts.full(shots))
        with preserved_state(self.backbone):
            cache = self.backbone.base_model(**before, use_cache=True, return_dict=True).past_key_values
        past = before["input_ids"].shape[1]
        places = _grid_places(self.backbone.base_model, whole)
        behind.pop("attention_mask")

        @torch.no_grad()
        def call(clock: Clock, tokens: int) -> Any:
            clock.put(whole["input_ids"])
            if answered := cache.get_seq_length() - past:
                cache.crop(-answered)
            step_inputs = dict(behind)
            for step in range(tokens):
                if places is not None:
                    step_inputs["position_ids"] = places[:, :, past:] if not step else places[:, :, -1:].amax() + step
                    step_inputs["position_ids"] = step_inputs["position_ids"].expand(
                        3, 1, step_inputs["input_ids"].shape[1]
                    )
                output = self.backbone(**step_inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                best = output.logits[:, -1:].argmax(dim=-1)
                clock.put(best.cpu())
                step_inputs = {"input_ids": best}
            return cache

        return call


def _grid_places(base: Any, whole: dict[str, Any]) -> torch.Tensor | None:
    """Positions in the image grid of a whole prompt, where the backbone has such."""
    if not hasattr(base, "get_rope_index"):
        return None
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return base.get_rope_index(**{name: whole[name] for name in names})[0]


METHODS: dict[str, Callable[[Bench, int], Call]] = {
    "zero": Bench.zero,
    "overhead": Bench.overhead,
    "full": Bench.full,
    "prefix-kv": Bench.prefix_kv,
    "cold": Bench.cold,
    "cold-half": Bench.cold_half,
    "bank": Bench.bank,
    "bank-kv": Bench.bank_kv,
    "depth-cold": Bench.depth_cold,
    "depth-bank": Bench.depth_bank,
    "depth-bank-kv": Bench.depth_bank_kv,
}


def call_of(bench: Bench, name: str, shots: int) -> Call:
    """A method by its name, made ready as far as it may be."""
    if name in METHODS:
        return METHODS[name](bench, shots)
    return baseline_call(name, reading_of(bench.backbone, bench.prompts, shots, bench.model.device))


WITHOUT_DEMONSTRATIONS = ("zero", "overhead")
