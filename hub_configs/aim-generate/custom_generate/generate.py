"""Answer from demonstrations with a stock class of transformers: AIM without training, as a custom `generate`.

    options = {"custom_generate": "me/aim-generate", "trust_remote_code": True}
    model.generate(**inputs, **options, demos=demos, processor=processor)

The files beside this one are the plug-in itself; this one puts it on the model that is given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from .backbone_aim import fingerprint
from .configuration_aim import AimConfig, preset_settings
from .demonstrations_aim import kind_of, parse_demos
from .files_aim import HUB_KWARGS
from .injection_aim import watch_entries
from .modeling_aim import AimForConditionalGeneration
from .processing_aim import AimProcessor
from .state_aim import answering

if TYPE_CHECKING:  # the rest of the plug-in: transformers 5.5 copies only files that this one names
    from .batching_aim import reading_batches  # noqa: F401
    from .cache_aim import LRUCache  # noqa: F401
    from .choice_aim import DepthChoice  # noqa: F401
    from .depth_aim import DepthMixin  # noqa: F401
    from .encoding_aim import EncodingMixin  # noqa: F401
    from .families_aim import FAMILIES  # noqa: F401
    from .features_aim import FeaturesMixin  # noqa: F401
    from .images_aim import open_image  # noqa: F401
    from .prefix_aim import FusedPrefix  # noqa: F401
    from .pretrained_aim import AimPreTrainedModel  # noqa: F401
    from .projector_aim import AimProjector  # noqa: F401
    from .reading_aim import read_hidden_states  # noqa: F401
    from .rows_aim import RowsMixin  # noqa: F401

# Nothing here keeps a model or a tokenizer alive: the plug-ins lie here without the model that they are made for.
_PLUGINS: WeakKeyDictionary[PreTrainedModel, dict[Any, Any]] = WeakKeyDictionary()  # by depths
_TOKENIZERS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # the copy of each
_MAKING = RLock()


def generate(
    model: PreTrainedModel,
    demos: Any = None,
    processor: Any = None,
    depth: int | Sequence[int] | None = None,
    chat_demos: Any = None,
    **kwargs: Any,
) -> Any:
    """Answer queries from demonstrations with the model's own `generate`.

    Nothing is trained, and the model stays as it is: its weights, which of them have gradients, and its training mode.
    The first call registers hooks on its input embeddings, its decoder and its vision tower, which do nothing outside
    a call. Raw demonstrations that were given to the model before are not read again while they are among the 256 MiB
    that are kept of it.

    Args:
        model: a vision-language model of transformers.
        demos: what the plug-in takes as `demos`: raw demonstrations, `(image, text)`, `(image, question, answer)` or a
            dict with `image` and `text`, `label`, or `question` and `answer`; fused ones; a bank; or a list with one
            of these, or `None`, for each row. Without any, the call is the model's own `generate`.
        processor: the model's processor, which raw demonstrations need; it is left as it is.
        depth: the decoder layer, or layers, at whose input the states of demonstrations are read and put back; two
            fifths of the layers where it is `None`.
        chat_demos: those that an `AimProcessor` found in the earlier turns of a chat; they come after `demos`.
        **kwargs: what `model.generate` takes, and `shots` and `select` for a bank.

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: raw demonstrations without a processor, malformed ones, a depth that the model does not have, or a
            prompt that is longer than the model's positions.
    """
    for name in (*HUB_KWARGS, "repo_type"):  # where this code comes from
        kwargs.pop(name, None)
    rules = getattr(processor, "image_rules", None)  # of an AimProcessor
    parsed = [parse_demos(given, rules) for given in (demos, chat_demos)]
    parts = [part for given in parsed for part in (given if isinstance(given, list) else [given]) if part is not None]
    if not parts:
        return type(model).generate(model, **kwargs)  # `model.generate` may be this very function
    if processor is not None and not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"processor is a {type(processor).__name__}; expected the model's processor, which has a tokenizer and an "
            f"image processor: {_processor_of(model)}."
        )
    raw = sum(len(part) for part in parts if kind_of(part) is None)
    if raw and processor is None:
        raise ValueError(
            f"demos holds {raw} raw demonstrations, which need the model's processor to be read, but processor is "
            f"None. Pass processor={_processor_of(model)}."
        )
    plugin = _plugin_of(model, depth)
    if processor is not None:
        plugin._processor = _with_own_tokenizer(processor)
    with answering(model):  # reading, too, is without dropout
        return plugin.generate(demos=parsed[0], chat_demos=parsed[1], **kwargs)


def _processor_of(model: PreTrainedModel) -> str:
    return f"AutoProcessor.from_pretrained({model.config.name_or_path or 'the repository of the model'!r})"


def _plugin_of(model: PreTrainedModel, depth: int | Sequence[int] | None) -> AimForConditionalGeneration:
    """The plug-in on a model, made once for each depth; what it keeps of demonstrations is shared by all depths."""
    depths = depth if depth is None else tuple(depth) if isinstance(depth, (list, tuple)) else (depth,)
    with _MAKING:
        plugins = _PLUGINS.setdefault(model, {})
        if depths not in plugins:
            try:
                config = AimConfig(
                    backbone_config=copy.deepcopy(model.config),
                    backbone_fingerprint=fingerprint(model),
                    **preset_settings("untrained", read_layers=depths),
                )
            except ValueError as error:
                raise ValueError(f"depth={depth!r}: {error}") from None
            made = AimForConditionalGeneration(config, backbone=model, freeze=False)
            del made._modules["backbone"]
            for other in plugins.values():
                made.read_cache, made.prefix_cache = other.read_cache, other.prefix_cache
            plugins[depths] = made
        watch_entries(model)  # again, since new embeddings may have taken the place of those that were watched
        plugin = copy.copy(plugins[depths])
    plugin._modules = {**plugin._modules, "backbone": model}
    return plugin


def _with_own_tokenizer(processor: Any) -> AimProcessor:
    """The processor as the plug-in needs it, with a copy of its tokenizer, whose padding the plug-in changes."""
    if hasattr(processor, "encode_demonstrations"):
        return processor
    own, tokenizer = copy.copy(processor), processor.tokenizer
    with _MAKING:
        known = _TOKENIZERS.get(tokenizer)
        if known is None or len(known) != len(tokenizer):  # tokens were added since
            known = _TOKENIZERS[tokenizer] = copy.deepcopy(tokenizer)
    own.tokenizer = known
    return AimProcessor(own)
