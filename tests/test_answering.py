"""Answers: the backbone's own without demonstrations, and with them what fused tokens by hand in its prompt give."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbones import DEMOS, FAMILIES, MORE_FAMILIES, Plugin, picture, plugin
from transformers import GenerationConfig, TextStreamer, set_seed
from transformers.generation.streamers import BaseStreamer

from modeling_aim import Demonstration, DemonstrationBank, FusedDemonstrations
from modeling_aim.state_aim import continues_after_kv

NOTHING = (None, [], (), [[], None])
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "samples returned": {"do_sample": True, "num_return_sequences": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE_FAMILIES])
def any_aim(request: pytest.FixtureRequest) -> Plugin:
    """A plug-in of every family there is, with fused tokens at the input; nobody changes it."""
    return plugin(request.param, preset="paper")


def after_bos(aim: Plugin, ids: torch.Tensor, values: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """`values` of one query's positions, with `more` of them where fused tokens go."""
    start = int(ids[0, 0] == aim.processor.tokenizer.bos_token_id)
    return torch.cat([values[:, :start], more.to(values), values[:, start:]], dim=1)


def in_one(parts: Any) -> torch.Tensor:
    """Features of several images, one after the other."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def prompt_by_hand(aim: Plugin, inputs: dict[str, Any], fused: FusedDemonstrations) -> dict[str, Any]:
    """What the text decoder gets for one query with fused tokens after BOS, put together without the package."""
    model, ids, count = aim.backbone, inputs["input_ids"], fused.num_tokens
    embeddings = model.get_input_embeddings()(ids)
    more: dict[str, Any] = {}
    if "image_attention_mask" in inputs:  # images come by cross-attention, and a fused token looks at none
        mask = inputs["image_attention_mask"]
        more["image_attention_mask"] = after_bos(aim, ids, mask, torch.zeros(1, count, mask.shape[2]))
        more["pixel_values"] = inputs["pixel_values"]
    elif "pixel_values" in inputs:
        images = ids == model.config.image_token_id
        names = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "batch_num_images")
        found = model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
        embeddings[images] = in_one(found.pooler_output)
        if getattr(found, "deepstack_features", None):  # they are added behind the first layers too
            more["visual_pos_masks"] = after_bos(aim, ids, images, torch.zeros(1, count))
            more["deepstack_visual_embeds"] = [in_one(features) for features in found.deepstack_features]
    if hasattr(model.base_model, "get_rope_index"):  # positions in the picture; a fused token is any word
        words = after_bos(aim, ids, ids, torch.full((1, count), aim.processor.tokenizer.convert_tokens_to_ids("a")))
        kinds, grid = (words == model.config.image_token_id).int(), inputs.get("image_grid_thw")
        more["position_ids"] = model.base_model.get_rope_index(words, image_grid_thw=grid, mm_token_type_ids=kinds)[0]
    whole = after_bos(aim, ids, embeddings, fused.vectors[None])
    return {"inputs_embeds": whole, "attention_mask": torch.ones(whole.shape[:2], dtype=torch.long), **more}


@torch.no_grad()
def two_answers(aim: Plugin, **options: Any) -> list[torch.Tensor]:
    """The answer from fused tokens, and that of a copy of the backbone to which they are words of the prompt.

    Letters that the query does not use give their embeddings to fused tokens; so neither model may draw them.
    """
    inputs, fused, backbone = aim.query(), aim.model.read(DEMOS), copy.deepcopy(aim.backbone)
    ids, count = inputs["input_ids"], fused.num_tokens
    free = [word for word in range(3, aim.processor.tokenizer.vocab_size) if word not in ids]
    words = torch.tensor(free[:count])
    assert len(words) == count
    backbone.get_input_embeddings().weight[words] = fused.vectors
    filled = {
        "input_ids": words[None],
        "attention_mask": torch.ones(1, count),
        "mm_token_type_ids": torch.zeros(1, count),
        "image_attention_mask": torch.zeros(1, count, 1),
    }
    wide = {name: after_bos(aim, ids, inputs[name], more) for name, more in filled.items() if name in inputs}
    never = [*(aim.backbone.generation_config.suppress_tokens or []), *words.tolist()]
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": never, **options}
    set_seed(0)
    wanted = backbone.generate(**{**inputs, **wide}, **options)[:, ids.shape[1] + count :]
    set_seed(0)
    return [aim.answer(inputs, fused, **options), wanted]


@pytest.mark.parametrize("nothing", [*NOTHING, "empty", "bank"], ids=str)
def test_without_demonstrations_everything_is_the_backbones_own(aim: Plugin, nothing: Any) -> None:
    empty = aim.model.read([])
    demos = {"empty": empty, "bank": DemonstrationBank(empty)}.get(nothing) if isinstance(nothing, str) else nothing
    inputs = aim.query("What is this?", "And that one?")
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = aim.model.generate(**inputs, demos=demos, **options), aim.backbone.generate(**inputs, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
    with torch.no_grad():
        assert torch.equal(aim.model(**inputs, demos=demos).logits, aim.backbone(**inputs).logits)
        labels = inputs["input_ids"]
        assert aim.model(**inputs, demos=demos, labels=labels).loss == aim.backbone(**inputs, labels=labels).loss


def test_raw_read_bank_slice_and_rows_are_the_same_demonstrations(aim: Plugin) -> None:
    inputs = aim.query("What is this?", "And that one?")
    read = aim.model.read([*DEMOS, (picture(7), "another one")])
    again = [Demonstration.of(demo) for demo in DEMOS]
    bank = DemonstrationBank(read)
    five = bank[:5]
    rows = [[list(DEMOS), again], [five, list(DEMOS)], [five, DemonstrationBank(five)]]
    with torch.no_grad():
        wanted = aim.model(**inputs, demos=list(DEMOS)).logits
        without = aim.model(**inputs).logits
        for demos in (DEMOS, again, five, read[:5], read[range(5)], DemonstrationBank(five), *rows):
            torch.testing.assert_close(aim.model(**inputs, demos=demos).logits, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted[:, -1] - without[:, -1]).abs().max() > 0.01
    answers = [aim.answer(inputs, demos) for demos in (DEMOS, again, five, *rows)]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_what_a_demonstration_shows_reaches_the_answer(aim: Plugin) -> None:
    inputs = aim.query()
    with torch.no_grad():
        seen = [aim.model(**inputs, demos=[(picture(seed), "dax")]).logits[0, -1] for seed in (0, 1)]
    assert (seen[0] - seen[1]).abs().max() > 1e-3


@pytest.mark.parametrize("image", [9, None], ids=["with image", "without image"])
def test_the_prompt_equals_one_put_together_by_hand(any_aim: Plugin, image: int | None) -> None:
    aim = any_aim
    inputs, fused = aim.query(image=image), aim.model.read(DEMOS)
    with torch.no_grad():
        states = aim.backbone.get_decoder()(**prompt_by_hand(aim, inputs, fused), use_cache=False).last_hidden_state
        wanted = aim.backbone.get_output_embeddings()(states)
        found = aim.model(**inputs, demos=fused).logits
    own = torch.ones(wanted.shape[1], dtype=torch.bool)
    start = int(inputs["input_ids"][0, 0] == aim.processor.tokenizer.bos_token_id)
    own[start : start + fused.num_tokens] = False
    assert found.shape[1] == inputs["input_ids"].shape[1]
    torch.testing.assert_close(found, wanted[:, own], rtol=1e-4, atol=1e-4)


def test_every_family_answers_as_if_fused_tokens_were_words(any_aim: Plugin) -> None:
    assert torch.equal(*two_answers(any_aim))


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_generate_answers_as_if_fused_tokens_were_words(aim_at_input: Plugin, mode: str) -> None:
    assert torch.equal(*two_answers(aim_at_input, **MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_generate_takes_demonstrations_raw_and_read(aim: Plugin, mode: str) -> None:
    inputs, fused = aim.query("What is this?", "And that one?"), aim.model.read(DEMOS)
    answers = []
    for demos in (DEMOS, fused):
        set_seed(0)
        answers.append(aim.answer(inputs, demos, **MODES[mode]))
    assert torch.equal(*answers)
    if not MODES[mode].get("do_sample"):
        repeats = MODES[mode].get("num_return_sequences", 1)
        options = {**MODES[mode], "use_cache": True} if mode == "no cache" else MODES[mode]
        for row, question in enumerate(("What is this?", "And that one?")):
            alone = aim.answer(aim.query(question, image=9 + row), fused, **options)
            assert torch.equal(answers[0][row * repeats : (row + 1) * repeats, : alone.shape[1]], alone)


def test_a_row_of_a_padded_batch_is_the_batch_of_one(aim: Plugin) -> None:
    questions = ("What is this?", "A much longer question: which of them is this one?", "And?", "Name it.")
    inputs = aim.query(*questions)
    rows = [list(DEMOS), aim.model.read(DEMOS[:2]), None, [DEMOS[3]]]
    answers = aim.answer(inputs, rows)
    with torch.no_grad():
        logits = aim.model(**inputs, demos=rows).logits
        for row, (question, demos) in enumerate(zip(questions, rows, strict=True)):
            alone = aim.query(question, image=9 + row)
            wanted = aim.model(**alone, demos=demos).logits[0]
            torch.testing.assert_close(logits[row, -len(wanted) :], wanted, rtol=1e-3, atol=1e-3)
            assert torch.equal(answers[row], aim.answer(alone, demos)[0])


def test_right_padding_is_as_good_for_forward(aim: Plugin) -> None:
    rows, questions = [list(DEMOS), None], ("And?", "What is this one?")
    left = aim.query(*questions)
    right = {name: value.clone() for name, value in left.items()}
    pad = int((left["attention_mask"][0] == 0).sum())
    assert pad
    for value in right.values():
        if value.shape[:2] == left["input_ids"].shape:
            value[0] = value[0].roll(-pad, 0)
    with torch.no_grad():
        wanted, found = (aim.model(**inputs, demos=rows).logits for inputs in (left, right))
    torch.testing.assert_close(found[0, :-pad], wanted[0, pad:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-3)


def test_images_of_any_number_and_size_in_one_call(aim: Plugin) -> None:
    read_alone = [aim.model.read([demo]) for demo in DEMOS]
    joined = read_alone[0]
    for one in read_alone[1:]:
        joined = joined + one
    inputs = aim.query()
    assert torch.equal(aim.answer(inputs, DEMOS), aim.answer(inputs, joined))


class Collected(BaseStreamer):
    """What a streamer is shown."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_the_querys_prompt_and_every_new_token(aim: Plugin, capsys: pytest.CaptureFixture) -> None:
    inputs, seen = aim.query(), Collected()
    answer = aim.answer(inputs, DEMOS, streamer=seen)
    assert torch.equal(seen.values[0], inputs["input_ids"])
    assert torch.equal(torch.cat([value.reshape(-1) for value in seen.values[1:]]), answer[0])
    assert seen.ended
    aim.answer(inputs, DEMOS, streamer=TextStreamer(aim.processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == aim.processor.decode(answer[0]).strip()


def test_stop_strings_end_the_answer(aim: Plugin) -> None:
    inputs = aim.query()
    letters = aim.processor.tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    only_letters = {"suppress_tokens": [i for i in range(len(aim.processor.tokenizer) + 2) if i not in letters]}
    free = aim.answer(inputs, DEMOS, **only_letters)[0]
    new = next(i for i in range(1, len(free)) if free[i] not in free[:i])
    stop = {"stop_strings": [aim.processor.decode(free[new])], "tokenizer": aim.processor.tokenizer}
    assert torch.equal(aim.answer(inputs, DEMOS, **stop, **only_letters)[0], free[: new + 1])


def test_a_repetition_penalty_counts_the_query_and_the_words_of_demonstrations(aim: Plugin) -> None:
    inputs, fused = aim.query(), aim.model.read(DEMOS)
    found = aim.answer(inputs, fused, repetition_penalty=3.0)
    for token in found[0]:
        with torch.no_grad():
            scores = aim.model(**inputs, demos=fused).logits[0, -1]
        seen = torch.cat([inputs["input_ids"][0], fused.ids]).unique()
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 3, scores[seen] / 3)
        assert scores.argmax() == token
        for name in inputs.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}:  # one text token more
            more = token.reshape(1, 1) if name == "input_ids" else inputs[name][:, -1:]
            inputs[name] = torch.cat([inputs[name], more], dim=1)


@pytest.mark.parametrize("given", [None, 0, 2], ids=["none", "zero", "two"])
def test_the_models_own_least_length_counts_the_callers_tokens(given: int | None) -> None:
    aim = plugin("llava")
    inputs = aim.query()
    length = inputs["input_ids"].shape[1]
    first = int(aim.answer(inputs, DEMOS)[0, 0])
    aim.model.generation_config.min_length = length + 3
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=first, max_length=length + 5)
    config.min_length = given and length + given
    answer = aim.model.generate(**inputs, demos=DEMOS, generation_config=config)
    least = 3 if given is None else given
    assert least <= answer.shape[1] - length <= 5
    assert given != 0 or answer.shape[1] == length + 1


@pytest.mark.parametrize("place", ["argument", "generation_config"])
def test_length_limits_count_the_callers_tokens_only(aim: Plugin, place: str) -> None:
    inputs = aim.query()
    length = inputs["input_ids"].shape[1]

    def count(**limits: Any) -> int:
        if place == "generation_config":
            limits = {"generation_config": GenerationConfig(do_sample=False, pad_token_id=0, **limits)}
        return aim.model.generate(**inputs, demos=DEMOS, **limits).shape[1] - length

    first = int(aim.answer(inputs, DEMOS)[0, 0])
    never, at_once = {"eos_token_id": 10**6}, {"eos_token_id": first}
    assert count(max_length=length + 4, **never) == 4
    assert count(max_new_tokens=3, **never) == 3
    assert count(max_length=length + 9, **at_once) == 1
    assert count(max_length=length + 9, min_length=length + 3, **at_once) >= 3
    assert count(max_new_tokens=9, min_new_tokens=3, **at_once) >= 3
    assert count(max_new_tokens=9, min_length=length + 3, **at_once) >= 3
    assert count(max_new_tokens=2, max_length=length + 5, **never) == 2


def test_the_default_length_is_the_backbones(aim: Plugin) -> None:
    inputs, options = aim.query(), {"eos_token_id": 10**6, "do_sample": False}
    wanted = aim.backbone.generate(**inputs, **options).shape
    assert aim.model.generate(**inputs, demos=DEMOS, **options).shape == wanted


def test_a_length_limit_in_the_models_own_settings_counts_the_callers_tokens() -> None:
    aim = plugin("llava")
    inputs = aim.query()
    length = inputs["input_ids"].shape[1]
    aim.model.generation_config.max_length = length + 4
    aim.model.generation_config.eos_token_id = None
    assert aim.model.generate(**inputs, demos=DEMOS).shape[1] == length + 4
    assert aim.model.generate(**inputs).shape[1] == length + 4


def test_a_dictionary_holds_the_callers_tokens_and_scores(aim: Plugin) -> None:
    inputs = aim.query("What is this?", "And that one?")
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": False}
    output = aim.model.generate(**inputs, demos=DEMOS, max_new_tokens=4, **options)
    plain = aim.model.generate(**inputs, demos=DEMOS, max_new_tokens=4, do_sample=False)
    assert torch.equal(output.sequences, plain)
    assert len(output.scores) == len(output.logits) == plain.shape[1] - inputs["input_ids"].shape[1]
    new = plain[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(torch.stack([logits.argmax(-1) for logits in output.logits], dim=1)[0], new[0])
    scores = aim.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    assert scores.shape == new.shape


def test_one_pass_answers_as_the_backbones_own_classes_do(aim: Plugin) -> None:
    inputs = aim.query("What is this?", "And that one?")
    labels, fused = inputs["input_ids"], aim.model.read(DEMOS)
    with torch.no_grad():
        output = aim.model(**inputs, demos=fused, labels=labels, output_hidden_states=True)
        plain = aim.model(**inputs, demos=fused, labels=labels, output_hidden_states=True, return_dict=False)
        some = aim.model(**inputs, demos=fused, output_hidden_states=[0, 2])
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], output.loss) and torch.equal(plain[1], output.logits)
    shape = (*labels.shape, aim.model.config.hidden_size)
    assert all(states.shape == shape for states in output.hidden_states)
    chosen = [number for number, states in enumerate(some.hidden_states) if states is not None]
    whole = list(range(len(output.hidden_states)))  # what transformers before 5.23 takes a list for
    assert chosen in ([0, 2], whole) and all(
        torch.equal(some.hidden_states[i], output.hidden_states[i]) for i in chosen
    )


def test_kv_with_fused_tokens_goes_on_in_their_places_or_not_at_all(aim: Plugin) -> None:
    inputs = aim.query()
    ids, mask, wanted = inputs["input_ids"], inputs["attention_mask"], aim.answer(inputs, DEMOS)[0]
    with torch.no_grad():
        output = aim.model(**inputs, demos=DEMOS, use_cache=True)
        told = [int(output.logits[0, -1].argmax())]
        for _ in range(len(wanted) - 1):  # a loop of the caller's own; the cache knows the places
            following = aim.model(input_ids=torch.tensor([told[-1:]]), past_key_values=output.past_key_values)
            told.append(int(following.logits[0, -1].argmax()))
    assert told == wanted.tolist() or not continues_after_kv(aim.backbone)
    longer = {"input_ids": torch.cat([ids, wanted[None]], dim=1), "past_key_values": output.past_key_values}
    with pytest.raises(ValueError, match=r"fused tokens.*prefill"):
        aim.model.generate(**longer, max_new_tokens=1)
    grown = torch.cat([mask, mask[:, :1]], dim=1)
    with pytest.raises(ValueError, match=f"attention_mask has {grown.shape[1]} columns"):
        aim.model(input_ids=wanted[None, -1:], attention_mask=grown, past_key_values=output.past_key_values)
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    answered = aim.model.generate(**inputs, demos=aim.model.prefill(DEMOS), **options)
    with pytest.raises(ValueError, match="fused tokens"):
        aim.model.generate(answered.sequences, past_key_values=answered.past_key_values)


def test_prompt_lookup_gives_the_greedy_answer(aim: Plugin) -> None:
    inputs = aim.query(image=None)  # with one, the backbones' own prompt lookup may propose image tokens and fails
    greedy = aim.answer(inputs, DEMOS, max_new_tokens=12)
    assert torch.equal(aim.answer(inputs, DEMOS, max_new_tokens=12, prompt_lookup_num_tokens=3), greedy)


def test_ids_may_be_given_by_position_and_without_mask(aim: Plugin) -> None:
    inputs = aim.query(image=None)
    wanted = aim.answer(inputs, DEMOS)
    ids = inputs["input_ids"]
    output = aim.model.generate(ids, demos=DEMOS, max_new_tokens=6, do_sample=False)
    assert torch.equal(output, torch.cat([ids, wanted], dim=1))


@pytest.fixture
def hasty() -> Any:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(*tasks: Callable[[], Any], times: int = 6) -> list[list[Any]]:
    """What each task returns each time, all running at once."""
    results: list[list[Any]] = [[] for _ in tasks]
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(tasks))

    def work(task: Callable[[], Any], found: list[Any]) -> None:
        try:
            for _ in range(times):
                barrier.wait(60)
                found.append(task())
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(tasks, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.mark.usefixtures("hasty")
def test_two_threads_get_the_answers_they_get_alone(aim: Plugin) -> None:
    first, second = aim.query("What is this?", "And that?"), aim.query("Which of all of them is this?", image=20)
    tasks: tuple[Callable[[], Any], ...] = (
        lambda: aim.answer(first, DEMOS[:2]),
        lambda: aim.answer(second, [(picture(30), "something else altogether")]),
        lambda: aim.answer(second),
    )
    alone = [task() for task in tasks]
    assert not torch.equal(alone[1], alone[2])
    for wanted, found in zip(alone, together(*tasks), strict=True):
        assert all(torch.equal(answer, wanted) for answer in found)


@pytest.mark.usefixtures("hasty")
def test_a_thread_that_reads_disturbs_none_that_answers(aim: Plugin) -> None:
    early = plugin(aim.family, read_layers=[1])
    inputs, fused = early.query(), early.model.read(DEMOS[:2])
    tasks: tuple[Callable[[], Any], ...] = (
        lambda: early.model.read(DEMOS).vectors,
        lambda: early.answer(inputs, fused),
        lambda: early.answer(early.query(image=None)),
    )
    alone = [task() for task in tasks]
    for wanted, found in zip(alone, together(*tasks), strict=True):
        assert all(torch.equal(answer, wanted) for answer in found)
