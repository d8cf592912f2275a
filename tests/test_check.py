"""`aim check` on a family beyond those of the matrix, at real size from a config, and on classes that cannot work."""

from __future__ import annotations

import ast
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import backbones
import further_families
import popular_families
import pytest
import timm_families
import torch
import transformers as hf
from families import IDEFICS3_CHAT, IDEFICS_SPECIAL, TILES, make_tokenizer
from more_families import BUILDERS
from transformers import AutoConfig, AutoModelForImageTextToText
from typer.testing import CliRunner

from modeling_aim import AimForConditionalGeneration, checks
from modeling_aim.checks import PROPERTIES, QUESTION, Answer, Case, NotApplicable, check_model, run_checks
from modeling_aim.checks.alone import under_rounding
from modeling_aim.checks.case import LONG_QUESTION, noise
from modeling_aim.checks.reading import reading_under_rounding
from modeling_aim.cli import app
from modeling_aim.reading_aim import read_hidden_states

PUBLISHED = Path(__file__).parent.parent / "hub_configs" / "SmolVLM-256M" / "config.json"


def test_another_family_gets_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbones.MORE_FAMILIES, "internvl", BUILDERS["internvl"])
    built = backbones.build("internvl")
    built.model.to(torch.bfloat16).save_pretrained(tmp_path)
    built.processor.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.output.count("│ yes") >= len(PROPERTIES) - 2 and "│ no " not in done.output


@pytest.mark.parametrize(("family", "dtype"), [("idefics3", torch.float32), ("qwen2_vl", torch.float16)])
def test_all_properties_hold_in_the_other_precisions(family: str, dtype: torch.dtype) -> None:
    """bfloat16 is the test above; tests/test_matrix.py has every family."""
    built = backbones.build(family)
    model = AimForConditionalGeneration.from_backbone(built.model.to(dtype), built.processor)
    results = list(run_checks(model))
    assert len(results) >= len(PROPERTIES) - 3
    assert [(sentence, problem) for sentence, problem in results if problem] == []


def test_a_class_that_cannot_work_is_told_why(tmp_path: Path) -> None:
    config = AutoConfig.for_model("florence2")
    config.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["check", str(tmp_path), "--from-config"])
    assert done.exit_code == 1
    assert "cannot use Florence2" in done.output and "encoder-decoder" in " ".join(done.output.split())


def test_so_it_is_wherever_a_plug_in_is_made() -> None:
    config = AutoConfig.for_model("florence2")
    for part in (config.text_config, config.vision_config):
        part.update({name: 1 for name in ("encoder_layers", "decoder_layers") if hasattr(part, name)})
    with pytest.raises(ValueError, match="cannot use Florence2ForConditionalGeneration: it is an encoder-decoder"):
        AimForConditionalGeneration.from_backbone(AutoModelForImageTextToText.from_config(config))


def test_several_streams_of_states_keep_to_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma3n hands on (streams, batch, length, width): nothing enters at depth, and the paper's preset works."""
    monkeypatch.setitem(backbones.MORE_FAMILIES, "gemma3n", timm_families.BUILDERS["gemma3n"])
    built = backbones.build("gemma3n")
    with pytest.raises(ValueError, match=r"several streams of states.*cannot enter at depth.*preset='paper'"):
        AimForConditionalGeneration.from_backbone(built.model, built.processor)
    paper = Case(AimForConditionalGeneration.from_backbone(built.model, built.processor, preset="paper"))
    for name in ("demonstrations_reach", "images_matter", "chosen_for_each_row", "gradients", "reload"):
        PROPERTIES[name](paper)
    with pytest.raises(NotApplicable, match="preset='paper'"):
        PROPERTIES["without_training"](paper)
    with pytest.raises(ValueError, match=r"shape \(2, 1, \d+, 64\).*preset='paper'"):  # where the family is not known
        read_hidden_states(built.model, dict(paper.query()), [1])


# --- what counts as the same


def answer(case: Case, *ids: int, lead: float = 1.0) -> Answer:
    """One row of an answer of `ids`, each of which has a logit that is `lead` above all others."""
    logits = [torch.nn.functional.one_hot(torch.tensor([i]), 8) * lead + torch.arange(8) % 2 for i in ids]
    return Answer(torch.tensor([ids]), tuple(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_token_counts_as_the_same_only_within_rounding(dtype: torch.dtype) -> None:
    case = Case(backbones.plugin("llava").model)
    case.model.backbone.to(dtype)
    small = case.tolerance / 4
    case.require_same(answer(case, 1, 3, 5, lead=small), answer(case, 1, 5, 7, lead=small))  # apart from a tie on
    case.require_same(answer(case, 1, 3), answer(case, 1, 3))
    for other in (answer(case, 1, 5), answer(case, 1, 3, 3), answer(case, 1, 3, lead=1 + 8 * case.tolerance)):
        with pytest.raises(AssertionError, match="the answers differ"):
            case.require_same(other, answer(case, 1, 3))
    with pytest.raises(AssertionError, match="differ by"):
        case.require_close(torch.tensor([1.0, 1.0 + 4 * case.tolerance]), torch.ones(2))
    with pytest.raises(AssertionError, match="differ by"):
        case.require_close(torch.full((2,), float("nan")), torch.full((2,), float("nan")))


def family(name: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Case:
    """A case on a family beyond those of the matrix."""
    builders = {**BUILDERS, **further_families.BUILDERS, **popular_families.BUILDERS}
    monkeypatch.setitem(backbones.MORE_FAMILIES, name, builders[name])
    built = backbones.build(name)
    return Case(AimForConditionalGeneration.from_backbone(built.model.to(dtype), built.processor))


def test_a_choice_that_rounding_turns_is_told_from_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 one rounding of what enters llama4 sends a token of these demonstrations to another expert."""
    case = family("llama4", monkeypatch, torch.bfloat16)
    demos = [(noise(1), "a dax is here."), (noise(2), "a wug")]
    own = reading_under_rounding(case, demos)
    assert case.tolerance < own < 1
    rows = case.model.read(demos).vectors
    turned = rows.clone()
    turned[3] *= 1 - 0.9 * own
    with pytest.raises(NotApplicable, match="inputs rounded once more in bfloat16 change the backbone alone by"):
        case.require_close(turned, rows, lambda: own)
    with pytest.raises(AssertionError, match="they differ by"):
        case.require_close(turned, rows)
    read = AimForConditionalGeneration.read

    def shifted(model: AimForConditionalGeneration, demos: Any, batch_size: int | None = None) -> Any:
        """A defect: what is read in a batch goes to its neighbour's place."""
        fused = read(model, demos, batch_size)
        return fused if batch_size is None else dataclasses.replace(fused, vectors=fused.vectors.roll(1, dims=0))

    monkeypatch.setattr(AimForConditionalGeneration, "read", shifted)
    with pytest.raises(AssertionError, match="they differ by"):
        PROPERTIES["equal_images"](case)


def test_in_float32_a_rounding_excuses_nothing() -> None:
    case = Case(backbones.plugin("llava").model)
    prompts = [case.query(QUESTION), case.query(LONG_QUESTION)]
    for layers in ([], [1]):
        own = under_rounding(case, prompts, layers)
        assert 0 < own < case.tolerance / 4
    with pytest.raises(AssertionError, match="they differ by inf"):  # a backbone that overflows excuses nothing either
        case.require_close(torch.full((2,), float("nan")), torch.ones(2), lambda: float("inf"))
    with pytest.raises(AssertionError, match=r"differ by .* in float32 change the backbone alone by"):
        case.require_close(torch.tensor([1 + 2 * case.tolerance, 1.0]), torch.ones(2), lambda: own)


def test_beams_are_compared_by_their_scores() -> None:
    """Beams that are within rounding of one another may change places: their logits cannot be compared row by row."""
    case = Case(backbones.plugin("llava").model)
    beams = case.answered(case.query(QUESTION, LONG_QUESTION), case.demos, num_beams=3)
    assert beams.scores is not None and beams.scores.shape == (2,)
    later = (beams.logits[0], *(logits.flip(0) for logits in beams.logits[1:]))
    case.require_same(dataclasses.replace(beams, logits=later), beams)
    other = dataclasses.replace(beams, ids=beams.ids.flip(1), scores=beams.scores - 0.5)
    with pytest.raises(AssertionError, match=r"other beams are returned, whose scores differ by 5\.0e-01"):
        case.require_same(other, beams)


def test_two_images_are_refused_by_the_backbone_or_it_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        NotApplicable, match=r"own processor does not take two such images: .*1 \|SPEAKER\| tokens and 2"
    ):
        PROPERTIES["several_images"](family("fuyu", monkeypatch))
    case = Case(backbones.plugin("llava").model)
    case.processor.max_image_pixels = 100
    with pytest.raises(ValueError, match="pixels"):
        PROPERTIES["several_images"](case)


def test_what_does_not_apply_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = family("fuyu", monkeypatch)
    case.model.save_pretrained(tmp_path, include_backbone=True)
    for name in PROPERTIES.keys() - {"several_images", "image_counts"}:
        monkeypatch.delitem(PROPERTIES, name)
    done = CliRunner().invoke(app, ["check", str(tmp_path)], env={"COLUMNS": "250"})
    assert done.exit_code == 0, done.output
    assert "│ n/a │ queries and demonstrations with two images" in done.output and "own processor" in done.output
    assert done.output.count("│ yes") == 1


def test_no_property_is_an_assert_statement() -> None:
    """`python -O` strips those: every property would hold."""
    files = sorted(Path(checks.__file__).parent.glob("*.py"))
    found = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Assert)]
    assert len(files) > 3 and not found
    case = Case(backbones.plugin("llava").model)
    case.demos = [case.demos[0]] * 3  # their order does not count
    with pytest.raises(AssertionError, match="another prompt gives the same logits"):
        PROPERTIES["demonstrations_reach"](case)


# --- at real size


def published(folder: Path) -> None:
    """The published config of SmolVLM-256M with its image processor's settings; the tokenizer is a small one."""
    special = [*IDEFICS_SPECIAL, "<global-img>", *TILES, *(f"<row_{i}_col_4>" for i in range(1, 5))]
    special += [f"<row_4_col_{i}>" for i in range(1, 4)]
    tokenizer = make_tokenizer(special, "<s>", IDEFICS3_CHAT)
    settings = json.loads(PUBLISHED.read_text())["backbone_config"]
    settings |= {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": tokenizer.pad_token_id}
    config = hf.Idefics3Config(**{name: value for name, value in settings.items() if name != "model_type"})
    config.save_pretrained(folder)
    sizes: dict[str, Any] = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    images = hf.Idefics3ImageProcessor(**sizes)
    hf.Idefics3Processor(images, tokenizer, image_seq_len=64, chat_template=IDEFICS3_CHAT).save_pretrained(folder)


def test_images_of_a_check_are_one_tile_where_they_would_be_many(tmp_path: Path) -> None:
    published(tmp_path)
    model = check_model(str(tmp_path), from_config=True)
    case = Case(model)
    assert case.query()["pixel_values"].shape[1:] == (1, 3, 512, 512)  # 17 tiles as published
    text, vision = model.backbone.config.text_config, model.backbone.config.vision_config
    assert (text.num_hidden_layers, vision.num_hidden_layers) == (2, 1)
    assert (text.hidden_size, vision.hidden_size) == (576, 768)
    for name in ("no_demonstrations", "without_training", "words_at_depth"):
        PROPERTIES[name](case)


@pytest.mark.slow
def test_a_check_of_the_published_config_ends_within_a_minute(tmp_path: Path) -> None:
    published(tmp_path)
    start = time.process_time()
    results = list(run_checks(check_model(str(tmp_path), from_config=True)))
    assert not [result for result in results if result[1]]
    assert time.process_time() - start < 60
