"""The prompt as embeddings: transformers gives the same logits from them, and what cannot work is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from backbones import DEMOS, build, picture, plugin
from families import FAMILIES, MORE_FAMILIES
from safetensors.torch import load_file
from typer.testing import CliRunner

from modeling_aim import AimForConditionalGeneration
from modeling_aim.cli import app

SERVED = ("llava", "llava_next", "llava_onevision", "vipllava", "idefics2", "idefics3", "smolvlm")
REFUSED = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe"), "positions in the image grid")
REFUSED |= {"qwen3_vl": "deepstack", "qwen3_vl_moe": "deepstack", "idefics": "image|cross-attention"}


def test_every_family_of_the_matrix_is_served_or_refused() -> None:
    assert {*SERVED, *REFUSED} == {*FAMILIES, *MORE_FAMILIES}


@pytest.mark.parametrize("family", SERVED)
def test_transformers_gives_the_same_logits_from_them(family: str) -> None:
    aim = plugin(family, preset="paper")
    inputs = aim.query("What is this?", "And what is that one there?")
    for demos in (DEMOS, [DEMOS, DEMOS[:2]], None):
        embeddings = aim.model.prompt_embeds(inputs, demos=demos)
        with torch.no_grad():
            wanted = aim.model(**inputs, demos=demos).logits[:, -1]
            found = [aim.backbone(inputs_embeds=one[None]).logits[0, -1] for one in embeddings]
        torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-4, atol=1e-4)
    read = aim.model.read(DEMOS)
    assert len(aim.model.prompt_embeds(inputs, read)[1]) == len(inputs["input_ids"][1]) + read.num_tokens
    answer = aim.answer(aim.query(), DEMOS)
    alone = aim.model.prompt_embeds(aim.query(), DEMOS)[0][None]
    assert torch.equal(aim.backbone.generate(inputs_embeds=alone, max_new_tokens=6, do_sample=False), answer)


@pytest.mark.parametrize("family", REFUSED)
def test_a_backbone_that_needs_more_is_refused(family: str) -> None:
    backbone = build(family)
    model = AimForConditionalGeneration.from_backbone(backbone.model, backbone.processor, preset="paper")
    from modeling_aim.checks import Case

    with pytest.raises(ValueError, match=rf"cannot answer from prompt embeddings alone.*({REFUSED[family]})"):
        model.prompt_embeds(Case(model).query(), DEMOS)


def test_they_can_be_exported_from_the_command_line(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "dax.png")
    picture(1).save(tmp_path / "query.png")
    (tmp_path / "demos.jsonl").write_text(json.dumps({"image": "dax.png", "label": "dax"}))
    aim = plugin("llava", preset="paper")
    aim.model.save_pretrained(tmp_path / "repo", include_backbone=True)
    command = ["export-prompt-embeds", "--repo", str(tmp_path / "repo"), "--demos", str(tmp_path / "demos.jsonl")]
    command += ["--image", str(tmp_path / "query.png"), "--question", "What is this?"]
    done = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "prompt.safetensors")])
    assert done.exit_code == 0, done.output
    found = load_file(tmp_path / "prompt.safetensors")["prompt_embeds"]
    prompt = aim.processor.prompt("What is this?")
    inputs = aim.processor(images=[[picture(1)]], text=[prompt], return_tensors="pt")
    wanted = aim.model.prompt_embeds(inputs, demos=[(picture(0), "dax")])[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
