"""Reading: states of the text positions, each demonstration alone; and training, which reaches the projector."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import DEMOS, FAMILIES, MORE_FAMILIES, Plugin, build, picture, plugin
from torch import nn
from transformers import BitsAndBytesConfig

from modeling_aim import AimForConditionalGeneration, AimProcessor, Demonstration, DemonstrationBank
from modeling_aim.backbone_aim import decoder_layers

OPEN = [Demonstration.of(demo) for demo in DEMOS]


@contextmanager
def calls(*modules: nn.Module) -> Any:
    """The positional inputs of every forward pass through `modules`."""
    seen: list[Any] = []
    handles = [module.register_forward_hook(lambda module, args, output: seen.append(args)) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def layers_of(aim: Plugin) -> nn.ModuleList:
    return decoder_layers(aim.backbone)


def states_by_hand(aim: Plugin, demo: Demonstration, words: str, kept: str) -> dict[int, torch.Tensor]:
    """Hidden states of all layers over `kept`, the end of a demonstration but for what follows it in `words`."""
    text = aim.processor.image_text * len(demo.images) + words
    inputs = aim.processor.processor(
        images=[list(demo.images)] if demo.images else None, text=[text], return_tensors="pt"
    )
    joined: dict[int, torch.Tensor] = {}
    hook = layers_of(aim)[-1].register_forward_hook(  # after the last layer the backbone reports the norm's output
        lambda module, args, output: joined.update({3: output[0] if isinstance(output, tuple) else output})
    )
    with torch.no_grad():
        states = aim.backbone(**inputs, output_hidden_states=True).hidden_states
    hook.remove()
    joined |= {-1: states[-1], 1: states[1], 2: states[2]}
    end = len(words.encode()) - words.encode().rindex(kept.encode())  # one token a byte
    until = end - len(kept.encode())
    return {k: value[0, -end : value.shape[1] - until] for k, value in joined.items()}


WORDS = (
    "This is dax.",
    "a blue wug is here.",
    "A sentence without any image.",
    "Which one? The second one.",
    "This is blicket.",
)
ANSWERS = ("dax", WORDS[1], WORDS[2], "The second one.", "blicket")


@pytest.mark.parametrize("read_layers", [[-1], [1], [1, 3]], ids=str)
@pytest.mark.parametrize("span", ["text", "answer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_states_of_the_named_layers_are_kept(family: str, read_layers: list[int], span: str) -> None:
    aim = plugin(family, read_layers=read_layers, read_span=span)
    found = aim.model.read_states(OPEN)
    for demo, words, answer, states in zip(OPEN, WORDS, ANSWERS, found, strict=True):
        wanted = states_by_hand(aim, demo, words, words if span == "text" else answer)
        wanted = torch.cat([wanted[k] for k in read_layers], dim=-1)
        torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-4)
    fused = aim.model.read(DEMOS)
    assert fused.lengths == tuple(len(states) for states in found)
    torch.testing.assert_close(fused.vectors, aim.model.projector(torch.cat(found)).detach(), rtol=1e-4, atol=1e-4)


def test_a_processor_that_changes_its_text_is_refused() -> None:
    processor = plugin("llava").processor

    class Rewording(type(processor.processor)):
        def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
            return super().__call__(images=images, text=[prompt.replace("dax", "wug") for prompt in text], **kwargs)

    processor.processor.__class__ = Rewording
    processor.encode_demonstrations([Demonstration.of((picture(0), "wug"))])
    with pytest.raises(ValueError, match=r"tokenizes '.*This is dax.' differently from its tokenizer"):
        processor.encode_demonstrations([Demonstration.of((picture(0), "dax"))])


def test_what_is_read_passes_through(aim: Plugin) -> None:
    fused = aim.model.read(DEMOS)
    assert aim.model.read(fused) is fused
    assert aim.model.read(DemonstrationBank(fused)) is fused
    assert len(fused) == len(DEMOS) and fused.texts == WORDS
    assert fused[1:3].texts == WORDS[1:3] and fused[-1].texts == WORDS[-1:] and fused[[3, 0]].texts[1] == WORDS[0]
    assert torch.equal(torch.cat([one.vectors for one in fused]), fused.vectors)
    assert len(aim.model.read([])) == 0
    assert not fused.vectors.requires_grad
    with pytest.raises(AttributeError):
        fused.vectors = None


def test_a_padded_batch_reads_as_one_by_one(aim: Plugin) -> None:
    wanted = aim.model.read(DEMOS, batch_size=1)
    for found in (aim.model.read(DEMOS, batch_size=8), aim.model.read(DEMOS, batch_size=2)):
        assert (found.lengths, found.keys, found.texts) == (wanted.lengths, wanted.keys, wanted.texts)
        torch.testing.assert_close(found.vectors, wanted.vectors, rtol=1e-4, atol=1e-4)


def test_equal_demonstrations_are_read_once(aim: Plugin) -> None:
    with calls(aim.backbone.get_input_embeddings()) as seen:
        fused = aim.model.read([DEMOS[0], DEMOS[1], (picture(0), "dax"), {"image": picture(0), "text": "dax"}])
    assert sum(len(args[0]) for args in seen if args[0].ndim == 2) == 2
    assert fused.lengths[0] == fused.lengths[2] and torch.equal(fused[0].vectors, fused[3].vectors)
    rows = [list(DEMOS[:2]), [DEMOS[0]], [DEMOS[1]]]
    aim.model.read_cache.clear()  # of what other tests have read
    with calls(aim.backbone.get_input_embeddings()) as seen:
        aim.model(**aim.query("a", "b", "c"), demos=rows)
    assert sum(len(args[0]) for args in seen if args[0].ndim == 2) == 2 + 3


def test_demonstrations_that_differ_anywhere_are_told_apart() -> None:
    base = Demonstration.of({"image": picture(0), "text": "dax"})
    others = [{"image": picture(1), "text": "dax"}, {"image": picture(0), "text": "wug"}, {"text": "dax"}]
    others += [{"image": picture(0), "label": "dax"}, {"image": picture(0), "question": "?", "answer": "dax"}]
    others += [{"images": [picture(0), picture(0)], "text": "dax"}]
    assert len({base.key, *(Demonstration.of(other).key for other in others)}) == 7
    assert Demonstration.of((picture(0), "dax")).key == base.key


def test_neither_lm_head_nor_later_layers_run_during_a_read(aim: Plugin) -> None:
    early = plugin(aim.family, read_layers=[1])
    for model, unused in ((aim, [aim.backbone.lm_head]), (early, [early.backbone.lm_head, *layers_of(early)[1:]])):
        with calls(*unused) as seen, calls(model.backbone.get_input_embeddings()) as used:
            model.model.read(DEMOS)
        assert used and not seen


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_an_early_stop_in_4_bit_and_partly_on_disk(family: str, tmp_path: Path) -> None:
    early = plugin(family, read_layers=[1])
    early.model.save_pretrained(tmp_path / "repository", include_backbone=True)
    wanted = early.model.read(DEMOS).vectors

    def read_twice(**options: Any) -> tuple[Any, list[torch.Tensor]]:
        model = AimForConditionalGeneration.from_pretrained(tmp_path / "repository", **options)
        with calls(*decoder_layers(model.backbone)[1:]) as seen:
            read = [model.read(DEMOS).vectors for _ in range(2)]
        assert not seen
        return model, read

    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    _, read = read_twice(quantization_config=BitsAndBytesConfig(**four_bit))
    assert torch.equal(*read) and not torch.equal(read[0], wanted)
    size = sum(p.numel() * p.element_size() for p in early.backbone.parameters())
    places = {"device_map": "auto", "max_memory": {"cpu": size // 2}, "offload_folder": str(tmp_path / "disk")}
    model, read = read_twice(**places)
    on_disk = [name for name, place in model.hf_device_map.items() if place == "disk"]
    assert on_disk and torch.equal(*read)
    torch.testing.assert_close(read[0], wanted)
    left = [name for name, p in model.backbone.named_parameters() if name.startswith(tuple(on_disk)) and not p.is_meta]
    assert not left, "the stop left weights in memory that belong on the disk"


def test_a_read_that_stops_early_leaves_the_backbone_as_it_was(aim: Plugin) -> None:
    early = plugin(aim.family, read_layers=[1])
    inputs = early.query()
    with torch.no_grad():
        before = early.backbone(**inputs, output_hidden_states=True)
        early.model.read(DEMOS)
        after = early.backbone(**inputs, output_hidden_states=True)
    assert torch.equal(before.logits, after.logits)
    assert len(after.hidden_states) == len(before.hidden_states) == 4
    assert all(torch.equal(a, b) for a, b in zip(before.hidden_states, after.hidden_states, strict=True))


def test_no_state_leaks_between_a_read_and_an_answer(aim: Plugin) -> None:
    inputs, text = aim.query(), aim.query("Only text", image=None)
    wanted = [aim.answer(inputs), aim.answer(text), aim.answer(inputs, DEMOS), aim.model.read(DEMOS).vectors]
    state = [getattr(module, "rope_deltas", None) for module in aim.backbone.modules()]
    aim.model.read([DEMOS[3]])
    now = [getattr(module, "rope_deltas", None) for module in aim.backbone.modules()]
    assert all(a is b for a, b in zip(state, now, strict=True))
    aim.model.read([DEMOS[2]])
    assert torch.equal(aim.answer(text), wanted[1])
    aim.model.read([DEMOS[3]])
    assert torch.equal(aim.answer(inputs), wanted[0])
    assert torch.equal(aim.model.read(DEMOS).vectors, wanted[3])
    assert torch.equal(aim.answer(inputs, DEMOS), wanted[2])


def test_a_cached_step_goes_on_right_after_a_read(aim: Plugin) -> None:
    inputs = aim.query()
    logits = []
    for between in (lambda: None, lambda: aim.model.read([DEMOS[3], DEMOS[1]])):
        with torch.no_grad():
            cache = aim.backbone(**inputs, use_cache=True).past_key_values
            between()
            logits.append(aim.backbone(torch.tensor([[5]]), past_key_values=cache).logits)
    assert torch.equal(*logits)


def test_a_budget_averages_neighbouring_states(llava: Plugin) -> None:
    free = llava.model.read_states(OPEN)
    budgeted = plugin("llava", max_fused_tokens=4)
    assert budgeted.model.read(DEMOS).lengths == (4,) * 5
    found = budgeted.model.read_states(OPEN)
    torch.testing.assert_close(found[0], free[0].reshape(4, 3, -1).mean(dim=1))  # 12 positions
    assert plugin("llava", max_fused_tokens=15).model.read(DEMOS).lengths == (12, 15, 15, 15, 15)


@pytest.mark.parametrize(
    ("form", "read_layers"),
    [
        ("linear", [-1]),
        ("linear", [1]),
        ("linear", [1, -1]),
        ("linear_norm", [-1]),
        ("linear_norm", [1, 3]),
        ("residual", [-1]),
        ("residual", [1, 3]),
        ("residual_mlp", [-1]),
        ("residual_mlp", [1, 3]),
        ("mlp", [-1]),
        ("mlp", [1, 3]),
    ],
    ids=str,
)
def test_a_new_projector_gives_vectors_as_long_as_embeddings(aim: Plugin, form: str, read_layers: list[int]) -> None:
    fresh = plugin(aim.family, projector_form=form, read_layers=read_layers)
    weight = fresh.backbone.get_input_embeddings().weight
    norms = weight.norm(dim=-1)
    wanted = float(norms[norms > 0].mean())
    found = fresh.model.read(DEMOS).vectors.norm(dim=-1)
    assert float(found.mean()) == pytest.approx(wanted, rel=0.35)
    assert wanted / 2.5 < float(found.min()) and float(found.max()) < wanted * 2.5


def loss_of(aim: Plugin, demos: Any = DEMOS) -> torch.Tensor:
    inputs = aim.query("What is this?", "And that one?")
    return aim.model(**inputs, demos=demos, labels=inputs["input_ids"]).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_projector_alone(family: str) -> None:
    aim = plugin(family)
    aim.model.train()
    loss_of(aim).backward()
    gradients = {name: p.grad for name, p in aim.model.named_parameters() if p.grad is not None}
    assert gradients and all(name.startswith("projector.") for name in gradients)
    assert gradients.keys() == {name for name, p in aim.model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", ["activation", "gradient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_recomputes_layers_and_changes_no_gradient(family: str, name: str) -> None:
    aim = plugin(family)
    aim.model.train()
    recomputed = []
    gradients = []
    for switch in ("disable", "enable", "disable"):
        getattr(aim.model, f"{name}_checkpointing_{switch}")()
        aim.model.zero_grad()
        loss = loss_of(aim)
        with calls(layers_of(aim)[1].self_attn) as again:
            loss.backward()
        recomputed.append(len(again))
        gradients.append([loss.detach(), *(p.grad for p in aim.model.projector.parameters())])
    assert recomputed == [0, 1, 0]
    assert all(p.grad is None for p in aim.backbone.parameters())
    for plain, checkpointed in zip(*gradients[:2], strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_leaves_the_backbones_dropout_off(family: str, checkpointing: bool) -> None:
    aim = plugin(family)
    for module in aim.backbone.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    with torch.no_grad():
        wanted = loss_of(aim)
    if checkpointing:
        aim.model.gradient_checkpointing_enable()
    aim.model.train()
    assert aim.model.training and aim.model.projector.training
    assert torch.equal(loss_of(aim), wanted)
    aim.model.eval()
    assert not aim.model.training and not any(module.training for module in aim.model.modules())


def test_a_backbone_in_training_mode_reads_without_dropout() -> None:
    """What is read is kept: by the caller, by a bank, in `read_cache`."""
    backbone = build("llava", attention_dropout=0.5)
    aim = plugin("llava")
    processor = AimProcessor(backbone.processor)
    model = AimForConditionalGeneration(copy.deepcopy(aim.model.config), backbone.model, processor, freeze=False)
    inputs, wanted = aim.query(), model.read(DEMOS).vectors
    with torch.no_grad():
        features, answer = model.query_features(inputs, ["fused", "image"]), model(**inputs, demos=DEMOS).logits
    model.read_cache.clear()
    backbone.model.train()
    for name, found in model.query_features(inputs, ["fused", "image"]).items():
        assert torch.equal(found, features[name])
    assert torch.equal(model.read(DEMOS).vectors, wanted)
    model.generate(**inputs, demos=DEMOS, max_new_tokens=1)
    assert backbone.model.training
    backbone.model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs, demos=DEMOS).logits, answer)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"], ids=str)
def test_a_batch_size_is_a_whole_number(llava: Plugin, size: Any) -> None:
    with pytest.raises(ValueError, match=f"batch_size={size!r}: expected a whole number, 1 or more"):
        llava.model.read(DEMOS[:2], batch_size=size)


@pytest.mark.parametrize("mask", [True, [True, False, True], torch.tensor([True, False, True])], ids=str)
def test_demonstrations_are_not_taken_by_a_mask(llava: Plugin, mask: Any) -> None:
    with pytest.raises(ValueError, match="taken by number; got the truth values"):
        llava.model.read(DEMOS[:3])[mask]


def test_checkpointing_reads_and_answers_the_same(aim: Plugin) -> None:
    fresh = plugin(aim.family)
    fresh.model.gradient_checkpointing_enable()
    fresh.model.train()
    assert torch.equal(fresh.model.read(DEMOS).vectors, aim.model.read(DEMOS).vectors)
    assert torch.equal(fresh.answer(fresh.query(), DEMOS), aim.answer(aim.query(), DEMOS))


def test_the_loss_is_the_cross_entropy_of_the_target(aim: Plugin) -> None:
    inputs = aim.query("What is this?", "And that one, please?")
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[:, :-7] = -100
    with torch.no_grad():
        output = aim.model(**inputs, demos=DEMOS, labels=labels)
    wanted = nn.functional.cross_entropy(output.logits[:, -8:-1].flatten(0, 1), labels[:, -7:].flatten())
    torch.testing.assert_close(output.loss, wanted)
    with torch.no_grad():
        rows = [
            aim.model(**aim.query(q, image=9 + i), demos=DEMOS)
            for i, q in enumerate(("What is this?", "And that one, please?"))
        ]
    logits = torch.cat([row.logits[0, -8:-1] for row in rows])
    torch.testing.assert_close(
        output.loss, nn.functional.cross_entropy(logits, labels[:, -7:].flatten()), rtol=1e-4, atol=1e-4
    )


def test_fused_places_take_no_part_in_the_loss(aim: Plugin) -> None:
    inputs = aim.query()
    with torch.no_grad():
        output = aim.model(**inputs, demos=DEMOS, labels=torch.full_like(inputs["input_ids"], -100))
    assert torch.isnan(output.loss) or output.loss == 0  # no target at all


@pytest.mark.parametrize(
    ("demo", "words"),
    [
        (([], "dax"), "This is dax."),
        (([], "two wugs"), "This is two wugs."),
        (([], "This is a dax"), "This is a dax"),
        (([], "It is a dax."), "It is a dax."),
        (([], "a dax lies on the left"), "a dax lies on the left"),
        ({"label": "a very long name for it"}, "This is a very long name for it."),
        ({"label": " dax "}, "This is dax."),
        (([], "What is it?", "dax"), "What is it? dax"),
        ({"question": "What is {label}?", "answer": "{question}"}, "What is {label}? {question}"),
        ({"text": "{label} is here, you see."}, "{label} is here, you see."),
    ],
)
def test_bare_labels_are_worded_and_statements_are_not(llava: Plugin, demo: Any, words: str) -> None:
    assert llava.processor.apply_template(Demonstration.of(demo))[0] == words


def test_the_wording_is_a_setting() -> None:
    backbone = build("llava")
    processor = AimProcessor(
        backbone.processor, label_template="Its name: {label}", question_template="Q {question} A {answer}!"
    )
    model = AimForConditionalGeneration.from_backbone(backbone.model, processor, read_span="answer")
    fused = model.read([([], "dax"), {"question": "What?", "answer": "a wug"}])
    assert fused.texts == ("Its name: dax", "Q What? A a wug!")
    assert fused.lengths == (3, 5)
