"""Methods of others on tiny backbones: nothing dropped is the whole prompt; counted KV is the cache's; refusals."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from backbones import picture
from families import FAMILIES, MORE_FAMILIES
from more_families import gemma3, internvl

from modeling_aim import AimProcessor
from modeling_aim.backbone_aim import decoder_layers
from modeling_aim.baselines.methods import BASELINES, _setting, baseline_of
from modeling_aim.baselines.reading import Answering, Reading
from modeling_aim.baselines.watching import watched_attention
from modeling_aim.evaluation.baselines import Pieces, refuses
from modeling_aim.evaluation.methods import Part, PromptBuilder, method_of
from modeling_aim.evaluation.subject import Subject
from modeling_aim.prefix_aim import cache_bytes

BUILDERS = {**FAMILIES, **MORE_FAMILIES, "internvl": internvl, "gemma3": gemma3}
SERVED = ("llava", "qwen2_5_vl", "idefics3", "internvl")
WITH_RATIO = [name for name, one in BASELINES.items() if "ratio" in inspect.signature(one.make).parameters]
WHOLE = ("prefix-kv", "parallel-icl:chunks=1", "emloc:delta=0",
         *(f"{name}:ratio=0" for name in WITH_RATIO if name != "text-kv"))  # fmt: skip
NAMES = ("one", "two", "three")


@cache
def subject(family: str) -> Subject:
    torch.manual_seed(0)
    model, inner = BUILDERS[family]()
    processor = AimProcessor(inner)
    return Subject(model.eval(), processor, PromptBuilder(processor))


def pieces_of(family: str, count: int = 3) -> Pieces:
    image = subject(family).processor.image_text
    parts = [Part(f"{image}This is {name}.\n", len(image) + 8) for name in NAMES[:count]]
    return Pieces(
        subject(family).processor, [*parts, Part(f"{image}This is", 0)], [[picture(i)] for i in range(count + 1)]
    )


def reading_of(family: str, count: int = 3) -> Reading:
    return pieces_of(family, count).reading(subject(family).backbone, torch.device("cpu"), torch.float32)


@cache
def reference(family: str, count: int = 3) -> torch.Tensor:
    """The backbone's own logits behind the whole prompt."""
    with torch.no_grad():
        return subject(family).backbone(**pieces_of(family, count).encode(range(count + 1), True)).logits[0, -1]


def logits_of(family: str, name: str, count: int = 3) -> torch.Tensor:
    return Answering(subject(family).backbone, baseline_of(name)(reading_of(family, count))()).logits


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("name", WHOLE)
def test_nothing_dropped_is_the_whole_prompt(family: str, name: str) -> None:
    torch.testing.assert_close(logits_of(family, name), reference(family), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SERVED)
def test_one_demonstration_read_alone_is_the_whole_prompt(family: str) -> None:
    found = logits_of(family, "text-kv:ratio=0", count=1)
    torch.testing.assert_close(found, reference(family, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("name", [name for name in BASELINES if name != "emloc"] + ["emloc:delta=0.5"])
def test_what_it_keeps_is_what_it_says(family: str, name: str) -> None:
    backbone = subject(family).backbone
    answering = Answering(backbone, baseline_of(name)(reading_of(family))())
    assert answering.kv_bytes == sum(cache_bytes(cache) for cache in answering.caches)
    text = backbone.config.get_text_config()
    width = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    assert answering.kv_bytes == round(answering.tokens * text.num_hidden_layers * width)
    whole = pieces_of(family).encode(range(4), True)["input_ids"].shape[1]
    if name == "parallel-icl":  # each chunk has the query
        assert answering.tokens > whole
    elif name == "prefix-kv":
        assert answering.tokens == whole
    else:
        assert answering.tokens < whole, "it keeps all KV; if that is meant, name it beside prefix-kv above"
        assert not torch.allclose(answering.logits, reference(family), atol=1e-3)


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("name", ["prefix-kv", "text-kv", "fastv", "emloc:chunk=2:delta=0.05", "parallel-icl"])
def test_tokens_one_by_one_are_tokens_at_once(family: str, name: str) -> None:
    """Behind caches whose layers have kept different numbers of rows too."""
    answering = Answering(subject(family).backbone, baseline_of(name)(reading_of(family))())
    written = answering.fork().write(4)
    at_once, steps = answering.fork().push(written), answering.fork()
    one_by_one = torch.cat([steps.push([token]) for token in written])
    torch.testing.assert_close(one_by_one, at_once, atol=2e-5, rtol=1e-4)
    scores = answering.score(written)
    logits = torch.cat([answering.logits[None], at_once[:-1]]).log_softmax(-1)
    assert scores == pytest.approx(logits[range(4), written].tolist(), abs=1e-4)
    assert logits.argmax(-1).tolist() == written


def test_exact_kv_writes_what_the_backbone_writes() -> None:
    one = subject("llava")
    written = Answering(one.backbone, baseline_of("prefix-kv")(reading_of("llava"))()).write(5)
    inputs = pieces_of("llava").encode(range(4), True)
    ids = one.backbone.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert written == ids[0, -5:].tolist()


@pytest.mark.parametrize("family", SERVED)
def test_the_window_sees_what_eager_attention_sees(family: str) -> None:
    backbone, reading = subject(family).backbone, reading_of(family)
    with watched_attention(backbone, 4) as seen:
        reading.context(reading.numbers)
    before = backbone.config.get_text_config()._attn_implementation
    backbone.set_attn_implementation("eager")
    try:
        inputs = dict(reading.encode(reading.numbers, True))
        with torch.no_grad():
            wanted = backbone(**inputs, output_attentions=True, use_cache=False).attentions
    finally:
        backbone.set_attn_implementation(before)
    assert sorted(seen) == list(range(len(decoder_layers(backbone))))
    for number, weights in seen.items():
        torch.testing.assert_close(weights, wanted[number][0, :, -4:], atol=1e-5, rtol=1e-4)


def test_snapkv_keeps_the_rows_that_are_looked_at_and_the_window() -> None:
    reading = reading_of("llava")
    with watched_attention(reading.backbone, 8) as seen:
        context = reading.context(reading.numbers)
    length = len(context.ids)
    scores = seen[0].mean(1)[:, :-8]
    scores = torch.nn.functional.avg_pool1d(scores, 5, stride=1, padding=2).unflatten(0, (2, 2)).mean(1)
    kept = Answering(reading.backbone, baseline_of("snapkv:window=8")(reading)()).caches[0].layers[0].keys
    for head in range(2):
        best = scores[head].topk(length // 2 - 8).indices.sort().values.tolist()
        rows = [*best, *range(length - 8, length)]
        wanted = context.cache.layers[0].keys[0, head, rows]
        torch.testing.assert_close(kept[0, head, : length // 2], wanted)


def test_fastv_drops_images_of_demonstrations_behind_its_layer_alone() -> None:
    answering = Answering(subject("llava").backbone, baseline_of("fastv:ratio=1:depth=1")(reading_of("llava"))())
    rows = [layer.keys.shape[-2] for layer in answering.caches[0].layers]
    images = 4  # tokens of each of three images
    assert rows == [rows[0], rows[0] - 3 * images, rows[0] - 3 * images]


def test_the_task_vector_reaches_the_query_and_no_more() -> None:
    """Without it the query alone answers; other demonstrations give another one; no hook is left."""
    hooks = [len(layer._forward_pre_hooks) for layer in decoder_layers(subject("llava").backbone)]
    reading = reading_of("llava")
    alone = Answering(reading.backbone, [reading.whole([])])
    moved = Answering(reading.backbone, baseline_of("task-vector")(reading)())
    assert moved.kv_bytes == alone.kv_bytes and not torch.allclose(moved.logits, alone.logits, atol=1e-3)
    assert not torch.allclose(moved.logits, logits_of("llava", "task-vector", count=2), atol=1e-4)
    assert hooks == [len(layer._forward_pre_hooks) for layer in decoder_layers(reading.backbone)]


def test_an_expert_of_no_weight_says_nothing() -> None:
    reading = reading_of("llava")
    first, second = (reading.behind(reading.context([i]), weight) for i, weight in ((0, 1.0), (1, 0.0)))
    both = Answering(reading.backbone, [first, second])
    torch.testing.assert_close(both.logits, Answering(reading.backbone, [first]).logits)


@pytest.mark.parametrize("family", SERVED)
def test_four_families_are_served(family: str) -> None:
    assert {name: refuses(baseline, subject(family)) for name, baseline in BASELINES.items()} == dict.fromkeys(
        BASELINES, ""
    )


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("idefics", "prefix-kv", "cross-attention"),
        ("qwen3_5", "text-kv", "linear_attention"),
        ("llava_onevision", "snapkv", "two passes"),  # cuts a lone image into tiles
        ("gemma3", "prefix-kv", "two passes"),  # sees a query's image in both directions only in one pass
        ("gemma3", "fastv", ""),
        ("qwen3_vl", "catp", "IndexError"),  # adds image features to later layers
    ],
)
def test_a_backbone_is_refused_with_the_reason(family: str, name: str, reason: str) -> None:
    why = refuses(baseline_of(name), subject(family))
    assert reason in why and bool(why) == bool(reason)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snapkv:ratio=2", "expected 0 to 1"),
        ("snapkv:share=.5", "is not a setting of snapkv; it has ratio=0.5, window=32, kernel=5"),
        ("snapkv:ratio=half", "expected float"),
        ("snapkv:kernel=4", "expected odd"),
        ("parallel-icl:chunks=0", "expected 1 or more"),
        ("prefix-kv:ratio=1", "it has none"),
        ("nokv", "There is no method nokv"),
    ],
)
def test_wrong_settings_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_of(name)


@pytest.mark.parametrize("name", ["fastv:depth=3", "task-vector:depth=9", "catp:depth=1"])
def test_a_depth_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="this backbone has 3 layers"):
        logits_of("llava", name)


def test_settings_are_those_that_are_given() -> None:
    assert baseline_of("snapkv:ratio=.25:window=4").settings == {"ratio": 0.25, "window": 4}
    assert method_of("parallel-icl:chunks=2:by=order").baseline == baseline_of("parallel-icl:chunks=2:by=order")


def test_a_setting_that_is_a_bool_is_read_from_its_word() -> None:
    assert _setting("x:spread=false", "spread", "false", True) is False
    assert _setting("x:spread=true", "spread", "true", False) is True
    with pytest.raises(ValueError, match="expected true or false"):
        _setting("x:spread=0", "spread", "0", True)


@pytest.mark.parametrize("name", BASELINES)
def test_every_method_is_in_the_docs(name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "BASELINES.md").read_text(encoding="utf-8")
    assert f"| `{name}`" in page, f"add a row for `{name}` to the table of docs/BASELINES.md"
