"""What is kept between calls: hidden states of raw demonstrations and the KV of prefixes, bounded and never stale."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from backbones import DEMOS, Plugin, picture, plugin
from test_reading import calls
from transformers import DynamicCache

from modeling_aim import DemonstrationBank
from modeling_aim.cache_aim import LRUCache
from modeling_aim.state_aim import continues_after_kv

NEW = {"max_new_tokens": 6, "do_sample": False}


def passes(aim: Plugin, action: Any) -> int:
    """Positions that go through the first decoder layer during `action`."""
    with calls(first_layer(aim)) as seen:
        action()
    return sum(args[0].shape[0] * args[0].shape[1] for args in seen)


def first_layer(aim: Plugin) -> Any:
    from modeling_aim.backbone_aim import decoder_layers

    return decoder_layers(aim.backbone)[0]


# --- raw demonstrations given again


def test_raw_demonstrations_are_read_once_in_any_order(aim: Plugin) -> None:
    fresh = plugin(aim.family)
    inputs = fresh.query()
    wanted = {order: aim.answer(inputs, [DEMOS[i] for i in order]) for order in ((0, 1, 4), (4, 0), (1, 4, 0))}
    aim.model.read_cache.clear()
    fresh.answer(inputs, [DEMOS[i] for i in (0, 1, 4)])
    assert len(fresh.model.read_cache) == 3 and fresh.model.read_cache.nbytes > 0
    embedded = fresh.backbone.get_input_embeddings()
    for order, answer in wanted.items():
        with calls(embedded) as seen:
            assert torch.equal(fresh.answer(inputs, [DEMOS[i] for i in order]), answer)
        assert len(seen) == 6, "something was read again"  # the prompt and five steps
    with calls(embedded) as seen:
        fresh.answer(fresh.query("a", "b"), [[DEMOS[4]], [DEMOS[0], DEMOS[2]]])
    assert len(seen) == 6 + 1  # one new demonstration


def test_the_cache_of_reads_is_bounded_and_can_be_turned_off() -> None:
    aim = plugin("llava")
    inputs = aim.query()
    one = aim.model.read_states([aim_demo(DEMOS[0])])[0]
    aim.model.read_cache.max_bytes = 2 * one.numel() * one.element_size() + 1
    for seed in range(5):
        aim.answer(inputs, [(picture(seed), "dax")])
        assert aim.model.read_cache.nbytes <= aim.model.read_cache.max_bytes
    assert len(aim.model.read_cache) == 2
    aim.model.read_cache.max_bytes = 0
    aim.answer(inputs, DEMOS)
    assert len(aim.model.read_cache) == 0
    with calls(aim.backbone.get_input_embeddings()) as seen:
        aim.answer(inputs, DEMOS[:2])
        aim.answer(inputs, DEMOS[:2])
    assert len(seen) == 2 * 7


def aim_demo(demo: Any) -> Any:
    from modeling_aim import Demonstration

    return Demonstration.of(demo)


def test_nothing_stale_is_used() -> None:
    """Another projector, wording, or backbone's weights: what was kept is not what is meant any more."""
    aim = plugin("llava")
    inputs = aim.query()
    first = aim.model.generate(**inputs, demos=DEMOS, **NEW, output_logits=True, return_dict_in_generate=True)

    def changes() -> bool:
        again = aim.model.generate(**inputs, demos=DEMOS, **NEW, output_logits=True, return_dict_in_generate=True)
        cached = aim.model.read_cache
        aim.model.read_cache = LRUCache(0)
        wanted = aim.model.generate(**inputs, demos=DEMOS, **NEW, output_logits=True, return_dict_in_generate=True)
        aim.model.read_cache = cached
        torch.testing.assert_close(again.logits[0], wanted.logits[0], rtol=1e-4, atol=1e-4)
        return not torch.allclose(again.logits[0], first.logits[0], atol=1e-4)

    assert not changes()
    with torch.no_grad():
        aim.model.projector.layers[0].weight.mul_(-1)
    assert changes()
    with torch.no_grad():
        aim.model.projector.layers[0].weight.mul_(-1)
    assert not changes()
    aim.processor.label_template = "Behold the one and only {label}!"
    assert changes()
    aim.processor.label_template = "This is {label}."
    with torch.no_grad():
        first_layer(aim).self_attn.v_proj.weight.mul_(-1)
    assert changes()


def test_a_switched_adapter_is_another_backbone() -> None:
    from peft import LoraConfig

    aim = plugin("llava")
    inputs, demos, backbone = aim.query(), list(DEMOS), aim.backbone
    backbone.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False), "a")
    layer = first_layer(aim).self_attn.q_proj
    for switch in (lambda: None, backbone.disable_adapters, backbone.enable_adapters, lambda: layer.scale_layer(3.0)):
        switch()
        kept = aim.model(**inputs, demos=demos).logits
        aim.model.read_cache.clear()
        assert torch.equal(kept, aim.model(**inputs, demos=demos).logits)


def test_a_copy_of_a_model_keeps_nothing_of_the_other() -> None:
    aim = plugin("llava")
    aim.answer(aim.query(), DEMOS)
    aim.model.read_cache.max_bytes = 12345678
    other = copy.deepcopy(aim.model)
    assert len(other.read_cache) == 0 and other.read_cache.max_bytes == 12345678


def test_the_least_recently_used_leaves() -> None:
    kept = LRUCache(10)
    for key in "abc":
        kept.put(key, key, 3)
    assert kept.get("a") == "a"
    kept.put("d", "d", 3)
    assert [kept.get(key) for key in "abcd"] == ["a", None, "c", "d"] and kept.nbytes == 9
    kept.put("e", "e", 11)
    assert kept.get("e") is None and len(kept) == 3
    kept.put("f", "f", 10)
    assert len(kept) == 1 and kept.nbytes == 10
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: (kept.put(i % 7, i, 4), kept.get(i % 5)), range(2000)))
    assert kept.nbytes == 4 * len(kept) == 8
    kept.put(next(iter(kept._values)), "larger", 11)  # what it replaces has gone all the same
    assert kept.nbytes == 4 and len(kept) == 1
    kept.clear()
    assert kept.nbytes == len(kept) == 0


# --- the KV of a prefix


def test_an_answer_from_kept_kv_does_not_compute_the_prefix_again(aim: Plugin) -> None:
    if not continues_after_kv(aim.backbone):
        pytest.skip("with this version of transformers the backbone cannot go on behind given KV")
    fresh = plugin(aim.family)
    fused = fresh.model.read(DEMOS)
    inputs = fresh.query()
    plain = passes(fresh, lambda: fresh.answer(inputs, fused))
    prefix = fresh.model.prefill(fused)
    saved = plain - passes(fresh, lambda: fresh.answer(inputs, prefix))
    assert fused.num_tokens <= saved <= fused.num_tokens + 1  # and BOS, where there is one
    assert passes(fresh, lambda: fresh.model.prefill(DEMOS[:0])) == 0
    assert passes(fresh, lambda: fresh.model.prefill(prefix)) == 0
    assert passes(fresh, lambda: fresh.model.prefill(fused)) == 0


def test_a_prefix_read_while_training_with_checkpointing_keeps_its_kv(llava: Plugin) -> None:
    aim = plugin("llava")
    aim.model.gradient_checkpointing_enable()
    inputs, fused = aim.query(), llava.model.read(DEMOS)
    aim.model.train()
    prefix = aim.model.prefill(fused)
    assert aim.model.training
    aim.model.eval()
    answers: list[torch.Tensor] = []
    computed = passes(aim, lambda: answers.append(aim.answer(inputs, prefix)))
    assert passes(llava, lambda: answers.append(llava.answer(inputs, fused))) - computed >= fused.num_tokens
    assert torch.equal(*answers)


def test_a_prefix_is_of_one_list_of_demonstrations(llava: Plugin) -> None:
    with pytest.raises(ValueError, match="prefill takes one list of demonstrations; got one for each of 2 rows"):
        llava.model.prefill([DEMOS[:1], DEMOS[1:]])


def test_a_prefix_of_fused_tokens_needs_no_processor() -> None:
    aim, without = plugin("llava"), plugin("llava").model
    inputs, fused = aim.query(), aim.model.read(DEMOS[:2])
    without._processor = None
    fused = replace(fused, source=without.source)
    wanted, kept = (without.generate(**inputs, demos=demos, **NEW) for demos in (fused, without.prefill(fused)))
    assert torch.equal(kept, wanted) and len(without.prefix_cache) == 1


def test_kv_that_had_to_leave_is_computed_again(llava: Plugin) -> None:
    aim = plugin("llava")
    inputs = aim.query()
    prefixes = [aim.model.prefill([DEMOS[i]]) for i in (0, 1)]
    one = max(size for _, size in aim.model.prefix_cache._values.values())
    assert aim.model.prefix_cache.nbytes <= 2 * one
    wanted = [aim.answer(inputs, [DEMOS[i]]) for i in (0, 1)]
    for limit in (one, 0):
        aim.model.prefix_cache.max_bytes = limit
        for _ in range(2):
            for prefix, answer in zip(prefixes, wanted, strict=True):
                assert torch.equal(aim.answer(inputs, prefix), answer)
                assert aim.model.prefix_cache.nbytes <= limit


def test_what_cannot_use_kept_kv_takes_the_fused_tokens(aim: Plugin) -> None:
    inputs, two = aim.query(), aim.query("What is this?", "And that?")
    fused = aim.model.read(DEMOS)
    prefix, other = aim.model.prefill(fused), aim.model.prefill(fused[:2])
    wanted = aim.answer(inputs, fused)
    assert torch.equal(aim.answer(inputs, prefix, use_cache=False), wanted)
    assert torch.equal(aim.answer(inputs, prefix, cache_implementation="static"), wanted)
    cache = DynamicCache(config=aim.backbone.config.get_text_config())
    assert torch.equal(aim.answer(inputs, prefix, past_key_values=cache), wanted)
    rows = [fused, fused[:2]]
    assert torch.equal(aim.answer(two, [prefix, other]), aim.answer(two, rows))
    assert torch.equal(aim.answer(two, [prefix, None]), aim.answer(two, [fused, None]))
    assert torch.equal(aim.answer(two, [prefix, prefix]), aim.answer(two, fused))
    with torch.no_grad():
        assert torch.equal(aim.model(**inputs, demos=prefix).logits, aim.model(**inputs, demos=fused).logits)


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}], ids=str)
def test_padding_after_a_prefix_is_not_penalized(llava: Plugin, options: dict[str, Any]) -> None:
    aim = plugin("llava")
    inputs = aim.query("What is this?", "And that, the small one on the left?")
    pad = inputs["input_ids"][0, 0]
    assert inputs["attention_mask"][0, 0] == 0

    def of_padding(demos: Any) -> torch.Tensor:
        more = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
        return aim.model.generate(**inputs, demos=demos, **more, **options).scores[0][:, pad]

    demos = list(DEMOS)
    torch.testing.assert_close(of_padding(aim.model.prefill(demos)), of_padding(demos), rtol=1e-4, atol=1e-4)


def test_several_samples_are_drawn_from_it(llava: Plugin) -> None:
    inputs, options = llava.query(), {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 6}
    drawn: list[torch.Tensor] = []
    computed = []
    for demos in (llava.model.read(DEMOS), llava.model.prefill(DEMOS)):
        torch.manual_seed(0)
        computed.append(
            passes(llava, lambda demos=demos: drawn.append(llava.model.generate(**inputs, demos=demos, **options)))
        )
    assert drawn[0].shape[0] == 3 and torch.equal(*drawn)
    assert computed[0] - computed[1] >= 3 * llava.model.read(DEMOS).num_tokens


def test_a_cache_that_was_reset_holds_no_fused_tokens(llava: Plugin) -> None:
    inputs, cache = llava.query(image=None), DynamicCache()
    options = {"past_key_values": cache, "max_new_tokens": 2, "do_sample": False}
    llava.model.generate(**inputs, demos=DEMOS[:2], **options)
    cache.reset()
    for _ in range(2):
        ids = llava.model.generate(inputs["input_ids"], **options)
        inputs = {"input_ids": torch.cat([ids, ids[:, -1:]], dim=1)}
    assert cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("bound", [-1, -(2**20)])
def test_a_cache_has_no_negative_bound(bound: int) -> None:
    cache = LRUCache(8)
    for change in (lambda: LRUCache(bound), lambda: setattr(cache, "max_bytes", bound)):
        with pytest.raises(ValueError, match=f"max_bytes={bound}: expected 0 or more"):
            change()
    assert cache.max_bytes == 8


def test_a_prefix_is_refused_by_another_plug_in(llava: Plugin) -> None:
    other = plugin("llava", projector_form="mlp")
    prefix = llava.model.prefill(DEMOS)
    for use in (lambda: other.model.prefill(prefix), lambda: other.answer(other.query(), prefix)):
        with pytest.raises(ValueError, match=r"another model: .*fused"):
            use()
    assert len(prefix) == 5 and prefix.num_tokens == prefix.fused.num_tokens


def test_a_prefix_of_a_bank_and_chosen_demonstrations(llava: Plugin, tmp_path: Any) -> None:
    bank = DemonstrationBank.build(llava.model, DEMOS, tmp_path)
    prefix = llava.model.prefill(bank.select(k=3, seed=1))
    assert torch.equal(
        llava.answer(llava.query(), prefix), llava.answer(llava.query(), bank, shots=3, select={"seed": 1})
    )
    assert torch.equal(llava.answer(llava.query(), llava.model.prefill(bank)), llava.answer(llava.query(), bank))
