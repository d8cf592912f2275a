"""`forward` and `prompt_embeds` take what `generate` takes, and `logits_to_keep` counts the caller's positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import DEMOS, Plugin, picture, plugin

from modeling_aim import DemonstrationBank


def two_rows(aim: Plugin, side: str) -> tuple[dict[str, Any], torch.Tensor]:
    """Two queries of different lengths, padded on `side`, with labels at the last three tokens of each."""
    inputs = aim.query("And?", "What is this one?")
    shape = inputs["attention_mask"].shape
    pad = int((inputs["attention_mask"][0] == 0).sum())
    assert pad
    labels = torch.full(shape, -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    given = {**{name: value.clone() for name, value in inputs.items()}, "labels": labels}
    if side == "right":
        for value in given.values():
            if value.shape[:2] == shape:
                value[0] = value[0].roll(-pad, 0)
    return given, given.pop("labels")


ROWS = [list(DEMOS[:3]), list(DEMOS[:1])]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_to_keep_counts_the_callers_own_positions(aim: Plugin, side: str) -> None:
    inputs, labels = two_rows(aim, side)
    length = labels.shape[1]
    for demos in (ROWS, DEMOS[:2], [None, DEMOS[:2]]):
        whole = aim.model(**inputs, demos=demos, labels=labels)
        for keep in (0, 1, length - 1, length, length + 5, torch.tensor([length - 1]), torch.tensor([3, 0, -2, 3])):
            kept = aim.model(**inputs, demos=demos, logits_to_keep=keep).logits
            expected = whole.logits[:, keep if isinstance(keep, torch.Tensor) else slice(-keep, None)]
            torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
        first = int((labels != -100).int().argmax(dim=1).min())
        for keep in (length - first + 1, torch.arange(first - 1, length)):  # all that predict a label
            output = aim.model(**inputs, demos=demos, labels=labels, logits_to_keep=keep)
            torch.testing.assert_close(output.loss, whole.loss, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_loss_of_kept_logits_is_that_of_the_labels_they_predict(aim: Plugin) -> None:
    inputs, _ = two_rows(aim, "left")
    labels = inputs["input_ids"]
    whole, all_kept = (aim.model(**inputs, demos=ROWS, labels=labels, **keep) for keep in ({}, {"logits_to_keep": 99}))
    torch.testing.assert_close(all_kept.loss, whole.loss, rtol=1e-5, atol=1e-5)
    last = torch.full_like(labels, -100)
    last[:, -2:] = labels[:, -2:]
    expected = aim.model(**inputs, demos=ROWS, labels=last).loss
    found = aim.model(**inputs, demos=ROWS, labels=labels, logits_to_keep=3).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def few_shot_chat() -> list[dict[str, Any]]:
    def image(seed: int) -> dict[str, Any]:
        return {"type": "image", "image": picture(seed)}

    return [
        {"role": "user", "content": [image(0)]},
        {"role": "assistant", "content": [{"type": "text", "text": "dax"}]},
        {"role": "user", "content": [image(5), {"type": "text", "text": "What is this?"}]},
    ]


def results(aim: Plugin, inputs: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Of one pass, and as embeddings."""
    return [aim.model(**inputs, **options).logits, *aim.model.prompt_embeds(inputs, **options)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(scope="module")
def paper() -> Plugin:
    return plugin("llava", preset="paper")


@torch.no_grad()
def test_one_pass_and_embeddings_take_what_generate_takes(paper: Plugin) -> None:
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    chat = dict(paper.processor.apply_chat_template(few_shot_chat(), add_generation_prompt=True, **options))
    alone = {name: value for name, value in chat.items() if name != "chat_demos"}
    assert_same(results(paper, chat), results(paper, alone, demos=chat["chat_demos"]))
    inputs, bank = paper.query(), DemonstrationBank(paper.model.read(DEMOS))
    assert_same(results(paper, inputs, demos=bank, shots=1, select=[2]), results(paper, inputs, demos=bank[2:3]))
    assert_same(paper.model.prompt_embeds({**inputs, "demos": DEMOS}), paper.model.prompt_embeds(inputs, DEMOS))
    with pytest.raises(ValueError, match="demos are given twice"):
        paper.model.prompt_embeds({**inputs, "demos": DEMOS}, DEMOS)


@pytest.mark.parametrize("name", ["demo", "chat_demo", "shot", "selects", "demonstrations", "num_shots"])
def test_a_misspelt_argument_is_refused(paper: Plugin, name: str) -> None:
    inputs = paper.query()
    for call in (lambda **given: paper.model(**given), paper.model.prompt_embeds):
        with pytest.raises(ValueError, match=rf"{name} is neither .* Did you mean (demos|chat_demos|shots|select)\?"):
            call({**inputs, name: DEMOS}) if call == paper.model.prompt_embeds else call(**inputs, **{name: DEMOS})


def test_inputs_of_a_backbone_resemble_no_argument_of_ours(aim: Plugin) -> None:
    with torch.no_grad():
        aim.model(**aim.query(), use_cache=False, output_hidden_states=True, output_attentions=False, return_dict=True)


def test_embeddings_check_the_mask(paper: Plugin) -> None:
    inputs = paper.query()
    mask = inputs["attention_mask"]
    assert_same(paper.model.prompt_embeds({**inputs, "attention_mask": None}), paper.model.prompt_embeds(inputs))
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 3\)"):
        paper.model.prompt_embeds({**inputs, "attention_mask": mask[:, :3]})
