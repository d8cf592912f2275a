"""Prompts and fused tokens that cannot be answered: counted and checked before anything is read, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEMOS, FAMILIES, Plugin, build, plugin
from PIL import Image
from test_bad_input import fails
from test_reading import calls

from modeling_aim import AimConfig, AimForConditionalGeneration, DemonstrationBank, FusedDemonstrations
from modeling_aim.demonstrations_aim import FUSED_FILE

GIVEN: dict[str, Callable[[Plugin], Any]] = {
    "none": lambda aim: None,
    "raw": lambda aim: DEMOS[:2],
    "fused": lambda aim: aim.model.read(DEMOS[:2]),
    "prefix": lambda aim: aim.model.prefill(DEMOS[:2]),
    "rows": lambda aim: [aim.model.read(DEMOS[:2])],
}
WRONG_IDS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "one row without its batch": (lambda ids: ids[0], r"of the shape \(\d+,\)"),
    "a list": (lambda ids: ids.tolist(), "a list"),
    "no token": (lambda ids: ids[:, :0], r"of the shape \(1, 0\)"),
    "no row": (lambda ids: ids[:0], r"of the shape \(0, \d+\)"),
    "fractions": (lambda ids: ids.float(), "torch.float32"),
    "a mask": (lambda ids: ids > 0, "torch.bool"),
}
WRONG_MASKS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "shorter": (lambda mask: mask[:, :-3], r"\(1, \d+\)"),
    "longer": (lambda mask: torch.cat([mask, mask], dim=1), r"\(1, \d+\)"),
    "without its batch": (lambda mask: mask[0], r"\(\d+,\)"),
    "of more rows": (lambda mask: mask.repeat(2, 1), r"\(2, \d+\)"),
    "of four dimensions": (lambda mask: mask[None, None], r"\(1, 1, 1, \d+\)"),
    "a list": (lambda mask: mask.tolist(), "a list"),
}


@pytest.mark.parametrize("wrong", WRONG_IDS)
def test_ids_of_another_form_are_named_whatever_the_demonstrations(llava: Plugin, wrong: str) -> None:
    change, said = WRONG_IDS[wrong]
    inputs = llava.query()
    given = {**inputs, "input_ids": change(inputs["input_ids"])}
    for demos in (make(llava) for make in GIVEN.values()):
        for call in (llava.model.generate, llava.model):
            words = "input_ids are", said, r"expected a tensor of whole numbers \(batch, length\)"
            fails(lambda call=call, demos=demos: call(**given, demos=demos), *words)


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_a_mask_of_another_shape_is_named(llava: Plugin, wrong: str) -> None:
    change, said = WRONG_MASKS[wrong]
    inputs = llava.query()
    given = {**inputs, "attention_mask": change(inputs["attention_mask"])}
    for name, make in GIVEN.items():
        for call in (llava.model.generate, llava.model)[: 1 if name == "none" else 2]:  # the backbone's own pass alone
            fails(
                lambda call=call, make=make: call(**given, demos=make(llava)),
                f"attention_mask is {said}", "expected .*like input_ids", "Leave it out",
            )  # fmt: skip


def test_ids_are_given_once(llava: Plugin) -> None:
    inputs = llava.query(image=None)
    ids = inputs["input_ids"]
    for demos in (None, DEMOS[:2]):
        fails(lambda demos=demos: llava.model.generate(ids[:, :3], **inputs, demos=demos), "ids twice", "input_ids")
        wanted = llava.model.generate(ids, demos=demos, max_new_tokens=2, do_sample=False)
        options = {"input_ids": None, "max_new_tokens": 2, "do_sample": False}
        assert torch.equal(llava.model.generate(ids, demos=demos, **options), wanted)


@pytest.mark.parametrize("layers", [[1.0], [1.5], ["1"], [True], 1, "1", [None]], ids=repr)
def test_read_layers_that_are_no_whole_numbers(layers: Any) -> None:
    backbone = build("llava")
    for make in (lambda **given: AimForConditionalGeneration.from_backbone(backbone.model, **given), AimConfig):
        for preset in ({}, {"entry_layers": [0], "projector_form": "mlp"}):
            fails(lambda make=make, preset=preset: make(read_layers=layers, **preset), "read_layers", "whole numbers")


# --- too much


def test_ten_thousand_demonstrations_are_counted_before_one_is_opened_or_read(llava: Plugin, tmp_path: Path) -> None:
    missing = [{"image": str(tmp_path / "nowhere.png"), "label": f"dax {number}"} for number in range(10_000)]
    inputs, said = llava.query(), ("10000 demonstrations", "2048 positions", "DemonstrationBank")
    with calls(llava.backbone.get_input_embeddings()) as seen:
        for demos in (missing, [missing], tuple(missing)):
            fails(lambda demos=demos: llava.model.generate(**inputs, demos=demos), *said)
            fails(lambda demos=demos: llava.model(**inputs, demos=demos), *said)
        fails(lambda: llava.model.generate(**inputs, chat_demos=missing), *said)
        fails(lambda: llava.model.prefill(missing), *said)
    assert not seen, "something was read"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_fit_is_counted_before_it_is_read(family: str) -> None:
    aim = plugin(family)
    inputs, many = aim.query(), [{"text": f"the thing number {number} lies here."} for number in range(200)]
    with calls(aim.backbone.get_input_embeddings()) as seen:
        fails(lambda: aim.model.generate(**inputs, demos=many), "fused tokens", "2048 positions", r"pass demos\[:")
        fails(lambda: aim.model.prefill(many), "fused tokens", "2048 positions", "Prefill fewer")
    assert not seen, "something was read"


# --- fused tokens of somebody else, or of a model that overflows


@pytest.fixture
def broken() -> Plugin:
    """A projector that was damaged in memory."""
    aim = plugin("llava")
    with torch.no_grad():
        aim.model.projector.layers[-1].weight[0] = float("nan")
    return aim


def uses(aim: Plugin, demos: Any) -> Iterator[Callable[[], Any]]:
    """Every way in which demonstrations reach an answer."""
    inputs = aim.query()
    yield lambda: aim.model.generate(**inputs, demos=demos, max_new_tokens=2)
    yield lambda: aim.model.generate(**inputs, demos=[demos], max_new_tokens=2, num_beams=2)
    yield lambda: aim.model(**inputs, demos=demos)
    yield lambda: aim.model.prefill(demos)


def test_an_answer_from_what_is_not_finite_is_refused(broken: Plugin) -> None:
    fused = broken.model.read(DEMOS)
    for demos in (DEMOS, fused, DemonstrationBank(fused)):
        for use in uses(broken, demos):
            fails(use, "Fused tokens of demonstration 0", "not finite", "projector")
    inputs = broken.query()
    loss = broken.model(**inputs, demos=DEMOS, labels=inputs["input_ids"]).loss
    assert not torch.isfinite(loss)  # training has an error of its own


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**31 - 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_id_that_the_backbone_does_not_know_is_refused(family: str, token_id: int, tmp_path: Path) -> None:
    """Of a foreign bank: on a GPU such an id would end the process."""
    aim = plugin(family)
    read = aim.model.read(DEMOS)
    ids = read.ids.clone()
    ids[3] = token_id
    planted = FusedDemonstrations(read.vectors, read.lengths, ids, read.keys, read.texts, read.source)
    given = [planted]
    if token_id >= 0:
        DemonstrationBank(planted).save_pretrained(tmp_path)
        given.append(DemonstrationBank.from_pretrained(tmp_path, aim.model))
    for demos in given:
        for use in uses(aim, demos):
            fails(use, f"token id {token_id}", r"knows the ids 0\.\.\d+", "model.read")
    assert aim.answer(aim.query(), planted[1:]).shape == (1, 6)


def test_the_last_word_of_the_vocabulary_is_known(llava: Plugin) -> None:
    read = llava.model.read(DEMOS[:1])
    last = llava.backbone.get_input_embeddings().num_embeddings - 1
    planted = FusedDemonstrations(
        read.vectors, read.lengths, torch.full_like(read.ids, last), read.keys, read.texts, read.source
    )
    assert llava.answer(llava.query(), planted).shape == (1, 6)


def test_a_file_of_fused_tokens_that_are_not_finite_is_refused(llava: Plugin, tmp_path: Path) -> None:
    read = llava.model.read(DEMOS)
    vectors = read.vectors.clone()
    vectors[5, 2] = float("inf")
    planted = FusedDemonstrations(vectors, read.lengths, read.ids, read.keys, read.texts, read.source)
    planted.save_pretrained(tmp_path)
    fails(lambda: FusedDemonstrations.from_pretrained(tmp_path), FUSED_FILE, "not finite", "read the demonstrations")


def test_an_image_that_the_processor_refuses_is_named() -> None:
    aim = plugin("qwen2_5_vl")
    demos = [(Image.new("RGB", (8000, 30)), "dax")]
    ways = (lambda: aim.model.read(demos), lambda: aim.model.prefill(demos), lambda: aim.answer(aim.query(), demos))
    for way in ways:
        fails(way, "image that the processor refuses", "'dax'")
