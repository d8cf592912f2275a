"""The families beyond the matrix: what takes little time of each; `docs/survey_backbones.py` tries all properties."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import backbones
import further_families
import more_families
import popular_families
import pytest
import timm_families
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

from modeling_aim import AimForConditionalGeneration, Demonstration
from modeling_aim.backbone_aim import decoder_layers
from modeling_aim.checks import PROPERTIES, QUESTION, Case, NotApplicable
from modeling_aim.checks.run import without_training
from modeling_aim.configuration_aim import deepest_entry, default_depth
from modeling_aim.families_aim import FAMILIES, family_of
from modeling_aim.state_aim import continues_after_kv

BUILDERS = {**more_families.BUILDERS, **popular_families.BUILDERS, **further_families.BUILDERS}
BUILDERS |= timm_families.BUILDERS
PATTERN = ["sliding_attention"] * 4 + ["full_attention"]  # of the layers of Gemma
SURVEYED = Version("5.23")
SHORT = "no_demonstrations", "demonstrations_reach", "images_matter", "kept_prefix"


def made(family: str) -> Case:
    if family in BUILDERS and Version(transformers.__version__) < SURVEYED:
        pytest.skip(f"docs/BACKBONES.md says what works on transformers {SURVEYED}; older ones lack classes or differ")
    if family in timm_families.BUILDERS:
        pytest.importorskip("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "MORE_FAMILIES", {**backbones.MORE_FAMILIES, **BUILDERS})
        backbone = backbones.build(family)
    return Case(without_training(backbone.model, backbone.processor, {}))


@pytest.fixture(scope="module", params=[*backbones.FAMILIES, *backbones.MORE_FAMILIES, *BUILDERS])
def case(request: pytest.FixtureRequest) -> Case:
    return made(request.param)


def test_it_is_known(case: Case) -> None:
    model_type = case.model.backbone.config.model_type
    assert model_type in FAMILIES, f"add {model_type!r} with a Family to FAMILIES of families_aim.py"


def test_families_are_the_ones_that_work_in_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "BACKBONES.md").read_text(encoding="utf-8")
    section = page.partition("\n## Works\n")[2].partition("\n## ")[0]
    listed = {line.split("`")[1] for line in section.split("\n") if line.startswith("| `")}
    assert listed == set(FAMILIES), "a whole run of docs/survey_backbones.py --results FILE rewrites docs/BACKBONES.md"


def test_every_known_family_has_a_builder() -> None:
    built = {*backbones.FAMILIES, *backbones.MORE_FAMILIES, *BUILDERS}
    assert set(FAMILIES) == built, (
        "each family of families_aim.py needs a tiny model here, and each of these an entry there"
    )


def test_what_is_kept_of_a_demonstration_is_its_words(case: Case) -> None:
    demos = [Demonstration.of(demo) for demo in case.demos]
    alone = family_of(case.model.backbone.config.model_type).read_alone
    together = [[demo] for demo in demos] if alone else [demos]
    for some in (*together, [demos[0]], [Demonstration.of({"text": "Words alone."})]):
        inputs, mask = case.processor.encode_demonstrations(some)
        for demo, ids, kept in zip(some, inputs["input_ids"], mask, strict=True):
            assert case.processor.tokenizer.decode(ids[kept]).strip() == case.processor.apply_template(demo)[0]


@pytest.mark.parametrize("case", BUILDERS, indirect=True, scope="module")  # the matrix tries the others
@pytest.mark.parametrize("name", SHORT)
def test_property(case: Case, name: str) -> None:
    if name == "kept_prefix" and not continues_after_kv(case.model.backbone):
        with pytest.raises(NotApplicable):
            PROPERTIES[name](case)
    else:
        PROPERTIES[name](case)


@pytest.mark.parametrize("family", ["got_ocr2", "paligemma"])
def test_a_processor_that_wants_images_does_without_them(family: str) -> None:
    PROPERTIES["image_counts"](made(family))


def test_images_that_are_embedded_as_words_are_not_taken_for_the_prompt() -> None:
    PROPERTIES["read_or_raw"](made("chameleon"))  # generate() embeds its images before the prompt


@pytest.mark.parametrize(
    ("family", "name"),
    [("hunyuan_vl", "equal_images"), ("emu3", "batch_reading")],  # images numbered in a batch, or padded to one size
)
def test_demonstrations_are_read_alone_where_a_batch_changes_them(family: str, name: str) -> None:
    PROPERTIES[name](made(family))


def test_words_alone_where_every_call_has_pixels() -> None:
    case = made("blip-2")
    for name in ("image_counts", "chosen_for_each_row"):
        PROPERTIES[name](case)
    inputs = case.query(QUESTION, "What?", images=0)
    assert inputs["pixel_values"].shape == (2, 3, 28, 28) and not inputs["pixel_values"].any()
    other = {**inputs, "pixel_values": torch.ones_like(inputs["pixel_values"])}
    assert torch.equal(case.logits(inputs, case.fused), case.logits(other, case.fused))


@pytest.mark.parametrize("name", ["without_training", "prompt_lookup", "words_at_depth"])
def test_states_enter_before_layers_that_use_the_keys_of_earlier_ones(name: str) -> None:
    PROPERTIES[name](made("gemma4"))


def test_gradient_checkpointing_of_layers_with_dropout_of_their_own() -> None:
    case = made("blip-2")
    layer = decoder_layers(case.model.backbone)[0]
    assert layer.dropout == 0.1
    PROPERTIES["gradients"](case)
    assert layer.dropout == 0.1  # for who trains the backbone later


@pytest.mark.parametrize(
    ("text", "depth", "deepest"),
    [
        ({"num_hidden_layers": 32}, 13, 31),
        ({"num_hidden_layers": 40, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]}, 16, 39),  # Llama 3.2 11B
        ({"num_hidden_layers": 6, "cross_attention_layers": [3]}, 4, 5),
        ({"num_hidden_layers": 35, "num_kv_shared_layers": 20, "layer_types": PATTERN * 7}, 13, 14),  # Gemma 4 E2B
        ({"num_hidden_layers": 42, "num_kv_shared_layers": 18, "layer_types": PATTERN * 8 + PATTERN[:2]}, 17, 23),
    ],
)
def test_the_default_depth_is_one_where_states_count(text: dict[str, Any], depth: int, deepest: int) -> None:
    config = PreTrainedConfig(**text)
    assert (default_depth(config), deepest_entry(config)) == (depth, deepest)


def test_a_depth_behind_the_last_keys_is_refused() -> None:
    case = made("gemma4")
    with pytest.raises(ValueError, match=r"put back at 0..1, but not at 2, after the last layer that has keys"):
        AimForConditionalGeneration.from_backbone(case.model.backbone, case.processor, read_layers=[2])
    with pytest.raises(ValueError, match="from 0 to 1"):
        case.model.set_depth(2)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.prefix_kv != "always"])
def test_no_kv_is_kept_where_it_would_not_be_that_of_the_whole_prompt(family: str) -> None:
    case = made(family)
    fused, prefix = case.model.read(case.demos), case.model.prefill(case.demos)
    for inputs in (case.query(), case.query(QUESTION, "Which of the names that you were told goes with this?")):
        case.require_same(*(case.answered(inputs, demos, max_new_tokens=1) for demos in (prefix, fused)))
