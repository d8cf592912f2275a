"""Properties of reading demonstrations, of states that enter at depth, of training and of saving."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .. import AimForConditionalGeneration, Demonstration
from ..backbone_aim import decoder_layers
from ..reading_aim import read_hidden_states
from ..state_aim import preserved_state
from .alone import under_rounding
from .case import QUESTION, Case, NotApplicable, difference, holds, noise, require

WORDS_ALONE = {"text": "A dax is a kind of wug."}


def untrained(case: Case) -> AimForConditionalGeneration:
    """The model where it has no weights and enters at depth, a twin without weights on its backbone otherwise."""
    config = case.model.config
    if config.projector_form == "identity" and config.enters_at_depth:
        return case.model
    layers = config.entry_layers if config.enters_at_depth else None
    return AimForConditionalGeneration.from_backbone(case.model.backbone, case.processor, read_layers=layers)


def reading_under_rounding(case: Case, demos: Sequence[Any]) -> float:
    """How far the states of demonstrations, each read alone, go when what enters the backbone is rounded once more."""
    parsed = [Demonstration.of(demo) for demo in demos]
    encoded = [case.processor.encode_demonstrations([demo], case.model.config.read_span)[0] for demo in parsed]
    inputs = [dict(encoding.to(case.model.device, case.model.dtype)) for encoding in encoded]
    return under_rounding(case, inputs, case.model.config.read_layers)


@holds("what is read depends on the demonstration's image")
def images_matter(case: Case) -> None:
    first, second = (case.model.read([(noise(seed), "dax")]).vectors for seed in (1, 2))
    require(not torch.allclose(first, second, atol=1e-6), "another image is read to the same fused tokens")


@holds("a padded batch of demonstrations is read as each alone")
def batch_reading(case: Case) -> None:
    together = case.model.read(case.demos, batch_size=3).vectors
    alone = torch.cat([case.model.read([demo]).vectors for demo in case.demos])
    case.require_close(together, alone, partial(reading_under_rounding, case, case.demos))


@holds("demonstrations of one image, which is encoded once for all of them, are read as each alone")
def equal_images(case: Case) -> None:
    first, second = noise(1), noise(2)
    demos = [(first, "a dax is here."), (second, "a wug"), (first, QUESTION, "It is a dax."), (first, "blicket")]
    together = case.model.read(demos, batch_size=len(demos)).vectors
    alone = torch.cat([case.model.read([demo]).vectors for demo in demos])
    case.require_close(together, alone, partial(reading_under_rounding, case, demos))


@holds("a read of an inner layer runs no layer behind it, and gives what a whole pass gives there")
def early_stop(case: Case) -> None:
    backbone = case.model.backbone
    try:
        layers = decoder_layers(backbone)
    except ValueError as error:
        raise NotApplicable("the backbone has no stack of decoder layers") from error
    middle = len(layers) // 2
    if not middle:
        raise NotApplicable("the backbone has a single layer")
    demos = [Demonstration.of(demo) for demo in case.demos]
    try:
        stopping, whole = (
            AimForConditionalGeneration.from_backbone(
                backbone, case.processor, preset="paper", read_layers=read_layers
            )
            for read_layers in ([middle], [middle, -1])
        )
    except ValueError as error:
        raise NotApplicable(f"no inner layer can be read: {error}") from error
    ran: list[Any] = []
    handles = [layer.register_forward_hook(lambda layer, *_: ran.append(layer)) for layer in layers[middle:]]
    try:
        actual = stopping.read_states(demos)
        require(not ran, f"{len(ran)} layers ran after the one that is read")
        expected = whole.read_states(demos)
        require(ran, "the whole pass ran no layer after the one that is read")
    finally:
        for handle in handles:
            handle.remove()
    for states, joined in zip(actual, expected, strict=True):
        case.require_close(states, joined[:, : states.shape[1]])


# --- states that enter at depth


@holds("without training, it answers from demonstrations and their images, with states put back at depth")
def without_training(case: Case) -> None:
    try:
        model, inputs = untrained(case), case.query()
    except ValueError as error:
        if "preset='paper'" not in str(error):
            raise
        raise NotApplicable(f"no state enters at depth: {error}") from error
    swapped = [{**demo, "image": noise(90 + i, *demo["image"].size)} for i, demo in enumerate(case.demos)]
    with torch.no_grad():
        plain, with_demos, other = (
            model(**inputs, demos=demos).logits[:, -1] for demos in (None, case.demos, swapped)
        )
    require(bool(with_demos.float().isfinite().any()), "the logits are not numbers")
    require(difference(with_demos, plain) > 1e-4, "demonstrations do not reach the answer")
    require(difference(with_demos, other) > 1e-4, "the images of the demonstrations do not reach the answer")
    answer = model.generate(**inputs, demos=case.demos, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    require(answer.shape == (1, inputs["input_ids"].shape[1] + 2), f"the answer has the shape {tuple(answer.shape)}")


@holds("words read alone and put back at depth give the logits of the plain text prompt")
def words_at_depth(case: Case) -> None:
    try:
        model, inputs = untrained(case), case.query()
    except ValueError as error:
        raise NotApplicable(f"no state enters at depth: {error}") from error
    if _looks_ahead(case, model.config.read_layers):
        raise NotApplicable("words attend to the words behind them, which a demonstration read alone has not seen")
    fused = model.read([WORDS_ALONE])
    plain = with_words(case, inputs, fused.ids)
    encoded, kept = case.processor.encode_demonstrations([Demonstration.of(WORDS_ALONE)], model.config.read_span)
    before = encoded["input_ids"][0, : int(kept[0].int().argmax())]
    if not torch.equal(before, plain["input_ids"][0, : len(before)].cpu()):
        raise NotApplicable(
            "words read alone stand behind tokens with which no prompt begins: images come before them"
        )
    if _sees_behind(case, plain, len(fused.ids), model.config.read_layers):
        raise NotApplicable("the backbone itself shows the words of a prompt an image that stands behind them")
    with torch.no_grad():
        logits = model(**inputs, demos=fused).logits[:, -1]
        wanted = model.backbone(**plain).logits[:, -1]
    case.require_close(logits, wanted)


def _looks_ahead(case: Case, layers: list[int]) -> bool:
    """Whether the states of words change with the words after them: the backbone itself attends both ways."""
    inputs = dict(case.query(images=0))
    length = inputs["input_ids"].shape[1]
    shorter = {
        name: value[:, : length - 4] if isinstance(value, torch.Tensor) and value.shape[:2] == (1, length) else value
        for name, value in inputs.items()
    }
    with preserved_state(case.model.backbone):
        whole, begun = (read_hidden_states(case.model.backbone, given, layers) for given in (inputs, shorter))
    return difference(begun, whole[:, : length - 4]) > case.tolerance


def _sees_behind(case: Case, inputs: dict[str, Any], count: int, layers: list[int]) -> bool:
    """Whether the states of the first `count` tokens change with an image after them (Mllama's cross-attention)."""
    other = {k: -v if k.startswith("pixel_values") and v.is_floating_point() else v for k, v in inputs.items()}
    with preserved_state(case.model.backbone):
        states = [read_hidden_states(case.model.backbone, given, layers)[:, :count] for given in (inputs, other)]
    return difference(*states) > case.tolerance


def with_words(case: Case, inputs: Mapping[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """The inputs of one query with the words `ids` behind its BOS, put together without the package."""
    first, length = int(inputs["input_ids"][0, 0]), inputs["input_ids"].shape[1]
    start = int(first == getattr(case.model.config.get_text_config(), "bos_token_id", None))
    wide = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.shape[:2] != (1, length) or name == "pixel_values":
            continue
        filler = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.get(name, torch.zeros_like(ids))
        more = filler.reshape(1, -1, *[1] * (value.ndim - 2)).expand(1, len(ids), *value.shape[2:]).to(value)
        wide[name] = torch.cat([value[:, :start], more, value[:, start:]], dim=1)
    return wide


# --- training and saving


@holds("the loss has gradients for the projector alone, with and without gradient checkpointing")
def gradients(case: Case) -> None:
    inputs, model = case.query(), case.model
    if not len(model.projector.layers):  # as it is trained
        layers = model.config.read_layers
        model = AimForConditionalGeneration.from_backbone(
            model.backbone, case.processor, preset="trained", read_layers=layers
        )
    by_precision = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        try:
            model(**{**inputs, "labels": inputs["input_ids"]}, demos=case.demos).loss.backward()
        finally:
            if checkpointing:
                model.gradient_checkpointing_disable()
            model.eval()
        got = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        others = sorted(name for name in got if not name.startswith("projector."))
        require(got and not others, f"weights beside the projector's have a gradient: {others[:3]}")
        require(all(bool(grad.isfinite().all()) for grad in got.values()), "a gradient is not finite")
        by_precision.append(torch.cat([gradient.reshape(-1) for gradient in got.values()]))
        model.zero_grad()
    require(bool(by_precision[0].any()), "no gradient reaches the projector")
    case.require_close(by_precision[1], by_precision[0])


@holds("saved and loaded again, it answers the same")
def reload(case: Case) -> None:
    inputs = case.query()
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        again = AimForConditionalGeneration.from_pretrained(folder, backbone=case.model.backbone)
        actual = Case(again).answered(inputs, case.demos)
    case.require_same(actual, case.answered(inputs, case.demos))
