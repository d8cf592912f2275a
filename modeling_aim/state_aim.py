"""State that a backbone keeps between calls, and its isolation between calls and threads.

Some backbones remember their last prompt, and layers that recompute their activations drop the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from .families_aim import family_of

STATE_NAMES = ("rope_deltas",)  # what some backbones remember of the last prompt, as attributes of their modules

# what some layers (OPT's) apply in training mode by themselves, not by a part of theirs that evaluates
DROPOUTS = ("dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "layerdrop")

ADAPTER_SWITCHES = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")  # of PEFT's layers

_LOCKS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_INFERENCE_MODES: WeakKeyDictionary[PreTrainedModel, _InferenceMode] = WeakKeyDictionary()


def all_modules(backbone: nn.Module) -> list[nn.Module]:
    """`backbone.modules()`, several times faster: it makes no names, and lists a shared module twice."""
    modules = [backbone]
    for module in modules:  # grows on the way
        if module._modules:
            modules += [child for child in module._modules.values() if child is not None]
    return modules


def weights_state(module: nn.Module) -> list[Any]:
    """A value that changes when a weight of a module changes or moves, except by writing to its `.data`.

    It also changes when an adapter (PEFT) is switched on or off, scaled or merged.
    """
    modules = all_modules(module)
    weights = [weight for part in modules for weight in part._parameters.values() if weight is not None]
    adapted = [part for part in modules if hasattr(type(part), "enable_adapters")]
    switches = [str([getattr(part, name, None) for name in ADAPTER_SWITCHES]) for part in adapted]
    return [*((w.data_ptr(), w.dtype, -1 if w.is_inference() else w._version) for w in weights), *switches]


def _remembered(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """What modules keep of their last prompt: module, name and value."""
    return [(module, name, vars(module)[name]) for module in modules for name in STATE_NAMES if name in vars(module)]


def remembers(backbone: PreTrainedModel) -> bool:
    """Whether a backbone keeps something of its last prompt (`STATE_NAMES`)."""
    return bool(_remembered(all_modules(backbone)))


def continues_after_kv(backbone: PreTrainedModel, padded: bool = False) -> bool:
    """Whether `generate` can continue from given KV with a prompt, `padded` or not.

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
    return _LOCKS.setdefault(backbone, RLock()) if _remembered(modules) else nullcontext()


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


class _InferenceMode:
    """Layers that recompute in training mode drop the KV cache: they are in evaluation mode while any thread answers.

    All threads share their flag: the first answer that begins switches it off, and the last one that ends switches it
    on again. A loss computed in another thread meanwhile is the same, without recomputing.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.answers = 0
        self.suspended: WeakSet[nn.Module] = WeakSet()  # weak: a value here must not keep its backbone alive
        self.dropouts: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()  # of layers that recompute

    def set_training(self, training: set[nn.Module], modules: Sequence[nn.Module]) -> None:
        """Put `training`, some of `modules`, in training mode: now, or when the last answer has ended.

        They recompute what they evaluate: their own dropout is off until they leave training mode.
        """
        with self.lock:
            for module in modules:
                if module in training:
                    dropouts = {name: value for name in DROPOUTS if type(value := vars(module).get(name)) is float}
                    self.dropouts.setdefault(module, dropouts)
                    vars(module).update(dict.fromkeys(dropouts, 0.0))
                else:
                    vars(module).update(self.dropouts.pop(module, {}))
            self.suspended = WeakSet(training if self.answers else ())
            for module in modules:
                wanted = module in training and not self.answers
                if module.training != wanted:  # never switched back and forth, which another thread would see
                    module.training = wanted

    @contextmanager
    def __call__(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        with self.lock:
            if not self.answers:
                self.suspended = WeakSet(module for module in modules if module.training)
                for module in self.suspended:
                    module.training = False
            self.answers += 1
        try:
            yield
        finally:
            with self.lock:
                self.answers -= 1
                if not self.answers:
                    for module in self.suspended:
                        module.training = True


def recomputing_switch(backbone: PreTrainedModel, name: str) -> Any:
    """The backbone's `activation_{name}`, or `gradient_{name}` as older releases of transformers call it."""
    return getattr(backbone, f"activation_{name}", None) or getattr(backbone, f"gradient_{name}")


def set_recomputing(backbone: PreTrainedModel, mode: bool) -> None:
    """Put a frozen backbone in evaluation mode, except layers that recompute their activations.

    Args:
        backbone: its layers recompute where gradient checkpointing is on; their own parts keep evaluating.
        mode: whether the projector is trained.
    """
    modules = all_modules(backbone)
    training = {module for module in modules if mode and getattr(module, "gradient_checkpointing", False)}
    _INFERENCE_MODES.setdefault(backbone, _InferenceMode()).set_training(training, modules)


@contextmanager
def answering(backbone: PreTrainedModel) -> Iterator[None]:
    """`one_at_a_time`, in inference mode: dropout would change the answer, and recomputed layers drop the KV cache.

    Calls in several threads share the mode; the last of them to end restores what the first one found.
    """
    modules = all_modules(backbone)
    with _turn(backbone, modules), _INFERENCE_MODES.setdefault(backbone, _InferenceMode())(modules):
        yield
