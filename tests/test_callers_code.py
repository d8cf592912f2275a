"""Code of the caller inside `generate` (processors, criteria, streamers, calls of `generate`) and fused tokens.

It sees the query's prompt and the new tokens alone, and what it does counts, in every mode and for demonstrations in
every form.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from backbones import DEMOS, FAMILIES, Plugin, picture, plugin
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer

from modeling_aim import DemonstrationBank

FORMS: dict[str, Callable[[Plugin], dict[str, Any]]] = {
    "none": lambda aim: {},
    "raw": lambda aim: {"demos": DEMOS[:2]},
    "fused": lambda aim: {"demos": aim.model.read(DEMOS[:2])},
    "bank": lambda aim: {"demos": DemonstrationBank(aim.model.read(DEMOS)), "shots": 2, "select": [0, 1]},
    "prefix": lambda aim: {"demos": aim.model.prefill(DEMOS[:2])},
    "rows": lambda aim: {"demos": [DEMOS[:2], aim.model.read(DEMOS[2:])]},
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}
QUESTIONS = ("What is this?", "And which of them all is that one?")  # one of them is padded
LENGTH = 5


CASES = [(form, list(FAMILIES)[number % len(FAMILIES)]) for number, form in enumerate(FORMS)]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Plugin, dict[str, Any]]:
    """A family, and demonstrations in a form, or none: each form in one family, so that it takes seconds."""
    form, family = request.param
    aim = plugin(family)
    return aim, FORMS[form](aim)


@pytest.fixture(scope="module")
def aim(case: tuple[Plugin, dict[str, Any]]) -> Plugin:
    return case[0]


@pytest.fixture(scope="module")
def form(case: tuple[Plugin, dict[str, Any]]) -> dict[str, Any]:
    return case[1]


@pytest.fixture(scope="module")
def inputs(aim: Plugin) -> dict[str, Any]:
    return aim.query(*QUESTIONS)


def answered(aim: Plugin, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    """Ids of the query and the answer; the same draws each time."""
    set_seed(0)
    output = aim.model.generate(**inputs, **{"max_new_tokens": LENGTH, "eos_token_id": 10**6, **options})
    return output


def copies(mode: dict[str, Any]) -> int:
    return mode.get("num_return_sequences", 1)


def letters(aim: Plugin) -> list[int]:
    return aim.processor.tokenizer("abcdefghijklmnop", add_special_tokens=False)["input_ids"]


class Only(LogitsProcessor):
    """Lets only some tokens be drawn, and keeps what it sees."""

    def __init__(self, allowed: list[int]) -> None:
        self.allowed = allowed
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        kept = torch.full_like(scores, -float("inf"))
        kept[:, self.allowed] = scores[:, self.allowed]
        return kept


def shows_queries(seen: list[torch.Tensor], inputs: dict[str, Any]) -> bool:
    """Whether all that was seen is prompts of the query, each in all its rows, one new token more a step."""
    queries, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    rows = [queries.repeat_interleave(len(ids) // len(queries), dim=0) for ids in seen]
    lengths = [ids.shape[1] - length for ids in seen]
    same = all(torch.equal(ids[:, :length], wanted) for ids, wanted in zip(seen, rows, strict=True))
    return same and lengths == list(range(len(seen)))


# --- logits processors, criteria, allowed tokens


@pytest.mark.parametrize("mode", MODES)
def test_a_logits_processor_sees_the_query_and_counts(aim: Plugin, inputs: Any, form: Any, mode: str) -> None:
    allowed = letters(aim)
    others = [word for word in range(aim.backbone.get_output_embeddings().weight.shape[0]) if word not in allowed]
    wanted = answered(aim, inputs, **form, **MODES[mode], suppress_tokens=others)
    for given in ([Only(allowed)], LogitsProcessorList([Only(allowed), Only(allowed)])):
        output = answered(aim, inputs, **form, **MODES[mode], logits_processor=given)
        assert torch.equal(output, wanted), "transformers' own processor of the same effect answers otherwise"
        assert all(shows_queries(one.seen, inputs) and len(one.seen) == LENGTH for one in given)
    if mode != "beams":
        steps = [output[:, : inputs["input_ids"].shape[1] + step] for step in range(LENGTH)]
        assert all(torch.equal(*pair) for pair in zip(given[0].seen, steps, strict=True))


class AtLength(StoppingCriteria):
    """Ends an answer at a length of prompt and answer together."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, dtype=torch.bool)


@pytest.mark.parametrize("mode", MODES)
def test_a_stopping_criterion_sees_the_query_and_counts(aim: Plugin, inputs: Any, form: Any, mode: str) -> None:
    length = inputs["input_ids"].shape[1] + 3
    wanted = answered(aim, inputs, **form, **MODES[mode], max_new_tokens=3)
    for given in ([AtLength(length)], StoppingCriteriaList([MaxLengthCriteria(length), AtLength(length)])):
        output = answered(aim, inputs, **form, **MODES[mode], stopping_criteria=given)
        assert torch.equal(output, wanted)
        assert [ids.shape[1] for ids in given[-1].seen] == [length - 2, length - 1, length]
        assert shows_queries([inputs["input_ids"], *given[-1].seen], inputs)


@pytest.mark.parametrize("place", ["arguments", "generation_config", "model"])
@pytest.mark.parametrize("mode", MODES)
def test_allowed_tokens_follow_the_query_of_their_row(
    aim: Plugin, inputs: Any, form: Any, mode: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function is given the row's number as transformers counts rows, and that row's prompt."""
    queries, length, all_letters = inputs["input_ids"], inputs["input_ids"].shape[1], letters(aim)
    asked: set[int] = set()

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        asked.add(row)
        per_query = 1 if "num_beams" in MODES[mode] else copies(MODES[mode])
        assert torch.equal(ids[:length].cpu(), queries[row // per_query])
        step = len(ids) - length
        return all_letters[step : step + 2 + row // per_query]

    options: dict[str, Any] = {**MODES[mode], "max_new_tokens": LENGTH, "eos_token_id": 10**6, "pad_token_id": 0}
    if place == "generation_config":
        options = {"generation_config": GenerationConfig(**options)}
    elif place == "model":
        monkeypatch.setattr(aim.backbone, "generation_config", GenerationConfig(**options))
        options = {}
    output = aim.model.generate(**inputs, **form, **options, prefix_allowed_tokens_fn=allowed)
    assert len(output) == 2 * copies(MODES[mode])
    for number, answer in enumerate(output[:, length:]):
        for step, word in enumerate(answer.tolist()):
            assert word in all_letters[step : step + 2 + number // copies(MODES[mode])]
    assert asked == set(range(2 if mode == "beams" else len(output)))


MOVED: dict[str, dict[str, Any]] = {
    "constraints": {"num_beams": 3, "constraints": ["a constraint"]},
    "force_words_ids": {"num_beams": 3, "force_words_ids": [[5]]},
    "group beams": {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
}


@pytest.mark.parametrize("way", MOVED)
def test_what_transformers_moved_out_is_its_own_error(aim: Plugin, inputs: Any, form: Any, way: str) -> None:
    """Constrained beam search and others need `custom_generate`, with demonstrations as without."""
    with pytest.raises(Exception) as theirs:
        aim.backbone.generate(**inputs, max_new_tokens=2, **MOVED[way])
    with pytest.raises(type(theirs.value)) as ours:
        aim.model.generate(**inputs, **form, max_new_tokens=2, **MOVED[way])
    assert str(ours.value) == str(theirs.value) and "trust_remote_code" in str(ours.value)


# --- streamers


class Collected(BaseStreamer):
    """What a streamer is shown; `at_each` runs at each put."""

    def __init__(self, at_each: Callable[[], Any] = lambda: None) -> None:
        self.at_each = at_each
        self.values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.clone())
        self.at_each()

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("mode", MODES)
def test_a_streamer_sees_the_query_and_every_new_token(aim: Plugin, form: Any, mode: str) -> None:
    inputs, seen = aim.query(), Collected()
    options = {**MODES[mode], "num_return_sequences": 1}
    given = {**form, "demos": form["demos"][:1]} if isinstance(form.get("demos"), list) else form
    if mode == "beams":
        for call in (lambda: aim.backbone.generate(**inputs, **options, streamer=seen),
                     lambda: answered(aim, inputs, **given, **options, streamer=seen)):  # fmt: skip
            with pytest.raises(ValueError, match=r"streamer.* beam"):
                call()
        assert not seen.values
        return
    output = answered(aim, inputs, **given, **options, streamer=seen)
    assert torch.equal(seen.values[0], inputs["input_ids"]) and seen.ended == 1
    new = output[0, inputs["input_ids"].shape[1] :]
    assert torch.equal(torch.cat([value.reshape(-1) for value in seen.values[1:]]), new)
    assert torch.equal(output, answered(aim, inputs, **given, **options))
    texts = TextIteratorStreamer(aim.processor.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=answered, args=(aim, inputs), kwargs={**given, **options, "streamer": texts})
    thread.start()
    told = "".join(texts)
    thread.join()
    if mode == "greedy":  # the seed belongs to the process, so other threads draw otherwise
        assert told == aim.processor.tokenizer.decode(new)


def test_a_streamer_of_text_takes_one_row_as_in_transformers(aim: Plugin, inputs: Any, form: Any) -> None:
    for call in (aim.backbone.generate, lambda **given: aim.model.generate(**given, **form)):
        with pytest.raises(ValueError, match="batch size 1"):
            call(**inputs, max_new_tokens=2, streamer=TextStreamer(aim.processor.tokenizer))


# --- generate inside generate


class Nested:
    """Does the next of some calls, and keeps the result, each time that it is called itself."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = calls
        self.results: list[Any] = []

    def __call__(self) -> None:
        if len(self.results) < len(self.calls):
            self.results.append(self.calls[len(self.results)]())


def inside(where: str, nested: Nested, words: int) -> dict[str, Any]:
    """Arguments of `generate` by which `nested` is called within it."""

    def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nested()
        return scores

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            nested()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        nested()
        return list(range(words))

    return {
        "logits processor": {"logits_processor": [processor]},
        "stopping criterion": {"stopping_criteria": [Criterion()]},
        "allowed tokens": {"prefix_allowed_tokens_fn": allowed},
        "streamer": {"streamer": Collected(nested)},
    }[where]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["logits processor", "stopping criterion", "allowed tokens", "streamer"])
def test_generate_inside_generate_changes_neither(aim: Plugin, form: Any, where: str, mode: str) -> None:
    if (where, mode) == ("streamer", "beams"):
        return  # transformers has no streamer for beams
    processor = aim.processor
    other = dict(processor(images=[[picture(20, (200, 120))]], text=[processor.prompt("?")], return_tensors="pt"))
    query, given = aim.query(), {**form, "demos": form["demos"][:1]} if isinstance(form.get("demos"), list) else form
    fused, words = aim.model.read(DEMOS[2:]), aim.backbone.get_output_embeddings().weight.shape[0]
    options = {"max_new_tokens": 6, "eos_token_id": 10**6, "return_dict_in_generate": True, "output_logits": True}
    options |= {**MODES[mode], "num_return_sequences": 1, **({"top_k": 1} if mode == "sampled" else {})}
    calls: tuple[Callable[[], Any], ...] = (
        lambda: aim.answer(other, None, max_new_tokens=2),
        lambda: aim.answer(other, fused, max_new_tokens=2, num_beams=2),
        lambda: aim.answer(other, DEMOS[3:], max_new_tokens=2),
        lambda: aim.answer(other, aim.model.prefill(DEMOS[:1]), max_new_tokens=2),
        lambda: aim.model(**other, demos=fused).logits.detach(),
        lambda: aim.model.read([DEMOS[4]]).vectors,
    )
    outer = aim.model.generate(**query, **given, **options)
    alone, nested = [call() for call in calls], Nested(calls)
    found = aim.model.generate(**query, **given, **options, **inside(where, nested, words))
    assert torch.equal(found.sequences, outer.sequences)
    assert all(torch.equal(*pair) for pair in zip(found.logits, outer.logits, strict=True))
    assert all(torch.equal(*pair) for pair in zip(nested.results, alone, strict=True))


def test_generate_four_deep() -> None:
    aim = plugin("llava")
    queries = [aim.query(f"What is number {number}?", image=20 + number) for number in range(4)]
    forms = (DEMOS[:1], None, aim.model.prefill(DEMOS[:3]), aim.model.read(DEMOS[2:]))
    alone = [aim.answer(query, demos, max_new_tokens=2) for query, demos in zip(queries, forms, strict=True)]
    found: dict[int, list[torch.Tensor]] = {}

    def answer(depth: int) -> None:
        nested = [] if depth == 3 else [lambda ids, scores: (answer(depth + 1), scores)[1]]
        told = aim.answer(queries[depth], forms[depth], max_new_tokens=2, logits_processor=nested)
        found.setdefault(depth, []).append(told)

    answer(0)
    assert {depth: len(answers) for depth, answers in found.items()} == {0: 1, 1: 2, 2: 4, 3: 8}
    assert all(torch.equal(told, alone[depth]) for depth, answers in found.items() for told in answers)


@pytest.mark.parametrize("options", [{"no_repeat_ngram_size": 1}, {"repetition_penalty": 9.0}], ids=str)
def test_a_processor_of_transformers_sees_no_demonstration_of_another_row(options: dict[str, Any]) -> None:
    aim = plugin("llava")
    demos = [{"text": "( a dog and a cat sit here."}]
    both = aim.query("What is this?", "And that, what?")
    alone = {name: value[1:] for name, value in both.items()}
    answers = aim.answer(both, [demos, None], max_new_tokens=24, **options)
    assert torch.equal(answers[1], aim.answer(alone, None, max_new_tokens=24, **options)[0])
