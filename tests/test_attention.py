"""The attention study: shares of a whole, the backbone's own attentions, and positions found without family code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import more_families
import numpy as np
import pytest
import torch
from backbones import DEMOS, build, picture
from transformers import PreTrainedModel
from typer.testing import CliRunner

from modeling_aim import AimProcessor
from modeling_aim.cli import app
from modeling_aim.evaluation.attention import (
    DEMO_IMAGES,
    DEMO_TEXT,
    PARTS,
    QUERY_IMAGES,
    QUERY_TEXT,
    parts_of,
    study,
    words_in,
)
from modeling_aim.evaluation.methods import PromptBuilder, ShownShot, full
from modeling_aim.evaluation.subject import Subject
from modeling_aim.evaluation.task import Example, Shot

AIM_TINY = Path(__file__).parents[1] / "hub_configs" / "aim-tiny"
QUESTION = "What is this?"
FAMILIES = ("llava", "qwen2_5_vl", "idefics3", "llava_next", "gemma3")
ANSWER_IN_A_ROLE = {"image": picture(5), "question": "Which letter?", "answer": "a"}  # as in "assistant"


def subject(family: str, prompts: str = "plain", **text: Any) -> Subject:
    """A tiny backbone without AIM."""
    if hasattr(more_families, family):
        torch.manual_seed(0)
        model, processor = getattr(more_families, family)(**text)
    else:
        backbone = build(family, **text)
        model, processor = backbone.model, backbone.processor
    wrapped = AimProcessor(processor)
    return Subject(model.eval(), wrapped, PromptBuilder(wrapped, prompts))


def asked(*more: Any) -> tuple[Example, list[ShownShot]]:
    """A query with demonstrations of every kind, one of them without an image, one with two."""
    pairs = [demo if isinstance(demo, dict) else dict(zip(("image", "text"), demo, strict=True)) for demo in DEMOS]
    shots = [Shot(str(number), pair) for number, pair in enumerate([*pairs, *more])]
    return Example("query", (picture(9),), QUESTION, ("x",)), [ShownShot(shot, shot) for shot in shots]


def encoded(model: Subject, example: Example, shown: list[ShownShot]) -> tuple[Any, torch.Tensor]:
    """Inputs of the full prompt, and what its positions are."""
    prompt = full(model.prompt_builder, example, shown, 0)
    inputs = model.encode([prompt], ["prompt"]).inputs
    images = [*(len(one.images) for one in shown), len(example.images)]
    words = words_in(model.prompt_builder, example, shown, prompt.text)
    parts = parts_of(model.processor, model.backbone.config, prompt.text, words, images, inputs["input_ids"][0])
    return inputs, parts


def said(model: Subject, inputs: Any, parts: torch.Tensor, part: int) -> str:
    """The words at the positions of a part, without spaces."""
    text = model.processor.tokenizer.decode(inputs["input_ids"][0][parts == part], skip_special_tokens=False)
    return "".join(text.split())


def kinds(model: Any) -> list[str]:
    """The kind of attention of every part of a model."""
    return [m.config._attn_implementation for m in model.modules() if hasattr(m, "set_attn_implementation")]


@pytest.mark.parametrize("prompts", ["plain", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_what_they_are_called(family: str, prompts: str) -> None:
    model = subject(family, prompts)
    example, shown = asked(ANSWER_IN_A_ROLE)
    inputs, parts = encoded(model, example, shown)
    words = "".join(model.processor.apply_template(one.words)[0] for one in shown)
    assert said(model, inputs, parts, DEMO_TEXT) == "".join(words.split())
    assert said(model, inputs, parts, QUERY_TEXT) == "".join(QUESTION.split())
    is_image = inputs["input_ids"][0] == model.backbone.config.image_token_id
    assert torch.equal(is_image, (parts == DEMO_IMAGES) | (parts == QUERY_IMAGES))
    alone, of_query = encoded(model, example, [])
    assert (parts == QUERY_IMAGES).sum() == (of_query == QUERY_IMAGES).sum() > 0
    assert (of_query == DEMO_IMAGES).sum() == (of_query == DEMO_TEXT).sum() == 0
    assert len(alone["input_ids"][0]) < len(parts)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_5"])
def test_shares_are_the_backbones_own_attentions(family: str) -> None:
    model = subject(family)
    example, shown = asked()
    found = study(model, [(example, shown), (example, shown[:2])])
    assert np.allclose(found.shares.sum(axis=-1), 1, atol=1e-5)
    inputs, parts = encoded(model, example, shown)
    assert found.tokens[0].tolist() == [int((parts == part).sum()) for part in range(len(PARTS))]

    model.backbone.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.backbone(**inputs, output_attentions=True)
    own = [one for one in output.attentions if one is not None]  # a layer with a recurrent state has none
    assert len(found.layers) == len(own) == (1 if family == "qwen3_5" else 3)
    for layer, weights in enumerate(own):
        for part in range(len(PARTS)):
            by_hand = float(weights[0, :, -1, parts == part].sum(dim=-1).mean())
            assert found.shares[0, layer, part] == pytest.approx(by_hand, abs=1e-5)


def test_layers_are_counted_from_one_and_only_those_with_attention() -> None:
    assert study(subject("qwen3_5"), [asked()]).layers == (2,)
    assert study(subject("llava"), [asked()]).layers == (1, 2, 3)


def test_attention_that_does_not_look_is_shared_out_by_the_number_of_tokens() -> None:
    model = subject("llava")
    for layer in model.backbone.get_decoder().layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    found = study(model, [asked()])
    share = found.tokens / found.tokens.sum(axis=-1, keepdims=True)
    assert np.allclose(found.shares, share[:, None], atol=1e-5)
    assert np.allclose(found.relative, 1, atol=1e-4)


def test_the_kind_of_attention_is_put_back() -> None:
    model = subject("llava")
    model.backbone.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    before = kinds(model.backbone)
    assert set(before) == {"sdpa", "eager"}
    first = study(model, [asked()])
    assert kinds(model.backbone) == before
    with pytest.raises(ValueError, match="Ask for fewer shots"):
        study(subject("llava", max_position_embeddings=64), [asked()])
    long = subject("llava")
    long.longest = 64
    before = kinds(long.backbone)
    with pytest.raises(ValueError, match="64 positions"):
        study(long, [asked()])
    assert kinds(long.backbone) == before
    model.backbone.set_attn_implementation("eager")
    assert np.allclose(study(model, [asked()]).shares, first.shares, atol=1e-5)


def test_a_backbone_that_cannot_be_switched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject("llava")
    monkeypatch.setattr(PreTrainedModel, "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match=r"cannot be switched to eager attention \(it has 'sdpa'\)"):
        study(model, [asked()])


@pytest.mark.parametrize("family", ["idefics", "mllama"])
def test_cross_attention_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match=f"no positions in a prompt of {family}.*cross-attention"):
        study(subject(family), [asked()])


def test_a_part_that_no_prompt_has_is_left_out_of_means() -> None:
    example, shown = asked()
    blind = Example("blind", (), QUESTION, ("x",))
    summary = study(subject("llava"), [(blind, [shown[2]])], {"task": "words"}).summary()
    assert summary["tokens"]["demo_images"] == summary["tokens"]["query_images"] == 0
    assert summary["token_relative_to_average"]["demo_images"] == [None, None, None]
    assert summary["share"]["query_text"][0] > 0
    assert summary["task"] == "words" and json.loads(json.dumps(summary)) == summary
    both = study(subject("llava"), [(blind, [shown[2]]), (example, shown)]).summary()
    assert all(value is not None for value in both["token_relative_to_average"]["demo_images"])


# --- the command


def run(*arguments: Any) -> Any:
    """Run `aim eval attention`."""
    return CliRunner().invoke(app, ["eval", "attention", *map(str, arguments)])


def episodes(folder: Path, count: int = 3) -> Path:
    """Episodes of four demonstrations each."""
    lines = []
    for number in range(count):
        for place in range(5):
            picture(10 * number + place).save(folder / f"{number}-{place}.png")
        demos = [{"image": f"{number}-{place}.png", "text": "this is bako ."} for place in range(4)]
        lines.append({"demos": demos, "queries": [{"image": f"{number}-4.png", "question": "this is", "answer": "x"}]})
    path = folder / "episodes.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_the_command_studies_a_task(tmp_path: Path) -> None:
    spec = f"episodes:{episodes(tmp_path)}"
    result = run("--repo", AIM_TINY, "--task", spec, "--shots", 2, "--limit", 2, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "attention.json").read_text(encoding="utf-8"))
    assert (summary["prompts"], summary["demonstrations"], summary["task"]) == (2, 2, spec)
    assert summary["tokens"]["demo_images"] == 2 * 64 and summary["tokens"]["query_images"] == 64
    for layer in range(len(summary["layers"])):
        assert sum(summary["share"][part][layer] for part in PARTS) == pytest.approx(1, abs=1e-2)
    assert (tmp_path / "out" / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_draws_demonstrations_from_a_pool(tmp_path: Path) -> None:
    rows = []
    for number in range(6):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "how many are there ?", "answer": "two"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = ("--repo", AIM_TINY, "--task", f"jsonl:{tmp_path / 'questions.jsonl'}", "--prompts", "chat")
    result = run(*given, "--shots", 3, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "out" / "attention.json").read_text(encoding="utf-8"))
    assert summary["demonstrations"] == 3 and summary["tokens"]["demo_images"] == 3 * 64 and summary["prompts"] > 1
    result = run(*given, "--shots", 6, "--output", tmp_path / "more")
    assert result.exit_code == 1 and "6 demonstrations are asked for" in " ".join(result.output.split())


def test_the_command_studies_files_and_bare_backbones(tmp_path: Path) -> None:
    episodes(tmp_path, count=1)
    demos = tmp_path / "demos.jsonl"
    demos.write_text('{"image": "0-0.png", "label": "bako"}\n{"image": "0-1.png", "text": "this is demi ."}\n')
    query = ("--demos", demos, "--image", tmp_path / "0-4.png", "--question", "what is this ?")
    outputs = [tmp_path / name for name in ("plugin", "bare")]
    for model, output in zip((("--repo", AIM_TINY), ("--backbone", AIM_TINY / "backbone")), outputs, strict=True):
        result = run(*model, *query, "--output", output)
        assert result.exit_code == 0, result.output
    of_plugin, bare = (json.loads((one / "attention.json").read_text(encoding="utf-8")) for one in outputs)
    assert of_plugin["share"] == bare["share"] and of_plugin["demonstrations"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give --repo or --backbone"),
        (("--repo", AIM_TINY), "Give --task SPEC, or --demos FILE"),
        (("--repo", AIM_TINY, "--demos", "demos.jsonl"), "--demos needs a query"),
        (("--repo", AIM_TINY, "--task", "nothing:here"), "'nothing:here' is not a task"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path: Path, arguments: Any, message: str) -> None:
    result = run(*arguments, "--output", tmp_path / "out")
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert message in " ".join(result.output.split())
