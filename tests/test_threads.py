"""Threads that answer, read, compute losses and switch modes on one model: each gets what it gets alone."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from backbones import DEMOS, Plugin, picture, plugin
from test_reading import loss_of

from modeling_aim.state_aim import answering

FAMILIES = ("llava", "qwen2_5_vl", "smolvlm")


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def recomputing(aim: Plugin) -> list[Any]:
    return [module for module in aim.backbone.modules() if module.training]


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two results are equal; numbers but for their last digits, since a recomputed layer adds up otherwise."""
    close = torch.allclose if found.is_floating_point() else torch.equal
    return found.shape == wanted.shape and close(found, wanted)


def in_training(family: str) -> Plugin:
    aim = plugin(family)
    aim.model.gradient_checkpointing_enable()
    aim.model.train()
    return aim


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("family", [*FAMILIES[:2], pytest.param(FAMILIES[2], marks=pytest.mark.slow)])
def test_96_calls_in_8_threads_while_it_is_trained_with_checkpointing(family: str) -> None:
    """Answers with and without demonstrations, reads, prefills, losses and gradients; and both modes are set."""
    aim = in_training(family)
    first, second = aim.query(), aim.query("Which of all of them is this?", image=20)
    fused = aim.model.read(DEMOS[:3])
    weights = list(aim.model.projector.parameters())

    def prefilled(number: int) -> torch.Tensor:
        aim.model.prefix_cache.clear()  # so that it is computed again, also while another thread goes on behind it
        return aim.answer(first, aim.model.prefill(DEMOS[:number]))

    def gradient() -> torch.Tensor:
        parts = torch.autograd.grad(loss_of(aim), weights)
        return torch.cat([part.flatten() for part in parts])

    jobs: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: aim.answer(first, fused),
        lambda: aim.answer(second, DEMOS[:2]),
        lambda: aim.answer(second),
        lambda: aim.model.read([(picture(30), "something else altogether")]).vectors,
        lambda: loss_of(aim).detach(),
        gradient,
        lambda: prefilled(2),
        lambda: prefilled(3),
        lambda: aim.model(**second, demos=fused).logits.detach(),
    )
    alone = [job() for job in jobs]
    plan: list[int | None] = [number % len(jobs) for number in range(96)] + [None] * 24  # `None`: a mode is set
    random.Random(0).shuffle(plan)
    with ThreadPoolExecutor(8) as pool:
        done = [
            pool.submit(aim.model.train, turn % 2 == 0) if number is None else pool.submit(jobs[number])
            for turn, number in enumerate(plan)
        ]
        found = [(number, one.result()) for number, one in zip(plan, done, strict=True)]
    wrong = [number for number, answer in found if number is not None and not same(answer, alone[number])]
    assert not wrong, f"{len(wrong)} of 96 calls gave something else than alone: {sorted(set(wrong))}"
    aim.model.train()
    assert recomputing(aim), "recomputing is off after the answers"
    aim.model.eval()
    assert not recomputing(aim)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mode_set_last_holds_when_the_last_answer_has_ended(family: str, last: bool) -> None:
    """Of two answers that overlap the first to begin ends first; no answer sees training mode."""
    aim = in_training(family)
    layers = recomputing(aim)
    first, second = answering(aim.backbone), answering(aim.backbone)
    first.__enter__()
    aim.model.train(not last)
    second.__enter__()
    assert not recomputing(aim)
    aim.model.train(last)
    first.__exit__(None, None, None)
    assert not recomputing(aim)
    second.__exit__(None, None, None)
    assert recomputing(aim) == (layers if last else [])
    assert aim.model.training is last and aim.model.projector.training is last


def test_setting_the_mode_never_shows_another_thread_dropout() -> None:
    """`train()` leaves parts of the backbone alone that are as they should be."""
    aim = in_training("llava")
    seen: set[str] = set()
    stop = threading.Event()
    parts = [module for module in aim.backbone.modules() if module not in set(recomputing(aim))]

    def watch() -> None:
        while not stop.is_set():
            seen.update(type(module).__name__ for module in parts if module.training)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for _ in range(200):
            aim.model.eval()
            aim.model.train()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not seen


def test_chats_are_tokenized_one_at_a_time(llava: Plugin) -> None:
    """A fast tokenizer keeps its padding as state: two threads at once are an error."""

    def chat(words: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": words}]}]

    chats = [chat("what is this thing here ? " * 40), chat("hm")]

    def tokenized(number: int) -> torch.Tensor:
        """Both chats padded, or the first alone without padding."""
        options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        options["processor_kwargs"] = {"padding": not number % 2}
        return llava.processor.apply_chat_template(chats[: 2 - number % 2], **options)["input_ids"]

    wanted, interval = [tokenized(0), tokenized(1)], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for number, ids in enumerate(pool.map(tokenized, range(400))):
                assert torch.equal(ids, wanted[number % 2])
    finally:
        sys.setswitchinterval(interval)


def test_a_gradient_beside_answers_is_the_gradient_alone() -> None:
    aim = in_training("llava")
    inputs, fused = aim.query(), aim.model.read(DEMOS[:2])
    loss_of(aim).backward()
    alone = [weight.grad.clone() for weight in aim.model.projector.parameters()]
    wanted = aim.answer(inputs, fused)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(aim.answer, inputs, fused) for _ in range(24)]
        for _ in range(6):
            aim.model.zero_grad()
            loss_of(aim).backward()
            for weight, before in zip(aim.model.projector.parameters(), alone, strict=True):
                torch.testing.assert_close(weight.grad, before, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(answer.result(), wanted) for answer in answers)
