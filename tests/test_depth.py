"""States that enter at the depth where they were read: on every family, in every way to generate, without training."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEMOS, FAMILIES, MORE_FAMILIES, Plugin, build, picture, plugin
from safetensors.torch import load_file, save_file
from transformers import set_seed

from modeling_aim import AimForConditionalGeneration, Demonstration, FusedDemonstrations
from modeling_aim.backbone_aim import decoder_layers
from modeling_aim.projector_aim import PROJECTOR_WEIGHTS

DEPTHS = ([0], [1], [2], [1, 2], [0, 1])
WORDS_ALONE = [{"text": "A sentence without any image."}, {"text": "And one more."}]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "samples returned": {"do_sample": True, "num_return_sequences": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 7},
}


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE_FAMILIES])
def untrained(request: pytest.FixtureRequest) -> Plugin:
    """A plug-in of every family, without weights; nobody changes it."""
    return plugin(request.param, preset="untrained")


def start_of(aim: Plugin, inputs: dict[str, Any]) -> int:
    """Where fused tokens stand in a prompt: behind BOS."""
    return int(inputs["input_ids"][0, 0] == aim.processor.tokenizer.bos_token_id)


def with_words(aim: Plugin, inputs: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    """The inputs of one query with words in front of it, put together without the package."""
    start, length = start_of(aim, inputs), inputs["input_ids"].shape[1]
    wide = dict(inputs)
    for name, value in inputs.items():
        if value.ndim >= 2 and value.shape[:2] == (1, length):
            filler = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.get(name, torch.zeros_like(ids))
            more = filler.reshape(1, -1, *[1] * (value.ndim - 2)).expand(1, len(ids), *value.shape[2:]).to(value)
            wide[name] = torch.cat([value[:, :start], more, value[:, start:]], dim=1)
    return wide


@contextmanager
def replaced_by_hand(backbone: Any, depth: int, start: int, width: int, states: torch.Tensor) -> Iterator[None]:
    """Let the backbone's layer `depth` get `states` in its input, from `start` on, where a pass is a whole prompt."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] < width:
            return None
        hidden = hidden.clone()
        hidden[:, start : start + len(states)] = states
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = decoder_layers(backbone)[depth].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("depths", DEPTHS, ids=str)
def test_words_put_back_at_depth_are_the_plain_text_prompt(untrained: Plugin, depths: list[int]) -> None:
    """Nothing is lost or moved: a demonstration without an image, read alone, is read again at its own places."""
    model = AimForConditionalGeneration.from_backbone(untrained.backbone, untrained.processor, read_layers=depths)
    inputs, fused = untrained.query(), model.read(WORDS_ALONE[:1])
    with torch.no_grad():
        found = model(**inputs, demos=fused).logits[:, -1]
        wanted = untrained.backbone(**with_words(untrained, inputs, fused.ids)).logits[:, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_the_answer_is_that_of_states_replaced_by_hand(untrained: Plugin) -> None:
    inputs, fused = untrained.query(), untrained.model.read(DEMOS)
    wide, [depth] = with_words(untrained, inputs, fused.ids), untrained.model.config.entry_layers
    start, width = start_of(untrained, inputs), wide["input_ids"].shape[1]
    plain = untrained.backbone(**wide).logits[:, -1]
    with torch.no_grad(), replaced_by_hand(untrained.backbone, depth, start, width, fused.vectors):
        wanted = untrained.backbone(**wide).logits[:, -1]
    with torch.no_grad():
        found = untrained.model(**inputs, demos=fused).logits[:, -1]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3  # the images have changed something


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_generate_answers_as_by_hand(family: str, mode: str) -> None:
    aim = plugin(family, preset="untrained", read_layers=[2])
    inputs, fused = aim.query(), aim.model.read(DEMOS)
    wide, start = with_words(aim, inputs, fused.ids), start_of(aim, inputs)
    options = {"max_new_tokens": 6, "do_sample": False, **MODES[mode]}
    own = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
    backbone = copy.deepcopy(aim.backbone)  # its hooks do nothing: the copy is not the backbone that answers
    set_seed(0)
    with replaced_by_hand(backbone, 2, start, wide["input_ids"].shape[1], fused.vectors):
        wanted = backbone.generate(**wide, **own)[:, wide["input_ids"].shape[1] :]
    set_seed(0)
    assert torch.equal(aim.answer(inputs, fused, **options), wanted)


def test_prompt_lookup_and_assisted_decoding_answer_as_greedy_decoding(aim: Plugin) -> None:
    inputs, fused = aim.query(image=None), aim.model.read(DEMOS)
    greedy = aim.answer(inputs, fused)
    assert torch.equal(aim.answer(inputs, fused, prompt_lookup_num_tokens=2), greedy)
    if aim.family == "llava":  # the assistant has the same tokenizer
        assistant = build("llava", seed=3).model
        assert torch.equal(aim.answer(inputs, fused, assistant_model=assistant), greedy)


def test_identity_adds_no_parameter_and_its_repository_no_weights_file(untrained: Plugin, tmp_path: Path) -> None:
    model = untrained.model
    assert not list(model.projector.parameters())
    own = sum(weight.numel() for weight in untrained.backbone.parameters())
    assert sum(weight.numel() for weight in model.parameters()) == own
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    again = AimForConditionalGeneration.from_pretrained(tmp_path, backbone=untrained.backbone)
    inputs = untrained.query()
    assert torch.equal(Plugin(untrained.family, again).answer(inputs, DEMOS), untrained.answer(inputs, DEMOS))


@pytest.mark.parametrize("form", ["residual", "residual_mlp"])
@pytest.mark.parametrize("depths", [[1], [1, 2], [0, 2]], ids=str)
def test_a_residual_form_begins_as_the_identity(form: str, depths: list[int]) -> None:
    backbone = build("llava")
    models = [
        AimForConditionalGeneration.from_backbone(
            backbone.model, backbone.processor, projector_form=f, read_layers=depths
        )
        for f in ("identity", form)
    ]
    fused = [model.read(DEMOS) for model in models]
    assert torch.equal(fused[0].vectors, fused[1].vectors) and torch.equal(fused[0].ids, fused[1].ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_stops_at_the_depth_where_states_enter(family: str) -> None:
    aim = plugin(family, read_layers=[2])
    needs: list[bool] = []
    layers = decoder_layers(aim.backbone)
    handles = [
        layer.register_forward_hook(
            lambda module, args, output: needs.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
        for layer in layers
    ]
    inputs = aim.query()
    aim.model(**inputs, labels=inputs["input_ids"], demos=DEMOS).loss.backward()
    for handle in handles:
        handle.remove()
    assert needs[-len(layers) :] == [False, False, True]
    assert all(bool(weight.grad.any()) for weight in aim.model.projector.parameters())


def test_the_last_word_of_what_was_averaged_stands_under_it() -> None:
    aim = plugin("llava", preset="untrained", max_fused_tokens=3)
    demo = Demonstration.of({"text": "one two three four five six seven"})
    [whole] = aim.processor.kept_ids([demo])
    [ids] = aim.model.text_token_ids([demo])
    assert len(ids) == 3 and ids[-1] == whole[-1] and len(aim.model.read([demo]).vectors) == 3
    aim.answer(aim.query(), DEMOS)


def test_words_of_other_demonstrations_are_refused_by_fused_values() -> None:
    with pytest.raises(ValueError, match="token ids of fused tokens"):
        FusedDemonstrations(torch.zeros(3, 4), (3,), torch.zeros(2, dtype=torch.long))


def test_prompt_embeds_are_refused_at_depth_with_the_way_out(llava: Plugin) -> None:
    with pytest.raises(ValueError, match=r"reach its input alone.*aim train --entry-layers 0"):
        llava.model.prompt_embeds(llava.query(), DEMOS)


def test_what_was_read_at_another_depth_is_refused() -> None:
    one, two = (plugin("llava", preset="untrained", read_layers=[depth]) for depth in (1, 2))
    for given in (one.model.read(DEMOS), one.model.prefill(DEMOS)):
        with pytest.raises(ValueError, match=r"another model: read layers \[1\].*\[2\].*model.read"):
            two.answer(two.query(), given)


def test_weights_for_the_input_are_refused_at_depth_and_the_reverse(tmp_path: Path) -> None:
    """Their shapes are the same, so it is the file that says what they are for."""
    for entry, other in (([0], [1]), ([1], [0])):
        aim = plugin("llava", projector_form="residual_mlp", read_layers=[1], entry_layers=entry)
        aim.model.save_pretrained(tmp_path, include_backbone=True)
        with pytest.raises(ValueError, match=rf"entry_layers=\[{entry[0]}\] \(here: \[{other[0]}\]\)"):
            AimForConditionalGeneration.from_pretrained(tmp_path, entry_layers=other)
    weights, config = load_file(tmp_path / PROJECTOR_WEIGHTS), tmp_path / "config.json"
    save_file(weights, tmp_path / PROJECTOR_WEIGHTS, metadata={"format": "pt"})  # an older folder says nothing
    stored = json.loads(config.read_text())
    del stored["projector_sha256"]
    config.write_text(json.dumps(stored))
    AimForConditionalGeneration.from_pretrained(tmp_path)


def test_a_backbone_without_a_stack_of_layers_keeps_to_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = build("llava")
    backbone.model.config.text_config.num_hidden_layers = 7  # it has three
    with pytest.raises(ValueError, match=r"no stack of 7 decoder layers.*preset='paper'"):
        AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor)
    model = AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor, preset="paper")
    aim = Plugin("llava", model)
    assert aim.answer(aim.query(), DEMOS).shape[1]


def test_reentrant_checkpointing_is_refused_where_states_enter_inside_a_layer() -> None:
    aim = plugin("llava")
    with pytest.raises(ValueError, match="use_reentrant=True"):
        aim.model.gradient_checkpointing_enable({"use_reentrant": True})


def test_too_many_raw_demonstrations_are_counted_before_any_is_read(
    llava: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(llava.model, "read_states", lambda demos, *more: read.append(len(demos)))
    with pytest.raises(ValueError, match=r"together \d{5}.*positions.*demos\[:\d+\]"):
        llava.model.generate(**llava.query(), demos=[(picture(0), "this is a long name for a thing")] * 2000)
    assert not read
