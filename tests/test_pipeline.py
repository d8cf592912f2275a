"""The pipeline: demonstrations as an argument, read ones, and few-shot chats whose earlier turns become them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backbones import DEMOS, FAMILIES, Plugin, picture, plugin
from transformers import pipeline

from modeling_aim import Demonstration, DemonstrationBank
from modeling_aim.encoding_aim import split_few_shot_chat

QUESTION = "What is this?"


class Asked(Plugin):
    """A plug-in, and the pipeline on it."""

    pipe: Any

    def expected(self, demos: Any = None, image: int | None = 9, question: str = QUESTION) -> str:
        """The answer without pipeline."""
        return self.text(self.answer(self.query(question, image=image), demos)[0])

    def text(self, tokens: torch.Tensor) -> str:
        return self.processor.decode(tokens, skip_special_tokens=True)

    def __call__(self, *args: Any, **kwargs: Any) -> list[str]:
        """The answers of the pipeline, whatever lists they come in."""
        greedy = {"max_new_tokens": 6, "do_sample": False, **kwargs.pop("generate_kwargs", {})}
        found = self.pipe(*args, **{"return_full_text": False, "generate_kwargs": greedy, **kwargs})
        found = [found] if isinstance(found, dict) else list(found)
        return [(one[0] if isinstance(one, list) else one)["generated_text"] for one in found]


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request: pytest.FixtureRequest) -> Asked:
    made = Asked(request.param, plugin(request.param).model)
    made.pipe = pipeline("image-text-to-text", model=made.model, processor=made.processor)
    return made


def user(question: str | None, *images: int) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image", "image": picture(image)} for image in images]
    return {"role": "user", "content": content + ([{"type": "text", "text": question}] if question else [])}


def said(text: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


PAIRS = [user(QUESTION, 0), said("a dax"), user("And that?", 1), said("It is a wug."), user(None, 2), said("blicket")]
SHOWN = [(picture(0), QUESTION, "a dax"), (picture(1), "And that?", "It is a wug."), (picture(2), "blicket")]
FEW_SHOT = [*PAIRS, user(QUESTION, 9)]


def test_images_text_and_demonstrations(asked: Asked) -> None:
    call = {"images": picture(9), "text": asked.processor.prompt(QUESTION)}
    wanted, zero_shot = asked.expected(DEMOS), asked.expected()
    assert wanted != zero_shot
    assert asked(**call) == [zero_shot]
    assert asked(**call, demos=list(DEMOS)) == [wanted]
    assert asked(**call, demos=asked.model.read(DEMOS)) == [wanted]
    for demos in (asked.model.read(DEMOS), list(DEMOS)):
        assert asked(**call, generate_kwargs={"demos": demos}) == [wanted]


def test_a_bank_is_chosen_from_for_each_query(asked: Asked) -> None:
    """`shots` and `select` beside `demos`, as in `generate`; a batch of the pipeline has one choice a row."""
    bank = DemonstrationBank(asked.model.read(DEMOS))
    queries = [(9, QUESTION), (1, "Which of them is that?")]
    for selection in ({"shots": 2, "select": "fused"}, {"select": [1, 0]}, {"shots": 1, "select": {"by": "fused"}}):
        wanted = [
            asked.text(asked.answer(asked.query(question, image=image), bank, **selection)[0])
            for image, question in queries
        ]
        prompts = [asked.processor.prompt(question) for _, question in queries]
        images = [picture(image) for image, _ in queries]
        assert asked(images=images[0], text=prompts[0], demos=bank, **selection) == wanted[:1]
        for size in (1, 2):
            assert asked(images=images, text=prompts, demos=bank, batch_size=size, **selection) == wanted
        assert asked(text=[user(QUESTION, 9)], demos=bank, **selection) == wanted[:1]
    call = {"images": picture(9), "text": asked.processor.prompt(QUESTION)}
    for demos in (list(DEMOS), None):
        with pytest.raises(ValueError, match=r"shots=2 and select='fused' choose from a DemonstrationBank"):
            asked(**call, demos=demos, shots=2, select="fused")
    bound = asked.processor(**call, demos=bank, shots=2, select="fused", return_tensors="pt")["demos"]
    with pytest.raises(ValueError, match=r"shots=2 and select='fused' choose for each query"):
        asked.model.read(bound)


def test_text_only(asked: Asked) -> None:
    prompt = asked.processor.prompt(QUESTION, images=0)
    assert asked(text=prompt) == [asked.expected(image=None)]
    assert asked(text=prompt, demos=list(DEMOS)) == [asked.expected(DEMOS, image=None)]
    chat = [user(QUESTION)]
    assert asked(text=chat) == [asked.expected(image=None)]


def test_a_chat_takes_demonstrations(asked: Asked) -> None:
    assert asked(text=[user(QUESTION, 9)]) == [asked.expected()]
    assert asked(text=[user(QUESTION, 9)], demos=list(DEMOS)) == [asked.expected(DEMOS)]
    assert asked(text=[user(QUESTION, 9)], demos=asked.model.read(DEMOS)) == [asked.expected(DEMOS)]


def test_earlier_pairs_of_a_chat_become_demonstrations(asked: Asked) -> None:
    wanted = asked.expected(SHOWN)
    assert asked(text=FEW_SHOT) == [wanted]
    assert asked(text=FEW_SHOT, demos=list(DEMOS)) == [asked.expected([*DEMOS, *SHOWN])]


def test_the_switch_turns_few_shot_chats_off(asked: Asked) -> None:
    ordinary = asked(text=FEW_SHOT, few_shot_chats=False)
    assert ordinary == [ordinary_answer(asked, FEW_SHOT)] != asked(text=FEW_SHOT)
    asked.processor.few_shot_chats = False
    try:
        assert asked(text=FEW_SHOT) == ordinary
    finally:
        asked.processor.few_shot_chats = True


def ordinary_answer(asked: Asked, chat: list[dict[str, Any]]) -> str:
    """The answer of the backbone, by its own processor."""
    inputs = asked.processor.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = asked.backbone.generate(**inputs, max_new_tokens=6, do_sample=False)
    return asked.text(output[0, inputs["input_ids"].shape[1] :])


def test_a_last_turn_about_an_earlier_image_stays_an_ordinary_chat(asked: Asked) -> None:
    chat = [*PAIRS, user("Which of these was blue?")]
    assert asked(text=chat) == [ordinary_answer(asked, chat)]


def test_the_system_turn_is_kept(asked: Asked) -> None:
    system = said("Answer with one word.", "system")
    inputs = asked.processor.apply_chat_template(
        [system, *FEW_SHOT], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    demos = inputs.pop("chat_demos")
    assert [(d.question, d.text) for d in demos] == [(d.question, d.text) for d in map(Demonstration.of, SHOWN)]
    assert "Answer with one word." in asked.processor.decode(inputs["input_ids"][0])
    assert asked(text=[system, *FEW_SHOT]) == [asked.text(asked.answer(dict(inputs), SHOWN)[0])]


@pytest.mark.parametrize(
    ("chat", "shots"),
    [
        (FEW_SHOT, 3),
        ([said("Be brief.", "system"), *FEW_SHOT], 3),
        ([*FEW_SHOT, said("It is")], 3),
        ([user(QUESTION, 9)], 0),
        ([user(QUESTION)], 0),
        ([*PAIRS, user("Which was blue?")], 0),
        ([user("Hello"), said("Hello."), user(QUESTION, 9)], 0),
        ([user(QUESTION, 0), user(QUESTION, 1), said("a wug"), user(QUESTION, 9)], 0),
        ([said("Hello."), user(QUESTION, 9)], 0),
        ([user(QUESTION, 0, 1), said("two daxes"), user(QUESTION, 8, 9)], 1),
        ([{"role": "user", "content": "Hello"}], 0),
        ([], 0),
        ([{"role": "user", "content": [*PAIRS[0]["content"], {"type": "video", "video": "a.mp4"}]}, *FEW_SHOT[1:]], 0),
        ([PAIRS[0], {**PAIRS[1], "tool_calls": [{"type": "function"}]}, *FEW_SHOT[2:]], 0),
        ([PAIRS[0], {**PAIRS[1], "tool_calls": None}, *FEW_SHOT[2:]], 3),
    ],
    ids=range(15),
)
def test_which_chats_are_few_shot(chat: list[dict[str, Any]], shots: int) -> None:
    demos, rest = split_few_shot_chat(chat)
    assert len(demos) == shots
    assert len(rest) == len(chat) - 2 * shots
    assert [turn for turn in chat if turn in rest] == rest and rest[-1:] == chat[-1:]


def test_lists_generators_and_batches_equal_one_by_one(asked: Asked) -> None:
    questions = (QUESTION, "And which of them is that one?", "Name?")
    prompts = [asked.processor.prompt(question) for question in questions]
    images = [picture(9 + i) for i in range(3)]
    fused = asked.model.read(DEMOS)
    wanted = [asked.expected(DEMOS, 9 + i, question) for i, question in enumerate(questions)]
    for demos in (list(DEMOS), fused):
        one_by_one = [asked(images=i, text=p, demos=demos)[0] for i, p in zip(images, prompts, strict=True)]
        assert one_by_one == wanted
        for size in (1, 2):
            assert asked(images=images, text=prompts, demos=demos, batch_size=size) == wanted

    def queries() -> Iterator[dict[str, Any]]:
        for image, prompt in zip(images, prompts, strict=True):
            yield {"images": image, "text": prompt}

    for size in (1, 2):
        assert asked(queries(), demos=list(DEMOS), batch_size=size) == wanted
        assert asked(queries(), generate_kwargs={"demos": fused}, batch_size=size) == wanted


def test_chats_of_different_kinds_in_one_batch(asked: Asked) -> None:
    about_earlier = [*PAIRS, user("Which of these was blue?")]
    chats = [FEW_SHOT, [user(QUESTION, 9)], about_earlier, [user(QUESTION)], [*PAIRS[:2], user("And now?", 9)]]
    wanted = [asked(text=chat)[0] for chat in chats]
    assert wanted[:2] == [asked.expected(SHOWN), asked.expected()]
    assert wanted[2] == ordinary_answer(asked, about_earlier)
    assert wanted[4] == asked.expected(SHOWN[:1], question="And now?")
    assert asked(text=chats) == wanted
    alike = [0, 1, 4]  # a pipeline batches only queries of as many images
    chats, wanted = [chats[i] for i in alike], [wanted[i] for i in alike]
    assert asked(text=chats, batch_size=2) == wanted
    assert asked((chat for chat in chats), batch_size=2) == wanted


def test_the_whole_text_of_an_answer_has_no_placeholders(asked: Asked) -> None:
    prompt = asked.processor.prompt(QUESTION)
    call = {"images": picture(9), "text": prompt, "return_full_text": True}
    (found,) = asked(**call, demos=list(DEMOS))
    (zero_shot,) = asked(**call)
    assert found.removesuffix(asked.expected(DEMOS)) == zero_shot.removesuffix(asked.expected())
